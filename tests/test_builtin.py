import hashlib
import re
import unicodedata
from collections import Counter
from itertools import islice
from typing import get_args

import pytest

from train.data.builtin import SHARES, SIZES, Split, builtin, drawn, english, korean, lexicon
from train.data.builtin.clause import Predicate, question, sentence, statement
from train.data.builtin.draw import Draw


@pytest.fixture(scope="module")
def corpus():
    return {split: builtin(split) for split in get_args(Split)}


def words(sentence):
    return re.findall(r"[\w']+", sentence.lower())


# ---- Korean, mostly with words that are not in the lexicon ----


def test_letters_are_those_of_unicode():
    for code in range(ord("가"), ord("힣") + 1):
        initial, vowel, *final = unicodedata.normalize("NFD", chr(code))
        expected = (
            korean.INITIALS[ord(initial) - 0x1100],
            korean.VOWELS[ord(vowel) - 0x1161],
            korean.FINALS[ord(final[0]) - 0x11A7 if final else 0],
        )
        assert korean.letters(chr(code)) == expected
        assert korean.syllable(*expected) == chr(code)
    with pytest.raises(ValueError, match="'a' is not a Hangul syllable"):
        korean.topic("banana")


@pytest.mark.parametrize(
    ("noun", "forms"),
    [
        ("물", "물은 물이 물을 물로 물과"),
        ("집", "집은 집이 집을 집으로 집과"),
        ("서울", "서울은 서울이 서울을 서울로 서울과"),
        ("바다", "바다는 바다가 바다를 바다로 바다와"),
        ("닭", "닭은 닭이 닭을 닭으로 닭과"),
        ("나", "나는 내가 나를 나로 나와"),
        ("너", "너는 네가 너를 너로 너와"),
        ("누구", "누구는 누가 누구를 누구로 누구와"),
    ],
)
def test_particles_depend_on_the_final_consonant(noun, forms):
    particles = (korean.topic, korean.subject, korean.object_, korean.by, korean.with_)
    assert [particle(noun) for particle in particles] == forms.split()


@pytest.mark.parametrize(
    ("stem", "present", "past", "future", "asked", "before_noun", "so"),
    [
        ("가", "간다", "갔다", "갈 것이다", "가니", "가는", "가서"),
        ("서", "선다", "섰다", "설 것이다", "서니", "서는", "서서"),
        ("오", "온다", "왔다", "올 것이다", "오니", "오는", "와서"),
        ("보", "본다", "봤다", "볼 것이다", "보니", "보는", "봐서"),
        ("마시", "마신다", "마셨다", "마실 것이다", "마시니", "마시는", "마셔서"),
        ("배우", "배운다", "배웠다", "배울 것이다", "배우니", "배우는", "배워서"),
        ("켜", "켠다", "켰다", "켤 것이다", "켜니", "켜는", "켜서"),
        ("보내", "보낸다", "보냈다", "보낼 것이다", "보내니", "보내는", "보내서"),
        ("쉬", "쉰다", "쉬었다", "쉴 것이다", "쉬니", "쉬는", "쉬어서"),
        ("되", "된다", "되었다", "될 것이다", "되니", "되는", "되어서"),
        ("일하", "일한다", "일했다", "일할 것이다", "일하니", "일하는", "일해서"),
        ("쓰", "쓴다", "썼다", "쓸 것이다", "쓰니", "쓰는", "써서"),
        ("모으", "모은다", "모았다", "모을 것이다", "모으니", "모으는", "모아서"),
        ("부르", "부른다", "불렀다", "부를 것이다", "부르니", "부르는", "불러서"),
        ("고르", "고른다", "골랐다", "고를 것이다", "고르니", "고르는", "골라서"),
        ("먹", "먹는다", "먹었다", "먹을 것이다", "먹니", "먹는", "먹어서"),
        ("잡", "잡는다", "잡았다", "잡을 것이다", "잡니", "잡는", "잡아서"),
        ("돕", "돕는다", "도왔다", "도울 것이다", "돕니", "돕는", "도와서"),
        ("받", "받는다", "받았다", "받을 것이다", "받니", "받는", "받아서"),
        ("듣", "듣는다", "들었다", "들을 것이다", "듣니", "듣는", "들어서"),
        ("걷", "걷는다", "걸었다", "걸을 것이다", "걷니", "걷는", "걸어서"),
        ("알", "안다", "알았다", "알 것이다", "아니", "아는", "알아서"),
        ("만들", "만든다", "만들었다", "만들 것이다", "만드니", "만드는", "만들어서"),
    ],
)
def test_verbs(stem, present, past, future, asked, before_noun, so):
    assert korean.finite(stem, "verb", "present") == present
    assert korean.finite(stem, "verb", "past") == past
    assert korean.finite(stem, "verb", "future") == future
    assert korean.finite(stem, "verb", "present", question=True) == asked
    assert korean.adnominal(stem, "verb") == before_noun
    assert korean.so(stem) == so
    assert korean.finite(stem, "verb", "present", negative=True) == f"{stem}지 않는다"
    assert korean.finite(stem, "verb", "past", negative=True) == f"{stem}지 않았다"
    assert korean.finite(stem, "verb", "future", negative=True) == f"{stem}지 않을 것이다"


