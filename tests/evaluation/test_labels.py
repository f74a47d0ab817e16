"""Step labels as users write them: per step, per message, as a first error; and values that are not labels."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.trajectory import Message, Trajectory, parse_with_origins
from jaxprm.errors import UserError
from jaxprm.evaluation.labels import Labels, kind_of, lookup, read_labels, validation_tasks, wrong_steps

# Steps are messages 1, 3 and 4; message 2 is the user's.
MESSAGES = [
    Message(role=role, content="x", **more)
    for role, more in [("user", {}), ("assistant", {}), ("user", {}), ("assistant", {}), ("assistant", {})]
]


def trajectory(**fields) -> Trajectory:
    return Trajectory(id="a", messages=MESSAGES, **fields)


def read(value, field="label"):
    return read_labels(trajectory(meta={"label": value, "deep": {"label": value}}), field, "in.jsonl:7")


def numbers(labels: Labels) -> list:
    return [None if math.isnan(value) else value for value in labels.values]


def test_the_field_step_labels_keeps_floats_and_nulls():
    labels = read_labels(trajectory(step_labels=[0.7, None, 1.0]), "step_labels", "")
    assert numbers(labels) == [0.7, None, 1.0] and not labels.first_error
    assert read_labels(trajectory(), "step_labels", "") is None


@pytest.mark.parametrize(
    "value, expected",
    [
        (-1, [1, 1, 1]),
        (0, [0, None, None]),
        (1, [1, 0, None]),
        (2, [1, 1, 0]),
        ([1, None, -1], [1, None, -1]),
        ([True, False, None], [1, 0, None]),
        ({"1": 1, "4": -1}, [1, None, -1]),
    ],
)
@pytest.mark.parametrize("field", ["label", "meta.label", "deep.label", "meta.deep.label"])
def test_labels_below_meta(value, expected, field):
    labels = read(value, field)
    assert numbers(labels) == expected
    assert labels.first_error == isinstance(value, int)


def test_a_missing_path_gives_no_labels():
    assert read(1, "other") is None and read(1, "label.deeper") is None and read(None) is None
    assert lookup({"a": {"b": 0}}, "a.b") == 0


@pytest.mark.parametrize(
    "value, message",
    [
        (3, r"in.jsonl:7: label = 3: .* \[0, 2\], or -1"),
        (-2, r"label = -2"),
        ([1, 0], r"label has 2 values, the messages have 3 steps"),
        ([1, "x", 0], r"label\[1\] = 'x': a label is a number"),
        ("good", r"label is str"),
        (True, r"label is bool"),
        (0.5, r"label is float"),
        ({"2": 1}, r"label labels message '2', which is not a step; steps are messages \[1, 3, 4\]"),
    ],
)
def test_an_invalid_label_is_named_with_its_line(value, message):
    with pytest.raises(DataError, match=message):
        read(value)


def test_messages_of_several_steps_cannot_be_keys():
    parts = Message(role="assistant", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    example = Trajectory(id="a", messages=[MESSAGES[0], parts], meta={"label": {"1": 1}})
    with pytest.raises(DataError, match="several steps"):
        read_labels(example, "label", "")


def test_labels_by_message_use_the_indices_of_the_row():
    results = [{"type": "tool_result", "tool_use_id": f"c{number}", "content": "a"} for number in range(3)]
    calls = [{"type": "tool_use", "id": f"c{number}", "name": "look", "input": {}} for number in range(3)]
    by_message = {"1": 1, "5": 0}
    row = {
        "id": "a",
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": calls},
            {"role": "user", "content": results},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        "step_labels": by_message,
        "meta": {"label": by_message},
    }
    example, origins = parse_with_origins(json.dumps(row), where="")
    assert example.step_labels == [1, None, 0]
    assert numbers(read_labels(example, "label", "", origins)) == [1, None, 0]


def labels(*values, first_error=False) -> Labels:
    return Labels(np.array([math.nan if value is None else value for value in values], float), first_error)


@pytest.mark.parametrize(
    "rows, kind, wrong",
    [
        ([labels(1, 0), labels(1, None)], "binary", [False, True, False, False]),
        ([labels(1, 0), labels(-1, None)], "ternary", [False, False, True, False]),
        ([labels(1, 0.5)], "soft", None),
        ([labels(1, 2)], "soft", None),
        ([labels(1, 0, None, first_error=True)], "first-error", [False, True, False]),
        # As PRM800K's ratings, which end at the first error.
        ([labels(1, 0, None), labels(1, 1)], "first-error", [False, True, False, False, False]),
        ([labels(1, 0), labels(1, 1)], "binary", [False, True, False, False]),
        ([labels(1, 0, None, 1)], "binary", [False, True, False, False]),
        ([labels(1, None, 0, None)], "binary", [False, False, True, False]),
    ],
)
def test_the_kind_is_detected_from_the_values(rows, kind, wrong):
    assert kind_of(rows, "label") == kind
    assert kind_of(rows, "label", kind) == kind
    if wrong is not None:
        assert wrong_steps(np.concatenate([row.values for row in rows]), kind).tolist() == wrong


def test_ternary_labels_may_happen_to_have_two_values():
    assert kind_of([labels(1, 0)], "label", "ternary") == "ternary"
    assert not wrong_steps(np.array([1.0, 0.0]), "ternary").any()


@pytest.mark.parametrize(
    "rows, requested, message",
    [
        ([labels(1, 0.5)], "binary", "labels label: not binary"),
        ([labels(1, 0.5)], "first-error", "not first-error"),
        ([labels(1, 0, first_error=True)], "soft", "not soft"),
        ([labels(1, 0), labels(1, 0, first_error=True)], None, "split the file"),
    ],
)
def test_labels_that_do_not_fit_the_requested_kind_are_refused(rows, requested, message):
    with pytest.raises(UserError, match=message):
        kind_of(rows, "label", requested)


@given(st.sets(st.text(max_size=4), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
@settings(max_examples=50, deadline=None)
def test_validation_tasks_are_about_the_share_and_never_all(tasks, share, seed, random):
    chosen = validation_tasks(tasks, share, seed)
    assert chosen < tasks and len(chosen) >= 1
    assert abs(len(chosen) - share * len(tasks)) <= 1
    rows = random.sample(sorted(tasks) * 2, 2 * len(tasks))
    assert validation_tasks(rows, share, seed) == chosen


def test_the_seed_changes_the_split_and_impossible_shares_are_refused():
    tasks = [f"task/{number}" for number in range(40)]
    splits = {frozenset(validation_tasks(tasks, 0.5, seed)) for seed in range(5)}
    assert len(splits) == 5
    for share, names in [(0.0, tasks), (1.0, tasks), (0.5, tasks[:1])]:
        with pytest.raises(ValueError, match="share"):
            validation_tasks(names, share, 0)
