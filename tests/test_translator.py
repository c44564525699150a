"""Strings in, strings out: as many, in order, whatever the input and its neighbours."""

import itertools
import json
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jaxtyping
import numpy as np
import pytest

import jaxformer.translator as module
from jaxformer import loading
from jaxformer.errors import UserError
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator
from jaxformer.long_lines import cut
from jaxformer.search import BeamResult
from jaxformer.tokenizer import VocabularyTokenizer
from jaxformer.translator import Translator
from random_run import CONFIG, write_random_run
from small_run import LEXICON, sentence_pairs, trained_run
from train.benchmark.compiles import count_compiles

pytestmark = pytest.mark.usefixtures("one_program_a_search")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory)


@pytest.fixture(scope="module")
def translator(run):
    # One device: programs for eight take long to compile, and test_generator covers them.
    return Translator.load(run, devices=jax.devices()[:1])


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


def test_a_line_without_any_translation_stays_empty(translator, monkeypatch):
    nothing = BeamResult(*np.array([[[0, 0]]]), *np.full((2, 1), -np.inf), np.array([0]))
    monkeypatch.setattr(
        Translator, "_search", lambda _, parts, *__, **___: [nothing for _ in parts]
    )
    said = []
    lines = ["red dogs", "", "old cats"]
    assert translator.translate(lines, warn=said.append) == ["", "", ""]
    assert [line.split(":")[0] for line in said] == ["line 1", "line 3"]
    ((one,),) = translator.generate(["red dogs"], warn=said.append)
    assert (one.text, one.score, one.finished) == ("", -np.inf, False)


def test_impossible_options(translator):
    for options, message in (
        ({"beams": 3}, "there is no option 'beams': choose one of beam_size, n_best"),
        ({"batch_tokens": 0}, "batch_tokens is 0: give at least 1"),
        ({"sampling": True, "temperature": 1e-39}, "temperature is 1e-39: give 0, or 1e-30 to"),
    ):
        with pytest.raises(UserError, match=message):
            translator.translate(["red dogs"], **options)
    with pytest.raises(UserError, match="batch_tokens is -1: give at least 1"):
        translator.score(["red dogs"], ["rote Hunde"], batch_tokens=-1)
    for nothing in ([], ["RUN"]):
        with pytest.raises(UserError, match="no run or checkpoint to load: name at least one"):
            Translator.load(nothing, [])


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
    # With the same number of rows, else these would be different programs.
    assert beams(translator, SENTENCES[3:8], 0.0) == beams(translator, SENTENCES[:8], 0.0)[3:8]


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


def test_windows_do_not_show(translator):
    assert greedy(translator, SENTENCES, window=5) == greedy(translator, SENTENCES)


def test_the_noise_of_a_line_follows_from_its_number_in_the_stream(translator, monkeypatch):
    drawn, no_result = [], BeamResult(*np.zeros((4, 0, 0)))

    def generate(sources, options, *, keys, **given):
        drawn.append(np.asarray(jax.random.key_data(keys)))
        return [no_result] * len(sources)

    monkeypatch.setattr(translator.generator, "generate", generate)
    long = " ".join(itertools.islice(itertools.cycle(LEXICON), 70))
    lines = [*SENTENCES[:11], long]
    options = {"sampling": True, "seed": 3, "warn": lambda _: None}
    found = list(translator.generate(lines, window=5, **options))
    assert len(found) == 12 and [len(each) for each in drawn[:2]] == [5, 5]
    by_windows = np.concatenate(drawn)
    assert len(by_windows) >= 11 + 3  # the last line is translated in parts
    assert len(np.unique(by_windows, axis=0)) == len(by_windows)
    drawn.clear()
    list(translator.generate(lines, **options))
    np.testing.assert_array_equal(drawn[0], by_windows)


