"""`report` on a work directory that was copied by half: one line that names the file, and no number is written."""

import shutil

import pytest

pytestmark = pytest.mark.slow


def cut(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def repeat(path):
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])


def empty(path):
    path.write_bytes(b"")


DAMAGES = [
    ("trajectories/train.jsonl", cut),
    ("trajectories/train.jsonl", empty),
    ("search/pool.jsonl", flip),
    ("search/values-pool-prm-0.jsonl", repeat),
    ("search/beam-2x2-prm-0.jsonl", cut),
    ("reward_models/prm/seed-0/metrics.jsonl", empty),
    ("reward_models/prm/seed-0/model/model.safetensors", flip),
    ("shards/metadata.json", cut),
    ("stages/search-pool.json", cut),
]


def test_no_number_comes_from_a_damaged_file(zygote, inputs, undisturbed, tmp_path):
    work = tmp_path / "w"
    command = ("report", inputs.config, "--workdir", work)
    for name, damage in DAMAGES:
        shutil.copytree(undisturbed, work)
        damage(work / name)
        before = (work / "results.json").read_bytes()
        done = zygote.run(work, *command)
        assert done.status == 2 and done.last_line.startswith(f"jaxprm: {work / name}: "), (name, done.err[-2000:])
        assert "Traceback" not in done.err and (work / "results.json").read_bytes() == before
        shutil.rmtree(work)
