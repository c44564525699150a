"""The words of the built-in corpus, and which of them go together."""

from typing import NamedTuple

from train.data.builtin import english
from train.data.builtin.english import Agreement, Tense

Pair = tuple[str, str]  # English, Korean


def table(text: str) -> dict[str, str]:
    """Return the entries of "cat=고양이, dog=개"."""
    entries = (entry.split("=") for entry in text.replace("\n", " ").split(","))
    return {english.strip(): korean.strip() for english, korean in entries}


def pairs(text: str) -> tuple[Pair, ...]:
    """Return the same entries in a row."""
    return tuple(table(text).items())


# ---- adjectives ----


class Adjective(NamedTuple):
    """An adjective and its Korean stem."""

    english: str
    stem: str


STEMS = table(
    """beautiful=아름답, big=크, black=까맣, blue=파랗, busy=바쁘, cheap=싸, clean=깨끗하,
    cold=차갑, cute=귀엽, delicious=맛있, difficult=어렵, easy=쉽, expensive=비싸,
    fast=빠르, fresh=신선하, happy=행복하, hardworking=부지런하, heavy=무겁, hot=뜨겁,
    hungry=배고프, interesting=재미있, kind=친절하, light=가볍, long=길, new=새, old=낡,
    pretty=예쁘, quiet=조용하, red=빨갛, sad=슬프, short=짧, small=작, smart=똑똑하, tall=키가 크,
    tired=피곤하, warm=따뜻하, white=하얗"""
)
ONLY_BEFORE_NOUNS = ("new", "old")  # 새 has no predicate, and 낡다 is said 낡았다
# No more than one word of a line is said of a thing.
SCALES = (
    "beautiful pretty",
    "big small",
    "black blue red white",
    "cheap expensive",
    "cold hot warm",
    "difficult easy",
    "happy sad",
    "heavy light",
    "long short",
)
# A word of one line and a word of the other are joined by "but", other words by "and".
WELCOME = "beautiful cheap cute delicious easy fast fresh happy interesting light pretty"
UNWELCOME = "busy difficult expensive heavy hungry sad tired"


def adjectives(words: str) -> tuple[Adjective, ...]:
    """Return the adjectives named in a text."""
    return tuple(Adjective(word, STEMS[word]) for word in words.split())


def contrast(first: Adjective, second: Adjective) -> bool:
    """Return whether the one is welcome and the other is not."""
    both = (first.english, second.english)
    return all(any(word in side.split() for word in both) for side in (WELCOME, UNWELCOME))


def exclude(first: Adjective, second: Adjective) -> bool:
    """Return whether nothing is said to be both."""
    return first == second or any(
        {first.english, second.english} <= set(scale.split()) for scale in SCALES
    )


MOODS = adjectives("busy happy hungry sad tired")
TRAITS = adjectives("hardworking kind smart tall")
# Hot weather is 덥다 and cold weather 춥다; a hot drink is 뜨겁다 and a cold one 차갑다.
WEATHER = table("cold=춥, good=좋, hot=덥, warm=따뜻하")

# ---- things ----


class Noun(NamedTuple):
    """A thing: article ("a", "the", or "" for a mass), Korean counter, what it can be like."""

    english: str
    korean: str
    article: str
    counter: str
    unit: str  # in "two cups of coffee": cup
    adjectives: tuple[Adjective, ...]

    @property
    def plural(self) -> str:
        """Apples; a mass stays as it is."""
        return english.plural(self.english) if self.article else self.english


def nouns(
    words: str, like: str = "", *, article: str = "a", counter: str = "", unit: str = ""
) -> tuple[Noun, ...]:
    """Return nouns that share all but their names."""
    return tuple(
        Noun(word, meaning, article, counter, unit, adjectives(like))
        for word, meaning in table(words).items()
    )


def masses(words: str, like: str = "", *, counter: str = "", unit: str = "") -> tuple[Noun, ...]:
    """Return nouns without an article."""
    return nouns(words, like, article="", counter=counter, unit=unit)