def test_a_stream_is_read_a_window_at_a_time(translator):
    read = []

    def lines():
        for index in itertools.count():
            read.append(index)
            yield SENTENCES[index % len(SENTENCES)]

    stream = translator.translate_stream(lines(), beam_size=1, batch_tokens=128, window=3)
    assert read == []
    first = [next(stream) for _ in range(3)]
    assert read == [0, 1, 2]
    next(stream)
    assert read == [0, 1, 2, 3, 4, 5]
    assert first == greedy(translator, SENTENCES[:3])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (None, "line 3 is None: give a string"),
        ("red \ud800", "line 3 has a lone surrogate, U+D800, which is not text: leave it out"),
    ],
)
def test_what_came_before_a_line_that_is_no_text_is_translated(
    translator, line, message, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    stream = translator.translate_stream(
        ["red dogs", "old cats", line, "red dogs"], beam_size=1, batch_tokens=128
    )
    assert [next(stream), next(stream)] == greedy(translator, ["red dogs", "old cats"])
    with pytest.raises(UserError, match=re.escape(message)):
        next(stream)
    with pytest.raises(UserError, match=re.escape(message.replace("line", "source line"))):
        translator.score(["red dogs", "old cats", line], ["", "", ""])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0: give at least 1"),
        ({"batch_tokens": 512.5}, "batch_tokens is 512.5: give at least 1"),
        ({"seed": 2**32}, "seed is 4294967296: give 0 to 4294967295"),
        ({"seed": -1}, "seed is -1: give 0 to"),
        ({"seed": 0.5}, "seed is 0.5: give 0 to"),
        ({"seed": [None]}, "seed is None: give 0 to"),
        ({"seed": [1, 2]}, "there is no line 2: give one prefix or seed per line"),
        ({"seed": []}, "there is no seed 1: give one prefix or seed per line"),
        ({"n_best": 2}, "n_best is 1 here: call generate for more"),
    ],
)
def test_arguments_that_mean_nothing(translator, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=re.escape(message)):
        translator.translate(["red dogs"], **options)


def test_a_translation_is_one_line_whatever_the_pieces_are(translator, monkeypatch):
    monkeypatch.setattr(translator.target_tokenizer, "decode", lambda _: "rote\nHunde")
    assert translator.translate(["red dogs"], beam_size=1) == ["rote Hunde"]


def test_a_prefix_that_is_cut_off_is_told(translator, monkeypatch):
    said = []
    options = {"max_length_ratio": 0.0, "max_length_extra": 2, "warn": said.append}
    ((best,),) = translator.generate(
        ["red dogs"], prefixes=["rote Hunde rote Hunde"], beam_size=1, **options
    )
    count = len(translator.target_tokenizer.encode("rote Hunde rote Hunde"))
    assert said == [
        f"line 1: its prefix has {count} pieces and a translation at most 2: cut off there"
    ]
    assert len(best.ids) == 2 and not best.finished
    # At most as long as the source, eos included.
    no_result = BeamResult(*np.zeros((4, 0, 0)))
    monkeypatch.setattr(translator.generator, "generate", lambda *_, **__: [no_result])
    most = len(translator.source_tokenizer.encode("red dogs")) + 1
    options |= {"max_length_ratio": 1.0, "max_length_extra": 0}
    list(translator.generate(["red dogs"], prefixes=["rote Hunde rote Hunde"], **options))
    assert said[1] == (
        f"line 1: its prefix has {count} pieces and a translation at most {most}: cut off there"
    )


def test_what_learned_positions_cut_off(tmp_path, monkeypatch):
    """A cut-off prefix is reported, and a missing eos is not looked for beyond the positions."""
    write_random_run(tmp_path / "run", CONFIG.replace(positions="learned", max_length=5))
    translator = Translator.load(tmp_path / "run", devices=jax.devices()[:1])
    said = []
    options = {"prefixes": ["red dogs red dogs"], "beam_size": 1, "warn": said.append}
    found = list(translator.generate(["red"], **options))
    assert said[0].endswith("pieces and a translation at most 5: cut off there")
    ((best,),) = found
    assert len(best.ids) == 5 and not best.finished
    assert translator.align_hypotheses(["red"], found) == [[None]]
    cut_off = BeamResult(np.array([best.ids]), *np.zeros((2, 1)), np.array([5]))
    monkeypatch.setattr(translator.generator, "generate", lambda *_, **__: [cut_off])
    monkeypatch.setattr(module, "token_log_probs", lambda *_: np.zeros((1, 5)))
    monkeypatch.setattr(module, "attention_maps", lambda *_: [np.zeros((2, 1, 3, 5, 5))] * 3)
    explanation = translator.explain("red")
    assert explanation.hypotheses[0].ids == best.ids
    assert explanation.target_tokens == [*best.tokens[:4], "</s>"]


