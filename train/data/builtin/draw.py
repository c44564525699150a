"""Random choices that are the same on every machine."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices made from `Random.random` alone, which Python keeps stable; `choice` may change."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._random() < probability

    def one(self, items: Sequence[T]) -> T:
        """Return one of the items, all equally likely."""
        return items[int(self._random() * len(items))]

    def other(self, items: Sequence[T], *than: T) -> T:
        """Return one of the items, but none of those given in `than`."""
        while (item := self.one(items)) in than:
            pass
        return item
