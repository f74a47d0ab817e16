"""Packed rows, candidates after a prefix, and decoding: one forward pass with three masks gives equal values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprm.model.transformer import Cache, reward_model_graph
from tests.model import tiny

STATE = tiny.reward_model()
GRAPH = reward_model_graph(tiny.CONFIG)
RNG = np.random.default_rng(5)
LENGTHS = (17, 9, 23)
SEQUENCES = [RNG.integers(0, tiny.CONFIG.vocab_size, size=length) for length in LENGTHS]
WIDTH, CHUNK, CAPACITY = 64, 24, 64


def alone(tokens) -> np.ndarray:
    """Values of one sequence in a row by itself, without padding."""
    return tiny.values(STATE, np.asarray(tokens)[None])[0]


@pytest.fixture(scope="module")
def references() -> list[np.ndarray]:
    return [alone(tokens) for tokens in SEQUENCES]


def packed(sequences) -> dict[str, np.ndarray]:
    """One row [1, WIDTH] of all sequences, padded with token 3: the id of a padding token must not matter."""
    row = {name: np.zeros((1, WIDTH), np.int32) for name in ("tokens", "positions", "segments")}
    row["tokens"][:] = 3
    used = 0
    for number, tokens in enumerate(sequences):
        place = (0, slice(used, used + len(tokens)))
        row["tokens"][place], row["positions"][place] = tokens, np.arange(len(tokens))
        row["segments"][place] = number + 1
        used += len(tokens)
    return row


@jax.jit
def after(caches: tuple[Cache, ...], tokens, positions, segments):
    """Values of new tokens after the caches, and the last cache with the tokens of segment 1 appended."""
    model = nnx.merge(GRAPH, STATE)
    output = model.transformer(tokens, positions, segments, caches)
    return model.value(output.hidden), caches[-1].append(output.keys, output.values, (segments == 1).sum(-1))


def chunk(parts, starts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [3, CHUNK] of tokens that begin at positions `starts`, filled up with token 7 as padding."""
    tokens, segments = np.full((3, CHUNK), 7, np.int32), np.zeros((3, CHUNK), np.int32)
    for row, part in enumerate(parts):
        tokens[row, : len(part)], segments[row, : len(part)] = part, 1
    return tokens, np.asarray(starts)[:, None] + np.arange(CHUNK), segments


def filled(prefixes) -> Cache:
    """A cache of prefixes of different lengths."""
    return after((Cache.empty(tiny.CONFIG, 3, CAPACITY),), *chunk(prefixes, [0, 0, 0]))[1]


def test_the_values_of_the_test_model_vary(references):
    assert np.concatenate(references).std() > 0.3


def test_packed_padded_and_alone_are_equal(references):
    together = tiny.values(STATE, **packed(SEQUENCES))[0]
    tiny.assert_close(together[: sum(LENGTHS)], np.concatenate(references))
    for tokens, reference in zip(SEQUENCES, references, strict=True):
        tiny.assert_close(tiny.values(STATE, **packed([tokens]))[0, : len(tokens)], reference)


