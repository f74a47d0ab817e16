"""Rows of every format with a value replaced: imported, or an error that names the file, never another exception."""

from __future__ import annotations

import copy
import json
import random
import zipfile
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers import registry
from data_pipeline.importers.convert import Options, import_trajectories

CASES = Path(__file__).parent / "cases"
FILES = {
    "atif": "atif_trajectory.json",
    "inspect": "inspect.json",
    "mini-swe-agent": "mini_swe_agent.traj.json",
    "claude-code": "claude_code.jsonl",
    "openhands": "openhands.json",
    "swe-agent": "swe_agent.traj",
    "verifiers": "verifiers_trace.jsonl",
    "processbench": "processbench.jsonl",
    "prm800k": "prm800k.jsonl",
    "math-shepherd": "math_shepherd.jsonl",
    "trl-prm": "trl_prm.jsonl",
    "preference": "preference_pair.jsonl",
    "who-when": "several_agents.jsonl",
    "agentgym": "agentgym.jsonl",
    "sharegpt": "sharegpt_system_labels.jsonl",
    "responses": "responses_items.jsonl",
    "langchain": "langchain.jsonl",
    "anthropic": "anthropic_blocks.jsonl",
    "prompt-completion": "prompt_completion.jsonl",
    "openai": "sdk_dump.jsonl",
}
VALUES = [
    None, [], {}, "", True, -1, float("nan"), "x", "[", '{"a": 1}', ["a", 3], [1], [None], [[]], [{}], {"a": 1},
    {"type": ["a"]}, 10**30, "\ud800",
]  # fmt: skip
MUTATIONS = 40


def rows_of(name: str) -> list:
    text = (CASES / name).read_text()
    return list(map(json.loads, text.splitlines())) if name.endswith(".jsonl") else [json.loads(text)]


def places(node, path=()) -> list[tuple]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(rows: list, place: tuple, value) -> list:
    rows = copy.deepcopy(rows)
    node = rows
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return rows


def imported(tmp_path, rows: list, **options) -> str:
    """The error of an import, "" if there was none."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("\n".join(map(json.dumps, rows)))
    output.unlink(missing_ok=True)
    try:
        report = import_trajectories([source], output, Options(skip_bad=True, **options))
    except DataError as error:
        assert str(source) in str(error) and "\n" not in str(error)
        return str(error)
    assert all(str(source) in line for line in report.bad)
    return ""


@pytest.mark.parametrize("name", registry.BY_NAME)
def test_a_replaced_value_is_read_or_refused(tmp_path, name):
    rows, rng = rows_of(FILES[name]), random.Random(1)
    options = {"roles": {"Courier": "assistant", "Orchestrator (thought)": "assistant"}} if name == "who-when" else {}
    assert not imported(tmp_path, rows, format=name, **options)
    anywhere = places(rows)[1:]
    for number in range(MUTATIONS):
        broken = replaced(rows, rng.choice(anywhere), rng.choice(VALUES))
        imported(tmp_path, broken, format=(name, registry.AUTO)[number % 2], **options)


@pytest.mark.parametrize("key", ["type", "kind", "role"])
@pytest.mark.parametrize("value", [["algebra"], {"a": 1}])
def test_a_kind_that_is_no_text_is_another_field_of_the_row(tmp_path, key, value):
    row = {
        "id": "a",
        "source": "s",
        "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "b"}],
    }
    assert not imported(tmp_path, [row | {key: value}])


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("openhands", ("args",), "x"),
        ("atif", ("observation", "results"), [1]),
    ],
)
def test_a_value_of_another_type_is_a_bad_row(tmp_path, name, place, value):
    rows = rows_of(FILES[name])
    for path in [path for path in places(rows) if path[-len(place) :] == place]:
        rows = replaced(rows, path, value)
    assert "another type" in imported(tmp_path, rows, format=name)


@pytest.mark.parametrize("broken", ["header", "malformed header", "stream"])
def test_a_broken_archive_is_named(tmp_path, broken):
    path, rng = tmp_path / "log.eval", random.Random(1)
    header = {"header": "[]", "malformed header": "{", "stream": "{}"}[broken]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", header)
        archive.writestr("samples/1.json", json.dumps(rng.choices("abc", k=2000)))
        start = archive.infolist()[-1].header_offset + 60
    if broken == "stream":
        content = bytearray(path.read_bytes())
        content[start : start + 40] = b"\xff" * 40
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"log\.eval: (an archive that cannot be read|header\.json: )"):
        import_trajectories([path], tmp_path / "out", Options(skip_bad=True))
