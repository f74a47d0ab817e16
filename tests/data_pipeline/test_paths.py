"""No command may write to what it reads, nor twice to one place."""

import os
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.paths import Named, check_paths


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An input `in`, a link and a hard link to it, a directory with an input, a model, and an old report."""
    monkeypatch.chdir(tmp_path)
    Path("in").write_text("precious")
    Path("link").symlink_to("in")
    os.link("in", "hard")
    Path("set").mkdir()
    Path("set/in").write_text("precious")
    Path("also").symlink_to("set")
    Path("model/checkpoints/100").mkdir(parents=True)
    old = ("a.partial", "a.partial.json", ".a.tmp", ".a.old")
    for name in ("model/config.json", "model/report.json", "model/checkpoints/100/_METADATA", *old):
        Path(name).write_text("{}")
    return tmp_path


def check(reads, *writes):
    check_paths(
        [Named("input", Path(path)) for path in reads], [Named(f"out{n}", Path(p)) for n, p in enumerate(writes)]
    )


@pytest.mark.parametrize(
    ("reads", "writes", "problem"),
    [
        (["in"], ["in"], "is the input in"),
        (["in"], ["./set/../in"], "is the input in"),
        (["in"], ["link"], "is the input in"),
        (["link"], ["in"], "is the input link"),
        (["in"], ["hard"], "is the input in"),
        (["a.partial"], ["a"], "written by way of a.partial, which is the input"),
        (["a.partial.json"], ["a"], "written by way of a.partial.json"),
        ([".a.tmp"], ["a"], "written by way of .a.tmp"),
        ([".a.old"], ["a"], "written by way of .a.old"),
        (["set/in"], ["set"], "holds the input set/in"),
        (["also/in"], ["set"], "holds the input also/in"),
        (["set/in"], ["also"], "holds the input set/in"),
        (["model"], ["model"], "is the input model"),
        (["model"], ["."], "no name of its own"),
        (["model"], ["model/config.json"], "is a file of the input model"),
        (["model"], ["model/tokenizer.json"], "is a file of the input model"),
        (["."], ["model/config.json"], "is a file of the input"),
        (["model"], ["model/checkpoints/100/_METADATA"], "is a file of the input model"),
        ([], ["b", "b"], "out0 b and out1 b are the same"),
        ([], ["b", "set/../b"], "are the same"),
        ([], ["b", ".b.tmp"], "out0 b and out1 .b.tmp are the same"),
        ([], ["set", "set/b"], "out0 set: holds out1 set/b"),
        ([], ["x" * 250], "250 bytes, at most 237"),
        ([], ["/dev/null"], "is a device or a pipe"),
    ],
)
def test_a_collision_is_refused(reads, writes, problem):
    with pytest.raises(DataError) as refused:
        check(reads, *writes)
    assert problem in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("reads", "writes"),
    [
        (["in"], ["out"]),
        (["in", "set/in"], ["set/out", "out"]),
        (["model"], ["model/report.json"]),  # again, next to the model
        (["model"], ["model/export"]),
        (["model"], ["model/export/config.json"]),
        (["."], ["w/config.json"]),  # a model in the folder in which the user works
        (["own"], ["own"]),  # a chat template, by its name
        (["in"], ["model"]),
        (["gone"], ["out"]),
        (["gone"], ["gone"]),
    ],
)
def test_other_paths_are_allowed(reads, writes):
    check(reads, *writes)