FOOD = "cheap delicious expensive fresh"
FASHION = "black blue cheap expensive new old pretty red white"
VEGETABLES = nouns("potato=감자, tomato=토마토", f"{FOOD} big small", counter="개")
FRUIT = nouns(
    "apple=사과, orange=오렌지, peach=복숭아, watermelon=수박", f"{FOOD} big small", counter="개"
)
BREAD = masses("bread=빵, cheese=치즈, pizza=피자", FOOD)
CAKE = masses("cake=케이크", FOOD)
MEAT = masses("fish=생선, meat=고기", FOOD)
RICE = masses("rice=밥", "delicious warm")
SOUP = masses("soup=수프", "delicious warm")
TEA = masses("coffee=커피, tea=차", "delicious hot warm", counter="잔", unit="cup")
MILK = masses("juice=주스, milk=우유", "cold delicious", counter="잔", unit="glass")
DRINKS = MILK + TEA + masses("water=물", "cold", counter="잔", unit="glass")
BOOKS = nouns(
    "book=책, comic book=만화책, magazine=잡지, novel=소설",
    "expensive interesting new old",
    counter="권",
)
LETTER = nouns("letter=편지", "beautiful long short", counter="통")
NEWSPAPER = nouns("newspaper=신문", "interesting old", counter="부")
STORIES = nouns("poem=시, story=이야기", "beautiful interesting long sad short", counter="편")
MOVIE = nouns("movie=영화", "interesting long new sad", counter="편")
NEWS = nouns("news=뉴스", article="the")
RADIO = nouns("radio=라디오", article="the")
TELEVISION = masses("TV=텔레비전")
MUSIC = masses("music=음악", "beautiful interesting")
SONG = nouns("song=노래", "beautiful long new sad short", counter="곡")
CLOTHES = nouns("coat=외투, shirt=셔츠, skirt=치마", FASHION, counter="벌")
BAGS = nouns("bag=가방, hat=모자, umbrella=우산", f"{FASHION} heavy light", counter="개")
CUP = nouns("cup=컵", "cheap new pretty small", counter="개")
TOYS = nouns("doll=인형, toy=장난감", "cheap new pretty small", counter="개")
FURNITURE = nouns(
    "chair=의자, clock=시계, desk=책상", "big heavy light new old small", counter="개"
)
PENS = nouns("pen=펜, pencil=연필", "blue cheap new red", counter="자루")
NOTEBOOK = nouns("notebook=공책", "blue cheap new red", counter="권")
BICYCLE = nouns("bicycle=자전거", "cheap expensive fast new old red", counter="대")
CAR = nouns("car=자동차", "cheap expensive fast new old red", counter="대")
MACHINES = nouns("camera=카메라, computer=컴퓨터", "cheap expensive new old", counter="대")
HORSE = nouns("horse=말", "big black fast small white", counter="마리")
PETS = nouns("cat=고양이, dog=개, rabbit=토끼", "big black cute small white", counter="마리")
BIRDS = nouns("bird=새, duck=오리", "big black cute small white", counter="마리")
ANIMALS = BIRDS + HORSE + PETS
FLOWER = nouns("flower=꽃", "beautiful pretty red small white", counter="송이")
TREE = nouns("tree=나무", "beautiful big small", counter="그루")
PICTURE = nouns("picture=그림", "beautiful big pretty small", counter="장")
PHOTO = nouns("photo=사진", "beautiful interesting", counter="장")
STUDIES = masses(
    "English=영어, Korean=한국어, history=역사, math=수학, science=과학",
    "difficult easy interesting",
)
SPORTS = masses(
    "baseball=야구, basketball=농구, soccer=축구, tennis=테니스", "difficult easy interesting"
)
INSTRUMENTS = nouns("guitar=기타, piano=피아노", article="the")
OPENINGS = nouns("door=문, window=창문", article="the")
ROOMS = nouns(
    "classroom=교실, house=집, kitchen=부엌, room=방", "big clean quiet small", article="the"
)
SIGHTS = (
    nouns("garden=정원, park=공원", "beautiful big quiet small", article="the")
    + nouns("cafe=카페, hotel=호텔, library=도서관", "big clean quiet", article="the")
    + nouns("mountain=산, river=강, sea=바다", "beautiful clean quiet", article="the")
)
OWNED = ANIMALS + BAGS + BICYCLE + CAR + CLOTHES + FURNITURE + MACHINES
LIKENED = (
    BREAD + CAKE + DRINKS + FRUIT + MEAT + RICE + SOUP + VEGETABLES,
    BOOKS + LETTER + MOVIE + SONG + STORIES,
    OWNED + PICTURE + TOYS,
    ROOMS + SIGHTS,
    SPORTS + STUDIES,
)
FEW = ("대", "마리", "벌", "부", "잔", "편", "통")  # counters of what nobody has ten of
POINTED_OUT = table("this=이, that=저")
OWNERS = table(
    """my=내, your=네, his=그의, her=그녀의, our=우리, their=그들의, Minsu's=민수의,
    Mina's=미나의"""
)

# ---- people ----


class Person(NamedTuple):
    """A person: as object ("me"), and later in the sentence ("he"; "" if never asked for)."""

    english: str
    korean: str
    agreement: Agreement = "third"
    object_: str = ""
    pronoun: str = ""


