import json
import resource
import shutil

import msgspec
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipeline.build import build, main
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError, SplitError
from data_pipeline.metadata import Metadata
from data_pipeline.shards import open_dataset
from data_pipeline.trajectory import Message, read


@pytest.fixture
def build_rows(tmp_path, plain_encoder, write_rows):
    """Builds tmp_path/data from trajectories of the train split."""

    def run(trajectories, **settings) -> Metadata:
        settings = {"max_length": None, **settings}
        inputs = {"train": [write_rows(tmp_path / "rows.jsonl", trajectories)]}
        return build(inputs, plain_encoder, tmp_path / "data", **settings)

    return run


def test_what_is_read_is_what_the_encoder_made_in_the_order_of_the_input(dataset_directory, plain_encoder):
    split = open_dataset(dataset_directory).split("train")
    rows = list(read(dataset_directory.parent / "train.jsonl"))
    assert split.ids == [row.id for row in rows]
    assert split.tasks == [row.task for row in rows]
    for index, row in enumerate(rows):
        encoded = plain_encoder.trajectory(row.messages, row="x")
        tokens = slice(*split.token_starts[index : index + 2])
        steps = slice(*split.step_starts[index : index + 2])
        assert split.tokens[tokens].tolist() == encoded.tokens.tolist()
        assert split.read_positions[steps].tolist() == encoded.read_positions.tolist()
        assert split.state_positions[steps].tolist() == encoded.state_positions.tolist()
        rewards = [0.0] * (len(encoded.read_positions) - 1) + [row.outcome]
        np.testing.assert_allclose(split.rewards[steps], rewards, atol=1e-7)
    assert np.isnan(split.step_labels).all() and (split.weights == 1).all()


def test_soft_outcomes_rewards_and_labels_stay_floats(build_rows, make_trajectory, tmp_path):
    build_rows(
        [
            make_trajectory(0, outcome=0.7),
            make_trajectory(1, outcome=None, rewards=[0.25, -0.5]),
            make_trajectory(2, outcome=0.0, step_labels=[None, 0.3]),
        ]
    )
    split = open_dataset(tmp_path / "data").split("train")
    np.testing.assert_allclose(split.rewards, [0, 0.7, 0.25, -0.5, 0, 0], atol=1e-7)
    np.testing.assert_allclose(split.step_labels, [np.nan] * 5 + [0.3], atol=1e-7)
    np.testing.assert_allclose(split.outcomes, [0.7, np.nan, 0.0], atol=1e-7)


def test_duplicates_are_stored_once_with_their_count_as_weight(build_rows, make_trajectory, tmp_path):
    same = [make_trajectory(1, id=f"same-{i}") for i in range(3)]
    others = [
        make_trajectory(1, id="other outcome", outcome=0.5),
        make_trajectory(1, id="equal rewards only", outcome=0.5, rewards=[0.0, 1.0]),
        make_trajectory(1, id="other task", task="else"),
        make_trajectory(1, id="other labels", step_labels=[0.1, None]),
        make_trajectory(2, id="other tokens"),
        make_trajectory(1, id="fails", ended="error"),
    ]
    metadata = build_rows([same[0], *others, *same[1:]])
    split = open_dataset(tmp_path / "data").split("train")
    weights = dict(zip(split.ids, split.weights.tolist(), strict=True))
    assert weights == {"same-0": 3} | {row.id: 1 for row in others[:-1]}
    counts = metadata.splits["train"]
    assert (counts.rows, counts.errors, counts.merged, counts.trajectories) == (9, 1, 2, 6)
    assert counts.rows == counts.errors + counts.merged + counts.trajectories
    assert counts.mean_return == pytest.approx((3 + 0.5 + 1 + 1 + 1 + 1) / 8)


