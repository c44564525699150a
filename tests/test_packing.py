import hashlib

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.errors import UserError
from jaxformer.tokenizer import VocabularyTokenizer
from random_corpus import corpus_of, unpack, write_corpus
from train.data.batches import Batches
from train.data.corpus import encode_corpus
from train.data.packing import choose_source_length, pack, pack_in_order, shuffle
from train.data.rows import Rows, epoch_order
from train.data.tokenizer import learn_tokenizers

# Pairs of lengths with eos; 1 is an empty sentence.
LENGTHS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 17)), min_size=1, max_size=60)


def rows_of(packing):
    return [
        packing.pairs[start:stop].tolist()
        for start, stop in zip(packing.offsets[:-1], packing.offsets[1:], strict=True)
    ]


def check_capacity(packing, source, target):
    rows = rows_of(packing)
    assert all(rows)
    assert all(source[row].sum() <= packing.source_length for row in rows)
    assert all(target[row].sum() <= packing.target_length for row in rows)
    positions = len(rows) * packing.target_length
    assert packing.target_fill == pytest.approx(target[packing.pairs].sum() / positions)


@given(LENGTHS, st.integers(11, 23), st.integers(13, 29), st.integers(1, 25), st.integers(0, 5))
def test_every_pair_is_in_one_row_or_named(lengths, source_length, target_length, window, seed):
    source, target = np.array([(2, 2), *lengths]).T  # one pair that fits, so that there is a row
    packing = pack(
        source,
        target,
        source_length=source_length,
        target_length=target_length,
        seed=seed,
        window=window,
    )
    everything = np.concatenate([packing.pairs, packing.empty, packing.too_long])
    assert sorted(everything.tolist()) == list(range(len(source)))
    assert all(source[i] == 1 or target[i] == 1 for i in packing.empty)
    assert all(source[i] > source_length or target[i] > target_length for i in packing.too_long)
    check_capacity(packing, source, target)


@given(LENGTHS)
def test_evaluation_keeps_order_and_every_pair(lengths):
    source, target = np.array(lengths).T
    packing = pack_in_order(source, target, source_length=7, target_length=11)
    assert packing.pairs.tolist() == list(range(len(source)))
    assert packing.source_length >= source.max() and packing.source_length % 8 == 0
    assert packing.target_length >= target.max() and packing.target_length % 8 == 0
    check_capacity(packing, source, target)


def translation_lengths(pairs, seed=0):
    """Lengths like those of captions: 15 tokens on average, the sides similar but not equal."""
    rng = np.random.default_rng(seed)
    common = rng.normal(2.6, 0.33, pairs)
    sides = np.exp(common + rng.normal(0, 0.12, (2, pairs)))
    return np.clip(sides, 3, 60).astype(np.int32) + 1


@pytest.mark.parametrize("target_length", [64, 128])
def test_target_rows_are_full(target_length):
    source, target = translation_lengths(20_000)
    source_length = choose_source_length(source, target, target_length, seed=0)
    packing = pack(source, target, source_length=source_length, target_length=target_length, seed=0)
    assert source_length % 8 == 0
    assert source_length <= 1.25 * target_length
    assert packing.target_fill >= 0.97
    assert len(packing.too_long) <= 0.001 * len(source)