def people(words: str, *, before: str = "", pronoun: str = "") -> tuple[Person, ...]:
    """Return people by name or, with something before it, by kind: "the doctor"."""
    return tuple(
        Person(before + word, meaning, "third", before + word, pronoun)
        for word, meaning in table(words).items()
    )


def many(persons: tuple[Person, ...]) -> tuple[Person, ...]:
    """Return "the students", 학생들, of "the student"."""
    return tuple(
        Person(english.plural(person.english), f"{person.korean}들", "plural") for person in persons
    )


PRONOUNS = (
    Person("I", "나", "first", "me", "I"),
    Person("you", "너", "plural", "you", "you"),
    Person("he", "그", "third", "him", "he"),
    Person("she", "그녀", "third", "her", "she"),
    Person("we", "우리", "plural", "us", "we"),
    Person("they", "그들", "plural", "them", "they"),
)
MYSELF, YOU, _, _, US, _ = PRONOUNS
NAMES = people("Junho=준호, Minsu=민수, Tom=톰", pronoun="he") + people(
    "Jisu=지수, Mina=미나, Susan=수전", pronoun="she"
)
JOBS = people(
    "doctor=의사, farmer=농부, nurse=간호사, police officer=경찰관, singer=가수, writer=작가",
    before="the ",
)
STUDENT = people("student=학생", before="the ")
PUPILS = STUDENT + people("child=아이", before="the ")
ADULTS = JOBS + people("man=남자, woman=여자", before="the ")
YOUNG = PUPILS + people("boy=소년, girl=소녀", before="the ")
KIN = people("friend=내 친구, younger brother=내 남동생, younger sister=내 여동생", before="my ")
ELDERS = people("father=우리 아버지, mother=우리 어머니", before="my ")
OTHERS = NAMES + ADULTS + YOUNG + KIN
EVERYBODY = PRONOUNS + NAMES  # grown up or not
CHILDREN = EVERYBODY + YOUNG + many(PUPILS)
GROWN = EVERYBODY + ADULTS + ELDERS + many(JOBS[:2])
ANYONE = PRONOUNS + PRONOUNS + OTHERS + ELDERS + many(PUPILS) + many(JOBS[:2])
# Nobody asks about themselves, and to ask about elders in the plain style is rude.
NOT_ASKED = (MYSELF, US, *ELDERS)

# ---- places ----


class Place(NamedTuple):
    """A place: 도서관, "at the library", "to the library"."""

    korean: str
    at: str
    to: str


PLACES = {
    "home": Place("집", "at home", "home"),
    "school": Place("학교", "at school", "to school"),
} | {
    word: Place(meaning, f"{preposition} the {word}", f"to the {word}")
    for preposition, words in {
        "at": """airport=공항, bank=은행, bookstore=서점, cafe=카페, hospital=병원, hotel=호텔,
            library=도서관, market=시장, museum=박물관, office=사무실, restaurant=식당, station=역,
            store=가게, theater=극장""",
        "in": "classroom=교실, garden=정원, kitchen=부엌, park=공원, river=강, room=방, sea=바다",
        "on": "farm=농장, mountain=산, street=거리",
    }.items()
    for word, meaning in table(words).items()
}


def places(words: str) -> tuple[Place, ...]:
    """Return the places named in a text."""
    return tuple(PLACES[word] for word in words.split())


GOALS = places(
    """home school airport bank bookstore cafe hospital hotel library market museum office
    restaurant station store theater park river sea farm mountain"""
)
CITIES = table("Seoul=서울, Busan=부산, Daejeon=대전, Gwangju=광주")
TRANSPORT = table("bicycle=자전거, bus=버스, car=자동차, subway=지하철, train=기차")
RELATIONS = table("on=위, under=아래, in=안, next to=옆, in front of=앞, behind=뒤")
BUILDINGS = table(
    """school=학교, bank=은행, bookstore=서점, cafe=카페, hospital=병원, hotel=호텔,
    museum=박물관, restaurant=식당"""
)
LANDMARKS = BUILDINGS | table(
    "bag=가방, bed=침대, box=상자, chair=의자, desk=책상, house=집, table=탁자, tree=나무"
)


def spots(relations: str, landmarks: str) -> tuple[Pair, ...]:
    """Return every relation to every landmark: "under the desk", 책상 아래."""
    return tuple(
        (f"{relation} the {landmark}", f"{LANDMARKS[landmark]} {RELATIONS[relation]}")
        for relation in relations.split(", ")
        for landmark in landmarks.split()
    )


