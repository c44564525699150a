"""The rows of a packed corpus, epoch after epoch, made when they are asked for."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxformer.config import BOS_ID
from train.data.corpus import EncodedCorpus, Sentences
from train.data.packing import Packing, ranges, shuffle

HostBatch = dict[str, np.ndarray]
Packed = tuple[EncodedCorpus, Packing]


def epoch_order(num_rows: int, seed: int, epoch: int, corpus: int = 0) -> np.ndarray:
    """Return the order in which an epoch visits the rows, int64 [rows].

    The corpora of a mixture are numbered, so that two of equal size have different orders.
    """
    # Trailing zeros of a seed do not count: the first corpus has the order of a single one.
    order = shuffle(num_rows, seed, epoch + 1, corpus)
    order.setflags(write=False)
    return order


class Rows:
    """The rows of a packed corpus, epoch after epoch without end.

    Args:
      segmentations: encoded pairs and their packing; if text is split at random, one for each way
        of splitting, and the epochs use them in turn.
      seed, number: give each epoch its order, see `epoch_order`; a seed of None keeps the rows as
        they are, for evaluation.

    Attributes:
      corpus, packing: the first segmentation.
      take_turns: whether there are several segmentations.
    """

    def __init__(self, segmentations: Sequence[Packed], *, seed: int | None, number: int = 0):
        self.corpus, self.packing = segmentations[0]
        self._segmentations = segmentations
        self.take_turns = len(segmentations) > 1
        # In the rows of all segmentations, one after the other: where each begins, and the end.
        self._starts = np.cumsum([0, *(packing.num_rows for _, packing in segmentations)])

        def order(epoch: int) -> np.ndarray:
            _, packing = self._segmentation(epoch)
            if seed is None:
                return np.arange(packing.num_rows)
            return epoch_order(packing.num_rows, seed, epoch, number)

        self._order = lru_cache(maxsize=2)(order)

    def __len__(self) -> int:
        """Rows of the longest epoch."""
        return int(np.diff(self._starts).max())

    @property
    def target_fill(self) -> float:
        """Share of the target positions of all segmentations that are real."""
        sizes = np.diff(self._starts)
        fills = [packing.target_fill for _, packing in self._segmentations]
        return float(np.average(fills, weights=sizes))

    def epochs(self, number: int) -> float:
        """How many epochs the first `number` rows are, counted as in `onward`."""
        (epoch,), (place,) = self._locate(np.array([number]))
        _, packing = self._segmentation(epoch)
        return float(epoch + place / packing.num_rows)

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch of each row, counted from 0 through all epochs, and its place there."""
        turns, places = np.divmod(rows, self._starts[-1])
        segmentations = np.searchsorted(self._starts, places, side="right") - 1
        epochs = turns * len(self._segmentations) + segmentations
        return epochs, places - self._starts[segmentations]

    def _segmentation(self, epoch: int) -> Packed:
        return self._segmentations[epoch % len(self._segmentations)]

    def longest_sentence(self) -> int:
        """Tokens of the longest source or target that is in a row, eos counted."""
        return max(
            int(side.lengths[packing.pairs].max())
            for corpus, packing in self._segmentations
            for side in (corpus.source, corpus.target)
        )

    def of_epoch(self, epoch: int, start: int, stop: int) -> HostBatch:
        """Return the rows of an epoch from `start` to before `stop`, or to its end."""
        return self._make_rows(epoch, self._order(epoch)[start:stop])

    def onward(self, start: int, stop: int) -> list[HostBatch]:
        """Return the rows from `start` to before `stop`, counted from 0 through all epochs.

        They come in pieces, one for each epoch.
        """
        epochs, places = self._locate(np.arange(start, stop))
        return [
            self._make_rows(epoch, self._order(epoch)[places[epochs == epoch]])
            for epoch in np.unique(epochs).tolist() or [0]
        ]

    def _make_rows(self, epoch: int, rows: np.ndarray) -> HostBatch:
        corpus, packing = self._segmentation(epoch)
        counts = packing.offsets[rows + 1] - packing.offsets[rows]
        pairs = packing.pairs[ranges(packing.offsets[rows], counts)]
        source_ids, source_segments, _ = _lay_out(
            corpus.source, pairs, counts, packing.source_length
        )
        labels, target_segments, starts = _lay_out(
            corpus.target, pairs, counts, packing.target_length
        )
        # Shifted right within each segment: its first input is bos.
        target_ids = np.zeros_like(labels)
        target_ids[:, 1:] = np.where(target_segments[:, 1:] > 0, labels[:, :-1], 0)
        target_ids.ravel()[starts] = BOS_ID
        return {
            "source_ids": source_ids,
            "source_segment_ids": source_segments,
            "target_ids": target_ids,
            "labels": labels,
            "target_segment_ids": target_segments,
        }


def _lay_out(
    sentences: Sentences, pairs: np.ndarray, counts: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids and segment ids, [rows, length], and where in them, flattened, segments start.

    Row r holds the next `counts[r]` of `pairs`.
    """
    shape = len(counts), length
    lengths = sentences.lengths[pairs]
    before = np.cumsum(lengths) - lengths  # tokens of all pairs before each pair
    first = np.repeat(np.cumsum(counts) - counts, counts)  # of each pair, the first in its row
    row = np.repeat(np.arange(len(counts)), counts)
    starts = row * shape[1] + before - before[first]
    where = ranges(starts, lengths)
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ids.ravel()[where] = sentences.take(pairs)
    segments.ravel()[where] = np.repeat(np.arange(len(pairs)) - first + 1, lengths)
    return ids, segments, starts