@pytest.mark.parametrize(
    ("stem", "before_noun", "past", "future"),
    [
        ("크", "큰", "컸다", "클 것이다"),
        ("작", "작은", "작았다", "작을 것이다"),
        ("예쁘", "예쁜", "예뻤다", "예쁠 것이다"),
        ("아프", "아픈", "아팠다", "아플 것이다"),
        ("덥", "더운", "더웠다", "더울 것이다"),
        ("아름답", "아름다운", "아름다웠다", "아름다울 것이다"),
        ("좁", "좁은", "좁았다", "좁을 것이다"),
        ("멀", "먼", "멀었다", "멀 것이다"),
        ("다르", "다른", "달랐다", "다를 것이다"),
        ("좋", "좋은", "좋았다", "좋을 것이다"),
        ("하얗", "하얀", "하얬다", "하얄 것이다"),
        ("빨갛", "빨간", "빨갰다", "빨갈 것이다"),
        ("재미있", "재미있는", "재미있었다", "재미있을 것이다"),
        ("키가 크", "키가 큰", "키가 컸다", "키가 클 것이다"),
    ],
)
def test_adjectives(stem, before_noun, past, future):
    assert korean.adnominal(stem, "adjective") == before_noun
    assert korean.finite(stem, "adjective", "present") == f"{stem}다"
    assert korean.finite(stem, "adjective", "past") == past
    assert korean.finite(stem, "adjective", "future") == future
    assert korean.finite(stem, "adjective", "present", negative=True) == f"{stem}지 않다"


def test_being_a_thing_and_being_there():
    def be(noun, tense="present", **how):
        return korean.finite(noun, "copula", tense, **how)

    assert [be("책"), be("책", "past"), be("책", "future")] == [
        "책이다",
        "책이었다",
        "책이 될 것이다",
    ]
    assert [be("배우"), be("배우", "past")] == ["배우다", "배우였다"]
    assert [be("책", negative=True), be("배우", "past", negative=True)] == [
        "책이 아니다",
        "배우가 아니었다",
    ]
    assert [be("책", question=True), be("배우", "past", question=True)] == ["책이니", "배우였니"]
    assert korean.finite("있", "adjective", "past", negative=True) == "없었다"
    assert korean.finite("자고 있", "adjective", "past", negative=True) == "자고 있지 않았다"


# ---- English ----


@pytest.mark.parametrize(
    "forms",
    [
        "plan plans planned planning",
        "visit visits visited visiting",
        "rain rains rained raining",
        "study studies studied studying",
        "enjoy enjoys enjoyed enjoying",
        "wash washes washed washing",
        "fix fixes fixed fixing",
        "hope hopes hoped hoping",
        "agree agrees agreed agreeing",
        "swim swims swam swimming",
        "draw draws drew drawing",
    ],
)
def test_english_verbs(forms):
    verb, *inflected = forms.split()
    assert [english.with_s(verb), english.past(verb), english.ing(verb)] == inflected


def test_english_phrases():
    assert english.finite("listen to", "third", "past") == "listened to"
    assert english.finite("have", "third", "present") == "has"
    assert english.finite("go", "third", "present", negative=True) == "does not go"
    assert english.finite("be", "first", "past", negative=True) == "was not"
    assert english.forms("go", "plural", "present") == ("do", "go")
    assert english.plural("kind woman") == "kind women"
    assert english.article("old book") == "an old book"