def test_equal_tokens_with_other_steps_are_not_duplicates(build_rows, make_trajectory, tmp_path):
    trajectory = make_trajectory(1)
    first_ignored = [
        msgspec.structs.replace(message, step=index != 1) for index, message in enumerate(trajectory.messages)
    ]
    build_rows([trajectory, make_trajectory(1, id="b", messages=first_ignored)])
    assert open_dataset(tmp_path / "data").split("train").step_counts.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"outcome": None}, "no outcome and no rewards"),
        ({"split": "test"}, "its split is 'test', but the file was given for 'train'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message is a step"),
    ],
)
def test_row_that_cannot_be_trained_on_is_named(build_rows, make_trajectory, tmp_path, fields, reason):
    bad = msgspec.convert({**msgspec.to_builtins(make_trajectory(1)), **fields}, type(make_trajectory(1)))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2 \(row-1\): {reason}"):
        build_rows([make_trajectory(0), bad])
    assert not (tmp_path / "data").exists()


def test_task_in_two_splits_is_refused(tmp_path, plain_encoder, make_trajectory, write_rows):
    inputs = {
        split: [write_rows(tmp_path / f"{split}.jsonl", [make_trajectory(7)])] for split in ("train", "validation")
    }
    with pytest.raises(DataError, match=r"validation\.jsonl:1 .*task textcraft/7 is in train and in validation"):
        build(inputs, plain_encoder, tmp_path / "data", max_length=None)


def test_rows_go_to_the_split_they_name(tmp_path, plain_encoder, make_trajectory, write_rows):
    rows = [make_trajectory(0), make_trajectory(1, split="validation"), make_trajectory(2, split="train")]
    inputs = {None: [write_rows(tmp_path / "rows.jsonl", rows)]}
    metadata = build(inputs, plain_encoder, tmp_path / "data", max_length=None)
    assert {name: split.rows for name, split in metadata.splits.items()} == {"train": 2, "validation": 1}


def test_too_long_is_an_error_that_names_row_value_and_bound(build_rows, make_trajectory, plain_encoder):
    long = make_trajectory(1, rounds=9)
    length = len(plain_encoder.trajectory(long.messages, row="x").tokens)
    bound = length - 1
    with pytest.raises(DataError, match=rf"rows\.jsonl:2 \(row-1\): {length} tokens, max_length is {bound}"):
        build_rows([make_trajectory(0), long], max_length=bound)
    assert build_rows([long], max_length=length).splits["train"].longest == length


def test_too_long_can_be_dropped_and_is_counted(build_rows, make_trajectory):
    rows = [make_trajectory(0), make_trajectory(1, rounds=9), make_trajectory(1, rounds=9, id="again")]
    counts = build_rows(rows, max_length=100, too_long="drop").splits["train"]
    assert (counts.rows, counts.dropped, counts.trajectories) == (3, 2, 1)


def test_window_ends_with_a_step_and_is_closed_with_the_return_to_go(
    build_rows, make_trajectory, plain_encoder, tmp_path
):
    sparse = make_trajectory(1, rounds=4, outcome=0.7)
    dense = make_trajectory(1, id="dense", rounds=4, outcome=None, rewards=[0.1, 0.2, 0.3, 0.4])
    encoded = plain_encoder.trajectory(sparse.messages, row="x")
    bound = int(encoded.read_positions[1]) + 1  # two steps fit exactly
    counts = build_rows([sparse, dense], max_length=bound, too_long="window").splits["train"]
    split = open_dataset(tmp_path / "data").split("train")
    assert counts.windowed == 2 and split.step_counts.tolist() == [2, 2] and counts.longest == bound
    assert split.tokens[:bound].tolist() == encoded.tokens[:bound].tolist()
    np.testing.assert_allclose(split.rewards, [0, 0.7, 0.1, 0.9], atol=1e-7)


def test_a_window_too_small_for_the_first_step_drops_and_counts(build_rows, make_trajectory):
    short, wide = make_trajectory(0, rounds=1), make_trajectory(1, rounds=4)
    wide.messages[0] = Message(role="user", content="word " * 200)
    counts = build_rows([short, wide], max_length=150, too_long="window").splits["train"]
    assert (counts.rows, counts.dropped, counts.windowed, counts.trajectories) == (2, 1, 0, 1)


