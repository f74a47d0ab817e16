"""Files that survive a kill."""

import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm import files
from jaxprm.errors import UserError

# What ends a line for somebody, and must not for us.
TEXT = st.text(st.sampled_from('a\n\r\x0b\x0c\x1c\x85\u2028\u2029é"\\'), max_size=6)
OBJECTS = st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=3), min_size=1, max_size=5)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "results.json"
    files.write_json(path, {"a": [1, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'
    files.write_atomic(path, "new\n")
    assert path.read_text() == "new\n"
    assert [found.name for found in path.parent.iterdir()] == ["results.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.json"
    files.write_atomic(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "new \ud800")
    assert path.read_text() == "old\n"
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


def test_a_write_that_is_killed_leaves_what_was_there(tmp_path, monkeypatch):
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
def test_of_a_torn_file_the_complete_lines_are_left(objects, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("torn") / "lines.jsonl"
    lines = [files.line(one).encode() for one in objects]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = sum(len(b"".join(lines[: index + 1])) <= cut for index in range(len(lines)))
    assert files.complete_lines(path) == objects[:whole]
    # The torn end is gone, so that the next line starts a line.
    with files.appending(path) as append:
        append(objects[whole:])
    assert path.read_bytes() == content


def test_what_is_appended_is_on_disk_before_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    with files.appending(path) as append:
        append([{"a": 1}])
        assert path.read_text() == '{"a": 1}\n'
        append([])
        append([{"a": 2}, {"a": 3}])
        assert files.complete_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_file_that_was_never_begun_has_no_lines(tmp_path):
    assert files.complete_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("read", [files.complete_lines, lambda path: list(files.read_lines(path))])
@pytest.mark.parametrize("broken", [b'{"a": ', b"\xff", b""])
def test_a_broken_line_is_named(read, broken, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + broken + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl:2: not JSON") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_plain_is_what_json_brings_back():
    value = {"a": (1, (2.5, None)), 3: "x"}
    assert files.plain(value) == json.loads(json.dumps(value)) == {"a": [1, [2.5, None]], "3": "x"}