# What may be somewhere, and where.
SITES = (
    (
        BOOKS + CLOTHES + CUP + LETTER + NOTEBOOK + PENS + TOYS,
        spots("on, under", "bed chair desk table") + spots("in", "bag box"),
    ),
    (FRUIT + VEGETABLES, spots("on, under", "desk table") + spots("in", "bag box")),
    (DRINKS, spots("on", "desk table")),
    (PETS, spots("under", "bed chair desk table")),
    (ANIMALS, spots("behind, next to, under", "tree") + spots("behind, in front of", "house")),
    (
        BICYCLE
        + CAR
        + TREE
        + tuple(Noun(word, meaning, "a", "", "", ()) for word, meaning in BUILDINGS.items()),
        spots("behind, in front of, next to", " ".join(BUILDINGS)),
    ),
)

# ---- times ----

NUMBERS = table(
    """one=한, two=두, three=세, four=네, five=다섯, six=여섯, seven=일곱, eight=여덟, nine=아홉,
    ten=열, eleven=열한, twelve=열두"""
)
WEEK = table(
    """Monday=월요일, Tuesday=화요일, Wednesday=수요일, Thursday=목요일, Friday=금요일,
    Saturday=토요일, Sunday=일요일"""
)
CLOCK = tuple((f"at {number} o'clock", f"{meaning} 시에") for number, meaning in NUMBERS.items())
WEEKDAYS = tuple((f"on {day}", f"{meaning}에") for day, meaning in WEEK.items())
DAY = pairs("in the morning=아침에, in the afternoon=오후에, in the evening=저녁에, at night=밤에")
# Those of the past fit no other tense: in "I read a book yesterday" nothing else tells it.
TIMES: dict[Tense, tuple[Pair, ...]] = {
    "present": (
        *pairs("every day=매일, every morning=매일 아침, every evening=매일 저녁"),
        *((f"every {day}", f"{meaning}마다") for day, meaning in WEEK.items()),
    ),
    "past": (
        *pairs("yesterday=어제, last night=어젯밤에, last week=지난주에, this morning=오늘 아침에"),
        *WEEKDAYS,
    ),
    "future": (
        *pairs("tomorrow=내일, tonight=오늘 밤에, next week=다음 주에, this weekend=이번 주말에"),
        *WEEKDAYS,
    ),
}
# When somebody is busy, rather than does something.
STATE_TIMES = {
    "present": pairs("now=지금, today=오늘"),
    "past": TIMES["past"] + pairs("today=오늘"),
}

# ---- verbs ----


class Frame(NamedTuple):
    """A verb with its possible objects, places, people and tools; all of them fit together."""

    english: str
    stem: str
    objects: tuple[Noun, ...] = ()
    places: tuple[Place, ...] = ()
    people: tuple[Person, ...] = ANYONE
    tools: tuple[str, ...] = ()
    plural: bool = False  # done to apples, not to an apple
    whom: bool = False  # done to people


