"""SIGKILL and SIGTERM at random points of every verb that writes: the same command ends with the same bytes."""

import random
import shutil
import signal as signals
from pathlib import Path

import pytest

from tests.robustness.conftest import contents

pytestmark = pytest.mark.slow
SIGNALS = ("SIGKILL", "SIGTERM")
# By verb: the outputs that are removed, so that the verb makes them again.
STAGES = {
    "build": ("shards",),
    "train": ("reward_models",),
    "search": ("search",),
    "report": ("results.json", "report"),
}


def disturb(zygote, folder: Path, command, *, rng: random.Random, times: int, prepare=lambda: None) -> list[str]:
    """Runs a command undisturbed for its events, then again and again with signals; returns where these came.

    After each signal the command is run to its end.
    """
    prepare()
    events = zygote.run(folder, *command, log=True)
    assert events.status == 0, events.err[-2000:]
    expected, points = contents(folder), []
    for number in range(times):
        prepare()
        # One after the other: the second hits the resumed command.
        for name in rng.sample(SIGNALS, 2):
            at = rng.randint(1, len(events.events))
            done = zygote.run(folder, *command, at=at, signal=name)
            points.append(f"{name} before {at} of {len(events.events)} ({events.events[at - 1]}): {done.status}")
            # A training run saves itself on SIGTERM and asks to be resumed. A resumed command may end before the point.
            assert done.status in (-signals.SIGKILL, -signals.SIGTERM, 75, 0) or (
                "exists already" in done.last_line and command[0] == "import-trajectories"
            ), (points, done.err[-2000:])
        done = zygote.run(folder, *command)
        # Killed after its output appeared: that is not overwritten, and must be complete.
        is_there = command[0] == "import-trajectories" and "exists already" in done.last_line
        assert done.status == (2 if is_there else 0), (points, done.err[-2000:])
        after = contents(folder)
        assert after.keys() == expected.keys(), (points, after.keys() ^ expected.keys())
        different = [path for path in expected if after[path] != expected[path]]
        assert not different, (number, points, different)
        assert "with another result" not in done.err
    return points


@pytest.mark.parametrize("verb", STAGES)
def test_a_stage_that_is_killed(zygote, inputs, undisturbed, tmp_path, verb):
    work = tmp_path / "w"
    shutil.copytree(undisturbed, work)

    def remove():
        for name in STAGES[verb]:
            path = work / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    command = (verb, inputs.config, "--workdir", work)
    points = disturb(zygote, work, command, rng=random.Random(verb), times=2, prepare=remove)
    print("\n".join(points))
    # Nothing is left over, and the whole run is still what it was. The searches' trees.json is of `report`.
    done = zygote.run(work, "report", inputs.config, "--workdir", work)
    assert done.status == 0, done.err[-2000:]
    after, expected = contents(work), contents(undisturbed)
    assert after.keys() == expected.keys(), after.keys() ^ expected.keys()
    assert not [path for path in expected if after[path] != expected[path]]


def commands(inputs, folder: Path) -> dict[str, tuple]:
    """A command of every verb that writes outside of a work directory, by name."""
    out = folder / "out"
    imports = ("import-trajectories", "--format", "openai", "--input", inputs.log)
    return {
        "score": ("score", "--model", inputs.model, "--input", inputs.trajectories, "--output", out),
        "export": ("export", "--model", inputs.model, "--output", out, "--max-shard-size", "40KB"),
        "import": (*imports, "--output", out, "--json", folder / "report.json"),
        "shards": ("build-shards", "--input", inputs.trajectories, "--tokenizer", inputs.tokenizer, "--output", out),
    }


@pytest.mark.parametrize("name", ["score", "export", "import", "shards"])
def test_a_verb_that_is_killed(zygote, inputs, tmp_path, name):
    command = commands(inputs, tmp_path)[name]

    def remove():
        for path in [tmp_path / "out", tmp_path / "report.json"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def forget():
        # import-trajectories overwrites nothing; the others replace what they wrote before.
        if name == "import":
            remove()

    points = disturb(zygote, tmp_path, command, rng=random.Random(name), times=2, prepare=forget)
    print("\n".join(points))
