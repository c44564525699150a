"""English word forms and the auxiliaries of statements and questions."""

from functools import cache
from typing import Literal

Tense = Literal["present", "past", "future"]
Agreement = Literal["first", "third", "plural"]  # I; he, she, it; we, you, they

IRREGULAR = """
    buy bought, choose chose, come came, draw drew, drink drank, eat ate, get got, give gave,
    go went, have had, leave left, make made, meet met, read read, ride rode, run ran, see saw,
    sell sold, send sent, sing sang, sleep slept, swim swam, take took, teach taught, write wrote
"""
PAST = {verb: past for verb, past in map(str.split, IRREGULAR.split(","))}
PLURALS = {"child": "children", "man": "men", "woman": "women", "photo": "photos"}
BE = {
    "present": {"first": "am", "third": "is", "plural": "are"},
    "past": {"first": "was", "third": "was", "plural": "were"},
}


def with_s(word: str) -> str:
    """Return the word with the -s of plurals and of the third person: books, boxes, studies."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def plural(noun: str) -> str:
    """Return the plural, of the last word: apples, kind children, police officers."""
    before, space, last = noun.rpartition(" ")
    return before + space + (PLURALS.get(last) or with_s(last))


def doubled(verb: str) -> str:
    """Return the verb as it meets a vowel: swim doubles its m, read and play nothing."""
    vowels = [letter for letter in verb if letter in "aeiou"]
    short = len(vowels) == 1 and verb[-2] in vowels and verb[-1] not in "aeiouwxy"
    return verb + verb[-1] if short else verb


def past(verb: str) -> str:
    """Return the past tense: walked, planned, studied, ate."""
    if verb in PAST:
        return PAST[verb]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "d" if verb.endswith("e") else doubled(verb) + "ed"


def ing(verb: str) -> str:
    """Return the present participle, of the first word: making, swimming, listening to."""
    verb, _, particle = verb.partition(" ")
    stem = verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else doubled(verb)
    return f"{stem}ing {particle}".rstrip()


def article(phrase: str) -> str:
    """Return the phrase after a or an: a book, an old book."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@cache
def forms(verb: str, agreement: Agreement, tense: Tense) -> tuple[str, str]:
    """Return auxiliary and rest, as questions separate them: ("does", "read"), ("is", "")."""
    if tense == "future":
        return "will", verb
    if verb == "be":
        return BE[tense][agreement], ""
    if tense == "past":
        return "did", verb
    return ("does" if agreement == "third" else "do"), verb


@cache
def finite(verb: str, agreement: Agreement, tense: Tense, *, negative: bool = False) -> str:
    """Return the verb of a statement: reads, listened to, is not, will not read."""
    auxiliary, rest = forms(verb, agreement, tense)
    if negative:
        return f"{auxiliary} not {rest}".rstrip()
    if auxiliary not in ("do", "does", "did"):
        return f"{auxiliary} {rest}".rstrip()
    first, _, particle = verb.partition(" ")
    if auxiliary == "did":
        first = past(first)
    elif auxiliary == "does":
        first = "has" if first == "have" else with_s(first)
    return f"{first} {particle}".rstrip()
