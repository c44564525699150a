"""`jaxformer translate`: a filter like any other."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxformer.cli import main
from jaxformer.translator import Translator
from small_run import trained_run

ROOT = Path(__file__).parent.parent


class Uppercase:
    """Takes the place of a `Translator`."""

    def __init__(self):
        self.options = {}

    def translate_stream(self, lines, **options):
        self.options = options
        return (line.upper() for line in lines)


@pytest.fixture
def translator(monkeypatch):
    translator = Uppercase()
    loaded = []
    monkeypatch.setattr(Translator, "load", lambda *args: loaded.append(args) or translator)
    translator.loaded = loaded
    return translator


@pytest.fixture
def run_with(monkeypatch, capsysbinary):
    """Run `jaxformer translate RUN …` on some input: exit status, standard output and error."""

    def run_with(text: bytes, *arguments: str):
        # As under LC_ALL=C, where Python itself would read and write no more than ASCII.
        stdin = io.TextIOWrapper(io.BytesIO(text), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)
        status = main(["translate", "RUN", *arguments])
        output, error = capsysbinary.readouterr()
        return status, output, error.decode()

    return run_with


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", b""),
        (b"\n", b"\n"),
        (b"one\n\ntwo\n", b"ONE\n\nTWO\n"),
        (b"one\r\ntwo\r\n", b"ONE\nTWO\n"),
        (b"one\ntwo", b"ONE\nTWO\n"),
        ("a\u2028b\u0085c\x0bd\n".encode(), "A\u2028B\u0085C\x0bD\n".encode()),
        ("집에 é\n".encode(), "집에 É\n".encode()),
    ],
)
def test_one_line_in_one_line_out(translator, run_with, text, expected):
    assert run_with(text) == (0, expected, "")


def test_options(translator, run_with):
    run_with(b"one\n")
    assert translator.options == {
        "beam_size": 4,
        "length_penalty": 0.6,
        "length_penalty_form": "gnmt",
        "batch_tokens": 4096,
    }
    options = "--beam-size 2 --length-penalty 1 --length-penalty-form power --batch-tokens 99"
    run_with(b"one\n", *options.split(), "--checkpoint", "best")
    assert translator.options == {
        "beam_size": 2,
        "length_penalty": 1.0,
        "length_penalty_form": "power",
        "batch_tokens": 99,
    }
    assert translator.loaded == [("RUN", None), ("RUN", "best")]


def test_a_line_that_is_not_utf8_is_named(translator, run_with):
    status, _, error = run_with(b"one\n\ntw\xff\n")
    assert status == 1
    assert error == (
        "error: standard input, line 3: not UTF-8 (byte 0xff); convert it, for example with iconv\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam-size", "0"], "--beam-size is 0: give at least 1"),
        (["--batch-tokens", "-5"], "--batch-tokens is -5: give at least 1"),
        (["--length-penalty", "-1"], "--length-penalty is -1.0: give at least 0"),
    ],
)
def test_impossible_options(translator, run_with, arguments, message):
    assert run_with(b"one\n", *arguments) == (1, b"", f"error: {message}\n")
    assert not translator.loaded, "that could have been said at once"


def test_no_run(run_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_with(b"one\n")
    assert status == 1
    assert error == "error: RUN is not a directory: give the directory of a training run\n"
    Path("RUN").mkdir()
    assert "RUN is not a run directory: it has no config.json" in run_with(b"one\n")[2]


@pytest.mark.parametrize("arguments", [[], ["translate"], ["translate", "RUN", "--beam", "many"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: jaxformer" in capsys.readouterr().err


def test_interrupting_is_no_error_of_the_program(translator, run_with, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(translator, "translate_stream", interrupted)
    status, _, error = run_with(b"one\n")
    assert status == 130
    assert "Traceback" not in error


def test_a_reader_that_leaves_is_no_error(translator, run_with, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        status, _, error = run_with(b"one\n" * 50_000)
        assert status == 141  # as the shell calls a process that SIGPIPE ends
        assert error == ""


def test_the_command_on_a_trained_run(tmp_path_factory, tmp_path):
    """In a process of its own, elsewhere, on one device, with a locale that is not UTF-8."""
    run = trained_run(tmp_path_factory)
    lines = ["red dogs sit here", "", "two\u2028cats run", "집에"]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from jaxformer.cli import main; raise SystemExit(main())",
            *("translate", str(run), "--beam-size", "1"),
        ],
        input="\r\n".join(lines).encode(),
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "LC_ALL": "C"},
        check=False,
    )
    assert (result.returncode, result.stderr.decode()) == (0, "")
    translations = result.stdout.decode().split("\n")
    assert translations[-1] == ""
    assert translations[:-1] == Translator.load(run).translate(lines, beam_size=1)
