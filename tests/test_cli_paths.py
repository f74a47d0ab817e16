"""Paths on the command line: a collision, a name that cannot be, or a disk that cannot be written is one line."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from data_pipeline import build
from jaxprm import cli
from tests.model import tiny

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "textcraft_tiny.py")
LOG = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "outcome": 1}\n'
ROW = '{"id": "1", ' + LOG[1:]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "t.jsonl": ROW,
        "log.jsonl": LOG,
        "s.partial.json": ROW,
        "set/t.jsonl": ROW,
        "w/trajectories/train.jsonl": ROW,
        "w/shards/config.json": "{}",
        ".a.old": "{{ messages }}",
        "model/config.json": "{}",
        "model/model.safetensors": "",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    os.link("t.jsonl", "hard.jsonl")
    Path("link.jsonl").symlink_to("t.jsonl")
    return tmp_path


def contents() -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(Path().rglob("*")) if path.is_file()}


def assert_one_line(capsys, code, *parts):
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


IMPORT = ["import-trajectories", "--format", "openai", "--input", "log.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["validate", "t.jsonl", "--json", "t.jsonl"], "--json t.jsonl: is the input"),
        (["validate", "train=t.jsonl", "--json", "link.jsonl"], "--json link.jsonl: is the input"),
        (["validate", "t.jsonl", "--json", "hard.jsonl"], "--json hard.jsonl: is the input"),
        ([*IMPORT, "--output", "b", "--json", "log.jsonl"], "--json log.jsonl: is the input"),
        ([*IMPORT, "--output", "b", "--json", "b"], "output b and --json b are the same"),
        ([*IMPORT, "--output", "b", "--json", ".b.tmp"], "--json .b.tmp"),
        ([*IMPORT, "--output", "log.jsonl"], "output log.jsonl: is the input"),
        (["score", "--model", "model", "--input", "s.partial.json", "--output", "s"], "which is the input"),
        (["score", "--model", "model", "--input", "t.jsonl", "--output", "hard.jsonl"], "is the input"),
        (["score", "--model", "model", "--input", "t.jsonl", "--output", "model/config.json"], "of the model"),
        (["export", "--model", "model", "--output", "a", "--chat-template", ".a.old"], "which is the chat template"),
        (["evaluate", "--model", "model", "--input", "t.jsonl", "--json", "model/model.safetensors"], "of the model"),
        (["export", "--model", "model", "--output", "model"], "is the model"),
        (["export", "--model", "set/../model", "--output", "model"], "is the model"),
        (["plan", TINY, "--topology", "v5e:1x1", "--json", TINY], "is the config"),
        (["collect", TINY, "--workdir", "w", "--data", "w/trajectories/train.jsonl"], "trajectories: holds"),
        (["train", TINY, "--workdir", "w", "--data", "t.jsonl", "--model", "w/shards"], "base_model"),
        (["bench", "search", "--json", "/dev/null"], "is a device or a pipe"),
        (["validate", "t.jsonl", "--json", "w"], "is a directory"),
    ],
)
def test_a_collision_is_one_line_and_changes_no_file(capsys, arguments, part):
    before = contents()
    assert_one_line(capsys, cli.main(arguments), part)
    assert {name: text for name, text in contents().items() if name != "w/lock"} == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--input", "set/t.jsonl", "--tokenizer", "tok", "--output", "set"], "output set: holds the input"),
        (["--input", "t.jsonl", "--tokenizer", "set", "--output", "set"], "is the tokenizer"),
        (["--input", "t.jsonl", "--tokenizer", "tok", "--output", "t.jsonl"], "is the input"),
    ],
)
def test_a_collision_of_a_build_is_one_line(capsys, arguments, part):
    shutil.copytree(tiny.tokenizer_directory(), "tok")
    before = contents()
    assert_one_line(capsys, build.main(arguments), part)
    assert contents() == before


VERBS = {
    "validate": ["validate", "t.jsonl", "--json", "PATH"],
    "import": [*IMPORT, "--output", "PATH"],
    "score": ["score", "--model", "model", "--input", "t.jsonl", "--output", "PATH"],
    "evaluate": ["evaluate", "--model", "model", "--input", "t.jsonl", "--json", "PATH"],
    "export": ["export", "--model", "model", "--output", "PATH"],
    "collect": ["collect", TINY, "--workdir", "PATH"],
    "imitate": ["imitate", TINY, "--workdir", "PATH"],
    "bench": ["bench", "search", "--json", "PATH"],
    "plan": ["plan", TINY, "--topology", "v5e:1x1", "--json", "PATH"],
    "input": ["score", "--model", "model", "--input", "PATH", "--output", "s"],
    "model": ["score", "--model", "PATH", "--input", "t.jsonl", "--output", "s"],
    "tokenizer": ["validate", "t.jsonl", "--tokenizer", "PATH"],
    "data": ["collect", TINY, "--workdir", "w2", "--data", "PATH"],
    "config": ["collect", "PATH", "--workdir", "w2"],
    "inspect": ["inspect", "PATH"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("path", ["x" * 300, "y/" * 2100 + "z", "caf\udce9.jsonl"], ids=["name", "path", "bytes"])
def test_a_path_that_cannot_be_is_one_line(capsys, verb, path):
    before = contents()
    arguments = [path if argument == "PATH" else argument for argument in VERBS[verb]]
    assert_one_line(capsys, cli.main(arguments), "not valid UTF-8" if "\udce9" in path else path[:30])
    assert {name: text for name, text in contents().items() if not name.startswith("w2/")} == before


@pytest.mark.parametrize("text", ["OSError", "wrapped"])
def test_a_disk_that_cannot_be_written_is_one_line(capsys, monkeypatch, text):
    def fail(options):
        if text == "wrapped":
            raise ValueError("tensorstore: Read-only file system [source locations=...]")
        raise OSError(30, "Read-only file system", "w/config.json")

    monkeypatch.setitem(cli.VERBS, "bench", fail)
    assert_one_line(capsys, cli.main(["bench", "search"]), "Read-only file system")
