"""Import of files: every row is written or reported, ids are unique, and every task is in one split."""

import json
import os
from collections import defaultdict

import msgspec
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline.errors import DataError, SplitError
from data_pipeline.importers.convert import Options, import_trajectories
from data_pipeline.importers.fields import Path, Scale
from data_pipeline.trajectory import Message, Trajectory, read, steps, to_line

TALK = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "left"}]


def row(**fields):
    return {"messages": TALK, **fields}


@pytest.fixture
def convert(tmp_path):
    """Imports rows; returns the trajectories and the report."""

    def run(rows, *, format="openai", **options):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in rows))
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        options = Options(format=format, **options)
        report = import_trajectories([tmp_path / "log.jsonl"], tmp_path / "out.jsonl", options)
        return list(read(tmp_path / "out.jsonl")), report

    return run


def test_trajectory_fields_are_copied_and_others_go_into_meta(convert):
    fields = {
        "id": 7,
        "task": "t",
        "environment": "shop",
        "split": "train",
        "outcome": 0.25,
        "success": 0,
        "ended": "done",
        "rewards": [0.25],
        "step_labels": [0.5],
        "policy": {"name": "p"},
    }
    (trajectory,), _ = convert([row(**fields, model="gpt", info={"a": [1, None]}, meta={"b": 2})])
    plain = json.loads(to_line(trajectory))
    assert plain.pop("messages") == TALK
    assert plain == fields | {"id": "7", "success": False, "meta": {"model": "gpt", "info": {"a": [1, None]}, "b": 2}}


def test_values_that_do_not_fit_a_trajectory_field_are_kept_in_meta(convert):
    rows = [row(policy="gpt-4", meta=3), row(meta={"a": 1}, a=2)]
    assert [trajectory.meta for trajectory in convert(rows)[0]] == [
        {"policy": "gpt-4", "meta": 3},
        {"meta": {"a": 1}, "a": 2},
    ]


def test_fields_are_found_by_path_and_a_nested_conversation_is_not_kept_twice(convert):
    nested = {"request": {"messages": TALK, "model": "m"}, "who": {"id": 4}, "metrics": [{"score": 1}, {"score": 0.5}]}
    fields = {"messages": "request.messages", "id": "who.id", "task": "request.model", "outcome": "metrics[-1].score"}
    (trajectory,), _ = convert([nested], **fields)
    assert (trajectory.id, trajectory.task, trajectory.outcome) == ("4", "m", 0.5)
    assert trajectory.meta == {"request": {"model": "m"}, "who": {"id": 4}, "metrics": nested["metrics"]}


def test_agentgym_outcomes_are_read_from_reward_or_score_and_attempts_are_numbered(convert):
    talk = [{"from": "human", "value": "go", "loss": None}, {"from": "gpt", "value": "left", "loss": True}]
    rows = [{"conversations": talk, "item_id": "webshop_1", **more} for more in ({"reward": 0.5}, {"score": 1}, {})]
    trajectories, report = convert(rows, format="agentgym")
    assert [trajectory.id for trajectory in trajectories] == ["webshop/1", "webshop/1#2", "webshop/1#3"]
    assert [(trajectory.task, trajectory.environment, trajectory.outcome) for trajectory in trajectories] == [
        ("webshop/1", "webshop", outcome) for outcome in (0.5, 1.0, None)
    ]
    assert (report.repeated_ids, report.without_outcome) == (2, 1)
    assert trajectories[0].meta == {"item_id": "webshop_1"}
    with pytest.raises(DataError, match="`environment` is given twice"):
        convert([rows[0] | {"environment": "shop"}], format="agentgym")


def test_the_last_label_of_a_stepwise_row_can_be_its_outcome(convert, tmp_path):
    steps = {"prompt": "1 + 1?", "completions": ["one", "two"], "labels": [True, 0.25]}
    (trajectory,), _ = convert([steps], format="trl-prm", outcome="labels[-1]")
    assert (trajectory.outcome, trajectory.step_labels, trajectory.meta) == (0.25, [1.0, 0.25], {})
    (tmp_path / "none").write_text("[]")
    with pytest.raises(DataError, match="no trajectory in .*none: 0 rows$"):
        import_trajectories([tmp_path / "none"], tmp_path / "x", Options(format="openai"))


def test_generated_ids_differ_from_those_of_all_rows(convert):
    trajectories, report = convert([row(id=id) for id in ("a", "a", "a#2", "a", "a#2")] + [row(), row()])
    ids = [trajectory.id for trajectory in trajectories]
    assert ids == ["a", "a#2", "a#2#2", "a#3", "a#2#3", "log:6", "log:7"] and report.repeated_ids == 4