def test_threads_that_come_first_share_what_one_of_them_makes(run, monkeypatch):
    translator = Translator.load(run, devices=jax.devices()[:1])
    made, make = [], module.Generator

    def slowly(*args):
        made.append(args)
        time.sleep(0.2)
        return make(*args)

    monkeypatch.setattr(module, "Generator", slowly)
    with ThreadPoolExecutor(4) as threads:
        shared = set(threads.map(lambda _: translator.generator, range(4)))
    assert len(shared) == len(made) == 1


# ---------------------------------------------------------------------------------------------
# Lines longer than the model
# ---------------------------------------------------------------------------------------------


def test_a_long_line_is_translated_in_parts_with_a_warning(translator, capsys):
    long = " ".join(itertools.islice(itertools.cycle(LEXICON), 70))
    limit = translator.config.max_length - 1
    count = len(translator.source_tokenizer.encode(long))
    assert count > 2 * limit
    translations = greedy(translator, ["red dogs", "old cats", long, "red dogs"], window=2)
    assert capsys.readouterr().err == (
        f"warning: line 3 has {count} pieces, more than the model's {limit}: translated in parts\n"
    )
    assert len(translations) == 4
    assert translations[0] == translations[3] == greedy(translator, ["red dogs"])[0]
    # Each part is translated as a line of its own; joined, they are the line.
    ids = translator.source_tokenizer.encode(long)
    parts = [
        translator.source_tokenizer.decode(p) for p in cut(ids, limit, translator.source_tokenizer)
    ]
    assert " ".join(parts) == long
    warnings = []
    assert " ".join(greedy(translator, parts, warn=warnings.append)) == translations[2]
    assert warnings == []
    for options in ({}, {"max_length_ratio": 0.1, "max_length_extra": 0}):  # complete; cut off
        ((whole,),) = translator.generate([long], beam_size=1, warn=warnings.append, **options)
        each = [part for (part,) in translator.generate(parts, beam_size=1, **options)]
        assert whole.log_prob == pytest.approx(sum(part.log_prob for part in each))
        assert whole.finished == all(part.finished for part in each)
        assert whole.ids == [token for part in each for token in part.ids]


def test_a_prefix_is_of_the_first_part_and_no_member_gets_more_than_it_takes(
    translator, monkeypatch
):
    smaller = translator.config.replace(max_length=8)
    pair = Translator(
        translator.config,
        translator.params,
        translator.source_tokenizer,
        translator.target_tokenizer,
        others=[(smaller, translator.params)],
    )
    given = {}

    def generate(sources, options, *, prefixes, **others):
        given.update(sources=sources, prefixes=prefixes)
        return [BeamResult(*np.zeros((4, 0, 0)))] * len(sources)

    monkeypatch.setattr(pair.generator, "generate", generate)
    long = " ".join(itertools.islice(itertools.cycle(LEXICON), 70))
    list(pair.generate(["red", long], prefixes=["", "rote"], warn=lambda _: None))
    assert max(map(len, given["sources"])) == 8
    assert len(given["prefixes"]) == len(given["sources"]) > 10
    rote = translator.target_tokenizer.encode("rote")
    assert given["prefixes"] == [[], rote, *[[]] * (len(given["sources"]) - 2)]


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def test_the_same_shapes_compile_nothing_again(translator):
    expected = greedy(translator, SENTENCES[:5])
    with count_compiles() as compiled:
        assert greedy(translator, SENTENCES[4::-1]) == expected[::-1]
    assert compiled == []


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


