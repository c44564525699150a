"""The batch of any step, made without the batches before it."""

from functools import lru_cache

import numpy as np

from jaxformer.config import BOS_ID
from train.data.corpus import EncodedCorpus, Sentences
from train.data.packing import Packing, ranges, shuffle


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits the rows, int64 [rows]."""
    order = shuffle(num_rows, seed, epoch + 1)
    order.setflags(write=False)
    return order


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

    Args:
      corpus: the pairs.
      packing: which of them share a row.
      rows_per_batch: R; empty rows complete the last batch of an epoch.
      seed: each epoch has its own order of rows; None keeps them as they are, for evaluation.

    Attributes:
      steps_per_epoch: batches until every row was visited once.
    """

    def __init__(
        self, corpus: EncodedCorpus, packing: Packing, rows_per_batch: int, *, seed: int | None
    ):
        self.corpus = corpus
        self.packing = packing
        self.rows_per_batch = rows_per_batch
        self.seed = seed
        self.steps_per_epoch = -(-packing.num_rows // rows_per_batch)

    def at(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Return batch `step`, counted from 0; of its R rows only `rows`, one host's share."""
        epoch, index = divmod(step, self.steps_per_epoch)
        packing = self.packing
        if self.seed is None:
            order = np.arange(packing.num_rows)
        else:
            order = epoch_order(packing.num_rows, self.seed, epoch)
        share = range(index * self.rows_per_batch, (index + 1) * self.rows_per_batch)[rows]
        height = len(share)
        chosen = order[share.start : share.stop]  # fewer than `height` where the epoch ends
        counts = packing.offsets[chosen + 1] - packing.offsets[chosen]
        pairs = packing.pairs[ranges(packing.offsets[chosen], counts)]
        source_ids, source_segments, _ = _lay_out(
            self.corpus.source, pairs, counts, (height, packing.source_length)
        )
        labels, target_segments, starts = _lay_out(
            self.corpus.target, pairs, counts, (height, packing.target_length)
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
    sentences: Sentences, pairs: np.ndarray, counts: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids and segment ids of `shape`, and where in them, flattened, each segment starts.

    Row r holds the next `counts[r]` of `pairs`.
    """
    lengths = sentences.lengths[pairs]
    before = np.cumsum(lengths) - lengths  # tokens of all pairs before this one ...
    first = np.repeat(np.cumsum(counts) - counts, counts)  # ... of which its row's begin here
    row = np.repeat(np.arange(len(counts)), counts)
    starts = row * shape[1] + before - before[first]
    where = ranges(starts, lengths)
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ids.ravel()[where] = sentences.take(pairs)
    segments.ravel()[where] = np.repeat(np.arange(len(pairs)) - first + 1, lengths)
    return ids, segments, starts
