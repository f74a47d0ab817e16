"""The prefix bank: cached values equal computed ones after forks, evictions and chunked encoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import PrefixBank, call_rows, equal_work_rows
from jaxprm.model.transformer import reward_model_graph, transformer_graph
from jaxprm.scoring.engine import _values_after
from tests.model import tiny

STATE = tiny.reward_model()
GRAPH = reward_model_graph(tiny.CONFIG)
BACKBONE = transformer_graph(tiny.CONFIG)
# One shape for all tests, since each is compiled. Three prefixes at a time keep evicting from six slots.
SLOTS, CAPACITY, ROWS, CONTINUATION = 6, 340, 2, 8


def new_bank(slots: int = SLOTS) -> PrefixBank:
    return PrefixBank(BACKBONE, STATE["transformer"], tiny.CONFIG, slots=slots, capacity=CAPACITY, rows=ROWS)


def random_tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.CONFIG.vocab_size, size=length).astype(np.int32)


def values_after(bank: PrefixBank, prefixes, continuations) -> np.ndarray:
    """Values [N, CONTINUATION] of a continuation after each prefix, with the bank, in a batch of three rows."""
    slots = bank.allocate(prefixes)
    padding = [(0, 3 - len(prefixes))]
    lengths = np.pad(np.array([len(prefix) for prefix in prefixes], np.int32), padding)
    tokens = np.pad(np.stack(continuations), [*padding, (0, 0)])
    positions = np.broadcast_to(np.arange(CONTINUATION, dtype=np.int32), tokens.shape)
    values, _ = _values_after(
        GRAPH,
        STATE,
        bank.bank,
        None,
        None,
        np.pad(slots, padding),
        lengths,
        tokens,
        positions,
        np.ones_like(tokens),
        capacity=CAPACITY,
    )
    return np.asarray(values)[: len(prefixes)]


def uncached(prefixes, continuations) -> np.ndarray:
    """The same by a forward pass over the full sequences, padded to one length."""
    rows, segments = np.zeros((2, 3, CAPACITY + CONTINUATION), np.int32)
    for row, tokens in enumerate(map(np.concatenate, zip(prefixes, continuations, strict=True))):
        rows[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    values = tiny.values(STATE, rows, segments=segments)
    return np.stack([values[row, len(prefix) : len(prefix) + CONTINUATION] for row, prefix in enumerate(prefixes)])


@st.composite
def searches(draw) -> list[list[np.ndarray]]:
    """Rounds of one to three prefixes, each new, or a fork or an extension of an earlier one."""
    earlier, rounds = [np.empty(0, np.int32)], []
    for _ in range(draw(st.integers(2, 5))):
        prefixes = []
        for _ in range(draw(st.integers(1, 3))):
            parent = draw(st.sampled_from(earlier))
            parent = parent[: draw(st.sampled_from([len(parent), len(parent) // 2]))]
            growth = draw(st.sampled_from([0, 1, 30, 64, 65, 150, 300]))
            tokens = np.concatenate([parent, random_tokens(draw(st.integers(0, 9)), growth)])[:CAPACITY]
            prefixes.append(tokens.astype(np.int32))
        earlier.extend(prefixes)
        rounds.append(prefixes)
    return rounds


@settings(max_examples=10, deadline=None, derandomize=True)
@given(searches())
def test_cached_equals_uncached_for_trees_forks_evictions_and_chunks(rounds):
    bank = new_bank()
    for number, prefixes in enumerate(rounds):
        continuations = [random_tokens(100 + number, CONTINUATION) for _ in prefixes]
        tiny.assert_close(values_after(bank, prefixes, continuations), uncached(prefixes, continuations))


def test_only_new_tokens_are_encoded_and_counted():
    bank = new_bank()
    prompt = random_tokens(1, 100)
    left, right = np.append(prompt, 5).astype(np.int32), np.append(prompt, 6).astype(np.int32)
    bank.allocate([prompt])
    assert (bank.tokens_encoded, bank.tokens_reused) == (100, 0)
    slots = bank.allocate([left, right, left])
    assert (bank.tokens_encoded, bank.tokens_reused) == (102, 200)
    assert slots[0] == slots[2] != slots[1]
    bank.allocate([prompt])
    assert (bank.tokens_encoded, bank.tokens_reused) == (102, 300)


def test_the_least_recently_used_prefix_is_evicted_and_encoded_again():
    bank = new_bank()
    prefixes = [random_tokens(seed, 20) for seed in range(SLOTS + 1)]
    for prefix in prefixes[:SLOTS]:
        bank.allocate([prefix])
    bank.allocate([prefixes[0]])
    bank.allocate([prefixes[SLOTS]])  # evicts prefixes[1]
    encoded = bank.tokens_encoded
    for index in (0, *range(2, SLOTS + 1)):
        bank.allocate([prefixes[index]])
    assert bank.tokens_encoded == encoded
    bank.allocate([prefixes[1]])
    assert bank.tokens_encoded == encoded + 20


def test_a_prefix_longer_than_the_bank_is_refused_and_changes_nothing():
    bank = new_bank()
    stored = random_tokens(1, 50)
    bank.allocate([stored])
    with pytest.raises(UserError, match=f"{CAPACITY + 1} tokens is longer than the cache of {CAPACITY}"):
        bank.allocate([random_tokens(2, 30), random_tokens(3, CAPACITY + 1)])
    continuations = [random_tokens(9, CONTINUATION)] * 2
    prefixes = [stored, random_tokens(2, 30)]
    tiny.assert_close(values_after(bank, prefixes, continuations), uncached(prefixes, continuations))


def test_twice_as_many_slots_as_prefixes_are_enough_and_too_few_are_refused():
    grown = [np.append(random_tokens(seed, 10), seed).astype(np.int32) for seed in range(3)]
    bank = new_bank(SLOTS)
    bank.allocate([prefix[:-1] for prefix in grown])
    bank.allocate(grown)
    with pytest.raises(UserError, match="2 slots, too few for 3 prefixes"):
        new_bank(2).allocate(grown)


def test_a_wrong_slot_changes_the_values():
    """So the comparisons above would fail for a wrong slot."""
    bank, continuations = new_bank(), [random_tokens(9, CONTINUATION)] * 2
    prefixes = [random_tokens(1, 40), random_tokens(2, 40)]
    right = values_after(bank, prefixes, continuations)
    bank.allocate = lambda prefixes: PrefixBank.allocate(bank, prefixes)[::-1]
    assert np.abs(values_after(bank, prefixes, continuations) - right).min() > 1e-2


def test_calls_have_the_shape_that_the_prefixes_fill_best():
    bank = PrefixBank(BACKBONE, STATE["transformer"], tiny.CONFIG, slots=18, capacity=CAPACITY, rows=8)
    assert bank.shapes.growth == (8, 64, 256)
    bank.allocate([random_tokens(1, 300)])  # a chunk of 256, then 44 tokens
    assert bank.tokens_padded == 256 + 64
    before = bank.tokens_padded
    # One prefix is too long for the middle width: it needs a second call, and the others are not widened for it.
    bank.allocate([random_tokens(seed, 70 if seed == 2 else 50) for seed in range(2, 10)])
    assert bank.tokens_padded - before == 8 * 64 + 8


def test_a_call_is_small_if_small_calls_cost_less():
    # A call of 32 rows of 32 tokens costs 1088 with the overhead, one of 4 rows 192.
    assert [call_rows(count, 32, 32) for count in (1, 4, 9, 20, 21, 32, 50)] == [4, 4, 4, 4, 32, 32, 32]
    # Three calls of one row cost 384, one of four 320.
    assert [call_rows(count, 4, 64) for count in (1, 2, 3, 4)] == [1, 1, 4, 4]
    assert [equal_work_rows(width, (8, 64, 256), 32) for width in (8, 64, 256)] == [32, 32, 8]
