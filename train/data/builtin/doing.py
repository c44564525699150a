"""Sentences about doing things and going places: each function draws one pair."""

from train.data.builtin import english, korean
from train.data.builtin import lexicon as lex
from train.data.builtin.clause import (
    PRESENT_OR_PAST,
    TENSES,
    Predicate,
    join,
    ongoing,
    question,
    sentence,
    statement,
    told_or_asked,
    wanted,
    who,
)
from train.data.builtin.draw import Draw
from train.data.builtin.lexicon import Frame, Pair, Person
from train.data.builtin.phrases import (
    action,
    counted,
    direct_object,
    several,
    simple,
    somebody_else,
    thing,
    verb,
    when,
    where,
)

I_GO_HOME = sentence(statement(lex.MYSELF, Predicate("go", "가", "verb", (("home", "집에"),))))

# ---- actions ----


def act(draw: Draw) -> Pair:
    """Minsu reads a book at the library in the morning."""
    frame, tense = verb(draw), draw.one(TENSES)
    times = when(draw, tense, frame.english)
    return told_or_asked(
        draw, frame.people, lambda subject: action(draw, subject, frame).plus(*times), tense
    )


def act_on_many(draw: Draw) -> Pair:
    """Minsu bought three apples at the market."""
    frame, tense = verb(draw, "sell", *lex.ONE_AT_A_TIME), draw.one(TENSES)
    countable = [noun for noun in frame.objects if noun.counter]
    if not countable:
        return act_on_many(draw)
    words, meaning = counted(draw, draw.one(countable), verb=frame.english)
    parts = [(words, korean.object_(meaning))]
    if draw.chance(0.6):
        parts += where(draw, frame)
    predicate = Predicate(frame.english, frame.stem, "verb", tuple(parts))
    predicate = predicate.plus(*when(draw, tense, frame.english))
    return told_or_asked(draw, frame.people, lambda _: predicate, tense, denied=False)


def act_now(draw: Draw) -> Pair:
    """Minsu is reading a book at the library now."""
    frame, tense = verb(draw, *lex.WITHOUT_DURATION), draw.one(PRESENT_OR_PAST)
    now = draw.one((("", ""), ("now", "지금")) if tense == "present" else (("", ""), *lex.CLOCK))
    return told_or_asked(
        draw, frame.people, lambda subject: ongoing(action(draw, subject, frame).plus(now)), tense
    )


def want(draw: Draw) -> Pair:
    """I want to read a book. What do you want to read?"""
    frame, tense = verb(draw), draw.one(PRESENT_OR_PAST)
    if draw.chance(0.6):  # Of somebody else, Korean says 싶어 하다.
        predicate = wanted(action(draw, lex.MYSELF, frame))
        return sentence(statement(lex.MYSELF, predicate, tense, negative=draw.chance(0.25)))
    if asks_what(frame) and draw.chance(0.3):
        predicate = Predicate(frame.english, frame.stem, "verb", (WHAT, *where(draw, frame)))
        return sentence(question(lex.YOU, wanted(predicate), tense, "what"), "?")
    predicate = wanted(action(draw, lex.YOU, frame))
    return sentence(question(lex.YOU, predicate, tense), "?")


def give(draw: Draw) -> Pair:
    """Minsu gave a flower to Mina."""
    frame, tense = draw.one(lex.GIVING), draw.one(TENSES)
    words, meaning = thing(draw, draw.one(frame.objects), frame.english)
    times = when(draw, tense)

    def make(subject: Person) -> Predicate:
        person = somebody_else(draw, subject)
        receiver = (f"to {person.object_}", f"{person.korean}에게")
        parts = ((words, korean.object_(meaning)), receiver, *times)
        return Predicate(frame.english, frame.stem, "verb", parts)

    return told_or_asked(draw, lex.ANYONE, make, tense)


def like(draw: Draw) -> Pair:
    """Minsu likes apples."""
    frame = draw.one(lex.LIKING)
    return told_or_asked(
        draw,
        lex.ANYONE,
        lambda subject: Predicate(
            frame.english, frame.stem, "verb", direct_object(draw, subject, frame)
        ),
        draw.one(PRESENT_OR_PAST),
    )


# ---- motion ----


def journey(draw: Draw) -> Predicate:
    """Return "go to school", "come home", "arrive at the station" or "leave for Busan"."""
    city, meaning = draw.one(list(lex.CITIES.items()))
    place = draw.one(lex.GOALS)
    verb = draw.one(("go", "go", "come", "arrive", "leave for"))
    if verb == "leave for":
        return Predicate(verb, "떠나", "verb", ((city, korean.by(meaning)),))
    if verb == "arrive":
        return Predicate(verb, "도착하", "verb", ((f"in {city}", f"{meaning}에"),))
    goal = (f"to {city}", f"{meaning}에") if draw.chance(0.2) else (place.to, f"{place.korean}에")
    return Predicate(verb, {"go": "가", "come": "오"}[verb], "verb", (goal,))


def move(draw: Draw) -> Pair:
    """Minsu went to school by bus in the morning."""
    predicate, tense = journey(draw), draw.one(TENSES)
    if predicate.english != "leave for" and draw.chance(0.4):
        vehicle, meaning = draw.one(list(lex.TRANSPORT.items()))
        predicate = predicate.plus((f"by {vehicle}", korean.by(meaning)))
    predicate = predicate.plus(*when(draw, tense))
    return told_or_asked(draw, lex.ANYONE, lambda _: predicate, tense)


# ---- questions with a question word ----

WHAT = ("", korean.object_("무엇"))


