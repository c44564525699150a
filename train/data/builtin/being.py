"""Sentences about what there is and what it is like: each function draws one pair."""

from collections.abc import Sequence

from train.data.builtin import english, korean
from train.data.builtin import lexicon as lex
from train.data.builtin.clause import (
    PRESENT_OR_PAST,
    TENSES,
    Predicate,
    join,
    question,
    sentence,
    statement,
    told_or_asked,
)
from train.data.builtin.draw import Draw
from train.data.builtin.lexicon import Adjective, Noun, Pair, Person
from train.data.builtin.phrases import (
    action,
    counted,
    definite,
    described,
    several,
    simple,
    verb,
    with_attribute,
)

# ---- being somewhere, having ----


def site(draw: Draw) -> tuple[Noun, Pair]:
    """Return a thing and where it may be."""
    goods, spots = draw.one(lex.SITES)
    noun, spot = draw.one(goods), draw.one(spots)
    while spot[0].endswith(noun.english):  # not a bank next to the bank
        spot = draw.one(spots)
    return noun, spot


def exist(draw: Draw) -> Pair:
    """There is a cat under the table; also: no cat, three cats, is there, how many."""
    noun, (spot, location) = site(draw)
    many, asked, tense = bool(noun.counter) and draw.chance(0.5), draw.chance(0.3), draw.one(TENSES)
    none = not many and not asked and draw.chance(0.4)
    words, meaning = simple(noun)[0], korean.subject(noun.korean)
    if none:
        words = f"no {noun.english}"
    elif many and asked:
        words, meaning = f"how many {several(noun)}", f"{meaning} 몇 {noun.counter}"
    elif many:
        words, meaning = counted(draw, noun, korean.subject)
    plural = many and not words.startswith("one ")
    be, rest = english.forms("be", "plural" if plural else "third", tense)
    if many and asked:
        words = join(words, be, "there", rest, spot)
    elif asked:
        words = join(be, "there", rest, words, spot)
    else:
        words = join("there", be, rest, words, spot)
    ending = korean.finite("있", "adjective", tense, negative=none, question=asked)
    return sentence((words, f"{location}에 {meaning} {ending}"), "?" if asked else ".")


def be_somewhere(draw: Draw) -> Pair:
    """The cat is under the table. Where is my book?"""
    noun, (spot, location) = site(draw)
    tense = draw.one(PRESENT_OR_PAST)
    if noun.article == "a" and noun.counter and draw.chance(0.5):
        subject = Person(*definite(draw, noun))
    else:
        subject = Person(f"the {noun.english}", noun.korean)
    if draw.chance(0.15):
        predicate = Predicate("be", "있", "adjective", (("", "어디에"),))
        return sentence(question(subject, predicate, tense, "where"), "?")
    predicate = Predicate("be", "있", "adjective", ((spot, f"{location}에"),))
    return told_or_asked(draw, (subject,), lambda _: predicate, tense)


def have(draw: Draw) -> Pair:
    """Minsu has a red bicycle. How many cats do you have?"""
    noun, tense = draw.one(lex.OWNED), draw.one(PRESENT_OR_PAST)
    way = draw.one(("one", "one", "like", "like", "many", "many", "many?"))
    if way == "many?":
        subject = draw.other(lex.ANYONE, *lex.NOT_ASKED)
        part = ("", f"{korean.subject(noun.korean)} 몇 {noun.counter}")
        predicate = Predicate("have", "있", "adjective", (part,))
        return sentence(question(subject, predicate, tense, f"how many {several(noun)}"), "?")
    if way == "many":
        part = counted(draw, noun, korean.subject)
    else:
        words, meaning = simple(noun) if way == "one" else described(draw, noun)
        part = (words, korean.subject(meaning))
    predicate = Predicate("have", "있", "adjective", (part,))
    return told_or_asked(draw, lex.ANYONE, lambda _: predicate, tense, denied=way != "many")


# ---- being ----


def pointed_out(draw: Draw, noun: Noun) -> Person:
    """Return "math", "the river", "this bread", "Mina's coat" as a subject."""
    if noun in lex.SPORTS + lex.STUDIES:
        return Person(*simple(noun))
    if noun.article == "the" and draw.chance(0.4):
        return Person(*simple(noun))
    return Person(*definite(draw, noun, owned=0.4 if noun.article == "a" else 0))


