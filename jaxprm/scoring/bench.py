"""What scoring a search costs: the engine, one packed prefill, and transformers in torch, on one synthetic tree."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForSequenceClassification, DynamicCache

from jaxprm.errors import UserError
from jaxprm.hf import writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.prefix_bank import Shapes
from jaxprm.model.transformer import RewardModel
from jaxprm.scoring.engine import LENGTH_BUCKETS, Engine

SIZES = {
    "tiny": TransformerConfig(
        vocab_size=1280, hidden_size=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate_size=256
    ),
    "small": TransformerConfig(
        vocab_size=4096, hidden_size=512, layers=8, heads=8, kv_heads=2, head_dim=64, intermediate_size=1408
    ),
}
# Runs of seconds are repeated and the shortest counts, as other work on the machine only adds time; those of minutes
# are not.
REPEATS = 3
# From one compiled cache length to the next: at most so much of what a call reads is padding.
GROWTH_OF_LENGTHS = 1.25


class TreeSizes(NamedTuple):
    """A search with fixed lengths, in tokens: `beams` states a round, `candidates` actions of each, `depth` rounds."""

    prompt_tokens: int = 1500
    action_tokens: int = 60
    observation_tokens: int = 200
    beams: int = 4
    candidates: int = 4
    depth: int = 15
    size: str = "tiny"

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.depth * self.action_tokens + (self.depth - 1) * self.observation_tokens

    @property
    def least_tokens(self) -> int:
        """Every token of the tree once."""
        actions = self.depth * self.beams * self.candidates * self.action_tokens
        return self.prompt_tokens + actions + (self.depth - 1) * self.beams * self.observation_tokens


class Round(NamedTuple):
    """States int32 [B, T], candidates int32 [B, N, A]; chosen: those that go on, as places in [B * N]."""

    states: np.ndarray
    candidates: np.ndarray
    chosen: np.ndarray
    observations: np.ndarray

    @property
    def sequences(self) -> np.ndarray:
        """Every candidate after its state, [B * N, T + A]."""
        states = np.repeat(self.states, self.candidates.shape[1], axis=0)
        return np.concatenate([states, self.candidates.reshape(len(states), -1)], axis=1)


class BenchRun(NamedTuple):
    """The values of every candidate, round by round, and what they took."""

    values: np.ndarray
    seconds: float
    tokens_encoded: int


def bench_search(setting: TreeSizes, *, torch: bool = True, seed: int = 0) -> dict[str, Any]:
    """{"setting", "runs": {name: {"seconds", ...}}}; see docs/search.md for the fields.

    Raises UserError for a setting that is no search, or too long to be scored uncached.
    """
    _check(setting)
    config = SIZES[setting.size]
    parameters = _parameters(config, seed)
    rounds = _tree(setting, config.vocab_size, np.random.default_rng(seed))
    with jax.default_matmul_precision("highest"):
        found, reference = _engine(setting, config, parameters, rounds, seed)
        runs: dict[str, dict[str, Any]] = {"engine": found}
        runs["packed_prefill"] = {"seconds": _prefill(setting, config, parameters, seed)}
        others = {"uncached": _uncached(config, parameters, rounds)}
    if torch:
        pass

        model = load(config, parameters)
        others["torch_reencode"] = reencode(model, rounds)
        others["torch_kept_cache"] = kept_cache(model, rounds)
    for name, run in others.items():
        runs[name] = {
            "seconds": run.seconds,
            "tokens_encoded": run.tokens_encoded,
            "max_score_difference": float(np.abs(run.values - reference).max()),
        }
    runs["engine"]["max_score_difference"] = runs["uncached"]["max_score_difference"]
    return {"setting": setting._asdict(), "runs": runs}


def bench_engine(setting: TreeSizes, *, seed: int = 0) -> dict[str, Any]:
    """The engine's run alone: its fields as in `bench_search`, and "reencoded_tokens", what reading every candidate's
    history again would encode. Raises UserError as there.
    """
    _check(setting)
    config = SIZES[setting.size]
    rounds = _tree(setting, config.vocab_size, np.random.default_rng(seed))
    with jax.default_matmul_precision("highest"):
        found, _ = _engine(setting, config, _parameters(config, seed), rounds, seed)
    return found | {"reencoded_tokens": sum(one.sequences.size for one in rounds)}


def _check(setting: TreeSizes) -> None:
    for name, value in setting._asdict().items():
        if name != "size" and value < 1:
            raise UserError(f"bench search: {name} = {value} must be at least 1")
    if setting.size not in SIZES:
        raise UserError(f"bench search: size = {setting.size!r} must be one of {', '.join(SIZES)}")
    if setting.longest > LENGTH_BUCKETS[-1]:
        raise UserError(
            f"bench search: the longest path has {setting.longest} tokens, more than {LENGTH_BUCKETS[-1]}; "
            "lower depth or lengths"
        )


def _parameters(config: TransformerConfig, seed: int) -> Any:
    """Random, with a head of such a size that scores have a standard deviation near 1."""
    state, rng = nnx.state(RewardModel(config, rngs=nnx.Rngs(seed))), np.random.default_rng(seed)
    shape = state["head"][...].shape
    state["head"] = nnx.Param(jnp.asarray(rng.normal(0.0, config.hidden_size**-0.5, shape), jnp.float32))
    return state


def _tree(setting: TreeSizes, vocabulary: int, rng: np.random.Generator) -> list[Round]:
    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(3, vocabulary, size=shape).astype(np.int32)

    rounds, states = [], tokens(1, setting.prompt_tokens)
    for depth in range(setting.depth):
        each = setting.candidates * (setting.beams if depth == 0 else 1)
        candidates = tokens(len(states), each, setting.action_tokens)
        chosen = np.sort(rng.choice(len(states) * each, size=setting.beams, replace=False))
        rounds.append(Round(states, candidates, chosen, tokens(setting.beams, setting.observation_tokens)))
        states = np.concatenate([rounds[-1].sequences[chosen], rounds[-1].observations], axis=1)
    return rounds


def _engine(
    setting: TreeSizes, config, parameters, rounds: list[Round], seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    row = setting.candidates * setting.action_tokens
    lengths = [setting.prompt_tokens]
    while lengths[-1] < setting.longest:
        lengths.append(min(setting.longest, int(lengths[-1] * GROWTH_OF_LENGTHS)))
    shapes = Shapes(
        growth=tuple(sorted({setting.observation_tokens, setting.prompt_tokens})),
        packed=(row,),
        ring_width=setting.action_tokens,
        lengths=(0, *lengths),
    )
    engine = Engine(config, parameters, rows=setting.beams, max_tokens=setting.longest, shapes=shapes)
    engine.warm_up(setting.longest)
    # Trees of other tokens come first, as nothing of this one may be in the cache.
    others = (_tree(setting, config.vocab_size, np.random.default_rng(seed + 1 + one)) for one in range(REPEATS))
    trees = iter([*others, rounds])
    compiled: list[str] = []

    def listen(event: str, *_, **__) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        seconds, (values, usage) = timed(lambda: _search(engine, next(trees)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    found = {
        "seconds": seconds,
        "tokens_encoded": usage["encoded"],
        "slots_computed": usage["slots"],
        "least_tokens": setting.least_tokens,
        "max_score_difference": 0.0,
        "recompilations": len(compiled),
    }
    return found, values


def _search(engine: Engine, rounds: list[Round]) -> tuple[np.ndarray, dict[str, int]]:
    """The values of every candidate, round by round, and what it added to the engine's usage."""
    before, values = engine.usage, []
    for one in rounds:
        jobs = [(state, action) for state, some in zip(one.states, one.candidates, strict=True) for action in some]
        values += [found[-1] for found in engine.score_continuations(jobs)]
    return np.asarray(values), {name: count - before[name] for name, count in engine.usage.items()}


