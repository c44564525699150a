"""Loss and scores of a trained run, compared with the same computed by hand."""

import errno
import math
import os
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.checkpoints import load_params
from jaxformer.errors import UserError
from jaxformer.files import write_lines
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from small_run import LEXICON, small_config, trained_run
from train.config import EvaluateConfig
from train.data.corpus import encode_corpus
from train.data.sources import load_split
from train.evaluate import LossEvaluator, evaluate_run, make_translate
from train.metrics import read_metrics
from train.parallel import DataParallel
from train.scores import score


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory)


def record(run, split):
    return [record for record in read_metrics(run) if record["split"] == split][-1]


def test_every_pair_counts_once_however_long_it_is(run, tmp_path):
    """Rows of 16 positions are too short for some pairs, and the last batch is not full."""
    words = list(LEXICON)
    sources = [" ".join((words * 3)[:length]) for length in range(1, 30)] + ["", "red"]
    targets = [" ".join(LEXICON[word] for word in source.split()) for source in sources]
    targets[3] = ""
    for language, lines in (("en", sources), ("de", targets)):
        (tmp_path / f"all.{language}").write_text("".join(f"{line}\n" for line in lines))
    translator = Translator.load(run)
    tokenizer, params = translator.source_tokenizer, translator.params
    model = Transformer(translator.config.replace(dropout=0.5, label_smoothing=0.2))
    pairs = load_split(small_config(tmp_path, data__test=("all",)).data, "test")
    corpus = encode_corpus(pairs, tokenizer, tokenizer, tmp_path)
    evaluator = LossEvaluator(
        model,
        corpus,
        source_length=16,
        target_length=16,
        rows_per_batch=jax.device_count(),
        runner=DataParallel(),
    )

    # One pair per row, no packing, and log-probabilities of the whole vocabulary.
    source_ids, labels = (
        np.array([np.pad([*tokenizer.encode(line), 2], (0, 64))[:64] for line in lines])
        for lines in (sources, targets)
    )
    inputs = np.concatenate([np.ones_like(labels[:, :1]), labels[:, :-1]], axis=1)
    inputs = np.where(labels > 0, inputs, 0)
    logits = jax.jit(model.apply)({"params": params}, jnp.array(source_ids), jnp.array(inputs))
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    real = labels > 0
    nll = -np.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0][real].mean()
    loss = 0.8 * nll - 0.2 * log_probs.mean(axis=-1)[real].mean()

    losses = evaluator(params)
    assert losses["nll"] == pytest.approx(nll, rel=1e-5)
    assert losses["loss"] == pytest.approx(loss, rel=1e-5)
    assert losses["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert abs(losses["loss"] - losses["nll"]) > 0.01


def test_one_long_sentence_makes_batches_smaller_instead_of_larger(run, tmp_path):
    (tmp_path / "long.en").write_text("red\n" * 2000 + "red " * 63 + "\n")
    (tmp_path / "long.de").write_text("rot\n" * 2001)
    translator = Translator.load(run)
    pairs = load_split(small_config(tmp_path, data__test=("long",)).data, "test")
    corpus = encode_corpus(
        pairs, translator.source_tokenizer, translator.target_tokenizer, tmp_path
    )
    assert corpus.source.lengths.max() == 64
    for rows_per_batch, rows in ((64, 8), (16 * 16, 16), (16 * 64, 64)):
        evaluator = LossEvaluator(
            Transformer(translator.config),
            corpus,
            source_length=16,
            target_length=16,
            rows_per_batch=rows_per_batch,
            runner=DataParallel(),
        )
        assert evaluator._batches.rows_per_batch == rows


def test_a_sentence_that_would_fill_all_memory_is_refused(run, tmp_path):
    (tmp_path / "huge.en").write_text("red\n" + "red " * 10_000 + "\n")
    (tmp_path / "huge.de").write_text("rot\n" * 2)
    files = str(tmp_path / "huge.en"), str(tmp_path / "huge.de")
    with pytest.raises(UserError, match=r"sentence 2 of .* has 10,001 tokens, more than 10,000"):
        evaluate_run(run, files=files)


def test_what_is_scored_must_be_one_thing_that_is_there(run, monkeypatch):
    with pytest.raises(UserError, match="a split and two files are given: give one or the other"):
        evaluate_run(run, split="train", files=("a", "b"))
    sections = {"data": small_config(run, data__test=()).data, "evaluate": EvaluateConfig()}
    monkeypatch.setattr("train.evaluate.read_section", lambda _, name: sections[name])
    with pytest.raises(UserError, match="has no test split: give --split validation, or --source"):
        evaluate_run(run)


def test_a_run_scores_afterwards_as_it_did_in_training(run):
    at_150, _ = evaluate_run(str(run), split="validation", checkpoint="150", beam_size=1)
    validation = record(run, "validation")
    assert validation["step"] == 150
    for name in ("loss", "nll", "perplexity"):
        assert at_150[name] == pytest.approx(validation[name], rel=1e-4)
    for name in ("bleu", "chrf", "exact_match", "bleu_signature", "chrf_signature"):
        assert at_150[name] == validation[name]
    averaged, _ = evaluate_run(str(run))
    for name in ("bleu", "chrf", "exact_match"):
        assert averaged[name] == record(run, "final_test")[name]
    parts = [load_params(run, step) for step in (100, 150)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), load_params(run, None), mean
    )