def made(draw: Draw, maker: Person) -> tuple[Person, Noun]:
    """Return "the book that Minsu bought" as a subject."""
    frame = draw.one(lex.MAKING)
    noun = draw.one(frame.objects)
    words = f"the {noun.english} that {maker.english} {english.past(frame.english)}"
    clause = f"{korean.subject(maker.korean)} {korean.adnominal(frame.stem, 'verb', past=True)}"
    return Person(words, f"{clause} {noun.korean}"), noun


def doer(draw: Draw) -> Person:
    """Return "the student who studies math" as a subject."""
    frame, tense = verb(draw, "get up", "sleep"), draw.one(PRESENT_OR_PAST)
    person = draw.one([one for one in lex.ADULTS + lex.YOUNG if one in frame.people])
    predicate = action(draw, person, frame, place=0.3 if frame.objects else 1)
    does = english.finite(frame.english, "third", tense)
    doing = korean.adnominal(frame.stem, "verb", past=tense == "past")
    return Person(
        join(person.english, "who", does, predicate.after_verb),
        join(predicate.before_verb, doing, person.korean),
    )


def likened(draw: Draw) -> tuple[Sequence[Person], Sequence[Adjective]]:
    """Return possible subjects and what they may be like."""
    way = draw.one(("thing",) * 3 + ("made", "person", "doer") * 2)
    if way == "person":
        return lex.ANYONE, draw.one((lex.MOODS, lex.TRAITS))
    if way == "doer":
        return (doer(draw),), lex.TRAITS
    if way == "made":
        subject, noun = made(draw, draw.one(lex.ANYONE))
    else:
        noun = draw.one(draw.one(lex.LIKENED))
        subject = pointed_out(draw, noun)
    lasting = [one for one in noun.adjectives if one.english not in lex.ONLY_BEFORE_NOUNS]
    return (subject,), lasting


def be_like(draw: Draw) -> Pair:
    """This book is very interesting. The student who studies math is smart."""
    (subjects, adjectives), tense = likened(draw), draw.one(PRESENT_OR_PAST)
    adjective, very = draw.one(adjectives), draw.chance(0.25)
    words, stem = adjective
    if very:
        words, stem = f"very {words}", korean.very(stem)
    predicate = Predicate("be", stem, "adjective", ((words, ""),))
    if adjectives is lex.MOODS and draw.chance(0.5):
        predicate = predicate.plus(draw.one(lex.STATE_TIMES[tense]))
    # "Not very" has a word of its own in Korean.
    return told_or_asked(draw, subjects, lambda _: predicate, tense, denied=not very)


def be_like_both(draw: Draw) -> Pair:
    """This bag is pretty but expensive."""
    (subjects, adjectives), tense = likened(draw), draw.one(PRESENT_OR_PAST)
    first = draw.one(adjectives)
    fitting = [second for second in adjectives if not lex.exclude(first, second)]
    if not fitting:
        return be_like_both(draw)
    second = draw.one(fitting)
    but = lex.contrast(first, second)
    ending = korean.but(first.stem, tense) if but else korean.and_(first.stem)
    part = (f"{first.english} {'but' if but else 'and'} {second.english}", ending)
    predicate = Predicate("be", second.stem, "adjective", (part,))
    return sentence(statement(draw.one(subjects), predicate, tense))


def be_somebody(draw: Draw) -> Pair:
    """Minsu is a kind doctor. Will Mina be a singer?"""
    job = draw.one(lex.JOBS + lex.STUDENT)
    words, meaning = job.english.removeprefix("the "), job.korean
    if draw.chance(0.6):
        words, meaning = with_attribute(draw.one(lex.TRAITS), words, meaning)

    def make(subject: Person) -> Predicate:
        alone = subject.agreement != "plural" or subject == lex.YOU
        part = (english.article(words) if alone else english.plural(words), "")
        return Predicate("be", meaning, "copula", (part,))

    return told_or_asked(draw, lex.EVERYBODY + lex.KIN, make, draw.one(TENSES))
