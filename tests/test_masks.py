"""Who may attend to whom, and where in its sentence a token stands."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import PAD_ID
from jaxformer.errors import UserError
from jaxformer.masks import SegmentMask, causal_mask, dense_mask, padding_mask, segment_mask
from jaxformer.positions import segment_positions, sinusoid


def test_padding_mask_hides_padding_keys_from_every_query():
    ids = jnp.array([[5, 1, 2, PAD_ID, PAD_ID], [7, 2, 3, 4, 9]])
    mask = padding_mask(ids)
    assert mask.dtype == bool and mask.shape == (2, 1, 1, 5)
    expected = [[True, True, True, False, False], [True] * 5]
    np.testing.assert_array_equal(mask[:, 0, 0], expected)


def test_causal_mask_shows_a_position_itself_and_the_past():
    mask = causal_mask(4)
    assert mask.dtype == bool
    expected = [[key <= query for key in range(4)] for query in range(4)]
    np.testing.assert_array_equal(mask, [[expected]])


# Rows of packed segments: [segment length, ...], then padding to 13 tokens.
packed_row = st.lists(st.integers(1, 5), max_size=6).filter(lambda lengths: sum(lengths) <= 13)


def segment_row(lengths, width=13):
    ids = [i for i, length in enumerate(lengths, start=1) for _ in range(length)]
    return ids + [0] * (width - len(ids))


@settings(max_examples=25)
@given(packed_row, packed_row)
def test_segment_mask_keeps_segments_apart_and_padding_alone(query_lengths, key_lengths):
    queries, keys = segment_row(query_lengths), segment_row(key_lengths)
    mask = segment_mask(jnp.array([queries, keys]), jnp.array([keys, queries]))
    assert mask.shape == (2, 1, 13, 13)
    expected = np.array([[query == key != 0 for key in keys] for query in queries])
    np.testing.assert_array_equal(mask[0, 0], expected)
    np.testing.assert_array_equal(mask[1, 0], expected.T)


def test_a_segment_mask_is_spelled_out_where_a_kernel_has_no_use_for_it():
    ids = jnp.array([segment_row([2, 3]), segment_row([13])])
    spelled_out, scores = segment_mask(ids, ids), (2, 8, 13, 13)
    np.testing.assert_array_equal(dense_mask(SegmentMask(ids, ids), scores), spelled_out)
    causal = dense_mask(SegmentMask(ids, ids, causal=True), scores)
    np.testing.assert_array_equal(causal, np.tril(spelled_out))
    assert dense_mask(spelled_out, scores) is spelled_out and dense_mask(None, scores) is None


@settings(max_examples=25)
@given(packed_row)
def test_positions_restart_in_each_segment(lengths):
    positions = segment_positions(jnp.array([segment_row(lengths), [1] * 13]))
    expected = [position for length in lengths for position in range(length)]
    np.testing.assert_array_equal(positions[0, : len(expected)], expected)
    np.testing.assert_array_equal(positions[1], np.arange(13))


def paper_sinusoid(position, d_model):
    """The formula of §3.5 as printed there, one number at a time, in float64."""
    encoding = np.zeros(d_model)
    for i in range(d_model // 2):
        encoding[2 * i] = np.sin(position / 10_000 ** (2 * i / d_model))
        encoding[2 * i + 1] = np.cos(position / 10_000 ** (2 * i / d_model))
    return encoding


@pytest.mark.parametrize("d_model", [2, 34])
def test_sinusoid_is_the_papers_formula_in_both_layouts(d_model):
    positions = np.array([[0, 1, 2], [31, 499, 1023]], np.int32)
    expected = np.array([[paper_sinusoid(p, d_model) for p in row] for row in positions])
    # An angle of 1000 is known to 6e-5 in float32, and so is its sine.
    tolerance = 1e-6 + 1e-7 * positions[..., None]

    interleaved = sinusoid(jnp.asarray(positions), d_model)
    assert interleaved.dtype == jnp.float32
    assert np.all(np.abs(interleaved - expected) <= tolerance)

    halves = np.concatenate([expected[..., 0::2], expected[..., 1::2]], axis=-1)
    concatenated = sinusoid(jnp.asarray(positions), d_model, interleaved=False)
    assert np.all(np.abs(concatenated - halves) <= tolerance)


def test_sinusoid_of_packed_rows_is_that_of_each_sentence_alone():
    packed = sinusoid(segment_positions(jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])), 6)[0]
    alone = sinusoid(jnp.arange(4), 6)
    np.testing.assert_array_equal(packed[:3], alone[:3])
    np.testing.assert_array_equal(packed[3:7], alone)


@pytest.mark.parametrize("mask", [jnp.zeros((1, 1, 2, 2)), jnp.ones((2, 2), bool)])
def test_what_is_no_mask_is_refused(monkeypatch, mask):
    """Read as booleans, numbers to add to the scores would mean the opposite."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=r"a mask is .*: give booleans \[B, N, T, S\]"):
        dense_mask(mask, (1, 1, 2, 2))
