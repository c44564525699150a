"""Lines that are too long: where they are cut, and what goes before each part."""

import itertools

import pytest

from jaxformer.long_lines import cut
from jaxformer.tokenizer import VocabularyTokenizer
from random_run import tokenizer
from small_run import LEXICON

TEXT = " ".join(itertools.islice(itertools.cycle(LEXICON), 50))


@pytest.fixture(scope="module")
def pieces():
    return tokenizer(61)


@pytest.fixture(scope="module")
def coded(pieces):
    """A tokenizer with a language code among its pieces."""
    words = ["<pad>", "<s>", "</s>", "<unk>", ">>deu<<"]
    words += sorted({piece for piece in pieces.pieces(pieces.encode(TEXT))})
    return VocabularyTokenizer(pieces.model, words)


def test_a_language_code_goes_before_every_part(coded):
    plain, ids = coded.encode(TEXT), coded.encode(f">>deu<< {TEXT}")
    assert ids == [4, *plain]
    parts = list(cut(ids, 9, coded))
    assert len(parts) > 5 and all(part[0] == 4 and 1 < len(part) <= 9 for part in parts)
    assert [id for part in parts for id in part[1:]] == plain


def test_a_language_code_that_would_leave_no_room_goes_before_none(coded):
    ids = coded.encode(">>deu<< red dogs")
    parts = itertools.islice(cut(ids, 1, coded), 99)
    assert list(parts) == [[id] for id in ids]


@pytest.mark.parametrize("limit", [6, 31])
def test_parts_begin_with_a_word_and_are_as_long_as_may_be(pieces, limit):
    ids = pieces.encode(TEXT)
    parts = list(cut(ids, limit, pieces))
    assert list(itertools.chain(*parts)) == ids
    assert all(1 <= len(part) <= limit for part in parts)
    for part, following in itertools.pairwise(parts):
        named = pieces.pieces(following)
        starts = [i for i, piece in enumerate(named) if piece.startswith("▁")]
        assert starts[0] == 0
        # The next word would have made the part too long.
        next_word = starts[1] if len(starts) > 1 else len(named)
        assert len(part) + next_word > limit


def test_a_word_without_end_is_cut_at_the_limit(pieces):
    ids = pieces.encode("red" * 40)
    parts = list(cut(ids, 7, pieces))
    assert list(itertools.chain(*parts)) == ids
    assert {len(part) for part in parts[:-1]} == {7}
