"""Files that survive a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm import files
from jaxprm.errors import UserError

ROOT = Path(__file__).parents[1]
# Characters that end a line for some readers, and must not for ours.
TEXT = st.text(st.sampled_from('a\n\r\x0b\x0c\x1c\x85\u2028\u2029é"\\'), max_size=6)
OBJECTS = st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=3), min_size=1, max_size=5)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "deep" / "results.json"
    files.write_json(path, {"a": [1, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'
    files.write_atomic(path, "new\n")
    assert path.read_text() == "new\n"
    assert names(path.parent) == ["results.json"]


def test_a_write_that_fails_leaves_the_earlier_content(tmp_path):
    path = tmp_path / "results.json"
    files.write_atomic(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "new \ud800")
    assert path.read_text() == "old\n"
    assert names(tmp_path) == ["results.json"]


def test_a_write_that_is_killed_leaves_the_earlier_content(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_atomic(path, "old\n")

    def killed(*_):
        assert path.read_text() == "old\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, "new\n")
    assert path.read_text() == "old\n"


@given(objects=OBJECTS)
@settings(max_examples=50, deadline=None)
def test_lines_come_back_as_they_were(objects, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "deep" / "lines.jsonl"
    with files.appending(path) as append:
        append(objects[:2])
        append(objects[2:])
    assert list(files.read_lines(path)) == objects
    assert files.complete_lines(path) == objects
    assert path.read_bytes().count(b"\n") == len(objects)


@given(objects=OBJECTS, data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_torn_last_line_is_cut_off_and_written_again(objects, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("torn") / "lines.jsonl"
    lines = [files.line(value).encode() for value in objects]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    complete = sum(len(b"".join(lines[: index + 1])) <= cut for index in range(len(lines)))
    assert files.complete_lines(path) == objects[:complete]
    with files.appending(path) as append:
        append(objects[complete:])
    assert path.read_bytes() == content


def test_appended_lines_are_in_the_file_before_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    with files.appending(path) as append:
        append([{"a": 1}])
        assert path.read_text() == '{"a": 1}\n'
        append([])
        append([{"a": 2}, {"a": 3}])
        assert files.complete_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_missing_file_has_no_lines(tmp_path):
    assert files.complete_lines(tmp_path / "none.jsonl") == []


def read_partial(path):
    path.rename(path.with_name(path.name + ".partial"))
    with files.ResumableLines(path) as resumable:
        return resumable.read()


@pytest.mark.parametrize("read", [files.complete_lines, lambda path: list(files.read_lines(path)), read_partial])
@pytest.mark.parametrize("broken", [b'{"a": ', b"\xff", b"", b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}'])
def test_a_broken_line_is_named(read, broken, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + broken + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl(\.partial)?:2: not a JSON object") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [files.complete_lines, read_partial])
@pytest.mark.parametrize(
    "torn",
    [
        b'{"a": "\xc3',  # a kill within a letter of two bytes
        b'{"a": "\xff"}\n',
        b"\0" * 4096,  # what a file system leaves after a power failure
        b'{"a": 3}\0\0\n\xff\xfe\n"text"\n7',
        b"[" * 100_000 + b"\n",
    ],
)
def test_any_torn_end_is_cut_off(read, torn, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3\xa9"}\n' + torn)
    assert read(path) == [{"a": 1}, {"a": "é"}]
    remaining = next(tmp_path.iterdir())
    assert remaining.read_bytes() == b'{"a": 1}\n{"a": "\xc3\xa9"}\n'
    # A kill tears one line, which needs no word. Lines that had an end were written once.
    assert ("damaged lines" in capsys.readouterr().err) == (b"\n" in torn)


@given(objects=OBJECTS, data=st.data())
@settings(max_examples=50, deadline=None)
def test_lines_resume_after_a_torn_one_and_are_finished_in_the_given_order(objects, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    path, partial = folder / "lines.jsonl", folder / "lines.jsonl.partial"
    content = b"".join(files.line(value).encode() for value in objects)
    partial.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with files.ResumableLines(path) as resumable:
        assert not resumable.is_finished()
        complete = resumable.read()
        assert complete == objects[: len(complete)]
        resumable.append(objects[len(complete) :])
        assert partial.read_bytes() == content
        assert resumable.read() == objects
        assert b"".join(resumable.raw_lines()) == content
        resumable.finish(reversed(objects))
    assert list(files.read_lines(path)) == objects[::-1]
    assert names(folder) == ["lines.jsonl"]


def test_lines_are_finished_as_they_were_appended(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    with files.ResumableLines(path) as resumable:
        assert resumable.is_empty()
        resumable.append_bytes(b"one\ntwo\nthr")
        assert not resumable.is_empty()
        resumable.truncate(4)
        resumable.append_bytes(b"three\n")
        resumable.finish()
    assert path.read_bytes() == b"one\nthree\n"
    assert names(path.parent) == ["lines.jsonl"]


def test_a_kill_after_the_last_rename_leaves_a_finished_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    for name in ("lines.jsonl", "lines.jsonl.partial"):
        (tmp_path / name).write_text("{}\n")
    assert files.ResumableLines(path).is_finished()
    assert names(tmp_path) == ["lines.jsonl"]


def test_discarded_lines_are_gone(tmp_path):
    with files.ResumableLines(tmp_path / "lines.jsonl") as resumable:
        resumable.append([{"a": 1}])
        resumable.discard()
    assert names(tmp_path) == []


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from jaxprm import files
from jaxprm.errors import UserError

try:
    with files.ResumableLines(Path(sys.argv[1])) as resumable:
        done = len(resumable.read())
        resumable.append({{"a": number}} for number in range(done, done + 3))
        resumable.append_bytes(b'{{"a": ')
        print("ready", flush=True)
        time.sleep(600)
except UserError as error:
    print(f"refused: {{error}}", flush=True)
"""


def start_writer(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER.format(root=str(ROOT)), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_one_process_writes_at_a_time_and_the_next_resumes_after_its_death(tmp_path):
    path = tmp_path / "lines.jsonl"
    for round_ in range(2):
        with start_writer(path) as writer:
            assert writer.stdout.readline() == "ready\n"
            with start_writer(path) as other:
                refusal = other.stdout.read()
            writer.send_signal(signal.SIGKILL)
            assert refusal.startswith(f"refused: output {path}: process {writer.pid} is writing it; wait")
            assert refusal.count("\n") == 1
        assert writer.returncode == -signal.SIGKILL
        partial = path.with_name("lines.jsonl.partial").read_bytes()
        assert partial.count(b"\n") == 3 * (round_ + 1) and not partial.endswith(b"\n")
    with files.ResumableLines(path) as resumable:
        assert resumable.read() == [{"a": number} for number in range(6)]
        resumable.append([{"a": 6}])
        resumable.finish(resumable.read())
    assert list(files.read_lines(path)) == [{"a": number} for number in range(7)]
    assert names(tmp_path) == ["lines.jsonl"]


def test_short_writes_are_continued():
    class ShortWriter:
        """Accepts three bytes at a time, as a nearly full disk may."""

        written = b""

        def write(self, data):
            self.written += bytes(data[:3])
            return len(data[:3])

    target = ShortWriter()
    files.write_all(target, b"0123456789")
    assert target.written == b"0123456789"


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_plain_is_what_json_brings_back():
    value = {"a": (1, (2.5, None)), 3: "x"}
    assert files.plain(value) == json.loads(json.dumps(value)) == {"a": [1, [2.5, None]], "3": "x"}
