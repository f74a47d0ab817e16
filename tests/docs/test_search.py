"""docs/search.md, executed: its commands, and the fields that it documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jaxprm import cli
from tests.docs import pages
from tests.model import tiny

PAGE = "search.md"


def documented(heading: str) -> set[str]:
    """Names in the first column of the table with that heading."""
    text = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    table = re.search(rf"^\| {heading} .*?\n\n", text, re.MULTILINE | re.DOTALL)[0]
    return set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[1:] if line)))


def test_the_usage_table_names_every_count():
    from jaxprm.scoring.scorer import Scorer

    scorer = Scorer(tiny.CONFIG, tiny.reward_model(), tiny.encoder(), rows=1, max_tokens=8)
    assert documented("`Scorer.usage`") == set(scorer.usage)


@pytest.mark.slow
def test_the_commands_run_unchanged(tmp_path, monkeypatch, capsys):
    """With a small random reward model instead of the demo's."""
    monkeypatch.chdir(tmp_path)
    tiny.write_reward_model(Path("runs/demo/reward_models/agentprm/seed-0/model"))
    lines = [{"id": str(seed), "messages": tiny.conversation(seed, turns=2)} for seed in range(2)]
    Path("trajectories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check, bench = (arguments[2:] for arguments in pages.shell(PAGE))
    assert cli.main(check) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed: ")
    assert cli.main(bench) == 0
    runs = json.loads(Path("bench.json").read_text())["runs"]
    assert set(runs) == {"engine", "packed_prefill", "uncached", "torch_reencode", "torch_kept_cache"}
    assert set().union(*runs.values()) == documented("field of a run")
    # 300 + 4 rounds of 3 x 3 x 20 + 3 rounds of 3 x 40; encoded again, 9 candidates with 20, 80, 140, 200 after them.
    least = 300 + 4 * 180 + 3 * 120
    reencoded = 9 * (4 * 300 + 20 + 80 + 140 + 200)
    assert runs["engine"]["tokens_encoded"] == runs["engine"]["least_tokens"] == least
    assert runs["torch_kept_cache"]["tokens_encoded"] == least
    assert runs["torch_reencode"]["tokens_encoded"] == runs["uncached"]["tokens_encoded"] == reencoded
    assert runs["engine"]["slots_computed"] == least
    assert runs["engine"]["recompilations"] == 0
    assert max(run.get("max_score_difference", 0) for run in runs.values()) < 1e-5
