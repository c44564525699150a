import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import sentencepiece

from jaxformer.config import UNK_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.run_directory import load_tokenizers, save_tokenizers
from jaxformer.tokenizer import Tokenizer, VocabularyTokenizer
from train.data import tokenizer as learning
from train.data.tokenizer import learn_tokenizers

ANIMALS = [("cat", "고양이"), ("dog", "개"), ("bird", "새"), ("horse", "말")]
PAIRS = datasets.Dataset.from_dict(
    {
        "source": [f"the {en} has {n} friends." for n in range(40) for en, _ in ANIMALS],
        "target": [f"그 {ko}는 친구가 {n}명 있다." for n in range(40) for _, ko in ANIMALS],
    }
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def tokenizer(run):
    return learn_tokenizers([PAIRS], run, vocab_size=90, joint=True)[0]


@pytest.mark.parametrize("text", ["그 고양이는 친구가 7명 있다.", "the dog has 12 friends.", ""])
def test_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_never_encoded_and_never_decoded(tokenizer):
    ids = tokenizer.encode("<s> the cat </s>")
    assert not {0, 1, 2} & set(ids)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(np.array([1, *ids, 2, 0, 0], np.int32)) == "the cat"


def test_unknown_characters_become_unk(tokenizer):
    assert 3 in tokenizer.encode("Ω")
    assert tokenizer.decode([3]).strip() == "⁇"


def test_batch_encodes_like_one_by_one(tokenizer):
    texts = ["the cat", "", "고양이", "the bird has friends."]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_dropout_of_merges(tokenizer):
    texts = ["the cat has friends.", "고양이는 친구가 있다."] * 20
    split = tokenizer.encode_batch(texts, dropout=0.3, seed=1)
    assert split == tokenizer.encode_batch(texts, dropout=0.3, seed=1)
    many = [
        tokenizer.encode_batch(texts * 400, dropout=0.3, seed=1)  # enough for several threads
        for _ in range(3)
    ]
    assert many[0] == many[1] == many[2]
    assert split != tokenizer.encode_batch(texts, dropout=0.3, seed=2)
    assert len(set(map(tuple, split[::2]))) > 5  # equal sentences are split differently
    assert [tokenizer.decode(ids) for ids in split] == texts
    characters = tokenizer.encode_batch(["the cat"], dropout=1.0, seed=1)[0]
    assert tokenizer.pieces(characters) == list("▁the▁cat")
    assert tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts)  # no dropout by default


def test_pieces_spell_the_text(tokenizer):
    pieces = tokenizer.pieces(tokenizer.encode("the cat"))
    assert "".join(pieces).replace("▁", " ").strip() == "the cat"


def test_run_directory_holds_the_tokenizer(run, tokenizer):
    source, target = load_tokenizers(run)
    assert source is target
    assert source.model == tokenizer.model
    assert source.vocab_size == 90
    assert [path.name for path in run.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_separate_vocabularies_know_one_side_each(tmp_path, model_type):
    learn_tokenizers([PAIRS], tmp_path, vocab_size=32, joint=False, model_type=model_type)
    source, target = load_tokenizers(tmp_path)
    assert (source.vocab_size, target.vocab_size) == (32, 32)
    assert source.decode(source.encode("the cat")) == "the cat"
    assert target.decode(target.encode("그 고양이")) == "그 고양이"
    assert 3 in source.encode("고양이")
    assert 3 in target.encode("the cat")


def test_of_very_many_sentences_every_nth_pair_is_read(monkeypatch):
    """From the first to the last, even past the rows that are read at once."""
    monkeypatch.setattr(learning, "_MAX_SENTENCES", 10)
    names = [str(row) for row in range(25_001)]
    long = datasets.Dataset.from_dict({"source": names, "target": names})
    short = long.select(range(3))
    assert list(learning._sentences([long, short], ("source",))) == [*names[::2501], "0"]
    both = list(learning._sentences([long], ("source", "target")))
    assert sorted(both) == sorted(2 * names[::5001])
    monkeypatch.setattr(learning, "_MAX_SENTENCES", 25_001)
    assert list(learning._sentences([long], ("target",))) == names


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_learning_is_deterministic_and_silent(tmp_path, capfd, model_type):
    models = [
        learn_tokenizers(
            [PAIRS], tmp_path / name, vocab_size=80, joint=True, model_type=model_type
        )[0].model
        for name in ("a", "b")
    ]
    assert models[0] == models[1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("vocab_size", [20_000, 10])
def test_impossible_vocabulary_names_the_possible_one(tmp_path, model_type, vocab_size):
    def learn(size):
        return learn_tokenizers(
            [PAIRS], tmp_path, vocab_size=size, joint=True, model_type=model_type
        )

    with pytest.raises(UserError, match=r"model\.vocab_size=\d+.*(largest|least) .*\d$") as error:
        learn(vocab_size)
    assert list(tmp_path.iterdir()) == []
    possible = int(str(error.value).split()[-1])
    assert learn(possible)[0].vocab_size == possible


def test_nothing_to_learn_from(tmp_path):
    empty = datasets.Dataset.from_dict({"source": [""], "target": [" "]})
    with pytest.raises(UserError, match="source and target text"):
        learn_tokenizers([empty], tmp_path, vocab_size=10, joint=True)


def test_a_huge_corpus_is_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(learning, "_MAX_SENTENCES", 50)
    sentences = list(learning._sentences([PAIRS], ("source", "target")))
    assert 40 <= len(sentences) <= 50
    assert "the cat has 0 friends." in sentences
    assert any("38" in sentence or "39" in sentence for sentence in sentences)


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")
    for content in (b"junk", b""):
        (tmp_path / "junk.model").write_bytes(content)
        with pytest.raises(UserError, match=r"junk\.model is not a sentencepiece model"):
            Tokenizer.load(tmp_path / "junk.model")


def test_model_with_sentencepiece_default_ids_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PAIRS["source"]), model_writer=model, vocab_size=30, minloglevel=2
    )
    with pytest.raises(UserError, match=r"pad_id=-1, unk_id=0: .*--pad_id=0"):
        Tokenizer(model.getvalue())


