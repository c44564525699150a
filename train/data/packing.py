"""Which sentence pairs share a row.

Rows have a fixed size, so that one compiled program serves a whole run: `source_length` positions
for the source and `target_length` for the target, and as many pairs as fit both. A packing is a
pure function of the seed and the sentence lengths, the same on every host and in every process.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from jaxformer.errors import UserError

# Row lengths are multiples of this, so that the hardware can tile the arrays.
_MULTIPLE = 8

# The share of pairs, longest first, that are spread over all rows before the others fill the
# gaps; 0 is best-fit-decreasing. Which share packs best depends on the corpus; trying is cheap.
_SPREADS = (0.0, 0.2, 0.4, 0.5)


class Packing(NamedTuple):
    """Row r holds the pairs `pairs[offsets[r]:offsets[r + 1]]`.

    Attributes:
      pairs: rows of the corpus, int64 [packed pairs].
      offsets: int64 [rows + 1].
      source_length, target_length: positions of a row, eos counted.
      target_fill: share of the target positions that hold a token.
      empty: the pairs left out because a side has no token, int64.
      too_long: the pairs left out because they fit no row, int64.
    """

    pairs: np.ndarray
    offsets: np.ndarray
    source_length: int
    target_length: int
    target_fill: float
    empty: np.ndarray
    too_long: np.ndarray

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1


def pack(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    *,
    source_length: int,
    target_length: int,
    seed: int,
    window: int = 1_000_000,
) -> Packing:
    """Shuffle the pairs for training and pack each `window` of them into as few rows as it can.

    Args:
      source_lengths: tokens of each pair's source, eos counted, integers [pairs].
      target_lengths: the same of its target.
      source_length, target_length: the most tokens of a row.
      seed: of the shuffle.
      window: pairs planned at a time; it bounds the memory.

    Raises:
      UserError: no pair fits.
    """
    empty = (source_lengths <= 1) | (target_lengths <= 1)  # 1: nothing but eos
    fits = (source_lengths <= source_length) & (target_lengths <= target_length)
    order = shuffle(len(source_lengths), seed)
    order = order[(fits & ~empty)[order]]
    if len(order) == 0:
        raise UserError(
            f"no training pair fits a row of {source_length} source and {target_length} target "
            f"tokens ({empty.sum()} are empty): raise data.target_length, and data.source_length "
            "if it is given"
        )
    pairs, counts = [], []
    for start in range(0, len(order), window):
        chosen = order[start : start + window]
        rows = _plan(source_lengths[chosen], target_lengths[chosen], source_length, target_length)
        pairs.append(chosen[np.argsort(rows, kind="stable")])
        counts.append(np.bincount(rows))
    return _packing(
        np.concatenate(pairs),
        np.concatenate(counts),
        source_lengths,
        target_lengths,
        source_length,
        target_length,
        empty=np.flatnonzero(empty),
        too_long=np.flatnonzero(~fits & ~empty),
    )


def pack_in_order(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    *,
    source_length: int,
    target_length: int,
) -> Packing:
    """Pack every pair for evaluation, in the corpus's order and leaving none out.

    Rows are made longer than `source_length` and `target_length` where a sentence needs it.
    """
    source_length = _round_up(max(source_length, source_lengths.max()))
    target_length = _round_up(max(target_length, target_lengths.max()))
    counts = []
    source_room = target_room = -1
    for source, target in zip(source_lengths.tolist(), target_lengths.tolist(), strict=True):
        if source > source_room or target > target_room:
            source_room, target_room = source_length, target_length
            counts.append(0)
        counts[-1] += 1
        source_room -= source
        target_room -= target
    none = np.zeros(0, np.int64)
    return _packing(
        np.arange(len(source_lengths)),
        np.array(counts),
        source_lengths,
        target_lengths,
        source_length,
        target_length,
        empty=none,
        too_long=none,
    )


def choose_source_length(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    target_length: int,
    *,
    seed: int,
) -> int:
    """Return the shortest source row, a multiple of 8, that leaves target rows 97 % full.

    At most one pair in a thousand is too long for it. If no source row reaches 97 %, as with a
    handful of pairs, it comes within half a percent of what the longest would reach.
    """
    sample = shuffle(len(source_lengths), seed)[:100_000]
    fits = (target_lengths <= target_length) & (target_lengths > 1) & (source_lengths > 1)
    sample = sample[fits[sample]]
    if len(sample) == 0:  # `pack` raises the error
        return _round_up(source_lengths.max())
    source, target = source_lengths[sample], target_lengths[sample]

    def target_fill(length: int) -> float:
        packing = pack(source, target, source_length=length, target_length=target_length, seed=seed)
        return packing.target_fill

    enough = np.quantile(source, 0.999)
    usual = source <= enough  # a handful of page-long "sentences" would dominate the sums
    # The source length at which both sides fill up at the same time.
    even = source[usual].sum() / target[usual].sum() * target_length
    longest = _round_up(max(2 * even, source.max()))
    goal = min(0.97, 0.995 * target_fill(longest))
    shortest = _round_up(max(goal * even, enough))
    for length in range(shortest, longest, _MULTIPLE):
        if target_fill(length) >= goal:
            return length
    return longest


def shuffle(number: int, *seed: int) -> np.ndarray:
    """Return a permutation of range(number).

    It uses raw bits, whose stream NumPy promises for good: `Generator.permutation` may change with
    a release, and a run resumed after that would see other data.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(number), kind="stable")


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Join ranges: starts [5, 20] and lengths [3, 2] give [5, 6, 7, 20, 21]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def _packing(
    pairs: np.ndarray,
    counts: np.ndarray,
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    source_length: int,
    target_length: int,
    *,
    empty: np.ndarray,
    too_long: np.ndarray,
) -> Packing:
    rows = len(counts)
    return Packing(
        pairs=pairs,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        source_length=source_length,
        target_length=target_length,
        target_fill=float(target_lengths[pairs].sum() / (rows * target_length)),
        empty=empty,
        too_long=too_long,
    )


