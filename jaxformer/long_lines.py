"""Lines too long for the model: cut before translation, joined after it."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxformer.results import Hypothesis
from jaxformer.tokenizer import Tokenizer


class Part(NamedTuple):
    """A line, or a part of one that is too long; without eos."""

    line: int  # its number, from 1
    number: int  # of the part, from 0
    ids: list[int]


def parts_of(
    lines: Sequence[Sequence[int]],
    limit: int,
    tokenizer: Tokenizer,
    *,
    first_line: int,
    warn: Callable[[str], None],
) -> Iterator[Part]:
    """Yield parts of up to `limit` pieces: none for an empty line, several for one too long.

    Args:
      lines: the pieces of each line, without eos.
      limit: the most pieces that a part may have.
      tokenizer: the one that made the pieces.
      first_line: the number of the first line.
      warn: called with a message for each line that is too long.
    """
    for line, ids in enumerate(lines, start=first_line):
        if len(ids) > limit:
            warn(
                f"line {line} has {len(ids)} pieces, more than the model's {limit}: "
                "translated in parts"
            )
        for number, part in enumerate(cut(ids, limit, tokenizer)):
            yield Part(line, number, part)


def cut(ids: Sequence[int], limit: int, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Cut before a word, as late as the limit allows, or at the limit if it falls in the first.

    A language code at the beginning, such as ">>deu<<", is repeated in every part.
    """
    ids = list(ids)
    first = tokenizer.pieces(ids[:1])
    code = ids[:1] if first and first[0].startswith(">>") and first[0].endswith("<<") else []
    if len(code) == limit:  # nothing would be left for the rest
        code = []
    begin, before = 0, list[int]()  # of the part; the ids put before its own
    while len(before) + len(ids) - begin > limit:
        part = before + ids[begin : begin + limit + 1 - len(before)]
        starts = [
            i
            for i, piece in enumerate(tokenizer.pieces(part))
            if i > len(code) and piece.startswith("▁")
        ]
        end = starts[-1] if starts else limit
        yield part[:end]
        begin, before = begin + end - len(before), code
    if begin < len(ids):
        yield before + ids[begin:]


def join(parts: Sequence[Sequence[Hypothesis]]) -> list[Hypothesis]:
    """Join the hypotheses of a line's parts: the best of each, then the second best, and so on."""
    if len(parts) == 1:
        return list(parts[0])
    if not parts:
        return [Hypothesis("", 0.0, 0.0, [], [], True)]
    return [
        Hypothesis(
            text=" ".join(part.text for part in joined),
            score=sum(part.score for part in joined),
            log_prob=sum(part.log_prob for part in joined),
            tokens=[token for part in joined for token in part.tokens],
            ids=[token for part in joined for token in part.ids],
            finished=all(part.finished for part in joined),
        )
        for joined in zip(*parts, strict=False)
    ]
