"""Preference pairs: rows of files, their records in shards, and labels without outcomes next to them."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.errors import DataError
from data_pipeline.metadata import Metadata
from data_pipeline.preferences import Preference, holds_preferences, parse_preference, parse_row, read_rows, to_line
from data_pipeline.records import Rows
from data_pipeline.supervision import of_pairs, with_labels, with_outcome
from data_pipeline.trajectory import Trajectory

STATE = [{"role": "user", "content": "Find parcel 7."}]


def row(id: str = "1", **changes) -> dict:
    action = lambda text: {"role": "assistant", "content": text}
    return {"id": id, "messages": STATE, "chosen": action("north"), "rejected": [action("nowhere")]} | changes


def test_a_single_rejected_message_is_a_list_of_one_and_parts_are_joined():
    preference = parse_preference(json.dumps(row(rejected={"role": "assistant", "content": "nowhere"})), where="x:1")
    assert [action.content for action in preference.actions] == ["north", "nowhere"]
    parts = [{"type": "text", "text": "go "}, {"type": "text", "text": "north"}]
    joined = parse_preference(json.dumps(row(chosen={"role": "assistant", "content": parts})), where="x:1")
    assert joined.actions[0].content == "go north" and joined.chosen.content == parts
    again = parse_row(to_line(joined).encode(), where="x:1")
    assert again == joined and isinstance(again, Preference)
    assert preference.task_id == joined.task_id  # the state names the task
    earlier = parse_preference(
        json.dumps(row(messages=[*STATE, {"role": "assistant", "content": "hm"}, *STATE])), where="x:1"
    )
    assert [message.step for message in earlier.state] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": []}, "x:1: rejected is empty"),
        ({"messages": []}, "x:1: messages is empty"),
        ({"chosen": {"role": "user", "content": "north"}}, "x:1: chosen is a message of role user that is no step"),
        ({"outcome": 1.0}, "x:1: Object contains unknown field `outcome`"),
        ({"id": ""}, "x:1: id is empty"),
    ],
)
def test_a_bad_preference_is_one_line_with_its_place(changes, message):
    with pytest.raises(DataError) as raised:
        parse_preference(json.dumps(row(**changes)), where="x:1")
    assert str(raised.value).startswith(message)


def test_messages_of_a_pair_are_read_as_sdks_write_them():
    call = {"type": "tool_use", "id": "c", "name": "look", "input": {"at": "north"}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "a wall"}]}
    line = row(
        7,
        task=3,
        split=None,
        messages=[*STATE, {"role": "assistant", "content": [call]}, result],
        chosen={"role": "assistant", "content": "north", "refusal": None, "reasoning": "It is there."},
        rejected=[{"role": "assistant", "content": [{"type": "text", "text": "no"}, call]}],
        meta={"score": float("nan")},
    )
    pair = parse_row(json.dumps(line).encode(), where="x:1")
    assert isinstance(pair, Preference) and (pair.id, pair.task, pair.meta) == ("7", "3", {"score": None})
    assert [message.role for message in pair.messages] == ["user", "assistant", "tool"]
    better, worse = pair.actions
    assert (better.content, better.reasoning_content) == ("north", "It is there.")
    assert worse.content == "no" and worse.tool_calls[0]["function"]["name"] == "look"
    with pytest.raises(DataError, match=r"x:1: rejected\[1\]: message 0 \(assistant\) has neither"):
        parse_preference(json.dumps(row(rejected=[STATE[0], {"role": "assistant"}])), where="x:1")
    with pytest.raises(DataError, match="x:1: chosen is not one message but 2"):
        parse_preference(json.dumps(row(chosen={"role": "user", "content": result["content"] * 2})), where="x:1")


def test_a_file_may_hold_trajectories_that_speak_of_what_was_chosen(tmp_path):
    trajectory = {"id": "a", "messages": [*STATE, {"role": "assistant", "content": "x"}], "meta": {"chosen": 1}}
    plain, pairs = tmp_path / "plain.jsonl", tmp_path / "pairs.jsonl"
    plain.write_text(json.dumps(trajectory) + "\n")
    pairs.write_text("\n".join(map(json.dumps, (trajectory, row()))) + "\n{\n")
    assert not holds_preferences(plain) and holds_preferences(pairs)
    bad: list[DataError] = []
    rows = list(read_rows(pairs, skip_bad=bad.append))
    assert [type(value) for _, value in rows] == [Trajectory, Preference] and rows[1][0] == f"{pairs}:2"
    assert len(bad) == 1 and f"{pairs}:3" in str(bad[0])


def test_a_record_has_the_state_once_and_each_action_as_it_is_encoded_alone(encoder):
    preference = msgspec.convert(
        row(rejected=[{"role": "assistant", "content": text} for text in ("nowhere", "south of here")]), Preference
    )
    rows = Rows(encoder, None, "error")
    rows.add(preference, None, "x:1")
    (record,) = rows.splits["train"].records
    state = record["state_positions"][0]
    assert record["state_positions"].tolist() == [state] * 3 and np.isnan(record["rewards"]).all()
    start = state + 1
    for action, end in zip(preference.actions, record["read_positions"], strict=True):
        alone = encoder.trajectory([*preference.messages, action], row="x")
        together = np.concatenate([record["tokens"][: state + 1], record["tokens"][start : end + 1]])
        np.testing.assert_array_equal(together, alone.tokens[: alone.read_positions[0] + 1])
        start = end + 1
    assert start == len(record["tokens"]) and record["weight"] == 1 and np.isnan(record["outcome"])
    rows.add(preference, None, "x:2")
    assert record["weight"] == 2
    same = msgspec.convert(row(rejected=[{"role": "assistant", "content": "north"}]), Preference)
    with pytest.raises(DataError, match=r"x:3 \(1\): rejected\[0\] is the chosen action"):
        rows.add(same, None, "x:3")


@pytest.mark.parametrize(("too_long", "dropped"), [("drop", 1), ("window", 1), ("error", None)])
def test_a_pair_that_does_not_fit_is_dropped_and_never_cut(encoder, too_long, dropped):
    preference = msgspec.convert(row(), Preference)
    rows = Rows(encoder, 8, too_long)
    if dropped is None:
        with pytest.raises(DataError, match="max_length is 8"):
            rows.add(preference, None, "x:1")
        return
    rows.add(preference, None, "x:1")
    assert rows.splits["train"].counts.dropped == dropped and rows.splits["train"].records == []


def test_shards_have_outcomes_labels_and_pairs_and_the_metadata_counts_them(encoder, tmp_path):
    from data_pipeline.batches import training_batches
    from data_pipeline.shards import open_dataset

    steps = [*STATE, {"role": "assistant", "content": "a"}, *STATE, {"role": "assistant", "content": "b"}]
    lines = [
        {"id": "outcome", "messages": steps, "outcome": 1.0},
        {"id": "labels", "messages": steps, "step_labels": [1, None]},
        row("pair"),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metadata = build({None: [file]}, encoder, tmp_path / "shards", max_length=None, shards=1)
    counts = metadata.splits["train"]
    assert (counts.rows, counts.trajectories, counts.without_outcome, counts.pairs) == (3, 3, 1, 1)
    assert counts.mean_return == 1.0 and Metadata.load(tmp_path / "shards") == metadata
    split = open_dataset(tmp_path / "shards").split("train")
    assert split.ids == ["outcome", "labels", "pair"]
    assert with_outcome(split).tolist() == [True, False, False]
    assert with_labels(split).tolist() == [False, True, False]
    assert of_pairs(split).tolist() == [False, False, True]
    # A position in the batches of some of the trajectories is restored, and only there.
    shape = {"rows": 1, "length": 64, "steps_per_row": 4, "epochs": 3, "seed": 0}
    stream = training_batches(tmp_path / "shards", **shape, selection=of_pairs)
    first, saved = next(stream), stream.save_state()
    assert stream.split.ids == ["pair"] and set(np.unique(first["branches"])) == {0, 1, 2}
    again = training_batches(tmp_path / "shards", **shape, selection=of_pairs)
    again.restore_state(saved)
    resumed = next(again)
    for name, array in next(stream).items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    with pytest.raises(DataError, match="belongs to other batches"):
        training_batches(tmp_path / "shards", **shape, selection=with_labels).restore_state(saved)
    # Files without either have the metadata that they always had.
    file.write_text(json.dumps(lines[0]) + "\n")
    build({None: [file]}, encoder, tmp_path / "plain", max_length=None, shards=1)
    assert {"without_outcome", "pairs"}.isdisjoint(
        json.loads((tmp_path / "plain/metadata.json").read_text())["splits"]["train"]
    )


def test_a_row_with_neither_outcome_nor_label_is_still_refused(encoder):
    line = {"id": "a", "messages": [*STATE, {"role": "assistant", "content": "x"}], "step_labels": [None]}
    trajectory = msgspec.convert(line, Trajectory)
    with pytest.raises(DataError, match="no outcome and no rewards; training needs an outcome in .*, or step_labels"):
        Rows(encoder, None, "error").add(trajectory, None, "x:1")
