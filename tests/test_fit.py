"""A whole run: what it leaves behind, how it goes on, when it stops, and what it refuses."""

import json
import shutil
import time
from types import SimpleNamespace

import datasets
import jax
import numpy as np
import pytest

from jaxformer.checkpoints import checkpoint_steps, evaluations, find_checkpoint, load_params
from jaxformer.errors import UserError
from jaxformer.translator import Translator
from small_run import change, small_config, write_corpus
from train import loop
from train.benchmark.compiles import count_compiles
from train.config import read_train_config
from train.lock import only_trainer
from train.log import Log, examples
from train.loop import _out_of_patience, fit
from train.metrics import read_metrics
from train.report import report_after_training
from train.scores import score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def config(folder):
    """Dropout and accumulation are on: a resumed run must repeat their noise too."""
    return small_config(
        folder, steps=6, evaluate__every=3, model__dropout=0.1, accumulate=2, data__batch_tokens=256
    )


@pytest.fixture(scope="module")
def run_and_programs(config):
    with count_compiles() as programs:
        return fit(config), programs


@pytest.fixture(scope="module")
def run(run_and_programs):
    return run_and_programs[0]


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_run_directory_holds_all_that_is_promised(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "tokenizer.model", "checkpoints", "metrics.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert checkpoint_steps(run) == [3, 6]
    assert find_checkpoint(run).name == "average"


def large(compiled):
    """Programs of more than one operation: no noise keys, rows of 8 devices or fingerprints."""
    small = ("stage", "unstack", "slice", "_threefry_seed", "_threefry_split", "_sum")
    return [name for name in compiled if name not in {f"jit({name})" for name in small}]


def test_a_whole_run_compiles_six_programs(run_and_programs):
    """State, step, loss, parameters as decoding needs them, and two searches, each once."""
    programs = large(run_and_programs[1])
    assert "jit(create_state)" in programs
    assert len(programs) <= 6, programs


def test_its_report_takes_two_more(run):
    """The sentences it translates and their alignments, each at one length: eight in all."""
    with count_compiles() as compiled:
        assert report_after_training(run).startswith("report: ")
    assert len(large(compiled)) <= 2, compiled


def test_metrics_of_both_splits_and_the_final_scores(run):
    records = {(record["split"], record["step"]): record for record in read_metrics(run)}
    train = records["train", 6]
    assert train["loss"] > 0 and train["nll"] > 0
    assert train["perplexity"] == pytest.approx(np.exp(train["nll"]))
    assert 0 <= train["host_wait"] <= 1 and 0 <= train["padding"] < 1
    assert records["start", 0]["jax"] == jax.__version__
    for key in (("validation", 3), ("validation", 6), ("final_validation", 6), ("final_test", 6)):
        assert "tok:13a" in records[key]["bleu_signature"]
    assert records["validation", 6]["loss"] < records["validation", 3]["loss"]


def test_the_average_is_the_mean_of_the_last_checkpoints(run):
    parts = [load_params(run, step) for step in (3, 6)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), load_params(run, "average"), mean
    )


def test_a_run_that_was_stopped_goes_on_bit_for_bit(run, config, folder):
    stopped = change(config, run=str(folder / "stopped"), steps=3)
    fit(stopped)
    with count_compiles() as compiled:
        fit(change(stopped, steps=6))
    assert len(large(compiled)) <= 2, "the step and the loss, and each once"
    assert_equal(load_params(folder / "stopped", 6), load_params(run, 6))
    final = [read_metrics(folder / name)[-1]["chrf"] for name in ("run", "stopped")]
    assert final[0] == final[1]


def test_running_a_finished_run_again_changes_nothing(run, config):
    before = load_params(run, "average")
    fit(config)
    assert_equal(load_params(run, "average"), before)


def test_another_model_in_the_same_directory_is_refused(run, config):
    with pytest.raises(UserError, match=r"model\.d_model=16, not 8: give 16 to go on"):
        fit(change(config, model__d_model=8))


def test_other_text_in_the_same_files_is_refused(run, config, folder):
    other = shutil.copytree(folder, folder / "other", ignore=lambda *_: ["run", "cache"])
    moved = change(config, run=str(shutil.copytree(run, folder / "moved")), data__path=str(other))
    fit(moved)
    (folder / "moved/lengths.json").write_text("{}")
    with pytest.raises(UserError, match=r"lengths\.json is damaged .*: delete it to go on"):
        fit(moved)
    (folder / "moved/lengths.json").unlink()
    fit(moved)
    for name in ("valid", "train"):
        for side in ("en", "de"):
            lines = (other / f"{name}.{side}").read_text().splitlines(keepends=True)
            (other / f"{name}.{side}").write_text("".join(lines[::-1]))
        named = {"valid": "validation"}.get(name, name)
        with pytest.raises(UserError, match=f"has seen other text as data.{named}: give that text"):
            fit(change(moved, evaluate__beam_size=1))
        assert read_train_config(moved.run).evaluate.beam_size == moved.evaluate.beam_size


