"""docs/architecture.md: its layers are the folders, its invariants name real tests, its extensions train and search."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from data_pipeline.importers import registry
from data_pipeline.importers.convert import Options, import_trajectories
from data_pipeline.trajectory import read
from jaxprm import cli, config
from jaxprm.objectives import find_objective
from jaxprm.search.methods import guided_search, search_specs
from jaxprm.search.spec import SearchMethod
from tests.docs import pages
from tests.search.fakes import ScriptedScorer, SeededPolicy, Walk

PAGE = "architecture.md"
TEXT = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, importable."""
    for name, text in pages.files(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_every_folder_is_in_the_table_with_the_first_sentence_of_its_docstring():
    table = dict(re.findall(r"^\| `((?:jaxprm/\w+|data_pipeline)/)` \| (.+) \|$", TEXT, re.MULTILINE))
    folders = {f"jaxprm/{path.parent.name}/" for path in (pages.ROOT / "jaxprm").glob("*/__init__.py")}
    assert set(table) == folders | {"data_pipeline/"}
    for name in folders:
        docstring = ast.get_docstring(ast.parse((pages.ROOT / name / "__init__.py").read_text(encoding="utf-8")))
        assert docstring.startswith(table[name]), name


def test_the_order_of_the_layers_is_the_one_that_lint_enforces():
    contracts = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = [name.strip() for layer in contracts[0]["layers"] for name in re.split(r"[|:]", layer)]
    layers = TEXT[TEXT.index("## The layers") : TEXT.index("## Where to start")]
    listed = re.findall(r"`jaxprm/(\w+)(?:/|\.py)`", layers)
    # The modules at the bottom have no order among themselves, and cli.py shares its line with its options.
    ordered = [name for name in listed if (pages.ROOT / "jaxprm" / name).is_dir() or name in ("cli", "api")]
    assert [name for name in enforced if name in ordered] == ordered


def test_invariants_name_tests_that_exist():
    section = TEXT[TEXT.index("## What always holds") : TEXT.index("## Conventions")]
    named = re.findall(r"`(tests/[\w/]+\.py)`", section)
    assert len(named) > 12
    assert [name for name in named if not (pages.ROOT / name).is_file()] == []


def test_the_objective_of_the_page_has_the_targets_that_it_describes(folder):
    objective = find_objective("own_objective:HALFWAY")
    values, rewards = np.array([0.2, 0.6]), np.array([0.0, 1.0])
    ends, valid = np.array([False, True]), np.array([True, True])
    targets, mask = objective.targets(values, rewards, ends, valid, config.RewardModelConfig(label="x"), None)
    np.testing.assert_allclose(targets, [0.6, 0.8], rtol=1e-6)
    assert mask.tolist() == [True, True]


def test_the_search_of_the_page_follows_independent_paths(folder, tmp_path):
    settings = config.SearchConfig(custom={"own_search:PATHS": ((3,),)}, beams=(), stepwise=(), trees=0)
    (spec,) = search_specs(settings)
    assert (spec.at, spec.forks, spec.cached_paths) == ("paths 3", True, 3)
    output = tmp_path / "out.jsonl"
    options = {"settings": settings, "spec": spec, "label": "paths", "about": {}}
    guided_search(Walk, SeededPolicy(), ScriptedScorer(len), ["0", "1"], output, **options)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["0", "1"]
    assert not any("ended" in line for line in lines)
    # Three draws from the first state, then one for each open path: never more than three a round.
    assert all(3 <= line["proposed"] <= 3 * line["rounds"] for line in lines)


def test_the_defaults_of_a_search_are_those_of_the_page():
    defaults = dict(
        re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", TEXT[TEXT.index("field of `SearchMethod`") :], re.MULTILINE)
    )
    fields = {field.name for field in dataclasses.fields(SearchMethod)}
    assert {"parse_sizes", "size", "forks", "cached_paths", "label", "card"} == set(defaults) & fields == set(defaults)
    method = SearchMethod("own_kind", lambda request: [])
    assert (method.label, method.card) == ("own kind {}", None)
    for sizes, size in (((1, 4), "1x4"), ((3, 4), "3x4"), ((1, 4, 2), "1x4x2")):
        spec = method.spec(*sizes)
        names = {"width": spec.width, "ahead": spec.ahead}
        assert spec.size == size and spec.cached_paths == eval(defaults["cached_paths"].strip("`"), names)
        assert spec.forks == eval(defaults["forks"].strip("`"), names)


def test_the_reader_of_the_page_imports_a_row(folder, tmp_path, monkeypatch):
    reader = importlib.import_module("own_reader").READER
    monkeypatch.setattr(registry, "READERS", (reader, *registry.READERS))
    (tmp_path / "log.jsonl").write_text('{"dialog": ["go", "left"], "x": 1}\n')
    report = import_trajectories([tmp_path / "log.jsonl"], tmp_path / "out.jsonl", Options())
    assert report.reasons == {"dialog": "`dialog` of texts"}
    (trajectory,) = read(tmp_path / "out.jsonl")
    assert [message.content for message in trajectory.messages] == ["go", "left"] and trajectory.meta == {"x": 1}


@pytest.mark.slow
def test_a_run_trains_with_the_objective_and_searches_with_the_search(folder, tmp_path, monkeypatch, capsys):
    """Both are named in a config outside the package; results and page show them."""
    quick = config.load("textcraft_tiny", quick=True)
    models = (config.RewardModelConfig(label="halfway", objective="own_objective:HALFWAY", beta=0.0, epochs=1),)
    search = msgspec.structs.replace(quick.search, beams=(), stepwise=(), custom={"own_search:PATHS": ((2,),)})
    experiment = config.to_dict(msgspec.structs.replace(quick, reward_models=models, search=search))
    (tmp_path / "own_config.py").write_text(
        f"from jaxprm import config as lib\nconfig = lib.from_dict({experiment!r}, where='own_config')\n"
    )
    assert cli.main(["run", str(tmp_path / "own_config.py"), "--workdir", str(tmp_path / "work")]) == 0
    recipe = json.loads((tmp_path / "work/reward_models/halfway/seed-0/model/reward_model.json").read_text())
    assert recipe["config"]["objective"] == "own_objective:HALFWAY"
    results = json.loads((tmp_path / "work/results.json").read_text())
    assert any("paths" in key for key in results["methods"]["halfway"]), results["methods"]["halfway"].keys()
    assert "2 independent paths" in (tmp_path / "work/report/index.html").read_text()
    for name in ("own_objective", "own_search"):
        assert importlib.import_module(name) is sys.modules[name]
