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

#: More say no more of a corpus, and they are all in memory.
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


def padded_batches(batches: Batches, *, multiple: int) -> list[dict[str, np.ndarray]]:
    """The corpus as other toolkits batch it: sentences of like length, padded, as many positions.

    With a `multiple` of 1, sentences are sorted by their target's and then by their source's
    length, and each side is as wide as its longest sentence. With more the shapes are few: both
    sides are as wide as the longer one, rounded up, and empty rows complete a batch.
    """
    corpus = batches.parts[0].corpus
    positions = batches.rows_per_batch * batches.target_length
    sources, targets = corpus.source.lengths, corpus.target.lengths
    longer = np.maximum(sources, targets)
    kept = np.flatnonzero(longer <= batches.target_length)
    order = (sources, targets) if multiple == 1 else (longer,)
    kept = kept[np.lexsort([lengths[kept] for lengths in order])]
    widths = -(-longer[kept] // multiple) * multiple
    padded, start = [], 0
    while start < len(kept):
        stop, width = start + 1, int(widths[start])
        while stop < len(kept) and (multiple == 1 or widths[stop] == width):
            wider = max(width, int(widths[stop]))
            if (stop + 1 - start) * wider > positions:
                break
            stop, width = stop + 1, wider
        pairs = kept[start:stop]
        rows, source, target = positions // width, width, width
        if multiple == 1:
            rows, source, target = len(pairs), int(sources[pairs].max()), int(targets[pairs].max())
        padded.append(_pad(corpus, pairs, rows, source, target))
        start = stop
    shuffled = np.random.default_rng(0).permutation(len(padded))[:_PADDED_BATCHES]
    return [padded[index] for index in shuffled]


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
