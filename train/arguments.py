"""From the words of a command line to a configuration."""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from jaxformer.errors import UserError, one_line
from train.config import TrainConfig, flatten

CONFIGS = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """Return the names of the configurations that come with the project."""
    return sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))


def load_config(name: str, *, also: Iterable[str] = ()) -> TrainConfig:
    """Return the variable `config` of train/configs/NAME.py or of another .py file.

    Raises:
      UserError: there is none, and the message suggests the nearest name, also among those in
        `also`; or the file fails or defines no `config`.
    """
    own = name.endswith(".py")
    path = Path(os.path.expanduser(name)) if own else CONFIGS / f"{name}.py"
    if not path.is_file():
        names = [*config_names(), *also]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(names)}"
        raise UserError(
            f"no configuration {name!r}: {hint} (or give a .py file), before any --field VALUE"
        )
    module_name = f"configuration {path}" if own else f"train.configs.{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses look it up
    try:
        with _imports_from(path.parent.absolute()):
            spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the user's program may raise anything
        message = one_line(error)
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {message}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{path} defines no `config`: write config = TrainConfig(…) in it")
    return dataclasses.replace(config, run=config.run or f"runs/{path.stem}")


@contextlib.contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, as a program can; then forget them for the next file."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and folder in Path(file).parents:
                del sys.modules[name]


def list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return an argparse type that reads "1,2,3"."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(item) for item in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"  # what argparse calls it in an error
    return parse


def refuse(overrides: Sequence[str], command: str) -> None:
    """Raise `UserError` if there are arguments that a command without overrides does not know."""
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}: see python -m train {command} --help")


def override(
    config: TrainConfig, arguments: Sequence[str], prog: str, own: Iterable[str] = ()
) -> TrainConfig:
    """Return `config` changed by `--section.field VALUE …`; `--help` prints all fields and exits.

    Args:
      config: the configuration to change.
      arguments: those that the command does not know itself.
      prog: the command, as `--help` shows it.
      own: names of the command's own options, which a misspelt argument may mean.

    Raises:
      UserError: a field is unknown (the message suggests the nearest) or a value has a wrong type.
    """
    known = flatten(config)
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        field = argument[2:].partition("=")[0].replace("-", "_")
        if field not in known and field != "help":
            near = difflib.get_close_matches(field, [*known, *(set(own) - {field})], n=1)
            lists = "python -m train fit CONFIG --help lists all"
            if own:
                lists += f", {prog} --help its own options"
            hint = f"did you mean --{near[0].replace('_', '-')}?" if near else lists
            raise UserError(f"no field --{field}: {hint}")
    output = io.StringIO()
    if shutil.get_terminal_size().columns < 20:  # with three, tyro would never return
        os.environ["COLUMNS"] = "20"
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
    return (
        message.removeprefix("Error parsing ").rstrip(".")
        + ": see python -m train fit CONFIG --help"
    )
