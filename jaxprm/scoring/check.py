"""Whether a model's scores are the same however they are computed: on a user's own checkpoint and trajectories."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from data_pipeline.chat_template import as_messages
from data_pipeline.encode import Encoded, Encoder
from data_pipeline.trajectory import read_numbered, steps
from jaxprm.artifacts.directory import find_model
from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import bucket
from jaxprm.scoring import loading
from jaxprm.scoring.engine import Engine
from jaxprm.scoring.scorer import FINISHED_WIDTHS, Scorer

# Times the root mean square of the scores, where that is above 1.
BOUND = 1e-5
STATES_AT_ONCE, OTHERS = 4, 3
# Enough for several states in one call of the widest shape.
ROWS = 16


class Comparison(NamedTuple):
    """One way to compute scores: how many were compared, and the largest difference from each conversation alone."""

    name: str
    scores: int
    largest: float


class Check(NamedTuple):
    """The ways that must agree within `bound`; bfloat16, which need not; what one wrong token does to a score."""

    ways: list[Comparison]
    bound: float
    bfloat16: Comparison
    control: float

    @property
    def largest(self) -> float:
        return float(np.max([way.largest for way in self.ways]))

    @property
    def passed(self) -> bool:
        return self.largest <= self.bound  # a NaN is no success either


class _Case(NamedTuple):
    name: str
    messages: list[dict[str, Any]]
    tools: list[dict] | None
    encoded: Encoded


def check_scorer(model: Path, trajectories: Path | None = None, *, most: int = 16) -> Check:
    """Scores of the first `most` trajectories, or of made-up ones, computed in every way there is.

    The reference is a forward pass over each conversation alone, without padding, packing or cache. Against it:
    conversations in padded batches; packed behind prompts that are encoded once; every step as a candidate among others
    after the cache, states in random order; the same with a cache of two conversations, which drops and encodes again.

    Raises UserError where there is nothing to score, or a conversation is longer than the scorer takes.
    """
    with jax.default_matmul_precision("highest"):
        loaded = loading.load_scorer(find_model(model))
        cases = _cases(loaded.encoder, trajectories, most)
        longest = max(len(case.encoded.tokens) for case in cases) + loaded.engine.shapes.packed[-1]
        same = (loaded.config, loaded.parameters, loaded.encoder)
        sizes: dict[str, Any] = {"rows": ROWS, "max_tokens": longest, "shapes": loaded.engine.shapes}
        scorer = Scorer(*same, **sizes)
        engine = scorer.engine
        small = Scorer(*same, **sizes, cache_bytes=2 * engine.bytes_of_a_slot)
        rounded = Scorer(*same, **sizes, dtype="bfloat16")
        tokens, names = [case.encoded.tokens for case in cases], [case.name for case in cases]
        alone = [engine.score_unbatched(one) for one in tokens]
        reference = [values[case.encoded.read_positions] for case, values in zip(cases, alone, strict=True)]
        ways = [
            _compare("in padded batches", engine.score_full(tokens[::-1], names[::-1])[::-1], alone),
            _behind_prompts(engine, cases, alone),
            _searched("candidates after the cache", scorer, cases, reference),
            _searched("the same, with evictions", small, cases, reference),
        ]
        half = _compare("in bfloat16", rounded.engine.score_full(tokens, names), alone)
    rms = float(np.sqrt(np.mean(np.concatenate(reference) ** 2)))
    return Check(ways, BOUND * max(1.0, rms), half, _control(engine, cases, alone))


def _compare(name: str, ours: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Comparison:
    pairs = zip(ours, reference, strict=True)
    differences = np.concatenate([np.zeros(0), *(np.abs(own - other) for own, other in pairs)])
    return Comparison(name, len(differences), float(differences.max(initial=0.0)))


def _behind_prompts(engine: Engine, cases: Sequence[_Case], alone: Sequence[np.ndarray]) -> Comparison:
    """What follows the prompt, packed behind it: conversations that share one read the same keys and values."""
    jobs, expected = [], []
    for case, values in zip(cases, alone, strict=True):
        prompt, rest = np.split(case.encoded.tokens, [case.encoded.state_positions[0] + 1])
        if len(rest) <= FINISHED_WIDTHS[-1]:
            jobs.append((prompt, rest))
            expected.append(values[len(prompt) :])
    width = bucket(max((len(rest) for _, rest in jobs), default=0), FINISHED_WIDTHS)
    ours = engine.score_continuations(jobs[::-1], width=width)[::-1]
    return _compare("packed behind prompts", ours, expected)


def _searched(name: str, scorer: Scorer, cases: Sequence[_Case], reference: Sequence[np.ndarray]) -> Comparison:
    """Every action of every conversation, among actions of others, some states at a time."""
    questions = [
        (case, index, float(values[case.encoded.message_indices == index][-1]))
        for case, values in zip(cases, reference, strict=True)
        for index in dict.fromkeys(case.encoded.message_indices.tolist())
    ]
    rng = random.Random(0)
    actions = [case.messages[index] for case, index, _ in questions]
    rng.shuffle(questions)
    ours = []
    for start in range(0, len(questions), STATES_AT_ONCE):
        some = questions[start : start + STATES_AT_ONCE]
        candidates = [[*rng.choices(actions, k=OTHERS), case.messages[index]] for case, index, _ in some]
        states, tools = [case.messages[:index] for case, index, _ in some], [case.tools for case, _, _ in some]
        ours += [values[-1] for values in scorer.score_actions(states, candidates, tools=tools)]
    return _compare(name, [np.asarray(ours)], [np.asarray([value for _, _, value in questions], np.float32)])


def _control(engine: Engine, cases: Sequence[_Case], alone: Sequence[np.ndarray]) -> float:
    """How far the last score moves, at most, where one token of the prompt is another."""
    moved = []
    for case, values in zip(cases, alone, strict=True):
        changed = case.encoded.tokens.copy()
        middle = case.encoded.state_positions[0] // 2
        changed[middle] = changed[middle - 1] if changed[middle - 1] != changed[middle] else changed[0]
        moved.append(abs(float(engine.score_unbatched(changed)[-1] - values[-1])))
    return max(moved)


def _cases(encoder: Encoder, path: Path | None, most: int) -> list[_Case]:
    if path is None:
        given = [(f"made-up conversation {index}", one, None) for index, one in enumerate(_made_up())]
    else:
        numbered = ((where, one) for where, one in read_numbered(path) if steps(one.messages))
        given = [(where, one.messages, one.tools) for (where, one), _ in zip(numbered, range(most), strict=False)]
    if not given:
        raise UserError(f"{path}: no trajectory with a step to score")
    cases = []
    for name, messages, tools in given:
        plain = msgspec.to_builtins(as_messages(messages, name))
        cases.append(_Case(name, plain, tools, encoder.trajectory(plain, row=name, tools=tools)))
    return cases


def _made_up() -> list[list[dict[str, str]]]:
    """Conversations of different lengths, two with a prompt in common."""
    found = []
    for turns in (1, 2, 2, 5, 9):
        messages = [{"role": "user", "content": f"Craft {turns} oak planks. You have {turns + 3} oak logs."}]
        for turn in range(turns):
            if turn:
                messages.append({"role": "user", "content": f"Got {turn} oak log. Inventory: [oak log] ({turn})"})
            text = f"I need {turns - turn} more. Action: get {len(found) + 1} oak log"
            messages.append({"role": "assistant", "content": text})
        found.append(messages)
    return found
