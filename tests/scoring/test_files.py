"""The `score` verb: one output line for each input line, and the same bytes after an interruption."""

import errno
import json
import weakref
from importlib import resources

import numpy as np
import pytest

from jaxprm import files
from jaxprm.errors import UserError
from jaxprm.scoring import loading
from jaxprm.scoring.files import LineCounts, score_file
from jaxprm.scoring.scorer import Scorer
from tests.model import tiny

STATE = tiny.reward_model()
CHUNK = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_reward_model(tmp_path_factory.mktemp("model"), STATE)


@pytest.fixture(autouse=True)
def one_scorer(monkeypatch, model):
    """One scorer for all tests: sharing its compiled programs keeps them fast."""
    monkeypatch.setattr(loading, "load_scorer", lambda directory, **_: shared_scorer())


_SCORERS: list[Scorer] = []


def shared_scorer() -> Scorer:
    if not _SCORERS:
        _SCORERS.append(Scorer(tiny.CONFIG, STATE, tiny.encoder(), rows=2))
    return _SCORERS[0]


def line(number: int, **fields) -> str:
    return json.dumps({"id": f"row-{number}", "messages": tiny.conversation(number, turns=number % 4 + 1)} | fields)


def write_lines(path, lines) -> None:
    path.write_text("".join(text + "\n" for text in lines), encoding="utf-8")


@pytest.fixture
def paths(tmp_path):
    """(input with ten good lines, output)."""
    write_lines(tmp_path / "in.jsonl", [line(number) for number in range(10)])
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def read(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def leftovers(output) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name not in ("in.jsonl", "out.jsonl"))


def test_every_step_has_its_message_promise_and_progress(model, paths):
    input, output = paths
    assert score_file(model, input, output, chunk=CHUNK) == LineCounts(scored=10, errors=0)
    results = read(output)
    assert [result["id"] for result in results] == [f"row-{number}" for number in range(10)]
    for number, result in enumerate(results):
        messages = tiny.conversation(number, turns=number % 4 + 1)
        encoded = tiny.encoder().trajectory(messages, row="")
        expected = tiny.values(STATE, encoded.tokens[None])[0, encoded.read_positions]
        promises = [step["promise"] for step in result["steps"]]
        tiny.assert_close(promises, expected)
        assert [step["message"] for step in result["steps"]] == list(range(1, len(messages), 2))
        assert result["steps"][0]["progress"] is None
        np.testing.assert_allclose([s["progress"] for s in result["steps"][1:]], np.diff(promises), atol=1e-6)
        assert result["score"] == promises[-1]
        assert result.keys() == {"id", "steps", "score"}
    assert leftovers(output) == []


def test_messages_that_are_no_steps_and_messages_of_several_steps(model, paths):
    input, output = paths
    messages = tiny.conversation(3, turns=3)
    messages[1]["step"] = False
    messages[5]["content"] = [{"type": "text", "text": "first I look.\n"}, {"type": "text", "text": "get 1 stick"}]
    write_lines(input, [line(0, messages=messages)])
    score_file(model, input, output)
    assert [step["message"] for step in read(output)[0]["steps"]] == [3, 5, 5]


def test_steps_are_named_by_the_messages_of_the_row(model, paths):
    input, output = paths
    messages = tiny.conversation(3, turns=3)
    messages[2]["content"] = [{"type": "tool_result", "tool_use_id": f"c{n}", "content": "done"} for n in range(3)]
    write_lines(input, [line(0, messages=messages)])
    score_file(model, input, output)
    assert [step["message"] for step in read(output)[0]["steps"]] == [1, 3, 5]


