"""`jaxformer convert`: which conversion it calls with which options, and what it prints."""

import signal

import pytest

from jaxformer.cli import main
from jaxformer.interop import ctranslate2, marian, stablehlo
from jaxformer.run_directory import write_config
from jaxformer.terminal import signals_as_exit
from random_run import CONFIG, write_random_run

FUNCTIONS = {
    "jaxformer": (marian, "from_marian"),
    "marian": (marian, "to_marian"),
    "ctranslate2": (ctranslate2, "to_ctranslate2"),
    "stablehlo": (stablehlo, "to_stablehlo"),
}


@pytest.fixture
def calls(monkeypatch):
    """The conversions that are asked for; none of them is run."""
    calls = []
    for module, name in FUNCTIONS.values():
        monkeypatch.setattr(
            module, name, lambda *args, name=name, **options: calls.append((name, args, options))
        )
    return calls


@pytest.mark.parametrize(
    ("arguments", "function", "options", "use"),
    [
        ("", "from_marian", {}, "jaxformer translate OUT"),
        ("--to jaxformer", "from_marian", {}, "jaxformer translate OUT"),
        ("--to marian", "to_marian", {}, "transformers.MarianMTModel.from_pretrained('OUT')"),
        ("--to marian --checkpoint best", "to_marian", {"checkpoint": "best"}, "'OUT'"),
        ("--to ctranslate2", "to_ctranslate2", {}, "ctranslate2.Translator('OUT')"),
        (
            "--to ctranslate2 --quantization int8 --checkpoint 7",
            "to_ctranslate2",
            {"quantization": "int8", "checkpoint": "7"},
            "ctranslate2.Translator('OUT')",
        ),
        ("--to stablehlo", "to_stablehlo", {}, "jax.export.deserialize"),
        (
            "--to stablehlo --batch-size 2 --source-length 9 --beam-size 5 --n-best 1 "
            "--length-penalty 1 --early-stopping",
            "to_stablehlo",
            {
                "batch_size": 2,
                "source_length": 9,
                "beam_size": 5,
                "n_best": 1,
                "length_penalty": 1.0,
                "early_stopping": True,
            },
            "jax.export.deserialize",
        ),
    ],
)
def test_options_reach_the_conversion(calls, capsys, arguments, function, options, use):
    assert main(["convert", "IN", "OUT", *arguments.split()]) == 0
    assert calls == [(function, ("IN", "OUT"), options)]
    output, error = capsys.readouterr()
    assert output == ""
    (line,) = error.splitlines()
    assert line.startswith("wrote OUT: ")
    assert use in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--quantization int8",
            "--quantization means nothing to --to jaxformer: leave it out, or use --to ctranslate2",
        ),
        (
            "--checkpoint best",
            "--checkpoint means nothing to --to jaxformer: leave it out, "
            "or use --to marian or ctranslate2 or stablehlo",
        ),
        (
            "--to marian --batch-size 3",
            "--batch-size means nothing to --to marian: leave it out, or use --to stablehlo",
        ),
        (
            "--to ctranslate2 --beam-size 3",
            "--beam-size means nothing to --to ctranslate2: leave it out, or use --to stablehlo",
        ),
        ("--to stablehlo --beam-size 0", "--beam-size is 0: give at least 1"),
        (
            "--to stablehlo --batch-size -3",
            "--batch-size is -3: give at least 1, or leave it out for any number",
        ),
    ],
)
def test_options_that_cannot_be_followed(calls, capsys, arguments, message):
    assert main(["convert", "IN", "OUT", *arguments.split()]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
    assert calls == []


def test_help_shows_every_format_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in FUNCTIONS:
        assert f"--to {name}" in text
    assert "jaxformer convert runs/multi30k multi30k-ct2 --to ctranslate2" in text


def test_no_run_is_one_line(tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    destination = tmp_path / "out"
    assert main(["convert", str(tmp_path / "no"), str(destination), "--to", "ctranslate2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/no is not a directory")
    assert list(tmp_path.iterdir()) == []


def test_a_run_alone_does_not_say_what_it_shall_become(tmp_path, capsys):
    write_config(tmp_path / "run", {"model": CONFIG.to_dict()})
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("config.json is that of a run: choose what to convert it to with --to")
    assert not (tmp_path / "out").exists()


def test_a_run_becomes_a_model_of_ctranslate2(tmp_path, capsys):
    package = pytest.importorskip("ctranslate2")
    write_random_run(tmp_path / "run", CONFIG)
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--to", "ctranslate2"]
    assert main(["convert", *arguments]) == 0
    assert package.contains_model(str(tmp_path / "out"))
    assert main(["convert", *arguments]) == 1
    assert "is not empty: give a new directory" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(tmp_path, monkeypatch, number):
    pytest.importorskip("flatbuffers")
    write_random_run(tmp_path / "run", CONFIG)
    before = signal.getsignal(number)
    written = []

    def told_to_end(directory, *_):
        written.extend(path.name for path in directory.iterdir())
        signal.raise_signal(number)

    monkeypatch.setattr(stablehlo, "export_programs", lambda *_: {})
    monkeypatch.setattr(stablehlo, "save_tokenizers", told_to_end)
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--to", "stablehlo"]
    with pytest.raises(SystemExit) as stop:
        main(["convert", *arguments, "--source-length", "8"])
    assert stop.value.code == 128 + number
    assert written == ["params.npz"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert signal.getsignal(number) is before


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_exit():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
