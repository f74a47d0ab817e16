"""Thousands of broken files of every kind through every verb that reads them: one line, or the same output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxprm import cli
from tests.mutation import kinds, verbs
from tests.mutation import mutations as mutate
from tests.mutation.outcomes import Counts
from tests.mutation.sweep import chosen, sweep

# Kinds whose verbs need no compiled program, for the fast tier.
FAST = ("reward_model.json", "config.json", "tokenizer_config.json", "overrides")
FEW, MANY = 25, 60


def swept(kind: kinds.Kind, directory: Path, count: int, *only: str) -> Counts:
    kind.make(directory)
    inputs = chosen(kind, kind.path(directory).read_bytes(), count, seed=0)
    return sweep(kind, directory, inputs, only)


@pytest.mark.parametrize("name", FAST)
def test_a_few_broken_files_of_every_kind_that_users_touch(name, tmp_path):
    kind = next(kind for kind in kinds.KINDS if kind.name == name)
    verb = "load" if "load" in kind.verbs else next(iter(kind.verbs))
    counts = swept(kind, tmp_path, FEW, verb)
    assert not counts.faults, "\n".join(counts.faults)
    # A sweep that changes nothing, or in which nothing survives, tests nothing.
    assert counts.outcomes["rejected"] >= FEW // 4 and counts.outcomes.total() == FEW


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds.KINDS, ids=[kind.name for kind in kinds.KINDS])
def test_broken_files_of_every_kind(kind, tmp_path, capsys):
    counts = swept(kind, tmp_path, MANY)
    with capsys.disabled():
        print(f"\n{kind.name}: {counts} {dict(counts.reasons)}")
    assert not counts.faults, "\n".join(counts.faults)
    assert counts.outcomes.total() == round(MANY * kind.share)


BROKEN = {
    "model/reward_model.json": [
        ("targets", None),
        ("targets", {"discount": "1"}),
        ("fingerprints", {"tokenizer": 5}),
        ("config", []),
        ("turn_tokens", {"action": 3}),
        ("trained_on", {"tokens": "many"}),
        ("value_range", [0]),
        ("results", []),
        ("max_tokens", 0),
        ("validation", 0.5),
    ],
    "model/config.json": [
        ("max_position_embeddings", "x"),
        ("num_hidden_layers", "2"),
        ("id2label", {"0": 5}),
        ("architectures", {}),
    ],
    "model/tokenizer_config.json": [("eos_token", 5), ("chat_template", [5]), ("pad_token", {"content": None})],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("alike")
    verbs.make_model(directory)
    return directory


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [(file, *change) for file, changes in BROKEN.items() for change in changes],
)
def test_all_verbs_refuse_a_broken_model_with_the_same_line(file, field, value, model, capsys):
    path = model / file
    original = path.read_bytes()
    path.write_text(json.dumps(json.loads(original) | {field: value}))
    options = {
        "score": ["--input", model / "t.jsonl", "--output", model / "scores"],
        "evaluate": ["--input", model / "t.jsonl"],
        "export": ["--output", model / "exported"],
        "serve": ["--port", 0],
        "check-scorer": [],
    }
    lines = set()
    try:
        for verb, arguments in options.items():
            status = cli.main([verb, "--model", str(model / "model"), *map(str, arguments)])
            assert status == 2, verb
            lines.add(capsys.readouterr().err)
    finally:
        path.write_bytes(original)
    (line,) = lines
    assert line.count("\n") == 1 and f"{path}: {field}" in line
    assert not (model / "exported").exists() and not (model / "scores").exists()


def test_fields_of_others_and_files_of_older_versions_are_accepted(tmp_path):
    verbs.make_model(tmp_path)
    expected = verbs.load(tmp_path)
    recipe, config, tokenizer = (
        tmp_path / "model" / name for name in ("reward_model.json", "config.json", "tokenizer_config.json")
    )
    for path in (recipe, config, tokenizer):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"another_field": [{"x": None}], "seed": None}))
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    old = json.loads(recipe.read_text())
    for name in ("format", "version", "max_tokens", "fingerprints", "config", "trained_on"):
        del old[name]
    recipe.write_text(json.dumps(old))
    assert verbs.load(tmp_path) == expected


def test_the_generator_finds_a_reader_that_checks_nothing(tmp_path):
    """The sweep must be able to fail: a traceback, a difference without a reason, and a hang."""
    (tmp_path / "a.json").write_text('{"number": 3, "text": "x"}')

    def careless(directory: Path) -> str:
        fields = json.loads((directory / "a.json").read_bytes())
        return f"{fields['number'] + 1} {fields.get('other')}"

    kind = kinds.Kind("careless", lambda directory: None, "a.json", (mutate.one_json,), {"read": careless})
    inputs = list(mutate.all_json((tmp_path / "a.json").read_bytes()))
    counts = sweep(kind, tmp_path, inputs)
    assert counts.outcomes["tracebacks"] > 10 and counts.outcomes["silent differences"] > 0
    assert counts.outcomes["survived"] > 10 and counts.outcomes.total() == len(inputs) > 100