@pytest.mark.parametrize(
    ("value", "scale", "expected"),
    [
        (True, "0,1", 1.0),
        (False, "0,1", 0.0),
        (1, "0,1", 1.0),
        (0.3, "0,1", 0.3),
        (25, "0,100", 0.25),
        (-1, "-1,1", 0.0),
    ],
)
def test_outcomes_are_mapped_from_their_scale(convert, value, scale, expected):
    (trajectory,), report = convert([row(r=value)], outcome="r", scale=Scale.parse(scale))
    assert trajectory.outcome == pytest.approx(expected) and report.without_outcome == 0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.5, r"r = 1\.5 is outside \[0, 1\]; name the range with --outcome-scale"),
        (-0.1, r"r = -0\.1 is outside"),
        ("1", "r is a text; an outcome is a number"),
        ([1], "r is a list"),
        ({}, "r is an object"),
        (10**400, "r = a number|r = 1000"),
    ],
)
def test_an_outcome_out_of_range_is_refused_with_value_bound_and_fix(convert, value, reason):
    with pytest.raises(DataError, match=rf"log\.jsonl:2: ({reason}).*; fix the row, or .* --skip-bad$"):
        convert([row(r=1), row(r=value)], outcome="r")


def test_an_outcome_that_is_not_a_number_is_refused(tmp_path):
    table = pyarrow.table({"messages": [TALK, TALK], "outcome": [0.5, float("nan")]})
    parquet.write_table(table, tmp_path / "p")
    with pytest.raises(DataError, match="p: row 2: outcome = nan is outside"):
        import_trajectories([tmp_path / "p"], tmp_path / "out", Options(format="openai"))


@pytest.mark.parametrize("text", ["1,0", "0", "a,b", "0,inf", "0,1,2", ""])
def test_a_malformed_scale_is_refused(text):
    with pytest.raises(DataError, match="LOW,HIGH"):
        Scale.parse(text)


@pytest.mark.parametrize("text", ["", ".", "a..b", "a[", "a[x]", "[0]", "a.", "a]b"])
def test_a_malformed_path_is_refused(text):
    with pytest.raises(DataError, match="not a path"):
        Path.parse(text)


def test_paths_find_their_value_and_a_field_of_that_name_has_priority():
    data = {"a": {"b": [1, {"c": 2}]}, "a.b": 3}
    assert [Path.parse(text).find(data) for text in ("a.b[1].c", "a.b[-2]", "a.b", "a.b[2]", "a.c", "a[0]", "x.y")] == [
        2,
        1,
        3,
        None,
        None,
        None,
        None,
    ]


def test_an_explicit_field_that_no_row_has_is_an_error(convert, tmp_path):
    with pytest.raises(DataError, match="--outcome-field rewrd: no row has it, of 1 that could be read"):
        convert([row(reward=1)], outcome="rewrd")
    with pytest.raises(DataError, match=r"log\.jsonl:1: field name, which names its id, is missing"):
        convert([row()], id="name")
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_rows_are_left_out_only_with_skip_bad_and_each_is_reported(convert, tmp_path):
    rows = [row(id="a"), {"messages": []}, row(id="b", outcome=9), {"messages": TALK[1:]}, {"messages": TALK[:1]}]
    with pytest.raises(DataError, match=r"log\.jsonl:2: messages is empty"):
        convert(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]
    trajectories, report = convert(rows, skip_bad=True)
    assert [trajectory.id for trajectory in trajectories] == ["a"]
    assert (report.rows, report.written, report.skipped) == (5, 1, 4) and len(report.bad) == 4
    assert all(f"log.jsonl:{number}: " in line for number, line in zip((2, 3, 4, 5), report.bad, strict=True))
    assert "message 0 is a step" in report.bad[2] and "no assistant message is a step" in report.bad[3]
    with pytest.raises(DataError, match="no trajectory in .*: 1 rows, all bad, the first: .*messages is missing"):
        convert([{}], skip_bad=True)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(convert, tmp_path):
    convert([row()])
    before = (tmp_path / "out.jsonl").read_bytes()
    for output, problem in (("out.jsonl", "exists already and is not overwritten"), ("log.jsonl", "is the input")):
        with pytest.raises(DataError, match=problem):
            import_trajectories([tmp_path / "log.jsonl"], tmp_path / output, Options(format="openai"))
    assert (tmp_path / "out.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="cannot be written"):
        import_trajectories([tmp_path / "log.jsonl"], tmp_path / "log.jsonl/x", Options(format="openai"))
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "out.jsonl"]


