"""`jaxformer translate`, a filter like any other, and `jaxformer score`."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxformer.cli as module
from jaxformer.cli import main
from jaxformer.compilation import keep_compiled_programs
from jaxformer.errors import UserError
from jaxformer.terminal import Throughput, as_argument, warn, write_line
from jaxformer.translator import Alignment, Hypothesis, Score, Translator
from random_run import CONFIG as RANDOM
from random_run import write_random_run
from small_run import trained_run

pytestmark = pytest.mark.usefixtures("one_program_a_search")

ROOT = Path(__file__).parent.parent


DEFAULTS = {"prefixes": None, "window": 4096, "n_best": 1}


class Uppercase(Translator):
    """Takes the place of a `Translator`."""

    def __init__(self):
        self.options = {}
        self.aligned = []
        self.scored = []

    def generate(self, lines, **options):
        self.options = options
        prefixes = options["prefixes"] or iter(lambda: "", None)
        for line, prefix in zip(lines, prefixes, strict=False):
            best = prefix + line.upper()
            yield [
                Hypothesis(best, -1.0, -2.0, best.split(), [7] * len(best.split()), True),
                Hypothesis(best.lower(), -1.5, -3.0, best.split(), [], True),
            ][: options["n_best"]]

    def align_hypotheses(self, lines, hypotheses, **options):
        self.aligned.append(options)

        def alignment(text):
            if text.startswith("LONG"):
                return None
            target = [f"▁{word}" for word in text.split()] + ["</s>"]
            # All of them attend to the second word.
            return Alignment(["▁x"] * 2 + ["</s>"], target, np.eye(3)[[1] * len(target)])

        return [[alignment(hypothesis.text) for hypothesis in each] for each in hypotheses]

    def score(self, sources, targets, **options):
        self.scored.append(options)
        return [
            Score(-float(len(source)), ["▁a", "</s>"], [-0.5, -float(len(target))])
            for source, target in zip(sources, targets, strict=True)
        ]


@pytest.fixture
def translator(monkeypatch):
    translator = Uppercase()
    loaded = []
    monkeypatch.setattr(
        Translator, "load", lambda *args, **options: loaded.append((*args, options)) or translator
    )
    translator.loaded = loaded
    return translator


@pytest.fixture
def run_with(monkeypatch, capfdbinary):
    """`jaxformer translate RUN …` on some input; returns status, standard output and error."""

    def run_with(text: bytes, *arguments: str):
        # As under LC_ALL=C, where Python itself would read and write only ASCII.
        stdin = io.TextIOWrapper(io.BytesIO(text), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)
        status = main(["translate", "RUN", "--quiet", *arguments])
        output, error = capfdbinary.readouterr()
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


def test_a_program_that_asks_line_by_line_is_answered_line_by_line(translator, monkeypatch):
    answers = []

    def questions():
        for number in range(4):
            assert len(answers) == number
            yield b"one\n"

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=questions()))
    monkeypatch.setattr(module, "write_line", answers.append)
    assert main(["translate", "RUN", "--quiet", "--window", "1", "--alignment"]) == 0
    assert answers == ["ONE\t1-0"] * 4 and translator.options["window"] == 1


@pytest.mark.parametrize(("asked", "given"), [(5, 4), (4, 4), (3, 2), (1, 1)])
def test_no_answer_waits_for_the_next_window(translator, run_with, monkeypatch, asked, given):
    """Answers are printed two at a time here: an odd one left of a window would wait for more."""
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    assert run_with(b"one\n", "--window", str(asked)) == (0, b"ONE\n", "")
    assert translator.options["window"] == given


def test_a_byte_order_mark_is_no_text(translator, run_with):
    assert run_with(b"\xef\xbb\xbfone\ntwo\n") == (0, b"ONE\nTWO\n", "")


def test_options(translator, run_with):
    run_with(b"one\n")
    assert translator.options == DEFAULTS
    options = (
        "--beam-size 2 --batch-tokens 99 --top-k 3 --sampling --no-repeat-ngram-size 4 "
        "--max-length-ratio 1.5 --seed 7 --alignment"
    )
    run_with(b"one\n", *options.split(), "--checkpoint", "best", "--dtype", "int8")
    assert translator.options == DEFAULTS | {
        "beam_size": 2,
        "batch_tokens": 99,
        "top_k": 3,
        "sampling": True,
        "no_repeat_ngram_size": 4,
        "max_length_ratio": 1.5,
        "seed": 7,
    }
    assert translator.aligned == [{"batch_tokens": 99}]
    assert translator.loaded == [
        (["RUN"], None, {"dtype": None}),
        (["RUN"], ["best"], {"dtype": "int8"}),
    ]


def test_several_translations_of_a_line(translator, run_with):
    assert run_with(b"one\n\n", "--n-best", "2")[1].decode().splitlines() == [
        "0 ||| ONE ||| -1.000000",
        "0 ||| one ||| -1.500000",
        "1 |||  ||| -1.000000",
        "1 |||  ||| -1.500000",
    ]


def test_alignment(translator, run_with):
    output = run_with(b"one two\n\nlong line\n", "--alignment")[1]
    assert output == b"ONE TWO\t1-0 1-1\n\t\nLONG LINE\t\n"


def test_prefixes(translator, run_with, tmp_path):
    prefixes = tmp_path / "prefixes"
    prefixes.write_text("a \n\n")
    assert run_with(b"one\ntwo\n", "--prefix", str(prefixes))[1] == b"a ONE\nTWO\n"
    status, _, error = run_with(b"one\n", "--prefix", "nowhere")
    assert (status, error) == (
        1,
        "error: cannot read nowhere: No such file or directory; give a text file\n",
    )


def test_how_fast_it_was(translator, monkeypatch, capfd):
    now = [100.0]
    generate = translator.generate

    def slowly(*args, **options):
        now[0] += 2.0
        yield from generate(*args, **options)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(translator, "generate", slowly)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one two\n\n")))
    assert main(["translate", "RUN"]) == 0
    output, error = capfd.readouterr()
    assert output == "ONE TWO\n\n"
    # Three tokens and one, eos included.
    assert error == "2 lines in 2.0 s, compilation included: 1.0 lines/s, 2 tokens/s\n"


def test_progress_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = Terminal()
    progress = Throughput(file)
    for now[0] in (0.1, 1.0, 1.1, 2.0):
        progress.add(10)
    progress.close()
    first, second, last = file.getvalue().split("\r")[1:]
    assert first.startswith("2 lines in 1.0 s") and "2.0 lines/s, 20 tokens/s" in first
    assert second.startswith("4 lines in 2.0 s") and last == second + "\n"


def test_what_standard_error_does_not_take_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    Throughput(sys.stderr).close()
    warn("somebody may want to know")


@pytest.mark.parametrize("why", ["", "no folder", "locked", "open to all", "of another user"])
def test_where_no_program_can_be_kept_or_trusted_none_is(monkeypatch, tmp_path, why):
    (tmp_path / "file").touch()
    (tmp_path / "jaxformer").mkdir()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("file" if why == "no folder" else "")))
    if why == "locked":
        monkeypatch.setattr(os, "access", lambda *_: False)
    if why == "open to all":
        (tmp_path / "jaxformer").chmod(0o777)
    if why == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: -1)
    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    keep_compiled_programs()
    kept = updated.get("jax_compilation_cache_dir")
    assert kept == (None if why else str(tmp_path / "jaxformer"))


@pytest.mark.parametrize(
    ("path", "argument"), [("runs/a", "runs/a"), ("a b", "'a b'"), ("-d2", "./-d2")]
)
def test_paths_that_are_shown_can_be_given(path, argument):
    assert as_argument(path) == argument


def score(capfd, source, target, *options):
    status = main(["score", "RUN", "--source", str(source), "--target", str(target), *options])
    return status, *capfd.readouterr()


@pytest.mark.slow
def test_programs_are_kept_for_the_next_process(tmp_path):
    write_random_run(tmp_path / "run", RANDOM)
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}
    program = "import sys; from jaxformer.cli import main; sys.exit(main(sys.argv[1:]))"
    files = []
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", program, "translate", str(tmp_path / "run"), "--beam-size=1"],
            input=b"red dogs\n",
            env=environment,
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        # Only the search: what compiles quickly is not worth caching.
        files.append(
            {path.name for path in (tmp_path / "jaxformer").glob("*search_continuously*-cache")}
        )
    assert files[0] and files[1] == files[0]


def test_score(translator, tmp_path, capfd, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("ab\n\n")
    target.write_text("a\nabc\n")
    assert score(capfd, source, target) == (0, "-2.000000\n-0.000000\n", "")
    _, output, _ = score(capfd, source, target, "--tokens")
    assert output.splitlines()[0] == "-2.000000\t▁a:-0.500000 </s>:-1.000000"
    assert translator.scored == [{"first_line": 1}] * 2
    translator.scored.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", 1)
        score(capfd, source, target, "--batch-tokens", "99")
    assert translator.scored == [{"first_line": n, "batch_tokens": 99} for n in (1, 2)]
    target.write_text("a\n")
    status, output, error = score(capfd, source, target)
    assert (status, output) == (1, "")
    assert error == (
        f"error: {source} has 2 lines and {target} 1: give files with the same number of lines, "
        "each the translation of the other's\n"
    )
    assert len(translator.loaded) == 3, "that could have been said at once"


def test_score_of_pipes(translator, tmp_path, capfd):
    """Pipes can be read only once, and their content is not known beforehand."""

    def score_of(*texts):
        pipes = [tmp_path / f"{len(list(tmp_path.iterdir()))}.{side}" for side in ("a", "b")]
        for pipe in pipes:
            os.mkfifo(pipe)
        with ThreadPoolExecutor(2) as threads:
            written = threads.map(Path.write_text, pipes, texts)
            found = score(capfd, *pipes)
            list(written)
        return found

    assert score_of("ab\n\n", "a\nabc\n") == (0, "-2.000000\n-0.000000\n", "")
    status, output, error = score_of("ab\n\n", "a\n")
    assert (status, output) == (1, "-2.000000\n")
    assert ".b ends before the other file: give files with the same number" in error


def test_a_line_that_is_not_utf8_is_named_after_those_before_it(translator, run_with):
    status, output, error = run_with(b"one\n\ntw\xff\n")
    assert (status, output) == (1, b"ONE\n\n")
    assert error == (
        "error: standard input:3: not UTF-8 (byte 0xff at column 3); convert it, for example with "
        "iconv\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampling", "--seed", "-1"], "--seed is -1: give 0 to 2^32 - 1"),
        (["--seed", "7"], "--seed is 7: it has no effect without --sampling: add it"),
        (["--beam-size", "0"], "--beam-size is 0: give at least 1"),
        (["--batch-tokens", "-5"], "--batch-tokens is -5: give at least 1"),
        (["--length-penalty", "-1"], "--length-penalty is -1.0: give at least 0"),
        (["--top-p", "2"], "--top-p is 2.0: give more than 0, at most 1"),
        (["--n-best", "5"], "--n-best is 5: give 1 to 4, at most the number of beams"),
    ],
)
def test_impossible_options(translator, run_with, arguments, message):
    assert run_with(b"one\n", *arguments) == (1, b"", f"error: {message}\n")
    assert not translator.loaded, "that could have been said at once"


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_closed_streams_are_said(translator, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, name, None)  # as in Python after `<&-` or `>&-`
    assert main(["translate", "RUN"]) == 1
    message = f"error: {name} is closed: connect it to a file, a pipe or a terminal\n"
    assert capsys.readouterr().err == message
    assert not translator.loaded


def test_a_program_begins_with_all_its_streams():
    """Files opened later get no standard stream's descriptor; SIGTERM ends it even as PID 1."""
    program = """if True:
        import os, signal, sys
        if sys.argv[1] == "1":
            os.getpid = lambda: 1
        from jaxformer.terminal import begin_program
        begin_program()
        assert os.open(os.devnull, os.O_RDONLY) > 2
        print("said", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)
    """
    for first, status in (("0", -signal.SIGTERM), ("1", 128 + signal.SIGTERM)):
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" 0<&- 2>&-', "sh", sys.executable, "-c", program, first],
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


