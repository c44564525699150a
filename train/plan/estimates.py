"""Times and the largest batch, from what a program needs and what a chip can do."""

import math
from collections.abc import Callable

from train.costs.chips import Chip


def roofline(
    chip: Chip, flops: float, bytes_moved: float, bytes_sent: float = 0.0
) -> dict[str, float]:
    """Least seconds that each resource of a device is busy; the longest bounds the whole.

    Args:
      chip: its peak is that of bfloat16, in which a TPU computes float32 products too.
      flops, bytes_moved, bytes_sent: of one device.
    """
    return {
        "compute": flops * chip.devices / chip.flops,
        "memory": bytes_moved * chip.devices / chip.memory_bandwidth,
        "interconnect": bytes_sent * chip.devices / chip.interconnect,
    }


# Sizes that are compiled, after the first two, to find the largest that fits.
_TRIES = 3


def largest_fitting(needs: Callable[[int], float], memory: float, first: int) -> int:
    """Return the largest size that was seen to fit, 0 if none was.

    The need grows about linearly: a straight line through two sizes gives a third to try; if that
    is not the largest, a line through nearer sizes gives the next.

    Args:
      needs: bytes for a size, inf if all that is known is that they are too many; each call
        compiles.
      memory: bytes available.
      first: a size to begin with.
    """
    seen = {first: needs(first)}
    for _ in range(1 + _TRIES):
        if len(seen) == 1:
            size = 2 * first if seen[first] <= memory else first // 2
        else:
            size = _next_size(seen, memory)
        if size in seen or size < 1:
            break
        seen[size] = needs(size)
        if 0.95 * memory <= seen[size] <= memory:
            break
    return max((size for size in seen if seen[size] <= memory), default=0)


def _next_size(seen: dict[int, float], memory: float) -> int:
    """Return where a line through the nearest sizes below and above `memory` reaches it.

    If all are on one side, the line goes through the two nearest.
    """
    fits = sorted(size for size in seen if seen[size] <= memory)
    too_large = sorted(size for size in seen if seen[size] > memory)
    if too_large and seen[too_large[0]] == float("inf"):
        return math.isqrt(fits[-1] * too_large[0]) if fits else too_large[0] // 4
    low, high = fits[-1:] + too_large[:1] if fits and too_large else fits[-2:] or too_large[:2]
    slope = (seen[high] - seen[low]) / (high - low)
    if slope <= 0:
        return 2 * high
    if math.isinf(slope):
        return low // 2
    size = int(low + (memory - seen[low]) / slope)
    return min(max(size, low + 1), high - 1) if fits and too_large else size
