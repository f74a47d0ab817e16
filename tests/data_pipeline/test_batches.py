import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import evaluation_batches, training_batches
from data_pipeline.errors import DataError
from data_pipeline.metadata import Metadata, Shard
from data_pipeline.shards import Dataset, ShardSplit, open_dataset
from data_pipeline.trajectory import read

PAD = 7
SHAPE = {"rows": 3, "length": 128, "steps_per_row": 8}


def make_dataset(steps_of: list[list[int]], seed: int = 0) -> Dataset:
    """A dataset in memory; trajectory n has steps of steps_of[n] tokens after a prompt of two."""
    random = np.random.default_rng(seed)
    lengths = [2 + sum(steps) for steps in steps_of]
    reads = [(np.cumsum(steps) + 1).tolist() for steps in steps_of]
    count = sum(map(len, reads))
    split = ShardSplit(
        ids=[f"row-{n}" for n in range(len(steps_of))],
        tasks=["task"] * len(steps_of),
        weights=random.integers(1, 9, len(steps_of)).astype(np.float32),
        outcomes=random.random(len(steps_of), np.float32),
        tokens=random.integers(10, 1000, sum(lengths)).astype(np.int32),
        token_starts=np.concatenate([[0], np.cumsum(lengths)]),
        step_starts=np.concatenate([[0], np.cumsum([len(steps) for steps in steps_of])]),
        read_positions=np.array([position for row in reads for position in row], np.int32),
        state_positions=np.array([position for row in reads for position in [1, *row[:-1]]], np.int32),
        rewards=random.random(count, np.float32),
        step_labels=np.where(random.random(count) < 0.5, np.nan, random.random(count)).astype(np.float32),
    )
    metadata = Metadata(
        tokenizer="",
        pad_id=PAD,
        max_length=None,
        too_long="error",
        splits={},
        shards={"shard": Shard(bytes=0, sha256=str(seed))},
    )
    dataset = Dataset(Path("memory"), metadata)
    dataset.metadata.splits["train"] = None  # so that the split exists
    dataset._splits["train"] = split
    return dataset


def unpack(batch, split):
    """Every trajectory of a batch as (example, tokens, steps); checks the layout of its row."""
    unpacked = []
    for row in range(len(batch["tokens"])):
        view = {name: array[row] for name, array in batch.items()}
        used = view["segments"] > 0
        assert (view["tokens"][~used] == PAD).all() and (view["positions"][~used] == 0).all()
        assert (np.diff(view["segments"][used]) >= 0).all() and not used[used.sum() :].any()
        assert not view["valid"][view["valid"].sum() :].any()
        for segment in range(1, view["segments"].max() + 1):
            at = np.flatnonzero(view["segments"] == segment)
            assert view["positions"][at].tolist() == list(range(len(at)))
            slots = np.flatnonzero(view["valid"] & (view["trajectory"] == segment - 1))
            assert view["step_index"][slots].tolist() == list(range(len(slots)))
            assert view["is_first"][slots].tolist() == [True] + [False] * (len(slots) - 1)
            assert view["is_last"][slots].tolist() == [False] * (len(slots) - 1) + [True]
            (example,) = set(view["example"][slots].tolist())
            steps = {name: view[name][slots] for name in ("rewards", "step_labels", "weights")}
            for name in ("read_positions", "state_positions"):
                assert (view["segments"][view[name][slots]] == segment).all()
                steps[name] = view["tokens"][view[name][slots]]
            unpacked.append((example, view["tokens"][at].tolist(), steps))
        assert (view["trajectory"] >= 0).sum() == view["valid"].sum()
    return unpacked


def assert_is_example(split, example, tokens, steps):
    first, last = split.token_starts[example : example + 2]
    own = split.tokens[first:last]
    assert tokens == own.tolist()
    first, last = split.step_starts[example : example + 2]
    for name in ("read_positions", "state_positions"):
        assert steps[name].tolist() == own[getattr(split, name)[first:last]].tolist()
    np.testing.assert_array_equal(steps["rewards"], split.rewards[first:last])
    np.testing.assert_array_equal(steps["step_labels"], split.step_labels[first:last])
    assert (steps["weights"] == split.weights[example]).all()


