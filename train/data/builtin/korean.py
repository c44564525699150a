"""Korean particles and endings, computed from the letters inside each Hangul syllable.

A stem is the dictionary form without 다: "가" of 가다. Endings are those of the plain style.
"""

from functools import cache
from typing import Literal

from train.data.builtin.english import Tense

Kind = Literal["verb", "adjective", "copula"]

INITIALS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
FINALS = ("", *"ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")

# Spelling does not tell which final consonants change before a vowel: 듣다 gives 들어, 받다 받아.
CHANGES_D = ("듣", "걷")
CHANGES_B = ("돕", "춥", "덥", "쉽", "귀엽", "무겁", "가볍", "뜨겁", "차갑", "어렵", "아름답")
DROPS_H = ("까맣", "빨갛", "파랗", "하얗")


def letters(character: str) -> tuple[str, str, str]:
    """Return initial consonant, vowel and final consonant ("" if none): 간 is ㄱ, ㅏ, ㄴ."""
    code = ord(character) - ord("가")
    if not 0 <= code < len(INITIALS) * len(VOWELS) * len(FINALS):
        raise ValueError(f"{character!r} is not a Hangul syllable")
    code, final = divmod(code, len(FINALS))
    initial, vowel = divmod(code, len(VOWELS))
    return INITIALS[initial], VOWELS[vowel], FINALS[final]


def syllable(initial: str, vowel: str, final: str = "") -> str:
    """Return the syllable that the letters spell; the inverse of `letters`."""
    code = INITIALS.index(initial) * len(VOWELS) + VOWELS.index(vowel)
    return chr(ord("가") + code * len(FINALS) + FINALS.index(final))


def final(word: str) -> str:
    """Return the final consonant of the last syllable, "" if it ends in a vowel."""
    return letters(word[-1])[2]


def with_final(word: str, consonant: str) -> str:
    """Return the word with its last final consonant replaced: 가 + ㄴ is 간, 만들 + "" is 만드."""
    initial, vowel, _ = letters(word[-1])
    return word[:-1] + syllable(initial, vowel, consonant)


# ---- particles ----


def topic(noun: str) -> str:
    """책은, 사과는."""
    return noun + ("은" if final(noun) else "는")


def subject(noun: str) -> str:
    """책이, 사과가; but 내가, 네가, 누가."""
    pronouns = {"나": "내가", "너": "네가", "누구": "누가"}
    return pronouns.get(noun) or noun + ("이" if final(noun) else "가")


def object_(noun: str) -> str:
    """책을, 사과를."""
    return noun + ("을" if final(noun) else "를")


def by(noun: str) -> str:
    """By means of, or towards: 펜으로, 버스로; ㄹ counts as a vowel, 연필로."""
    return noun + ("로" if final(noun) in ("", "ㄹ") else "으로")


def with_(noun: str) -> str:
    """And, with: 빵과, 커피와."""
    return noun + ("과" if final(noun) else "와")


# ---- stems ----


def before_eu(stem: str) -> str:
    """Return the stem as it meets an ending in (으): 읽으, 가, 만들, 들으, 추우, 하야."""
    if stem.endswith(CHANGES_D):
        return with_final(stem, "ㄹ") + "으"
    if stem.endswith(CHANGES_B):
        return with_final(stem, "") + "우"
    if stem.endswith(DROPS_H):
        return with_final(stem, "")
    return stem if final(stem) in ("", "ㄹ") else stem + "으"


def before_n(stem: str) -> str:
    """Return the stem as it meets ㄴ: 만들 loses its ㄹ."""
    return with_final(stem, "") if final(stem) == "ㄹ" else stem


