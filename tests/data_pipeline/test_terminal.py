"""Escape sequences and marks of direction in data are shown, and not obeyed, by every verb."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from data_pipeline import build
from data_pipeline.terminal import escape, safe_output
from jaxprm import cli

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x1b[1A\x9b31mb\u202egnp\u2066c\u2028d\x00\x08\u200b\U000e0041"
ROOT = Path(__file__).parents[2]


def is_harmless(text: str) -> bool:
    """Whether a terminal shows every character of a text, in the order of the text."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for character in text
        if character not in "\n\t\u200c\u200d"
    )


def test_what_a_terminal_obeys_is_written_out():
    assert escape(HOSTILE) == (
        r"a\x1b]0;title\x07\x1b[2J\x1b[1A\x9b31mb\u202egnp\u2066c\u2028d\x00\x08\u200b\U000e0041"
    )
    assert escape("\udcff") == r"\udcff" and escape("\r") == r"\x0d"
    plain = "Größe 数 שלום 👩‍👩‍👧 e\u0301 a\tb\n≤ ·"
    assert escape(plain) == plain
    missed = [
        f"{code:x}"
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(chr(code)) in BIDI
        if chr(code) not in "\n\t" and escape(chr(code)) == chr(code)
    ]
    assert missed == []


BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def test_everything_that_is_printed_in_the_block_is_safe(capsys):
    with safe_output():
        print(HOSTILE)
        print("x\r" + HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE, HOSTILE])
        warnings.showwarning(HOSTILE, UserWarning, "file", 1)
        logging.lastResort.handle(logging.LogRecord("a", logging.ERROR, "file", 1, HOSTILE, (), None))
        with safe_output():
            print("Größe")
    out, err = capsys.readouterr()
    assert is_harmless(out + err) and out.endswith("Größe\n") and out.count(r"\x1b]0;title\x07") == 3
    print(HOSTILE)
    assert not is_harmless(capsys.readouterr().out)


def test_bars_still_move_and_their_labels_are_safe(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with safe_output():
        for number in tqdm(range(3), desc=HOSTILE, file=sys.stderr, mininterval=0):
            tqdm.write(f"{number} {HOSTILE}", file=sys.stderr)
    written = stream.getvalue()
    assert "\r" in written and "3/3" in written and is_harmless(written.replace("\r", ""))


def test_a_terminal_in_another_encoding_gets_the_whole_message(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    with safe_output():
        print("Größe \u202e end")
        sys.stdout.flush()
        assert raw.getvalue() == b"Gr\\xf6\\xdfe \\u202e end\n"


@pytest.fixture
def trajectories(tmp_path) -> Path:
    """Rows with hostile texts wherever a row has a text, half of them broken."""
    message = {"role": "user", "content": HOSTILE}
    reply = {"role": "assistant", "content": HOSTILE}
    rows = [
        {"id": HOSTILE, "task": HOSTILE, "messages": [message, reply], "outcome": 1.0, "environment": HOSTILE},
        {"id": HOSTILE + "2", "task": HOSTILE, "messages": [message, {"role": HOSTILE, "content": "x"}]},
        {"id": HOSTILE, "task": HOSTILE, "messages": [message, reply], HOSTILE: 1},
        {"id": HOSTILE, "messages": [], "split": HOSTILE},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_verbs_print_nothing_that_a_terminal_obeys(trajectories, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"raise ValueError({HOSTILE!r})")
    commands = (
        ["validate", str(trajectories)],
        ["validate", str(trajectories), "--skip-bad"],
        ["import-trajectories", "--input", str(trajectories), "--output", str(tmp_path / "out.jsonl"), "--skip-bad"],
        ["import-trajectories", "--input", str(trajectories), "--output", str(tmp_path / "out2.jsonl")],
        ["validate", f"/no/{HOSTILE.replace(chr(0), '')}"],
        ["inspect", f"/no/{HOSTILE.replace(chr(0), '')}"],
        ["score", "--model", "/no/x\x1b[2J", "--input", str(trajectories), "--output", str(tmp_path / "s")],
        ["run", str(config), "--workdir", str(tmp_path / "w")],
        ["run", "textcraft_tiny", f"policy.path={HOSTILE}", f"{HOSTILE}=1", "--workdir", str(tmp_path / "w")],
        ["serve", "--model", HOSTILE, "--allow-host", HOSTILE],
        ["no\x1b[2Jverb"],
        ["validate", "--no\u202eoption"],
    )
    for command in commands:
        with contextlib.suppress(SystemExit):  # argparse
            cli.main(command)
        output = "".join(capsys.readouterr())
        assert output and is_harmless(output.replace("\r", "")), (command, output)
    assert (
        build.main(["--input", str(trajectories), "--tokenizer", "/no/\x1b[2J", "--output", str(tmp_path / "s")]) == 2
    )
    assert is_harmless("".join(capsys.readouterr()))


def test_tracebacks_are_safe():
    program = (
        f"from data_pipeline.terminal import make_output_safe; make_output_safe(); raise RuntimeError({HOSTILE!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "RuntimeError" in done.stderr and is_harmless(done.stderr)


def test_no_code_writes_around_the_escape():
    """Other ways to a terminal than sys.stdout and sys.stderr of the moment."""
    for path in [*(ROOT / "jaxprm").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not any(name in text for name in ("sys.__stdout__", "sys.__stderr__", "os.write(1", "os.write(2")), path