def test_options_reach_the_search(translator, monkeypatch):
    searched = []

    def generate(sources, options, **given):
        searched.append(options)
        return []

    monkeypatch.setattr(translator.generator, "generate", generate)
    translator.translate([""])
    translator.translate([""], beam_size=7, length_penalty=1.0, length_penalty_form="power")
    assert searched == [
        GenerationConfig(n_best=1),
        GenerationConfig(beam_size=7, n_best=1, length_penalty=1.0, length_penalty_form="power"),
    ]


def test_n_best(translator):
    for hypotheses in translator.generate(SENTENCES[:3], beam_size=3, n_best=2, batch_tokens=128):
        assert len(hypotheses) == 2
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == 2
        for text, score, log_prob, tokens, *_ in hypotheses:
            assert text == "".join(tokens).replace("▁", " ").strip()
            length = len(tokens) + 1
            assert score == pytest.approx(log_prob / ((5 + length) / 6) ** 0.6, rel=1e-5)
    (empty,) = translator.generate([""])
    assert [(h.text, h.score, h.log_prob, h.tokens) for h in empty] == [("", 0.0, 0.0, [])]


def test_prefixes(translator):
    expected = greedy(translator, SENTENCES[:2])
    prefixes = ["", greedy(translator, [SENTENCES[5]])[0].split()[0]]
    found = greedy(translator, SENTENCES[:2], prefixes=prefixes)
    assert found[0] == expected[0]
    assert found[1].startswith(prefixes[1]) and found[1] != expected[1]
    with pytest.raises(UserError, match="there is no prefix 2: give one prefix or seed per line"):
        greedy(translator, SENTENCES[:2], prefixes=["a"])
    with pytest.raises(UserError, match="there is no line 2"):
        greedy(translator, SENTENCES[:1], prefixes=["a", "b"])


@pytest.mark.parametrize("seed", [0, 3_000_000_000])
def test_any_seed_draws(translator, seed):
    options = {"beam_size": 1, "sampling": True, "batch_tokens": 128}
    assert len(translator.translate(SENTENCES[:1], seed=seed, **options)) == 1


def test_noise_of_any_number_of_lines_is_one_program(translator, monkeypatch):
    given = []

    def spy(self, sources, options, *, keys, **_):
        given.append(keys)
        raise UserError("seen")

    monkeypatch.setattr(Generator, "generate", spy)
    for number in (3, 7):
        with count_compiles() as compiled, pytest.raises(UserError, match="seen"):
            translator.translate(["red dogs"] * number, sampling=True)
    assert compiled == []
    assert len(np.unique(given[1], axis=0)) == 7
    np.testing.assert_array_equal(given[0], given[1][:3])


def test_encodings_of_many_lengths_are_one_program(translator):
    longest = translator._positional_encoding(30)
    with count_compiles() as compiled:
        shorter = translator._positional_encoding(17)
    assert compiled == []
    np.testing.assert_array_equal(shorter, longest[:17])


def test_one_string_is_no_list(translator):
    for call in (
        lambda: translator.translate("red dogs"),
        lambda: translator.translate(SENTENCES[:1], prefixes="a"),
        lambda: translator.score("red dogs", ["rot"]),
        lambda: translator.align(["red dogs"], "rot"),
    ):
        with pytest.raises(UserError, match=r"one string was given .*: put it into a list"):
            call()


def test_parameters_are_where_it_translates(run):
    device = jax.devices()[3]
    translator = Translator.load(run, devices=[device])
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(translator.params))
    (score,) = translator.score(["red dogs"], ["rot"])
    assert np.isfinite(score.log_prob)


