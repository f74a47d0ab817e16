"""Rows of every format, converted back, equal their source in text, reasoning, calls, arguments, labels and order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.importers import registry
from data_pipeline.importers.convert import Options, _Converter
from data_pipeline.importers.inputs import InputFile
from data_pipeline.source import SourceRow
from data_pipeline.trajectory import parse_line
from tests.data_pipeline.importers.writers import WRITERS, Call, Turn, read_back

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SOME_TEXT = TEXT.filter(lambda text: text.strip())
SCALAR = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=2), max_leaves=3)
CALL = st.builds(Call, st.sampled_from(["look", "go"]), st.dictionaries(TEXT, VALUE, max_size=2), TEXT)
AGENT = st.builds(Turn, TEXT, TEXT, st.lists(CALL, max_size=2).map(tuple), st.just(True)).filter(
    lambda turn: turn.text or turn.reasoning or turn.calls
)
USER = SOME_TEXT.map(lambda text: Turn(text, is_agent=False))


@st.composite
def talks(draw):
    """A user first; then turns of the agent, with a user's turn between some of them."""
    talk = [draw(USER)]
    for _ in range(draw(st.integers(1, 4))):
        talk.append(draw(AGENT))
        if draw(st.booleans()):
            talk.append(draw(USER))
    return talk


def convert(row, **options):
    """The trajectories of a row, through detection, conversion and the checks of a trajectory file."""
    converter = _Converter(Options(**options))
    lines = converter.convert(
        SourceRow("x.jsonl:1", 1, json.loads(json.dumps(row)), 0), InputFile(Path("x"), "x", True)
    )
    return [json.loads(line) for line in lines], converter.report


@pytest.mark.parametrize("format", WRITERS)
@given(talks(), st.data())
@settings(max_examples=15, deadline=None)
def test_a_conversation_of_any_format_is_the_same_afterwards(format, talk, data):
    if format in ("responses", "anthropic"):
        # A reply is what lies between two inputs there, so a turn follows one of the user or results of tools.
        talk = [turn for index, turn in enumerate(talk) if not turn.is_agent or _is_answer(talk, index)]
    if format == "anthropic":
        talk = [turn._replace(text=turn.text or "x") if not turn.calls else turn for turn in talk]
    agents = [turn for turn in talk if turn.is_agent]
    labels = [data.draw(st.sampled_from([None, 0.0, 1.0, -1.0])) for _ in agents]
    row = WRITERS[format](talk) | {"lab": labels}
    assert registry.detect(row, None).reader.name == format
    (trajectory,), report = convert(row, step_labels="lab")
    assert read_back(trajectory["messages"]) == talk
    assert trajectory["step_labels"] == labels
    assert report.rows == 0 and report.written == 1 and report.formats == Counter({format: 1})
    parse_line(json.dumps(trajectory), where="x")


def _is_answer(talk, index):
    before = talk[index - 1]
    return not before.is_agent or bool(before.calls)


@given(st.lists(SOME_TEXT.filter(lambda text: "\u043a\u0438" not in text), min_size=1, max_size=4), st.data())
@settings(max_examples=15, deadline=None)
def test_steps_and_labels_of_solutions_are_the_same_afterwards(texts, data):
    first = data.draw(st.integers(-1, len(texts) - 1))
    (row,), _ = convert({"problem": "p", "steps": texts, "label": first})
    joined = "".join(part["text"] for part in row["messages"][-1]["content"])
    assert joined.replace("\n", "").replace("\r", "") == "".join(texts).replace("\n", "").replace("\r", "")
    expected = [1.0] * len(texts) if first < 0 else [1.0] * first + [0.0] + [None] * (len(texts) - first - 1)
    assert row["step_labels"] == expected and row["meta"]["label"] == first
