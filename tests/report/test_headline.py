"""The headline reports a gain, a loss, or no clear difference, as measured."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprm.report.headline import headline
from jaxprm.report.results import Paired, ReportedEstimate, RunResults

PLAIN = ReportedEstimate(0.4125, 0.35, 0.47, 120)
GUIDED = ReportedEstimate(0.583, 0.52, 0.64, 120)


def run(mean: float, low: float | None, high: float | None, n: int = 120, **pair: Any) -> RunResults:
    paired = {"a": "agentprm", "b": "policy", "at": "beam/4x4", "mean": mean, "low": low, "high": high, "n": n} | pair
    beams = {"2x2": PLAIN, "4x4": GUIDED, "8x8": PLAIN}
    return RunResults(
        policy={"sampled": PLAIN},
        methods={"random": {"beam": beams}, "pvm": {"beam": beams}, "agentprm": {"beam": beams}},
        paired=[Paired(**paired)],
        provenance={"seeds": [0, 1, 2]},
    )


def plain_text(text: str) -> str:
    return text.replace("\u202f", " ")


def test_a_gain_clear_of_zero_is_stated_with_its_interval() -> None:
    summary = headline(run(0.1705, 0.11, 0.231))
    assert summary.verdict == "better"
    assert (
        plain_text(summary.claim)
        == "Guided by AgentPRM, the policy solves 58.3 % of unseen tasks. Alone it solves 41.2 %."
    )
    assert plain_text(summary.detail) == (
        "Beam 4×4 against one plain sample, paired by task (120 tasks, 3 seeds): +17.1 points, "
        "95 % interval +11.0 to +23.1. The interval is clear of zero."
    )


def test_an_interval_with_zero_inside_is_no_finding() -> None:
    summary = headline(run(0.02, -0.03, 0.07))
    assert summary.verdict == "unclear"
    assert "no clear difference" in summary.claim
    assert "includes zero" in summary.detail and "does not show that guidance helps" in summary.detail


def test_a_loss_is_called_a_loss() -> None:
    summary = headline(run(-0.08, -0.13, -0.03))
    assert summary.verdict == "worse"
    assert "fewer" in summary.claim and "guidance hurt" in summary.detail
    assert "−8.0 points" in summary.detail


def test_a_pair_in_the_other_order_is_negated() -> None:
    negated = headline(run(-0.17, -0.23, -0.11, a="sampled", b="agentprm"))
    assert negated.verdict == "better"
    assert "+17.0 points" in negated.detail and "+11.0 to +23.0" in negated.detail


@pytest.mark.parametrize("at", ["beam/4x4", "beam 4x4", "beam:4x4", "4x4"])
def test_the_search_may_be_written_in_several_ways(at: str) -> None:
    assert headline(run(0.17, 0.11, 0.23, at=at)).verdict == "better"


@pytest.mark.parametrize("pair", [{"at": "beam/2x2"}, {"at": "best_of_n/4"}, {"b": "greedy"}, {"a": "pvm"}])
def test_another_comparison_does_not_stand_in(pair: dict[str, str]) -> None:
    summary = headline(run(0.17, 0.11, 0.23, **pair))
    assert summary.verdict == "unknown"
    assert "not computed" in summary.detail


def test_few_tasks_are_pointed_out() -> None:
    assert "Only 4 tasks" in headline(run(0.5, 0.25, 0.75, n=4)).detail
    assert "Only" not in headline(run(0.5, 0.25, 0.75, n=120)).detail


def test_a_difference_without_interval_may_be_chance() -> None:
    summary = headline(run(0.17, None, None))
    assert summary.verdict == "unknown" and "may be chance" in summary.detail


def test_the_method_and_size_are_chosen_by_rule_not_by_result() -> None:
    summary = headline(run(0.1, 0.05, 0.15))
    assert (summary.label, summary.size) == ("agentprm", "4x4")
    without = RunResults(methods={"random": {"beam": {"4x4": GUIDED}}, "orm": {"beam": {"8x8": GUIDED, "2x2": PLAIN}}})
    summary = headline(without)
    assert (summary.label, summary.size) == ("orm", "2x2")
    assert "The policy alone was not measured" in summary.detail


def test_random_scores_are_never_the_headline() -> None:
    summary = headline(RunResults(policy={"sampled": PLAIN}, methods={"random": {"beam": {"4x4": GUIDED}}}))
    assert summary.label is None
    assert plain_text(summary.claim) == (
        "The policy alone solves 41.2 % of unseen tasks. No guided search was measured in this run."
    )


@given(st.tuples(*[st.floats(-1, 1)] * 3).map(sorted))
def test_the_verdict_follows_the_sign_of_the_interval(bounds: list[float]) -> None:
    low, mean, high = bounds
    expected = "better" if low > 0 else "worse" if high < 0 else "unclear"
    assert headline(run(mean, low, high)).verdict == expected