def test_the_attention_kernel_is_the_machines_own(translator, monkeypatch):
    def kernel(written):
        config = translator.config.replace(flash_attention=written)
        tokenizers = translator.source_tokenizer, translator.target_tokenizer
        return Translator(config, translator.params, *tokenizers).config.flash_attention

    assert [kernel("cudnn"), kernel("auto"), kernel("none")] == ["auto", "auto", "none"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernel("auto") == "none"  # for the CPU, though the machine has another device


def test_samples_depend_on_seed_and_line_alone(translator):
    def draw(lines, seed):
        return translator.translate(
            lines, beam_size=1, sampling=True, temperature=2.0, batch_tokens=128, seed=seed
        )

    together = draw(SENTENCES, seed=1)
    assert draw([*SENTENCES[:4], "red dogs"], seed=1)[:4] == together[:4]
    assert draw(SENTENCES, seed=2) != together
    seeds = [7, 1, 2**32 - 1, 7, 0]
    alone = [draw([line], seed)[0] for line, seed in zip(SENTENCES, seeds, strict=False)]
    assert draw(SENTENCES[:5], iter(seeds)) == alone


# ---------------------------------------------------------------------------------------------
# Scores and alignments of given translations
# ---------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_search(translator):
    found = [line[0] for line in translator.generate(SENTENCES, beam_size=2, batch_tokens=128)]
    scores = translator.score(SENTENCES, [hypothesis.text for hypothesis in found])
    compared = 0
    for hypothesis, score in zip(found, scores, strict=True):
        assert score.log_prob == pytest.approx(sum(score.token_log_probs), rel=1e-5)
        assert len(score.tokens) == len(score.token_log_probs)
        if score.tokens[:-1] == hypothesis.tokens:  # the text may be cut into other pieces
            assert score.log_prob == pytest.approx(hypothesis.log_prob, rel=1e-4)
            compared += 1
    assert compared > len(SENTENCES) // 2
    wrong = translator.score(SENTENCES, list(reversed([hypothesis.text for hypothesis in found])))
    assert sum(score.log_prob for score in wrong) < sum(score.log_prob for score in scores)


def test_alignments(translator):
    targets = greedy(translator, SENTENCES)
    for source, target, alignment in zip(
        SENTENCES, targets, translator.align(SENTENCES, targets), strict=True
    ):
        shape = len(alignment.target_tokens), len(alignment.source_tokens)
        assert alignment.weights.shape == shape
        np.testing.assert_allclose(alignment.weights.sum(1), 1.0, rtol=1e-5)
        words = alignment.word_links()
        assert [t for _, t in words] == list(range(len(target.split())))
        assert all(0 <= s < len(source.split()) for s, _ in words)


def test_hypotheses_are_aligned_by_their_own_pieces(translator, monkeypatch):
    lines = [*SENTENCES[:8], ""]
    found = list(translator.generate(lines, beam_size=2, batch_tokens=128))
    aligned = translator.align_hypotheses(lines, found)
    for hypotheses, alignments in zip(found, aligned, strict=True):
        for hypothesis, alignment in zip(hypotheses, alignments, strict=True):
            assert alignment.target_tokens == [*hypothesis.tokens, "</s>"]
            assert translator.target_tokenizer.pieces(hypothesis.ids) == hypothesis.tokens
            assert hypothesis.finished
    short = translator.config.replace(max_length=3)
    monkeypatch.setattr(translator, "_configs", (short,))
    assert translator.align_hypotheses(lines[:1], found[:1]) == [[None, None]]


def test_learned_positions_reach_to_the_longest_line(tmp_path):
    config = CONFIG.replace(positions="learned", max_length=11)  # no multiple of batches' lengths
    write_random_run(tmp_path, config)
    translator = Translator.load(tmp_path, devices=jax.devices()[:1])
    tokenizer = translator.source_tokenizer
    line = tokenizer.decode(tokenizer.encode(" ".join(SENTENCES))[:10])
    assert len(tokenizer.encode(line)) == 10
    for few_shapes in (False, True):
        assert len(greedy(translator, [line], few_shapes=few_shapes)) == 1
    (score,) = translator.score([line], [line])
    assert len(score.tokens) == 11
    with pytest.raises(
        UserError, match=r"source line 7 has \d+ pieces, the model has 11 positions"
    ):
        translator.score([line + " a"], [line], first_line=7)


def test_words_are_aligned_by_the_sum_of_their_pieces():
    alignment = module.Alignment(
        ["▁a", "b", "▁c", "</s>"],
        ["▁x", "▁y", "z", "</s>"],
        np.array([[0.2, 0.3, 0.4, 0.1], [0, 0, 0.3, 0.7], [0.2, 0, 0.1, 0.7], [0, 0, 0, 1]]),
    )
    assert alignment.word_links() == [(0, 0), (1, 1)]
    assert module.Alignment(["</s>"], ["▁x", "</s>"], np.ones((2, 1))).word_links() == []


def test_pairs_are_needed(translator):
    with pytest.raises(UserError, match="2 sources but 1 targets: give pairs"):
        translator.score(["a", "b"], ["c"])


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def test_checkpoints_by_name_and_step(run, translator):
    def same(checkpoint):
        params = Translator.load(run, checkpoint).params
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, params, translator.params)))

    assert same("average") and not same(150) and not same("last")