def _prefill(setting: TreeSizes, config, parameters, seed: int) -> float:
    """Seconds of one pass over as many tokens as the tree has, in rows as long as its paths."""
    rows = -(-setting.least_tokens // setting.longest)
    width = -(-setting.least_tokens // rows)
    tokens = np.random.default_rng(seed).integers(3, config.vocab_size, size=(rows, width)).astype(np.int32)
    engine = Engine(config, parameters, rows=1, max_tokens=setting.longest)
    return timed(lambda: [engine.score_unbatched(one) for one in tokens])[0]


def _uncached(config, parameters, rounds: list[Round]) -> BenchRun:
    """Our own scorer without its cache: whole sequences in padded batches."""
    engine = Engine(config, parameters, rows=1, max_tokens=1)
    for one in rounds:  # compiles
        engine.score_full(list(one.sequences[:1]), ["tree"])
    before, values = engine.usage["encoded"], []
    started = time.perf_counter()
    for one in rounds:
        sequences = list(one.sequences)
        values += [found[-1] for found in engine.score_full(sequences, ["tree"] * len(sequences))]
    seconds = time.perf_counter() - started
    return BenchRun(np.asarray(values), seconds, engine.usage["encoded"] - before)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the shortest of REPEATS calls, and what the last gave. Another comes first: memory that a process
    touches for the first time costs."""
    took, result = [], work()
    for _ in range(REPEATS):
        started = time.perf_counter()
        result = work()
        took.append(time.perf_counter() - started)
    return min(took), result


def table(found: dict[str, Any]) -> str:
    """Seconds, tokens over the least possible and largest score difference of every run."""
    runs, least = found["runs"], found["runs"]["engine"]["least_tokens"]
    lines = [f"{'':<18}{'seconds':>9}{'x engine':>10}{'tokens':>10}{'x least':>9}{'difference':>12}"]
    for name, run in runs.items():
        ratio = run["seconds"] / runs["engine"]["seconds"]
        tokens = run.get("tokens_encoded", least)
        difference = f"{run['max_score_difference']:.1e}" if "max_score_difference" in run else "-"
        shown = f"{run['seconds']:>9.2f}{ratio:>10.2f}{tokens:>10}{tokens / least:>9.2f}{difference:>12}"
        lines.append(f"{name:<18}{shown}")
    engine = runs["engine"]
    lines.append(
        f"slots computed {engine['slots_computed'] / least:.3f} x least, {engine['recompilations']} recompilations"
    )
    return "\n".join(lines)


# Sequences encoded at once: as many as a round has, but for memory's sake no more than this many tokens.
TOKENS_A_CALL = 65_536


def load(config, parameters) -> Any:
    """The transformers model of equal weights, read from a directory as a user's would be."""
    with tempfile.TemporaryDirectory(prefix="jaxprm-bench-") as scratch:
        writer.write_model(Path(scratch), config, parameters, pad_id=0, end_id=1, max_length=1 << 15)
        model = AutoModelForSequenceClassification.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    return model.eval()


def _values(model, hidden: torch.Tensor) -> list[float]:
    """At the last token of every row: all rows of a call are of one length."""
    return (hidden[:, -1] @ model.score.weight[0]).tolist()


@torch.inference_mode()
def reencode(model, rounds: list[Round]) -> BenchRun:
    """Every candidate with its whole history, in batches."""
    model.model(torch.from_numpy(rounds[0].sequences[:1]).long())
    started, values, tokens = time.perf_counter(), [], 0
    for one in rounds:
        sequences = torch.from_numpy(one.sequences).long()
        for batch in sequences.split(max(1, TOKENS_A_CALL // sequences.shape[1])):
            values += _values(model, model.model(batch, use_cache=False).last_hidden_state)
            tokens += batch.numel()
    return BenchRun(np.asarray(values, np.float32), time.perf_counter() - started, tokens)


@torch.inference_mode()
def kept_cache(model, rounds: list[Round]) -> BenchRun:
    """`past_key_values` of every beam, copied for its candidates and kept of the chosen ones: every token once."""
    seconds, (values, tokens) = timed(lambda: _kept_cache(model, rounds))
    return BenchRun(np.asarray(values, np.float32), seconds, tokens)


def _kept_cache(model, rounds: list[Round]) -> tuple[list[float], int]:
    values: list[float] = []
    cache = DynamicCache(config=model.config)
    model.model(torch.from_numpy(rounds[0].states).long(), past_key_values=cache)
    tokens = rounds[0].states.size
    for number, one in enumerate(rounds):
        beams, each, length = one.candidates.shape
        if beams * each > len(one.states):
            cache.batch_repeat_interleave(each)
        batch = torch.from_numpy(one.candidates.reshape(beams * each, length)).long()
        values += _values(model, model.model(batch, past_key_values=cache).last_hidden_state)
        tokens += batch.numel()
        if number + 1 < len(rounds):
            cache.batch_select_indices(torch.from_numpy(one.chosen))
            observations = torch.from_numpy(one.observations).long()
            model.model(observations, past_key_values=cache)
            tokens += observations.numel()
    return values, tokens
