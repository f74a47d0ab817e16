"""The proof that an export scores as its model does: transformers, in a process of its own, on real conversations."""

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

from data_pipeline.chat_template import as_messages, freeze
from data_pipeline.encode import Encoded
from data_pipeline.trajectory import read_numbered, steps
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.scoring.check import sample_conversations

# Rounding in another order moves a value of a deep model by some 1e-5; a wrong mask, position or tensor by over 1e-2.
BOUND = 1e-4


class Cases(NamedTuple):
    """Conversations to compare on: what transformers is given, and what we encode, with a name each."""

    names: list[str]
    questions: list[dict[str, Any]]
    encoded: list[Encoded]


def verify(
    model: Path, exported: Path, trajectories: Path | None, *, dtype: str, template: str | None = None
) -> dict[str, Any]:
    """Compares transformers' scores of `exported` with ours, at every read position, both computed in float32.

    In float32 the model as it was trained is compared. In bfloat16 the weights that were written, read back by us and
    found to be the model's own, rounded: they mean the same numbers to both sides, so the bound is the same. How far
    the rounding moved the scores is told beside it. template: the one it was exported with, where it is not its own.

    Returns {"trajectories", "read_positions", "largest_difference", "bound", "rms", "transformers", "torch"}, and
    "rounding", the largest change of a score by bfloat16. Raises UserError where a difference is above the bound,
    1e-4 * max(1, rms of the scores), where weights are not the model's, or where the export cannot be read.
    """
    scorer = loading.load_scorer(model, template=template)
    cases = _cases(scorer.encoder, trajectories)
    trained = ours = scorer.score_encoded(cases.encoded, cases.names)
    if dtype != "float32":
        rounded = loading.load_scorer(exported)
        _check_rounded(scorer.parameters, rounded.parameters, dtype)
        ours = rounded.score_encoded(cases.encoded, cases.names)
        del rounded
    del scorer  # transformers needs the room for a copy of its own
    found = compare(cases.names, ours, their_scores(exported, cases.questions))
    if dtype != "float32":
        found["rounding"] = max(_largest(one, other) for one, other in zip(ours, trained, strict=True))
    return found


def _check_rounded(trained: nnx.State, written: nnx.State, dtype: str) -> None:
    """Raises UserError for a parameter that was not written as its rounded self. A bias may be there on one side."""
    own, read = (dict(nnx.to_flat_state(state)) for state in (trained, written))
    for path in own.keys() & read.keys():
        if not bool(jnp.array_equal(own[path][...].astype(dtype), read[path][...].astype(dtype))):
            raise UserError(
                f"export --verify: parameter {'.'.join(path)} was not written as the model's own, rounded to {dtype}; "
                "nothing was exported"
            )


def _cases(encoder, path: Path | None) -> Cases:
    if path is None:
        made = [as_messages(one, "made up") for one in sample_conversations()]
        given = [(f"made-up conversation {index}", one, None) for index, one in enumerate(made)]
    else:
        # An episode that failed before its first action has no value to compare.
        numbered = ((where, one) for where, one in read_numbered(path) if steps(one.messages))
        given = [(where, one.messages, one.tools) for where, one in numbered]
    if not given:
        raise UserError(f"{path}: no trajectory to verify on")
    names = [name for name, _, _ in given]
    encoded = [encoder.trajectory(messages, row=name, tools=tools) for name, messages, tools in given]
    questions = [
        {
            "name": name,
            "messages": [freeze(message).for_template() for message in messages],
            "tools": tools,
            "tokens": table.tokens.tolist(),
            "read_positions": table.read_positions.tolist(),
        }
        for (name, messages, tools), table in zip(given, encoded, strict=True)
    ]
    return Cases(names, questions, encoded)


def their_scores(exported: Path, questions: Sequence[dict]) -> dict[str, Any]:
    """Runs transformers_scores.py, which knows transformers and nothing of ours."""
    script = Path(__file__).with_name("transformers_scores.py")
    with tempfile.TemporaryDirectory(prefix="jaxprm-verify-") as scratch:
        question, answer = Path(scratch) / "cases.json", Path(scratch) / "values.json"
        question.write_text(json.dumps(questions), encoding="utf-8")
        # -P: the script's directory is full of modules with everyday names.
        command = [sys.executable, "-P", str(script), str(exported.absolute()), str(question), str(answer)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not answer.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise UserError(f"export --verify: transformers does not read the export: {reason[0]}")
        return json.loads(answer.read_text())


def compare(names: Sequence[str], ours: Sequence[np.ndarray], reply: dict[str, Any]) -> dict[str, Any]:
    """The largest difference, over all read positions. Raises UserError, with the conversation, above the bound."""
    theirs = [np.asarray(values, np.float64) for values in reply["values"]]
    reference = np.concatenate(theirs)
    rms = float(np.sqrt(np.mean(reference**2)))
    bound = BOUND * max(1.0, rms)
    worst = [_largest(own, other) for own, other in zip(ours, theirs, strict=True)]
    largest = float(np.max(worst))
    if not largest <= bound:  # a NaN is no success either
        raise UserError(
            f"export --verify: scores differ by {largest:.2e} in {names[int(np.argmax(worst))]}, bound {bound:.2e}; "
            "nothing was exported"
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


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(np.asarray(one, np.float64) - other).max())
