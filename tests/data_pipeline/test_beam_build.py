"""The build as a Beam pipeline against the local one: the same files, the same errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import build as local
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.shards import open_dataset
from data_pipeline.trajectory import Message
from tests.data_pipeline import beam_environment

DIRECT = ["--runner=DirectRunner"]
THREADS = [*DIRECT, "--direct_running_mode=multi_threading", "--direct_num_workers=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plain_tokenizer, make_trajectory, write_rows) -> Path:
    """Files of good rows, some of them equal or long, of bad rows, and of tasks in two splits."""
    folder, rng = tmp_path_factory.mktemp("beam"), random.Random(0)
    plain_tokenizer.save_pretrained(folder / "tokenizer")

    def rows(name: str, count: int, first: int, **fields):
        for number in range(count):
            seed = first + rng.randrange(25)
            ended = "error" if rng.random() < 0.1 else "done"
            yield make_trajectory(
                seed,
                id=f"{name}-{number}",
                rounds=1 + seed % 6,
                outcome=rng.choice([0.0, 0.3, 1.0]),
                ended=ended,
                **fields,
            )

    write_rows(folder / "a.jsonl", rows("a", 70, 0))
    write_rows(folder / "b.jsonl", rows("b", 40, 100, split="validation"))
    write_rows(folder / "c.jsonl", rows("c", 70, 0))
    special = make_trajectory(3, messages=[Message(role="user", content="<|end|>"), *make_trajectory(3).messages[1:]])
    write_rows(folder / "bad.jsonl", [make_trajectory(0), special, make_trajectory(1, outcome=None)])
    with (folder / "bad.jsonl").open("a") as file:
        file.write("\n{broken\n" * 15)
    write_rows(folder / "leak.jsonl", [make_trajectory(101, id="stray"), make_trajectory(0, split="validation")])
    write_rows(folder / "failed.jsonl", [make_trajectory(500, ended="error", split="test")])
    return folder


def job(name: str, inputs: dict[str, list[str]], **changes) -> dict:
    settings = {"max_length": None, "too_long": "error", "shards": 4, "skip_bad": False}
    return {"name": name, "inputs": inputs, "options": DIRECT, "block_bits": 3, **settings, **changes}


JOBS = [
    job("whole", {"": ["a.jsonl", "b.jsonl", "c.jsonl"]}, block_bits=12),
    job("cut", {"train": ["a.jsonl"], "validation": ["b.jsonl"]}, max_length=80, too_long="window", shards=7),
    job("dropped", {"": ["c.jsonl", "a.jsonl", "b.jsonl"]}, max_length=80, too_long="drop", shards=1, options=THREADS),
    job("skipped", {"": ["bad.jsonl", "a.jsonl"]}, skip_bad=True, shards=1000),
    job("bad", {"": ["a.jsonl", "bad.jsonl"]}),
    job("too long", {"train": ["a.jsonl", "bad.jsonl"]}, max_length=80),
    job("leak", {"": ["a.jsonl", "bad.jsonl", "b.jsonl", "leak.jsonl"]}, skip_bad=True),
    job("bad before leak", {"": ["a.jsonl", "bad.jsonl", "b.jsonl", "leak.jsonl"]}),
    job("none left", {"": ["a.jsonl", "failed.jsonl"]}),
    job("no row", {"train": ["a.jsonl"], "test": []}),
    job("no file", {"train": ["a.jsonl", "nowhere.jsonl"]}),
    job("no runner", {"train": ["a.jsonl"]}, options=["--runner=Nobody"]),
]


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    """Results of Beam for all jobs, run in one process, and for one on a file system with a scheme."""
    jobs = []
    for case in [*JOBS, job("cloud", JOBS[0]["inputs"]), job("cloud", JOBS[0]["inputs"])]:
        root = "fake:/" if case["name"] == "cloud" else str(folder)
        inputs = {split: [f"{root}/{path}" for path in paths] for split, paths in case["inputs"].items()}
        output = f"{root}/beam/{case['name']}"
        tokenizer = str(folder / "tokenizer")
        settings = {name: value for name, value in case.items() if name not in ("name", "inputs")}
        jobs.append({"inputs": inputs, "output": output, "tokenizer": tokenizer, **settings})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("beam_builds.py")
    command = [beam_environment.python(), script, folder / "jobs.json", folder / "results.json"]
    beam_environment.run("env", f"FAKE_ROOT={folder}", *command)
    outcomes = json.loads((folder / "results.json").read_text())
    return {case["name"]: result for case, result in zip(JOBS, outcomes, strict=False)} | {"cloud": outcomes[-2:]}


def build_here(folder: Path, case: dict) -> tuple[dict, Path]:
    output, bad = folder / "local" / case["name"], []
    inputs = {split or None: [folder / path for path in paths] for split, paths in case["inputs"].items()}
    settings = {name: case[name] for name in ("max_length", "too_long", "shards")}
    skip_bad = (lambda error: bad.append(str(error))) if case["skip_bad"] else None
    try:
        local.build(inputs, Encoder.load(folder / "tokenizer"), output, skip_bad=skip_bad, **settings)
    except DataError as error:
        return {"error": [type(error).__name__, str(error)]}, output
    return {"bad": bad}, output


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("case", JOBS[:4], ids=lambda case: case["name"])
def test_beam_writes_the_bytes_of_the_local_build(folder, results, case):
    expected, output = build_here(folder, case)
    ours = results[case["name"]]
    assert ours["bad"] == expected["bad"][:20] and len(expected["bad"]) == (17 if case["skip_bad"] else 0)
    assert files_of(folder / "beam" / case["name"]) == files_of(output)
    assert sum(counts.merged for counts in open_dataset(output).metadata.splits.values()) > 3


@pytest.mark.slow
@pytest.mark.parametrize("case", JOBS[4:-2], ids=lambda case: case["name"])
def test_beam_raises_the_error_of_the_local_build(folder, results, case):
    expected, output = build_here(folder, case)
    assert results[case["name"]] == expected and len(expected["error"]) == 2
    assert not (folder / "beam" / case["name"]).exists() and not output.exists()


@pytest.mark.slow
def test_wrong_arguments_of_beam_are_one_line_of_error(folder, results):
    for name, said in (("no file", "nowhere.jsonl: cannot be read: no such file"), ("no runner", "Nobody")):
        kind, message = results[name]["error"]
        assert kind == "DataError" and said in message and "\n" not in message
    assert not [path for path in (folder / "beam").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_another_file_system_gets_the_same_files_once(folder, results):
    done, again = results["cloud"]
    assert done == {"bad": []} and "not empty; name another directory" in again["error"][1]
    assert files_of(folder / "beam" / "cloud") == files_of(folder / "beam" / "whole")


def test_the_local_build_never_imports_beam(folder):
    code = f"""
import sys
sys.modules["apache_beam"] = None  # an import of it fails
from data_pipeline import build
status = build.main(["--input", {str(folder / "a.jsonl")!r}, "--tokenizer", {str(folder / "tokenizer")!r}, "--output",
                     {str(folder / "plain")!r}, *sys.argv[1:]])
assert not [name for name in sys.modules if name.startswith("apache_beam.")]
sys.exit(status)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=beam_environment.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (folder / "plain/metadata.json").is_file(), done.stderr
    without_beam = [*command, "--beam", "--runner", "DirectRunner"]
    refused = subprocess.run(without_beam, cwd=beam_environment.ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.returncode == 2 and len(errors) == 1 and "--beam needs Apache Beam" in errors[0]
