"""Models by their name on the hub: taken from the cache without a network, and only if there is no such directory."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from jaxprm import cli
from jaxprm.config import PolicyConfig
from jaxprm.errors import UserError
from jaxprm.hf import hub
from jaxprm.policies import language_model
from tests.model import tiny

COMMIT, BRANCH = "0123456789abcdef0123456789abcdef01234567", "main"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def store(cache: Path, name: str, directory: Path) -> Path:
    """Stores a model in the cache as huggingface_hub does: blobs, and a snapshot of links to them."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / BRANCH).write_text(COMMIT)
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copyfile(file, folder / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_directory_is_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "org/name").mkdir(parents=True)
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")


@pytest.mark.parametrize("name", ["org", "a/b/c", "/org/name", "org/name@", "org/na me", "../x", "~/x", "http://a/b"])
def test_invalid_names_are_never_looked_up(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="no such directory; give one, or a name on the hub"):
        hub.resolve(name)


def test_a_cached_model_is_found_scored_and_sampled_from_without_a_network(cache, tmp_path, capsys):
    snapshot = store(cache, "org/prm", tiny.write_reward_model(tmp_path / "prm"))
    assert hub.resolve("org/prm") == hub.resolve(f"org/prm@{BRANCH}") == hub.resolve(f"org/prm@{COMMIT}") == snapshot
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "messages": tiny.conversation(0)}) + "\n")
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["score", "--model", "org/prm", *options]) == 0
    assert "scored 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a reward model"):
        language_model.load("org/prm", seed=0, settings=PolicyConfig())


def test_a_missing_model_is_refused_in_one_line(cache, capsys, tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["score", "--model", "org/missing@v2", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model org/missing@v2: no such directory, and HF_HUB_OFFLINE is set, and the model is not in" in error


def test_a_network_failure_is_reported_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    with pytest.raises(UserError, match=r"org/name: no such directory, and the hub cannot be reached") as caught:
        hub.resolve("org/name")
    assert "\n" not in str(caught.value)


def _no_network(*_, **__):
    raise socket.gaierror("network is unreachable")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (huggingface_hub.errors.GatedRepoError, "licence must be accepted"),
        (huggingface_hub.errors.RepositoryNotFoundError, "no such model, or it is private"),
        (huggingface_hub.errors.RevisionNotFoundError, "no revision v1"),
        (huggingface_hub.errors.HfHubHTTPError, "cannot be reached"),
        (ValueError, "cannot be reached"),
    ],
)
def test_errors_of_the_hub_become_one_line(monkeypatch, error, named):
    def refuse(*_, **__):
        raised = error.__new__(error)
        raised.args = ("first line\nRequest ID: 7",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=named) as caught:
        hub.resolve("org/name@v1")
    assert "\n" not in str(caught.value)


def test_only_the_files_of_a_model_are_downloaded(monkeypatch, tmp_path):
    repository = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "modeling_custom.py",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "onnx/config.json",
        "training_args.bin",
    ]

    def download(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision) == ("org/name", None)
        chosen = filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(chosen) == repository[:6]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/name") == tmp_path


def test_a_model_is_recorded_by_its_name(cache, tmp_path):
    snapshot = store(cache, "Org/a--b", tiny.write_reward_model(tmp_path / "prm"))
    assert hub.name_of(snapshot) == "Org/a--b"
    assert hub.name_of(tmp_path / "prm") == str(tmp_path / "prm")


def test_work_on_local_directories_opens_no_connection(tmp_path, monkeypatch):
    """Even without HF_HUB_OFFLINE."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    model = tiny.write_reward_model(tmp_path / "prm")
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "messages": tiny.conversation(0)}) + "\n")
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["score", "--model", str(model), *options]) == 0
    assert cli.main(["export", "--model", str(model), "--output", str(tmp_path / "exported")]) == 0
