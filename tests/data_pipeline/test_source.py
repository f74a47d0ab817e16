"""Rows of JSON Lines, JSON arrays and Parquet: the same rows in every form, each with its location."""

import gzip
import io
import json
import tracemalloc

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline import source
from data_pipeline.errors import DataError
from data_pipeline.source import read_rows

ROWS = [{"id": "a", "text": 'quote " and \\ and [{,'}, {"id": "ü", "n": 1, "list": [1, {"x": []}]}, {"id": "c"}]


def values(path):
    return [row.value for row in read_rows(path)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path):
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


FORMS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "no newline at the end": "\n".join(map(json.dumps, ROWS)),
    "carriage returns": "\r\n".join([*map(json.dumps, ROWS), ""]),
    "blank lines": "\n \n".join(map(json.dumps, ROWS)),
    "byte order mark": b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode(),
    "unescaped": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "array": json.dumps(ROWS),
    "pretty array": "\n\n " + json.dumps(ROWS, indent=2) + "\n\n",
    "array with a byte order mark": b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_every_form_gives_the_same_rows_whatever_the_name_of_the_file(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(source, "_CHUNK", chunk)
    rows = list(read_rows(write(tmp_path / "data.parquet", FORMS[form])))
    assert [row.value for row in rows] == ROWS
    assert rows[-1].bytes_read <= (tmp_path / "data.parquet").stat().st_size


def test_parquet_rows_are_read_without_the_fields_that_only_other_rows_have(tmp_path):
    rows = [{"m": [{"role": "a", "calls": [{"n": 1}]}, {"role": "b"}], "labels": [1.0, None]}, {"m": [], "x": "y"}]
    columns = [{"m": None, "labels": None, "x": None} | row for row in rows]
    rows_read = list(read_rows(write_parquet(tmp_path / "data.jsonl", columns)))
    assert [row.value for row in rows_read] == rows
    assert [row.where for row in rows_read] == [f"{tmp_path / 'data.jsonl'}: row {n}" for n in (1, 2)]


def test_locations_name_the_line_of_a_row(tmp_path):
    lines = list(read_rows(write(tmp_path / "l", '\n{"a": 1}\n\n{"b":\n{"c": 1}\n')))
    assert [row.where for row in lines] == [f"{tmp_path / 'l'}:{n}" for n in (2, 4, 5)]
    assert str(lines[1].value) == f"{tmp_path / 'l'}:4: not JSON: Input data was truncated"
    array = list(read_rows(write(tmp_path / "a", '[\n{"a":\n1},\n\n {"b": x}, {"c": 1}]')))
    assert [row.where for row in array] == [
        f"{tmp_path / 'a'}: row {n} (line {at})" for n, at in ((1, 2), (2, 5), (3, 5))
    ]
    assert isinstance(array[1].value, DataError) and array[2].value == {"c": 1}


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5), st.text(max_size=9) | st.integers() | st.lists(st.text(max_size=3)), max_size=3
        ),
        max_size=5,
    ),
    st.integers(1, 30),
    st.sampled_from([None, 1, 3]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_array_is_split_into_its_elements(tmp_path, rows, chunk, indent):
    before, source._CHUNK = source._CHUNK, chunk
    try:
        assert values(write(tmp_path / "a", json.dumps(rows, indent=indent, ensure_ascii=False).encode())) == rows
    finally:
        source._CHUNK = before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        (b"\xef\xbb\xbf \n", "empty"),
        ("[", "row 1 (line 1): the array is not closed"),
        ('[{"a": 1},\n{"a": 2', "row 2 (line 2): the array is not closed"),
        ('[{"a": "1}, {"a": 2}]', "the array is not closed"),
        ('[{"a": 1}}, 2]', "a } that was never opened"),
        ('[{"a": 1}]\n{"a": 2}', "something follows the end of the array in line 1"),
        (b"\x1f\x8b\x08", "gzip data that are truncated or corrupt"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\xff\xfe[\x00", "UTF-16"),
        (b"PAR1 but no more of it", "Parquet that cannot be read"),
    ],
)
def test_a_file_whose_rows_cannot_be_separated_is_one_line_of_error(tmp_path, content, reason):
    assert reason in error_of(write(tmp_path / "data", content))


def test_a_missing_file_and_a_directory_are_one_line_of_error(tmp_path):
    assert "No such file" in error_of(tmp_path / "none")
    assert "not a file" in error_of(tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"x"', "{'a': 1}", '{"a": Nan}', '{"a": "\\ud80"}', "[" * 99_999])
def test_a_row_that_is_no_object_does_not_affect_others(tmp_path, text):
    good, bad, after = values(write(tmp_path / "data", '{"a": 1}\n' + text + '\n{"a": 2}'))
    assert isinstance(bad, DataError) and (good, after) == ({"a": 1}, {"a": 2})
    assert str(bad).startswith(f"{tmp_path / 'data'}:2: ")


def test_elements_of_an_array_that_are_no_objects_do_not_affect_others(tmp_path):
    rows_read = values(write(tmp_path / "data", '[{"a": 1}, , [2], {"b": 1x}, {"a": 2},]'))
    assert [isinstance(value, DataError) for value in rows_read] == [False, True, True, True, False, True]
    assert values(write(tmp_path / "data", " [ \n ] ")) == []


def test_text_that_is_not_utf8_affects_only_its_row_in_every_form(tmp_path):
    lines = write(tmp_path / "lines", b'{"a": "x"}\n{"a": "\xff"}\n{"a": "y"}')
    array = write(tmp_path / "array", b'[{"a": "x"},{"a": "\xff"},{"a": "y"}]')
    broken = pyarrow.array([b"x", b"\xff", b"y"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = tmp_path / "table"
    parquet.write_table(pyarrow.table({"a": broken}), table)
    for path in (lines, array, table):
        first, bad, last = values(path)
        assert (first, last) == ({"a": "x"}, {"a": "y"}) and "utf-8" in str(bad).lower()


def test_a_row_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_ROW_BYTES", 1 << 20)
    long = b'{"a": "' + b"x" * (8 << 20) + b'"}'
    tracemalloc.start()
    before, bad, after = values(write(tmp_path / "lines", b'{"a": 1}\n' + long + b'\n{"a": 2}\n'))
    assert "more than 1 MiB" in str(bad) and (before, after) == ({"a": 1}, {"a": 2})
    assert "more than 1 MiB" in error_of(write(tmp_path / "array", b"[" + long + b"]"))
    assert tracemalloc.get_traced_memory()[1] < (24 << 20)  # the file itself was 8 MiB, twice while it was written
    tracemalloc.stop()


NOT_LINES = {
    "gzip": (gzip.compress(b'{"a": 1}\n'), "compressed"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "compressed"),
    "parquet": (b"PAR1....PAR1", "Parquet"),
    "array": (b' [{"a": 1},\n {"a": 2}]', "a JSON array"),
    "objects": (b'{\n"a": 1}\n{\n"a": 2}', "JSON over several lines"),
    "mark": (b'\xef\xbb\xbf{"a": 1}\n', "byte order mark"),
    "bzip2": (b"BZh9", "bunzip2"),
}


@pytest.mark.parametrize("form", NOT_LINES)
def test_a_reader_of_raw_lines_refuses_other_forms(form):
    content, reason = NOT_LINES[form]
    with pytest.raises(DataError, match=reason) as error:
        source.check_lines(io.BytesIO(content), "gs://a/in")
    assert str(error.value).startswith("gs://a/in: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b" \n", b'{"a": 1}', b'\n{"a": 1}\n{"a": 2}', b'{"a": \n{"a": 2}\n', b"{broken\n"]
)
def test_a_reader_of_raw_lines_takes_lines(content):
    source.check_lines(io.BytesIO(content), "in")


def test_a_row_of_parquet_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_ROW_BYTES", 1 << 10)
    parquet.write_table(pyarrow.table({"a": ["x", "x" * (1 << 10), "y"]}), tmp_path / "table")
    first, bad, last = values(tmp_path / "table")
    assert (first, last) == ({"a": "x"}, {"a": "y"}) and "row 2: a row of more than" in str(bad)


@pytest.mark.parametrize("form", ["lines", "array", "parquet"])
def test_a_long_file_is_read_in_little_memory(tmp_path, form):
    rows = [{"id": str(n), "text": "word " * 400} for n in range(4000)]  # 8 MB
    path = tmp_path / "data"
    if form == "parquet":
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), path, row_group_size=10_000, compression="none", use_dictionary=False
        )
    else:
        write(path, json.dumps(rows) if form == "array" else "\n".join(map(json.dumps, rows)))
    del rows
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    held = [pyarrow.total_allocated_bytes() - before for _ in read_rows(path)]
    assert len(held) == 4000 and max(held) < (4 << 20)
    assert tracemalloc.get_traced_memory()[1] < (4 << 20)
    tracemalloc.stop()