def test_evaluation_settings_may_change_between_starts(run, config, folder):
    shutil.copytree(run, folder / "greedy")
    fit(change(config, run=str(folder / "greedy"), evaluate__beam_size=1, log_every=1))
    assert read_train_config(folder / "greedy").evaluate.beam_size == 1
    assert_equal(load_params(folder / "greedy", "average"), load_params(run, "average"))


@pytest.mark.slow
def test_separate_vocabularies(folder):
    separate = small_config(
        folder,
        run=str(folder / "separate"),
        steps=1,
        model__embeddings="separate",
        data__joint_vocabulary=False,
        model__vocab_size=40,
    )
    run = fit(separate)
    assert {"tokenizer.source.model", "tokenizer.target.model"} <= {p.name for p in run.iterdir()}
    assert len(Translator.load(run).translate(["red dogs run"])) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(run, config, folder):
    shutil.copytree(run, folder / "nan")
    arrays = load_params(folder / "nan", 6)
    config_file = folder / "nan" / "config.json"
    saved = json.loads(config_file.read_text())
    saved["optimizer"]["peak_learning_rate"] = 1e30
    config_file.write_text(json.dumps(saved))
    hot = change(config, run=str(folder / "nan"), optimizer__peak_learning_rate=1e30)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step ([7-9]|1[0-2]): lower"):
        fit(change(hot, steps=20, evaluate__every=20))
    assert checkpoint_steps(folder / "nan") == [3, 6]
    assert_equal(load_params(folder / "nan", 6), arrays)


def test_neither_is_a_state_saved_whose_validation_loss_is_not_finite(config, folder, monkeypatch):
    nowhere = {"loss": float("nan"), "nll": 1.0, "perplexity": 2.0}
    monkeypatch.setattr("train.loop.LossEvaluator.__call__", lambda self, params: nowhere)
    with pytest.raises(UserError, match=r"the validation loss is nan at step 3: lower"):
        fit(change(config, run=str(folder / "unsound")))
    assert checkpoint_steps(folder / "unsound") == []


def test_what_has_failed_is_not_saved_at_sigterm(config, folder, monkeypatch):
    hot = change(config, run=str(folder / "failed"), optimizer__peak_learning_rate=1e30)
    monkeypatch.setattr("train.loop.Preemption.reached", lambda self, step: step == 8)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step [1-8]: lower"):
        fit(change(hot, steps=12, log_every=12, evaluate__every=12))
    assert checkpoint_steps(folder / "failed") == []


@pytest.mark.slow
def test_a_run_whose_rate_falls_keeps_its_end(folder):
    config = small_config(
        folder,
        run=str(folder / "falling"),
        steps=4,
        evaluate__every=1,
        optimizer__cooldown_steps=2,
        data__test=(),
    )
    fit(config)
    with pytest.raises(UserError, match=r"since step 2 its learning rate falls towards that"):
        fit(change(config, steps=6))


@pytest.mark.slow
def test_more_devices_than_rows(folder):
    """One row of 16 positions: seven of eight devices have only an empty row."""
    few = small_config(folder, run=str(folder / "few"), steps=1, data__batch_tokens=16, log_every=1)
    fit(change(few, data__test=()))
    (record,) = (record for record in read_metrics(folder / "few") if record["split"] == "train")
    assert record["loss"] > 0 and 8 <= record["target_tokens"] <= 16
    assert record["padding"] == 1 - record["target_tokens"] / (8 * 16)


def test_two_processes_do_not_train_in_one_directory(run, config):
    before = (run / "metrics.jsonl").read_bytes()
    with only_trainer(run), pytest.raises(UserError, match=r"another process trains in .*--run"):
        fit(config)
    assert (run / "metrics.jsonl").read_bytes() == before
    with only_trainer(run):
        pass


def test_missing_data_leaves_no_directory_behind(folder):
    with pytest.raises(UserError, match=r"no file .*trian"):
        fit(small_config(folder, run=str(folder / "none"), data__train=("trian",)))
    assert not (folder / "none").exists()


def test_long_sentences_are_told_once_an_evaluation(folder, monkeypatch, capsys):
    def make_translate(*_, beam_size):
        def translate(lines, warn):
            for number in (2, 3):
                warn(f"line {number} has too many pieces")
            return lines

        return translate

    monkeypatch.setattr(loop, "Translator", lambda *_: None)
    monkeypatch.setattr(loop, "make_translate", make_translate)
    pairs = {"source": ["a", "b c d"], "target": ["a", "b"]}
    pairs = {name: datasets.Dataset.from_dict(pairs) for name in ("validation", "test")}
    data = SimpleNamespace(pairs=pairs, source_tokenizer=None, target_tokenizer=None)
    scored = loop._evaluate(small_config(folder), data, {}, list(pairs), beam_size=1)
    assert [quality.exact_match for quality, _ in scored.values()] == [0.5, 0.5]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 of the 4 sentences of validation and test are longer")


