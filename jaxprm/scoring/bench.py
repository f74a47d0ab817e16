"""Measures the cost of scoring a search on a synthetic tree: the engine, one packed prefill, transformers in torch.

Shapes: B states of a round, T tokens of a state, N candidates of a state, A tokens of an action, O of an observation.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import Shapes
from jaxprm.model.transformer import RewardModel
from jaxprm.scoring.engine import LENGTH_BUCKETS, Engine, TokenCounts

SIZES = {
    "tiny": TransformerConfig(
        vocab_size=1280, hidden_size=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate_size=256
    ),
    "small": TransformerConfig(
        vocab_size=4096, hidden_size=512, layers=8, heads=8, kv_heads=2, head_dim=64, intermediate_size=1408
    ),
}
# Runs of seconds are repeated and the shortest counts: other work on the machine only adds time. Runs of minutes are
# timed once.
REPEATS = 3
# Ratio of successive cache lengths to compile for: at most this much of what a call reads is padding.
LENGTH_GROWTH = 1.25
# Tokens that torch encodes at once: all sequences of a round, unless that needs too much memory.
TORCH_TOKENS_A_CALL = 65_536


class TreeSizes(NamedTuple):
    """A search with fixed lengths: `beams` states a round, `candidates` actions of each state, `depth` rounds.

    size: of the model, a key of SIZES.
    """

    prompt_tokens: int = 1500
    action_tokens: int = 60
    observation_tokens: int = 200
    beams: int = 4
    candidates: int = 4
    depth: int = 15
    size: str = "tiny"

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return self.prompt_tokens + self.depth * self.action_tokens + (self.depth - 1) * self.observation_tokens

    @property
    def least_tokens(self) -> int:
        """Tokens of the tree, each counted once."""
        actions = self.depth * self.beams * self.candidates * self.action_tokens
        return self.prompt_tokens + actions + (self.depth - 1) * self.beams * self.observation_tokens


class Round(NamedTuple):
    """Tokens of one round of a search.

    Args:
      states: int32 [B, T].
      candidates: int32 [B, N, A].
      chosen: indices among the B * N candidates of those that are executed.
      observations: int32 [chosen, O].
    """

    states: np.ndarray
    candidates: np.ndarray
    chosen: np.ndarray
    observations: np.ndarray

    @property
    def sequences(self) -> np.ndarray:
        """Every candidate after its state: int32 [B * N, T + A]."""
        states = np.repeat(self.states, self.candidates.shape[1], axis=0)
        return np.concatenate([states, self.candidates.reshape(len(states), -1)], axis=1)


class BenchRun(NamedTuple):
    """Values of every candidate, in order of rounds, and what they cost."""

    values: np.ndarray
    seconds: float
    tokens_encoded: int


def bench_search(sizes: TreeSizes, *, torch: bool = True, seed: int = 0) -> dict[str, Any]:
    """{"setting", "runs": {name: {"seconds", ...}}}; docs/search.md explains the fields.

    torch: include the runs that need torch.

    Raises UserError for sizes that are not positive, and for paths too long to be scored uncached.
    """
    _check(sizes)
    config = SIZES[sizes.size]
    parameters = _parameters(config, seed)
    rounds = _tree(sizes, config.vocab_size, np.random.default_rng(seed))
    with jax.default_matmul_precision("highest"):
        engine_run, reference = _run_engine(sizes, config, parameters, rounds, seed)
        runs: dict[str, dict[str, Any]] = {"engine": engine_run}
        runs["packed_prefill"] = {"seconds": _time_prefill(sizes, config, parameters, seed)}
        others = {"uncached": _run_uncached(config, parameters, rounds)}
    if torch:
        model = _torch_model(config, parameters)
        others["torch_reencode"] = _run_torch_reencode(model, rounds)
        others["torch_kept_cache"] = _run_torch_kept_cache(model, rounds)
    for name, run in others.items():
        runs[name] = {
            "seconds": run.seconds,
            "tokens_encoded": run.tokens_encoded,
            "max_score_difference": float(np.abs(run.values - reference).max()),
        }
    runs["engine"]["max_score_difference"] = runs["uncached"]["max_score_difference"]
    return {"setting": sizes._asdict(), "runs": runs}


def bench_engine(sizes: TreeSizes, *, seed: int = 0) -> dict[str, Any]:
    """The engine's run of `bench_search`, with "reencoded_tokens": the tokens of every candidate and its history.

    Raises UserError as `bench_search`.
    """
    _check(sizes)
    config = SIZES[sizes.size]
    rounds = _tree(sizes, config.vocab_size, np.random.default_rng(seed))
    with jax.default_matmul_precision("highest"):
        engine_run, _ = _run_engine(sizes, config, _parameters(config, seed), rounds, seed)
    return engine_run | {"reencoded_tokens": sum(step.sequences.size for step in rounds)}


def table(report: dict[str, Any]) -> str:
    """The runs of a report of `bench_search` as text, one line each: seconds, tokens, largest score difference."""
    runs, least = report["runs"], report["runs"]["engine"]["least_tokens"]
    lines = [f"{'':<18}{'seconds':>9}{'x engine':>10}{'tokens':>10}{'x least':>9}{'difference':>12}"]
    for name, run in runs.items():
        ratio = run["seconds"] / runs["engine"]["seconds"]
        tokens = run.get("tokens_encoded", least)
        difference = f"{run['max_score_difference']:.1e}" if "max_score_difference" in run else "-"
        columns = f"{run['seconds']:>9.2f}{ratio:>10.2f}{tokens:>10}{tokens / least:>9.2f}{difference:>12}"
        lines.append(f"{name:<18}{columns}")
    engine = runs["engine"]
    lines.append(
        f"slots computed {engine['slots_computed'] / least:.3f} x least, {engine['recompilations']} recompilations"
    )
    return "\n".join(lines)


def _check(sizes: TreeSizes) -> None:
    for name, value in sizes._asdict().items():
        if name != "size" and value < 1:
            raise UserError(f"bench search: {name} = {value} must be at least 1")
    if sizes.size not in SIZES:
        raise UserError(f"bench search: size = {sizes.size!r} must be one of {', '.join(SIZES)}")
    if sizes.longest > LENGTH_BUCKETS[-1]:
        raise UserError(
            f"bench search: the longest path has {sizes.longest} tokens, more than {LENGTH_BUCKETS[-1]}; "
            "lower depth or lengths"
        )


def _parameters(config: TransformerConfig, seed: int) -> Any:
    """Random parameters. The head is scaled so that scores have a standard deviation near 1."""
    state, rng = nnx.state(RewardModel(config, rngs=nnx.Rngs(seed))), np.random.default_rng(seed)
    shape = state["head"][...].shape
    state["head"] = nnx.Param(jnp.asarray(rng.normal(0.0, config.hidden_size**-0.5, shape), jnp.float32))
    return state


def _tree(sizes: TreeSizes, vocabulary: int, rng: np.random.Generator) -> list[Round]:
    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(3, vocabulary, size=shape).astype(np.int32)

    rounds, states = [], tokens(1, sizes.prompt_tokens)
    for depth in range(sizes.depth):
        # The first round has one state, and the draws of all beams.
        count = sizes.candidates * (sizes.beams if depth == 0 else 1)
        candidates = tokens(len(states), count, sizes.action_tokens)
        chosen = np.sort(rng.choice(len(states) * count, size=sizes.beams, replace=False))
        rounds.append(Round(states, candidates, chosen, tokens(sizes.beams, sizes.observation_tokens)))
        states = np.concatenate([rounds[-1].sequences[chosen], rounds[-1].observations], axis=1)
    return rounds


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the shortest of REPEATS calls, and the result of the last one."""
    # An untimed call first: the first access to a page of memory is slow.
    seconds, result = [], work()
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def _run_engine(
    sizes: TreeSizes, config: TransformerConfig, parameters: Any, rounds: list[Round], seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """The fields of the engine's run, and the values of every candidate."""
    row = sizes.candidates * sizes.action_tokens
    lengths = [sizes.prompt_tokens]
    while lengths[-1] < sizes.longest:
        lengths.append(min(sizes.longest, int(lengths[-1] * LENGTH_GROWTH)))
    shapes = Shapes(
        growth=tuple(sorted({sizes.observation_tokens, sizes.prompt_tokens})),
        packed=(row,),
        ring_width=sizes.action_tokens,
        lengths=(0, *lengths),
    )
    engine = Engine(config, parameters, rows=sizes.beams, max_tokens=sizes.longest, shapes=shapes)
    engine.warm_up(sizes.longest)
    # Every call of `_timed` gets a tree of other tokens, so that none finds its tree in the cache; the last is ours.
    others = (_tree(sizes, config.vocab_size, np.random.default_rng(seed + 1 + number)) for number in range(REPEATS))
    trees = iter([*others, rounds])
    compiled: list[str] = []

    def listen(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    # JAX records an event for every program that its backend compiles.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        seconds, (values, usage) = _timed(lambda: _search(engine, next(trees)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    run = {
        "seconds": seconds,
        "tokens_encoded": usage.encoded_tokens,
        "slots_computed": usage.padded_tokens,
        "least_tokens": sizes.least_tokens,
        "max_score_difference": 0.0,
        "recompilations": len(compiled),
    }
    return run, values


def _search(engine: Engine, rounds: list[Round]) -> tuple[np.ndarray, TokenCounts]:
    """Values of every candidate, in order of rounds, and the tokens that this added to the engine's usage."""
    before, values = engine.usage, []
    for step in rounds:
        jobs = [
            (state, action) for state, actions in zip(step.states, step.candidates, strict=True) for action in actions
        ]
        values += [of_tokens[-1] for of_tokens in engine.score_continuations(jobs)]
    return np.asarray(values), engine.usage.minus(before)


def _time_prefill(sizes: TreeSizes, config: TransformerConfig, parameters: Any, seed: int) -> float:
    """Seconds of one pass over as many tokens as the tree has, in rows as long as its paths."""
    rows = -(-sizes.least_tokens // sizes.longest)
    width = -(-sizes.least_tokens // rows)
    tokens = np.random.default_rng(seed).integers(3, config.vocab_size, size=(rows, width)).astype(np.int32)
    engine = Engine(config, parameters, rows=1, max_tokens=sizes.longest)
    return _timed(lambda: [engine.score_unbatched(row) for row in tokens])[0]


def _run_uncached(config: TransformerConfig, parameters: Any, rounds: list[Round]) -> BenchRun:
    """Our scorer without its cache: every candidate with its history, in padded batches."""
    # The cache is never used, so its size does not matter.
    engine = Engine(config, parameters, rows=1, max_tokens=1)
    for step in rounds:
        engine.score_full(list(step.sequences[:1]), ["tree"])  # compiles
    before, values = engine.usage, []
    started = time.perf_counter()
    for step in rounds:
        sequences = list(step.sequences)
        values += [of_tokens[-1] for of_tokens in engine.score_full(sequences, ["tree"] * len(sequences))]
    seconds = time.perf_counter() - started
    return BenchRun(np.asarray(values), seconds, engine.usage.minus(before).encoded_tokens)


def _torch_model(config: TransformerConfig, parameters: Any) -> Any:
    """The transformers model of the same weights, read from a directory as a user's model would be."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with tempfile.TemporaryDirectory(prefix="jaxprm-bench-") as scratch:
        writer.write_model(Path(scratch), config, parameters, pad_id=0, end_id=1, max_length=1 << 15)
        model = AutoModelForSequenceClassification.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    return model.eval()


def _run_torch_reencode(model: Any, rounds: list[Round]) -> BenchRun:
    """transformers without a cache: every candidate with its history, in batches."""
    import torch

    with torch.inference_mode():
        model.model(torch.from_numpy(rounds[0].sequences[:1]).long())  # not timed
        started, values, tokens = time.perf_counter(), [], 0
        for step in rounds:
            sequences = torch.from_numpy(step.sequences).long()
            for batch in sequences.split(max(1, TORCH_TOKENS_A_CALL // sequences.shape[1])):
                values += _last_values(model, model.model(batch, use_cache=False).last_hidden_state)
                tokens += batch.numel()
        return BenchRun(np.asarray(values, np.float32), time.perf_counter() - started, tokens)


def _run_torch_kept_cache(model: Any, rounds: list[Round]) -> BenchRun:
    """transformers with `past_key_values` of every beam, copied for its candidates: every token once."""
    seconds, (values, tokens) = _timed(lambda: _torch_search(model, rounds))
    return BenchRun(np.asarray(values, np.float32), seconds, tokens)


def _torch_search(model: Any, rounds: list[Round]) -> tuple[list[float], int]:
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        values: list[float] = []
        cache = DynamicCache(config=model.config)
        model.model(torch.from_numpy(rounds[0].states).long(), past_key_values=cache)
        tokens = rounds[0].states.size
        for number, step in enumerate(rounds):
            beams, count, length = step.candidates.shape
            if beams * count > len(step.states):
                cache.batch_repeat_interleave(count)
            batch = torch.from_numpy(step.candidates.reshape(beams * count, length)).long()
            values += _last_values(model, model.model(batch, past_key_values=cache).last_hidden_state)
            tokens += batch.numel()
            if number + 1 < len(rounds):
                cache.batch_select_indices(torch.from_numpy(step.chosen))
                observations = torch.from_numpy(step.observations).long()
                model.model(observations, past_key_values=cache)
                tokens += observations.numel()
        return values, tokens


def _last_values(model: Any, hidden: Any) -> list[float]:
    """Values at the last token of every row [B, T, D]: all rows of a call have the same length."""
    return (hidden[:, -1] @ model.score.weight[0]).tolist()
