"""What a tokenizer does to text before it splits it: spell it in one way, and nothing more.

sentencepiece's own rule, nmt_nfkc, also writes "，" as ",", "…" as "..." and "½" as "1⁄2"; a model
of such pieces can never output the original. Here a letter that Unicode spells in two ways gets one
spelling (NFC: "e" and U+0301 become "é"), all white space becomes spaces, invisible characters go.
"""

import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import permutations

# The planes with letters, without NUL, which sentencepiece cannot read.
_CODES = range(1, 0x30000)
_SURROGATES = range(0xD800, 0xE000)
# A soft hyphen, a zero-width space, a word joiner and a byte order mark, which end up inside text.
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"


@cache
def normalization_rules() -> str:
    r"""Return the rules as sentencepiece reads them: hexadecimal code points, a tab, the new ones.

    "65 301\te9" is one line of them.
    """

    def code_points(text: str) -> str:
        return " ".join(f"{ord(letter):x}" for letter in text)

    return "".join(f"{code_points(one)}\t{code_points(other)}\n" for one, other in _rules())


def is_blank(text: str) -> bool:
    """Whether normalisation would leave nothing but spaces of a text."""
    return all(_is_space(letter) or _is_invisible(letter) for letter in text)


def _rules() -> Iterator[tuple[str, str]]:
    for code in _CODES:
        if code in _SURROGATES:
            continue
        letter = chr(code)
        if _is_space(letter):
            if letter != " ":
                yield letter, " "
        elif _is_invisible(letter):
            yield letter, ""
        elif (one := unicodedata.normalize("NFC", letter)) != letter:
            yield letter, one
        else:
            # Sorted, because the names of files in the cache depend on the rules.
            yield from ((spelling, letter) for spelling in sorted(_spellings(letter)))


def _is_space(letter: str) -> bool:
    return letter.isspace() or letter == "▁"  # sentencepiece's sign for a space


def _is_invisible(letter: str) -> bool:
    return letter in _INVISIBLE or unicodedata.category(letter) == "Cc"


def _spellings(letter: str) -> set[str]:
    """The other ways to write a letter: "ế" is "e" and two marks, or "ê" and one."""
    apart = unicodedata.normalize("NFD", letter)
    if len(apart) == 1:
        return set()
    base, marks = apart[0], apart[1:]
    spellings = {
        unicodedata.normalize("NFC", base + "".join(order[:joined])) + "".join(order[joined:])
        for order in permutations(marks)
        for joined in range(len(marks))
    }
    return {each for each in spellings if unicodedata.normalize("NFC", each) == letter} - {letter}
