"""`python -m train`: every wrong input ends in one clear line and status 1."""

import errno
import json
import os
import shutil
import sys
import threading

import jax
import pytest

from jaxformer.errors import UserError
from jaxformer.files import write_lines
from jaxformer.run_directory import load_tokenizers, write_config
from random_run import CONFIG, write_random_run
from small_run import small_config, trained_run, write_corpus
from train import cli
from train.arguments import config_names, load_config, override
from train.cli import main
from train.config import TrainConfig, flatten
from train.hosts import ProcessLost
from train.loop import fit
from train.preemption import Preempted
from train.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory)


def error_of(capsys, *arguments):
    """Run the command line, which must fail, and return its one line of explanation."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_loads_and_survives_json(name):
    config = load_config(name)
    assert config.run == f"runs/{name}"
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_reach_every_section():
    arguments = "--steps 7 --model.d-model 64 --data.train a.en a.de --optimizer.clip_norm=1.5"
    arguments += " --model.remat True --evaluate.metric loss"
    config = override(load_config("multi30k"), arguments.split(), "prog")
    assert (config.steps, config.model.d_model, config.model.remat) == (7, 64, True)
    assert config.data.train == ("a.en", "a.de")
    assert (config.optimizer.clip_norm, config.evaluate.metric) == (1.5, "loss")


def test_help_lists_every_field_with_its_value(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "multi30k", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, value in flatten(load_config("multi30k")).items():
        flag = "--" + name.replace("_", "-")
        assert flag in text, name
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert f"(default: {value})" in " ".join(text.split()), name


@pytest.mark.parametrize(
    ("joined", "status", "leaves"),
    [
        (False, 0, "when Python does"),
        (False, 1, "when Python does"),
        (False, 130, "at once"),
        (False, 143, "at once"),
        (True, 0, "when Python does"),
        (True, 1, "soon"),
        (True, 75, "at once"),
        (True, 130, "at once"),
        (True, 143, "when Python does"),
    ],
)
def test_when_a_process_leaves(monkeypatch, joined, status, leaves):
    class Left(Exception):
        pass

    def leave(status):
        raise Left(status)

    timers = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: joined)
    monkeypatch.setattr(cli, "begin_program", lambda: None)
    monkeypatch.setattr(cli, "main", lambda: status)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading.Timer, "start", lambda timer: timers.append(timer))
    with pytest.raises(Left if leaves == "at once" else SystemExit) as left:
        cli.command()
    assert left.value.args == (status,)
    assert [timer.daemon for timer in timers] == [True] * (leaves == "soon")


def test_help_ends_on_the_narrowest_of_terminals(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        main(["fit", "quickstart", "--help"])
    assert "--steps" in capsys.readouterr().out


HOSTS = (
    "--distributed True --parallel.coordinator a:1 --parallel.processes 2 --parallel.process 1"
).split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "multi3k"], "did you mean multi30k?"),
        (["fit"], "give a CONFIG: "),
        (["fit", "multi30k", "--model.droput", "0.1"], "did you mean --model.dropout?"),
        (["fit", "multi30k", "--model.dropout", "abc"], "could not convert string to float: 'abc'"),
        (["fit", "multi30k", "--model.dropout", "1.5"], "TransformerConfig.dropout is 1.5"),
        (["fit", "multi30k", "--model.num-heads", "3"], "give a divisor of d_model=128"),
        (["fit", "multi30k", "--model.norm", "both"], "'post', 'pre'"),
        (["fit", "multi30k", "--steps"], "Missing value for argument '--steps'"),
        (["fit", "--steps", "5", "quickstart"], "no configuration '5': choose multi30k"),
        (["plan", "quickstart", "--topolgy", "v5e:2x2"], "did you mean --topology?"),
        (["benchmark", "train", "tiny", "--bach", "2"], "no field --bach: did you mean --batch?"),
        (["benchmark", "forward", "tiny", "--corpus"], "train benchmark forward --help its own"),
        (["fit", "multi30k", "--optimizer.clip-norm", "nan"], "clip_norm is nan: give at least 0"),
        (
            ["fit", "multi30k", "--steps", "300", "--optimizer.cooldown-steps", "1000"],
            "cooldown_steps is 1000 and steps is 300: give at most 300",
        ),
        (["fit", "multi30k", "--evaluate.length-penalty", "nan"], "length_penalty is nan: give"),
        (["fit", "multi30k", "--optimizer.peak-learning-rate", "nan"], "give more than 0"),
        (["fit", "multi30k", "--evaluate.bleu-tokenize", "13b"], "has no tokenizer '13b'"),
        (["fit", "multi30k", "--steps", "0"], "steps is 0: give at least 1"),
        (["fit", "multi30k", "--checkpoint.average", "99"], "raise checkpoint.keep_last"),
        (["fit", "multi30k", "--data.path", "/no/such"], "there is no folder /no/such"),
        (["fit", "multi30k", "--data.batch-tokens", "0"], "data.batch_tokens is 0: give at least"),
        (["fit", "multi30k", "--data.weights", "1", "2"], "2 numbers for 1 training corpora"),
        (["fit", "multi30k", "--data.extra", "bt", "--data.weights", "1"], "1 numbers for 2"),
        (
            ["fit", "multi30k", "--data.subword-dropout", "1"],
            "subword_dropout is 1.0: give 0 up to",
        ),
        (
            ["fit", "multi30k", "--data.subword-dropout", ".1", "--data.tokenizer-type", "unigram"],
            "which merges nothing: set it to 'bpe'",
        ),
        (["fit", "multi30k", "--data.segmentations", "0"], "segmentations is 0: give at least 1"),
        (["fit", "multi30k", "--data.weights", "0"], "data.weights are (0.0,): give numbers above"),
        (["fit", "multi30k", "--data.weights", "nan"], "give numbers above 0"),
        (["fit", "multi30k", "--data.weights", "inf"], "give numbers above 0"),
        (["fit", "quickstart", *HOSTS[2:]], "coordinator is given: give --distributed True"),
        (
            ["fit", "quickstart", *HOSTS, "--parallel.coordinator", "host0"],
            "'host0': give HOST:PORT",
        ),
        *(
            (["fit", "quickstart", *HOSTS, "--parallel.coordinator", address], "give HOST:PORT")
            for address in ("a:0", "a:65536", "a:１")
        ),
        (["fit", "quickstart", *HOSTS, "--parallel.process", "2"], "process is 2 of parallel.proc"),
        (["evaluate", "/no/such/run"], "/no/such/run is not a directory"),
        (["evaluate", "run", "--source", "x"], "--source and --reference go together"),
        (["evaluate", "run", "--bogus"], "unknown argument --bogus"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    if arguments == ["fit"]:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    else:
        assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no `config`"),
        ("config = TrainConfig(\n", "line 1"),
        ("import no_such_module\n", "no_such_module"),
    ],
)
def test_wrong_configuration_files(capsys, tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = error_of(capsys, "fit", path)
    assert message in line and "mine.py" in line


def test_a_configuration_file_is_a_program_like_any_other(tmp_path, monkeypatch):
    """It may import modules that lie beside it, and define dataclasses."""
    (tmp_path / "base.py").write_text("steps = 7\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom base import steps\n"
        "from train.config import TrainConfig\n@dataclasses.dataclass\nclass Steps:\n"
        "    number: int = steps\nconfig = TrainConfig(steps=Steps().number, run='~/mine')\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    before = sys.path.copy()
    config = load_config(str(path))
    assert (config.steps, config.run) == (7, str(tmp_path / "mine"))
    assert sys.path == before
    other = shutil.copytree(tmp_path, tmp_path / "other", ignore=lambda *_: ["other"])
    (other / "base.py").write_text("import os\nos.chdir('/')\nsteps = 8\n")
    monkeypatch.chdir(other)
    assert load_config("mine.py").steps == 8  # from the base.py in its own folder
    assert sys.path == before
    with pytest.raises(UserError, match=r"no configuration '~nobody-here/mine\.py'"):
        load_config("~nobody-here/mine.py")


def fit_with(capsys, folder, tmp_path, *overrides):
    common = ["--data.path", folder, "--data.source", "en", "--data.target", "de"]
    common += ["--data.cache-dir", tmp_path / "cache", "--run", tmp_path / "run", "--steps", "1"]
    common += ["--data.train", "train", "--data.validation", "valid", "--data.test", "test"]
    return error_of(capsys, "fit", "multi30k", *common, *overrides)


def test_missing_file(capsys, folder, tmp_path):
    line = fit_with(capsys, folder, tmp_path, "--data.train", "trian")
    assert "trian.en" in line and "train.en" in line


def test_unequal_line_counts(capsys, folder, tmp_path):
    (tmp_path / "short.en").write_text("one\ntwo\n")
    (tmp_path / "short.de").write_text("eins\n")
    line = fit_with(capsys, folder, tmp_path, "--data.train", tmp_path / "short")
    assert "short.en has 2 lines" in line and "short.de has 1" in line


def test_wrong_column(capsys, folder, tmp_path):
    (tmp_path / "pairs.tsv").write_text("english\tgerman\none\teins\n")
    line = fit_with(capsys, folder, tmp_path, "--data.train", tmp_path / "pairs.tsv")
    assert "'en'" in line and "english" in line and "german" in line


def test_invalid_utf8(capsys, folder, tmp_path):
    (tmp_path / "bad.en").write_bytes(b"fine\n\xff\xfe\n")
    (tmp_path / "bad.de").write_text("gut\nschlecht\n")
    assert "bad.en:2" in fit_with(capsys, folder, tmp_path, "--data.train", tmp_path / "bad")


def test_empty_corpus(capsys, folder, tmp_path):
    for name in ("empty.en", "empty.de"):
        (tmp_path / name).write_text("")
    line = fit_with(capsys, folder, tmp_path, "--data.train", tmp_path / "empty")
    assert "holds no sentence pair" in line


def test_extra_corpora_that_cannot_be_mixed_in(capsys, folder, tmp_path):
    line = fit_with(capsys, folder, tmp_path, "--data.extra", "valid", "tset")
    assert "tset.en" in line and "test.en" in line
    for name in ("empty.en", "empty.de"):
        (tmp_path / name).write_text("")
    line = fit_with(capsys, folder, tmp_path, "--data.extra", "valid", tmp_path / "empty")
    assert "data.extra" in line and "empty holds no sentence pair" in line
    assert not (tmp_path / "run").exists()


def test_vocabulary_larger_than_the_corpus_allows(capsys, folder, tmp_path):
    line = fit_with(capsys, folder, tmp_path)  # 10,000 pieces from 200 pairs
    assert "model.vocab_size=10000" in line and "largest possible is" in line


def test_run_directory_of_another_configuration(capsys, folder, run):
    overrides = ["--data.path", folder, "--data.source", "en", "--data.target", "de", "--run", run]
    line = error_of(capsys, "fit", "multi30k", *overrides)
    assert "holds a run with" in line and "another --run" in line


def test_a_run_that_failed_at_its_start_takes_a_mended_configuration(folder, tmp_path):
    once = {"run": str(tmp_path / "run"), "steps": 1, "evaluate__every": 1}
    with pytest.raises(UserError):  # after the tokenizer was learned: no pair fits a row
        fit(small_config(folder, data__target_length=2, **once))
    assert load_tokenizers(tmp_path / "run")[0].vocab_size == 64
    prepare(small_config(folder, model__vocab_size=60, **once))
    assert load_tokenizers(tmp_path / "run")[0].vocab_size == 60


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (Preempted(), 143, ""),
        (ProcessLost("another process has ended"), 75, "error: another process has ended\n"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    ],
)
def test_how_a_run_that_was_stopped_ends(capsys, monkeypatch, end, status, said):
    def fit(config):
        raise end

    monkeypatch.setattr("train.loop.fit", fit)
    assert main(["fit", "quickstart"]) == status
    assert capsys.readouterr().err == said


def test_hosts_that_cannot_be_found(capsys, folder, tmp_path, monkeypatch):
    def initialize(*arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    line = fit_with(capsys, folder, tmp_path, "--distributed", "True")
    assert "cannot join the other processes (coordinator_address should be defined.): " in line


def test_a_device_with_too_little_memory(capsys, folder, tmp_path, monkeypatch):
    def step(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory:\n 9 GiB.")

    monkeypatch.setattr("train.loop._train", step)
    line = fit_with(capsys, folder, tmp_path)
    assert "too little memory on the device: Out of memory: 9 GiB.; lower data.batch_tokens" in line


def test_a_run_that_was_not_trained_here_is_scored_on_files(capsys, folder, tmp_path):
    """As an imported model is, whose config.json has a section that training never writes."""
    run = tmp_path / "imported"
    config = CONFIG.replace(source_vocab_size=60, embeddings="target")
    write_random_run(run, config)
    write_config(run, {"model": config.to_dict(), "marian": {"from": "x"}})
    line = error_of(capsys, "evaluate", run)
    assert "was not trained here and names no data: give --source and --reference" in line
    files = ["--source", str(folder / "test.en"), "--reference", str(folder / "test.de")]
    assert main(["evaluate", str(run), "--beam-size", "1", *files]) == 0
    assert "tok:13a" in capsys.readouterr().out


def test_evaluate_a_split_and_two_files_alike(capsys, run, folder, tmp_path):
    output = tmp_path / "out.txt"
    assert main(["evaluate", str(run), "--beam-size", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "loss" in printed and "BLEU" in printed and "chrF2" in printed
    assert printed.count("nrefs:1|case:mixed") == 2
    assert len(output.read_text().splitlines()) == 20

    arguments = ["evaluate", str(run), "--json", "--beam-size", "1"]
    arguments += ["--source", str(folder / "test.en")]
    assert main([*arguments, "--reference", str(folder / "test.de")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert f"loss {values['loss']:.4f}" in printed
    assert f"BLEU {values['bleu']:.2f}" in printed


def test_evaluate_writes_no_output_where_it_cannot(capsys, run, tmp_path):
    (tmp_path / "file").write_text("")
    line = error_of(capsys, "evaluate", run, "--output", tmp_path / "file" / "out.txt")
    assert "cannot write" in line


def test_a_full_disk_under_standard_output_is_one_line(folder, tmp_path, monkeypatch, capsys):
    def evaluate(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.evaluate.evaluate_run", evaluate)
    monkeypatch.setattr("train.cli.drop_output", lambda: None)
    line = error_of(capsys, "evaluate", str(tmp_path))
    assert line == "error: cannot write standard output: No space left on device"
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["evaluate", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: stdout is closed: connect it to a file")


def test_a_standard_output_without_some_letters(tmp_path, monkeypatch):
    """It shows them escaped, but what `write_lines` writes there is UTF-8."""
    text = "Straße\n"
    with open(tmp_path / "shown", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)

        def evaluate(*_, **__):
            print(text, end="")
            write_lines(tmp_path / "shown", [text.strip()])
            raise UserError("enough")

        monkeypatch.setattr("train.evaluate.evaluate_run", evaluate)
        assert main(["evaluate", str(tmp_path)]) == 1
    assert (tmp_path / "shown").read_bytes() == b"Stra\\xdfe\n" + text.encode()