episodes = st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=8), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60)
@given(episodes, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_every_trajectory_is_in_one_row_unchanged_and_positions_point_at_the_same_tokens(steps, rows, epochs, seed):
    dataset = make_dataset(steps)
    batches = training_batches(dataset, rows=rows, length=122, steps_per_row=8, epochs=epochs, seed=seed, window=6)
    unpacked = [
        item for number in range(len(batches)) for item in unpack(batches._packed.gather(number), batches.split)
    ]
    for example, tokens, table in unpacked:
        assert_is_example(batches.split, example, tokens, table)
    assert sorted(example for example, _, _ in unpacked) == sorted(list(range(len(steps))) * epochs)
    used = sum(len(tokens) for _, tokens, _ in unpacked)
    assert batches.fill == pytest.approx(used / (len(batches) * rows * 122))


def test_batch_by_hand():
    dataset = make_dataset([[3, 2], [4]])
    (batch,) = evaluation_batches(dataset, "train", rows=2, length=16, steps_per_row=4)
    assert batch["segments"].tolist() == [[1] * 7 + [2] * 6 + [0] * 3, [0] * 16]
    assert batch["positions"][0].tolist() == [*range(7), *range(6), 0, 0, 0]
    assert batch["read_positions"].tolist() == [[4, 6, 12, 0], [0] * 4]
    assert batch["state_positions"].tolist() == [[1, 4, 8, 0], [0] * 4]
    assert batch["step_index"].tolist() == [[0, 1, 0, 0], [0] * 4]
    assert batch["trajectory"].tolist() == [[0, 0, 1, -1], [-1] * 4]
    assert batch["example"].tolist() == [[0, 0, 1, -1], [-1] * 4]
    assert batch["is_first"].tolist() == [[True, False, True, False], [False] * 4]
    assert batch["is_last"].tolist() == [[False, True, True, False], [False] * 4]
    assert batch["valid"].tolist() == [[True, True, True, False], [False] * 4]
    assert np.isnan(batch["step_labels"][1]).all() and not batch["weights"][1].any() and not batch["rewards"][1].any()


def test_fields_and_types_are_those_of_the_format():
    dataset = make_dataset([[3, 2], [4]])
    batch = next(training_batches(dataset, epochs=1, seed=0, **SHAPE))
    kinds = {
        "tokens segments positions": (np.int32, (3, 128)),
        "read_positions state_positions step_index trajectory example": (np.int32, (3, 8)),
        "rewards step_labels weights": (np.float32, (3, 8)),
        "is_first is_last valid": (np.bool_, (3, 8)),
    }
    expected = {name: kind for names, kind in kinds.items() for name in names.split()}
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == expected


def many(count=60, seed=0):
    random = np.random.default_rng(seed)
    return make_dataset([random.integers(1, 12, random.integers(1, 7)).tolist() for _ in range(count)], seed)


def equal(left, right):
    return all(np.array_equal(left[name], right[name], equal_nan=left[name].dtype.kind == "f") for name in left)


def test_stream_is_the_planned_batches_in_order_and_len_counts_them():
    batches = training_batches(many(), epochs=3, seed=1, **SHAPE)
    streamed = list(batches)
    assert len(streamed) == len(batches) == batches.epoch_ends[-1] == batches.position
    for number, batch in enumerate(streamed):
        assert equal(batch, batches._packed.gather(number))


@pytest.mark.parametrize("position", [0, 1, 7])
def test_a_restored_iterator_resumes_with_the_same_batches(position):
    dataset = many()
    original = training_batches(dataset, epochs=3, seed=1, **SHAPE)
    for _ in islice(original, position):
        pass
    state = json.loads(json.dumps(original.save_state()))
    remaining = list(original)
    restored = training_batches(many(), epochs=3, seed=1, **SHAPE)
    next(restored)
    restored.restore_state(state)
    again = list(restored)
    assert len(remaining) == len(again) == len(original) - position
    assert all(equal(left, right) for left, right in zip(remaining, again, strict=True))


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"rows": 4}, {"length": 130}, {"epochs": 2}, {"dataset": 1}, {"steps_per_row": 9}]
)
def test_position_of_other_batches_is_refused(change):
    settings = {"epochs": 3, "seed": 1, **SHAPE}
    state = training_batches(many(), **settings).save_state()
    dataset = many(seed=change.pop("dataset", 0))
    with pytest.raises(DataError, match="the saved data position belongs to other batches"):
        training_batches(dataset, **{**settings, **change}).restore_state(state)