def _round_up(length: float) -> int:
    return -(-int(np.ceil(length)) // _MULTIPLE) * _MULTIPLE


def _plan(
    source: np.ndarray, target: np.ndarray, source_length: int, target_length: int
) -> np.ndarray:
    """Return the row of each pair, from 0, int64 [pairs]."""
    # Pairs of equal lengths are interchangeable, so the work grows with the number of different
    # lengths, a few thousand, and not with the number of pairs.
    keys = -(target.astype(np.int64) * (source_length + 1) + source)
    kinds, counts = np.unique(keys, return_counts=True)
    targets, sources = np.divmod(-kinds, source_length + 1)
    sizes = list(zip(sources.tolist(), targets.tolist(), counts.tolist(), strict=True))
    plans = [_fill_rows(sizes, source_length, target_length, spread) for spread in _SPREADS]
    rows = np.empty(len(keys), np.int64)
    rows[np.argsort(keys, kind="stable")] = min(plans, key=np.max)
    return rows


def _fill_rows(
    sizes: list[tuple[int, int, int]], source_length: int, target_length: int, spread: float
) -> np.ndarray:
    """Return the row of each pair, where `sizes` are (source, target, pairs), longest first.

    The first `spread` of the pairs go where there is most room, the others where there is least.
    """
    total = sum(count for _, _, count in sizes)
    num_rows = 0
    open_rows = _OpenRows(target_length)
    if spread:
        num_rows = max(
            -(-sum(source * count for source, _, count in sizes) // source_length),
            -(-sum(target * count for _, target, count in sizes) // target_length),
        )
        open_rows.add(range(num_rows), source_length, target_length)
    row_of: list[range] = []
    placed = 0
    for source, target, count in sizes:
        while count:
            room = open_rows.find(source, target, roomiest=placed < spread * total)
            if room:
                rows = open_rows.take(*room, count)
            else:
                per_row = min(source_length // source, target_length // target)
                rows = range(num_rows, num_rows - (-count // per_row))
                num_rows = rows.stop
                room = source_length, target_length
            row_of.append(rows)
            placed += len(rows)
            count -= len(rows)
            open_rows.add(rows, room[0] - source, room[1] - target)
    starts, stops = np.array([(rows.start, rows.stop) for rows in row_of]).T
    return ranges(starts, stops - starts)


class _OpenRows:
    """Rows with room left, grouped by how many source and target tokens they still take."""

    def __init__(self, target_length: int):
        self._rows: dict[tuple[int, int], list[range]] = defaultdict(list)
        # For each target room, bit r is set if there are rows with source room r.
        self._source_rooms = [0] * (target_length + 1)

    def add(self, rows: range, source_room: int, target_room: int) -> None:
        self._rows[source_room, target_room].append(rows)
        self._source_rooms[target_room] |= 1 << source_room

    def find(self, source: int, target: int, *, roomiest: bool) -> tuple[int, int] | None:
        """Return the largest or smallest (source room, target room) that takes a pair, if any."""
        target_rooms = range(target, len(self._source_rooms))
        for target_room in reversed(target_rooms) if roomiest else target_rooms:
            if rooms := self._source_rooms[target_room] >> source:
                lowest = (rooms & -rooms).bit_length()
                return source + (rooms.bit_length() if roomiest else lowest) - 1, target_room
        return None

    def take(self, source_room: int, target_room: int, limit: int) -> range:
        """Remove and return up to `limit` rows of that room."""
        group = self._rows[source_room, target_room]
        rows = group.pop()
        if len(rows) > limit:
            group.append(rows[limit:])
        if not group:
            self._source_rooms[target_room] &= ~(1 << source_room)
        return rows[:limit]
