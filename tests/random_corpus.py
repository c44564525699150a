"""Encoded corpora of given sentence lengths, and a function that reads the pairs in a batch."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from train.data.arrow import write_arrow
from train.data.corpus import EncodedCorpus

FOLDER = tempfile.TemporaryDirectory()
NUMBERS = itertools.count()


def corpus_of(lengths, seed=0, first=4):
    """Return a corpus of random tokens >= `first`, its file in batches of 3 pairs; its sides."""
    rng = np.random.default_rng(seed)
    sides = [
        [[*rng.integers(first, first + 95, n - 1).tolist(), 2] for n in side]
        for side in zip(*lengths, strict=True)
    ]
    return write_corpus(sides), sides


def write_corpus(sides):
    """Return the corpus of `sides`, two lists of lists of ids."""
    ids = pa.list_(pa.int32())
    batches = (
        {"source": sides[0][i : i + 3], "target": sides[1][i : i + 3]}
        for i in range(0, len(sides[0]), 3)
    )
    path = Path(FOLDER.name, f"{next(NUMBERS)}.arrow")
    write_arrow(path, pa.schema({"source": ids, "target": ids}), batches)
    return EncodedCorpus(path)


def unpack(batch):
    """The pairs in a batch, read segment by segment, each input checked against its labels."""
    pairs = []
    for r in range(len(batch["labels"])):
        row = {name: array[r] for name, array in batch.items()}
        source_segments, target_segments = row["source_segment_ids"], row["target_segment_ids"]
        assert set(source_segments.tolist()) - {0} == set(target_segments.tolist()) - {0}
        for name, segments in (("source_ids", source_segments), ("labels", target_segments)):
            used = np.count_nonzero(segments)
            assert (np.diff(segments[:used]) >= 0).all() and not segments[used:].any()
            assert ((row[name] > 0) == (segments > 0)).all()
        for segment in range(1, target_segments.max() + 1):
            inputs = row["target_ids"][target_segments == segment].tolist()
            labels = row["labels"][target_segments == segment].tolist()
            assert inputs == [1, *labels[:-1]]
            pairs.append((row["source_ids"][source_segments == segment].tolist(), labels))
        assert not row["target_ids"][target_segments == 0].any()
    return pairs
