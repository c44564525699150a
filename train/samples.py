"""The sentences that a run translates best and worst."""

from dataclasses import dataclass
from pathlib import Path

from jaxformer.results import Alignment
from jaxformer.translator import Translator
from train.config import read_train_config
from train.data.sources import load_split
from train.evaluate import make_translate

_TRANSLATED, _SHOWN = 200, 4


@dataclass(frozen=True)
class Sample:
    """A sentence, its translation and where the model looked.

    Attributes:
      source, reference, output: the strings.
      chrf: chrF2 of the sentence, from 0 to 100.
      alignment: which piece of the source each piece of the output comes from.
    """

    source: str
    reference: str
    output: str
    chrf: float
    alignment: Alignment


def best_and_worst(run: Path) -> tuple[list[Sample], list[Sample]]:
    """Translate up to 200 validation sentences, evenly spread; return the best and the worst.

    Raises:
      UserError: the run has no checkpoint, or its data is not where it was.
    """
    from sacrebleu.metrics.chrf import CHRF

    config = read_train_config(run)
    pairs = load_split(config.data, "validation")
    chosen = range(0, len(pairs), -(-len(pairs) // _TRANSLATED))
    pairs = pairs.select(chosen)
    sources, references = pairs["source"][:], pairs["target"][:]
    translator = Translator.load(run)
    translate = make_translate(translator, config.evaluate, beam_size=config.evaluate.beam_size)
    outputs = translate(sources, warn=lambda _: None)  # the final evaluation warned already
    metric = CHRF()
    scores = [
        metric.sentence_score(output, [reference]).score
        for output, reference in zip(outputs, references, strict=True)
    ]
    # Among equal scores, the longer sentence says more.
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], -len(references[i])))
    shown = min(_SHOWN, len(ranking) // 2)
    ends = ranking[:shown], ranking[len(ranking) - shown :][::-1]
    both = [index for end in ends for index in end]
    shown_pairs = [sources[i] for i in both], [outputs[i] for i in both]
    alignments = translator.align(*shown_pairs, few_shapes=True)
    samples = [
        Sample(sources[i], references[i], outputs[i], scores[i], alignment)
        for i, alignment in zip(both, alignments, strict=True)
    ]
    return samples[:shown], samples[shown:]
