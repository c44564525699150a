"""From what a program asks for and what a chip can do to times, and to the largest batch."""

from collections.abc import Callable

from train.chips import Chip


def roofline(
    chip: Chip, flops: float, bytes_moved: float, bytes_sent: float = 0.0
) -> dict[str, float]:
    """Seconds that each resource of a device is busy at least; the longest bounds the whole.

    Args:
      chip: its peak is that of bfloat16, which float32 products are made of on a TPU too.
      flops, bytes_moved, bytes_sent: of one device.
    """
    return {
        "compute": flops * chip.devices / chip.flops,
        "memory": bytes_moved * chip.devices / chip.memory_bandwidth,
        "interconnect": bytes_sent * chip.devices / chip.interconnect,
    }


def largest_fitting(
    needs: Callable[[int], float], memory: float, first: int, tries: int = 3
) -> int:
    """Return the largest size that was seen to fit, 0 if none was.

    The need grows about linearly: a straight line through two sizes says which third to try, and,
    where that did not fit after all, the next one.

    Args:
      needs: bytes for a size; each call compiles.
      memory: bytes there are.
      first: a size to begin with.
      tries: sizes to compile after the first two.
    """
    seen = {first: needs(first)}
    second = 2 * first if seen[first] <= memory else max(first // 2, 1)
    seen.setdefault(second, needs(second))
    for _ in range(tries):
        fitting = max((size for size in seen if seen[size] <= memory), default=0)
        too_large = min((size for size in seen if seen[size] > memory), default=None)
        guess = _where_the_line_meets(seen, memory)
        if too_large is not None:
            guess = min(guess, too_large - 1)
        if guess <= fitting:
            break
        seen[guess] = needs(guess)
        if 0.95 * memory <= seen[guess] <= memory:
            break
    return max((size for size in seen if seen[size] <= memory), default=0)


def _where_the_line_meets(seen: dict[int, float], memory: float) -> int:
    """The size at which the line through the two nearest to `memory` reaches it."""
    finite = [size for size in seen if seen[size] < float("inf")]
    if len(finite) < 2:
        return min(seen) // 2 if not finite else (finite[0] + max(seen)) // 2
    low, high = sorted(sorted(finite, key=lambda size: abs(seen[size] - memory))[:2])
    slope = (seen[high] - seen[low]) / (high - low)
    if slope <= 0:
        return 2 * high
    return max(int(low + (memory - seen[low]) / slope), 1)