def test_parts_of_a_sentence_are_in_mirror_order():
    parts = (("a book", "책을"), ("at the library", "도서관에서"), ("in the morning", "아침에"))
    read = Predicate("read", "읽", "verb", parts)
    minsu = lexicon.NAMES[1]
    assert sentence(statement(minsu, read)) == (
        "Minsu reads a book at the library in the morning.",
        "민수는 아침에 도서관에서 책을 읽는다.",
    )
    assert sentence(question(minsu, read, "past"), "?") == (
        "Did Minsu read a book at the library in the morning?",
        "민수는 아침에 도서관에서 책을 읽었니?",
    )


# ---- the corpus ----

# Known to be right. With another mixture of sentence types, some may not be in the corpus.
EXAMPLES = """
I go home.|나는 집에 간다.
I bought three apples at the store.|나는 가게에서 사과 세 개를 샀다.
How many dogs do they have?|그들은 개가 몇 마리 있니?
There is a cat in front of the house.|집 앞에 고양이가 있다.
Junho leaves for Busan.|준호는 부산으로 떠난다.
She went to the sea by subway.|그녀는 지하철로 바다에 갔다.
My mother will run.|우리 어머니는 달릴 것이다.
I do not want to laugh.|나는 웃고 싶지 않다.
What do you want to fix at home?|너는 집에서 무엇을 고치고 싶니?
When did the writer go home?|작가는 언제 집에 갔니?
The student who learns soccer was tall and smart.|축구를 배우는 학생은 키가 크고 똑똑했다.
That bread was fresh but expensive.|저 빵은 신선했지만 비쌌다.
He does not have an umbrella.|그는 우산이 없다.
Minsu reads a letter but Susan reads a newspaper.|민수는 편지를 읽지만 수전은 신문을 읽는다.
They buy bread and Tom buys meat.|그들은 빵을 사고 톰은 고기를 산다.
We gave a flower to Tom on Tuesday.|우리는 화요일에 톰에게 꽃을 줬다.
My father is reading a magazine now.|우리 아버지는 지금 잡지를 읽고 있다.
How many cats does Tom have?|톰은 고양이가 몇 마리 있니?
The man drank four glasses of juice.|남자는 주스 네 잔을 마셨다.
Who helped Mina at the market?|누가 시장에서 미나를 도왔니?
Did the man leave for Seoul?|남자는 서울로 떠났니?
The student who learns basketball at school is tall.|학교에서 농구를 배우는 학생은 키가 크다.
Minsu ate cake but you ate meat.|민수는 케이크를 먹었지만 너는 고기를 먹었다.
She dances in the park and reads a book.|그녀는 공원에서 춤추고 책을 읽는다.
Junho does not have a shirt.|준호는 셔츠가 없다.
The writer swims every Sunday.|작가는 일요일마다 수영한다.
Susan does not run because the weather is cold.|수전은 날씨가 추워서 달리지 않는다.
Tom cleaned the classroom and made soup.|톰은 교실을 청소하고 수프를 만들었다.
I walked last week.|나는 지난주에 걸었다.
We bought a new novel.|우리는 새 소설을 샀다.
That pizza is fresh but expensive.|저 피자는 신선하지만 비싸다.
The cup that Mina made was small.|미나가 만든 컵은 작았다.
I was very tall.|나는 키가 아주 컸다.
She is not a doctor.|그녀는 의사가 아니다.
He was a doctor.|그는 의사였다.
Minsu eats rice because he is hungry.|민수는 배고파서 밥을 먹는다.
This poem is short.|이 시는 짧다.
The boy has a big dog.|소년은 큰 개가 있다.
"""


def test_examples(corpus):
    translation = dict(pair for pairs in corpus.values() for pair in pairs)
    examples = dict(line.split("|") for line in EXAMPLES.strip().splitlines())
    found = {source: translation[source] for source in examples if source in translation}
    assert found.items() <= examples.items()
    assert len(found) >= 12
    assert ("I go home.", "나는 집에 간다.") in corpus["train"]


def test_sizes_and_lengths(corpus):
    assert {split: len(pairs) for split, pairs in corpus.items()} == SIZES
    for pairs in corpus.values():
        assert all(3 <= len(source.split()) <= 14 for source, _ in pairs)


