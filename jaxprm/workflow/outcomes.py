"""Checks, before training, that the outcomes of the collected trajectories can teach a reward model something."""

from __future__ import annotations

from pathlib import Path

import msgspec

from jaxprm.errors import UserError

_ADVICE = "see 'How good it must be' in docs/your-policy.md; collection.min_success=0 trains without this check"


class _Row(msgspec.Struct):
    """The fields of a trajectory that decide its training targets."""

    outcome: float | None = None
    ended: str | None = None
    rewards: list[float] | None = None


def check_outcomes(path: Path, *, min_success: float) -> None:
    """Raises UserError if training trajectories are all alike in outcome, or nearly all failed.

    A reward model learns from differences: between attempts of which some succeed. Rows without an outcome, rows with
    rewards of their own and rows that ended in an error are not counted.

    Args:
        path: trajectories of the training split, JSON Lines.
        min_success: least share of trajectories with an outcome above 0; 0 checks nothing.
    """
    if not min_success:
        return
    decoder = msgspec.json.Decoder(_Row)
    with path.open("rb") as lines:
        rows = [decoder.decode(line) for line in lines if line.strip()]
    outcomes = [row.outcome for row in rows if row.outcome is not None and row.rewards is None and row.ended != "error"]
    if not outcomes:
        return
    count, successes = len(outcomes), sum(outcome > 0 for outcome in outcomes)
    if min(outcomes) == max(outcomes):
        raise UserError(
            f"{path}: all {count} trajectories have outcome {outcomes[0]:g}, so no step is better than another; "
            f"{_ADVICE}"
        )
    if successes < min_success * count:
        raise UserError(
            f"{path}: {successes} of {count} trajectories have an outcome above 0, fewer than collection.min_success = "
            f"{min_success:g}; {_ADVICE}"
        )
