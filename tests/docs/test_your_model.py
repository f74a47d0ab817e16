"""docs/your-model.md, executed with small random models from transformers."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from data_pipeline.chat_template import SHIPPED
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from jaxprm import cli
from jaxprm.hf import config as hf_config
from jaxprm.model.config import FAMILIES
from tests.data_pipeline.conftest import make_tokenizer
from tests.docs import pages

PAGE = "your-model.md"
TEXT = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
# As stock templates do, it prints the last turn otherwise than the earlier ones.
REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(directory: Path, name: str, kind: str, **fields) -> torch.nn.Module:
    """A small model of a family whose scores spread, with a tokenizer whose template rewrites turns."""
    tokenizer = make_tokenizer(REWRITES, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|endoftext|>")
    tokenizer.save_pretrained(directory)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=4096,
        pad_token_id=0,
        **fields,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}For{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name, text in pages.files(PAGE).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "trajectories.jsonl").write_text(pages.files("your-agent.md")["trajectories.jsonl"])
    return folder


@pytest.fixture(scope="module")
def prm(folder) -> torch.nn.Module:
    return make(folder / "my-prm", "Qwen2", "TokenClassification", num_labels=2)


def expected(folder: Path, prm: torch.nn.Module, messages: list[dict]) -> list[float]:
    """The probability of label 1 at the end of every assistant message, by torch."""
    encoder, probabilities = Encoder.load(folder / "my-prm", "chatml"), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            tokens = encoder.trajectory(messages[: index + 1], row="x").tokens
            with torch.no_grad():
                logits = prm(input_ids=torch.tensor(np.asarray(tokens, np.int64))[None]).logits[0, -1]
            probabilities.append(float(logits.softmax(-1)[1]))
    return probabilities


def test_a_reward_model_from_elsewhere_scores_a_file(folder, prm, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    score = next(arguments for arguments in pages.shell(PAGE) if "score" in arguments)
    assert cli.main(score[2:]) == 1  # the second line has no step
    trajectories = [json.loads(line) for line in Path("trajectories.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    for trajectory, line in zip(trajectories, lines, strict=True):
        if "error" not in line:
            promises = [step["promise"] for step in line["steps"]]
            assert promises == pytest.approx(expected(folder, prm, trajectory["messages"]), abs=1e-5)
    assert ["error" in line for line in lines] == [False, True, False]


def test_a_reward_model_from_elsewhere_scores_in_python(folder, prm, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    elsewhere = runpy.run_path("elsewhere.py")
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    text = (folder / "elsewhere.py").read_text()
    messages = [dict(re.findall(r'"(role|content)": "([^"]*)"', line)) for line in re.findall(r"\{.*\}", text)]
    assert len(messages) == 4
    assert printed == pytest.approx(expected(folder, prm, messages), abs=1e-5)
    assert abs(printed[0] - printed[1]) > 1e-3
    assert elsewhere["result"]["score"] == printed[1]
    with pytest.raises(DataError, match="rewrites earlier turns"):  # without the chosen template
        Encoder.load("my-prm").trajectory(messages, row="x")


@pytest.mark.slow
def test_a_users_policy_goes_through_training(folder):
    make(folder / "my-policy", "Qwen3", "CausalLM", tie_word_embeddings=True)
    (folder / "configs").symlink_to(pages.ROOT / "configs")
    train = next(arguments for arguments in pages.shell(PAGE) if "train" in arguments)
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    # Random weights solve no task, and a run with failures alone stops before training.
    train.insert(train.index("--workdir"), "collection.min_success=0")
    done = subprocess.run(
        [sys.executable, *train], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    trained = folder / "runs/mine/reward_models/agentprm/seed-0/model"
    assert json.loads((trained / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    shipped = pages.ROOT / "data_pipeline/templates/chatml.jinja"
    assert (trained / "chat_template.jinja").read_text() == shipped.read_text()
    assert Encoder.load(trained).fingerprint == Encoder.load(folder / "my-policy", "chatml").fingerprint
    assert Encoder.load(trained).end_id == Encoder.load(folder / "my-policy", "chatml").end_id


def test_the_benchmark_is_the_one_that_is_tested():
    (arguments,) = [arguments for arguments in pages.shell(PAGE) if "benchmarks.import_export" in arguments]
    assert arguments == ["-m", "benchmarks.import_export", "--shape", "small", "--devices", "8"]
    tested = (pages.ROOT / "tests/hf/test_sharded_import.py").read_text()
    assert "benchmarks.import_export" in tested and "[1, 8]" in tested


def test_the_tables_are_complete():
    architectures = {name for family in FAMILIES.values() for name in family.architectures}
    assert set(re.findall(r"`(\w+For\w+)`", TEXT)) == architectures
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == {"own", *SHIPPED}
    assert set(re.findall(r"`(rope_\w+|torch_dtype|use_sliding_window|layer_types|problem_type)`", TEXT)) <= set(
        re.findall(r"\b\w+\b", Path(hf_config.__file__).read_text())
    )
