"""Sentences of any number and length as batches of a few static shapes."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxformer.config import PAD_ID

#: Rows a device below which smaller batches are no faster, but for a single one.
SMALLEST = 16


def bucket(length: int, smallest: int = 16) -> int:
    """The least of 16, 32, 64, … that is not below `length`."""
    return max(smallest, 1 << (length - 1).bit_length())


def batches(
    lengths: Sequence[int], batch_tokens: int, *, devices: int = 1
) -> Iterator[tuple[list[int], int, int]]:
    """Group sentences of like length, the longest first.

    Args:
      lengths: tokens of each sentence.
      batch_tokens: rows times length of a batch, over all devices.
      devices: rows come in multiples of these.

    Yields:
      Indices of the sentences of a batch, its rows (no fewer) and its length. Rows are 1 or
      `SMALLEST` times a power of two for each device; lengths are those of `bucket`.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        length = bucket(lengths[order[0]])
        full = batch_tokens // length // devices
        full = SMALLEST << (full // SMALLEST).bit_length() - 1 if full >= SMALLEST else max(1, full)
        waiting = -(-len(order) // devices)
        rows = 1 if waiting == 1 else min(full, bucket(waiting, SMALLEST))
        rows *= devices
        yield order[:rows], rows, length
        order = order[rows:]


def pad(sentences: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """Token ids as an int32 array [rows, length], filled with padding."""
    ids = np.full((rows, length), PAD_ID, np.int32)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
    return ids