# A vocabulary of its own: with pieces that the model lacks, and without some that it has.
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", ">>kor<<", "at", "▁", "▁the", "▁개", "c", "t", "a"]


@pytest.fixture(scope="module")
def renumbered(tokenizer):
    return VocabularyTokenizer(tokenizer.model, VOCABULARY)


def test_a_vocabulary_numbers_the_pieces_of_the_model(tokenizer, renumbered):
    assert renumbered.vocab_size == len(VOCABULARY)
    texts = ["the cat", "", "개 the dog", " the\tcat "]
    expected = [
        [VOCABULARY.index(piece) if piece in VOCABULARY else 3 for piece in pieces]
        for pieces in map(tokenizer.pieces, tokenizer.encode_batch(texts))
    ]
    assert renumbered.encode_batch(texts) == expected
    assert [renumbered.encode(text) for text in texts] == expected
    assert 7 in expected[0] and 3 in expected[2]
    assert renumbered.pieces(range(len(VOCABULARY))) == VOCABULARY


def test_a_vocabulary_joins_pieces_that_the_model_lacks(renumbered):
    assert renumbered.decode(np.array([1, 7, 8, 9, 5, 2, 0], np.int32)) == "the 개cat"
    assert renumbered.decode([]) == ""
    assert renumbered.decode([3, 7]).split() == ["⁇", "the"]


def test_a_language_code_is_one_piece_at_the_beginning_alone(renumbered):
    the = renumbered.encode("the")
    assert renumbered.encode(">>kor<< the") == [4, *the]
    assert renumbered.encode(">>kor<<the") == [4, *the]
    assert renumbered.encode(">>deu<< the") == [3, *the]
    assert 4 not in renumbered.encode("the >>kor<<")
    assert 4 not in renumbered.encode(" >>kor<< the")
    assert 4 not in renumbered.encode(">>kor the")


def test_text_does_not_spell_the_special_pieces_of_a_vocabulary(renumbered):
    for text in ("<pad>", "</s> the", "<s>", "<unk> the"):
        assert not {0, 1, 2} & set(renumbered.encode(text))


def test_a_run_directory_holds_vocabularies(tmp_path, tokenizer, renumbered):
    save_tokenizers(tmp_path, renumbered, renumbered)
    source, target = load_tokenizers(tmp_path)
    assert source is target
    assert (source.model, source.vocabulary) == (tokenizer.model, VOCABULARY)
    pair = tmp_path / "pair"
    pair.mkdir()
    save_tokenizers(pair, tokenizer, renumbered)
    source, target = load_tokenizers(pair)
    assert (source.vocab_size, target.vocab_size) == (90, len(VOCABULARY))
    for damage in ("[", '{"a": 1}', "[1, 2]"):
        (pair / "vocabulary.target.json").write_text(damage)
        with pytest.raises(
            UserError, match=r"vocabulary\.target\.json is not .*: restore|; restore"
        ):
            load_tokenizers(pair)


@pytest.mark.parametrize("rare", ["żółć", "ж " * 3000])
def test_every_character_of_the_corpus_is_a_piece(tmp_path, rare):
    """Even one in half a million, and one in a line of thousands of bytes."""
    lines = ["the cat sees the dog"] * 20_000 + [rare]
    corpus = datasets.Dataset.from_dict({"source": lines, "target": lines})
    learned, _ = learn_tokenizers([corpus], tmp_path, vocab_size=30, joint=True)
    assert UNK_ID not in learned.encode(rare)


