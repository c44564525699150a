"""Several corpora in fixed proportions: at every step, from any step, on any number of hosts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_corpus import corpus_of, unpack
from train.data.batches import Batches, divide
from train.data.packing import pack
from train.data.rows import epoch_order

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(0, 10**12))
def test_proportions_hold_of_any_number_of_rows(weights, rows):
    counts = divide(rows, weights)
    assert sum(counts) == rows
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - rows * weight / sum(weights)) <= 1.5 + 1e-12 * rows


@given(WEIGHTS, st.integers(0, 10**6))
def test_no_corpus_loses_a_row(weights, rows):
    counts = [divide(number, weights) for number in range(rows, rows + 30)]
    assert (np.diff(counts, axis=0) >= 0).all()


PACKED = {"source_length": 19, "target_length": 23, "seed": 3}
SIZES = (90, 200, 90)


@pytest.fixture(scope="module")
def corpora():
    """Corpus c, counted from 1, has tokens from 100 c on; each of its rows holds two pairs."""
    made = []
    for number, pairs in enumerate(SIZES, start=1):
        lengths = [(8 + i % 2, 10 + i % 2) for i in range(pairs)]
        corpus, _ = corpus_of(lengths, seed=number, first=100 * number)
        packing = pack(corpus.source.lengths, corpus.target.lengths, **PACKED)
        made.append([(corpus, packing)])
    return made


def corpus_numbers(batch):
    """The number of each row's corpus, 0 for an empty row."""
    return batch["labels"][:, 0] // 100


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 3), (0.2, 0.1, 0.7), (100, 1, 1)])
def test_every_window_of_steps_has_the_proportions(corpora, weights):
    rows_per_batch = 7
    mixture = Batches(corpora, rows_per_batch, weights=weights, seed=3)
    assert mixture.shares == pytest.approx([weight / sum(weights) for weight in weights])
    numbers = np.array([corpus_numbers(mixture.at(step)) for step in range(60)])
    assert (numbers > 0).all()  # no batch has an empty row
    for window in (1, 5, 30):
        for start in range(60 - window):
            rows = numbers[start : start + window]
            for number, share in enumerate(mixture.shares, start=1):
                assert abs(np.count_nonzero(rows == number) - share * rows.size) <= 3


def test_each_corpus_goes_through_epochs_of_its_own(corpora):
    mixture = Batches(corpora, 5, weights=(1, 3, 1), seed=3)
    seen = {1: [], 2: [], 3: []}
    for step in range(200):
        for source, target in unpack(mixture.at(step)):
            assert source[0] // 100 == target[0] // 100
            seen[target[0] // 100].append((tuple(source), tuple(target)))
    for number, size in enumerate(SIZES, start=1):
        assert len(seen[number]) > 4 * size
        epochs = [seen[number][i : i + size] for i in range(0, 4 * size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)  # every pair once
        assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4  # never in the same order
    # The first corpus is read as if it were alone; another of the same size has another order.
    alone = Batches(corpora[:1], 45, seed=3)
    assert [tuple(map(tuple, pair)) for pair in unpack(alone.at(0))] == seen[1][: SIZES[0]]
    assert epoch_order(45, 3, 0, corpus=2).tolist() != epoch_order(45, 3, 0).tolist()


def test_an_epoch_is_one_of_the_first_corpus(corpora):
    for weights, rows_per_batch in (((1, 3, 1), 5), ((2, 1, 1), 7), ((0.1, 5, 1), 3)):
        mixture = Batches(corpora, rows_per_batch, weights=weights, seed=3)
        rows = [
            np.count_nonzero(corpus_numbers(mixture.at(step)) == 1)
            for step in range(mixture.steps_per_epoch)
        ]
        assert sum(rows[:-1]) < 45 <= sum(rows)


@pytest.mark.parametrize(("weights", "rows_per_batch"), [((1, 3, 1), 5), ((5, 1, 1), 40)])
def test_epochs_are_rows_of_the_first_corpus(corpora, weights, rows_per_batch):
    """Even where a batch is most of an epoch, and long after the first epoch."""
    mixture = Batches(corpora, rows_per_batch, weights=weights, seed=3)
    rows = 0
    for step in range(50):
        assert mixture.epochs(step) == pytest.approx(rows / 45)
        rows += np.count_nonzero(corpus_numbers(mixture.at(step)) == 1)


def test_a_batch_depends_on_its_step_alone(corpora):
    onward = Batches(corpora, 6, weights=(2, 1, 1), seed=3)
    forward = [onward.at(step) for step in range(40)]
    resumed = Batches(corpora, 6, weights=(2, 1, 1), seed=3)
    for step in reversed(range(40)):
        for name, array in resumed.at(step).items():
            np.testing.assert_array_equal(array, forward[step][name])
    other = Batches(corpora, 6, weights=(2, 1, 1), seed=4)
    assert not np.array_equal(other.at(0)["labels"], forward[0]["labels"])


@pytest.mark.parametrize("hosts", [1, 2, 3, 5, 12])
def test_hosts_share_a_batch(corpora, hosts):
    mixture = Batches(corpora, 8, weights=(5, 2, 1), seed=3)
    share = math.ceil(8 / hosts)
    for step in (0, 7, 100):
        whole = mixture.at(step)
        parts = [mixture.at(step, slice(i * share, (i + 1) * share)) for i in range(hosts)]
        for name, array in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            assert joined.dtype == np.int32 and len(joined) == hosts * share
            np.testing.assert_array_equal(joined[:8], array)
            assert not joined[8:].any()


def test_corpora_of_one_size_have_orders_of_their_own(corpora):
    first, _, third = Batches(corpora, 7, weights=(1, 1, 1), seed=3).parts
    assert len(first) == len(third)
    assert first._order(0).tolist() != third._order(0).tolist()