def test_settings_may_differ_from_the_runs(run):
    values, hypotheses = evaluate_run(str(run), beam_size=1, bleu_tokenize="char")
    assert "tok:char" in values["bleu_signature"]
    references = (run.parent / "test.de").read_text().splitlines()
    by_hand = score(hypotheses, references, bleu_tokenize="char")
    assert values["bleu"] == by_hand.bleu.value
    assert values["chrf"] == by_hand.chrf.value
    with pytest.raises(UserError, match=r"evaluate\.beam_size is 0: give at least 1"):
        evaluate_run(str(run), beam_size=0)


def test_the_dtype_may_differ_from_the_runs(run):
    whole, _ = evaluate_run(str(run), beam_size=1)
    half, _ = evaluate_run(str(run), beam_size=1, dtype="bfloat16")
    assert half["loss"] == pytest.approx(whole["loss"], rel=0.02)
    assert half["loss"] != whole["loss"]
    eighth, _ = evaluate_run(str(run), beam_size=1, dtype="int8")
    assert "loss" not in eighth and eighth["chrf"] == pytest.approx(whole["chrf"], abs=10)


def test_files_need_no_data_of_the_run(run, tmp_path):
    for name in ("src", "ref"):
        (tmp_path / f"{name}.txt").write_text("red dogs\n\n")
    files = (str(tmp_path / "src.txt"), str(tmp_path / "ref.txt"))
    values, _ = evaluate_run(str(run), files=files, beam_size=1)
    # The empty line is translated and scored too.
    assert values["exact_match"] == 0.5


def test_translations_stand_beside_the_scores_where_both_are_printed(tmp_path, monkeypatch):
    """As with `--output /dev/stdout > log`: writing in place would start at the top of the log."""
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        print("before")
        write_lines(log, ["집에", "b"])
        print("after")
    assert log.read_text(encoding="utf-8") == "before\n집에\nb\nafter\n"


def test_lines_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    output = tmp_path / "out.txt"
    output.write_text("before\n")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*out.txt: No space left on device"):
        write_lines(output, ["a", "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    assert output.read_text() == "before\n"


def test_exact_match():
    quality = score(["a b", "c", "", "d "], ["a b", "C", "", "d"])
    assert quality.exact_match == 0.5
    assert "exact match 50.0%" in str(quality)


def test_translations_are_searched_for_as_configured():
    translator = SimpleNamespace(translate=lambda lines, **options: options)
    config = EvaluateConfig(length_penalty=1.3, length_penalty_form="power")
    options = make_translate(translator, config, beam_size=3)([])
    expected = {"beam_size": 3, "length_penalty": 1.3, "length_penalty_form": "power"}
    assert {name: options[name] for name in expected if name in options} == expected
