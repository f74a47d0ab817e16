"""The cache is bounded in bytes, and its results are those of the function."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.caching import ByteLRU
from data_pipeline.encode import Encoder
from tests.model import tiny


def cached_square(max_bytes: int):
    calls = []

    def square(number):
        calls.append(number)
        return number**2

    return ByteLRU(square, size=lambda arguments, result: 10, max_bytes=max_bytes), calls


def test_the_least_recently_used_result_is_evicted():
    square, calls = cached_square(80)
    for number in range(8):
        square(number)
    assert square(0) == 0 and square(8) == 64  # 8 evicts 1, used longest ago
    assert calls == list(range(9)) and square.bytes == 80
    assert square(0) == 0 and calls == list(range(9))
    assert square(1) == 1 and calls == [*range(9), 1]


def test_exceptions_and_large_results_are_not_kept():
    def fails(number):
        calls.append(number)
        if number < 0:
            raise ValueError(number)
        return number

    calls = []
    kept = ByteLRU(fails, size=lambda arguments, result: result, max_bytes=80)
    for _ in range(2):
        with pytest.raises(ValueError):
            kept(-1)
        assert kept(11) == 11 and kept(10) == 10
    assert calls == [-1, 11, 10, -1, 11] and kept.bytes == 10


@given(st.lists(st.integers(0, 30)))
def test_results_are_those_of_the_function_within_the_bound(numbers):
    square, _ = cached_square(100)
    for number in numbers:
        assert square(number) == number**2
        assert square.bytes <= 100


def test_threads_share_a_cache():
    square, _ = cached_square(100)
    numbers = [number % 30 for number in range(2000)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(square, numbers)) == [number**2 for number in numbers]
    assert square.bytes <= 100


def test_an_encoder_holds_no_more_than_its_bounds(monkeypatch):
    """Texts of many lengths, none of them twice: what a server sees."""
    monkeypatch.setattr("data_pipeline.encode._MAX_PIECE_BYTES", 40_000)
    monkeypatch.setattr("data_pipeline.chat_template._MAX_RENDERING_BYTES", 40_000)
    encoder = Encoder.load(tiny.tokenizer_directory())
    fresh = Encoder.load(tiny.tokenizer_directory())
    for number in range(40):
        messages = [{"role": "user", "content": f"{number} " * (1 + 37 * number % 400)}]
        assert encoder.prompt(messages) == fresh.prompt(messages)
        assert encoder._piece.bytes <= 40_000 and encoder._template._cached.bytes <= 40_000
    assert encoder._piece.bytes > 0 and encoder._template._cached.bytes > 0
