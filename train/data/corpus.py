"""The corpus as token ids: computed once, kept in an Arrow file, read row by row."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from jaxformer.config import EOS_ID
from jaxformer.tokenizer import Tokenizer
from train.data.arrow import CACHE_VERSION, cache_folder, map_arrow, write_arrow

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS_PER_BATCH = 20_000


class Sentences:
    """Token ids of many sentences, each ending with eos; they stay in the memory-mapped file.

    Attributes:
      lengths: tokens of each sentence, eos counted, int32 [sentences].
    """

    def __init__(self, column: "pa.ChunkedArray"):
        offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._ids = [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._starts = np.concatenate([np.zeros(0, np.int32), *(array[:-1] for array in offsets)])
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self.lengths = np.concatenate(
            [np.zeros(0, np.int32), *(np.diff(array) for array in offsets)]
        )

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids of the sentences `rows`, one after the other, int32 [tokens]."""
        chunks = np.searchsorted(self._first_rows, rows, side="right") - 1
        starts = self._starts[rows]
        stops = starts + self.lengths[rows]
        pieces = zip(chunks.tolist(), starts.tolist(), stops.tolist(), strict=True)
        ids = [self._ids[chunk][start:stop] for chunk, start, stop in pieces]
        return np.concatenate([np.zeros(0, np.int32), *ids])


class EncodedCorpus:
    """Sentence pairs as token ids: `source` and `target` are `Sentences` of equal number.

    `table` has the columns "source" and "target" of type list<int32>, eos included.
    """

    def __init__(self, table: "pa.Table"):
        self.source = Sentences(table.column("source"))
        self.target = Sentences(table.column("target"))

    def __len__(self) -> int:
        return len(self.source.lengths)


def encode_corpus(
    dataset: "datasets.Dataset",
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
) -> EncodedCorpus:
    """Encode the columns "source" and "target", or find them encoded in `cache_dir`.

    The cache file is named after the text and the tokenizers' bytes, so it is found again
    whatever the corpus is called, and never after either has changed.
    """
    import pyarrow as pa

    tokenizers = {"source": source_tokenizer, "target": target_tokenizer}

    def batches() -> Iterator[dict[str, list[list[int]]]]:
        for batch in cast("Iterator[dict[str, list[str]]]", dataset.iter(_ROWS_PER_BATCH)):
            yield {
                side: [[*ids, EOS_ID] for ids in tokenizer.encode_batch(batch[side])]
                for side, tokenizer in tokenizers.items()
            }

    name = _fingerprint(dataset, source_tokenizer, target_tokenizer)
    path = cache_folder(cache_dir) / f"ids-{name}.arrow"
    if not path.exists():
        ids = pa.list_(pa.int32())
        write_arrow(path, pa.schema({"source": ids, "target": ids}), batches())
    return EncodedCorpus(map_arrow(path))


def _fingerprint(dataset: "datasets.Dataset", *tokenizers: Tokenizer) -> str:
    digest = hashlib.sha256(f"{CACHE_VERSION} {len(dataset)}".encode())
    for tokenizer in tokenizers:
        digest.update(hashlib.sha256(tokenizer.model).digest())
    columns = dataset.select_columns(["source", "target"]).with_format("arrow")
    for table in cast("Iterator[pa.Table]", columns.iter(_ROWS_PER_BATCH)):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:20]
