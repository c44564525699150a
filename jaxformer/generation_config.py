"""How to search for a translation: the options of a search, checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxformer.errors import UserError
from jaxformer.fields import check_fields
from jaxformer.sampling import check_sampling

PenaltyForm = Literal["gnmt", "power"]

# For all that array sizes depend on: more is a mistake, and XLA would not fail with an exception.
_MOST = 100_000
# An exponent of the length: above it, scores of hundreds of tokens are beyond float32, and all 0.
_MOST_PENALTY = 10


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to search for a translation.

    Lengths count target tokens and S source tokens, both including eos.

    Attributes:
      beam_size: K, hypotheses kept at each step; 1 is greedy search.
      n_best: M, hypotheses returned, by default all K. The search ends once these are certain.
        With `sampling`, how many are drawn, by default K.
      length_penalty: alpha; higher favours longer translations.
      length_penalty_form: "gnmt", ((5 + length) / 6)^alpha (§6.1), or "power", length^alpha.
      coverage_penalty: beta of Wu et al. (2016), eq. 14: the cost of source tokens that the last
        decoder layer has hardly attended to.
      early_stopping: a sentence ends with its K-th finished hypothesis, as in other toolkits,
        instead of when no live one can be better.
      max_length_ratio, max_length_extra: a and b, hypotheses have at most a · S + b tokens; §6.1
        has 1 and 50.
      min_length_ratio, min_length_extra: likewise for the minimum, which never exceeds the maximum.
      no_repeat_ngram_size: n-grams of this many tokens occur once in a hypothesis; 0 is no limit.
      sampling: draw each token instead of searching for the best.
      temperature, top_k, top_p: as for `Sampling`.

    Raises:
      UserError: a value is impossible; the message names the field, the value and the fix.
    """

    beam_size: int = 4
    n_best: int | None = None
    length_penalty: float = 0.6
    length_penalty_form: PenaltyForm = "gnmt"
    coverage_penalty: float = 0.0
    early_stopping: bool = False
    max_length_ratio: float = 1.0
    max_length_extra: int = 50
    min_length_ratio: float = 0.0
    min_length_extra: int = 0
    no_repeat_ngram_size: int = 0
    sampling: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least = {
            "beam_size": 1,
            "n_best": 1,
            "length_penalty": 0,
            "coverage_penalty": 0,
            "max_length_ratio": 0,
            "max_length_extra": 0,
            "min_length_ratio": 0,
            "min_length_extra": 0,
            "no_repeat_ngram_size": 0,
        }
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise UserError(f"{name} is {value}: give at least {minimum}")
            most = _MOST_PENALTY if name == "length_penalty" else _MOST
            if value is not None and value > most:
                raise UserError(f"{name} is {value}: give at most {most:,}")
        if not self.sampling and self.n_best is not None and self.n_best > self.beam_size:
            raise UserError(
                f"n_best is {self.n_best}: give 1 to {self.beam_size}, at most the number of beams"
            )
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.sampling:
            idle = ["length_penalty", "length_penalty_form", "coverage_penalty", "early_stopping"]
            why = "with sampling: leave it out"
        else:
            idle, why = ["temperature", "top_k", "top_p"], "without sampling: set sampling too"
        for name in idle:
            if (value := getattr(self, name)) != getattr(GenerationConfig, name):
                raise UserError(f"{name} is {value}: it has no effect {why}")

    @property
    def num_beams(self) -> int:
        """How many hypotheses each step extends."""
        return self.n_best or self.beam_size if self.sampling else self.beam_size

    def max_length(self, source_length: int) -> int:
        """T: the most tokens that a hypothesis for a source of this many tokens can have."""
        return math.floor(self.max_length_ratio * source_length) + self.max_length_extra

    def min_length(self, source_length: int) -> int:
        """The fewest tokens that a hypothesis for such a source can have, unless T is fewer."""
        return math.floor(self.min_length_ratio * source_length) + self.min_length_extra

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "GenerationConfig":
        """Make one from keyword arguments; raises `UserError` for an unknown one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise UserError(f"there is no option {name!r}: choose one of {', '.join(known)}")
        return cls(**options)
