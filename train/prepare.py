"""From a configuration to the data of a run: splits, tokenizers, token ids, batches."""

import dataclasses
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxformer.checkpoints import checkpoint_steps
from jaxformer.errors import UserError
from jaxformer.run_directory import (
    SOURCE_TOKENIZER_FILE,
    TARGET_TOKENIZER_FILE,
    TOKENIZER_FILE,
    load_tokenizers,
    write_config,
)
from jaxformer.tokenizer import Tokenizer
from train.config import TrainConfig
from train.data.arrow import cache_folder
from train.data.batches import Batches
from train.data.corpus import EncodedCorpus, encode_corpus, text_digest
from train.data.packing import choose_source_length, pack
from train.data.sources import load_extra, load_split
from train.data.tokenizer import learn_tokenizers
from train.evaluate import check_lengths
from train.hosts import check_alike, together
from train.parallel import batch_parts, completed
from train.resume import check_same_run, check_same_text

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
      pairs: the splits "train", "validation" and, if there is one, "test".
      source_tokenizer, target_tokenizer: one object twice if the vocabulary is joint.
      validation: the validation split as token ids.
      batches: the training batches.
      rows_per_step: rows of a batch, with empty ones added so that they can be shared evenly.
    """

    pairs: "dict[str, datasets.Dataset]"
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    validation: EncodedCorpus
    batches: Batches
    rows_per_step: int


def prepare(config: TrainConfig) -> RunData:
    """Load and encode the data, and write what a translator needs into the run directory.

    Raises:
      UserError: the data or the run directory cannot be used.
    """
    run, cache_dir = Path(config.run), config.data.cache_dir
    with together():
        check_same_run(config, run)
        splits = ["train", "validation", *(["test"] if config.data.test else [])]
        pairs = {split: load_split(config.data, split) for split in splits}
        extra = [load_extra(config.data, name) for name in config.data.extra]
    if jax.process_count() > 1:
        texts = {f"data.{split}": dataset for split, dataset in pairs.items()}
        texts |= zip(config.data.extra, extra, strict=True)
        with together():
            folder = cache_folder(cache_dir)
            digests = {name: text_digest(text, folder).hex()[:16] for name, text in texts.items()}
        check_alike(digests, "these are digests of the text; give all processes the same")
    training = [pairs["train"], *extra]
    with together():
        _learn_tokenizers(config, run, training)
    with together():
        tokenizers = load_tokenizers(run, config.model)
        corpora = [_segmentations(config, dataset, tokenizers) for dataset in training]
        validation = encode_corpus(pairs["validation"], *tokenizers, cache_dir)
        names = ["data.train", *config.data.extra]
        trained = {name: parts[0] for name, parts in zip(names, corpora, strict=True)}
        check_same_text(run, trained | {"data.validation": validation})
        batches = make_batches(config, corpora)
        check_lengths(config.model, validation)
        _check_packed_positions(config, batches)
        if config.accumulate > batches.rows_per_batch:
            raise UserError(
                f"accumulate is {config.accumulate}: give at most {batches.rows_per_batch}, the "
                "rows of a batch"
            )
        rows = completed(batches.rows_per_batch, batch_parts(config))
    if jax.process_index() == 0:  # last: a refused command must not replace config.json
        write_config(run, config.to_dict())
    return RunData(pairs, *tokenizers, validation, batches, rows)


def _segmentations(
    config: TrainConfig, dataset: "datasets.Dataset", tokenizers: tuple[Tokenizer, Tokenizer]
) -> list[EncodedCorpus]:
    """Encode a training corpus, several times if its words are split at random."""
    data = config.data
    return [
        encode_corpus(dataset, *tokenizers, data.cache_dir, dropout=data.subword_dropout, seed=seed)
        for seed in range(data.segmentations if data.subword_dropout else 1)
    ]


def make_batches(config: TrainConfig, corpora: Sequence[Sequence[EncodedCorpus]]) -> Batches:
    """Pack the training corpora into batches, the same whatever devices and hosts there are.

    Args:
      config: of the run.
      corpora: the segmentations of each corpus.

    Raises:
      UserError: no pair of a corpus fits into a row.
    """
    data = config.data
    source_length = data.source_length or max(
        choose_source_length(
            corpus.source.lengths, corpus.target.lengths, data.target_length, seed=config.seed
        )
        for corpus in chain(*corpora)
    )
    packed = [
        [
            (
                corpus,
                pack(
                    corpus.source.lengths,
                    corpus.target.lengths,
                    source_length=source_length,
                    target_length=data.target_length,
                    seed=config.seed,
                ),
            )
            for corpus in segmentations
        ]
        for segmentations in corpora
    ]
    rows = max(1, data.batch_tokens // data.target_length)
    weights = data.weights or [segmentations[0][1].num_rows for segmentations in packed]
    return Batches(packed, rows, weights=weights, seed=config.seed)


def _learn_tokenizers(
    config: TrainConfig, run: Path, training: "Sequence[datasets.Dataset]"
) -> None:
    """Learn them in one process for all, if the run has no checkpoint yet."""
    if jax.process_index() == 0 and not checkpoint_steps(run):
        for name in (TOKENIZER_FILE, SOURCE_TOKENIZER_FILE, TARGET_TOKENIZER_FILE):
            (run / name).unlink(missing_ok=True)
        learn_tokenizers(
            training,
            run,
            vocab_size=config.model.vocab_size,
            joint=config.data.joint_vocabulary,
            model_type=config.data.tokenizer_type,
            cache=cache_folder(config.data.cache_dir),
        )


def _check_packed_positions(config: TrainConfig, batches: Batches) -> None:
    """Learned positions must reach the end of every sentence that is not left out of training."""
    positions = config.model.num_positions
    if positions is None:
        return
    longest = max(part.longest_sentence() for part in batches.parts)
    if longest > positions:
        raise UserError(
            f"the longest sentence has {longest} tokens but model.max_length is {positions} "
            "learned positions: raise model.max_length, or lower data.source_length and "
            "data.target_length, which leaves it out"
        )
