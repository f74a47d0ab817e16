"""What a training step gets out of this CPU, how much of it is padding, and how fast transformers with torch is beside.

    python -m benchmarks.training [--workdir runs/bench-training] [--json FILE] [--rounds 5] [--no-torch]

Three parts, in one process. `peak`: model FLOPs of the jitted step by its time, over the rate of large float32 products
measured right before and after it, the faster of JAX's and torch's. `padding`: of packed batches of real trajectories,
the shipped policy's in TextCraft, which are sampled into the work directory once. `speed`: real tokens a second on them
beside torch, in turns: token classification with AdamW, fused, as in TRL's PRM loop, on padded batches of as many
trajectories as hold our tokens; shuffled (`torch`) and sorted by length (`torch_by_length`). All in float32, equal
weights. Ratios are of neighbours in time: other work on the machine slows both.
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
from jaxprm.workflow.run import run
from jaxprm.workflow.workdir import WorkDirectory

CONFIG = Path(__file__).parents[1] / "configs/textcraft_tiny.py"
SETTINGS = config_lib.RewardModelConfig(label="bench")
SQUARE = 2048  # of the products that the peak is measured by
SIZES = {  # of the models that are compared with torch; `tiny` has the shipped policy's
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


class Ours:
    """A model with its jitted step: the state goes from call to call."""

    def __init__(self, config: TransformerConfig, data: config_lib.DataConfig, *, steps: int, parameters: Any = None):
        self.mesh = sharding.make_mesh(config_lib.MeshConfig())
        self.programs = make_programs(SETTINGS, config, self.mesh, length=data.length, steps=steps, seed=0)
        if parameters is None:
            parameters = nnx.state(RewardModel(config, rngs=nnx.Rngs(0)))
        # In the containers that a checkpoint is read into, whose leaves have the same order; copied, for init donates.
        leaves = [jnp.copy(leaf) for leaf in jax.tree.leaves(parameters)]
        expected = [leaf.shape for leaf in jax.tree.leaves(self.programs.parameters)]
        assert [leaf.shape for leaf in leaves] == expected
        self.state = self.programs.init(jax.tree.unflatten(jax.tree.structure(self.programs.parameters), leaves))

    def step(self, batch: dict[str, np.ndarray]) -> None:
        placed = sharding.put_batch(batch, self.mesh, batch_fields(SETTINGS))
        self.state, metrics = self.programs.train_step(self.state, placed, nnx.State({}))
        jax.block_until_ready((self.state, metrics))


def full_batch(config: TransformerConfig, data: config_lib.DataConfig) -> dict[str, np.ndarray]:
    """Random tokens, one trajectory a row, as FLOPs are counted."""
    rng, (rows, length, steps) = np.random.default_rng(0), (data.rows, data.length, data.steps_per_row)
    ends = np.broadcast_to(np.linspace(1, length - 1, steps).astype(np.int32), (rows, steps))
    number = np.broadcast_to(np.arange(steps), (rows, steps))
    return {
        "tokens": rng.integers(3, config.vocab_size, (rows, length)).astype(np.int32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "read_positions": ends,
        "state_positions": ends - 1,
        "rewards": (number == steps - 1).astype(np.float32),
        "weights": np.ones((rows, steps), np.float32),
        "is_first": number == 0,
        "is_last": number == steps - 1,
        "valid": np.ones((rows, steps), bool),
    }


def matmuls(torch: bool) -> dict[str, Callable[[], float]]:
    """FLOP/s of one large product, by library; called once already."""
    ours, a = jax.jit(jnp.matmul), jnp.ones((SQUARE, SQUARE))
    work: dict[str, Callable[[], Any]] = {"jax": lambda: ours(a, a).block_until_ready()}
    if torch:
        import torch as library

        b = library.ones(SQUARE, SQUARE)
        work["torch"] = lambda: library.mm(b, b)
    for one in work.values():
        one()

    def rate(one: Callable[[], Any]) -> float:
        return 2.0 * SQUARE**3 / min(seconds_of(one) for _ in range(3))

    return {name: functools.partial(rate, one) for name, one in work.items()}


def bench_peak(
    config: TransformerConfig, data: config_lib.DataConfig, *, rounds: int, torch: bool, progress: Any
) -> dict[str, Any]:
    """{"share", "shares", "flops_per_step", "step_seconds", "peak_flops": {library: ...}, "parameters"}.

    share: the median over the rounds of the step's rate by the faster library's, of both sides of the step.
    """
    ours, batch, rates = Ours(config, data, steps=rounds + 1), full_batch(config, data), matmuls(torch)
    flops = train_step_flops(config, SETTINGS, data, "reference").model
    ours.step(batch)  # compiles

    def measure() -> dict[str, float]:
        return {name: rate() for name, rate in rates.items()}

    found, seconds = [measure()], []
    for _ in range(rounds):
        seconds.append(seconds_of(lambda: ours.step(batch)))
        found.append(measure())
        progress.update()
    beside = [max(*before.values(), *after.values()) for before, after in itertools.pairwise(found)]
    shares = [flops / one / peak for one, peak in zip(seconds, beside, strict=True)]
    return {
        "share": statistics.median(shares),
        "shares": shares,
        "flops_per_step": flops,
        "step_seconds": statistics.median(seconds),
        "peak_flops": {name: statistics.median(one[name] for one in found) for name in rates},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(ours.state["parameters"])),
        "model": {name: getattr(config, name) for name in ("hidden_size", "layers", "intermediate_size")},
        "batch": [data.rows, data.length],
    }


def real_dataset(workdir: Path, data: config_lib.DataConfig, *, tasks: int, attempts: int) -> Dataset:
    """Shards of the shipped policy's attempts at training tasks; what is there already is not made again."""
    shipped = config_lib.load(CONFIG)
    collection = config_lib.CollectionConfig(train_tasks=tasks, validation_tasks=1, trajectories_per_task=attempts)
    experiment = msgspec.structs.replace(shipped, name="bench", collection=collection, data=data)
    run(experiment, workdir, until="build")
    return open_dataset(WorkDirectory(workdir) / "shards")


