"""Batches of a few static shapes from any number of sentences of any length."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np

from jaxformer.config import PAD_ID
from jaxformer.errors import UserError
from jaxformer.ids import as_ids

T = TypeVar("T")

#: The smallest length, and the fewest rows per device, so that there are few shapes. As an
#: exception, 1 and 4 rows have shapes of their own.
SMALLEST = 16


def bucket(length: int) -> int:
    """The smallest of 16, 32, 64, … that is at least `length`."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def groups(
    lengths: Sequence[int], *, few_shapes: bool = False, limit: int | None = None
) -> Iterator[tuple[list[int], int]]:
    """Group sentences of similar length, longest first.

    Args:
      lengths: tokens of each sentence.
      few_shapes: use fewer lengths, at the cost of more padding: that of the longest sentence,
        rounded up to a multiple of 16, then a quarter of it and so on, while that is 32 or more.
      limit: upper bound on the lengths, which no sentence exceeds: the model's number of positions.

    Yields:
      The indices of a group's sentences, longest first, and the length of the group: without
      `few_shapes`, that of `bucket`, but at most `limit`.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    kinds: list[int] = []
    if few_shapes and order:
        longest = -(-lengths[order[0]] // 16) * 16
        kinds = [longest if limit is None else min(longest, limit)]
        while kinds[-1] // 4 >= 32:
            kinds.append(kinds[-1] // 4)

    def padded(index: int) -> int:
        if kinds:
            return min(kind for kind in kinds if kind >= lengths[index])
        length = bucket(lengths[index])
        return length if limit is None else min(length, limit)

    for length, same in groupby(order, key=padded):
        yield list(same), length


def num_rows(waiting: int, batch_tokens: int, length: int, devices: int = 1) -> int:
    """Rows for sentences of one length: enough for all that wait, if `batch_tokens` allows.

    They are 1, 4 or `SMALLEST` times a power of two per device, or fewer if that is too many.

    Raises:
      UserError: `batch_tokens` is below 1.
    """
    if batch_tokens < 1:
        raise UserError(f"batch_tokens is {batch_tokens}: give at least 1")
    full = batch_tokens // length // devices
    full = SMALLEST << (full // SMALLEST).bit_length() - 1 if full >= SMALLEST else max(1, full)
    waiting = -(-waiting // devices)
    needed = next((rows for rows in (1, 4) if waiting <= rows), bucket(waiting))
    return devices * min(full, needed)


def batches(
    lengths: Sequence[int],
    batch_tokens: int,
    *,
    few_shapes: bool = False,
    limit: int | None = None,
) -> Iterator[tuple[list[int], int, int]]:
    """Yield each batch's sentences, its rows (at least as many) and its length, longest first."""
    for group, length in groups(lengths, few_shapes=few_shapes, limit=limit):
        while group:
            rows = num_rows(len(group), batch_tokens, length)
            yield group[:rows], rows, length
            group = group[rows:]


def pair_batches(
    sources: list[list[int]],
    targets: list[list[int]],
    batch_tokens: int,
    limit: int | None,
    *,
    few_shapes: bool = False,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield indices of pairs of similar length and both sides' ids [B, T], T `limit` at most."""
    lengths = [max(map(len, pair)) for pair in zip(sources, targets, strict=True)]
    found = batches(lengths, batch_tokens, few_shapes=few_shapes, limit=limit)
    for chosen, rows, length in found:
        source, target = ([side[index] for index in chosen] for side in (sources, targets))
        yield chosen, pad(source, rows, length), pad(target, rows, length)


def pad(sentences: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """Token ids as an int32 array [rows, length], filled with padding.

    Raises:
      UserError: the ids are not integers.
    """
    ids = np.full((rows, length), PAD_ID, np.int64)
    for row, sentence in enumerate(sentences):
        tokens = np.asarray(sentence)
        if tokens.dtype.kind not in "iu" and tokens.size:
            raise UserError(f"the tokens of a sentence are {tokens.dtype}: give integers")
        ids[row, : tokens.size] = tokens
    return as_ids(ids)


def in_windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last holds what is left.

    If the next item raises, the items before it are yielded first: [1, 2, 3, error] becomes
    [1, 2], [3] and then the error.
    """
    window: list[T] = []
    try:
        for item in items:
            window.append(item)
            if len(window) == size:
                yield window
                window = []
    except Exception:
        if window:
            yield window
        raise
    if window:
        yield window