def test_a_split_without_trajectories_is_an_error_with_the_counts(build_rows, make_trajectory):
    with pytest.raises(DataError, match="no trajectory is left of 2 rows; 1 ended in an error, 1 were too long"):
        build_rows([make_trajectory(0, ended="error"), make_trajectory(1)], max_length=3, too_long="drop")
    with pytest.raises(DataError, match="no row was given for split train"):
        build_rows([])


def test_metadata_can_be_read_back_also_by_tfds(dataset_directory, plain_encoder):
    metadata = Metadata.load(dataset_directory)
    train = metadata.splits["train"]
    assert metadata.tokenizer == plain_encoder.fingerprint and metadata.pad_id == plain_encoder.pad_id
    assert (train.rows, train.trajectories, train.tasks) == (40, 40, 40)
    assert train.steps == sum(1 + seed % 5 for seed in range(40)) and train.most_steps == 5
    assert train.mean_return == pytest.approx(sum(range(40)) / 40 / 40)
    split = open_dataset(dataset_directory).split("train")
    assert (train.tokens, train.longest) == (len(split.tokens), split.lengths.max())
    assert sum(train.lengths) == 40
    info = tfds.builder_from_directory(str(dataset_directory)).info
    assert info.metadata["tokenizer"] == plain_encoder.fingerprint
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 40, "validation": 5}
    assert info.splits["train"].num_shards == 4


def test_equal_inputs_give_equal_bytes(build_rows, make_trajectory, tmp_path):
    rows = [make_trajectory(seed) for seed in range(5)]
    assert build_rows(rows).fingerprint == build_rows(rows).fingerprint
    assert build_rows(rows).fingerprint != build_rows(rows[1:]).fingerprint


def test_shards_of_another_tokenizer_are_refused(dataset_directory, plain_encoder, chatml_encoder):
    assert open_dataset(dataset_directory, encoder_fingerprint=plain_encoder.fingerprint)
    with pytest.raises(DataError, match=f"{plain_encoder.fingerprint[:12]}, the model's is"):
        open_dataset(dataset_directory, encoder_fingerprint=chatml_encoder.fingerprint)