def test_a_split_keeps_tasks_together_and_does_not_move_when_rows_are_added(convert):
    rows = [row(id=f"{task}-{attempt}", task=f"t{task}") for attempt in range(2) for task in range(400)]
    trajectories, report = convert(rows, split_by="", validation_share=0.25, seed=3)
    splits = defaultdict(set)
    for trajectory in trajectories:
        splits[trajectory.task].add(trajectory.split)
    assert all(len(kinds) == 1 for kinds in splits.values())
    assert 0.19 < report.splits["validation"] / 800 < 0.31 and sum(report.splits.values()) == 800
    fewer, _ = convert(rows[100:200], split_by="", validation_share=0.25, seed=3)
    assert all(splits[trajectory.task] == {trajectory.split} for trajectory in fewer)
    other, _ = convert(rows, split_by="", validation_share=0.25, seed=4)
    assert [trajectory.split for trajectory in other] != [trajectory.split for trajectory in trajectories]


def test_a_split_by_another_field_keeps_its_groups_together(convert):
    rows = [row(task=f"{repo}/{n}", info={"repo": repo}) for repo in range(40) for n in range(3)]
    trajectories, _ = convert(rows, split_by="info.repo", validation_share=0.5)
    groups = defaultdict(set)
    for trajectory in trajectories:
        groups[trajectory.meta["info"]["repo"]].add(trajectory.split)
    assert all(len(kinds) == 1 for kinds in groups.values()) and {"train"} in groups.values() != {"validation"}
    with pytest.raises(DataError, match=r"log\.jsonl:2: field info\.repo, to split by, is missing"):
        convert([*rows[:1], row()], split_by="info.repo")


def test_a_field_that_puts_a_task_in_two_splits_is_an_error_also_with_skip_bad(convert):
    with pytest.raises(SplitError, match=r"task t is in \w+ and in \w+; split by task, or by a field"):
        convert([row(task="t", day=day) for day in range(50)], split_by="day", validation_share=0.5, skip_bad=True)


def test_split_by_replaces_the_split_of_a_row_and_counts_it(convert):
    rows = [row(task="t", split="test"), row(task="u")]
    assert convert(rows)[0][0].split == "test"
    trajectories, report = convert(rows, split_by="")
    assert trajectories[0].split in ("train", "validation") and report.resplit == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_of_zero_and_one_is_refused(convert, share):
    with pytest.raises(DataError, match="is not between 0 and 1"):
        convert([row()], split_by="", validation_share=share)


def test_files_of_different_forms_are_written_one_after_the_other(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row(id="a")))
    (tmp_path / "b.json").write_text(json.dumps([row(id="b"), row(id="a")]))
    parquet.write_table(pyarrow.Table.from_pylist([row(id="c")]), tmp_path / "c.parquet")
    inputs = [tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet")]
    seen = []
    report = import_trajectories(
        inputs, tmp_path / "out", Options(format="openai"), progress=lambda done, total: seen.append((done, total))
    )
    assert [trajectory.id for trajectory in read(tmp_path / "out")] == ["a", "b", "a#2", "c"] and report.written == 4
    size = sum(path.stat().st_size for path in inputs)
    assert seen == sorted(seen) and seen[-1] == (size, size)


texts = st.text(max_size=12)
names = st.text(min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
calls = st.builds(
    lambda name, arguments: {
        "id": "c",
        "type": "function",
        "function": {"name": name, "arguments": msgspec.json.encode(arguments).decode()},
    },
    names,
    st.dictionaries(names, values, max_size=2),
)
later = st.one_of(
    st.builds(Message, role=st.sampled_from(["user", "system"]), content=texts),
    st.builds(Message, role=st.just("tool"), content=texts, tool_call_id=st.none() | names, name=st.none() | names),
    st.builds(Message, role=st.just("assistant"), content=texts, step=st.booleans()),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=st.none() | texts,
        tool_calls=st.lists(calls, min_size=1, max_size=2),
    ),
)
ours = st.builds(
    lambda talk, last, **fields: Trajectory(
        messages=[Message(role="user", content="go"), *talk, Message(role="assistant", content=last)], **fields
    ),
    st.lists(later, max_size=4),
    texts,
    id=names,
    task=st.none() | names,
    outcome=st.none() | st.floats(0, 1),
    success=st.none() | st.booleans(),
    ended=st.sampled_from([None, "done", "error"]),
    split=st.sampled_from([None, "train"]),
    meta=st.dictionaries(names, values.filter(lambda value: value is not None), max_size=2),
)


@given(st.lists(ours, min_size=1, max_size=3, unique_by=lambda trajectory: trajectory.id))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_trajectory_files_are_openai_rows_and_come_back_unchanged(tmp_path, trajectories):
    (tmp_path / "in").write_text("".join(to_line(trajectory) + "\n" for trajectory in trajectories))
    (tmp_path / "out").unlink(missing_ok=True)
    import_trajectories([tmp_path / "in"], tmp_path / "out", Options(format="openai"))
    assert list(read(tmp_path / "out")) == trajectories
    assert all(steps(trajectory.messages) for trajectory in trajectories)