def test_an_ensemble_of_checkpoints_and_runs(run, translator, monkeypatch):
    one = jax.devices()[:1]
    alone = Translator.load(run, "average", devices=one)
    twice = Translator.load([run, run], "average", devices=one)
    assert greedy(twice, SENTENCES[:4]) == greedy(alone, SENTENCES[:4])
    several = Translator.load(run, ["average", "last"], devices=one)
    assert several._configs == (translator.config,) * 2
    (mixed,), (average,), (last,) = (
        member.score(SENTENCES[:1], SENTENCES[1:2])
        for member in (several, alone, Translator.load(run, "last", devices=one))
    )
    mean = np.logaddexp(average.token_log_probs, last.token_log_probs) - np.log(2)
    np.testing.assert_allclose(mixed.token_log_probs, mean, rtol=1e-4)

    # An explanation has the same for a translation found, with the first model's attention.
    ids = np.array([several.target_tokenizer.encode(SENTENCES[1])])
    found = BeamResult(ids, *np.zeros((2, 1)), np.array([ids.size]))
    monkeypatch.setattr(Translator, "_search", lambda *_: [found])
    size = several.config.max_length
    monkeypatch.setattr(module, "attention_maps", lambda *_: np.zeros((3, 1, 1, 1, size, size)))
    explained = several.explain(SENTENCES[0])
    np.testing.assert_allclose(explained.token_log_probs, mixed.token_log_probs, rtol=1e-4)


def test_an_ensemble_needs_one_vocabulary(run, tmp_path):
    write_random_run(tmp_path / "other", CONFIG)
    with pytest.raises(UserError, match=r"has other tokenizers than .*: an ensemble"):
        Translator.load([run, tmp_path / "other"])


def test_only_config_tokenizer_and_checkpoints_are_needed(run, translator, tmp_path):
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(run / name, tmp_path)
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    moved = Translator.load(tmp_path, devices=jax.devices()[:1])
    assert greedy(moved, SENTENCES[:2]) == greedy(translator, SENTENCES[:2])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_ff", 48, r"feed_forward/\w+/\w+ is float32\[1,\w+.* there and float32\[1,.*48.* here"),
        ("decoder_layers", 2, r"decoder/layers/.* is float32\[1,.* there and float32\[2,.* here"),
        ("output_bias", True, r"output_bias is missing there and float32\[100\] here"),
    ],
)
def test_a_configuration_of_another_model_is_refused(run, tmp_path, field, value, message):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"][field] = value
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"average is of another configuration: .*{message}"):
        Translator.load(tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    shutil.copy(run / "tokenizer.model", tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["model"]["vocab_size"] = 70
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer has 100 pieces and the model 70: copy"):
        Translator.load(tmp_path)


def test_a_dtype_that_is_none_is_refused(run, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(UserError, match="dtype is 'float8': choose one of float32, bfloat16, int8"):
        Translator.load(run, dtype="float8")


def test_the_same_pieces_in_another_order_are_another_tokenizer(translator):
    tokenizer = translator.source_tokenizer
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    one, other = (
        VocabularyTokenizer(tokenizer.model, [*pieces[:4], *rest])
        for rest in (pieces[4:], pieces[:3:-1])
    )
    assert loading._differ(one, other) and not loading._differ(one, one)
