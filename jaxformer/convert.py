"""The `jaxformer convert` command: models from and to other formats."""

import argparse
from typing import Any

from jaxformer.arguments import add_search, generation_options
from jaxformer.errors import UserError
from jaxformer.terminal import as_argument, say, signals_as_exit

# The formats that --to can name, each with the options that it takes apart from the search's.
_CONVERT_OPTIONS = {
    "jaxformer": (),
    "marian": ("checkpoint",),
    "ctranslate2": ("checkpoint", "quantization"),
    "stablehlo": ("checkpoint", "batch_size", "source_length"),
}

_CONVERT_DESCRIPTION = """\
Convert a model.

  --to jaxformer    a Marian model of Hugging Face, such as those of OPUS-MT, becomes a directory
                    for `jaxformer translate`
  --to marian       a trained model, for Hugging Face's MarianMTModel
  --to ctranslate2  a trained model, for CTranslate2: fast in C++, on CPUs and GPUs
  --to stablehlo    a trained model, as functions that need JAX but none of this package's code

examples:
  jaxformer convert opus-mt-en-de runs/opus-mt-en-de
  jaxformer convert runs/multi30k multi30k-ct2 --to ctranslate2 --quantization int8
  jaxformer convert runs/multi30k multi30k-hlo --to stablehlo --source-length 64
"""


def add_convert(commands: Any) -> None:
    """Add the command to the sub-parsers of `jaxformer`."""
    convert = commands.add_parser(
        "convert",
        help="convert a model from or to another format",
        description=_CONVERT_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="directory that training wrote, or of a Marian model"
    )
    convert.add_argument("destination", metavar="DESTINATION", help="directory to create")
    convert.add_argument(
        "--to",
        metavar="FORMAT",
        choices=tuple(_CONVERT_OPTIONS),
        default="jaxformer",
        help="one of the above (default: jaxformer)",
    )
    convert.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="of a trained model: average, best, last or a step "
        "(default: the average, unless training went on after it; otherwise the best, otherwise "
        "the last)",
    )
    ctranslate2 = convert.add_argument_group("with --to ctranslate2")
    ctranslate2.add_argument(
        "--quantization",
        metavar="TYPE",
        help="type of the weights: int8, int8_float16, float16, bfloat16, ... (default: float32)",
    )
    stablehlo = convert.add_argument_group("with --to stablehlo")
    for flag, explanation in (
        ("--batch-size", "sentences in a call (default: any number)"),
        (
            "--source-length",
            "pieces of a source, eos and padding included (default: 128, or the model's max_length "
            "if that is less)",
        ),
    ):
        stablehlo.add_argument(flag, type=int, metavar="N", help=explanation)
    add_search(stablehlo)
    stablehlo.add_argument(
        "--n-best",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="translations returned for each sentence (default: as many as there are beams)",
    )
    convert.set_defaults(command=_convert, if_memory_ends="convert on a machine with more")


def _convert(options: argparse.Namespace) -> None:
    """Convert a model. Each branch imports what it needs: some formats need extra packages."""
    source, destination = options.source, options.destination
    names = {name for names in _CONVERT_OPTIONS.values() for name in names}
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    search = generation_options(options)
    allowed = {*_CONVERT_OPTIONS[options.to], *(search if options.to == "stablehlo" else ())}
    for name in sorted((given | search).keys() - allowed):
        takers = [to for to, names in _CONVERT_OPTIONS.items() if name in names] or ["stablehlo"]
        raise UserError(
            f"--{name.replace('_', '-')} means nothing to --to {options.to}: leave it out, "
            f"or use --to {' or '.join(takers)}"
        )
    if given.get("batch_size", 1) < 1:
        raise UserError(
            f"--batch-size is {options.batch_size}: give at least 1, or leave it out for any number"
        )
    with signals_as_exit():
        match options.to:
            case "jaxformer":
                from jaxformer.interop.marian import from_marian

                from_marian(source, destination)
                use = f"jaxformer translate {as_argument(destination)}"
            case "marian":
                from jaxformer.interop.marian import to_marian

                to_marian(source, destination, **given)
                use = f"transformers.MarianMTModel.from_pretrained({destination!r})"
            case "ctranslate2":
                from jaxformer.interop.ctranslate2 import to_ctranslate2

                to_ctranslate2(source, destination, **given)
                use = f"ctranslate2.Translator({destination!r})"
            case "stablehlo":
                from jaxformer.interop.stablehlo import to_stablehlo

                to_stablehlo(source, destination, **given, **search)
                use = "jax.export.deserialize(…), as help(jaxformer.interop.stablehlo) shows"
    say(f"wrote {destination}: use it with {use}")