def test_the_order_of_rows_and_neighbours_does_not_matter(references):
    orders = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
    rows = [packed([SEQUENCES[index] for index in order]) for order in orders]
    values = tiny.values(STATE, **{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    for row, order in zip(values, orders, strict=True):
        tiny.assert_close(row[: sum(LENGTHS)], np.concatenate([references[index] for index in order]))


def test_reading_a_neighbour_changes_the_values():
    row = packed(SEQUENCES)
    broken = row | {"segments": np.minimum(row["segments"], 1)}
    moved = np.abs(tiny.values(STATE, **broken) - tiny.values(STATE, **row))[0]
    assert moved[: LENGTHS[0]].max() == 0
    assert moved[sum(LENGTHS[:2]) - 1] > 1e-2
    assert moved[sum(LENGTHS) - 1] > 1e-2


@pytest.mark.parametrize("at", [2, 8, 15])
def test_a_wrong_position_changes_the_value(references, at):
    positions = np.arange(LENGTHS[0])[None]
    positions[0, at] += 1
    values = tiny.values(STATE, SEQUENCES[0][None], positions=positions)[0]
    assert np.abs(values[-1] - references[0][-1]) > 1e-2


def test_only_distances_between_positions_matter(references):
    values = tiny.values(STATE, SEQUENCES[0][None], positions=np.arange(LENGTHS[0])[None] + 40)[0]
    np.testing.assert_allclose(values, references[0], atol=1e-4)


def test_a_token_reads_nothing_after_it(references):
    changed = SEQUENCES[2].copy()
    changed[12] = (changed[12] + 1) % tiny.CONFIG.vocab_size
    values = alone(changed)
    np.testing.assert_array_equal(values[:12], references[2][:12])
    assert np.abs(values[12:] - references[2][12:]).min() > 1e-4


def test_decoding_token_by_token_equals_one_pass(references):
    cache = Cache.empty(tiny.CONFIG, 1, 32)
    decoded = []
    for position, token in enumerate(SEQUENCES[2]):
        ones = np.ones((1, 1), np.int32)
        value, cache = after((cache,), ones * token, ones * position, ones)
        decoded.append(float(value[0, 0]))
    assert cache.lengths.tolist() == [LENGTHS[2]]
    tiny.assert_close(decoded, references[2])


@pytest.fixture(scope="module")
def candidates():
    """After each of three prefixes two packed candidates of 5 and 4 tokens, with padding between and after them."""
    tokens, offsets, segments = chunk([RNG.integers(0, tiny.CONFIG.vocab_size, size=CHUNK)] * 3, [0, 0, 0])
    segments[:] = [1] * 5 + [0] * 2 + [2] * 4 + [0] * (CHUNK - 11)
    offsets[:, 7:] -= 7
    return tokens, offsets + np.array(LENGTHS)[:, None], segments


def test_candidates_after_a_cached_prefix_equal_full_sequences(candidates):
    tokens, _, segments = candidates
    values, _ = after((filled(SEQUENCES),), *candidates)
    for row, prefix in enumerate(SEQUENCES):
        for number in (1, 2):
            own = segments[row] == number
            whole = packed([np.concatenate([prefix, tokens[row, own]])])
            reference = tiny.values(STATE, **whole)[0, len(prefix) : len(prefix) + own.sum()]
            tiny.assert_close(np.asarray(values)[row, own], reference)


@pytest.mark.parametrize("broken", ["neighbour", "position", "prefix"])
def test_a_candidate_with_a_wrong_mask_or_position_has_other_values(candidates, broken):
    tokens, positions, segments = candidates
    cache = filled(SEQUENCES)
    right, _ = after((cache,), tokens, positions, segments)
    if broken == "neighbour":
        segments = np.where(segments == 2, 1, segments)
    elif broken == "position":
        positions = positions + 1
    else:
        cache = cache._replace(lengths=cache.lengths - 1)
    wrong, _ = after((cache,), tokens, positions, segments)
    moved = np.abs(np.asarray(wrong) - np.asarray(right))[:, 7:11]
    assert (moved.max(axis=-1) > 1e-2).all()


def test_a_cached_row_serves_several_rows_with_different_turns(references):
    """Six rows after three shared prefixes and a turn each equal six rows with every prefix copied."""
    prefix, twice = filled([tokens[:5] for tokens in SEQUENCES]), np.repeat(np.arange(3), 2)
    copied = jax.tree.map(lambda leaf: leaf[twice], prefix)
    tokens, positions, segments = chunk([tokens[5:8] for tokens in SEQUENCES], [5, 5, 5])
    tokens = np.concatenate([tokens, tokens[:, ::-1]]).reshape(2, 3, CHUNK).swapaxes(0, 1).reshape(6, CHUNK)
    rows = (tokens, positions[twice], segments[twice])
    shared, turn = after((prefix, Cache.empty(tiny.CONFIG, 6, CAPACITY)), *rows)
    expected, _ = after((copied, Cache.empty(tiny.CONFIG, 6, CAPACITY)), *rows)
    tiny.assert_close(np.asarray(shared)[:, :3], np.asarray(expected)[:, :3])
    more = (tokens[:, ::-1], rows[1] + 3, rows[2])
    tiny.assert_close(*(np.asarray(after((cache, turn), *more)[0])[:, :3] for cache in (prefix, copied)))
    for row, reference in enumerate(references):
        tiny.assert_close(shared[2 * row, :3], reference[5:8])
    other = jax.tree.map(lambda leaf: leaf[::-1], prefix)
    wrong, _ = after((other, Cache.empty(tiny.CONFIG, 6, CAPACITY)), *rows)
    assert np.abs(np.asarray(wrong) - np.asarray(shared))[[0, 1, 4, 5], :3].max(axis=-1).min() > 1e-2


def test_a_prefix_and_a_turn_in_two_caches_equal_one_pass(references):
    prefix = filled([tokens[:5] for tokens in SEQUENCES])
    middle = chunk([tokens[5:8] for tokens in SEQUENCES], [5, 5, 5])
    empty = Cache.empty(tiny.CONFIG, 3, CAPACITY)
    values, turn = after((prefix, empty), *middle)
    assert turn.lengths.tolist() == [3, 3, 3]
    rest, _ = after((prefix, turn), *chunk([tokens[8:] for tokens in SEQUENCES], [8, 8, 8]))
    for row, reference in enumerate(references):
        tiny.assert_close(values[row, :3], reference[5:8])
        tiny.assert_close(rest[row, : len(reference) - 8], reference[8:])


def test_append_keeps_counted_tokens_and_overwrites_the_others():
    shape = (2, tiny.CONFIG.kv_heads, 3, tiny.CONFIG.head_dim)
    layers = range(tiny.CONFIG.layers)
    first, second = (tuple(jnp.full(shape, value + layer) for layer in layers) for value in (10.0, 20.0))
    cache = Cache.empty(tiny.CONFIG, 2, 8).append(first, first, jnp.array([1, 3]))
    cache = cache.append(second, second, jnp.array([2, 2]))
    assert cache.lengths.tolist() == [3, 5]
    for layer in layers:
        for held in (cache.keys[layer][:, 0, 0, :] - layer, cache.values[layer][:, 0, :, 0] - layer):
            np.testing.assert_array_equal(held[0, :3], [10, 20, 20])
            np.testing.assert_array_equal(held[1, :5], [10, 10, 10, 20, 20])


def test_reading_at_positions_equals_indexing_the_values(references):
    row, reads = packed(SEQUENCES), np.array([[16, 20, 25, 48, 0]])
    values = jax.jit(lambda: nnx.merge(GRAPH, STATE)(row["tokens"], row["positions"], row["segments"], reads))()
    tiny.assert_close(values[0], np.concatenate(references)[reads[0]])
