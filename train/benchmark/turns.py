"""What engines report of the steps they take in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Translate = Callable[[Sequence[str]], list[str]]


class Turn(NamedTuple):
    """What an engine did in one turn, a number for each step."""

    seconds: list[float]
    waited: list[float]  # of these, seconds in which the device had no batch yet
    tokens: list[int]  # real target tokens
    positions: list[int]  # target positions, padding included
    peak_memory: int | None = None  # most bytes in use, where the engine can tell


def take_turn(step: Callable[[], tuple[int, int]], steps: int) -> Turn:
    """Call `step`, which returns its real target tokens and positions, `steps` times."""
    turn = Turn([], [0.0] * steps, [], [])
    for _ in range(steps):
        began = time.perf_counter()
        tokens, positions = step()
        turn.seconds.append(time.perf_counter() - began)
        turn.tokens.append(tokens)
        turn.positions.append(positions)
    return turn


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    if len(seconds) == 1:
        return dict.fromkeys(("median", "p10", "p90"), seconds[0])
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": statistics.median(seconds), "p10": deciles[0], "p90": deciles[-1]}