def asks_what(frame: Frame) -> bool:
    """Return whether one may ask "what"; "what does Minsu play" has two translations."""
    return len(frame.objects) > 2 and frame.english != "play"


def ask_about_action(draw: Draw) -> Pair:
    """What does Minsu read at the library? Who, where, when, why and how many likewise."""
    frame, tense = verb(draw), draw.one(TENSES)
    subject = draw.other(frame.people, *lex.NOT_ASKED)
    object_, place = direct_object(draw, subject, frame), where(draw, frame)
    times = when(draw, tense)
    countable = [noun for noun in frame.objects if noun.counter]
    words = ["who", "when", "why"]
    words += ["what"] * asks_what(frame)
    words += ["whom"] * frame.whom
    words += ["where"] * bool(place)
    words += ["how many"] * (bool(countable) and frame.english not in lex.ONE_AT_A_TIME)
    asked = draw.one(words)
    parts = (*object_, *place, *times)
    if asked == "who":
        return sentence(who(Predicate(frame.english, frame.stem, "verb", parts), tense), "?")
    if asked == "what":
        parts = (WHAT, *place, *times)
    elif asked == "whom":
        asked, parts = "who", (("", korean.object_("누구")), *place, *times)
    elif asked == "where":
        parts = (*object_, ("", "어디에서"), *times)
    elif asked == "when":
        parts = (*object_, *place, ("", "언제"))
    elif asked == "why":
        parts += (("", "왜"),)
    else:
        noun = draw.one(countable)
        asked += f" {several(noun)}"
        parts = (("", f"{korean.object_(noun.korean)} 몇 {noun.counter}"), *place, *times)
    predicate = Predicate(frame.english, frame.stem, "verb", parts)
    return sentence(question(subject, predicate, tense, asked), "?")


def ask_about_motion(draw: Draw) -> Pair:
    """Where does Minsu go? When, how and why likewise."""
    predicate, tense = journey(draw), draw.one(TENSES)
    times = when(draw, tense)
    asked = draw.one(("where", "when", "how", "why"))
    if asked == "where":
        predicate = Predicate("go", "가", "verb", (("", "어디에"), *times))
    elif asked == "when":
        predicate = predicate.plus(("", "언제"))
    elif asked == "how":
        predicate = predicate.plus(("", "어떻게"), *times)
    else:
        predicate = predicate.plus(*times, ("", "왜"))
    subject = draw.other(lex.ANYONE, *lex.NOT_ASKED)
    return sentence(question(subject, predicate, tense, asked), "?")


# ---- two clauses ----


def plain(draw: Draw, subject: Person, frame: Frame) -> Predicate:
    """Return the verb with its object or else its place, and no more."""
    if frame.objects:
        noun = draw.one(frame.objects)
        words, meaning = (noun.plural, noun.korean) if frame.plural else simple(noun)
        parts: tuple[Pair, ...] = ((words, korean.object_(meaning)),)
    else:
        parts = direct_object(draw, subject, frame) or where(draw, frame)
    return Predicate(frame.english, frame.stem, "verb", parts)


def do_both(draw: Draw) -> Pair:
    """Minsu eats bread and drinks milk."""
    subject, one = draw.one(lex.EVERYBODY), verb(draw)
    other = verb(draw, one.english, "get up")
    tense = draw.one(("present",) if "read" in (one.english, other.english) else PRESENT_OR_PAST)
    first, second = (plain(draw, subject, frame) for frame in (one, other))
    words, _ = statement(subject, first, tense)
    also = english.finite(second.english, subject.agreement, tense)
    meaning = join(first.before_verb, korean.and_(first.stem), second.before_verb)
    ending = korean.finite(second.stem, "verb", tense)
    return sentence(
        (
            join(words, "and", also, second.after_verb),
            join(korean.topic(subject.korean), meaning, ending),
        )
    )


def differ(draw: Draw) -> Pair:
    """Minsu drinks coffee and Mina drinks tea. I rested at home but he did not rest at home."""
    frame = verb(draw, "get up", "help", "meet", "wait for")
    tense = draw.one(("present",) if frame.english == "read" else PRESENT_OR_PAST)
    somebody = draw.one(lex.EVERYBODY)
    another = draw.other(lex.EVERYBODY, somebody)
    first, second = plain(draw, somebody, frame), plain(draw, another, frame)
    same = first == second
    but = same or draw.chance(0.5)
    ending = korean.but(first.stem, tense) if but else korean.and_(first.stem)
    words, _ = statement(somebody, first, tense)
    also, meaning = statement(another, second, tense, negative=same)
    return sentence(
        (
            join(words, "but" if but else "and", also),
            join(korean.topic(somebody.korean), first.before_verb, ending, meaning),
        )
    )


def because(draw: Draw) -> Pair:
    """Minsu rested at home because he was tired. We did not swim because the weather was cold."""
    subject, tense = draw.one(lex.EVERYBODY), draw.one(PRESENT_OR_PAST)
    reason, negative, verbs = draw.one(lex.REASONS)
    if reason in lex.WEATHER:
        who_is = f"the weather {english.finite('be', 'third', tense)}"
        meaning = f"날씨가 {korean.so(lex.WEATHER[reason])}"
    else:
        who_is = f"{subject.pronoun} {english.finite('be', subject.agreement, tense)}"
        meaning = korean.so(lex.STEMS[reason])
    frame = draw.one([frame for frame in lex.FRAMES if frame.english in verbs])
    predicate = action(draw, subject, frame, place=0.6)
    predicate = predicate.plus((f"because {who_is} {reason}", meaning))
    return sentence(statement(subject, predicate, tense, negative=negative))
