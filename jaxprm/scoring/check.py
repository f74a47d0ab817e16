"""Checks on a user's own model that its scores do not depend on how they are computed.

The reference is a forward pass in float64. The bound is a multiple of what float32 arithmetic does to this model: the
largest error of the same plain forward pass in float32.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from data_pipeline.chat_template import as_messages
from data_pipeline.encode import Encoded, Encoder, Reasoning, SpecialTokens
from data_pipeline.trajectory import read_numbered, steps
from jaxprm.artifacts.directory import find_model
from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import bucket
from jaxprm.progress import bar
from jaxprm.scoring import loading, reference
from jaxprm.scoring.engine import Engine
from jaxprm.scoring.scorer import FINISHED_WIDTHS, Scorer

# Largest difference allowed, in units of the model's float32 error. Sound ways have one to two of them, an
# accelerator's own arithmetic a few more, and one wrong token in the prompt thousands.
FACTOR = 8
# The least float32 error of a model, in units of the root mean square of its values: short conversations of a small
# model may have less by luck.
LEAST_ERROR = float(np.finfo(np.float32).eps)
# States scored in one call, and candidates of other conversations that are scored with each.
STATES_A_CALL, DISTRACTORS = 4, 3
# Enough for several states in one call of the widest shape.
ROWS = 16


class Comparison(NamedTuple):
    """One way to compute scores: how many were compared, and their largest difference from the reference."""

    name: str
    scores: int
    largest: float


class Check(NamedTuple):
    """Differences of every way from the reference.

    Args:
      ways: those that must agree within `bound`.
      bfloat16: differs by rounding, and has no bound.
      sensitivity: how far one wrong token in the prompt moves a score, for scale.
      float32_error: largest difference of the plain forward pass in float32 from the one in float64.
    """

    ways: list[Comparison]
    bound: float
    bfloat16: Comparison
    sensitivity: float
    float32_error: float = 0.0

    @property
    def largest(self) -> float:
        return float(np.max([way.largest for way in self.ways]))

    @property
    def passed(self) -> bool:
        return self.largest <= self.bound  # False for NaN


class _Case(NamedTuple):
    name: str
    messages: list[dict[str, Any]]
    tools: list[dict] | None
    encoded: Encoded


def check_scorer(
    model: Path,
    trajectories: Path | None = None,
    *,
    count: int = 16,
    reasoning: Reasoning | None = None,
    special_tokens: SpecialTokens | None = None,
) -> Check:
    """Computes the scores of the first `count` trajectories in every way, or those of sample conversations.

    The reference is a forward pass in float64 over each conversation, see `reference.py`. Compared with it are each
    conversation alone, without padding, packing or cache; padded batches of conversations; conversations packed after
    prompts that are encoded once; every step as one of several candidates after the cache, states in random order; and
    the same with a cache of two conversations, which keeps dropping and encoding again.

    reasoning, special_tokens: as in loading.load_encoder.

    Raises UserError if no trajectory has a step, or one is longer than can be scored.
    """
    # By default accelerators multiply float32 matrices in lower precision, whose rounding would exceed the bound.
    with jax.default_matmul_precision("highest"):
        loaded = loading.load_scorer(find_model(model), reasoning=reasoning, special_tokens=special_tokens)
        cases = _cases(loaded.encoder, trajectories, count)
        # Candidates of other conversations follow a state too, so there must be room for the widest.
        longest = max(len(case.encoded.tokens) for case in cases) + loaded.engine.shapes.packed[-1]
        same = (loaded.config, loaded.parameters, loaded.encoder)
        sizes: dict[str, Any] = {"rows": ROWS, "max_tokens": longest, "shapes": loaded.engine.shapes}
        scorer = Scorer(*same, **sizes)
        engine = scorer.engine
        # The smallest cache there can be: two slots, one to copy from and one to write to.
        evicting = Scorer(*same, **sizes, cache_bytes=2 * engine.bytes_of_a_slot)
        rounded = Scorer(*same, **sizes, dtype="bfloat16")
        tokens, names = [case.encoded.tokens for case in cases], [case.name for case in cases]
        values, float32_error = _reference(loaded, tokens)
        promises = [of_tokens[case.encoded.read_positions] for case, of_tokens in zip(cases, values, strict=True)]
        alone = [engine.score_unbatched(sequence) for sequence in tokens]
        ways = [
            _compare("each alone", alone, values),
            # In reverse order, so that a row that is mixed up with another is seen.
            _compare("in padded batches", engine.score_full(tokens[::-1], names[::-1])[::-1], values),
            _compare_packed(engine, cases, values),
            _compare_candidates("candidates after the cache", scorer, cases, promises),
            _compare_candidates("the same, with evictions", evicting, cases, promises),
        ]
        bfloat16 = _compare("in bfloat16", rounded.engine.score_full(tokens, names), values)
    return Check(ways, FACTOR * float32_error, bfloat16, _sensitivity(engine, cases, alone), float32_error)


def _reference(scorer: Scorer, tokens: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """(values of every token in float64, largest error of the same forward pass in float32)."""
    config, parameters = scorer.config, scorer.parameters
    with bar("reference in float64", 2 * config.layers, unit="layer") as progress:
        values = reference.values(config, parameters, tokens, np.float64, progress.update)
        rounded = reference.values(config, parameters, tokens, np.float32, progress.update)
    differences = [np.abs(a - b).max() for a, b in zip(rounded, values, strict=True)]
    rms = float(np.sqrt(np.mean(np.concatenate(values) ** 2)))
    # np.max and not max, which may lose a NaN.
    return values, float(np.max([*differences, LEAST_ERROR * rms]))


def sample_conversations() -> list[list[dict[str, str]]]:
    """Conversations of different lengths, for checks without trajectories of the user."""
    conversations = []
    for turns in (1, 2, 5, 9):
        messages = [{"role": "user", "content": f"Craft {turns} oak planks. You have {turns + 3} oak logs."}]
        for turn in range(turns):
            if turn:
                messages.append({"role": "user", "content": f"Got {turn} oak log. Inventory: [oak log] ({turn})"})
            messages.append({"role": "assistant", "content": f"I'd need {turns - turn}:\n\nget {turn + 1}0 oak-log"})
        conversations.append(messages)
    return conversations


def _compare(name: str, ours: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Comparison:
    pairs = zip(ours, reference, strict=True)
    differences = np.concatenate([np.zeros(0), *(np.abs(value - expected) for value, expected in pairs)])
    return Comparison(name, len(differences), float(differences.max(initial=0.0)))


def _compare_packed(engine: Engine, cases: Sequence[_Case], values: Sequence[np.ndarray]) -> Comparison:
    """What follows the prompts, packed: conversations with equal prompts read the same keys and values."""
    jobs, expected = [], []
    for case, of_tokens in zip(cases, values, strict=True):
        prompt, continuation = np.split(case.encoded.tokens, [case.encoded.state_positions[0] + 1])
        if len(continuation) <= FINISHED_WIDTHS[-1]:
            jobs.append((prompt, continuation))
            expected.append(of_tokens[len(prompt) :])
    width = bucket(max((len(continuation) for _, continuation in jobs), default=0), FINISHED_WIDTHS)
    ours = engine.score_continuations(jobs[::-1], width=width)[::-1]
    return _compare("packed behind prompts", ours, expected)


def _compare_candidates(
    name: str, scorer: Scorer, cases: Sequence[_Case], expected: Sequence[np.ndarray]
) -> Comparison:
    """Every action of every conversation, scored among actions of others, some states at a time."""
    # (case, message, promise): a message of several parts is a step a part, and has the promise of the last.
    actions = [
        (case, index, float(promises[case.encoded.message_indices == index][-1]))
        for case, promises in zip(cases, expected, strict=True)
        for index in dict.fromkeys(case.encoded.message_indices.tolist())
    ]
    rng = random.Random(0)
    messages = [case.messages[index] for case, index, _ in actions]
    rng.shuffle(actions)
    ours = []
    for start in range(0, len(actions), STATES_A_CALL):
        chunk = actions[start : start + STATES_A_CALL]
        candidates = [[*rng.choices(messages, k=DISTRACTORS), case.messages[index]] for case, index, _ in chunk]
        states, tools = [case.messages[:index] for case, index, _ in chunk], [case.tools for case, _, _ in chunk]
        ours += [promises[-1] for promises in scorer.score_actions(states, candidates, tools=tools)]
    return _compare(name, [np.asarray(ours)], [np.asarray([promise for _, _, promise in actions])])


def _sensitivity(engine: Engine, cases: Sequence[_Case], values: Sequence[np.ndarray]) -> float:
    """The largest change of a last score when one token in the middle of the prompt is replaced."""
    changes = []
    for case, of_tokens in zip(cases, values, strict=True):
        tokens = case.encoded.tokens.copy()
        middle = case.encoded.state_positions[0] // 2
        tokens[middle] = tokens[middle - 1] if tokens[middle - 1] != tokens[middle] else tokens[0]
        changes.append(abs(float(engine.score_unbatched(tokens)[-1] - of_tokens[-1])))
    return max(changes)


def _cases(encoder: Encoder, path: Path | None, count: int) -> list[_Case]:
    if path is None:
        conversations = sample_conversations()
        # Another end of one of them: two conversations that share a prompt.
        conversations.append([*conversations[1][:-1], {"role": "assistant", "content": "Action: get 2 oak log"}])
        rows = [(f"sample conversation {index}", messages, None) for index, messages in enumerate(conversations)]
    else:
        numbered = ((where, row) for where, row in read_numbered(path) if steps(row.messages))
        rows = [(where, row.messages, row.tools) for (where, row), _ in zip(numbered, range(count), strict=False)]
    if not rows:
        raise UserError(f"{path}: no trajectory with a step to score")
    cases = []
    for name, messages, tools in rows:
        plain = msgspec.to_builtins(as_messages(messages, name))
        cases.append(_Case(name, plain, tools, encoder.trajectory(plain, row=name, tools=tools)))
    return cases
