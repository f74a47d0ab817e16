"""Search over tokens: cached, forked, dropped and packed values equal those of whole sequences, and no token of a tree
is computed twice while its state is cached."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm.errors import UserError
from jaxprm.model.prefix_bank import PrefixBank, Shapes
from jaxprm.scoring.engine import Engine
from tests.model import tiny

STATE = tiny.reward_model()
LONGEST, REST = 120, 12
# One length of each kind, so that little is compiled: continuations share rows of 30 tokens, growth takes two chunks.
SHAPES = Shapes(growth=(16,), packed=(30,), ring_width=REST, lengths=(LONGEST,))
# Bytes of keys and values: layers, kv heads, head dim, float32, and the tokens a slot has room for.
SLOT = 2 * 3 * 2 * 12 * 4 * (LONGEST + 16 + REST + 30)


def new_engine(slots: int = 24, **options) -> Engine:
    return Engine(tiny.CONFIG, STATE, rows=4, max_tokens=LONGEST, shapes=SHAPES, cache_bytes=slots * SLOT, **options)


def tokens_of(rng, length: int) -> np.ndarray:
    return rng.integers(0, tiny.CONFIG.vocab_size, size=length).astype(np.int32)


def uncached(jobs) -> list[np.ndarray]:
    """Values of continuations from a forward pass over whole sequences, padded to one shape."""
    values = []
    for start in range(0, len(jobs), 8):
        rows, segments = np.zeros((2, 8, LONGEST), np.int32)
        for row, job in enumerate(jobs[start : start + 8]):
            tokens = np.concatenate(job)
            rows[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
        of_rows = tiny.values(STATE, rows, segments=segments)
        values += [of_rows[row, len(p) : len(p) + len(r)] for row, (p, r) in enumerate(jobs[start : start + 8])]
    return values


def search(engine: Engine, seed: int, rounds: int = 4) -> list[tuple]:
    """(jobs, values) of each round of a search that forks old states, drops others and shuffles the jobs."""
    rng = np.random.default_rng(seed)
    states = [tokens_of(rng, rng.integers(0, 40)) for _ in range(2)]
    rounds_searched = []
    for _ in range(rounds):
        parents = [states[index] for index in rng.integers(max(0, len(states) - 5), len(states), size=4)]
        jobs = [
            (state, tokens_of(rng, rng.integers(1, REST + 1))) for state in parents for _ in range(rng.integers(1, 5))
        ]
        jobs = [jobs[index] for index in rng.permutation(len(jobs))]
        rounds_searched.append((jobs, engine.score_continuations(jobs)))
        for prefix, continuation in jobs[:4]:
            grown = np.concatenate([prefix, continuation, tokens_of(rng, rng.integers(0, 25))])
            states.append(grown[: LONGEST - REST])
    return rounds_searched


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), slots=st.sampled_from([2, 5, 24]))
def test_cached_equals_uncached_for_any_tree_order_fork_eviction_and_packing(seed, slots):
    engine = new_engine(slots)
    for jobs, values in search(engine, seed):
        for ours, reference in zip(values, uncached(jobs), strict=True):
            tiny.assert_close(ours, reference)
    if slots == 2:
        assert engine.usage.recomputed_tokens > 0


def test_every_token_of_a_tree_is_encoded_once():
    """Three rounds after a prompt of 20 tokens: 4 candidates of 10 a state, two of which get an observation of 7."""
    rng, engine = np.random.default_rng(1), new_engine()
    states, least = [tokens_of(rng, 20)], 20
    for _ in range(3):
        jobs = [(state, tokens_of(rng, 10)) for state in states for _ in range(4)]
        engine.score_continuations(jobs)
        least += 10 * len(jobs)
        assert engine.usage.encoded_tokens == least
        states = [np.concatenate([*jobs[at], tokens_of(rng, 7)]) for at in (1, len(jobs) - 1)]
        least += 7 * len(states)
    engine.score_continuations([(state, tokens_of(rng, 1)) for state in states])
    assert engine.usage.encoded_tokens == least + 2
    assert engine.usage.recomputed_tokens == 0


def test_padding_is_counted():
    engine, rng = new_engine(), np.random.default_rng(2)
    engine.score_continuations([(tokens_of(rng, 20), tokens_of(rng, 5))])
    # 20 tokens in two chunks of 16, and 5 in a row of 30; one row each.
    assert (engine.usage.encoded_tokens, engine.usage.padded_tokens) == (25, 2 * 16 + 30)


def test_what_was_dropped_is_encoded_again_and_counted():
    engine, rng = new_engine(2), np.random.default_rng(3)
    states = [tokens_of(rng, 10 + number) for number in range(3)]
    for state in (*states, states[0]):
        engine.score_continuations([(state, tokens_of(rng, 2))])
    assert engine.usage.encoded_tokens == 10 + 11 + 12 + 10 + 4 * 2
    assert engine.usage.recomputed_tokens == 10


def test_the_record_of_dropped_prefixes_is_bounded(monkeypatch):
    monkeypatch.setattr("jaxprm.model.prefix_bank.MAX_DROPPED_PREFIXES", 3)
    engine, rng = new_engine(2), np.random.default_rng(3)
    states = [tokens_of(rng, 10 + number % 4) for number in range(9)]
    for state in states:
        engine.score_continuations([(state, tokens_of(rng, 2))])
    bank = engine._bank
    assert len(bank._dropped_order) == sum(map(len, bank._dropped.values())) == 3
    engine.score_continuations([(states[0], tokens_of(rng, 2))])  # dropped long ago
    assert engine.usage.recomputed_tokens == 0
    engine.score_continuations([(states[7], tokens_of(rng, 2))])
    assert engine.usage.recomputed_tokens == len(states[7])


def test_a_continuation_without_a_prefix_is_cached():
    """Also if calls without a prefix have their own compiled shape."""
    shapes, rng = SHAPES._replace(lengths=(0, LONGEST)), np.random.default_rng(7)
    engine = Engine(tiny.CONFIG, STATE, rows=4, max_tokens=LONGEST, shapes=shapes)
    nothing, first = np.zeros(0, np.int32), tokens_of(rng, 6)
    jobs = [(np.concatenate([first, tokens_of(rng, 3)]), tokens_of(rng, 4))]
    tiny.assert_close(engine.score_continuations([(nothing, first)])[0], uncached([(nothing, first)])[0])
    tiny.assert_close(engine.score_continuations(jobs)[0], uncached(jobs)[0])


@pytest.mark.parametrize("broken", ["offset", "row"])
def test_a_wrong_position_in_the_ring_moves_the_score(monkeypatch, broken):
    """The comparisons above would fail."""
    keep = PrefixBank.keep

    def wrong(bank, slot, kept):
        keep(bank, slot, kept._replace(**{broken: (getattr(kept, broken) + 1) % 4}))

    rng = np.random.default_rng(4)
    prompts = [tokens_of(rng, 20) for _ in range(4)]  # all rows of one call
    jobs = [(prompt, tokens_of(rng, 10)) for prompt in prompts for _ in range(2)]
    later = [(np.append(np.concatenate(jobs[at]), [3, 4]).astype(np.int32), tokens_of(rng, 4)) for at in (0, 2, 4, 6)]
    expected = uncached(later)
    monkeypatch.setattr(PrefixBank, "keep", wrong)
    engine = new_engine()
    engine.score_continuations(jobs)
    moved = [
        np.abs(ours - right).max() for ours, right in zip(engine.score_continuations(later), expected, strict=True)
    ]
    assert min(moved) > 1e-2


def test_after_the_warm_up_nothing_compiles():
    engine = new_engine()
    engine.warm_up(LONGEST)
    usage = engine.usage
    with tiny.compilations() as seen:
        search(engine, 5)
    assert seen == []
    assert usage.encoded_tokens == 0


@pytest.mark.slow
def test_in_bfloat16_the_cache_changes_scores_by_rounding_alone():
    rounded, exact, unrounded = [], [], []
    for jobs, values in search(new_engine(dtype="bfloat16"), 6):
        rounded += [v[-1] for v in values]
        exact += [v[-1] for v in uncached(jobs)]
    rounded_engine = new_engine(dtype="bfloat16")
    for jobs, _ in search(new_engine(), 6):
        unrounded += [v[-1] for v in rounded_engine.score_full([np.concatenate(job) for job in jobs], [""] * len(jobs))]
    spread = np.std(exact)
    assert spread > 0.3
    assert np.abs(np.subtract(rounded, unrounded)).max() < 0.1 * spread
    assert 1e-5 < np.abs(np.subtract(rounded, exact)).max() < 0.15 * spread


def test_a_cache_too_small_for_two_conversations_is_refused():
    with pytest.raises(UserError, match=r"cache_bytes = 1000: two conversations of 120 tokens take \d+; raise it"):
        Engine(tiny.CONFIG, STATE, rows=4, max_tokens=LONGEST, shapes=SHAPES, cache_bytes=1000).score_continuations(
            [(np.zeros(1, np.int32), np.ones(1, np.int32))]
        )


def test_after_forget_a_search_gives_the_same_bits_and_adds_to_the_counts():
    """A search must have the same cost and result whatever the model has scored before."""
    engine = new_engine()
    first = search(engine, seed=3)
    once = engine.usage
    engine.forget()
    assert engine.usage == once
    with tiny.compilations() as compiled:
        second = search(engine, seed=3)
    assert not compiled
    assert engine.usage == once.plus(once) and once.encoded_tokens > 100
    for (_, expected), (_, again) in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))
