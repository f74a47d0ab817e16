"""A short run of the crash benchmark, and its report of a run that ended with other bits."""

from __future__ import annotations

import pytest

from benchmarks import crash
from jaxprm import files

UNDISTURBED = {"step": "96", "parameters": "a", "optimizer": "b"}


def run(began: list[int | None], **changes: str) -> dict:
    return {"kills": [{"began": batch} for batch in began], "status": 0, "result": UNDISTURBED | changes}


def test_what_differs_is_named():
    results = {
        "whole": UNDISTURBED,
        "named": run([0, None]),
        "random": [run([6]), run([], optimizer="c")],
        "same": False,
    }
    assert crash.report(results) == [
        "named points: 2 kills, of processes that began at 0, the end: same bits",
        "random 0: 1 kills, of processes that began at 6: same bits",
        "random 1: 0 kills, of processes that began at none: differs in optimizer",
        "3 kills, 96 steps: NOT THE SAME as the undisturbed run",
    ]


@pytest.mark.slow
def test_a_short_count_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crash, "NAMED", ("restored", "model"))
    monkeypatch.setattr(crash, "EPOCHS", 1)
    options = ["--times", "1", "--random", "1", "--seconds", "0.1", "--json", str(tmp_path / "found.json")]
    with pytest.raises(RuntimeError, match="kill point restored was not reached"):
        crash.main([*options, "--folder", str(tmp_path / "never")])  # nothing was there to be restored
    monkeypatch.setattr(crash, "NAMED", ("commit", "model"))
    assert crash.main([*options, "--folder", str(tmp_path / "runs")]) == 0
    results = files.read_json(tmp_path / "found.json")
    assert [kill["point"] for kill in results["named"]["kills"]] == ["commit", "model"]
    assert len(results["random"][0]["kills"]) == 1 and results["same"]
    assert {"parameters", "optimizer", "target", "metrics.jsonl"} <= results["whole"].keys()
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 kills, 16 steps: the same bits")
