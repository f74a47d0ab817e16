"""The benchmarks of search, at their smallest: what they count is right, and what they draw is there."""

import json

import numpy as np
import pytest
from flax import nnx

from benchmarks import decisions, search_growth
from jaxprm.config import PolicyConfig
from jaxprm.hf import writer
from jaxprm.policies.loading import policy_directory
from jaxprm.scoring.bench import TreeSizes, bench_engine
from jaxprm.search.branches import Branch
from jaxprm.search.tree import Node, Tree
from jaxprm.training.reward_model import from_policy


@pytest.fixture(scope="module")
def textcraft_model(tmp_path_factory):
    """A reward model that nobody trained, of the policy's size: its scores spread by a large head."""
    directory, base = tmp_path_factory.mktemp("model"), policy_directory(PolicyConfig(path="default"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((base / name).read_bytes())
    config, state = from_policy(base, 0)
    state["head"] = nnx.Param(state["head"][...] * 20)
    writer.write_model(directory, config, state, pad_id=0, end_id=1, max_length=1024)
    return directory


@pytest.mark.slow
def test_the_engine_decides_as_plain_scoring_does(textcraft_model, tmp_path, capsys):
    arguments = ["--model", str(textcraft_model), "--tasks", "3", "--beam", "2x2"]
    assert decisions.main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parted"] == 0 and found["nodes"] > 20
    assert 0 < found["largest_difference"] < found["bound"]
    assert found["engine"]["tokens_encoded"] * 3 < found["plain"]["tokens_encoded"]
    assert all(found[name]["tokens_encoded"] <= found[name]["slots_computed"] for name in ("engine", "plain"))
    assert found["outcomes"]["engine"] == found["outcomes"]["plain"]
    assert "0 beyond it" in capsys.readouterr().out


def tree(*nodes):
    """A root and children: (action, promise, kept) each."""
    prompt = [{"role": "user", "content": "p"}]
    root = Node(0, None, Branch("t"), prompt)
    found = Tree("t", root, [root])
    for number, (action, promise, kept) in enumerate(nodes, start=1):
        messages = [*prompt, {"role": "assistant", "content": action}]
        messages += [{"role": "user", "content": "seen"}] if kept else []
        found.nodes.append(Node(number, root, Branch("t"), messages, promise=promise, kept=kept))
    return found


def test_where_searches_part_is_told_with_the_gap():
    same = tree(("a", 0.5, True), ("b", 0.25, False))
    assert decisions._parting(same, tree(("a", 0.5, True), ("b", 0.375, False))) == (0.125, None)
    parted = tree(("a", 0.5, False), ("b", 0.75, True))
    assert decisions._parting(same, parted) == (0.0, 0.25)


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path, capsys):
    outputs = ["--json", str(tmp_path / "growth.json"), "--figure", str(tmp_path / "cost.svg")]
    assert search_growth.main(["--depths", "1", "2", "--candidates", "2", *outputs]) == 0
    rows = json.loads((tmp_path / "growth.json").read_text())
    assert [row["depth"] for row in rows["depth"]] == [1, 2] and rows["candidates"][0]["candidates"] == 2
    assert all(row["tokens_encoded"] == row["least_tokens"] for some in rows.values() for row in some)
    assert (tmp_path / "cost.svg").read_text().count("<svg") == 1
    assert "slots computed over the least possible: at most 1.0" in capsys.readouterr().out


def test_what_reading_all_again_takes_is_counted():
    setting = TreeSizes(prompt_tokens=10, action_tokens=2, observation_tokens=3, beams=2, candidates=2, depth=2)
    found = bench_engine(setting)
    # Four candidates of 12 tokens, then two states of 15 with two candidates of 2 each.
    assert found["reencoded_tokens"] == 4 * 12 + 4 * 17
    assert found["tokens_encoded"] == 10 + 4 * 2 + 2 * 3 + 4 * 2
    assert np.isclose(search_growth.microseconds_a_token([{"seconds": 2.0, "tokens_encoded": 4}])[0], 5e5)