def test_a_run_directory_that_cannot_be_written(folder):
    (folder / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*file.*choose another run directory"):
        fit(small_config(folder, run=str(folder / "file" / "run")))


def test_learned_positions_must_reach_the_end_of_every_sentence(folder):
    with pytest.raises(UserError, match=r"model\.max_length is 3 learned positions"):
        fit(
            small_config(
                folder,
                run=str(folder / "learned"),
                model__positions="learned",
                model__max_length=3,
            )
        )


@pytest.mark.parametrize(
    ("history", "metric", "patience", "expected"),
    [
        ([30.0, 31.0, 30.5], "bleu", 2, False),  # 31.0 beat 30.0 within the last two
        ([31.0, 30.0, 31.0], "bleu", 2, True),  # equal is not better
        ([2.0, 1.9, 1.95, 1.91], "loss", 2, True),
        ([2.0, 1.9, 1.95, 1.89], "loss", 2, False),
        ([2.0, 1.9], "loss", 2, False),  # too early to tell
        ([1.0, 2.0, 3.0], "loss", 0, False),  # 0: never stop
    ],
)
def test_patience(history, metric, patience, expected):
    assert _out_of_patience(history, metric, patience) is expected


@pytest.mark.slow
def test_early_stopping_also_holds_when_the_run_is_started_again(
    config, folder, monkeypatch, capsys
):
    quality = score(["a b c d"], ["a b c d"])  # the same at every step

    def evaluate(config, data, params, splits, beam_size):
        return {split: (quality, data.pairs[split]["target"][:]) for split in splits}

    monkeypatch.setattr("train.loop._evaluate", evaluate)
    stopping = change(
        config,
        run=str(folder / "patience"),
        steps=30,
        evaluate__every=1,
        evaluate__patience=2,
        evaluate__metric="chrf",
    )
    fit(stopping)
    steps = checkpoint_steps(folder / "patience")
    assert steps[-1] == 3
    capsys.readouterr()
    fit(stopping)
    assert "no better chrf in 2 evaluations: stopping" in capsys.readouterr().out
    assert checkpoint_steps(folder / "patience") == steps


def test_the_last_are_averaged_and_the_best_is_the_greatest(folder):
    steps = {"steps": 3, "evaluate__every": 1, "checkpoint__keep_last": 3}
    config = small_config(folder, run=str(folder / "three"), **steps)
    run = fit(config)
    info = run / "checkpoints/average/info/metadata"
    assert json.loads(info.read_text())["steps"] == [2, 3]
    assert {(record["metric"], record["mode"]) for record in evaluations(run).values()} == {
        ("bleu", "max")
    }
    first = load_params(run, 1)
    fit(change(config, checkpoint__average=1))
    assert find_checkpoint(run).name != "average"
    other = fit(small_config(folder, run=str(folder / "seed"), steps=1, seed=1))
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, load_params(other, 1))
    assert any(jax.tree.leaves(differ))


def test_a_report_weighs_each_step_by_its_tokens(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    written = {}
    writer = SimpleNamespace(write=lambda step, split, values: written.update(values))
    progress = SimpleNamespace(update=lambda step, values: None)
    batches = SimpleNamespace(epochs=lambda steps: steps / 10, target_length=8)
    log = Log(writer, progress, batches, rows_per_step=5)

    def steps():
        nonlocal now
        for loss, tokens, rate in ((1.0, 10.0, 0.1), (3.0, 30.0, 0.2)):
            now += 1.0  # waiting for a batch
            step = {"loss": loss, "nll": loss / 2, "tokens": tokens}
            yield step | {"gradient_norm": loss, "learning_rate": rate}

    for step in log.timed(steps()):
        now += 3.0
        log.add(step)
    log.flush(2)
    assert (written["loss"], written["nll"], written["gradient_norm"]) == (2.5, 1.25, 2.0)
    assert (written["padding"], written["epoch"], written["learning_rate"]) == (0.5, 0.2, 0.2)
    assert written["host_wait"] == 2.0 / 8.0
    assert written["compile_seconds"] == 8.0 and "tokens_per_second" not in written
    now += 4.0
    log.add(step)
    written.clear()
    log.flush(3)
    assert written["tokens_per_second"] == 30.0 / 4.0 and "compile_seconds" not in written
    assert written["host_wait"] == 0.0
    for loss in (1.0, float("nan")):
        log.add(step | {"loss": loss})
    with pytest.raises(UserError, match="the loss is nan at step 5: lower"):
        log.flush(5)


def test_examples_are_evenly_spread_and_say_what_is_whose():
    sides = ([f"{side}{number}" for number in range(11)] for side in "sor")
    shown = list(examples(*sides))
    assert shown == [
        f"\nsource     s{i}\noutput     o{i}\nreference  r{i}" for i in range(0, 10, 2)
    ]
