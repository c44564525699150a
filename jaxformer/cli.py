"""The `jaxformer` command."""

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence

from jaxformer.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has gone, as in `… | head`. Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxformer", description="Use trained encoder-decoder Transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    translate = commands.add_parser(
        "translate",
        help="translate standard input, line by line",
        description="Translate standard input to standard output: one line in, one line out, in "
        "order. Example: jaxformer translate runs/multi30k < source.txt > translation.txt",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    translate.add_argument("run", metavar="RUN", help="directory that training wrote")
    translate.add_argument("--beam-size", type=int, default=4, help="beams; 1 is greedy search")
    translate.add_argument(
        "--length-penalty", type=float, default=0.6, help="alpha; more favours longer sentences"
    )
    translate.add_argument(
        "--length-penalty-form",
        choices=("gnmt", "power"),
        default="gnmt",
        help="((5 + length) / 6)^alpha or length^alpha",
    )
    translate.add_argument(
        "--checkpoint", help="average, best, last or a step; the first of these that is there"
    )
    translate.add_argument(
        "--batch-tokens", type=int, default=4096, help="source positions translated at once"
    )
    translate.set_defaults(command=_translate)
    return parser


def _translate(options: argparse.Namespace) -> None:
    for name in ("beam_size", "batch_tokens"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(options, name)}: give at least 1")
    if options.length_penalty < 0:
        raise UserError(f"--length-penalty is {options.length_penalty}: give at least 0")
    from jaxformer.translator import Translator

    translator = Translator.load(options.run, options.checkpoint)
    output = sys.stdout.buffer
    translations = translator.translate_stream(
        _lines(sys.stdin.buffer),
        beam_size=options.beam_size,
        length_penalty=options.length_penalty,
        length_penalty_form=options.length_penalty_form,
        batch_tokens=options.batch_tokens,
    )
    for text in translations:
        output.write(text.encode() + b"\n")
    output.flush()


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    r"""Lines of UTF-8 that end in "\n" and nothing else, or one line in would not be one out."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); "
                "convert it, for example with iconv"
            ) from error
