"""The command line: `python -m train fit CONFIG [--section.field VALUE …]` and friends."""

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax

from jaxformer.arguments import Parser
from jaxformer.compilation import keep_compiled_programs
from jaxformer.config import Precision
from jaxformer.errors import UserError, machine_errors
from jaxformer.files import check_writable, write_lines
from jaxformer.generation_config import PenaltyForm
from jaxformer.terminal import begin_program, check_open, drop_output, say
from train.arguments import config_names, load_config, override, refuse
from train.benchmark.command import add_benchmark
from train.hosts import ProcessLost
from train.plan.command import add_plan
from train.preemption import Preempted
from train.report import add_report, report_after_training

# How long, at most, a process that has failed waits for the others.
_LEAVE_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options, overrides = _parser().parse_known_args(arguments)
    keep_compiled_programs()
    try:
        check_open("stdout")
        _check_temporary_directory()
        if isinstance(sys.stdout, io.TextIOWrapper):  # letters that it lacks must not end a run
            sys.stdout.reconfigure(errors="backslashreplace")
        with machine_errors("ask for less at once, or use a device with more"):
            options.command(options, overrides)
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {error}")
        return error.status if isinstance(error, ProcessLost) else 1
    except Preempted:  # so that a scheduler starts it again
        return 128 + signal.SIGTERM
    except BrokenPipeError:  # the reader has gone, as in `… --help | head`
        drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        drop_output()
        where = error.filename or "standard output"
        say(f"error: cannot write {where}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        again = ": run the same command again to go on" if options.command == _fit else ""
        say(f"interrupted{again}")
        return 128 + signal.SIGINT
    return 0


def command() -> NoReturn:
    """Run `main` as a program, which ends at once after Ctrl-C, SIGTERM or a lost process.

    A search under way would go on in its thread, and Python would wait for it.
    """
    begin_program()
    status = main()
    joined = jax.distributed.is_initialized()
    if status in (ProcessLost.status, 128 + signal.SIGINT) or (status > 128 and not joined):
        _leave(status)
    if joined and status == 1:
        # At exit, processes wait for each other, or slower ones would fail. But the others may know
        # nothing of the error, and JAX would wait for them for minutes.
        waiting = threading.Timer(_LEAVE_S, _leave, [status])
        waiting.daemon = True
        waiting.start()
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)


def _check_temporary_directory() -> None:
    """Raise `UserError` if there is none, as in a read-only container: sacreBLEU needs one."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError("no folder for temporary files is writable: set TMPDIR") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train", description="Train and evaluate translation Transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = commands.add_parser(
        "fit",
        help="train a model, or go on training it",
        description="Train as CONFIG says. Run the same command again to go on after a stop.",
        epilog="python -m train fit CONFIG --help lists every field with its value in CONFIG.",
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit.add_argument(
        "config", metavar="CONFIG", nargs="?", help=f"{', '.join(config_names())}, or a .py file"
    )
    fit.add_argument("-h", "--help", action="store_true", help="show this help, or CONFIG's fields")
    fit.set_defaults(command=_fit, parser=fit)
    evaluate = commands.add_parser(
        "evaluate",
        help="loss, sacreBLEU and chrF of a trained model",
        description="Score a run on its own test set, another split, or two files of your own.",
    )
    evaluate.add_argument("run", metavar="RUN", help="directory that training wrote")
    evaluate.add_argument("--source", help="text file to translate; needs --reference")
    evaluate.add_argument("--reference", help="text file with the reference of each line")
    evaluate.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="split of the run's own data; default: test",
    )
    evaluate.add_argument(
        "--checkpoint",
        help="average, best, last or a step; default: the average, unless training went on after "
        "it; otherwise the best, otherwise the last",
    )
    evaluate.add_argument(
        "--dtype",
        choices=get_args(Precision),
        help="precision of the computation; default: the run's",
    )
    evaluate.add_argument("--beam-size", type=int, help="number of beams; default: the run's")
    evaluate.add_argument(
        "--length-penalty", type=float, help="alpha of the length penalty; default: the run's"
    )
    evaluate.add_argument(
        "--length-penalty-form",
        choices=get_args(PenaltyForm),
        help="gnmt is ((5 + length) / 6)^alpha, power is length^alpha; default: the run's",
    )
    evaluate.add_argument("--bleu-tokenize", help="sacreBLEU's tokenizer; default: the run's")
    evaluate.add_argument(
        "--output", help="file to write the translations to; - is standard output"
    )
    evaluate.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    evaluate.set_defaults(command=_evaluate)
    add_report(commands)
    add_benchmark(commands)
    add_plan(commands)
    return parser


def _fit(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.config is None:
        options.parser.print_help()
        if not options.help:
            raise UserError(f"give a CONFIG: {', '.join(config_names())}, or a .py file")
        return
    if options.help:
        overrides.append("--help")
    prog = f"python -m train fit {options.config}"
    config = override(load_config(options.config), overrides, prog)

    from train.loop import fit

    run = fit(config)
    if jax.process_index() == 0:
        print(report_after_training(run))


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    refuse(overrides, "evaluate")
    if (options.source is None) != (options.reference is None):
        raise UserError("--source and --reference go together: give both files or neither")
    changes = {
        name: getattr(options, name)
        for name in ("beam_size", "length_penalty", "length_penalty_form", "bleu_tokenize")
        if getattr(options, name) is not None
    }
    from train.evaluate import evaluate_run

    output = "/dev/stdout" if options.output == "-" else options.output
    if output is not None:
        check_writable(output)
    values, translations = evaluate_run(
        options.run,
        split=options.split,
        files=options.source and (options.source, options.reference),
        checkpoint=options.checkpoint,
        dtype=options.dtype,
        **changes,
    )
    _show(values, as_json=options.json)
    if output is not None:  # last: a full disk must not hide the scores
        write_lines(Path(output), translations)


def _show(values: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
        return
    if "loss" in values:
        print(f"loss {values['loss']:.4f}  nll {values['nll']:.4f}  ppl {values['perplexity']:.3f}")
    print(f"BLEU {values['bleu']:.2f} ({values['bleu_signature']})")
    print(f"chrF2 {values['chrf']:.2f} ({values['chrf_signature']})")
    print(f"exact match {values['exact_match']:.1%}")
