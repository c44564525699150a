"""Predicates, and the statements and questions made of them.

English and Korean order the parts around the verb in mirror image. A predicate keeps them once,
in the English order, and a Korean sentence takes them backwards:

    Minsu  reads  a book  at the library  in the morning
    민수는  아침에  도서관에서  책을  읽는다
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from train.data.builtin import english, korean
from train.data.builtin.draw import Draw
from train.data.builtin.english import Tense
from train.data.builtin.korean import Kind
from train.data.builtin.lexicon import NOT_ASKED, Pair, Person

TENSES: tuple[Tense, ...] = ("present", "past", "future")
PRESENT_OR_PAST: tuple[Tense, ...] = ("present", "past")


class Predicate(NamedTuple):
    """What is said of a subject: a verb and its parts in the English order."""

    english: str
    stem: str
    kind: Kind
    parts: tuple[Pair, ...] = ()

    def plus(self, *parts: Pair) -> "Predicate":
        """Return the predicate with more parts after the others."""
        return self._replace(parts=self.parts + parts)

    @property
    def after_verb(self) -> str:
        """The English parts in a row."""
        return join(*(words for words, _ in self.parts))

    @property
    def before_verb(self) -> str:
        """The Korean parts in a row."""
        return join(*(meaning for _, meaning in reversed(self.parts)))


def join(*words: str) -> str:
    """Return the words with spaces between, without the empty ones."""
    return " ".join(word for word in words if word)


def sentence(pair: Pair, mark: str = ".") -> Pair:
    """Return the pair with a capital letter and a full stop or question mark."""
    words, meaning = pair
    return words[0].upper() + words[1:] + mark, meaning + mark


def statement(
    subject: Person, predicate: Predicate, tense: Tense = "present", *, negative: bool = False
) -> Pair:
    """Return "Minsu reads a book" or "Minsu does not read a book"."""
    verb = english.finite(predicate.english, subject.agreement, tense, negative=negative)
    ending = korean.finite(predicate.stem, predicate.kind, tense, negative=negative)
    return (
        join(subject.english, verb, predicate.after_verb),
        join(korean.topic(subject.korean), predicate.before_verb, ending),
    )


def question(subject: Person, predicate: Predicate, tense: Tense, asked: str = "") -> Pair:
    """Return "does Minsu read a book" or, with `asked`, "what does Minsu read".

    The Korean question word stays where its answer would be: among the parts, without English.
    """
    auxiliary, verb = english.forms(predicate.english, subject.agreement, tense)
    ending = korean.finite(predicate.stem, predicate.kind, tense, question=True)
    return (
        join(asked, auxiliary, subject.english, verb, predicate.after_verb),
        join(korean.topic(subject.korean), predicate.before_verb, ending),
    )


def who(predicate: Predicate, tense: Tense) -> Pair:
    """Return "who reads a book"."""
    ending = korean.finite(predicate.stem, predicate.kind, tense, question=True)
    return (
        join("who", english.finite(predicate.english, "third", tense), predicate.after_verb),
        join(korean.subject("누구"), predicate.before_verb, ending),
    )


def ongoing(predicate: Predicate) -> Predicate:
    """Return "be reading a book"."""
    parts = ((english.ing(predicate.english), ""), *predicate.parts)
    return Predicate("be", f"{predicate.stem}고 있", "adjective", parts)


def wanted(predicate: Predicate) -> Predicate:
    """Return "want to read a book"."""
    parts = ((f"to {predicate.english}", ""), *predicate.parts)
    return Predicate("want", f"{predicate.stem}고 싶", "adjective", parts)


def told_or_asked(
    draw: Draw,
    people: Sequence[Person],
    make: Callable[[Person], Predicate],
    tense: Tense,
    *,
    denied: bool = True,
) -> Pair:
    """Return a statement, perhaps a negative one if `denied`, or a yes/no question."""
    if draw.chance(0.25):
        subject = draw.other(people, *NOT_ASKED)
        return sentence(question(subject, make(subject), tense), "?")
    subject, negative = draw.one(people), denied and draw.chance(0.25)
    return sentence(statement(subject, make(subject), tense, negative=negative))
