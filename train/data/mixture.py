"""Several corpora in one stream of batches, in fixed proportions."""

import math
from collections.abc import Sequence
from fractions import Fraction

from train.data.batches import Batches, HostBatch, Packed, Rows


def divide(rows: int, weights: Sequence[float]) -> list[int]:
    """Return how many of the first `rows` rows of a mixture each corpus has.

    The first corpus gets its share of the rows, the second its share of the others, and so on,
    each rounded to the nearest: no corpus ever loses a row as `rows` grows, and a corpus has its
    proportion of any number of rows but for a row or two.
    """
    counts = []
    left, weight_left = rows, sum(map(Fraction, weights))
    for weight in map(Fraction, weights):  # exact, the same on every machine
        counts.append(math.floor(left * weight / weight_left + Fraction(1, 2)))
        left, weight_left = left - counts[-1], weight_left - weight
    return counts


class Mixture(Batches):
    """Batches that hold rows of every corpus, in the proportion of the weights at every step.

    A corpus goes through its epochs at its own pace, each in an order of its own; an epoch of the
    mixture is one of the first corpus. How far each corpus is, is a function of the step alone.

    Args:
      corpora: the segmentations of each, see `Rows`, packed into rows of the same lengths.
      weights: of each, above 0; proportions of *rows*. Rows are filled alike, so those of target
        tokens are nearly the same.
      rows_per_batch: R; every batch is full.
      seed: of the orders.
    """

    def __init__(
        self,
        corpora: Sequence[Sequence[Packed]],
        weights: Sequence[float],
        rows_per_batch: int,
        *,
        seed: int,
    ):
        super().__init__(corpora[0], rows_per_batch, seed=seed)
        self.parts = [
            Rows(segmentations, seed=seed, number=number)
            for number, segmentations in enumerate(corpora)
        ]
        self.shares = [weight / sum(weights) for weight in weights]
        self._weights = tuple(weights)
        self.target_fill = sum(
            share * part.packing.target_fill
            for part, share in zip(self.parts, self.shares, strict=True)
        )
        # The first step at whose end `divide` has given the first corpus all of its rows.
        share = Fraction(weights[0]) / sum(map(Fraction, weights))
        self.steps_per_epoch = math.ceil(
            (len(self.parts[0]) - Fraction(1, 2)) / share / rows_per_batch
        )

    def epochs(self, steps: int) -> float:
        """How many epochs of the first corpus `steps` batches are."""
        return self.parts[0].epochs(divide(steps * self.rows_per_batch, self._weights)[0])

    def _rows(self, step: int, start: int, stop: int) -> list[HostBatch]:
        before = divide(step * self.rows_per_batch, self._weights)
        after = divide((step + 1) * self.rows_per_batch, self._weights)
        pieces, row = [], 0  # of the batch, where the rows of the next corpus begin
        for part, first, last in zip(self.parts, before, after, strict=True):
            shift = first - row  # from rows of the batch to rows of the corpus
            row += last - first
            begin, end = max(first, start + shift), min(last, stop + shift)
            pieces += part.onward(begin, max(begin, end))
        return pieces