TOOLS = table("pen=펜, pencil=연필")
FRAMES = (
    Frame("eat", "먹", CAKE + MEAT + RICE + SOUP, places("home kitchen restaurant")),
    Frame("eat", "먹", BREAD + FRUIT + VEGETABLES, places("cafe home kitchen park")),
    Frame("drink", "마시", DRINKS, places("cafe home office restaurant")),
    Frame("read", "읽", BOOKS + LETTER + NEWSPAPER, places("cafe home library park room")),
    Frame("write", "쓰", LETTER + STORIES, places("home library room"), tools=("pen", "pencil")),
    Frame("buy", "사", BREAD + CAKE + FRUIT + MEAT + VEGETABLES, places("market store")),
    Frame("buy", "사", BOOKS, places("bookstore")),
    Frame("buy", "사", BAGS + CLOTHES + CUP + NOTEBOOK + PENS + TOYS, places("store")),
    Frame("sell", "팔", FRUIT + MEAT + VEGETABLES, places("market store"), GROWN, plural=True),
    Frame("make", "만들", BREAD + CAKE + SOUP, places("home kitchen restaurant")),
    Frame("make", "만들", CUP + FURNITURE + TOYS, places("home room")),
    Frame("watch", "보", MOVIE, places("home theater")),
    Frame("watch", "보", NEWS + TELEVISION, places("home room")),
    Frame("listen to", "듣", MUSIC + NEWS + RADIO + SONG, places("cafe home park room")),
    Frame("study", "공부하", STUDIES, places("classroom home library room")),
    Frame("learn", "배우", SPORTS + STUDIES, places("school")),
    Frame("teach", "가르치", STUDIES, places("classroom school"), GROWN),
    Frame("help", "돕", (), places("home hospital market office school"), whom=True),
    Frame("meet", "만나", (), places("cafe library park station street"), whom=True),
    Frame("wait for", "기다리", (), places("airport cafe park school station"), whom=True),
    Frame("clean", "청소하", ROOMS),
    Frame("cook", "요리하", MEAT, places("home kitchen restaurant")),
    Frame("draw", "그리", ANIMALS + FLOWER + TREE, places("garden park room"), tools=("pencil",)),
    Frame("draw", "그리", PICTURE, places("classroom home room"), tools=("pen", "pencil")),
    Frame("look for", "찾", BAGS + NOTEBOOK + PENS, places("classroom office room")),
    Frame("borrow", "빌리", BOOKS, places("library")),
    Frame("choose", "고르", BAGS + CLOTHES, places("store")),
    Frame("choose", "고르", BOOKS, places("bookstore library")),
    Frame("fix", "고치", BICYCLE + CAR + FURNITURE + MACHINES, places("home")),
    Frame("plant", "심", FLOWER + TREE, places("garden park")),
    Frame("ride", "타", BICYCLE, places("park street")),
    Frame("ride", "타", HORSE, places("farm")),
    Frame("play", "하", SPORTS, places("park school")),
    Frame("play", "치", INSTRUMENTS, places("home room school")),
    Frame("play", "놀", (), places("garden park room sea"), CHILDREN),
    Frame("take", "찍", PHOTO, places("mountain museum park")),
    Frame("use", "사용하", MACHINES, places("home library office")),
    Frame("see", "보", ANIMALS + FLOWER, places("farm mountain park")),
    Frame("wash", "씻", CUP + VEGETABLES, places("kitchen")),
    Frame("open", "열", OPENINGS),
    Frame("close", "닫", OPENINGS),
    Frame("sleep", "자", (), places("home hotel room")),
    Frame("run", "달리", (), places("park street")),
    Frame("walk", "걷", (), places("garden mountain park street")),
    Frame("swim", "수영하", (), places("river sea")),
    Frame("dance", "춤추", (), places("park room theater")),
    Frame("sing", "노래하", (), places("classroom park room theater")),
    Frame("work", "일하", (), places("bank farm hospital office restaurant store"), GROWN),
    Frame("rest", "쉬", (), places("garden home hotel park room")),
    Frame("laugh", "웃", (), places("classroom room theater")),
    Frame("get up", "일어나"),
)
LIKING = (
    Frame("like", "좋아하", ANIMALS + FLOWER + MOVIE, plural=True),
    Frame("like", "좋아하", MUSIC + SPORTS + STUDIES, plural=True),
    Frame("like", "좋아하", BREAD + CAKE + DRINKS + FRUIT + RICE, plural=True),
    Frame("hate", "싫어하", BREAD + DRINKS + SPORTS + STUDIES + VEGETABLES, plural=True),
)
GIVING = (
    Frame("give", "주", BAGS + BOOKS + CLOTHES + FLOWER + PENS + PICTURE + TOYS),
    Frame("send", "보내", BAGS + BOOKS + CLOTHES + LETTER + PHOTO + TOYS),
)
# "That Minsu bought" tells one thing from others.
MAKING = tuple(
    frame for frame in FRAMES if frame.english in ("buy", "choose", "draw", "make", "write")
)
WITHOUT_COMPANY = ("close", "get up", "open", "sleep")  # not "with Mina"
WITHOUT_DURATION = ("close", "get up", "open", "see")  # not "is opening"
NOT_TEN = ("choose", "eat")  # ten hats
ONE_AT_A_TIME = ("fix", "look for", "ride", "use")  # not three bicycles
OWNED_BY_OTHERS = ("fix", "look for", "read", "ride", "use")  # Mina's book
# Prices are named where one pays, and nobody makes an old chair.
PRICES = ("cheap", "expensive")
UNFIT = {"buy": (), "choose": (), "make": (*PRICES, "old")}
# How somebody or the weather is; whether one then does *not* do something; and what.
REASONS = (
    ("hungry", False, ("eat", "cook")),
    ("tired", False, ("sleep", "rest")),
    ("tired", True, ("study", "clean", "cook", "run", "dance")),
    ("busy", True, ("watch", "meet", "rest", "help", "clean", "cook")),
    ("happy", False, ("sing", "dance", "laugh")),
    ("sad", True, ("sing", "dance", "laugh", "eat")),
    ("good", False, ("walk", "run", "ride")),
    ("warm", False, ("walk", "run", "ride")),
    ("hot", False, ("swim", "rest")),
    ("hot", True, ("run", "walk", "clean")),
    ("cold", True, ("swim", "run", "walk", "ride")),
)
