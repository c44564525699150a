"""The `jaxformer` command."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat, tee, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, get_args

from jaxformer.arguments import Parser, add_search, generation_options
from jaxformer.batching import in_windows
from jaxformer.compilation import keep_compiled_programs
from jaxformer.config import Precision
from jaxformer.convert import add_convert
from jaxformer.errors import UserError, machine_errors
from jaxformer.files import lines_of
from jaxformer.pages.inspection import add_inspect
from jaxformer.results import Alignment
from jaxformer.terminal import (
    ShowDefaults,
    Throughput,
    begin_program,
    check_open,
    drop_output,
    say,
    write_line,
)
from jaxformer.translator import WINDOW, Translator

# Lines that are printed, and aligned or scored, at a time.
_AT_ONCE = 256
_SMALLER = "lower --batch-tokens, or shorten the longest line"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with machine_errors(options.if_memory_ends):
            options.command(options)
    except UserError as error:
        say(f"error: {error}")
        return 1
    except BrokenPipeError:  # the reader has gone, as in `… | head`
        drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def command() -> NoReturn:
    """Entry point of the `jaxformer` command: runs `main`, and exits at once after Ctrl-C.

    A search that is under way goes on in its thread, and Python would otherwise wait for it.
    """
    begin_program()
    status = main()
    if status == 128 + signal.SIGINT:
        os._exit(status)  # no line is cut short: `write_line` flushes each
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="jaxformer", description="Use trained encoder-decoder Transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_translate(commands)
    _add_score(commands)
    add_inspect(commands)
    add_convert(commands)
    return parser


def _add_translate(commands: Any) -> None:
    translate = commands.add_parser(
        "translate",
        help="translate standard input, line by line",
        description="Translate standard input to standard output: one line in, one line out, in "
        "order. Example: jaxformer translate runs/multi30k < source.txt > translation.txt",
        formatter_class=ShowDefaults,
    )
    _add_model(
        translate,
        "source positions of a program, over all devices; by default 4096 per device, fewer on a "
        "CPU, where two programs may run at once",
    )
    translate.add_argument(
        "--window",
        type=int,
        metavar="N",
        default=WINDOW,
        help="lines that are read before the first is translated: with 1, each is answered before "
        "the next is read; more are faster",
    )
    search = translate.add_argument_group("search")
    add_search(search, sampling=True)
    search.add_argument(
        "--prefix",
        metavar="FILE",
        help="text file with the beginning of each translation, one line per line of input",
    )
    output = translate.add_argument_group("output")
    output.add_argument(
        "--n-best",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="print N translations of each line, each as: line number, from 0 ||| text ||| score; "
        "with --sampling, draw N",
    )
    output.add_argument(
        "--alignment",
        action="store_true",
        help="print after each translation a tab and its word alignment: SOURCE-TARGET pairs of "
        "word numbers from 0, as in 0-0 1-2; only the tab for a line that is translated in parts",
    )
    output.add_argument("--quiet", action="store_true", help="show no progress on standard error")
    translate.set_defaults(command=_translate, if_memory_ends=_SMALLER)


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="log-probability of given translations",
        description="Print the natural logarithm of the probability that the model gives each "
        "line of TARGET, end of sentence included, as the translation of that line of SOURCE.",
        formatter_class=ShowDefaults,
    )
    _add_model(score, "positions scored at once; by default 4096")
    score.add_argument(
        "--source", metavar="FILE", required=True, help="text file, one sentence per line"
    )
    score.add_argument(
        "--target",
        metavar="FILE",
        required=True,
        help="text file with the translation of each line",
    )
    score.add_argument(
        "--tokens",
        action="store_true",
        help="after each number, print a tab and that of each piece, as PIECE:NUMBER",
    )
    score.set_defaults(command=_score, if_memory_ends=_SMALLER)


def _add_model(command: argparse.ArgumentParser, batch_tokens: str) -> None:
    command.add_argument(
        "run",
        metavar="RUN",
        nargs="+",
        help="directory that training wrote; several form an ensemble",
    )
    command.add_argument(
        "--checkpoint",
        action="append",
        metavar="NAME",
        help="average, best, last or a step; by default the average, unless training went on "
        "after it; otherwise the best, otherwise the last; given several times, they form an "
        "ensemble",
    )
    command.add_argument(
        "--dtype",
        choices=get_args(Precision),
        help="precision of the computation; by default that of training",
    )
    command.add_argument("--batch-tokens", type=int, metavar="N", help=batch_tokens)


def _translate(options: argparse.Namespace) -> None:
    """Translate standard input, after all checks that can be made before loading the model."""
    check_open("stdin", "stdout")
    if options.window < 1:
        raise UserError(f"--window is {options.window}: give at least 1")
    at_once = _batch_tokens(options)
    search = generation_options(options)
    numbered = "n_best" in search
    search.setdefault("n_best", 1)
    with contextlib.ExitStack() as stack:
        prefixes = None
        if options.prefix is not None:
            prefixes = lines_of(stack.enter_context(_open(options.prefix)), options.prefix)
        translator = _load(options)
        source, lines = tee(lines_of(sys.stdin.buffer, "standard input"))
        progress = Throughput(sys.stderr, quiet=options.quiet)
        # The window becomes a multiple of this, so that no answer waits for lines of the next one.
        together = min(_AT_ONCE, options.window)
        found = translator.generate(
            lines,
            prefixes=prefixes,
            window=options.window // together * together,
            **at_once,
            **search,
        )
        number = 0
        for hypotheses in in_windows(found, together):
            source_lines = list(islice(source, len(hypotheses)))
            links: Iterator[str] = repeat("")
            if options.alignment:
                aligned = translator.align_hypotheses(source_lines, hypotheses, **at_once)
                links = map(_links, chain.from_iterable(aligned))
            for line in hypotheses:
                for hypothesis in line:
                    text = hypothesis.text + next(links)
                    if numbered:
                        text = f"{number} ||| {text} ||| {hypothesis.score:.6f}"
                    write_line(text)
                number += 1
                progress.add(len(line[0].tokens) + 1)
        progress.close()


def _links(alignment: Alignment | None) -> str:
    words = [] if alignment is None else alignment.word_links()
    return "\t" + " ".join(f"{source}-{target}" for source, target in words)


def _score(options: argparse.Namespace) -> None:
    check_open("stdout")
    at_once = _batch_tokens(options)
    counts = []
    for name in (options.source, options.target):
        if Path(name).is_file():  # a pipe can be read only once
            with _open(name) as file:
                counts.append(sum(1 for _ in file))
    if len(set(counts)) == 2:
        raise UserError(
            f"{options.source} has {counts[0]} lines and {options.target} {counts[1]}: "
            "give files with the same number of lines, each the translation of the other's"
        )
    translator = _load(options)
    with _open(options.source) as source, _open(options.target) as target:
        number = 0
        for window in in_windows(_pairs(source, target, options), _AT_ONCE):
            sources, targets = zip(*window, strict=True)
            scores = translator.score(sources, targets, first_line=number + 1, **at_once)
            number += len(window)
            for score in scores:
                each = zip(score.tokens, score.token_log_probs, strict=True)
                pieces = " ".join(f"{token}:{value:.6f}" for token, value in each)
                write_line(f"{score.log_prob:.6f}" + f"\t{pieces}" * options.tokens)


def _pairs(
    source: BinaryIO, target: BinaryIO, options: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    both = lines_of(source, options.source), lines_of(target, options.target)
    for source_line, target_line in zip_longest(*both):
        if source_line is None or target_line is None:
            ended = options.source if source_line is None else options.target
            raise UserError(
                f"{ended} ends before the other file: give files with the same number of lines, "
                "each the translation of the other's"
            )
        yield source_line, target_line


def _load(options: argparse.Namespace) -> Translator:
    keep_compiled_programs()
    return Translator.load(options.run, options.checkpoint, dtype=options.dtype)


def _batch_tokens(options: argparse.Namespace) -> dict[str, Any]:
    """Return --batch-tokens as a keyword argument, if it is given."""
    if options.batch_tokens is None:
        return {}
    if options.batch_tokens < 1:
        raise UserError(f"--batch-tokens is {options.batch_tokens}: give at least 1")
    return {"batch_tokens": options.batch_tokens}


def _open(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; give a text file") from error
