"""What is measured: shapes, and batches of them as each engine takes its data."""

import dataclasses
from typing import Literal

import numpy as np

from jaxformer.batching import pad
from jaxformer.config import BOS_ID, TransformerConfig
from train.costs.flops import forward_flops, train_flops
from train.data.batches import Batches
from train.data.corpus import EncodedCorpus

Kind = Literal["train", "forward"]

#: More would say no more about a corpus, and all of them are in memory.
_PADDED_BATCHES = 200


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of a sweep.

    Attributes:
      model: what is measured.
      batch: rows of a step, over all devices.
      source, target: positions of a row.
      devices: how many take part.
    """

    model: TransformerConfig
    batch: int
    source: int
    target: int
    devices: int

    def flops(self, kind: Kind) -> int:
        """FLOP of a step, by the paper's formulas."""
        count = train_flops if kind == "train" else forward_flops
        return count(self.model, self.batch, self.source, self.target)


def full_rows(case: Case) -> dict[str, np.ndarray]:
    """One batch of random tokens, each row a sentence that fills it."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return draw.integers(4, case.model.vocab_size, (case.batch, length), dtype=np.int32)

    source, target = ids(case.source), ids(case.target)
    return {
        "source_ids": source,
        "source_segment_ids": np.ones_like(source),
        "target_ids": target,
        "target_segment_ids": np.ones_like(target),
        "labels": ids(case.target),
    }


def padded_batches(batches: Batches, *, multiple: int) -> list[dict[str, np.ndarray]]:
    """The corpus as other toolkits batch it: sentences of like length, padded.

    The pairs are those of our rows, and a batch has as many real target tokens as one of ours.

    With a `multiple` of 1, sentences are sorted by their target's and then by their source's
    length, and each side is as wide as its longest sentence. With more, there are few shapes: both
    sides are as wide as the longer one, rounded up, and batches of one width have the same number
    of rows, the last completed with empty ones.
    """
    (rows,) = batches.parts
    corpus, kept = rows.corpus, np.sort(rows.packing.pairs)
    tokens = batches.target_fill * batches.rows_per_batch * batches.target_length
    sources, targets = corpus.source.lengths[kept], corpus.target.lengths[kept]
    if multiple == 1:
        # Sources go up and down in turns, so that a batch of two target lengths stays narrow.
        order = np.lexsort((np.where(targets % 2, sources, -sources), targets))
        # A sentence goes to the batch that its middle falls into: none is cut, sizes do not drift.
        middles = np.cumsum(targets[order]) - targets[order] / 2
        padded = []
        for chosen in _split(order, middles // tokens):
            source, target = (int(lengths[chosen].max()) for lengths in (sources, targets))
            padded.append(_pad(corpus, kept[chosen], len(chosen), source, target))
    else:
        padded = []
        widths = -(-np.maximum(sources, targets) // multiple) * multiple
        order = np.argsort(widths, kind="stable")
        for chosen in _split(order, widths[order]):
            number = max(1, round(targets[chosen].sum() / tokens))
            height, width = -(-len(chosen) // number), int(widths[chosen[0]])
            padded += [
                _pad(corpus, kept[chosen[start : start + height]], height, width, width)
                for start in range(0, len(chosen), height)
            ]
    shuffled = np.random.default_rng(0).permutation(len(padded))[:_PADDED_BATCHES]
    return [padded[index] for index in shuffled]


def _split(items: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
    """Split where the next item is of another kind."""
    return np.split(items, np.flatnonzero(np.diff(kinds)) + 1)


def _pad(
    corpus: EncodedCorpus, pairs: np.ndarray, rows: int, source_length: int, target_length: int
) -> dict[str, np.ndarray]:
    each = np.split(pairs, len(pairs))
    source = pad([corpus.source.take(pair).tolist() for pair in each], rows, source_length)
    labels = pad([corpus.target.take(pair).tolist() for pair in each], rows, target_length)
    target = np.zeros_like(labels)
    target[:, 1:] = labels[:, :-1]
    target[: len(pairs), 0] = BOS_ID
    return {"source_ids": source, "target_ids": target, "labels": labels}
