"""A learned vocabulary keeps all of a text, in one spelling."""

import unicodedata
from itertools import pairwise

import datasets
import hypothesis.strategies as st
import pytest
from hypothesis import given

from train.data.normalization import _rules, normalization_rules
from train.data.tokenizer import learn_tokenizers

# Letters that nmt_nfkc would change, some with marks, and syllables of two and three parts.
LETTERS = "，。！（）：１…½™ﬁ２²aeoyéêếệÅñ가각힣ကﷺ\u0930\u093c"
LETTERS = "".join(dict.fromkeys(unicodedata.normalize("NFC", LETTERS)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = [" ".join(LETTERS), LETTERS] * 3
    text = datasets.Dataset.from_dict({"source": lines, "target": lines})
    size = len(LETTERS) + 8
    return learn_tokenizers([text], tmp_path_factory.mktemp("run"), vocab_size=size, joint=True)[0]


@given(st.text(LETTERS + " ▁\t\u00a0\u3000\u2028\xad\u200b\u2060\ufeff\x07", max_size=20))
def test_text_comes_back_in_one_spelling(tokenizer, text):
    gone = str.maketrans("", "", "\xad\u200b\u2060\ufeff\x07")
    expected = " ".join(text.translate(gone).replace("▁", " ").split())
    for spelling in (text, unicodedata.normalize("NFD", text)):
        assert tokenizer.decode(tokenizer.encode(spelling)) == expected


@pytest.mark.parametrize(
    ("spellings", "letter"),
    [
        (["e\u0302\u0301", "ê\u0301"], "ế"),
        (["e\u0323\u0302", "e\u0302\u0323", "ẹ\u0302", "ê\u0323"], "ệ"),
        (["\u1112\u1161\u11ab", "하\u11ab"], "한"),
        (["\u212b", "A\u030a"], "Å"),
    ],
)
def test_spellings_of_a_letter(spellings, letter):
    rules = dict(line.split("\t") for line in normalization_rules().splitlines())
    for spelling in spellings:
        code_points = " ".join(f"{ord(each):x}" for each in spelling)
        assert rules.pop(code_points) == f"{ord(letter):x}"
    assert f"{ord(letter):x}" not in rules


def test_rules_are_in_one_order():
    """Whatever order sets have in a process: a cached tokenizer is found again by its rules."""
    for (one, letter), (other, same) in pairwise(_rules()):
        assert letter != same or letter in ("", " ") or one < other


def test_no_rule_changes_what_a_text_says():
    """Except for white space and invisible characters."""
    for line in normalization_rules().splitlines():
        one, other = (
            "".join(chr(int(code, 16)) for code in side.split()) for side in line.split("\t")
        )
        if other.strip():
            assert unicodedata.normalize("NFD", one) == unicodedata.normalize("NFD", other)
            assert unicodedata.is_normalized("NFC", other)
        else:
            assert (not one.isprintable() or one == "▁") and len(one) == 1
