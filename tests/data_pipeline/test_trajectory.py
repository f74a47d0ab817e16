import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.trajectory import Message, Step, Trajectory, parse_line, read, read_numbered, steps, to_line

ROW = {
    "id": "a",
    "messages": [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "OK", "step": False},
        {"role": "user", "content": "room"},
        {"role": "assistant", "content": "left"},
        {"role": "user", "content": "wall"},
        {"role": "assistant", "content": [{"type": "text", "text": "one\n"}, {"type": "text", "text": "two"}]},
    ],
    "outcome": 0.7,
}


def changed(**fields) -> str:
    return json.dumps({**ROW, **fields})


def test_steps_are_assistant_messages_and_parts_without_step_false():
    trajectory = parse_line(json.dumps(ROW), where="x")
    assert steps(trajectory.messages) == [Step(4, None), Step(6, 0), Step(6, 1)]


def test_soft_outcome_is_kept():
    assert parse_line(json.dumps(ROW), where="x").outcome == 0.7


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "truncated"),
        (b'{"id": "\xff"}', "(?i)utf-8"),
        ("[]", "Expected `object`"),
        (changed(outcome=1.5), "outcome 1.5 is outside"),
        (changed(rewards=[1.0]), "rewards has 1 values, the messages have 3 steps"),
        (changed(step_labels=[None, 0.5]), "step_labels has 2 values"),
        (changed(messages=[]), "messages is empty"),
        (changed(id=""), "id is empty"),
        (changed(messages=[{"role": "robot", "content": "x"}]), "message 0: role 'robot' is none of system, "),
        (changed(messages=[{"role": "user"}]), "neither content nor tool_calls"),
        (changed(messages=[{"role": "user", "content": [{"type": "image"}]}]), "content part 0"),
        (changed(messages=[{"role": "user", "content": []}]), r"message 0 \(user\) has neither content"),
        (changed(reward=3), "unknown field `reward`"),
        (changed(ended="crashed"), r"\$\.ended"),
        ('{"id": "a", "messages": [{"role": "user", "content": "x"}], "outcome": NaN}', r"outcome is nan.*\$\.outcome"),
    ],
)
def test_the_error_of_a_bad_line_names_location_and_field(line, reason):
    with pytest.raises(DataError, match=reason) as error:
        parse_line(line, where="trajectories.jsonl:17")
    assert str(error.value).startswith("trajectories.jsonl:17: ")
    assert "\n" not in str(error.value)


def test_file_errors_carry_the_line_number_and_can_be_collected(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{changed(id='1')}\n\nnot json\n{changed(id='2')}\n")
    rows = read(path)
    assert next(rows).id == "1"
    with pytest.raises(DataError, match=r"t\.jsonl:3: "):
        next(rows)
    errors = []
    assert [row.id for row in read(path, skip_bad=errors.append)] == ["1", "2"]
    assert len(errors) == 1 and "t.jsonl:3" in str(errors[0])
    assert [where for where, _ in read_numbered(path, skip_bad=True)] == [f"{path}:1", f"{path}:4"]


def test_missing_file_is_one_line_of_error():
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        next(read("nowhere.jsonl"))


def test_task_defaults_to_the_prompt():
    first, same = (parse_line(changed(id=id), where="x") for id in "ab")
    answer = {"role": "assistant", "content": "another action"}
    later = parse_line(changed(messages=[*ROW["messages"][:4], answer]), where="x")
    other = parse_line(changed(messages=[{"role": "user", "content": "else"}, answer]), where="x")
    assert first.task_id == same.task_id == later.task_id != other.task_id
    assert parse_line(changed(task="textcraft/3"), where="x").task_id == "textcraft/3"


texts = st.text(min_size=1, max_size=20)
parts = st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), min_size=1, max_size=3)
messages = st.builds(
    Message, role=st.sampled_from(["user", "assistant", "tool"]), content=st.one_of(texts, parts), step=st.booleans()
)


@st.composite
def trajectories(draw) -> Trajectory:
    conversation = draw(st.lists(messages, min_size=1, max_size=5))
    count = len(steps(conversation))
    number = st.floats(allow_nan=False, allow_infinity=False)
    return Trajectory(
        id=draw(texts),
        messages=conversation,
        outcome=draw(st.none() | st.floats(0, 1)),
        rewards=draw(st.none() | st.lists(number, min_size=count, max_size=count)),
        step_labels=draw(st.none() | st.lists(st.none() | number, min_size=count, max_size=count)),
        meta=draw(st.dictionaries(texts, st.integers(-9, 9), max_size=2)),
    )


@settings(deadline=None)
@given(trajectories())
def test_a_written_line_is_read_back_equal(trajectory):
    line = to_line(trajectory)
    assert "\n" not in line
    assert parse_line(line, where="x") == trajectory


def test_a_line_nested_without_end_is_one_line_of_error():
    deep = '{"id": "a", "messages": [{"role": "user", "content": "x"}], "meta": {"a": ' + "[" * 99_999
    with pytest.raises(DataError, match="^x: nested too deeply$"):
        parse_line(deep, where="x")
