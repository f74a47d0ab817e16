"""Counts of validate by hand, and the errors it reports."""

import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.trajectory import to_line
from data_pipeline.validate import to_text, validate
from tests.model import tiny


@pytest.fixture
def check(tmp_path, write_rows):
    """validate() on trajectories, with lines of text appended to the file."""

    def run(trajectories, extra="", **options):
        path = write_rows(tmp_path / "rows.jsonl", trajectories)
        path.write_text(path.read_text() + extra)
        return validate({None: [path]}, **options)

    return run


def test_counts_by_hand(check, make_trajectory):
    rows = [
        make_trajectory(1, id="a", outcome=1.0, success=True, split="train"),
        make_trajectory(1, id="b", outcome=0.0, success=False, split="train", rounds=3),
        make_trajectory(1, id="c", outcome=0.25, split="train"),
        make_trajectory(2, id="d", outcome=1.0, split="train"),
        make_trajectory(2, id="d", outcome=1.0, split="train"),
        make_trajectory(3, id="f", outcome=None, split="validation", ended=None),
        make_trajectory(4, id="g", outcome=0.0, split="validation", ended="error", step_labels=[0.5, None]),
    ]
    report = check(rows, extra="\n{broken\n")
    train, held = report.splits["train"], report.splits["validation"]
    assert (report.rows, report.trajectories, len(report.bad)) == (8, 7, 1)
    assert (train.trajectories, train.tasks, train.trainable) == (5, 2, 5)
    assert (train.failed, train.partial, train.full, train.mean_outcome) == (1, 1, 3, pytest.approx(3.25 / 5))
    assert (train.with_success, train.successes) == (2, 1)
    assert (held.trajectories, held.tasks, held.trainable, held.mean_outcome) == (2, 2, 0, 0.0)
    assert report.ended == {"done": 5, "": 1, "error": 1}
    assert report.steps.count == 7 and report.steps.mean == pytest.approx(15 / 7)
    assert report.steps.percentiles["0"] == 2 and report.steps.percentiles["100"] == 3
    groups = report.groups
    assert (groups.tasks, groups.repeated, groups.differing) == (4, 2, 1)
    assert groups.attempts.percentiles["100"] == 3 and groups.attempts.mean == pytest.approx(7 / 4)
    assert (report.equal, report.repeated_ids) == (1, 1)
    assert report.with_step_labels == 1 and report.step_labels.count == 1 and report.step_labels.mean == 0.5
    assert report.bad[0].endswith("rows.jsonl:9: not JSON: JSON is malformed: object keys must be strings (byte 1)")
    assert report.tokens is None and not report.leaks


def test_lengths_are_those_of_the_encoder(check, make_trajectory, plain_encoder):
    rows = [make_trajectory(seed, rounds=1 + seed % 4) for seed in range(12)]
    lengths = sorted(len(plain_encoder.trajectory(row.messages, row="x").tokens) for row in rows)
    report = check(rows, encoder=plain_encoder, max_length=lengths[-2])
    assert report.tokens.percentiles["0"] == lengths[0] and report.tokens.percentiles["100"] == lengths[-1]
    assert report.tokens.mean == pytest.approx(sum(lengths) / 12)
    assert sum(report.lengths.values()) == 12
    assert report.too_long == sum(length > lengths[-2] for length in lengths)
    for low, count in report.lengths.items():
        assert (
            count == sum(int(low) <= length < 2 * int(low) for length in lengths if int(low) in (32, 64))
            or int(low) > 64
        )


def test_a_row_that_the_encoder_refuses_is_bad_and_named(check, make_trajectory, plain_encoder):
    messages = [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "x"}]
    line = json.loads(to_line(make_trajectory(0))) | {"messages": messages}
    report = check([make_trajectory(1)], extra=json.dumps(line) + "\n", encoder=plain_encoder)
    assert report.trajectories == 1 and len(report.bad) == 1
    assert "rows.jsonl:2 (row-0): message 0 (user) has the special token <|end|>" in report.bad[0]