@pytest.mark.parametrize("own", ["<unk>", "<pad>", "<s>", "</s>", "\u2585"])
def test_what_sentencepiece_has_a_meaning_for_costs_no_letter(tmp_path, own):
    lines = ["the cat", f"a zebra {own}"]
    corpus = datasets.Dataset.from_dict({"source": lines, "target": lines})
    learned, _ = learn_tokenizers([corpus], tmp_path, vocab_size=24, joint=True)
    unknown = learned.encode(lines[1]).count(UNK_ID)
    assert unknown == (own == "\u2585"), "that one alone cannot be a piece"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_text_that_is_blank(tmp_path, model_type):
    corpus = datasets.Dataset.from_dict({"source": ["  ", "\u200b"], "target": ["a", "b"]})
    with pytest.raises(UserError, match="the source text is blank: nothing to learn"):
        learn_tokenizers([corpus], tmp_path, vocab_size=9, joint=False, model_type=model_type)


def test_other_rules_are_another_tokenizer(tmp_path, monkeypatch):
    settings = {"vocab_size": 90, "joint": True, "cache": tmp_path}
    learn_tokenizers([PAIRS], tmp_path / "run", **settings)
    rules = learning.normalization_rules().split("\n", 1)[1]
    monkeypatch.setattr(learning, "normalization_rules", lambda: rules)
    learn_tokenizers([PAIRS], tmp_path / "run", **settings)
    assert len(list(tmp_path.glob("tokenizer-*.model"))) == 2


def test_a_cached_tokenizer_that_is_damaged(tmp_path):
    settings = {"vocab_size": 90, "joint": True, "cache": tmp_path}
    learn_tokenizers([PAIRS], tmp_path / "run", **settings)
    (cached,) = tmp_path.glob("tokenizer-*.model")
    cached.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"is damaged .*: delete it to have it made again"):
        learn_tokenizers([PAIRS], tmp_path / "run", **settings)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UserError("a file is damaged")])
def test_what_stops_the_reading_is_not_called_sentencepieces_error(tmp_path, monkeypatch, error):
    def sentences(*_):
        yield "one"
        raise error

    monkeypatch.setattr(learning, "_sentences", sentences)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        learn_tokenizers([PAIRS], tmp_path, vocab_size=90, joint=True)


@pytest.mark.parametrize("content", ["[" * 100_000, r'["\ud800"]'])
def test_a_vocabulary_that_is_no_list_of_texts(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"vocabulary\.json is not valid JSON: .*; restore the"):
        VocabularyTokenizer.load_pair(tmp_path / "tokenizer.model", path)


def test_tokenizers_of_another_model(tmp_path):
    learn_tokenizers([PAIRS], tmp_path, vocab_size=90, joint=True)
    load_tokenizers(tmp_path, TransformerConfig(vocab_size=90))
    with pytest.raises(UserError, match="target tokenizer has 90 pieces and the model 91: copy"):
        load_tokenizers(
            tmp_path,
            TransformerConfig(vocab_size=91, source_vocab_size=90, embeddings="separate"),
        )


def test_dropout_of_merges_is_the_same_in_every_process(tmp_path):
    """Each host encodes by itself, and a run may be resumed where nothing is cached."""
    tokenizers = learn_tokenizers([PAIRS], tmp_path, vocab_size=90, joint=True)
    lines = PAIRS["source"]
    here = tokenizers[0].encode_batch(lines, dropout=0.3, seed=5)
    program = (
        "import json, sys\nfrom jaxformer.run_directory import load_tokenizers\n"
        "tokenizer = load_tokenizers(sys.argv[1])[0]\n"
        "print(tokenizer.encode_batch(json.loads(sys.argv[2]), dropout=0.3, seed=5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(list(lines))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert json.loads(done.stdout) == here


def test_other_settings_are_another_tokenizer(tmp_path):
    for vocab_size, model_type in ((90, "bpe"), (80, "bpe"), (80, "unigram")):
        settings = {"vocab_size": vocab_size, "model_type": model_type, "cache": tmp_path}
        learned, _ = learn_tokenizers([PAIRS], tmp_path / "run", joint=True, **settings)
        assert learned.vocab_size == vocab_size
    assert len(list(tmp_path.glob("tokenizer-*.model"))) == 3
    source, target = learn_tokenizers(
        [PAIRS], tmp_path / "run", joint=False, vocab_size=60, cache=tmp_path
    )
    assert source.model != target.model