BAD = {
    "not json": ('{"id": "row-1", ', None, "truncated"),
    "no object": ("[1, 2]", None, "object"),
    "no messages": ('{"id": "row-1"}', "row-1", "messages"),
    "unknown field": (line(1, score=1.0), "row-1", "score"),
    "no message, and the id is a number": ('{"id": 7, "messages": []}', "7", "messages"),
    "id is a list": ('{"id": [1], "messages": []}', None, "id"),
    "no step": (line(1, messages=tiny.conversation(0)[:1]), "row-1", "no assistant message"),
    "special token": (
        line(1, messages=[*tiny.conversation(0), {"role": "user", "content": "a <|end|>"}]),
        "row-1",
        "<|end|>",
    ),
    "too long": (
        line(1, messages=[{"role": "user", "content": "get 1 stick " * 20000}, *tiny.conversation(0)[1:]]),
        "row-1",
        "tokens, more than",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_gets_an_error_in_its_place_and_is_counted(model, paths, kind):
    input, output = paths
    bad, id, reason = BAD[kind]
    write_lines(input, [line(0), bad, line(2)])
    assert score_file(model, input, output) == LineCounts(scored=2, errors=1)
    first, second, third = read(output)
    assert (first["id"], third["id"]) == ("row-0", "row-2")
    assert second["id"] == id
    assert reason in second["error"]
    assert "\n" not in second["error"]
    assert second.get("line") == (2 if id is None else None)
    assert second.keys() == ({"id", "error"} if id else {"id", "line", "error"})


def test_bytes_that_are_no_text_and_a_last_line_without_newline(model, paths):
    input, output = paths
    input.write_bytes(b'{"id": "\xff"}\n' + line(1).encode())
    assert score_file(model, input, output) == LineCounts(scored=1, errors=1)
    assert [result["id"] for result in read(output)] == [None, "row-1"]


def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(model, paths):
    input, output = paths
    write_lines(input, ["", line(0), "", "not json"])
    assert score_file(model, input, output) == LineCounts(scored=1, errors=1)
    first, second = read(output)
    assert first["id"] == "row-0" and second["line"] == 4 and "in.jsonl:4: " in second["error"]


def test_an_empty_input_gives_an_empty_output(model, paths):
    input, output = paths
    input.write_text("")
    assert score_file(model, input, output) == LineCounts(0, 0)
    assert output.read_text() == ""


class Interrupt:
    """Raises after `calls` chunks; `seen` counts the scored chunks."""

    def __init__(self, monkeypatch, calls: float, error: BaseException | None = None):
        self.seen, original = 0, Scorer.score_encoded

        def score_encoded(scorer, encoded, names):
            if self.seen >= calls:
                raise error
            self.seen += 1
            return original(scorer, encoded, names)

        monkeypatch.setattr(Scorer, "score_encoded", score_encoded)


@pytest.mark.parametrize("torn", [b"", b'{"id": "row-8", "st', b'{"id":"row-8","error":"whole"}\n'])
def test_an_interrupted_run_resumes_and_ends_with_the_same_bytes(model, paths, monkeypatch, torn):
    input, output = paths
    lines = [line(number) for number in range(11)]
    lines[2] = "broken"
    write_lines(input, lines)
    score_file(model, input, output, chunk=CHUNK)
    uninterrupted = output.read_bytes()
    output.write_text("an earlier result\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupt(patch, 2, KeyboardInterrupt())
        score_file(model, input, output, chunk=CHUNK)
    assert output.read_text() == "an earlier result\n"
    partial = output.with_name("out.jsonl.partial")
    assert partial.read_bytes() == b"".join(uninterrupted.splitlines(keepends=True)[:8])
    with partial.open("ab") as file:
        file.write(torn)
    resumed = Interrupt(monkeypatch, np.inf)
    assert score_file(model, input, output, chunk=CHUNK) == LineCounts(scored=10, errors=1)
    assert resumed.seen == 1
    assert output.read_bytes() == uninterrupted
    assert leftovers(output) == []


@pytest.mark.parametrize("change", ["input", "model", "chunk", "dtype", "chat_template", "reasoning"])
def test_half_of_a_run_of_another_input_or_model_is_refused_and_kept(model, paths, monkeypatch, tmp_path, change):
    input, output = paths
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupt(patch, 2, KeyboardInterrupt())
        score_file(model, input, output, chunk=CHUNK)
    half = output.with_name("out.jsonl.partial")
    before, options = half.read_bytes(), {"chunk": CHUNK}
    if change == "input":
        write_lines(input, [line(number) for number in range(9)])
    elif change == "model":
        model = tiny.write_reward_model(tmp_path / "other", tiny.reward_model(seed=1))
    elif change == "chat_template":
        template = tmp_path / "mine.jinja"
        template.write_text((model / "chat_template.jinja").read_text() + "{# another #}")
        options["template"] = str(template)
    else:
        options |= {"chunk": {"chunk": 5}, "dtype": {"dtype": "bfloat16"}, "reasoning": {"reasoning": "drop"}}[change]
    with pytest.raises(UserError, match=rf"out\.jsonl\.partial: belongs to a run with another {change};"):
        score_file(model, input, output, **options)
    assert half.read_bytes() == before
    half.unlink()
    everything = Interrupt(monkeypatch, np.inf)
    score_file(model, input, output, **options)
    assert everything.seen == (2 if change == "chunk" else 3)
    assert leftovers(output) == {"model": ["other"], "chat_template": ["mine.jinja"]}.get(change, [])


def test_the_default_reasoning_by_name_resumes_what_was_begun_without_it(model, paths, monkeypatch):
    input, output = paths
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupt(patch, 2, KeyboardInterrupt())
        score_file(model, input, output, chunk=CHUNK)
    resumed = Interrupt(monkeypatch, np.inf)
    score_file(model, input, output, chunk=CHUNK, reasoning="keep")
    assert resumed.seen == 1


def test_scores_begun_with_the_first_version_of_a_shipped_template_resume(model, paths, monkeypatch):
    input, output = paths
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupt(patch, 2, KeyboardInterrupt())
        score_file(model, input, output, chunk=CHUNK, template="chatml")
    record = output.with_name("out.jsonl.partial.json")
    earlier = resources.files("data_pipeline") / "templates" / "fingerprints" / "chatml.jinja"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"chat_template": earlier.read_text()}))
    resumed = Interrupt(monkeypatch, np.inf)
    score_file(model, input, output, chunk=CHUNK, template="chatml")
    assert resumed.seen == 1


