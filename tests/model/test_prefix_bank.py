"""The prefix bank: what is found again equals what would be computed, whatever was forked, dropped or cut in chunks."""

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
# One shape for all tests, since each is compiled: six slots, which three prefixes at a time keep evicting.
SLOTS, CAPACITY, ROWS, REST = 6, 340, 2, 8


def new_bank(slots: int = SLOTS) -> PrefixBank:
    return PrefixBank(BACKBONE, STATE["transformer"], tiny.CONFIG, slots=slots, capacity=CAPACITY, rows=ROWS)


def random_tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tiny.CONFIG.vocab_size, size=length).astype(np.int32)


def values_after(bank: PrefixBank, prefixes, rests) -> np.ndarray:
    """Values [N, REST] of one rest of REST tokens after each prefix, with the bank, in rows of three."""
    slots = bank.allocate(prefixes)
    padding = [(0, 3 - len(prefixes))]
    lengths = np.pad(np.array([len(prefix) for prefix in prefixes], np.int32), padding)
    tokens = np.pad(np.stack(rests), [*padding, (0, 0)])
    positions = np.broadcast_to(np.arange(REST, dtype=np.int32), tokens.shape)
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


def uncached(prefixes, rests) -> np.ndarray:
    """The same by one forward pass over every whole sequence, padded to one length."""
    rows, segments = np.zeros((2, 3, CAPACITY + REST), np.int32)
    for row, tokens in enumerate(map(np.concatenate, zip(prefixes, rests, strict=True))):
        rows[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    values = tiny.values(STATE, rows, segments=segments)
    return np.stack([values[row, len(prefix) : len(prefix) + REST] for row, prefix in enumerate(prefixes)])


@st.composite
def searches(draw) -> list[list[np.ndarray]]:
    """Rounds of one to three prefixes, each a fork or an extension of one placed before, or new."""
    known, rounds = [np.empty(0, np.int32)], []
    for _ in range(draw(st.integers(2, 5))):
        prefixes = []
        for _ in range(draw(st.integers(1, 3))):
            parent = draw(st.sampled_from(known))
            parent = parent[: draw(st.sampled_from([len(parent), len(parent) // 2]))]
            growth = draw(st.sampled_from([0, 1, 30, 64, 65, 150, 300]))
            tokens = np.concatenate([parent, random_tokens(draw(st.integers(0, 9)), growth)])[:CAPACITY]
            prefixes.append(tokens.astype(np.int32))
        known.extend(prefixes)
        rounds.append(prefixes)
    return rounds


@settings(max_examples=10, deadline=None, derandomize=True)
@given(searches())
def test_cached_equals_uncached_for_trees_forks_evictions_and_chunks(rounds):
    bank = new_bank()
    for number, prefixes in enumerate(rounds):
        rests = [random_tokens(100 + number, REST) for _ in prefixes]
        tiny.assert_close(values_after(bank, prefixes, rests), uncached(prefixes, rests))


def test_only_what_is_new_is_encoded_and_counted():
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


def test_the_prefix_used_longest_ago_is_dropped_and_encoded_again():
    bank = new_bank()
    prefixes = [random_tokens(seed, 20) for seed in range(SLOTS + 1)]
    for prefix in prefixes[:SLOTS]:
        bank.allocate([prefix])
    bank.allocate([prefixes[0]])
    bank.allocate([prefixes[SLOTS]])  # takes the place of prefixes[1]
    encoded = bank.tokens_encoded
    for kept in (0, *range(2, SLOTS + 1)):
        bank.allocate([prefixes[kept]])
    assert bank.tokens_encoded == encoded
    bank.allocate([prefixes[1]])
    assert bank.tokens_encoded == encoded + 20


def test_a_prefix_longer_than_the_bank_is_refused_and_leaves_it_whole():
    bank = new_bank()
    known = random_tokens(1, 50)
    bank.allocate([known])
    with pytest.raises(UserError, match=f"{CAPACITY + 1} tokens is longer than the cache of {CAPACITY}"):
        bank.allocate([random_tokens(2, 30), random_tokens(3, CAPACITY + 1)])
    rests = [random_tokens(9, REST)] * 2
    prefixes = [known, random_tokens(2, 30)]
    tiny.assert_close(values_after(bank, prefixes, rests), uncached(prefixes, rests))


def test_twice_as_many_slots_as_prefixes_are_enough_and_fewer_are_refused_in_words():
    grown = [np.append(random_tokens(seed, 10), seed).astype(np.int32) for seed in range(3)]
    bank = new_bank(SLOTS)
    bank.allocate([prefix[:-1] for prefix in grown])
    bank.allocate(grown)
    with pytest.raises(UserError, match="2 slots, too few for 3 prefixes"):
        new_bank(2).allocate(grown)


def test_a_slot_of_another_prefix_moves_the_score():
    """The comparisons above would see a wrong slot."""
    bank, rests = new_bank(), [random_tokens(9, REST)] * 2
    prefixes = [random_tokens(1, 40), random_tokens(2, 40)]
    right = values_after(bank, prefixes, rests)
    bank.allocate = lambda prefixes: PrefixBank.allocate(bank, prefixes)[::-1]
    assert np.abs(values_after(bank, prefixes, rests) - right).min() > 1e-2


def test_chunks_have_the_shape_that_they_fill_best():
    bank = PrefixBank(BACKBONE, STATE["transformer"], tiny.CONFIG, slots=18, capacity=CAPACITY, rows=8)
    assert bank.shapes.growth == (8, 64, 256)
    bank.allocate([random_tokens(1, 300)])  # one of 256, the rest of 44
    assert bank.tokens_padded == 256 + 64
    before = bank.tokens_padded
    # One of them is too long for the middle chunk: its rest follows, and the others do not take the wide one for it.
    bank.allocate([random_tokens(seed, 70 if seed == 2 else 50) for seed in range(2, 10)])
    assert bank.tokens_padded - before == 8 * 64 + 8


def test_a_call_has_few_rows_where_calls_of_few_cost_less():
    # Of 32 rows of 32 tokens, 1088 with what a call costs; of 4 rows, 192 each.
    assert [call_rows(count, 32, 32) for count in (1, 4, 9, 20, 21, 32, 50)] == [4, 4, 4, 4, 32, 32, 32]
    # Three calls of one row cost 384, one of four 320.
    assert [call_rows(count, 4, 64) for count in (1, 2, 3, 4)] == [1, 1, 4, 4]
    assert [equal_work_rows(width, (8, 64, 256), 32) for width in (8, 64, 256)] == [32, 32, 8]
