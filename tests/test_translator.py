"""Strings in, strings out: as many, in order, whatever the input and whatever stands beside it."""

import itertools
import json
import random
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxformer.translator as module
from compiles import count_compiles
from jaxformer.config import EOS_ID, PAD_ID
from jaxformer.errors import UserError
from jaxformer.translator import EXTRA_LENGTH, Translator
from small_run import LEXICON, sentence_pairs, trained_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory)


@pytest.fixture(scope="module")
def translator(run):
    return Translator.load(run)


def greedy(translator, lines, **options):
    return translator.translate(lines, beam_size=1, batch_tokens=128, **options)


SENTENCES = [source for source, _ in sentence_pairs(12)]


# ---------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------


def test_it_translates(translator):
    """Most words are right, so parameters, tokenizers and search are the right ones."""
    translations = greedy(translator, SENTENCES)
    right = total = 0
    for source, translation in zip(SENTENCES, translations, strict=True):
        expected = {LEXICON[word] for word in source.split()}
        right += len(expected & set(translation.split()))
        total += len(expected)
    assert right / total > 0.6, list(zip(SENTENCES, translations, strict=True))


def test_empty_lines_stay_empty_and_in_place(translator):
    lines = ["", SENTENCES[0], "  \t ", SENTENCES[1], "\u2028", ""]
    translations = greedy(translator, lines)
    assert [bool(text) for text in translations] == [False, True, False, True, False, False]
    assert [translations[1], translations[3]] == greedy(translator, SENTENCES[:2])
    assert greedy(translator, []) == []
    assert greedy(translator, [""]) == [""]


