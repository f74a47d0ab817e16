"""Files of JSON as typed values: bounds, and errors of one line with file, field, value and what is expected."""

import json

import msgspec
import pytest

from data_pipeline import typed_json
from data_pipeline.errors import DataError


class Inner(msgspec.Struct):
    share: float = 1.0


class Outer(msgspec.Struct):
    inner: Inner
    sizes: dict[str, list[int]] = {}


def read(path, content: bytes | str, kind=Outer):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return typed_json.read(path, kind, fix="copy it again")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"inner": {"share": "x"}}', "inner.share = 'x': expected float, got str; copy it again"),
        ('{"inner": {"share": null}}', "inner.share = None: expected float, got null; copy it again"),
        ('{"inner": 3}', "inner = 3: expected object, got int; copy it again"),
        ("{}", "object missing required field inner; copy it again"),
        ("[]", "expected object, got array; copy it again"),
        ('{"inner": {}, "sizes": {"a": [1, "b"]}}', "sizes = {'a': [1, 'b']}: expected int, got str; copy it again"),
        (
            '{"inner": {"share": 1' + "0" * 350 + "}}",
            f"inner.share = 1{'0' * 76}...: number out of range; copy it again",
        ),
        ('{"inner": {"share": ' + "9" * 5000 + "}}", "a number has 5000 digits, more than 400; copy it again"),
        ('{"x": ' + "[" * 5000 + "]" * 5000 + "}", "nested more than 64 levels deep; copy it again"),
        ('{"x": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 levels deep; copy it again"),
        ('{"x": "\\ud800"}', "the text '\\ud800' is no Unicode: it has half of a surrogate pair; copy it again"),
        ('{"inner": {}, "inner": 3}', "the name 'inner' occurs twice with different values; copy it again"),
        (b'{"inner": "\xff"}', "not UTF-8 (byte 11); copy it again"),
        ('{"inner": {}}'.encode("utf-16"), "not UTF-8 (byte 0); copy it again"),
        ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); copy it again"),
        ("", "not JSON (Expecting value: line 1 column 1 (char 0)); copy it again"),
    ],
)
def test_a_bad_file_is_one_line(content, problem, tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(DataError) as raised:
        read(path, content)
    assert str(raised.value) == f"{path}: {problem}"


def test_good_files_and_the_fields_of_others(tmp_path):
    path = tmp_path / "a.json"
    assert read(path, '{"inner": {"share": 1, "other": NaN}, "more": {"deep": [[]]}}') == Outer(Inner(1.0))
    assert read(path, b'\xef\xbb\xbf{"inner": {}, "inner": {}}') == Outer(Inner())
    deep = "[" * 60 + "]" * 60
    assert read(path, deep, list) == json.loads(deep)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(typed_json, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="has more than 1 MiB; copy it again"):
        read(tmp_path / "a.json", " " * (1 << 20) + "{}")
