"""The built-in English-Korean corpus: drawn from a small grammar, nothing to download."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

from train.data.builtin import being, doing
from train.data.builtin.draw import Draw
from train.data.builtin.lexicon import Pair

Split = Literal["train", "validation", "test"]

SIZES: dict[Split, int] = {"train": 30_000, "validation": 500, "test": 1000}
WORDS = range(3, 15)  # in an English sentence
# How often a sentence type is drawn, in relation to the others.
SHARES: dict[Callable[[Draw], Pair], int] = {
    doing.act: 25,
    doing.act_on_many: 8,
    doing.act_now: 6,
    doing.want: 4,
    doing.give: 5,
    doing.like: 3,
    doing.move: 10,
    doing.ask_about_action: 10,
    doing.ask_about_motion: 4,
    doing.do_both: 5,
    doing.differ: 4,
    doing.because: 3,
    being.exist: 5,
    being.be_somewhere: 3,
    being.have: 4,
    being.be_like: 18,
    being.be_like_both: 6,
    being.be_somebody: 2,
}


def drawn(seed: int = 0) -> Iterator[Pair]:
    """Yield pairs without end, some of them again and again; "I go home." comes first."""
    draw = Draw(seed)
    types = [sentence_type for sentence_type, share in SHARES.items() for _ in range(share)]
    yield doing.I_GO_HOME
    while True:
        pair = draw.one(types)(draw)
        if len(pair[0].split()) in WORDS:
            yield pair


@cache
def corpus() -> dict[Split, list[Pair]]:
    """Return all splits."""
    distinct: dict[Pair, None] = {}
    pairs = drawn()
    while len(distinct) < sum(SIZES.values()):
        distinct.setdefault(next(pairs))
    home, *others = distinct
    # The first are a fair sample; among the last, small families of sentences are used up.
    seen = SIZES["test"] + SIZES["validation"]
    return {
        "train": [home, *others[seen:]],
        "validation": others[SIZES["test"] : seen],
        "test": others[: SIZES["test"]],
    }


def builtin(split: Split) -> list[Pair]:
    """Return the English-Korean pairs of a split, the same on every machine.

    An English sentence has one translation. No sentence of a split, in either language, is in
    another split; the test combines words anew, but every one of them is in the training split.
    """
    return list(corpus()[split])
