"""What is remembered is bounded in bytes, and never wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.encode import Encoder
from data_pipeline.remembered import Remembered
from tests.model import tiny


def squares(most: int):
    calls = []

    def square(number):
        calls.append(number)
        return number**2

    return Remembered(square, size=lambda arguments, result: 10, most=most), calls


def test_what_was_used_last_is_remembered():
    remembered, calls = squares(80)
    for number in range(8):
        remembered(number)
    assert remembered(0) == 0 and remembered(8) == 64  # 8 takes the place of 1, used longest ago
    assert calls == list(range(9)) and remembered.bytes == 80
    assert remembered(0) == 0 and calls == list(range(9))
    assert remembered(1) == 1 and calls == [*range(9), 1]


def test_what_is_raised_and_what_is_large_are_not_remembered():
    def fails(number):
        calls.append(number)
        if number < 0:
            raise ValueError(number)
        return number

    calls = []
    remembered = Remembered(fails, size=lambda arguments, result: result, most=80)
    for _ in range(2):
        with pytest.raises(ValueError):
            remembered(-1)
        assert remembered(11) == 11 and remembered(10) == 10
    assert calls == [-1, 11, 10, -1, 11] and remembered.bytes == 10


@given(st.lists(st.integers(0, 30)))
def test_it_is_the_function_within_its_bound(numbers):
    remembered, _ = squares(100)
    for number in numbers:
        assert remembered(number) == number**2
        assert remembered.bytes <= 100


def test_an_encoder_holds_no_more_than_its_bounds(monkeypatch):
    """Texts of many lengths, none of them twice: what a server sees."""
    monkeypatch.setattr("data_pipeline.encode._PIECES", 40_000)
    monkeypatch.setattr("data_pipeline.chat_template._RENDERINGS", 40_000)
    encoder = Encoder.load(tiny.tokenizer_directory())
    fresh = Encoder.load(tiny.tokenizer_directory())
    for number in range(40):
        messages = [{"role": "user", "content": f"{number} " * (1 + 37 * number % 400)}]
        assert encoder.prompt(messages) == fresh.prompt(messages)
        assert encoder._piece.bytes <= 40_000 and encoder._template._cached.bytes <= 40_000
    assert encoder._piece.bytes > 0 and encoder._template._cached.bytes > 0
