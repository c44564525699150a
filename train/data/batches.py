"""The batch of any step, made without the batches before it."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from train.data.rows import HostBatch, Packed, Rows


def divide(rows: int, weights: Sequence[float]) -> list[int]:
    """Return how many of the first `rows` rows of a mixture each corpus has.

    The first corpus gets its share of the rows, the second its share of the rest, and so on,
    each rounded to the nearest: no corpus ever loses a row as `rows` grows, and a corpus has its
    proportion of any number of rows but for a row or two.
    """
    counts = []
    left, weight_left = rows, sum(map(Fraction, weights))
    for weight in map(Fraction, weights):  # exact, the same on every machine
        counts.append(math.floor(left * weight / weight_left + Fraction(1, 2)))
        left, weight_left = left - counts[-1], weight_left - weight
    return counts


class Batches:
    """The batches of a run: `at(step)` for any step, epoch after epoch.

    A batch is a dictionary of int32 arrays, 0 where a row has no token left:

    ```
    source_ids          [R, S]  a b eos c eos
    source_segment_ids  [R, S]  1 1 1   2 2
    target_ids          [R, T]  bos x y   bos z     each segment begins with bos,
    labels              [R, T]  x   y eos z   eos   never with its neighbour's eos
    target_segment_ids  [R, T]  1   1 1   2   2
    ```

    With several corpora, every batch holds rows of each, in proportion to the weights. Each corpus
    goes through its epochs at its own pace, each epoch in its own order; an epoch of the mixture is
    one of the first corpus. How far each corpus has come is a function of the step alone.

    Args:
      corpora: the segmentations of each corpus, see `Rows`, packed into rows of equal lengths.
      rows_per_batch: R.
      weights: one for each corpus, above 0: proportions of *rows*. Rows are about equally full, so
        the proportions of target tokens are nearly the same.
      seed: each epoch has its own order of rows; None keeps them as they are, for evaluation.

    Attributes:
      parts: the rows of each corpus.
      shares: share of each corpus in the rows of a batch.
      source_length, target_length: S and T.
      whole_epochs: whether empty rows complete the last batch of an epoch. Otherwise an epoch
        may end within a batch: corpora end at different steps, and segmentations that take turns
        have different numbers of rows.
      steps_per_epoch: batches until every row of the longest segmentation was visited once.
      target_fill: share of the target positions of an epoch that hold a token.
    """

    def __init__(
        self,
        corpora: Sequence[Sequence[Packed]],
        rows_per_batch: int,
        *,
        weights: Sequence[float] = (1.0,),
        seed: int | None,
    ):
        self.parts = [
            Rows(segmentations, seed=seed, number=number)
            for number, segmentations in enumerate(corpora)
        ]
        first = self.parts[0]
        self.source_length = first.packing.source_length
        self.target_length = first.packing.target_length
        self.rows_per_batch = rows_per_batch
        self.shares = [weight / sum(weights) for weight in weights]
        self._weights = tuple(weights)
        self.whole_epochs = len(corpora) == 1 and not first.take_turns
        # The first step at whose end `divide` has given the first corpus all of its rows.
        share = Fraction(weights[0]) / sum(map(Fraction, weights))
        self.steps_per_epoch = math.ceil((len(first) - Fraction(1, 2)) / share / rows_per_batch)
        self.target_fill = sum(
            share * part.target_fill for part, share in zip(self.parts, self.shares, strict=True)
        )
        if self.whole_epochs:
            self.target_fill *= len(first) / (self.steps_per_epoch * rows_per_batch)

    def at(self, step: int, rows: slice = slice(None)) -> HostBatch:
        """Return batch `step`, counted from 0, or only its rows `rows`, one host's share.

        Rows from R on are empty: they complete a batch if the devices do not divide R.
        """
        start = rows.start or 0
        stop = self.rows_per_batch if rows.stop is None else rows.stop
        height = stop - start
        stop = min(stop, self.rows_per_batch)
        return _join(self._rows(step, min(start, stop), stop), height)

    def epochs(self, steps: int) -> float:
        """How many epochs of the first corpus `steps` batches are."""
        if self.whole_epochs:
            return steps / self.steps_per_epoch
        return self.parts[0].epochs(divide(steps * self.rows_per_batch, self._weights)[0])

    def _rows(self, step: int, start: int, stop: int) -> list[HostBatch]:
        """Return the rows of a batch from `start` to before `stop`, in pieces."""
        if self.whole_epochs:
            epoch, index = divmod(step, self.steps_per_epoch)
            first = index * self.rows_per_batch
            return [self.parts[0].of_epoch(epoch, first + start, first + stop)]
        before = divide(step * self.rows_per_batch, self._weights)
        after = divide((step + 1) * self.rows_per_batch, self._weights)
        pieces, row = [], 0  # row of the batch at which the next corpus begins
        for part, first, last in zip(self.parts, before, after, strict=True):
            shift = first - row  # from rows of the batch to rows of the corpus
            row += last - first
            begin, end = max(first, start + shift), min(last, stop + shift)
            pieces += part.onward(begin, max(begin, end))
        return pieces


def _join(pieces: list[HostBatch], height: int) -> HostBatch:
    """Return the rows of all pieces, and empty ones up to `height`."""
    missing = height - sum(len(piece["labels"]) for piece in pieces)
    return {
        name: np.concatenate(
            [
                *(piece[name] for piece in pieces),
                np.zeros((missing, array.shape[1]), np.int32),
            ]
        )
        for name, array in pieces[0].items()
    }
