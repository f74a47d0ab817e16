"""A user's trajectories instead of sampled ones: validated, split by task, or refused before any work."""

import json
import os
import shutil

import msgspec
import pytest

from data_pipeline.errors import DataError, SplitError
from data_pipeline.trajectory import read
from jaxprm import cli, config
from jaxprm.errors import UserError
from jaxprm.workflow import context, user_files
from jaxprm.workflow.user_files import import_files
from tests.model import tiny

OPTIONS = {"validation_share": 0.25, "seed": 0, "skip_bad": False}


def row(n=0, **fields):
    talk = [{"role": "user", "content": f"Goal: {n}."}, {"role": "assistant", "content": f"get {n} stick"}]
    return {"id": str(n), "messages": talk, "task": f"t{n}", "outcome": n % 2, **fields}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" if isinstance(one, dict) else one + "\n" for one in rows))
    return str(path)


@pytest.fixture
def outputs(tmp_path):
    (tmp_path / "w").mkdir()
    return {split: tmp_path / f"w/{split}.jsonl" for split in ("train", "validation")}


def test_the_split_of_a_row_is_that_of_its_file_or_its_own_or_of_its_task(tmp_path, outputs):
    mixed = [*(row(n) for n in range(100)), row(200, split="validation"), row(201, split="test")]
    files = [write(tmp_path / "m", mixed), "validation=" + write(tmp_path / "v", [row(300)])]
    imported = import_files(files, outputs, **OPTIONS)
    held_out = [one.task for one in read(outputs["validation"])]
    assert held_out[-2:] == ["t200", "t300"] and 10 < len(held_out) < 45
    assert (
        imported.splits == {"train": 102 - len(held_out), "validation": len(held_out), "test": 1} and not imported.bad
    )
    trained = list(read(outputs["train"]))
    assert not {one.task for one in trained} & set(held_out) and [one.split for one in trained] == ["train"] * len(
        trained
    )
    assert [one.id for one in trained] == sorted((one.id for one in trained), key=int)


def test_missing_task_and_success_are_filled_in(tmp_path, outputs):
    rows = [row(1, task=None), row(2, success=True), row(3, outcome=None)]
    files = ["train=" + write(tmp_path / "t", rows), "validation=" + write(tmp_path / "v", [row(4)])]
    import_files(files, outputs, **OPTIONS)
    first, second, third = read(outputs["train"])
    assert first.task.startswith("prompt/") and first.success is True
    assert second.success is True and third.success is None


def test_a_bad_row_is_refused_or_left_out_and_reported(tmp_path, outputs):
    rows = [row(1), "{broken", row(2, messages=[{"role": "user", "content": "x"}]), row(3)]
    files = ["train=" + write(tmp_path / "t", rows), "validation=" + write(tmp_path / "v", [row(4)])]
    with pytest.raises(DataError, match="t:2: not JSON: JSON is malformed"):
        import_files(files, outputs, **OPTIONS)
    assert os.listdir(tmp_path / "w") == []
    imported = import_files(files, outputs, **OPTIONS | {"skip_bad": True})
    assert imported.splits["train"] == 2 and len(imported.bad) == 2
    assert "t:3 (2): no assistant message is a step" in imported.bad[1]


def test_a_task_in_two_splits_is_refused_also_with_skip_bad(tmp_path, outputs):
    files = [f"{split}=" + write(tmp_path / split, [row(1)]) for split in ("train", "validation")]
    with pytest.raises(SplitError, match=r"validation:1 \(1\): task t1 is in train and in validation"):
        import_files(files, outputs, **OPTIONS | {"skip_bad": True})


def test_a_split_without_a_row_is_refused_with_a_fix(tmp_path, outputs):
    with pytest.raises(
        UserError, match=r"no trajectory for validation \(1 in train, 0 bad\); .*validation_share = 0.25"
    ):
        import_files([write(tmp_path / "t", [row(1, split="train")])], outputs, **OPTIONS)
    assert os.listdir(tmp_path / "w") == []


def test_identity_depends_on_content_and_split_not_on_the_path(tmp_path):
    one, copy = write(tmp_path / "a", [row(1)]), write(tmp_path / "b", [row(1)])
    other = write(tmp_path / "c", [row(2)])
    assert user_files.identity([one]) == user_files.identity([copy])
    assert user_files.identity([one]) != user_files.identity([other])
    assert user_files.identity([one]) != user_files.identity([f"train={one}"])


def test_runs_that_sample_do_not_depend_on_the_fields_for_files(tmp_path):
    """Work directories from before these fields existed stay valid."""
    sampled = config.Experiment(name="x")
    other = msgspec.structs.replace(sampled, collection=config.CollectionConfig(validation_share=0.5, skip_bad=True))
    inputs = [context.Run(one, context.WorkDirectory(tmp_path)).collect_inputs for one in (sampled, other)]
    assert inputs[0] == inputs[1]
    assert set(inputs[0]["collection"]) == {
        "train_tasks",
        "validation_tasks",
        "trajectories_per_task",
        "temperature",
    }