def test_a_directory_that_is_no_dataset_is_left_alone(build_rows, make_trajectory, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    build_rows([make_trajectory(0)])  # an empty directory is fine
    build_rows([make_trajectory(1)])  # and so is a dataset, which is replaced
    assert open_dataset(data).split("train").ids == ["row-1"]
    shutil.rmtree(data)
    data.mkdir()
    (data / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty and not a dataset"):
        build_rows([make_trajectory(0)])
    (data / "metadata.json").write_text("{}")
    with pytest.raises(DataError, match="not the metadata of a dataset"):
        build_rows([make_trajectory(0)])
    assert (data / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match="a file; name a directory"):
        build({"train": []}, None, data / "thesis.tex", max_length=None)


def test_a_failed_build_leaves_the_earlier_dataset_and_nothing_else(build_rows, make_trajectory, tmp_path, monkeypatch):
    before = build_rows([make_trajectory(0)])
    with pytest.raises(DataError):
        build_rows([make_trajectory(1, outcome=None)])
    monkeypatch.setattr("data_pipeline.build.shard_of", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_rows([make_trajectory(1)])
    assert Metadata.load(tmp_path / "data") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "rows.jsonl"]


def test_a_full_disk_is_one_line_of_error_and_leaves_nothing(plain_encoder, make_trajectory, write_rows, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    inputs = {"train": [write_rows(tmp_path / "rows.jsonl", [make_trajectory(i, rounds=8) for i in range(200)])]}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"data: the dataset cannot be written: .*File too large") as error:
            build(inputs, plain_encoder, tmp_path / "data", max_length=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_progress_counts_rows(build_rows, make_trajectory):
    seen = []
    build_rows([make_trajectory(seed) for seed in range(3)], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_command_line_builds_and_reports_the_counts(tmp_path, plain_tokenizer, make_trajectory, write_rows, capsys):
    plain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    train = write_rows(tmp_path / "train.jsonl", [make_trajectory(0), make_trajectory(0, id="again")])
    other = write_rows(tmp_path / "other.jsonl", [make_trajectory(1, split="validation")])
    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "data")]
    assert main(["--input", f"train={train}", "--input", str(other), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("train: 2 rows, 1 trajectories, ")
    fingerprint = Encoder.load(tmp_path / "tokenizer").fingerprint
    assert open_dataset(tmp_path / "data", encoder_fingerprint=fingerprint).split("validation").ids == ["row-1"]


@pytest.mark.parametrize("option", ["--input", "--tokenizer", "--output"])
def test_command_line_mistakes_are_one_line_and_status_two(
    tmp_path, plain_tokenizer, make_trajectory, write_rows, capsys, option
):
    plain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    right = {
        "--input": str(write_rows(tmp_path / "train.jsonl", [make_trajectory(0)])),
        "--tokenizer": str(tmp_path / "tokenizer"),
        "--output": str(tmp_path / "data"),
    }
    bad = tmp_path / "bad"
    bad.write_text(json.dumps({"id": "a"}))
    assert main([word for pair in {**right, option: str(bad)}.items() for word in pair]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(bad) in errors[0]


def test_bad_rows_are_left_out_counted_and_shown_when_asked(
    tmp_path, plain_tokenizer, make_trajectory, write_rows, capsys
):
    plain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    special = make_trajectory(3, messages=[Message(role="user", content="<|end|>"), *make_trajectory(3).messages[1:]])
    rows = [make_trajectory(0), special, make_trajectory(1, outcome=None), make_trajectory(2, ended="error")]
    train = write_rows(tmp_path / "train.jsonl", rows)
    train.write_text(train.read_text() + "{broken\n")
    command = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "data"), "--input", str(train)]
    assert main(command) == 2 and not (tmp_path / "data").exists()
    capsys.readouterr()
    assert main([*command, "--skip-bad"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("train: 2 rows, 1 trajectories, ") and "1 errors" in out
    assert "left out, 3 bad rows:" in err and all(f"train.jsonl:{line}" in err for line in (2, 3, 5))
    metadata = Metadata.load(tmp_path / "data")
    counts = metadata.splits["train"]
    assert (counts.rows, counts.errors, counts.trajectories, metadata.skipped) == (2, 1, 1, 3)


def test_a_leak_between_splits_is_an_error_also_with_skip_bad(tmp_path, plain_encoder, make_trajectory, write_rows):
    rows = [make_trajectory(7, id=split, split=split) for split in ("train", "validation")]
    inputs = {None: [write_rows(tmp_path / "rows.jsonl", rows)]}
    with pytest.raises(SplitError, match="task textcraft/7 is in train and in validation"):
        build(inputs, plain_encoder, tmp_path / "data", max_length=None, skip_bad=lambda error: None)


def test_metadata_without_the_skipped_field_is_still_read(dataset_directory, tmp_path):
    plain = json.loads((dataset_directory / "metadata.json").read_text())
    assert plain.pop("skipped") == 0
    (tmp_path / "metadata.json").write_text(json.dumps(plain))
    assert Metadata.load(tmp_path) == Metadata.load(dataset_directory)


def test_a_chat_template_is_chosen_by_name_and_marks_the_shards(
    tmp_path, chatml_tokenizer, make_trajectory, write_rows
):
    chatml_tokenizer.save_pretrained(tmp_path / "tokenizer")
    train = write_rows(tmp_path / "train.jsonl", [make_trajectory(0)])
    prints = []
    for template in ("own", "chatml"):
        arguments = ["--input", str(train), "--tokenizer", str(tmp_path / "tokenizer"), "--chat-template", template]
        assert main([*arguments, "--output", str(tmp_path / template)]) == 0
        prints.append(Metadata.load(tmp_path / template).tokenizer)
    assert prints == [Encoder.load(tmp_path / "tokenizer", name).fingerprint for name in (None, "chatml")]
    assert prints[0] != prints[1]