def test_epochs_differ_and_evaluation_repeats():
    dataset = many()
    training = training_batches(dataset, epochs=2, seed=1, rows=1, length=128, steps_per_row=8)
    order = [batch["example"].tolist() for batch in training]
    assert order[: training.epoch_ends[0]] != order[training.epoch_ends[0] :]
    evaluation = evaluation_batches(dataset, "train", **SHAPE)
    first, second = list(evaluation), list(evaluation)
    assert len(first) == len(evaluation) and all(equal(left, right) for left, right in zip(first, second, strict=True))
    examples = [example for batch in first for example, _, _ in unpack(batch, evaluation.split)]
    assert sorted(examples) == list(range(60))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": 20}, r"trajectory row-1 has 21 tokens, a row holds 20; raise length"),
        ({"steps_per_row": 1}, r"trajectory row-0 has 2 steps, a row holds 1; raise steps_per_row"),
    ],
)
def test_trajectory_that_fits_no_row_is_named(change, reason):
    with pytest.raises(DataError, match=reason):
        training_batches(make_dataset([[3, 2], [19]]), epochs=1, seed=0, **{**SHAPE, **change})


def test_tokens_and_steps_are_the_same_from_file_to_batch(dataset_directory, plain_encoder):
    rows = {row.id: row for row in read(dataset_directory.parent / "train.jsonl")}
    dataset = open_dataset(dataset_directory, encoder_fingerprint=plain_encoder.fingerprint)
    batches = training_batches(dataset, "train", rows=2, length=512, steps_per_row=32, epochs=1, seed=0)
    seen = 0
    for batch in batches:
        for row, slot in np.argwhere(batch["valid"]):
            source = rows[batches.split.ids[batch["example"][row, slot]]]
            step = batch["step_index"][row, slot]
            action = [message for message in source.messages if message.is_step][step]
            start, end = batch["state_positions"][row, slot] + 1, batch["read_positions"][row, slot] + 1
            assert plain_encoder.decode(batch["tokens"][row, start:end]) == action.content + "<|end|>"
            expected = source.outcome if batch["is_last"][row, slot] else 0.0
            assert batch["rewards"][row, slot] == pytest.approx(expected, abs=1e-7)
            seen += 1
    assert seen == Metadata.load(dataset_directory).splits["train"].steps


def test_a_dataset_may_be_a_directory_and_an_unknown_split_is_an_error(dataset_directory):
    assert len(evaluation_batches(dataset_directory, "validation", rows=2, length=512, steps_per_row=32)) == 1
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        evaluation_batches(dataset_directory, "test", **SHAPE)


def test_the_rows_of_all_hosts_make_up_the_batch():
    """Each gets its rows of every batch, with the padding of the last one, and resumes at any position."""
    random = np.random.default_rng(1)
    dataset = make_dataset([random.integers(3, 30, random.integers(1, 5)).tolist() for _ in range(23)])
    options = dict(SHAPE, epochs=2, seed=4)
    complete = list(training_batches(dataset, **options))
    assert len(complete) > 3 and not complete[-1]["valid"][-1].any()
    for rows in ([0, 2], [1], [0, 1, 2]):
        stream = training_batches(dataset, **options)
        stream.set_local_rows(np.array(rows))
        of_host = list(islice(stream, 2))
        resumed = training_batches(dataset, **options)
        resumed.restore_state(stream.save_state())
        resumed.set_local_rows(np.array(rows))
        of_host += list(resumed)
        assert len(of_host) == len(complete)
        for part, batch in zip(of_host, complete, strict=True):
            for name in batch:
                np.testing.assert_array_equal(part[name], batch[name][rows], err_msg=name)


def test_the_trajectories_of_a_batch_are_named():
    dataset = make_dataset([[5, 5], [40], [60], [3, 3, 3], [90]])
    stream = training_batches(dataset, **SHAPE, epochs=2, seed=0)
    for number, batch in enumerate(stream):
        examples = np.unique(batch["example"][batch["valid"]])
        assert set(stream.trajectories(number)) == {f"row-{example}" for example in examples}
