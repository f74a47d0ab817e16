"""What would block an export is found by `validate` and before the first training step, with `export`'s message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.toy import walks
from data_pipeline.encode import Encoder
from data_pipeline.trajectory import to_line
from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.export import tokenizer as export_tokenizer
from jaxprm.export.exportable import check_exportable
from tests.model import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_policy(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def blocked(model, tmp_path) -> Path:
    """A tokenizer of which every special token is used: the end of messages is all that is left to pad with."""
    directory = tmp_path / "blocked"
    directory.mkdir()
    for path in model.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"pad_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    template = directory / "chat_template.jinja"
    template.write_text("{% if false %}<|pad|>{% endif %}" + template.read_text())
    return directory


def test_a_base_that_can_be_exported_passes(model):
    check_exportable(model, Encoder.load(model))


def test_a_tokenizer_without_a_model_is_checked_too(model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    check_exportable(tmp_path, Encoder.load(tmp_path))


def test_validate_finds_it(blocked, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(to_line(row) + "\n" for row in walks(0, "train", 2, 2)))
    assert cli.main(["validate", str(path), "--tokenizer", str(blocked)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pad_token is '<|end|>'" in line and str(blocked) in line and "tokenizer_config.json" in line


def test_a_tokenizer_that_transformers_cannot_reproduce_is_found(model, monkeypatch):
    monkeypatch.setattr(export_tokenizer, "_PLAIN_CLASS", {})
    with pytest.raises(UserError, match=f"model {model}: transformers' AutoTokenizer does not give the tokens"):
        check_exportable(model, Encoder.load(model))


def test_a_run_is_refused_before_it_collects(blocked, tmp_path, capsys):
    config = Path(__file__).parents[2] / "configs/textcraft_tiny.py"
    arguments = ["train", str(config), f"base_model={blocked}", "--quick", "--workdir", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert "pad_token is '<|end|>'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "trajectories").exists()