def test_a_task_in_two_splits_is_reported_once(check, make_trajectory):
    rows = [make_trajectory(1, id=str(n), split=("train", "validation")[n % 2]) for n in range(4)]
    report = check(rows)
    assert len(report.leaks) == 1
    assert report.leaks[0].startswith("task textcraft/1 is in train and, in ") and "rows.jsonl:2" in report.leaks[0]
    assert "1 tasks in two splits" in to_text(report)


def test_rows_without_a_name_for_their_task_are_grouped_by_prompt(check, make_trajectory):
    rows = [make_trajectory(1, id=str(n), task=None, outcome=n / 2, rounds=1 + n) for n in range(3)]
    groups = check(rows).groups
    assert (groups.tasks, groups.repeated, groups.differing) == (1, 1, 1)


def test_files_are_passed_by_split_as_to_build(tmp_path, write_rows, make_trajectory):
    inputs = {
        split: [write_rows(tmp_path / split, [make_trajectory(7, split=None)])] for split in ("train", "validation")
    }
    assert len(validate(inputs).leaks) == 1
    other = {"validation": [write_rows(tmp_path / "x", [make_trajectory(1, split="train")])]}
    assert "its split is 'train', but the file was given for 'validation'" in validate(other).bad[0]


def test_files_without_rows_are_errors(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(DataError, match="empty: empty, there is no row in it"):
        validate({None: [tmp_path / "empty"]})
    with pytest.raises(DataError, match="No such file"):
        validate({None: [tmp_path / "none"]})


def test_the_text_shows_twenty_bad_rows_and_counts_the_others(check, make_trajectory):
    text = to_text(check([make_trajectory(1)], extra="{broken\n" * 25))
    assert text.splitlines()[0] == "26 rows, 1 trajectories, 25 bad"
    assert sum("rows.jsonl:" in line for line in text.splitlines()) == 20
    assert text.splitlines()[-1] == "  ... and 5 more"


def test_a_file_of_bad_rows_gives_a_report(check):
    report = check([], extra="{broken\n" * 2)
    assert (report.rows, report.trajectories) == (2, 0) and to_text(report).startswith("2 rows, 0 trajectories, 2 bad")


def test_progress_counts_good_and_bad_rows(check, make_trajectory):
    seen = []
    check([make_trajectory(1)], extra="x\nx\n", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def pair(name, *actions, **fields):
    turns = [{"role": "assistant", "content": action} for action in actions]
    row = {"id": name, "messages": [{"role": "user", "content": "Open it."}], "chosen": turns[0], "rejected": turns[1:]}
    return json.dumps(row | fields) + "\n"


def test_pairs_and_rows_with_labels_alone_are_counted_as_what_they_are(check, make_trajectory):
    labelled = make_trajectory(1, id="l", outcome=None, ended=None, step_labels=[1.0, 0.0])
    plain = make_trajectory(2, id="u", outcome=None, ended=None)
    extra = pair("p", "push", "pull", "wait") + pair("q", "push", "pull", task="box") + pair("r", "push")
    report = check([labelled, plain], extra=extra)
    counts = report.splits[""]
    assert (report.rows, report.trajectories, report.pairs, len(report.bad)) == (5, 2, 2, 1)
    assert (counts.pairs, counts.rejected, counts.only_labels, counts.trainable) == (2, 3, 1, 0)
    text = to_text(report)
    assert "2 trajectories and 2 pairs with 3 rejected actions of 4 tasks" in text
    assert "1 with step labels and no outcome, 1 not to be trained on" in text
    assert "rejected is empty" in report.bad[0]


def test_tokens_of_pairs_are_those_of_their_records(check, tmp_path):
    encoder = tiny.encoder()
    report = check([], extra=pair("p", "push", "pull") + pair("q", "push", "push"), encoder=encoder, max_length=4)
    state = [{"role": "user", "content": "Open it."}]
    ends = [encoder.trajectory([*state, {"role": "assistant", "content": text}], row="r") for text in ("push", "pull")]
    before = int(ends[0].state_positions[0]) + 1
    assert report.tokens.mean == before + sum(int(end.read_positions[0]) + 1 - before for end in ends)
    assert report.too_long == 1 and "rejected[0] is the chosen action" in report.bad[0]
