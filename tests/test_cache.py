"""Slots of the cache: each beam finds its own past; slots that are in no beam's past are free."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.cache import DecoderCache, LayerCache

B, N, H, S = 2, 2, 3, 4
K, T = 3, 12


def empty(num_slots):
    cross = jnp.ones((B, S, N, H))
    layer = LayerCache.init(cross, cross, num_slots=num_slots)
    return DecoderCache.init((layer,), jnp.ones((B, 1, 1, S), bool), beam_size=K)


@jax.jit
def step(cache, written):
    """Let every beam write one number, as key and value of all heads."""
    cache, slots = cache.begin_position()
    key = jnp.broadcast_to(written[:, :, None, None], (B, K, N, H))
    layer = cache.layers[0].write(key, -key, slots)
    return cache.replace(layers=(layer,), index=cache.index + 1)


def pasts(cache):
    """What each beam sees: [B][K] sets of numbers."""
    keys, values = (np.asarray(x) for x in cache.layers[0].self_key_value())
    np.testing.assert_array_equal(keys, np.broadcast_to(keys[:, :, :1, :1], keys.shape))
    np.testing.assert_array_equal(values, -keys)
    numbers, past = keys[:, :, 0, 0], np.asarray(cache.past)
    for row in range(B):
        assert past[row].sum(axis=1).tolist() == [cache.index[row]] * K
    return [[set(numbers[row, past[row, beam]].tolist()) for beam in range(K)] for row in range(B)]


@functools.cache
def histories(seed):
    """For each of T steps: the beams to continue, numbers written, what each beam should see."""
    draw = np.random.default_rng(seed)
    sees, steps = [[frozenset()] * K for _ in range(B)], []
    for index in range(T):
        beams = draw.integers(0, K, (B, K))
        beams[1, draw.integers(K)] = 0  # the second sentence's beams share more
        written = np.float32(1 + index * B * K) + np.arange(B * K, dtype=np.float32).reshape(B, K)
        sees = [
            [sees[row][beams[row, beam]] | {float(written[row, beam])} for beam in range(K)]
            for row in range(B)
        ]
        steps.append((jnp.asarray(beams, jnp.int32), jnp.asarray(written), sees))
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_every_beam_sees_its_own_past_and_nothing_else(seed):
    cache = empty(K * T)
    for beams, written, sees in histories(seed):
        assert not cache.is_full.any()
        cache = step(cache.reorder(beams), written)
        assert pasts(cache) == sees


@pytest.mark.parametrize("seed", range(5))
def test_a_cache_of_few_slots_is_full_when_so_many_are_in_some_past(seed):
    num_slots, full = K * 4, np.zeros(B, bool)
    cache = empty(num_slots)
    for beams, written, sees in histories(seed):
        cache = cache.reorder(beams)
        living = [set().union(*(sees[row][beam] for beam in range(K))) for row in range(B)]
        before = np.array([len(some) - K for some in living])  # without what is written now
        full |= before + K > num_slots
        np.testing.assert_array_equal(cache.is_full, full)
        if full.any():
            break
        cache = step(cache, written)
        assert pasts(cache) == sees


def test_a_full_cache_loses_what_is_new_and_keeps_what_is_old():
    cache = empty(K)
    first = step(cache, np.arange(B * K, dtype=np.float32).reshape(B, K))
    assert first.is_full.all()
    second = step(first, np.full((B, K), 99, np.float32))
    np.testing.assert_array_equal(second.layers[0].self_key, first.layers[0].self_key)
    np.testing.assert_array_equal(second.past, first.past)


def test_a_sentence_that_takes_a_row_has_what_it_has_written_and_no_other_slot():
    cache = step(empty(K * T), jnp.ones((B, K), jnp.float32))
    begun = step(empty(K), jnp.arange(5, 5 + B * K, dtype=jnp.float32).reshape(B, K))
    cache = cache.put(jnp.array([1, B]), begun)  # the second is left out
    assert cache.index.tolist() == [1, 1]
    assert cache.past.sum(axis=(1, 2)).tolist() == [K, K]
    assert pasts(cache) == [[{1.0}] * K, [{5.0}, {6.0}, {7.0}]]


def test_a_sentence_of_which_nothing_is_written_takes_a_row():
    cache = step(empty(K * T), jnp.ones((B, K), jnp.float32))
    cache = cache.put(jnp.array([1]), jax.tree.map(lambda leaf: leaf[:1], empty(0)))
    assert cache.index.tolist() == [1, 0]
    assert cache.past.any(axis=(1, 2)).tolist() == [True, False]
