"""Sentences of any number and length as batches of a few static shapes."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxformer.config import PAD_ID

#: Rows a device below which smaller batches are no faster, but for a single one.
SMALLEST = 16


def bucket(length: int) -> int:
    """The least of 16, 32, 64, … that is not below `length`."""
    return max(16, 1 << (length - 1).bit_length())


def batches(
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    devices: int = 1,
    few_shapes: bool = False,
    limit: int | None = None,
) -> Iterator[tuple[list[int], int, int]]:
    """Group sentences of like length, the longest first.

    Args:
      lengths: tokens of each sentence.
      batch_tokens: rows times length of a batch, over all devices.
      devices: rows come in multiples of these.
      few_shapes: fewer programs to compile, but more padding. Lengths are then that of the longest
        sentence, rounded up to a multiple of 16, and a quarter of it and so on, if 32 or more; and
        batches of one length have one number of rows.
      limit: no batch is longer, as no sentence is: the positions that the model has.

    Yields:
      Indices of the sentences of a batch, its rows (no fewer) and its length. Rows are 1 or
      `SMALLEST` times a power of two for each device; lengths are those of `bucket`.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    length = rows = 0
    while order:
        longest = lengths[order[0]]
        if not few_shapes:
            length, rows = bucket(longest), 0
        elif not length:
            length = -(-longest // 16) * 16
        length = length if limit is None else min(length, limit)
        while few_shapes and length // 4 >= max(longest, 32):
            length, rows = length // 4, 0
        rows = rows or devices * _rows(len(order), batch_tokens // length, devices)
        yield order[:rows], rows, length
        order = order[rows:]


def _rows(waiting: int, full: int, devices: int) -> int:
    """Rows a device of a batch that has room for `full` of the sentences `waiting`."""
    full //= devices
    full = SMALLEST << (full // SMALLEST).bit_length() - 1 if full >= SMALLEST else max(1, full)
    waiting = -(-waiting // devices)
    return 1 if waiting == 1 else min(full, bucket(waiting))


def pad(sentences: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """Token ids as an int32 array [rows, length], filled with padding."""
    ids = np.full((rows, length), PAD_ID, np.int32)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
    return ids
