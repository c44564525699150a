"""The corpus as token ids: computed once, kept in an Arrow file, read row by row."""

import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxformer.config import EOS_ID
from jaxformer.files import write_bytes
from jaxformer.tokenizer import Tokenizer
from train.data.arrow import (
    ADVICE,
    CACHE_VERSION,
    cache_folder,
    locate_lists,
    reading_cache,
    write_arrow,
)
from train.data.sources import iterate
from train.progress import Count

if TYPE_CHECKING:
    import datasets

_ROWS_PER_BATCH = 20_000


class Sentences:
    """Token ids of many sentences, each ending with eos; only where they are is in memory.

    They are read, not memory-mapped: the pages of a mapping count towards the process's memory, and
    a few steps in random order touch them all.

    Args:
      path: the Arrow file.
      column: its column of type list<int32>.

    Attributes:
      lengths: tokens of each sentence, eos counted, int32 [sentences].
    """

    def __init__(self, path: Path, column: str):
        self._starts, self.lengths = locate_lists(path, column)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of the sentences `rows`, one after the other, int32 [tokens]."""
        pieces = zip((4 * self.lengths[rows]).tolist(), self._starts[rows].tolist(), strict=True)
        ids = b"".join([os.pread(self._file, size, start) for size, start in pieces])
        return np.frombuffer(ids, np.int32)


class EncodedCorpus:
    """Sentence pairs as token ids: `source` and `target` are `Sentences` of equal number.

    The Arrow file `path` has the columns "source" and "target" of type list<int32>, eos included.
    """

    def __init__(self, path: Path):
        self.source = Sentences(path, "source")
        self.target = Sentences(path, "target")

    def __len__(self) -> int:
        return len(self.source.lengths)


def encode_corpus(
    dataset: "datasets.Dataset",
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> EncodedCorpus:
    """Encode the columns "source" and "target", or find them encoded in `cache_dir`.

    The cache file is named after the text and the tokenizers' contents, so it is found again
    whatever the corpus is called, but not after either has changed. Memory grows with the corpus
    only by 24 bytes a pair.

    Args:
      dataset: the pairs.
      source_tokenizer, target_tokenizer: the tokenizers of the two columns.
      cache_dir: a folder; None is one in the cache of `datasets`.
      dropout, seed: share and choice of the merges left out, see `Tokenizer.encode_batch`.
    """
    import pyarrow as pa

    tokenizers = {"source": source_tokenizer, "target": target_tokenizer}

    def batches() -> Iterator[dict[str, list[list[int]]]]:
        count = Count("tokenising", len(dataset))
        seeds = np.random.SeedSequence(seed).generate_state(2 * -(-len(dataset) // _ROWS_PER_BATCH))
        own_seed = iter(seeds.tolist())  # one for each column of each batch
        for batch in iterate(dataset, _ROWS_PER_BATCH):
            yield {
                side: [
                    [*ids, EOS_ID]
                    for ids in tokenizer.encode_batch(
                        batch[side], dropout=dropout, seed=next(own_seed)
                    )
                ]
                for side, tokenizer in tokenizers.items()
            }
            count.add(len(batch["source"]))

    folder = cache_folder(cache_dir)
    name = hashlib.sha256(text_digest(dataset, folder))
    for tokenizer in tokenizers.values():
        name.update(hashlib.sha256(tokenizer.model).digest())
        name.update(repr((type(tokenizer).__name__, tokenizer.vocabulary)).encode())
    if dropout:
        name.update(repr((dropout, seed)).encode())
    path = folder / f"ids-{name.hexdigest()[:20]}.arrow"
    ids = pa.list_(pa.int32())
    write_arrow(path, pa.schema({"source": ids, "target": ids}), batches())
    with reading_cache(path):
        corpus = EncodedCorpus(path)
        if len(corpus) != len(dataset):
            raise ValueError(f"{len(corpus)} pairs instead of {len(dataset)}")
    return corpus


def text_digest(dataset: "datasets.Dataset", folder: Path) -> bytes:
    """Return a digest of the columns "source" and "target".

    Reading all of a large corpus takes a while, so the digest is kept in `folder`, under the
    fingerprint by which `datasets` tells one state of its files from another.
    """
    note = folder / f"digest-{CACHE_VERSION}-{dataset._fingerprint}"
    if note.is_file() and len(known := note.read_bytes()) == hashlib.sha256().digest_size:
        return known
    digest = hashlib.sha256(f"{CACHE_VERSION} {len(dataset)}".encode())
    columns = dataset.select_columns(["source", "target"]).with_format("arrow")
    for table in iterate(columns, _ROWS_PER_BATCH):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    write_bytes(note, digest.digest(), advice=ADVICE)
    return digest.digest()
