"""Batches have few shapes, and every sentence is in one of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.batching import SMALLEST, batches, bucket, groups, in_windows, num_rows, pad
from jaxformer.config import PAD_ID

LENGTHS = st.lists(st.integers(1, 100), max_size=300)
LIMITS = st.sampled_from([None, 100, 120])


@given(LENGTHS, st.booleans(), LIMITS)
def test_every_sentence_is_in_one_group_the_longest_first(lengths, few_shapes, limit):
    seen = []
    for chosen, length in groups(lengths, few_shapes=few_shapes, limit=limit):
        assert limit is None or length <= limit
        assert max(lengths[index] for index in chosen) <= length
        seen += chosen
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[index] for index in seen] == sorted(lengths, reverse=True)


@given(LENGTHS, st.integers(1, 5000), LIMITS)
def test_every_sentence_is_in_one_batch(lengths, batch_tokens, limit):
    seen = []
    for chosen, rows, length in batches(lengths, batch_tokens, limit=limit):
        assert 0 < len(chosen) <= rows
        assert max(lengths[index] for index in chosen) <= length
        seen += chosen
    assert sorted(seen) == list(range(len(lengths)))


@given(
    st.integers(1, 300), st.integers(1, 5000), st.integers(1, 100), st.sampled_from([1, 2, 3, 8])
)
def test_rows_are_what_tokens_allow(waiting, batch_tokens, length, devices):
    rows = num_rows(waiting, batch_tokens, length, devices)
    assert rows % devices == 0
    per_device = rows // devices
    assert per_device < SMALLEST or per_device % SMALLEST == 0
    # There is at least one row for each device.
    assert rows * length <= max(batch_tokens, devices * length)


def test_shapes_are_few():
    draw = np.random.default_rng(0)
    shapes = set()
    for number in range(1, 400):
        lengths = draw.integers(1, 65, size=number).tolist()
        shapes |= {(rows, length) for _, rows, length in batches(lengths, 4096)}
    assert {length for _, length in shapes} == {16, 32, 64}
    assert {rows for rows, _ in shapes} <= {1, 4, 16, 32, 64, 128, 256}


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=300))
def test_few_shapes_are_one_for_each_fourfold_length(lengths):
    found = [length for _, length in groups(lengths, few_shapes=True)]
    longest = -(-max(lengths) // 16) * 16
    assert set(found) <= {longest} | {
        longest >> shift for shift in (2, 4, 6) if longest >> shift >= 32
    }
    assert len(set(found)) == len(found)


def test_like_lengths_are_together():
    lengths = [3, 60, 4, 61, 5, 62]
    first, second = batches(lengths, 3 * 64)
    assert sorted(first[0]) == [1, 3, 5] and first[1:] == (3, 64)
    assert sorted(second[0]) == [0, 2, 4] and second[2] == 16


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)]
)
def test_bucket(length, expected):
    assert bucket(length) == expected


def test_pad():
    assert pad([[5, 6], [7]], 3, 4).tolist() == [
        [5, 6, PAD_ID, PAD_ID],
        [7, PAD_ID, PAD_ID, PAD_ID],
        [PAD_ID] * 4,
    ]


def test_windows_come_before_the_error_that_ends_them():
    def items():
        yield from range(5)
        raise ConnectionError

    found = in_windows(items(), 2)
    assert [next(found), next(found), next(found)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ConnectionError):
        next(found)
    assert list(in_windows(range(4), 2)) == [[0, 1], [2, 3]]
    assert list(in_windows([], 2)) == []
