"""Corpus scores by sacreBLEU, with the signatures that say how they were computed."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxformer.errors import UserError, one_line


def perplexity(nll: float) -> float:
    """Return exp(nll), for nll in nats per token; a huge nll does not overflow."""
    return math.exp(min(nll, math.log(sys.float_info.max)))


@dataclass(frozen=True)
class CorpusScore:
    """A corpus score from 0 to 100, and the sacreBLEU signature that says how it was computed."""

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} ({self.signature})"


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
) -> CorpusScore:
    """Return the corpus BLEU of detokenised translations (Papineni et al. 2002; Post 2018).

    Args:
      hypotheses: one translation a sentence.
      references: one reference a sentence, in the same order.
      tokenize: sacreBLEU's tokenizer: "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", …;
        "none" for text that is tokenised already.

    Raises:
      UserError: the counts differ or are 0, or the tokenizer does not exist or cannot be loaded.
    """
    return _score(bleu_metric(tokenize), hypotheses, references)


def bleu_metric(tokenize: str) -> Any:
    """Return sacreBLEU's BLEU with its tokenizer loaded.

    Raises:
      UserError: the tokenizer does not exist or cannot be loaded.
    """
    from sacrebleu.metrics.bleu import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        choices = ", ".join(BLEU.TOKENIZERS)
        raise UserError(f"sacreBLEU has no tokenizer {tokenize!r}: choose one of {choices}")
    try:
        # force: no warning about text that looks tokenised, which "none" asks for.
        return BLEU(tokenize=tokenize, force=tokenize == "none")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"sacreBLEU's tokenizer {tokenize!r} cannot be used: {one_line(error)}"
        ) from error


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Return the corpus chrF2, the character n-gram F-score of Popović (2015).

    Arguments and errors are those of `bleu`.
    """
    from sacrebleu.metrics.chrf import CHRF

    return _score(CHRF(), hypotheses, references)


@dataclass(frozen=True)
class Quality:
    """Scores of a set of translations.

    Attributes:
      bleu, chrf: from 0 to 100, with their sacreBLEU signatures.
      exact_match: share of translations equal to their reference, from 0 to 1.
    """

    bleu: CorpusScore
    chrf: CorpusScore
    exact_match: float

    def __str__(self) -> str:
        return f"{self.bleu}\n{self.chrf}\nexact match {self.exact_match:.1%}"

    def to_dict(self) -> dict[str, Any]:
        """Return the values and signatures for a metrics record."""
        return {
            "bleu": self.bleu.value,
            "chrf": self.chrf.value,
            "exact_match": self.exact_match,
            "bleu_signature": self.bleu.signature,
            "chrf_signature": self.chrf.signature,
        }


def score(
    hypotheses: Sequence[str], references: Sequence[str], *, bleu_tokenize: str = "13a"
) -> Quality:
    """Score translations against one reference each."""
    equal = sum(map(str.__eq__, hypotheses, references))
    return Quality(
        bleu(hypotheses, references, tokenize=bleu_tokenize),
        chrf(hypotheses, references),
        equal / max(1, len(references)),
    )


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a validation metric ("bleu", "chrf" or "loss") are better."""
    return metric == "loss"


def _score(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScore:
    if len(hypotheses) != len(references) or not references:
        raise UserError(
            f"{len(hypotheses)} translations cannot be scored with {len(references)} references: "
            "give one reference for each translation, and at least one"
        )
    result = metric.corpus_score(hypotheses, [references])
    return CorpusScore(result.name, result.score, metric.get_signature().format())
