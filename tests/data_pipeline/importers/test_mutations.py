"""Hundreds of broken files through the command line: one line of error or a report, and every lost row is named."""

import json
import random
import signal

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.trajectory import read
from jaxprm import cli

CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "door"}'}}
ROWS = {
    "openai": lambda n: {
        "id": f"row {n}",
        "task": f"t{n % 3}",
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "messages": [
            {"role": "system", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": f"go {n}"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": 'a "key"'},
            {"role": "assistant", "content": "done"},
        ],
        "info": {"reward": n / 10},
    },
    "sharegpt": lambda n: {
        "id": f"row {n}",
        "system": "rules",
        "info": {"reward": 1},
        "conversations": [
            {"from": "human", "value": f"go {n}"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "wall"},
            {"from": "gpt", "value": "done", "weight": 1},
        ],
    },
    "agentgym": lambda n: {
        "item_id": f"webshop_{n}",
        "info": {"reward": 0.5},
        "conversations": [
            {"from": "human", "value": "rules", "loss": None},
            {"from": "gpt", "value": "OK", "loss": False},
            {"from": "human", "value": f"go {n}", "loss": None},
            {"from": "gpt", "value": "buy", "loss": True},
        ],
    },
    "trl-prm": lambda n: {
        "id": f"row {n}",
        "prompt": f"What is {n} + 1?",
        "completions": ["one", "more"],
        "labels": [0.7, True],
        "info": {"reward": False},
    },
}
BAD_VALUES = [
    "null",
    "[]",
    "{}",
    '""',
    "true",
    "-1",
    "NaN",
    "Infinity",
    "1e999",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    '"\\u0000"',
    '"x" "y"',
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '{"type": "image_url"}',
    '["a", 3]',
    "'x'",
    "",
]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\xc3",
    b"0",
]


def run(tmp_path, capsys, format, content, *more):
    """(exit status, report, trajectories) of an import; checks the properties of every import."""
    source, output, report = tmp_path / "in", tmp_path / "out", tmp_path / "report"
    source.write_bytes(content)
    for path in (output, report):
        path.unlink(missing_ok=True)
    arguments = ["--format", format, "--input", source, "--output", output, "--json", report, *more]
    code = cli.main(["import-trajectories", *map(str, arguments), "--outcome-field", "info.reward"])
    errors = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if not line.startswith("import ")
    ]
    errors = [line for line in errors if line.strip()]
    if code == 2:
        about = (f"jaxprm: {source}", "jaxprm: no trajectory in", "jaxprm: --outcome-field info.reward: no row has it")
        assert len(errors) == 1 and errors[0].startswith(about), errors
        assert len(errors[0]) < 600
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
        return code, None, []
    assert code == 0
    counts = json.loads(report.read_text())
    assert counts["rows"] == counts["written"] + counts["skipped"] and len(counts["bad"]) == counts["skipped"]
    assert all(str(source) in line and "\n" not in line and len(line) < 500 for line in counts["bad"])
    trajectories = list(read(output))  # the output can be read
    assert len(trajectories) == counts["written"]
    return code, counts, trajectories


@pytest.fixture(autouse=True)
def no_hang():
    signal.alarm(300)
    yield
    signal.alarm(0)


def in_parquet(rows):
    """The rows in Parquet, whose columns hold one type each: parts of text become text."""
    rows = json.loads(json.dumps(rows))
    for message in (message for row in rows for message in row.get("messages", ())):
        if isinstance(message["content"], list):
            message["content"] = message["content"][0]["text"]
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue().to_pybytes()


def in_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def same(trajectory):
    """A trajectory without its id, which depends on other rows."""
    return json.dumps([[message.content, str(message.tool_calls)] for message in trajectory.messages], default=str)


def break_bytes(content, rng):
    kind, at = rng.randrange(5), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + rng.randint(1, 9) :]
    if kind == 2:
        return content[:at] + rng.choice(BYTES) + content[at:]
    if kind == 3:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    other = rng.randrange(len(content))
    return content[:at] + content[other : other + 40] + content[at:]


def break_value(text, rng):
    """The JSON of a row with one value, anywhere in it, replaced by other or malformed JSON."""
    places = []

    def visit(node, path):
        places.append(path)
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            visit(inner, [*path, key])

    plain = json.loads(text)
    visit(plain, [])
    path = rng.choice(places[1:])
    node = plain
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = "@@"
    return json.dumps(plain).replace('"@@"', rng.choice(BAD_VALUES), 1)