def test_translation_is_one_to_one():
    # Before duplicates are removed, which shows that the grammar itself is consistent.
    there, back = {}, {}
    for source, target in islice(drawn(seed=1), 40_000):
        assert there.setdefault(source, target) == target
        assert back.setdefault(target, source) == source


def test_no_sentence_is_in_two_splits(corpus):
    for side in (0, 1):
        sentences = [pair[side] for pairs in corpus.values() for pair in pairs]
        assert len(set(sentences)) == len(sentences) == sum(SIZES.values())


def test_every_word_is_in_the_training_split(corpus):
    trained = Counter(word for source, _ in corpus["train"] for word in words(source))
    asked = {
        word for split in ("test", "validation") for s, _ in corpus[split] for word in words(s)
    }
    assert asked <= set(trained)
    # A few forms of Korean words may be new, but no English word.
    trained = {form for _, target in corpus["train"] for form in words(target)}
    new = [form for _, target in corpus["test"] for form in words(target) if form not in trained]
    assert len(new) < 10


def test_every_word_is_seen_often_enough_to_be_learnt(corpus):
    sentences_with = Counter()  # for phrases of one to three words
    for source, _ in corpus["train"]:
        row = words(source)
        sentences_with.update(
            {tuple(row[i : i + n]) for n in (1, 2, 3) for i in range(len(row) - n + 1)}
        )
    frames = lexicon.FRAMES + lexicon.GIVING + lexicon.LIKING
    forms = {noun.english: {noun.english, noun.plural} for f in frames for noun in f.objects}
    forms |= {word: {word} for word in (*lexicon.STEMS, *lexicon.PLACES)}
    forms |= {person.english: {person.english} for person in lexicon.ANYONE}
    for frame in frames:
        verb, _, rest = frame.english.partition(" ")
        past = f"{english.past(verb)} {rest}".strip()
        forms[frame.english] = {frame.english, past, english.ing(frame.english)}
    rare = {
        word: count
        for word, variants in forms.items()
        if (count := sum(sentences_with[tuple(words(form))] for form in variants)) < 50
    }
    assert rare == {}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_phenomenon_is_well_represented(corpus, split):
    patterns = {
        "present": "[가-힣]는?다[.]",
        "past": "[았었갔왔했]다[.]",
        "future": "것이다[.]",
        "negative": "지 않",
        "yes or no": "^(?!.*(무엇|누구|누가|어디|언제|왜|어떻게|몇)).*니[?]",
        "question word": "(무엇|누구|누가|어디|언제|왜|어떻게|몇).*니[?]",
        "counter": "(한|두|세|네|다섯|여섯|일곱|여덟|아홉|열) (개|권|마리|대|잔|장|벌|송이)",
        "hour": "(한|두|세|네|다섯|여섯|일곱|여덟|아홉|열|열한|열두) 시에",
        "place": "에서 ",
        "goal": "집에|학교에|에 [간갔왔온]",
        "means": "로 ",
        "company": "[과와] 함께",
        "and": "고 ",
        "but": "지만 ",
        "because": "[아어해뻐퍼워와파]서 ",
        "relative clause": "(가|이) (산|만든|그린|고른|쓴) ",
        "attribute": "(새|큰|작은|예쁜|까만|맛있는|긴|차가운) ",
    }
    share = {
        name: sum(bool(re.search(pattern, target)) for _, target in corpus[split]) / SIZES[split]
        for name, pattern in patterns.items()
    }
    assert {name: part for name, part in share.items() if part < 0.01} == {}


@pytest.mark.parametrize("sentence_type", SHARES)
def test_every_sentence_type_varies(sentence_type):
    draw = Draw(2)
    assert len({sentence_type(draw) for _ in range(50)}) > 40


def test_particles_and_articles_agree_everywhere(corpus):
    for source, target in corpus["train"]:
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", source, re.IGNORECASE), source
        for word in words(target):
            stem, particle = word[:-1], word[-1]
            if particle in "를을" and stem:
                assert (korean.final(stem) == "") == (particle == "를"), target


def test_the_corpus_is_the_same_everywhere(corpus):
    text = "\n".join("\t".join(pair) for split in sorted(corpus) for pair in corpus[split])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "69cdbda648c13c33"