def test_source_length_follows_the_corpus():
    source, target = translation_lengths(5_000)
    # With half or twice the tokens, say for characters instead of pieces, the row follows them.
    assert choose_source_length(source // 2 + 1, target, 64, seed=0) <= 48
    assert choose_source_length(source * 2, target, 64, seed=0) >= 120
    # Three sentences cannot fill rows, but still get a length that holds them.
    few = choose_source_length(np.array([5, 9, 30]), np.array([6, 6, 6]), 64, seed=0)
    assert 30 <= few <= 48


def test_a_few_pages_among_sentences_make_no_row_longer():
    """They are too long to be trained on; 2 in 5,000 once doubled the length of every row."""
    source, target = translation_lengths(5_000)
    plain = choose_source_length(source, target, 64, seed=0)
    source, target = np.append(source, [100_000] * 2), np.append(target, [2, 2])
    assert choose_source_length(source, target, 64, seed=0) <= plain + 8


def test_windows_cost_little():
    source, target = translation_lengths(20_000)
    lengths = {"source_length": 72, "target_length": 64, "seed": 0}
    whole = pack(source, target, **lengths, window=20_000)
    parts = pack(source, target, **lengths, window=2_000)
    assert parts.num_rows < 1.02 * whole.num_rows
    # No row mixes windows: only one window has to be in memory at a time.
    order = {pair: place for place, pair in enumerate(shuffle(20_000, 0).tolist())}
    assert all(len({order[pair] // 2_000 for pair in row}) == 1 for row in rows_of(parts))


def test_nothing_fits():
    with pytest.raises(UserError, match=r"no training pair fits a row of 8 source and 8 target"):
        pack(np.array([9, 1]), np.array([3, 3]), source_length=8, target_length=8, seed=0)
    source, target = np.array([30, 1]), np.array([9, 3])
    length = choose_source_length(source, target, 8, seed=0)
    with pytest.raises(UserError, match=r"fits a row of 32 source .* \(1 are empty\): raise"):
        pack(source, target, source_length=length, target_length=8, seed=0)


def test_order_is_the_same_on_every_machine():
    source, target = translation_lengths(50)
    packing = pack(source, target, source_length=64, target_length=64, seed=7)
    assert shuffle(7, 7).tolist() == [6, 3, 4, 0, 2, 5, 1]
    assert epoch_order(7, seed=7, epoch=0).tolist() == [1, 3, 2, 4, 5, 0, 6]
    again = pack(source, target, source_length=64, target_length=64, seed=7)
    other = pack(source, target, source_length=64, target_length=64, seed=8)
    assert again.pairs.tolist() == packing.pairs.tolist() != other.pairs.tolist()


@given(LENGTHS, LENGTHS, st.integers(1, 7))
def test_epochs_take_the_segmentations_in_turns(first, second, rows_per_batch):
    segmentations, expected = [], []
    for number, lengths in enumerate((first, second), start=1):
        lengths = [(max(source, 2), max(target, 2)) for source, target in lengths]
        corpus, sides = corpus_of(lengths, seed=number)
        options = {"source_length": 19, "target_length": 23, "seed": 3}
        packing = pack(corpus.source.lengths, corpus.target.lengths, **options)
        segmentations.append((corpus, packing))
        expected.append(sorted(zip(*sides, strict=True)))
    rows, start = Rows(segmentations, seed=3), 0
    for epoch in range(5):
        assert rows.epochs(start) == epoch
        stop = start + segmentations[epoch % 2][1].num_rows
        seen = [pair for piece in rows.onward(start, stop) for pair in unpack(piece)]
        assert sorted(seen) == expected[epoch % 2]
        start = stop
    # Epochs follow each other without a gap: no batch or row is empty.
    batches = Batches([segmentations], rows_per_batch, seed=3)
    of_batches = [batches.at(step) for step in range(-(-start // rows_per_batch))]
    assert all(batch["labels"].any(axis=1).all() for batch in of_batches)
    assert batches.epochs(len(of_batches)) == rows.epochs(len(of_batches) * rows_per_batch) >= 5
    seen = [pair for batch in of_batches for pair in unpack(batch)]
    of_rows = rows.onward(0, len(of_batches) * rows_per_batch)
    assert seen == [pair for piece in of_rows for pair in unpack(piece)]


@given(LENGTHS, st.integers(1, 7))
def test_the_share_of_real_targets_counts_the_rows_that_complete_an_epoch(lengths, rows_per_batch):
    batches, _ = batches_of([(max(n, 2), max(m, 2)) for n, m in lengths], rows_per_batch)
    labels = [batches.at(step)["labels"] > 0 for step in range(batches.steps_per_epoch)]
    assert batches.target_fill == pytest.approx(np.mean(labels))


def batches_of(lengths, rows_per_batch, seed=3, source_length=19, target_length=23):
    corpus, sides = corpus_of(lengths)
    packing = pack(
        corpus.source.lengths,
        corpus.target.lengths,
        source_length=source_length,
        target_length=target_length,
        seed=seed,
    )
    return Batches([[(corpus, packing)]], rows_per_batch, seed=seed), sides


@given(LENGTHS, st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_holds_every_pair_once(lengths, rows_per_batch, epoch):
    lengths = [(max(source, 2), max(target, 2)) for source, target in lengths]
    batches, sides = batches_of(lengths, rows_per_batch)
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    seen = []
    for step in steps:
        batch = batches.at(step)
        assert {name: array.shape for name, array in batch.items()} == {
            "source_ids": (rows_per_batch, 19),
            "source_segment_ids": (rows_per_batch, 19),
            "target_ids": (rows_per_batch, 23),
            "labels": (rows_per_batch, 23),
            "target_segment_ids": (rows_per_batch, 23),
        }
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        seen += unpack(batch)
    assert sorted(seen) == sorted(zip(*sides, strict=True))


@given(LENGTHS, st.integers(1, 5))
def test_evaluation_batches_hold_every_pair_in_order(lengths, rows_per_batch):
    corpus, sides = corpus_of(lengths)
    packing = pack_in_order(
        corpus.source.lengths, corpus.target.lengths, source_length=8, target_length=8
    )
    batches = Batches([[(corpus, packing)]], rows_per_batch, seed=None)
    seen = [pair for step in range(batches.steps_per_epoch) for pair in unpack(batches.at(step))]
    assert seen == list(zip(*sides, strict=True))


def test_a_batch_depends_on_its_step_alone():
    source, target = translation_lengths(300)
    lengths = list(zip(source.tolist(), target.tolist(), strict=True))
    options = {"rows_per_batch": 8, "source_length": 72, "target_length": 64}
    onward, _ = batches_of(lengths, **options)
    steps = list(range(3 * onward.steps_per_epoch))
    forward = [onward.at(step) for step in steps]
    resumed, _ = batches_of(lengths, **options)
    for step in reversed(steps):
        for name, array in resumed.at(step).items():
            np.testing.assert_array_equal(array, forward[step][name])
    # Epochs differ from each other, and so do seeds.
    first = forward[0]["labels"]
    assert not np.array_equal(first, forward[onward.steps_per_epoch]["labels"])
    other, _ = batches_of(lengths, **options, seed=4)
    assert not np.array_equal(first, other.at(0)["labels"])


def test_batches_are_those_of_runs_under_way():
    """Their order is part of a run: when resumed, it must see what it would have seen."""
    sides = [
        [[4 + (n * i + j) % 90 for j in range(2 + n * i % 13)] + [2] for i in range(400)]
        for n in (5, 7)
    ]
    corpus = write_corpus(sides)
    packing = pack(
        corpus.source.lengths, corpus.target.lengths, source_length=40, target_length=32, seed=5
    )
    batches = Batches([[(corpus, packing)]], 6, seed=5)
    digest = hashlib.sha256()
    for step in range(3 * batches.steps_per_epoch):
        for _, array in sorted(batches.at(step).items()):
            digest.update(array.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "7a492352c3d67680"


def test_hosts_share_a_batch():
    source, target = translation_lengths(300)
    lengths = list(zip(source.tolist(), target.tolist(), strict=True))
    batches, _ = batches_of(lengths, 24, source_length=72, target_length=64)
    for step in (0, batches.steps_per_epoch - 1):  # the last one ends with empty rows
        whole = batches.at(step)
        parts = [batches.at(step, slice(first, first + 9)) for first in (0, 9, 18, 27)]
        for name, array in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(array, joined[:24])
            assert not joined[24:].any() and len(joined) == 36
    assert not whole["labels"][-1].any()


def test_sentences_are_read_in_any_order():
    corpus, sides = corpus_of([(n, n + 1) for n in range(2, 13)])
    assert len(corpus) == 11
    assert corpus.target.lengths.tolist() == list(range(3, 14))
    rows = np.array([7, 0, 7, 10])
    for side, expected in zip((corpus.source, corpus.target), sides, strict=True):
        assert side.take(rows).tolist() == [token for row in rows for token in expected[row]]
    assert corpus.source.take(np.array([], int)).dtype == np.int32


@pytest.fixture(scope="module")
def text():
    korean = [f"{n}번 고양이가 학교에 간다" for n in range(60)]
    return datasets.Dataset.from_dict(
        {"source": [f"cat number {n} goes to school" for n in range(60)], "target": korean}
    )


@pytest.fixture(scope="module")
def tokenizers(text, tmp_path_factory):
    return learn_tokenizers([text], tmp_path_factory.mktemp("run"), vocab_size=60, joint=False)


def test_corpus_is_the_text_with_eos(text, tokenizers, tmp_path):
    corpus = encode_corpus(text, *tokenizers, tmp_path)
    for row in (0, 59):
        for side, tokenizer in zip(("source", "target"), tokenizers, strict=True):
            ids = getattr(corpus, side).take(np.array([row])).tolist()
            assert ids[-1] == 2
            assert tokenizer.decode(ids) == text[row][side]


def test_subword_dropout_splits_the_same_text_in_other_ways(text, tokenizers, tmp_path):
    def ids(dropout, seed, folder="cache"):
        options = {"dropout": dropout, "seed": seed}
        target = encode_corpus(text, *tokenizers, tmp_path / folder, **options).target
        return [target.take(np.array([row])).tolist() for row in range(len(text))]

    plain, first, second = ids(0.0, 0), ids(0.5, 0), ids(0.5, 1)
    assert sum(map(len, plain)) < sum(map(len, first)) and first != second
    assert first == ids(0.5, 0, "another")  # what was lost is made again the same
    for split in (plain, first, second):
        assert [tokenizers[1].decode(row) for row in split] == text["target"][:]


def test_subword_dropout_splits_both_sides_each_in_its_own_way(text, tokenizers, tmp_path):
    _, tokenizer = tokenizers
    same = text.map(lambda row: {"source": row["target"]})
    corpus = encode_corpus(same, tokenizer, tokenizer, tmp_path, dropout=0.5)
    rows = np.arange(len(text))
    assert corpus.source.take(rows).tolist() != corpus.target.take(rows).tolist()


def test_corpus_is_encoded_once_per_text_and_tokenizer(text, tokenizers, tmp_path):
    def files_after(dataset, source, target):
        corpus = encode_corpus(dataset, source, target, tmp_path)
        assert len(corpus) == len(dataset)
        return len(list(tmp_path.glob("*.arrow")))

    source, target = tokenizers
    assert files_after(text, source, target) == 1
    # The same text under another name, or in other chunks, is found again.
    copies = datasets.concatenate_datasets([text.select(range(7)), text.select(range(7, 60))])
    assert files_after(copies, source, target) == 1
    assert files_after(text, target, source) == 2
    assert files_after(text.select(range(59)), source, target) == 3
    changed = text.map(lambda row: {"target": row["target"] + "."}, keep_in_memory=True)
    assert files_after(changed, source, target) == 4
    pieces = source.pieces(range(source.vocab_size))
    for order in (pieces, [*pieces[:4], *reversed(pieces[4:])]):
        files = files_after(text, VocabularyTokenizer(source.model, order), target)
    assert files == 6


def test_rows_know_all_segmentations():
    """The longest sentence of any, the most rows of an epoch, and how full they all are."""
    packed = []
    for lengths in ([(3, 3)], [(9, 5), (15, 20), (3, 30)]):  # the last pair is in no row
        corpus, _ = corpus_of(lengths)
        settings = {"source_length": 19, "target_length": 23, "seed": 3}
        packing = pack(corpus.source.lengths, corpus.target.lengths, **settings)
        packed.append((corpus, packing))
    assert Rows(packed, seed=3).longest_sentence() == 20
    most = max(packing.num_rows for _, packing in packed)
    batches = Batches([packed], 1, seed=3)
    assert batches.steps_per_epoch == most > packed[0][1].num_rows
    turn = sum(packing.num_rows for _, packing in packed)
    labels = [batches.at(step)["labels"] > 0 for step in range(turn)]
    assert batches.target_fill == pytest.approx(np.mean(labels))
