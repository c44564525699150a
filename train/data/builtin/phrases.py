"""The parts of a sentence, drawn at random: things, people, places, times, actions."""

from collections.abc import Callable, Sequence

from train.data.builtin import english, korean
from train.data.builtin import lexicon as lex
from train.data.builtin.clause import Predicate, join
from train.data.builtin.draw import Draw
from train.data.builtin.english import Tense
from train.data.builtin.lexicon import Adjective, Frame, Noun, Pair, Person

# ---- things ----


def simple(noun: Noun) -> Pair:
    """Return "an apple", "bread", "the door"."""
    if noun.article == "a":
        return english.article(noun.english), noun.korean
    return join(noun.article, noun.english), noun.korean


def described(draw: Draw, noun: Noun, *, unfit: Sequence[str] = ()) -> Pair:
    """Return "an old book", "hot coffee"."""
    while (adjective := draw.one(noun.adjectives)).english in unfit:
        pass
    words, meaning = with_attribute(adjective, noun.english, noun.korean)
    return (english.article(words) if noun.article == "a" else words), meaning


def with_attribute(adjective: Adjective, words: str, meaning: str) -> Pair:
    """Return "old book", 낡은 책; 새 of "new" has no other form."""
    new = adjective.english == "new"
    attribute = adjective.stem if new else korean.adnominal(adjective.stem, "adjective")
    return f"{adjective.english} {words}", f"{attribute} {meaning}"


def definite(draw: Draw, noun: Noun, *, owned: float = 0.6) -> Pair:
    """Return "Mina's book", with probability `owned`, or "this book"."""
    which = lex.OWNERS if draw.chance(owned) else lex.POINTED_OUT
    words, meaning = draw.one(list(which.items()))
    return f"{words} {noun.english}", f"{meaning} {noun.korean}"


def counted(
    draw: Draw, noun: Noun, particle: Callable[[str], str] = str, *, verb: str = ""
) -> Pair:
    """Return "three apples", 사과 세 개; a particle goes to the noun, 사과가 세 개."""
    most = 4 if noun.counter in lex.FEW or verb in lex.NOT_TEN else 10
    number, meaning = draw.one(list(lex.NUMBERS.items())[:most])
    words = several(noun)
    if number == "one":
        words = f"{noun.unit} of {noun.english}" if noun.unit else noun.english
    return f"{number} {words}", f"{particle(noun.korean)} {meaning} {noun.counter}"


def several(noun: Noun) -> str:
    """Return what follows "two": apples, cups of coffee."""
    return f"{english.plural(noun.unit)} of {noun.english}" if noun.unit else noun.plural


def thing(draw: Draw, noun: Noun, verb: str) -> Pair:
    """Return any of the above, as it fits the noun and the verb."""
    if noun.counter and verb not in lex.ONE_AT_A_TIME and draw.chance(0.1):
        return counted(draw, noun, verb=verb)
    if noun.article == "a" and draw.chance(0.25):
        return definite(draw, noun, owned=0.6 if verb in lex.OWNED_BY_OTHERS else 0)
    plain = noun.article == "the" or noun in lex.SPORTS + lex.STUDIES
    if noun.adjectives and not plain and draw.chance(0.35):
        return described(draw, noun, unfit=lex.UNFIT.get(verb, lex.PRICES))
    return simple(noun)


# ---- actions ----

VERBS = tuple(
    tuple(frame for frame in lex.FRAMES if frame.english == verb)
    for verb in dict.fromkeys(frame.english for frame in lex.FRAMES)
)


def verb(draw: Draw, *excluded: str) -> Frame:
    """Return the frame of a verb that is not excluded."""
    while (frame := draw.one(draw.one(VERBS))).english in excluded:
        pass
    return frame


def somebody_else(draw: Draw, subject: Person, people: Sequence[Person] = lex.OTHERS) -> Person:
    """Return somebody other than the subject; a pronoun only if the subject is not one."""
    if subject not in lex.PRONOUNS and draw.chance(0.25):
        return draw.one(lex.PRONOUNS)
    while subject.korean.startswith((person := draw.one(people)).korean):
        pass
    return person


def direct_object(draw: Draw, subject: Person, frame: Frame) -> tuple[Pair, ...]:
    """Return what the action is done to, with its particle; () if nothing."""
    if frame.whom:
        person = somebody_else(draw, subject)
        return ((person.object_, korean.object_(person.korean)),)
    if not frame.objects:
        return ()
    noun = draw.one(frame.objects)
    if frame.plural:
        words, meaning = noun.plural, noun.korean
    elif len(frame.objects) > 4 and draw.chance(0.2):
        words, meaning = simple(noun)
        also, too = simple(draw.other(frame.objects, noun))
        words, meaning = f"{words} and {also}", f"{korean.with_(meaning)} {too}"
    else:
        words, meaning = thing(draw, noun, frame.english)
    return ((words, korean.object_(meaning)),)


def means(draw: Draw, subject: Person, frame: Frame) -> tuple[Pair, ...]:
    """Return a tool or a companion, () if the action has neither."""
    if frame.whom or frame.english in lex.WITHOUT_COMPANY:
        return ()
    if frame.tools and draw.chance(0.6):
        tool = draw.one(frame.tools)
        return ((f"with {english.article(tool)}", korean.by(lex.TOOLS[tool])),)
    person = somebody_else(draw, subject, lex.OTHERS + lex.ELDERS)
    return ((f"with {person.object_}", f"{korean.with_(person.korean)} 함께"),)


def where(draw: Draw, frame: Frame) -> tuple[Pair, ...]:
    """Return the place of an action, () if the verb has none."""
    if not frame.places:
        return ()
    place = draw.one(frame.places)
    return ((place.at, f"{place.korean}에서"),)


def when(draw: Draw, tense: Tense, verb: str = "") -> tuple[Pair, ...]:
    """Return no, one or two times: (), ("every day",), ("at six o'clock", "yesterday")."""
    ambiguous = tense == "past" and verb == "read"
    if ambiguous or draw.chance(0.35):
        return (draw.one(lex.TIMES[tense]),)
    if draw.chance(0.1):
        return draw.one(lex.CLOCK), lex.TIMES[tense][0]
    if draw.chance(0.35):
        return (draw.one(lex.CLOCK if draw.chance(0.4) else lex.DAY),)
    return ()


def action(draw: Draw, subject: Person, frame: Frame, *, place: float = 0.5) -> Predicate:
    """Return the verb with an object and perhaps a tool or companion and a place."""
    parts = direct_object(draw, subject, frame)
    if draw.chance(0.15):
        parts += means(draw, subject, frame)
    if draw.chance(place):
        parts += where(draw, frame)
    return Predicate(frame.english, frame.stem, "verb", parts)
