"""How good a model is: loss and perplexity, sacreBLEU and chrF of its translations."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxformer.config import Precision, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from train.config import DataConfig, EvaluateConfig, read_section
from train.data.batches import Batches
from train.data.corpus import EncodedCorpus, encode_corpus
from train.data.packing import pack_in_order
from train.data.sources import load_split
from train.parallel import DataParallel, Runner, completed
from train.scores import bleu_metric, perplexity, score
from train.step import make_eval_step

# The most tokens of a sentence: with so many, attention of 8 heads takes 3 GB.
_LONGEST = 10_000


def check_lengths(model: TransformerConfig, corpus: EncodedCorpus) -> None:
    """Raise `UserError` if a sentence is too long to be scored.

    A longer one would reach past the learned positions, or its attention would fill the memory.
    """
    lengths = np.maximum(corpus.source.lengths, corpus.target.lengths)
    row = int(lengths.argmax())
    longest = int(lengths[row])
    if longest > _LONGEST:
        raise UserError(
            f"sentence {row + 1} of those that are scored has {longest:,} tokens, more than "
            f"{_LONGEST:,}: split it or leave it out"
        )
    if model.num_positions is not None and longest > model.num_positions:
        raise UserError(
            f"the longest sentence has {longest} tokens but model.max_length is "
            f"{model.max_length} learned positions: raise it and train, or leave the sentence out"
        )


class LossEvaluator:
    """Loss of a corpus, packed into rows; every pair counts once, however long it is.

    Args:
      model: without parameters.
      corpus: token ids of the pairs.
      source_length, target_length: positions of a row; rows are longer if a sentence needs it.
      rows_per_batch: rows of a batch, rounded up so that all devices have the same number; fewer
        if rows are longer.
      runner: how the devices share the work.
    """

    def __init__(
        self,
        model: Transformer,
        corpus: EncodedCorpus,
        *,
        source_length: int,
        target_length: int,
        rows_per_batch: int,
        runner: Runner,
    ) -> None:
        packing = pack_in_order(
            corpus.source.lengths,
            corpus.target.lengths,
            source_length=source_length,
            target_length=target_length,
        )
        # Rows are longer if a sentence needs it, and the memory of attention grows with the square
        # of their length: a batch has fewer rows in the same proportion.
        longer = max(packing.source_length, packing.target_length) / max(
            source_length, target_length
        )
        rows_per_batch = max(1, int(rows_per_batch / max(1.0, longer) ** 2))
        rows = completed(min(rows_per_batch, packing.num_rows), runner.row_parts)
        self._batches = Batches([[(corpus, packing)]], rows, seed=None)
        self._runner = runner
        self._eval_step = runner.parallel_eval_step(make_eval_step(model))

    def __call__(self, params: Any) -> dict[str, float]:
        """Return means per token: "loss", label-smoothed as in training, "nll" and "perplexity".

        Natural logarithms; eos counts as a token; the perplexity is exp(nll).
        """
        batches = self._batches
        sums = np.zeros(3)
        for step in range(batches.steps_per_epoch):
            batch = self._runner.place(batches.rows_per_batch, partial(batches.at, step))
            # float waits for each step: on CPUs, collectives of programs that run concurrently may
            # start in different orders in different processes, a deadlock.
            sums += list(map(float, self._eval_step(params, batch)))
        loss, nll, weight = sums.tolist()
        return {
            "loss": loss / weight,
            "nll": nll / weight,
            "perplexity": perplexity(nll / weight),
        }


def make_translate(
    translator: Translator, config: EvaluateConfig, *, beam_size: int
) -> Callable[..., list[str]]:
    """Return the translation function that a configuration asks for."""
    options = dataclasses.asdict(config.search(beam_size))
    del options["n_best"]  # `translate` returns one
    return partial(translator.translate, few_shapes=True, **options)


def evaluate_run(
    run: str,
    *,
    split: str | None = None,
    files: tuple[str, str] | None = None,
    checkpoint: str | None = None,
    dtype: Precision | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Translate and score a split of a run's own data, or two text files.

    Args:
      run: the run directory.
      split: "train", "validation" or "test" of the run's data, by default "test".
      files: a source and a reference text file, instead of a split.
      checkpoint, dtype: as for `Translator.load`.
      **changes: fields of `EvaluateConfig` to use instead of the run's.

    Returns:
      loss, nll, perplexity (per token, natural logarithm; not for int8, which has no loss), bleu,
      chrf, exact_match and signatures; and the translations.

    Raises:
      UserError: the run or the data cannot be used.
    """
    # An imported model has no sections about training: their defaults apply.
    settings = dataclasses.replace(read_section(run, "evaluate"), **changes)
    data: DataConfig = read_section(run, "data")
    bleu_metric(settings.bleu_tokenize)
    if files is not None and split is not None:
        raise UserError("a split and two files are given: give one or the other")
    split = split or "test"
    if files is not None:
        data = dataclasses.replace(data, path=None, dataset=None, test=files)
    elif data == DataConfig():
        raise UserError(
            f"{run} was not trained here and names no data: give --source and --reference"
        )
    if not getattr(data, split):
        raise UserError(
            f"{run} has no {split} split: give --split validation, or --source and --reference"
        )
    translator = Translator.load(run, checkpoint, dtype=dtype)
    model = translator.config
    pairs = load_split(data, split)
    corpus = encode_corpus(
        pairs, translator.source_tokenizer, translator.target_tokenizer, data.cache_dir
    )
    losses: dict[str, float] = {}
    if not model.quantized:
        check_lengths(model, corpus)
        losses = LossEvaluator(
            Transformer(model),
            corpus,
            source_length=data.target_length,
            target_length=data.target_length,
            rows_per_batch=jax.device_count() * -(-4096 // data.target_length),
            runner=DataParallel(),
        )(translator.params)
    hypotheses = make_translate(translator, settings, beam_size=settings.beam_size)(
        pairs["source"][:]
    )
    quality = score(hypotheses, pairs["target"][:], bleu_tokenize=settings.bleu_tokenize)
    return losses | quality.to_dict(), hypotheses
