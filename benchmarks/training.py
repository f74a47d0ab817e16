"""Train step on this CPU: share of the peak, share of padding, and speed compared with transformers on torch.

    python -m benchmarks.training [--workdir runs/bench-training] [--json FILE] [--rounds 5] [--no-torch]

Three parts in one process, all in float32:

- peak: FLOP/s of the jitted step (model FLOPs), as a share of the rate of large products measured right before and
  after it, by JAX or torch, whichever is faster.
- padding: share of padding in packed batches of real trajectories, the shipped policy's in TextCraft. They are sampled
  into the work directory once.
- speed: real tokens per second on these trajectories, in turns with torch: token classification with fused AdamW as in
  TRL's PRM loop, from equal weights, on padded batches with as many tokens; shuffled (`torch`) and sorted by length
  (`torch_by_length`). Ratios compare neighbouring measurements, because other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

from data_pipeline.batches import training_batches
from data_pipeline.shards import Dataset, open_dataset
from jaxprm import config as config_lib
from jaxprm import files
from jaxprm.host_memory import keep_freed
from jaxprm.model import sharding
from jaxprm.model.config import Head, TransformerConfig
from jaxprm.model.transformer import RewardModel
from jaxprm.progress import bar
from jaxprm.training.flops import train_step_flops
from jaxprm.training.programs import batch_fields, make_programs
from jaxprm.workflow.run import run as run_stages
from jaxprm.workflow.workdir import WorkDirectory

CONFIG = Path(__file__).parents[1] / "configs/textcraft_tiny.py"
SETTINGS = config_lib.RewardModelConfig(label="bench")
SQUARE = 2048  # size of the matrices whose product measures the peak
SIZES = {  # models that are compared with torch; `tiny` is the shipped policy
    "tiny": TransformerConfig(
        vocab_size=1280, hidden_size=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate_size=256
    ),
    "small": TransformerConfig(
        vocab_size=1280, hidden_size=512, layers=4, heads=8, kv_heads=2, head_dim=64, intermediate_size=1408
    ),
}


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Trainer:
    """A model with its jitted train step and its state."""

    def __init__(self, config: TransformerConfig, data: config_lib.DataConfig, *, steps: int, parameters: Any = None):
        self.mesh = sharding.make_mesh(config_lib.MeshConfig())
        self.programs = make_programs(SETTINGS, config, self.mesh, length=data.length, steps=steps, seed=0)
        if parameters is None:
            parameters = nnx.state(RewardModel(config, rngs=nnx.Rngs(0)))
        # Leaves are moved into the tree that `init` expects, and copied because `init` donates them.
        leaves = [jnp.copy(leaf) for leaf in jax.tree.leaves(parameters)]
        expected = [leaf.shape for leaf in jax.tree.leaves(self.programs.parameters)]
        assert [leaf.shape for leaf in leaves] == expected
        self.state = self.programs.init(jax.tree.unflatten(jax.tree.structure(self.programs.parameters), leaves))

    def step(self, batch: dict[str, np.ndarray]) -> None:
        placed = sharding.put_batch(batch, self.mesh, batch_fields(SETTINGS))
        self.state, metrics = self.programs.train_step(self.state, placed, nnx.State({}))
        jax.block_until_ready((self.state, metrics))


def full_batch(config: TransformerConfig, data: config_lib.DataConfig) -> dict[str, np.ndarray]:
    """Random tokens in full rows of one trajectory each, as the FLOPs formula assumes."""
    rng, (rows, length, steps) = np.random.default_rng(0), (data.rows, data.length, data.steps_per_row)
    ends = np.broadcast_to(np.linspace(1, length - 1, steps).astype(np.int32), (rows, steps))
    index = np.broadcast_to(np.arange(steps), (rows, steps))
    return {
        "tokens": rng.integers(3, config.vocab_size, (rows, length)).astype(np.int32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "read_positions": ends,
        "state_positions": ends - 1,
        "rewards": (index == steps - 1).astype(np.float32),
        "weights": np.ones((rows, steps), np.float32),
        "is_first": index == 0,
        "is_last": index == steps - 1,
        "valid": np.ones((rows, steps), bool),
    }


def matmul_rates(torch: bool) -> dict[str, Callable[[], float]]:
    """By library, a function that measures the FLOP/s of one large product; the products are compiled."""
    matmul, a = jax.jit(jnp.matmul), jnp.ones((SQUARE, SQUARE))
    products: dict[str, Callable[[], Any]] = {"jax": lambda: matmul(a, a).block_until_ready()}
    if torch:
        import torch as library

        b = library.ones(SQUARE, SQUARE)
        products["torch"] = lambda: library.mm(b, b)
    for product in products.values():
        product()

    def rate(product: Callable[[], Any]) -> float:
        return 2.0 * SQUARE**3 / min(seconds_of(product) for _ in range(3))

    return {name: functools.partial(rate, product) for name, product in products.items()}


def bench_peak(
    config: TransformerConfig, data: config_lib.DataConfig, *, rounds: int, torch: bool, progress: Any
) -> dict[str, Any]:
    """{"share", "shares", "flops_per_step", "step_seconds", "peak_flops": {library: ...}, "parameters"}.

    share: median over the rounds of the step's FLOP/s by the best rate of a product, before or after the step.
    """
    trainer, batch = Trainer(config, data, steps=rounds + 1), full_batch(config, data)
    rates = matmul_rates(torch)
    flops = train_step_flops(config, SETTINGS, data, "reference").model
    trainer.step(batch)  # compiles

    def measure() -> dict[str, float]:
        return {name: rate() for name, rate in rates.items()}

    measured, step_seconds = [measure()], []
    for _ in range(rounds):
        step_seconds.append(seconds_of(lambda: trainer.step(batch)))
        measured.append(measure())
        progress.update()
    peaks = [max(*before.values(), *after.values()) for before, after in itertools.pairwise(measured)]
    shares = [flops / seconds / peak for seconds, peak in zip(step_seconds, peaks, strict=True)]
    return {
        "share": statistics.median(shares),
        "shares": shares,
        "flops_per_step": flops,
        "step_seconds": statistics.median(step_seconds),
        "peak_flops": {name: statistics.median(rate[name] for rate in measured) for name in rates},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainer.state["parameters"])),
        "model": {name: getattr(config, name) for name in ("hidden_size", "layers", "intermediate_size")},
        "batch": [data.rows, data.length],
    }


def real_dataset(workdir: Path, data: config_lib.DataConfig, *, tasks: int, attempts: int) -> Dataset:
    """Shards of the shipped policy's attempts at training tasks, reused if the work directory has them."""
    shipped = config_lib.load(CONFIG)
    collection = config_lib.CollectionConfig(train_tasks=tasks, validation_tasks=1, trajectories_per_task=attempts)
    experiment = msgspec.structs.replace(shipped, name="bench", collection=collection, data=data)
    run_stages(experiment, workdir, until="build")
    return open_dataset(WorkDirectory(workdir) / "shards")