def test_options_are_fields_spelled_out():
    command = ["train", "c.py", "--workdir", "w", "--data", "train=a", "--data", "b", "--model", "m", "--skip-bad"]
    options = cli.parse([*command, "--chat-template", "chatml", "seed=3"])
    assert options.overrides == ["seed=3"]
    assert cli._overrides(options) == [
        'collection.files=["train=a", "b"]',
        'base_model="m"',
        'policy.chat_template="chatml"',
        "collection.skip_bad=true",
    ]
    assert cli._overrides(cli.parse(command[:4])) == []


CONFIG = """
from jaxprm.config import Data, Experiment, RewardModel

model = RewardModel(label="prm", epochs=1, warmup_fraction=0.0, evaluate_every=50)
config = Experiment(name="own", data=Data(rows=2, length=256, steps_per_row=16), reward_models=(model,))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a config, 36 trajectories and a broken line; returns a function that makes the command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    write(tmp_path / "own.jsonl", [*(row(n % 12, id=str(n), outcome=n % 3 / 2) for n in range(36)), "{broken"])

    def command(verb, data="own.jsonl", *more):
        return [verb, "c.py", "--workdir", "w", "--data", data, "collection.validation_share=0.3", *more]

    return command


def test_own_trajectories_are_imported_once_and_changed_ones_are_refused(own, tmp_path, capsys):
    assert cli.main(own("collect")) == 2
    err = capsys.readouterr().err
    assert "own.jsonl:37: not JSON: JSON is malformed" in err and err.endswith("with --skip-bad\n")
    assert cli.main(own("collect", "own.jsonl", "--skip-bad")) == 0
    out, err = capsys.readouterr()
    assert out.startswith("trajectories: ") and "1 bad row" in err
    imported = [one for split in ("train", "validation") for one in read(tmp_path / f"w/trajectories/{split}.jsonl")]
    assert sorted(int(one.id) for one in imported) == list(range(36))

    shutil.move("own.jsonl", "moved.jsonl")
    assert cli.main(own("collect", "moved.jsonl", "--skip-bad")) == 0  # the same trajectories: nothing to do
    assert "read trajectories" not in capsys.readouterr().err
    # Until something is made of them, other trajectories take their place. Then they are refused.
    write(tmp_path / "moved.jsonl", [row(1, split="train"), row(2, split="validation")])
    assert cli.main(own("collect", "moved.jsonl")) == 0
    assert "the files have changed, and are read again" in capsys.readouterr().err
    assert [one.id for one in read(tmp_path / "w/trajectories/train.jsonl")] == ["1"]
    (tmp_path / "w/stages/build.json").write_text('{"inputs": {}, "finished": true, "seconds": 1.0}')
    write(tmp_path / "moved.jsonl", [row(3, split="train"), row(2, split="validation")])
    assert cli.main(own("collect", "moved.jsonl")) == 2
    assert "stage collect was made with files" in capsys.readouterr().err
    assert [one.id for one in read(tmp_path / "w/trajectories/train.jsonl")] == ["1"]


def test_a_fixed_file_is_read_after_a_bad_row(own, tmp_path, capsys):
    good = [row(1, split="train"), row(2, split="validation")]
    write(tmp_path / "bad.jsonl", [*good, "not a row"])
    assert cli.main(own("collect", "bad.jsonl")) == 2
    assert "bad.jsonl:3" in capsys.readouterr().err
    write(tmp_path / "bad.jsonl", [*good, row(3, split="train")])
    assert cli.main(own("collect", "bad.jsonl")) == 0
    assert [one.id for one in read(tmp_path / "w/trajectories/train.jsonl")] == ["1", "3"]


@pytest.mark.slow
def test_a_run_on_own_trajectories_trains_on_them_from_a_model_and_stops(own, tmp_path, capsys):
    tiny.write_policy(tmp_path / "base")
    assert cli.main(own("run", "own.jsonl", "--model", "base", "--skip-bad")) == 0
    out, _ = capsys.readouterr()
    assert "run ends here" in out and "prm, seed 0: loss" in out
    recipe = json.loads((tmp_path / "w/reward_models/prm/seed-0/model/reward_model.json").read_text())
    # Attempts that are equal are stored once: a task's three attempts here.
    tasks = {one.task for one in read(tmp_path / "w/trajectories/train.jsonl")}
    assert recipe["base"] == "base" and recipe["trained_on"]["trajectories"] == len(tasks) > 5
    assert not (tmp_path / "w/search").exists()


def test_sampled_trajectories_are_not_replaced_by_files(own, tmp_path, capsys):
    (tmp_path / "w/stages").mkdir(parents=True)
    (tmp_path / "w/trajectories").mkdir()
    sampled = {"inputs": {"environment": {}, "seed": 0}, "finished": True, "seconds": 9.0}
    (tmp_path / "w/stages/collect.json").write_text(json.dumps(sampled))
    for split in ("train", "validation"):
        (tmp_path / f"w/trajectories/{split}.jsonl").write_text("precious\n")
    assert cli.main(own("collect", "own.jsonl", "--skip-bad")) == 2
    assert "stage collect was made with" in capsys.readouterr().err
    assert (tmp_path / "w/trajectories/train.jsonl").read_text() == "precious\n"
