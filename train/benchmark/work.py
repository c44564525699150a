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
        """Of a step, by the paper's formulas."""
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


def padded_batches(
    batches: Batches, *, multiple: int, number: int = 200
) -> list[dict[str, np.ndarray]]:
    """The corpus as other toolkits batch it: sentences of like length, padded, as many positions.

    Each side is as wide as its longest sentence. With a `multiple` of more than 1 the shapes are
    few: both sides are as wide as the longer one, rounded up, and empty rows complete a batch.
    """
    corpus = batches.corpus
    positions = batches.rows_per_batch * batches.packing.target_length
    lengths = np.maximum(corpus.source.lengths, corpus.target.lengths)
    kept = np.flatnonzero(lengths <= batches.packing.target_length)
    kept = kept[np.argsort(lengths[kept], kind="stable")]
    widths = -(-lengths[kept] // multiple) * multiple
    padded, start = [], 0
    while start < len(kept):
        stop = start + 1
        while (
            stop < len(kept)
            and (stop + 1 - start) * widths[stop] <= positions
            and (multiple == 1 or widths[stop] == widths[start])
        ):
            stop += 1
        pairs, width = kept[start:stop], int(widths[stop - 1])
        rows, source, target = positions // width, width, width
        if multiple == 1:
            rows = len(pairs)
            source, target = (
                int(side.lengths[pairs].max()) for side in (corpus.source, corpus.target)
            )
        padded.append(_pad(corpus, pairs, rows, source, target))
        start = stop
    order = np.random.default_rng(0).permutation(len(padded))[:number]
    return [padded[index] for index in order]


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
