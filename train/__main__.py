"""The command line: `python -m train fit CONFIG [--section.field VALUE …]` and friends."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxformer.compilation import keep_compiled_programs
from jaxformer.errors import UserError
from train.config import TrainConfig, flatten

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options, overrides = _parser().parse_known_args(arguments)
    keep_compiled_programs()
    try:
        options.command(options, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has gone, as in `… --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    fit.add_argument("-h", "--help", action="store_true", help="show this, or CONFIG's fields")
    fit.set_defaults(command=_fit, parser=fit)
    evaluate = commands.add_parser(
        "evaluate",
        help="loss, sacreBLEU and chrF of a trained model",
        description="Score a run on its own test set, another split, or two files of your own.",
    )
    evaluate.add_argument("run", metavar="RUN", help="directory that training wrote")
    evaluate.add_argument("--source", help="text file to translate, with --reference")
    evaluate.add_argument("--reference", help="text file of the same number of lines")
    evaluate.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="test",
        help="of the run's own data; default: test",
    )
    evaluate.add_argument("--checkpoint", help="average, best, last or a step")
    evaluate.add_argument("--beam-size", type=int, help="beams; default: the run's")
    evaluate.add_argument("--length-penalty", type=float, help="alpha; default: the run's")
    evaluate.add_argument("--length-penalty-form", choices=("gnmt", "power"))
    evaluate.add_argument("--bleu-tokenize", help="sacreBLEU's tokenizer; default: the run's")
    evaluate.add_argument("--output", help="file to write the translations to")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=_evaluate)
    _add_benchmark(commands)
    return parser


def _add_benchmark(commands: Any) -> None:
    benchmark = commands.add_parser("benchmark", help="measure how fast it is")
    kinds = benchmark.add_subparsers(required=True, metavar="WHAT")
    decode = kinds.add_parser(
        "decode",
        help="translation, beside another engine with the same weights",
        description="Measure sentences and tokens a second, compilation apart, beside another "
        "engine with the same weights that takes turns in the same process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    decode.add_argument(
        "run", metavar="RUN", help="directory that training wrote, or a preset such as base"
    )
    decode.add_argument("--source", metavar="FILE", help="sentences to translate, with a run")
    decode.add_argument("--sentences", type=int, default=0, help="at most; 0 is all, or 128 random")
    decode.add_argument("--vocab-size", type=int, default=32_000, help="of a preset")
    decode.add_argument("--length", type=int, default=25, help="tokens, with a preset")
    decode.add_argument("--beam-size", type=int, default=4, help="1 is greedy search")
    decode.add_argument("--length-penalty", type=float, default=1.0, help="alpha of length^alpha")
    decode.add_argument("--batch-tokens", type=int, default=4096, help="source positions at once")
    decode.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16, int8")
    decode.add_argument("--one-by-one", action="store_true", help="each sentence alone")
    decode.add_argument("--peer", choices=("ctranslate2",), help="the other engine")
    decode.add_argument(
        "--peer-types", nargs="+", default=["float32"], help="its types, such as float32 and int8"
    )
    decode.add_argument(
        "--peer-batches",
        type=int,
        nargs="+",
        default=[32, 128],
        help="sentences it takes at once: the fastest of these",
    )
    decode.add_argument("--rounds", type=int, default=5, help="measurements of each")
    decode.add_argument("--output", metavar="FILE", help="add the results, as JSON lines")
    decode.set_defaults(command=_benchmark_decode)


def config_names() -> list[str]:
    """Return the names of the configurations that come with the project."""
    return sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))


def load_config(name: str) -> TrainConfig:
    """Return the variable `config` of train/configs/NAME.py or of another .py file.

    Raises:
      UserError: there is none; the message offers the nearest name.
    """
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        near = difflib.get_close_matches(name, config_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(config_names())}"
        raise UserError(f"no configuration {name!r}: {hint} (or give a .py file)")
    spec = importlib.util.spec_from_file_location(f"train.configs.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # it is the user's program: whatever it raises
        message = " ".join(str(error).split())
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {message}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path} defines no `config`: write config = TrainConfig(…) in it")
    return dataclasses.replace(config, run=config.run or f"runs/{path.stem}")


def override(config: TrainConfig, arguments: Sequence[str], prog: str) -> TrainConfig:
    """Return `config` changed by `--section.field VALUE …`; `--help` prints all fields and exits.

    Raises:
      UserError: an unknown field, the nearest being offered, or a value of the wrong type.
    """
    known = flatten(config)
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        field = argument[2:].partition("=")[0].replace("-", "_")
        if field not in known and field != "help":
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists all fields"
            raise UserError(f"no field --{field}: {hint}")
    output = io.StringIO()
    try:
        with contextlib.nullcontext() if "--help" in arguments else _capture(output):
            return tyro.cli(
                TrainConfig,
                prog=prog,
                default=config,
                args=list(arguments),
                config=(tyro.conf.FlagConversionOff,),  # --model.remat True
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_first_sentence(output.getvalue())) from None


@contextlib.contextmanager
def _capture(output: io.StringIO) -> Iterator[None]:
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield


def _first_sentence(box: str) -> str:
    """Return what tyro says between its title and the first rule, as one line."""
    lines = [line.strip("│| ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line.startswith(("---", "───"))]
    end = rules[1] if len(rules) > 1 else len(lines)
    message = " ".join(lines[rules[0] + 1 : end] if rules else lines)
    return message.removeprefix("Error parsing ").rstrip(".") + ": see --help"


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

    fit(config)


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}: see python -m train evaluate --help")
    if (options.source is None) != (options.reference is None):
        raise UserError("--source and --reference go together: give both files or neither")
    changes = {
        name: getattr(options, name)
        for name in ("beam_size", "length_penalty", "length_penalty_form", "bleu_tokenize")
        if getattr(options, name) is not None
    }
    from train.evaluate import evaluate_run

    values = evaluate_run(
        options.run,
        split=options.split,
        files=options.source and (options.source, options.reference),
        checkpoint=options.checkpoint,
        output=options.output,
        **changes,
    )
    if options.json:
        print(json.dumps(values))
        return
    print(f"loss {values['loss']:.4f}  nll {values['nll']:.4f}  ppl {values['perplexity']:.3f}")
    print(f"BLEU {values['bleu']:.2f} ({values['bleu_signature']})")
    print(f"chrF2 {values['chrf']:.2f} ({values['chrf_signature']})")
    print(f"exact match {values['exact_match']:.1%}")


def _benchmark_decode(options: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}: see python -m train benchmark --help")
    from train.benchmark import DecodeBenchmark, benchmark_decode, table, write_records

    names = [field.name for field in dataclasses.fields(DecodeBenchmark)]
    values = {name: getattr(options, name) for name in names}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    records = benchmark_decode(DecodeBenchmark(**values | lists))
    print(table(records))
    if options.output is not None:
        write_records(options.output, records)


if __name__ == "__main__":
    sys.exit(main())