def test_neither_order_nor_company_matters(translator):
    together = greedy(translator, SENTENCES)
    assert len(set(together)) > 6, "the model says the same of everything"
    order = list(range(len(SENTENCES)))
    random.Random(1).shuffle(order)
    shuffled = greedy(translator, [SENTENCES[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert [greedy(translator, [line])[0] for line in SENTENCES] == together


def beams(translator, lines, alpha):
    return translator.translate(
        lines, beam_size=2, batch_tokens=128, length_penalty=alpha, length_penalty_form="power"
    )


def test_beams_do_not_make_company_matter(translator):
    assert beams(translator, SENTENCES[3:6], 0.0) == beams(translator, SENTENCES[:8], 0.0)[3:6]


def test_separators_inside_a_line_do_not_split_it(translator):
    (plain,) = greedy(translator, ["red dogs sit here"])
    for separator in ("\u2028", "\u0085", "\x0b", "\x0c", "\x1e", "\r", "\n", "  "):
        translations = greedy(translator, [f"red dogs{separator}sit here", SENTENCES[0]])
        assert len(translations) == 2
        assert not any(len(text.splitlines()) > 1 for text in translations), repr(separator)
        if separator in ("\u2028", "\r", "\n", "  "):  # spaces to sentencepiece
            assert translations[0] == plain, repr(separator)


def test_characters_that_were_never_seen(translator):
    translations = greedy(translator, ["漢字 🙂", "red dogs"])
    assert len(translations) == 2
    assert translations[1] == greedy(translator, ["red dogs"])[0]


# ---------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------


def test_windows_do_not_show(translator, monkeypatch):
    expected = greedy(translator, SENTENCES)
    monkeypatch.setattr(module, "_WINDOW", 5)
    assert greedy(translator, SENTENCES) == expected


def test_a_stream_is_read_a_window_at_a_time(translator, monkeypatch):
    monkeypatch.setattr(module, "_WINDOW", 3)
    read = []

    def lines():
        for index in itertools.count():
            read.append(index)
            yield SENTENCES[index % len(SENTENCES)]

    stream = translator.translate_stream(lines(), beam_size=1, batch_tokens=128)
    assert read == []
    first = [next(stream) for _ in range(3)]
    assert read == [0, 1, 2]
    next(stream)
    assert read == [0, 1, 2, 3, 4, 5]
    assert first == greedy(translator, SENTENCES[:3])


# ---------------------------------------------------------------------------------------------
# Lines longer than the model
# ---------------------------------------------------------------------------------------------


def test_a_long_line_is_translated_in_parts_with_a_warning(translator, monkeypatch, capsys):
    monkeypatch.setattr(module, "_WINDOW", 2)
    long = " ".join(itertools.islice(itertools.cycle(LEXICON), 70))
    limit = translator.config.max_length - 1
    count = len(translator.source_tokenizer.encode(long))
    assert count > 2 * limit
    translations = greedy(translator, ["red dogs", "old cats", long, "red dogs"])
    assert capsys.readouterr().err == (
        f"warning: line 3 has {count} pieces, more than the model's {limit}: translated in parts\n"
    )
    assert len(translations) == 4
    assert translations[0] == translations[3] == greedy(translator, ["red dogs"])[0]
    # Each part is a line of its own; joined they are the line.
    ids = translator.source_tokenizer.encode(long)
    parts = [translator.source_tokenizer.decode(p) for p in translator._split(ids, limit)]
    assert " ".join(parts) == long
    warnings = []
    assert " ".join(greedy(translator, parts, warn=warnings.append)) == translations[2]
    assert warnings == []


@pytest.mark.parametrize("limit", [6, 31])
def test_parts_begin_with_a_word_and_are_as_long_as_may_be(translator, limit):
    tokenizer = translator.source_tokenizer
    ids = tokenizer.encode(" ".join(itertools.islice(itertools.cycle(LEXICON), 50)))
    parts = list(translator._split(ids, limit))
    assert list(itertools.chain(*parts)) == ids
    assert all(1 <= len(part) <= limit for part in parts)
    for part, following in itertools.pairwise(parts):
        pieces = tokenizer.pieces(following)
        starts = [i for i, piece in enumerate(pieces) if piece.startswith("▁")]
        assert starts[0] == 0
        # The next word would have been too much.
        next_word = starts[1] if len(starts) > 1 else len(pieces)
        assert len(part) + next_word > limit


def test_a_word_without_end_is_cut_at_the_limit(translator):
    ids = translator.source_tokenizer.encode("red" * 40)
    parts = list(translator._split(ids, 7))
    assert list(itertools.chain(*parts)) == ids
    assert {len(part) for part in parts[:-1]} == {7}


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def shapes_and_sources(translator, sources, batch_tokens):
    """Return the shapes of the batches and, read back out of them, the sources."""
    shapes, seen = [], []

    def decode(source_ids, limits):
        shapes.append(source_ids.shape)
        for ids, limit in zip(source_ids, limits, strict=True):
            length = np.count_nonzero(ids)
            assert not ids[length:].any()
            if length == 0:
                assert limit == 0, "a row of filling must cost no step"
                continue
            assert ids[length - 1] == EOS_ID and limit == length + EXTRA_LENGTH
            seen.append(ids[: length - 1].tolist())
        # A "translation" that tells which source it is of.
        sequences = np.full((len(source_ids), 1, 3), PAD_ID)
        sequences[:, 0, 0] = source_ids[:, 0]
        return SimpleNamespace(sequences=sequences)

    texts = translator._translate_pieces(decode, sources, batch_tokens)
    assert texts == [translator.target_tokenizer.decode(ids[:1]) for ids in sources]
    return shapes, seen


def test_batches_have_few_shapes_and_every_sentence_once(translator):
    draw = random.Random(3)
    all_shapes = set()
    for number in range(1, 60):
        sources = [
            [draw.randrange(4, 64) for _ in range(draw.randint(1, 31))] for _ in range(number)
        ]
        shapes, seen = shapes_and_sources(translator, sources, batch_tokens=256)
        assert sorted(seen) == sorted(sources)
        all_shapes.update(shapes)
    rows, lengths = zip(*all_shapes, strict=True)
    assert set(lengths) == {8, 12, 16, 24, 32}
    assert max(np.multiply(rows, lengths)) <= 256
    assert len(all_shapes) <= 3 * 5


def test_a_sentence_longer_than_a_batch_has_one_of_its_own(translator):
    shapes, _ = shapes_and_sources(translator, [[5] * 30, [6] * 30], batch_tokens=10)
    assert shapes == [(1, 32), (1, 32)]


def test_the_same_shapes_compile_nothing_again(translator):
    expected = greedy(translator, SENTENCES[:5])
    with count_compiles() as compiled:
        assert greedy(translator, SENTENCES[:5]) == expected
        greedy(translator, SENTENCES[:3])
    assert compiled == []


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def searches(monkeypatch):
    """The options that reach the search, which is not run."""
    calls = []

    def search(params, source_ids, limits, **options):
        calls.append(options)
        return SimpleNamespace(sequences=np.zeros((len(source_ids), 1, 1), np.int32))

    monkeypatch.setattr(module, "_translate_batch", search)
    return calls


def test_options_reach_the_search(translator, searches):
    translator.translate(["red dogs"])
    translator.translate(["red dogs"], beam_size=7, length_penalty=1.0, length_penalty_form="power")
    assert searches == [
        {
            "config": translator.config,
            "beam_size": beam_size,
            "length_penalty": length_penalty,
            "length_penalty_form": form,
        }
        for beam_size, length_penalty, form in ((4, 0.6, "gnmt"), (7, 1.0, "power"))
    ]


def test_a_length_penalty_prefers_long_translations(translator):
    short, long = (
        sum(len(text.split()) for text in beams(translator, SENTENCES[:8], alpha))
        for alpha in (0.0, 6.0)
    )
    assert long > short


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def test_checkpoints_by_name_and_step(run, translator):
    def same(checkpoint):
        params = Translator.load(run, checkpoint).params
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, params, translator.params)))

    assert same("average") and not same(150) and not same("last")


def test_only_config_tokenizer_and_checkpoints_are_needed(run, translator, tmp_path):
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(run / name, tmp_path)
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    assert greedy(Translator.load(tmp_path), SENTENCES[:2]) == greedy(translator, SENTENCES[:2])


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    shutil.copy(run / "tokenizer.model", tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["model"]["vocab_size"] = 70
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer has 100 pieces and the model 70: copy"):
        Translator.load(tmp_path)
