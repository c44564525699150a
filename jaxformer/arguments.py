"""Command-line options that several commands share: how to search for a translation."""

import argparse
import dataclasses
from typing import Any, NoReturn, get_args

from jaxformer.errors import UserError
from jaxformer.generation_config import GenerationConfig, PenaltyForm

# Help texts for the fields of `GenerationConfig`, except `n_best`, worded for the command line.
_SEARCH = {
    "beam_size": "number of beams; 1 is greedy search",
    "length_penalty": "alpha of the length penalty; higher favours longer translations",
    "length_penalty_form": "the penalty: gnmt is ((5 + length) / 6)^alpha, power is length^alpha",
    "coverage_penalty": "beta; higher favours translations that leave out nothing of the source",
    "early_stopping": "stop when as many hypotheses as beams are finished: faster, nearly as good",
    "max_length_ratio": "translations have at most N times the source's length ...",
    "max_length_extra": "... plus N pieces",
    "min_length_ratio": "translations have at least N times the source's length ...",
    "min_length_extra": "... plus N pieces",
    "no_repeat_ngram_size": "let no N pieces in a row occur twice in a translation; 0 is no limit",
}
_SAMPLING = {
    "sampling": "draw translations at random instead of searching for the best",
    "temperature": "of sampling: below 1 is safer, above 1 is wilder",
    "top_k": "of sampling: draw only from the N best pieces",
    "top_p": "of sampling: draw only from the best pieces that together have probability N",
}
_TYPES = {"top_k": int, "top_p": float}


class Parser(argparse.ArgumentParser):
    """Tells of a wrong option as of any other error: in one line."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"error: {message}: see {self.prog} --help\n")


def add_search(group: Any, *, sampling: bool = False) -> None:
    """Add options for the fields of `GenerationConfig`, except `n_best`; no attribute if not given.

    Args:
      group: a parser or one of its argument groups.
      sampling: whether to add the options for sampling as well, --seed included.
    """
    fields = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    for name, explanation in (_SEARCH | (_SAMPLING if sampling else {})).items():
        flag, default = "--" + name.replace("_", "-"), fields[name]
        if default is False:
            group.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=explanation
            )
            continue
        if default is not None:
            explanation += f" (default: {default})"
        choices = get_args(PenaltyForm) if name == "length_penalty_form" else None
        group.add_argument(
            flag,
            type=_TYPES.get(name, type(default)),
            choices=choices,
            metavar=None if choices else "N",
            default=argparse.SUPPRESS,
            help=explanation,
        )
    if sampling:
        group.add_argument(
            "--seed",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help="random seed of sampling (default: 0)",
        )


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `GenerationConfig` that were given, and the seed if it was.

    Raises:
      UserError: a value is impossible; the message names the option and the fix.
    """
    if not 0 <= getattr(options, "seed", 0) < 2**32:
        raise UserError(f"--seed is {options.seed}: give 0 to 2^32 - 1")
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    try:
        GenerationConfig(**given)
    except UserError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error
    if hasattr(options, "seed"):
        if not given.get("sampling"):
            raise UserError(
                f"--seed is {options.seed}: it has no effect without --sampling: add it"
            )
        given["seed"] = options.seed
    return given
