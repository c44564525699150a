"""From a configuration to the data of a run: splits, tokenizers, token ids, batches."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxformer.errors import UserError, reason
from jaxformer.files import write_text
from jaxformer.run_directory import (
    CONFIG_FILE,
    SOURCE_TOKENIZER_FILE,
    TARGET_TOKENIZER_FILE,
    TOKENIZER_FILE,
    checkpoint_steps,
    load_tokenizers,
    read_config,
    write_config,
)
from jaxformer.tokenizer import Tokenizer
from train.config import TrainConfig, flatten, read_train_config
from train.data.arrow import cache_folder
from train.data.batches import Batches
from train.data.corpus import EncodedCorpus, encode_corpus
from train.data.mixture import Mixture
from train.data.packing import choose_source_length, pack
from train.data.sources import load_extra, load_split
from train.data.tokenizer import learn_tokenizers
from train.evaluate import check_lengths

if TYPE_CHECKING:
    import datasets

# Digests of the sentences' lengths.
_LENGTHS_FILE = "lengths.json"

# What may differ from the run directory's config.json when a run goes on: how long and how
# closely watched it is, where its files lie and what it takes of memory, not what is trained.
_MAY_CHANGE = (
    "run",
    "steps",
    "log_every",
    "distributed",
    "data.path",
    "data.test",
    "data.cache_dir",
    "accumulate",
    "model.remat",
    "model.scan_layers",
    "model.flash_attention",
)
_MAY_CHANGE_SECTIONS = ("evaluate.", "checkpoint.", "parallel.")


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
      pairs: the splits "train", "validation" and, if there is one, "test".
      source_tokenizer, target_tokenizer: one object twice if the vocabulary is joint.
      validation: the validation split as token ids.
      batches: the training batches.
      rows_per_step: rows of a batch, completed with empty ones to be shared out evenly.
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
    run = Path(config.run)
    _check_same_run(config, run)
    splits = ["train", "validation", *(["test"] if config.data.test else [])]
    pairs = {split: load_split(config.data, split) for split in splits}
    training = [pairs["train"], *(load_extra(config.data, name) for name in config.data.extra)]
    if jax.process_index() == 0:
        write_config(run, config.to_dict())
    tokenizers = _tokenizers(config, run, training)
    corpora = [_segmentations(config, dataset, tokenizers) for dataset in training]
    validation = encode_corpus(pairs["validation"], *tokenizers, config.data.cache_dir)
    names = ["data.train", *config.data.extra]
    trained = {name: parts[0] for name, parts in zip(names, corpora, strict=True)}
    _check_same_text(run, trained | {"data.validation": validation})
    batches = make_batches(config, corpora)
    check_lengths(config.model, validation)
    _check_packed_positions(config, batches)
    if config.accumulate > batches.rows_per_batch:
        raise UserError(
            f"accumulate is {config.accumulate}: give at most {batches.rows_per_batch}, the rows "
            "of a batch"
        )
    parts = jax.device_count() * config.accumulate
    rows = -(-batches.rows_per_batch // parts) * parts
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
    """Pack the training corpora; the same batches whatever devices and hosts there are.

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
    if len(packed) == 1:
        return Batches(packed[0], rows, seed=config.seed)
    weights = data.weights or [segmentations[0][1].num_rows for segmentations in packed]
    return Mixture(packed, weights, rows, seed=config.seed)


def _check_same_run(config: TrainConfig, run: Path) -> None:
    """A run directory holds one experiment: refuse to go on with another one in it.

    Without a checkpoint there is nothing to go on with, and what is there is written anew: a run
    that failed at its start takes a configuration that is mended. What is no run is left alone.
    """
    if not (run / CONFIG_FILE).exists():
        if checkpoint_steps(run):
            raise UserError(
                f"{run} has checkpoints but no {CONFIG_FILE}: restore it, or choose another --run"
            )
        return
    try:
        if not checkpoint_steps(run):
            read_config(run)
            return
        before = flatten(read_train_config(run))
    except UserError as error:
        raise UserError(f"{error}; choose another --run") from error
    cooldown, reached = before["optimizer.cooldown_steps"], checkpoint_steps(run)[-1]
    falls_from = before["steps"] - cooldown
    if config.steps < reached:
        raise UserError(
            f"{run} is at step {reached} and steps is {config.steps}: give at least that"
        )
    if config.steps != before["steps"] and cooldown and falls_from < reached:
        raise UserError(
            f"{run} has steps={before['steps']}, and since step {falls_from} its learning rate "
            f"falls towards that: give that value to go on, or another --run to train for "
            f"{config.steps}"
        )
    if config.steps != before["steps"] and cooldown and config.steps - cooldown < reached:
        raise UserError(
            f"{run} is at step {reached}, and with steps={config.steps} its learning rate would "
            f"fall from step {config.steps - cooldown} on: give at least {reached + cooldown}"
        )
    for name, value in flatten(config).items():
        if name in _MAY_CHANGE or name.startswith(_MAY_CHANGE_SECTIONS):
            continue
        if before[name] != value:
            raise UserError(
                f"{run} holds a run with {name}={before[name]!r}, not {value!r}: "
                "give that value to go on with it, or another --run to start anew"
            )


def _check_same_text(run: Path, corpora: Mapping[str, EncodedCorpus]) -> None:
    """Refuse to go on with text that is not what the run has seen, though it has the same name.

    It is known again by the lengths of all sentences, in tokens of the run's own vocabulary: at no
    cost, and whatever program or version has stored it.
    """
    here = {
        name: sha256(
            b"".join(
                side.lengths.astype("<i4").tobytes() for side in (corpus.source, corpus.target)
            )
        ).hexdigest()
        for name, corpus in corpora.items()
    }
    path = run / _LENGTHS_FILE
    if checkpoint_steps(run) and path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({reason(error)}): delete it, to go on") from error
        for name, digest in here.items():
            if before.get(name) != digest:
                raise UserError(
                    f"{run} has seen other text as {name}: give that to go on with it, or another "
                    "--run to start anew"
                )
    elif jax.process_index() == 0:
        write_text(path, json.dumps(here, indent=2) + "\n", advice="choose another --run")


def _tokenizers(
    config: TrainConfig, run: Path, training: "Sequence[datasets.Dataset]"
) -> tuple[Tokenizer, Tokenizer]:
    """Load the run's tokenizers; if it has no checkpoint yet, one process learns them for all."""
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
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("tokenizers")
    return load_tokenizers(run, config.model)


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