@pytest.mark.parametrize("format", ROWS)
def test_a_line_with_a_broken_value_does_not_affect_others(tmp_path, capsys, format):
    rng = random.Random(1)
    good = [json.dumps(ROWS[format](n)) for n in range(3)]
    expected = [same(one) for one in run(tmp_path, capsys, format, "\n".join(good).encode())[2]]
    refused = 0
    for form in ["lines", "array"] * 25:
        broken = [good[0], break_value(good[1], rng), good[2]]
        text = "\n".join(broken) if form == "lines" else "[" + ",\n".join(broken) + "]"
        code, counts, trajectories = run(tmp_path, capsys, format, text.encode("utf-8", "surrogatepass"), "--skip-bad")
        if form == "array" and code == 2:
            continue  # a bracket or a quote too many or too few, so the ends of rows cannot be found
        assert code == 0 and counts["rows"] == 3 and counts["skipped"] <= 1
        assert [same(one) for one in trajectories][:1] == expected[:1] and same(trajectories[-1]) == expected[2]
        refused += counts["skipped"]
        strict, _, _ = run(tmp_path, capsys, format, text.encode("utf-8", "surrogatepass"))
        assert (strict == 2) == bool(counts["skipped"])
    assert refused > 6


@pytest.mark.parametrize("format", ROWS)
def test_broken_bytes_never_lose_an_intact_line(tmp_path, capsys, format):
    rng = random.Random(2)
    content = in_lines(map(ROWS[format], range(4)))
    original = {
        line: same(one)
        for line, one in zip(content.splitlines(), run(tmp_path, capsys, format, content)[2], strict=True)
    }
    failures = 0
    for _ in range(80):
        broken = break_bytes(content, rng)
        if not broken.strip():
            continue
        code, counts, trajectories = run(tmp_path, capsys, format, broken, "--skip-bad")
        if code == 2:
            failures += 1
            continue
        lines = [line for line in broken.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r")]
        assert counts["rows"] == len(lines)
        assert {original[line] for line in lines if line in original} <= {same(one) for one in trajectories}
    assert failures < 30


@pytest.mark.parametrize("form", ["array", "pretty", "parquet"])
@pytest.mark.parametrize("format", ROWS)
def test_broken_arrays_and_parquet_are_read_or_refused(tmp_path, capsys, format, form):
    rng, rows = random.Random(3), [ROWS[format](n) for n in range(4)]
    content = (
        in_parquet(rows) if form == "parquet" else json.dumps(rows, indent=2 if form == "pretty" else None).encode()
    )
    assert run(tmp_path, capsys, format, content)[1]["written"] == 4
    codes = []
    for _ in range(40):
        broken = break_bytes(content, rng)
        if broken:
            code, counts, trajectories = run(tmp_path, capsys, format, broken, "--skip-bad")
            codes.append(code)
            if form == "parquet" and code == 0:
                assert counts["rows"] == 4
    assert 2 in codes


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 8, 100, -1, -4, -8, -20])
def test_truncated_parquet_is_refused(tmp_path, capsys, cut):
    content = in_parquet([ROWS["openai"](n) for n in range(4)])
    assert run(tmp_path, capsys, "openai", content[:cut], "--skip-bad")[0] == 2


def test_broken_trajectory_files_are_counted_row_by_row(tmp_path, capsys):
    """validate on imported trajectories with a value or bytes broken: every line is either good or reported."""
    rng = random.Random(4)
    rows = [ROWS["openai"](n) for n in range(4)]
    run(tmp_path, capsys, "openai", in_lines(rows))
    content, path, report = (tmp_path / "out").read_bytes(), tmp_path / "rows", tmp_path / "counts"
    codes = []
    for number in range(120):
        lines = content.splitlines()
        if number % 2:
            lines[1] = break_value(lines[1], rng).encode("utf-8", "surrogatepass")
        broken = b"\n".join(lines) if number % 2 else break_bytes(content, rng)
        path.write_bytes(broken)
        codes.append(cli.main(["validate", str(path), "--json", str(report)]))
        assert "Traceback" not in capsys.readouterr().err
        if codes[-1] == 2:
            assert not broken.strip()
            continue
        counts = json.loads(report.read_text())
        rows = [line for line in broken.split(b"\n") if line.strip()]
        assert counts["rows"] == len(rows) == counts["trajectories"] + len(counts["bad"])
        assert counts["trajectories"] >= sum(line in content.splitlines() for line in rows)
        assert all(line.startswith(f"{path}:") and "\n" not in line for line in counts["bad"])
        assert codes[-1] == bool(counts["bad"] or counts["leaks"] or not counts["trajectories"])
    assert {0, 1} <= set(codes)