def infinitive(stem: str) -> str:
    """Return the form in 아/어: 가, 읽어, 마셔, 봐, 배워, 써, 해, 들어, 도와, 추워, 골라, 하얘."""
    if stem.endswith("하"):
        return stem[:-1] + "해"
    if stem.endswith(DROPS_H):
        initial, _, _ = letters(stem[-1])
        return stem[:-1] + syllable(initial, "ㅒ" if stem.endswith("얗") else "ㅐ")
    if stem.endswith("돕"):
        return stem[:-1] + "도와"
    stem = before_eu(stem)
    initial, vowel, last = letters(stem[-1])
    if last:
        return stem + harmony(stem)
    if vowel == "ㅡ":  # Drops: 쓰 써, 바쁘 바빠, 읽으 읽어. In 르 it doubles the ㄹ: 고르 골라.
        before = stem[:-1]
        _, contracted, _ = letters(harmony(before))
        if stem.endswith("르"):
            before = with_final(before, "ㄹ")
        return before + syllable(initial, contracted)
    if vowel in "ㅏㅐㅓㅔㅕ":
        return stem
    merged = {"ㅗ": "ㅘ", "ㅜ": "ㅝ", "ㅣ": "ㅕ"}.get(vowel)
    return stem[:-1] + syllable(initial, merged) if merged else stem + "어"


def harmony(stem: str) -> str:
    """Return 아 after a bright vowel, 어 after any other and at the start of a word."""
    start = not stem or stem.endswith(" ")
    return "어" if start or letters(stem[-1])[1] not in "ㅏㅑㅗ" else "아"


# ---- endings ----


@cache
def past(stem: str) -> str:
    """Return the past stem: 갔, 읽었, 했."""
    return with_final(infinitive(stem), "ㅆ")


@cache
def finite(
    stem: str, kind: Kind, tense: Tense, *, negative: bool = False, question: bool = False
) -> str:
    """Return the last word or words of a plain-style sentence: 간다, 갔니, 가지 않을 것이다.

    The stem of a copula is the noun it follows: 학생 gives 학생이다, 학생이 아니다.
    """
    if kind == "copula":
        return copula(stem, tense, negative=negative, question=question)
    if negative:
        stem = "없" if stem == "있" else stem + "지 않"  # 없다, but 자고 있지 않다
    if tense == "future":
        return with_final(before_eu(stem), "ㄹ") + (" 거니" if question else " 것이다")
    if tense == "past":
        return past(stem) + ("니" if question else "다")
    if question:
        return before_n(stem) + "니"
    if kind == "adjective":
        return stem + "다"
    return with_final(stem, "ㄴ") + "다" if final(stem) in ("", "ㄹ") else stem + "는다"


def copula(noun: str, tense: Tense, *, negative: bool, question: bool) -> str:
    """Return "is (not) a noun": 학생이다, 의사다, 의사였다, 학생이 아니다, 학생이니."""
    if tense == "future":
        return finite(f"{subject(noun)} 되", "verb", tense, negative=negative, question=question)
    stem = f"{subject(noun)} 아니" if negative else noun + ("이" if final(noun) else "")
    if tense == "past":
        stem = stem + "었" if negative or final(noun) else stem + "였"
    return stem + ("니" if question else "다")


def adnominal(stem: str, kind: Kind, *, past: bool = False) -> str:
    """Return the form before a noun: 가는, 간, 만드는, 읽은, 큰, 더운, 맛있는."""
    if not past and (kind == "verb" or stem.endswith(("있", "없"))):
        return before_n(stem) + "는"
    return with_final(before_eu(stem), "ㄴ")


def very(stem: str) -> str:
    """Return the stem of "very": 아주 예쁘, but 키가 아주 크."""
    before, space, last = stem.rpartition(" ")
    return f"{before}{space}아주 {last}"


def and_(stem: str) -> str:
    """Return "and": 가고. Only the last verb of a sentence shows the tense."""
    return stem + "고"


def but(stem: str, tense: Tense) -> str:
    """Return "but": 가지만, 갔지만."""
    return (past(stem) if tense == "past" else stem) + "지만"


def so(stem: str) -> str:
    """Return "because": 피곤해서, 추워서."""
    return infinitive(stem) + "서"
