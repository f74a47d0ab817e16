"""`export --verify`: transformers, in a separate process, must score the export as we score the model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline.chat_template import as_messages
from data_pipeline.encode import Encoded
from data_pipeline.trajectory import read_numbered, steps
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.scoring.check import sample_conversations

# Rounding in another order moves a value of a deep model by some 1e-5; a wrong mask, position or tensor by over 1e-2.
BOUND = 1e-4


class Cases(NamedTuple):
    """Conversations to compare on: their names, the input of transformers_scores.py, and our encoding."""

    names: list[str]
    questions: list[dict[str, Any]]
    encoded: list[Encoded]


def verify(
    model: Path, exported: Path, trajectories: Path | None, *, dtype: str, template: str | None = None
) -> dict[str, Any]:
    """Compares transformers' scores of `exported` with ours, at every read position, both computed in float32.

    In float32 our scores are those of the model as it was trained. In bfloat16 they are those of the written weights,
    read back and checked to be the model's own, rounded: both sides then have the same numbers, so the bound is the
    same, and the effect of rounding is reported separately.

    Args:
        trajectories: JSON Lines to compare on; default: `sample_conversations`.
        dtype: of the exported weights.
        template: the chat template the model was exported with, if not its own.

    Returns:
        {"trajectories", "read_positions", "largest_difference", "bound", "rms", "transformers", "torch"}, and
        "rounding", the largest change of a score by bfloat16.

    Raises:
        UserError: a difference is above the bound, 1e-4 * max(1, rms of the scores), the weights are not the model's,
            or the export cannot be read.
    """
    scorer = loading.load_scorer(model, template=template)
    cases = _cases(scorer.encoder, trajectories)
    trained = ours = scorer.score_encoded(cases.encoded, cases.names)
    if dtype != "float32":
        rounded = loading.load_scorer(exported)
        _check_rounded(scorer.parameters, rounded.parameters, dtype)
        ours = rounded.score_encoded(cases.encoded, cases.names)
        del rounded
    del scorer  # transformers loads a copy of the weights too
    comparison = compare(cases.names, ours, score_with_transformers(exported, cases.questions))
    if dtype != "float32":
        comparison["rounding"] = max(_largest(*scores) for scores in zip(ours, trained, strict=True))
    return comparison


def _cases(encoder, path: Path | None) -> Cases:
    if path is None:
        samples = [as_messages(messages, "sample conversation") for messages in sample_conversations()]
        rows = [(f"sample conversation {index}", messages, None) for index, messages in enumerate(samples)]
    else:
        # An episode that failed before its first action has no value to compare.
        numbered = [(where, row) for where, row in read_numbered(path) if steps(row.messages)]
        rows = [(where, row.messages, row.tools) for where, row in numbered]
    if not rows:
        raise UserError(f"{path}: no trajectory to verify on")
    names = [name for name, _, _ in rows]
    encoded = [encoder.trajectory(messages, row=name, tools=tools) for name, messages, tools in rows]
    questions = [
        {
            "name": name,
            "messages": encoder.template_messages(messages, row=name),
            "tools": encoder.template_tools(tools, row=name),
            "tokens": tokens.tokens.tolist(),
            "read_positions": tokens.read_positions.tolist(),
        }
        for (name, messages, tools), tokens in zip(rows, encoded, strict=True)
    ]
    return Cases(names, questions, encoded)


def _check_rounded(trained: nnx.State, written: nnx.State, dtype: str) -> None:
    """Raises UserError for a parameter that was not written as its rounded self."""
    own, read = (dict(nnx.to_flat_state(state)) for state in (trained, written))
    # The formats differ in whether the head has a bias, so it may be on one side only.
    for path in own.keys() & read.keys():
        if not bool(jnp.array_equal(own[path][...].astype(dtype), read[path][...].astype(dtype))):
            raise UserError(
                f"export --verify: parameter {'.'.join(path)} differs from the model's own, rounded to {dtype}; "
                "nothing was exported"
            )


def score_with_transformers(exported: Path, questions: Sequence[dict]) -> dict[str, Any]:
    """Runs transformers_scores.py, which imports nothing of this project; returns its reply."""
    script = Path(__file__).with_name("transformers_scores.py")
    with tempfile.TemporaryDirectory(prefix="jaxprm-verify-") as scratch:
        question, answer = Path(scratch) / "cases.json", Path(scratch) / "values.json"
        question.write_text(json.dumps(questions), encoding="utf-8")
        # -P: modules next to the script have everyday names, such as "export" and "tokenizer".
        command = [sys.executable, "-P", str(script), str(exported.absolute()), str(question), str(answer)]
        # Advice that transformers prints does not belong in our output; an error is the last line of stderr.
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not answer.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise UserError(f"export --verify: transformers cannot read the export: {reason[0]}")
        return json.loads(answer.read_text())


def compare(names: Sequence[str], ours: Sequence[np.ndarray], reply: dict[str, Any]) -> dict[str, Any]:
    """The largest difference over all read positions.

    Args:
        names: of the conversations.
        ours: [S] for each conversation, the value of every step.
        reply: that of transformers_scores.py.

    Raises UserError, naming the conversation, if a difference is above the bound.
    """
    theirs = [np.asarray(values, np.float64) for values in reply["values"]]
    reference = np.concatenate(theirs)
    rms = float(np.sqrt(np.mean(reference**2)))
    bound = BOUND * max(1.0, rms)
    differences = [_largest(*scores) for scores in zip(ours, theirs, strict=True)]
    largest = float(np.max(differences))
    if not largest <= bound:  # not ">": a NaN must fail too
        raise UserError(
            f"export --verify: scores differ by {largest:.2e} in {names[int(np.argmax(differences))]}, bound "
            f"{bound:.2e}; nothing was exported"
        )
    return {
        "trajectories": len(theirs),
        "read_positions": len(reference),
        "largest_difference": largest,
        "bound": bound,
        "rms": rms,
        "transformers": reply["transformers"],
        "torch": reply["torch"],
    }


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b).max())