def packing(dataset: Dataset, data: config_lib.DataConfig, epochs: int) -> dict[str, Any]:
    """{"padding", "batches", ...}: padding is the share of empty token slots in the batches of `epochs` epochs."""
    batches = training_batches(dataset, "train", **_shape(data), epochs=epochs, seed=0)
    lengths = batches.split.lengths
    return {
        "padding": 1 - batches.fill,
        "batches": len(batches),
        "trajectories": len(lengths),
        "lengths": {"mean": float(lengths.mean()), "p95": float(np.percentile(lengths, 95)), "max": int(lengths.max())},
        "batch": [data.rows, data.length],
    }


def bench_speed(
    config: TransformerConfig, dataset: Dataset, data: config_lib.DataConfig, *, rounds: int, torch: bool, progress: Any
) -> dict[str, Any]:
    """{"runs": {name: {"tokens_per_second", "padding", "tokens", "seconds"}}, "ratios": {name: of every round}, ...}.

    Tokens are counted without padding. A ratio is jaxprm's tokens per second by torch's, in the same round.
    """
    batches = endless(dataset, data)
    labelled = dataclasses.replace(config, head=Head(labels=2, bias=True))
    both = nnx.state(RewardModel(labelled, rngs=nnx.Rngs(0)))
    parameters = nnx.State({"transformer": both["transformer"], "head": nnx.Param(both["head"][...][:, 1])})
    trainer = Trainer(config, data, steps=rounds + 1, parameters=parameters)

    def step() -> tuple[int, int]:
        """Trains on a batch; returns its (tokens, token slots)."""
        batch = next(batches)
        trainer.step(batch)
        return int(np.sum(batch["segments"] > 0)), batch["segments"].size

    loops: dict[str, Callable[[], tuple[int, int]]] = {"jaxprm": step}
    results: dict[str, Any] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters))}
    if torch:
        from benchmarks.training_torch import TokenClassification, load

        split = dataset.split("train")
        filled = training_batches(dataset, "train", **_shape(data), epochs=8, seed=0).fill
        rows = max(1, round(data.rows * data.length * filled / split.lengths.mean()))
        for name, grouped in (("torch", False), ("torch_by_length", True)):
            model = load(labelled, both, max_length=int(split.lengths.max()))
            results["torch_parameters"] = sum(parameter.numel() for parameter in model.parameters())
            loops[name] = TokenClassification(model, split, dataset.metadata.pad_id, rows=rows, grouped=grouped).step
        results["torch_batch"] = rows
    for loop in loops.values():
        loop()  # compiles
    counted: dict[str, list[tuple[int, int, float]]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            started = time.perf_counter()
            tokens, slots = loop()
            counted[name].append((tokens, slots, time.perf_counter() - started))
        progress.update()
    rates = {name: [tokens / seconds for tokens, _, seconds in steps] for name, steps in counted.items()}
    totals = {name: np.sum(steps, axis=0) for name, steps in counted.items()}
    return results | {
        "runs": {
            name: {
                "tokens_per_second": float(total[0] / total[2]),
                "padding": float(1 - total[0] / total[1]),
                "tokens": int(total[0]),
                "seconds": float(total[2]),
            }
            for name, total in totals.items()
        },
        "ratios": {
            name: [jaxprm / torch for jaxprm, torch in zip(rates["jaxprm"], rates[name], strict=True)]
            for name in loops
            if name != "jaxprm"
        },
    }


def endless(dataset: Dataset, data: config_lib.DataConfig) -> Iterator[dict[str, np.ndarray]]:
    seed = 0
    while True:
        yield from training_batches(dataset, "train", **_shape(data), epochs=8, seed=seed)
        seed += 1


def _shape(data: config_lib.DataConfig) -> dict[str, int]:
    return {"rows": data.rows, "length": data.length, "steps_per_row": data.steps_per_row}


def table(results: dict[str, Any]) -> str:
    lines = []
    if peak := results.get("peak"):
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peak["peak_flops"].items())
        lines.append(
            f"peak: {peak['share']:.0%} of the faster matmul ({min(peak['shares']):.0%} to {max(peak['shares']):.0%}); "
            f"{peak['flops_per_step'] / 1e9:.0f} GFLOP in {peak['step_seconds']:.2f} s; GFLOP/s of products: {rates}"
        )
    padding = results["padding"]
    lines.append(f"padding: {padding['padding']:.1%} of {padding['batches']} batches {padding['batch']}")
    for size, speed in results["speed"].items():
        for name, run in speed["runs"].items():
            line = f"speed, {size}: {name:<16} {run['tokens_per_second']:,.0f} real tokens/s"
            line += f", padding {run['padding']:.1%}"
            if ratios := speed["ratios"].get(name):
                line += f", jaxprm x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description="Measures the train step on this machine.")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/bench-training"), help="where the trajectories are sampled"
    )
    parser.add_argument("--tasks", type=int, default=16, help="training tasks; default 16")
    parser.add_argument("--attempts", type=int, default=8, help="attempts at each task; default 8")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; default 5")
    parser.add_argument("--sizes", default="tiny,small", help=f"models compared with torch: {', '.join(SIZES)}")
    parser.add_argument("--rows", type=int, default=2, help="rows of a packed batch; default 2")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row; default 2048")
    parser.add_argument(
        "--hidden", type=int, default=768, help="width of the model whose peak is measured; default 768"
    )
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="skip the part peak")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="skip everything that needs torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    options = parser.parse_args(arguments)
    keep_freed()
    sizes = options.sizes.split(",")
    if unknown := set(sizes) - SIZES.keys():
        parser.error(f"--sizes {min(unknown)}: must be of {', '.join(SIZES)}")

    data = config_lib.DataConfig(rows=options.rows, length=options.length, steps_per_row=options.length // 16)
    dataset = real_dataset(options.workdir, data, tasks=options.tasks, attempts=options.attempts)
    results: dict[str, Any] = {"load_before": os.getloadavg()[0], "cpus": len(os.sched_getaffinity(0))}
    results["padding"] = packing(dataset, data, epochs=4)
    with bar("bench training", options.rounds * (len(sizes) + options.peak), unit="round") as progress:
        if options.peak:
            model = TransformerConfig(
                vocab_size=1280,
                hidden_size=options.hidden,
                layers=4,
                heads=options.hidden // 64,
                kv_heads=options.hidden // 64,
                head_dim=64,
                intermediate_size=options.hidden * 8 // 3 // 64 * 64,
            )
            full = config_lib.DataConfig(rows=4, length=512, steps_per_row=32)
            results["peak"] = bench_peak(model, full, rounds=options.rounds, torch=options.torch, progress=progress)
        results["speed"] = {
            size: bench_speed(SIZES[size], dataset, data, rounds=options.rounds, torch=options.torch, progress=progress)
            for size in sizes
        }
    results["load_after"] = os.getloadavg()[0]
    print(table(results))
    if options.json:
        files.write_json(options.json, results)


if __name__ == "__main__":
    main()