def packing(dataset: Dataset, data: config_lib.DataConfig, epochs: int) -> dict[str, Any]:
    """{"padding", "batches", ...}: the share of token slots that hold none, in the batches of `epochs` epochs."""
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

    Tokens are real ones, padding is left out; a ratio is our tokens a second by theirs, step by step.
    """
    batches = endless(dataset, data)
    tokens_of = lambda batch: (int(np.sum(batch["segments"] > 0)), batch["segments"].size)
    labelled = dataclasses.replace(config, head=Head(labels=2, bias=True))
    both = nnx.state(RewardModel(labelled, rngs=nnx.Rngs(0)))
    mine = nnx.State({"transformer": both["transformer"], "head": nnx.Param(both["head"][...][:, 1])})
    ours = Ours(config, data, steps=rounds + 1, parameters=mine)

    def step() -> tuple[int, int]:
        batch = next(batches)
        ours.step(batch)
        return tokens_of(batch)

    loops: dict[str, Callable[[], tuple[int, int]]] = {"jaxprm": step}
    found: dict[str, Any] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(mine))}
    if torch:
        from benchmarks.training_torch import TokenClassification, load

        split = dataset.split("train")
        filled = training_batches(dataset, "train", **_shape(data), epochs=8, seed=0).fill
        rows = max(1, round(data.rows * data.length * filled / split.lengths.mean()))
        for name, grouped in (("torch", False), ("torch_by_length", True)):
            model = load(labelled, both, max_length=int(split.lengths.max()))
            found["torch_parameters"] = sum(one.numel() for one in model.parameters())
            loops[name] = TokenClassification(model, split, dataset.metadata.pad_id, rows=rows, grouped=grouped).step
        found["torch_batch"] = rows
    for loop in loops.values():
        loop()
    counted: dict[str, list[tuple[int, int, float]]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            started = time.perf_counter()
            tokens, slots = loop()
            counted[name].append((tokens, slots, time.perf_counter() - started))
        progress.update()
    rates = {name: [tokens / seconds for tokens, _, seconds in steps] for name, steps in counted.items()}
    totals = {name: np.sum(steps, axis=0) for name, steps in counted.items()}
    return found | {
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
            name: [ours / theirs for ours, theirs in zip(rates["jaxprm"], rates[name], strict=True)]
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


def table(found: dict[str, Any]) -> str:
    lines = []
    if peak := found.get("peak"):
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peak["peak_flops"].items())
        lines.append(
            f"peak: {peak['share']:.0%} of the faster matmul ({min(peak['shares']):.0%} to {max(peak['shares']):.0%}); "
            f"{peak['flops_per_step'] / 1e9:.0f} GFLOP in {peak['step_seconds']:.2f} s; GFLOP/s of products: {rates}"
        )
    padding = found["padding"]
    lines.append(f"padding: {padding['padding']:.1%} of {padding['batches']} batches {padding['batch']}")
    for size, speed in found["speed"].items():
        for name, one in speed["runs"].items():
            line = f"speed, {size}: {name:<16} {one['tokens_per_second']:,.0f} real tokens/s"
            line += f", padding {one['padding']:.1%}"
            if ratios := speed["ratios"].get(name):
                line += f", jaxprm x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description="What training costs on this machine.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench-training"), help="of the trajectories")
    parser.add_argument("--tasks", type=int, default=16, help="that are attempted; default 16")
    parser.add_argument("--attempts", type=int, default=8, help="at each; default 8")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed; default 5")
    parser.add_argument("--sizes", default="tiny,small", help=f"of the models beside torch, of {', '.join(SIZES)}")
    parser.add_argument("--rows", type=int, default=2, help="of a packed batch; default 2")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens; default 2048")
    parser.add_argument("--hidden", type=int, default=768, help="of the model whose peak is measured; default 768")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="leave its part out")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave out what needs torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    keep_freed()
    sizes = options.sizes.split(",")
    if unknown := set(sizes) - SIZES.keys():
        parser.error(f"--sizes {min(unknown)}: must be of {', '.join(SIZES)}")

    data = config_lib.DataConfig(rows=options.rows, length=options.length, steps_per_row=options.length // 16)
    dataset = real_dataset(options.workdir, data, tasks=options.tasks, attempts=options.attempts)
    found: dict[str, Any] = {"load_before": os.getloadavg()[0], "cpus": len(os.sched_getaffinity(0))}
    found["padding"] = packing(dataset, data, epochs=4)
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
            found["peak"] = bench_peak(model, full, rounds=options.rounds, torch=options.torch, progress=progress)
        found["speed"] = {
            size: bench_speed(SIZES[size], dataset, data, rounds=options.rounds, torch=options.torch, progress=progress)
            for size in sizes
        }
    found["load_after"] = os.getloadavg()[0]
    print(table(found))
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    main()