def test_what_the_machine_has_no_room_for(translator, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="cannot write standard output: No space left"):
            write_line("x")
        monkeypatch.undo()

    def translate(options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("jaxformer.cli._translate", translate)
    assert main(["translate", "RUN"]) == 1
    assert capsys.readouterr().err == (
        "error: too little memory on the device: Out of memory allocating 9 bytes.; "
        "lower --batch-tokens, or shorten the longest line\n"
    )


def test_no_run(run_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_with(b"one\n")
    assert status == 1
    assert error == "error: RUN is not a directory: give the directory of a training run\n"
    Path("RUN").mkdir()
    assert "RUN is not a run directory: it has no config.json" in run_with(b"one\n")[2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("", "the following arguments are required: COMMAND: see jaxformer --help"),
        ("translate", "the following arguments are required: RUN: see jaxformer translate --help"),
        (
            "translate RUN --beam-size many",
            "argument --beam-size: invalid int value: 'many': see jaxformer translate --help",
        ),
    ],
)
def test_usage(arguments, error, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_interrupting_is_no_error_of_the_program(translator, run_with, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(translator, "generate", interrupted)
    status, _, error = run_with(b"one\n")
    assert status == 130
    assert "Traceback" not in error


@pytest.mark.parametrize(("status", "waits"), [(0, True), (1, True), (130, False)])
def test_ctrl_c_waits_for_no_search(monkeypatch, status, waits):
    def exit_now(status):
        raise InterruptedError(status)

    monkeypatch.setattr(module, "main", lambda: status)
    monkeypatch.setattr(os, "_exit", exit_now)
    with pytest.raises(SystemExit if waits else InterruptedError) as ended:
        module.command()
    assert ended.value.args == (status,)


def test_ctrl_c_leaves_whole_lines(translator, monkeypatch, capfd):
    """It arrives in the middle of a line and takes effect after that line."""
    write = os.write

    def slow_write(file, data):
        if data[:1] == b"T":
            signal.raise_signal(signal.SIGINT)
        return write(file, data[:1])

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\nthree\n")))
    monkeypatch.setattr(os, "write", slow_write)
    # If a shell runs the tests in the background, Python ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["translate", "RUN", "--quiet"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().out == "ONE\nTWO\n"


def test_a_reader_that_leaves_is_no_error(translator, run_with, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        status, _, error = run_with(b"one\n" * 50_000)
        assert status == 141  # a shell's status for a process ended by SIGPIPE
        assert error == ""


def test_the_command_on_a_trained_run(tmp_path_factory, tmp_path):
    """In its own process and another folder, on one device, in a locale that is not UTF-8."""
    run = trained_run(tmp_path_factory)
    lines = ["red dogs sit here", "", "two\u2028cats run", "집에"]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from jaxformer.cli import main; raise SystemExit(main())",
            *("translate", str(run), "--beam-size", "1", "--quiet"),
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
    assert translations[:-1] == Translator.load(run, devices=jax.devices()[:1]).translate(
        lines, beam_size=1
    )