def test_a_partial_file_of_something_else_is_refused(model, paths, monkeypatch):
    input, output = paths
    half, record = (output.with_name("out.jsonl" + suffix) for suffix in (".partial", ".partial.json"))
    half.write_text("of something else\n")
    with pytest.raises(UserError, match="exists but its record"):
        score_file(model, input, output)
    record.write_text("{")
    with pytest.raises(UserError, match="to start again"):
        score_file(model, input, output)
    assert half.read_text() == "of something else\n"


@pytest.mark.parametrize("written", [0, 700])
def test_a_full_disk_is_one_line_and_what_was_written_is_kept(model, paths, monkeypatch, written):
    input, output = paths
    score_file(model, input, output, chunk=CHUNK)
    uninterrupted = output.read_bytes()
    output.unlink()
    original = files.write_all

    def write_until_full(target, data):
        """Writes the first chunk, and of the second `written` bytes, as a short write does."""
        if target.tell() == 0:
            return original(target, data)
        target.write(data[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", write_until_full)
        with pytest.raises(UserError, match=r"out.jsonl.partial: no space left .* after 4 of 10 rows") as caught:
            score_file(model, input, output, chunk=CHUNK)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    resumed = Interrupt(monkeypatch, np.inf)
    assert score_file(model, input, output, chunk=CHUNK) == LineCounts(10, 0)
    assert resumed.seen == 2
    assert output.read_bytes() == uninterrupted


def test_memory_holds_a_chunk_at_a_time(model, paths, monkeypatch):
    input, output = paths
    write_lines(input, [line(number % 4) for number in range(41)])
    sizes, original = [], Scorer.score_encoded

    def score_encoded(scorer, encoded, names):
        sizes.append(len(encoded))
        return original(scorer, encoded, names)

    monkeypatch.setattr(Scorer, "score_encoded", score_encoded)
    score_file(model, input, output, chunk=10)
    assert sizes == [10, 10, 10, 10, 1]


def test_a_file_of_any_length_costs_the_memory_of_a_chunk(model, tmp_path, monkeypatch):
    """A hundred thousand lines with a stub in place of the model: counts the conversations in memory."""
    held, most_held = weakref.WeakSet(), 0

    class Encoded:
        tokens, message_indices = np.arange(3), np.array([1])

    class Stub:
        encoder = property(lambda self: self)

        def trajectory(self, messages, *, row, tools):
            nonlocal most_held
            held.add(encoded := Encoded())
            most_held = max(most_held, len(held))
            return encoded

        def score_encoded(self, encoded, names):
            return [np.zeros(1, np.float32)] * len(encoded)

    monkeypatch.setattr(loading, "load_scorer", lambda directory, **_: Stub())
    lines = 100_000
    message = json.dumps([{"role": "user", "content": "go"}, {"role": "assistant", "content": "get 1 stick " * 8}])
    with (tmp_path / "in.jsonl").open("w") as file:
        file.writelines(f'{{"id": "{number}", "messages": {message}}}\n' for number in range(lines))
    assert score_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == LineCounts(lines, 0)
    assert 256 <= most_held <= 2 * 256
    with (tmp_path / "out.jsonl").open() as file:
        assert all(json.loads(text)["id"] == str(number) for number, text in enumerate(file))


def test_paths_that_cannot_be_are_refused(model, paths, tmp_path):
    input, output = paths
    with pytest.raises(UserError, match="no such file"):
        score_file(model, tmp_path / "missing.jsonl", output)
    with pytest.raises(UserError, match="is a directory"):
        score_file(model, input, tmp_path)
    with pytest.raises(UserError, match="is the input"):
        score_file(model, input, input)
    with pytest.raises(UserError, match="no such directory"):
        score_file(tmp_path / "missing", input, output)
    score_file(model, input, tmp_path / "new" / "folder" / "out.jsonl")
    assert len(read(tmp_path / "new" / "folder" / "out.jsonl")) == 10


def test_a_discounted_model_has_no_progress(paths, tmp_path):
    input, output = paths
    discounted = tiny.write_reward_model(tmp_path / "discounted", STATE, targets={"discount": 0.9})
    score_file(discounted, input, output)
    assert {step["progress"] for result in read(output) for step in result["steps"]} == {None}


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        loading.step_table([1], np.array([np.nan], np.float32), progress=True)


def test_numbers_have_the_digits_of_float32():
    table = loading.step_table([1, 3], np.array([0.1, 0.3], np.float32), progress=True)
    assert table["steps"][0]["promise"] == 0.1
    assert table["score"] == 0.3
    assert table["steps"][1]["progress"] == pytest.approx(0.2, abs=1e-7)


def change_meanwhile(monkeypatch, change) -> None:
    """Calls `change` while the first chunk is scored."""
    original, calls = Scorer.score_encoded, []

    def score_encoded(scorer, encoded, names):
        if not calls:
            change()
        calls.append(len(encoded))
        return original(scorer, encoded, names)

    monkeypatch.setattr(Scorer, "score_encoded", score_encoded)


@pytest.mark.parametrize("lines", [range(5), range(4), [*range(9), 19]])
def test_an_input_that_changes_while_it_is_scored_is_reported_and_nothing_is_written(
    model, paths, monkeypatch, tmp_path, lines
):
    input, output = paths
    # Longer than a read-ahead buffer, so that the change is seen.
    texts = [line(number, meta={"text": "x" * 40_000}) for number in range(20)]
    write_lines(input, texts[:10])
    output.write_text("an earlier result\n")
    with monkeypatch.context() as patch:
        change_meanwhile(patch, lambda: write_lines(input, [texts[number] for number in lines]))
        with pytest.raises(UserError, match=r"in\.jsonl: changed while it was scored") as error:
            score_file(model, input, output, chunk=2)
    assert "\n" not in str(error.value)
    assert output.read_text() == "an earlier result\n" and leftovers(output) == []
    assert score_file(model, input, output, chunk=2).scored == len(lines)


def test_an_input_that_grows_has_the_scores_of_its_first_lines(model, paths, monkeypatch, capsys):
    input, output = paths

    def grow():
        with input.open("a") as file:
            file.write(line(10) + "\n")

    change_meanwhile(monkeypatch, grow)
    assert score_file(model, input, output, chunk=CHUNK) == LineCounts(10, 0)
    assert [result["id"] for result in read(output)] == [f"row-{number}" for number in range(10)]
    assert "grew while it was scored" in capsys.readouterr().err


@pytest.mark.parametrize("tail", [b'{"id": "\xc3', b'{"id": "\xff"}\n', b"\0" * 100])
def test_a_tail_that_is_no_text_is_scored_again(model, paths, monkeypatch, tail):
    input, output = paths
    score_file(model, input, output, chunk=CHUNK)
    uninterrupted = output.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupt(patch, 1, KeyboardInterrupt())
        score_file(model, input, output, chunk=CHUNK)
    with output.with_name("out.jsonl.partial").open("ab") as file:
        file.write(tail)
    score_file(model, input, output, chunk=CHUNK)
    assert output.read_bytes() == uninterrupted


def test_a_users_file_with_the_name_of_the_record_stays(model, paths):
    input, output = paths
    record = output.with_name("out.jsonl.partial.json")
    for content in ('{"mine": 1}', "[1]", "\xff"):
        record.write_text(content)
        with pytest.raises(UserError, match="is no record of an interrupted run"):
            score_file(model, input, output)
        assert record.read_text() == content and leftovers(output) == [record.name]


def test_the_record_as_input_is_refused(model, paths, tmp_path):
    input, output = paths
    record = tmp_path / "out.jsonl.partial.json"
    input.rename(record)
    before = record.read_bytes()
    with pytest.raises(UserError, match=r"out\.jsonl: is written by way of out\.jsonl\.partial\.json, which is the"):
        score_file(model, record, output)
    assert record.read_bytes() == before
