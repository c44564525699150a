"""The configuration of a training run: nested, frozen, checked, set from the command line."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from flax.traverse_util import flatten_dict

from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError
from jaxformer.fields import check_fields
from jaxformer.generation_config import GenerationConfig, PenaltyForm
from jaxformer.run_directory import CONFIG_FILE, read_config


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the sentence pairs come from and how they become batches.

    `train`, `validation` and `test` hold one or two names each: a split of the hub data set
    `dataset`; or a table file (.tsv, .csv, .jsonl, .json, .parquet); or a prefix P of the two text
    files P.<source> and P.<target>; or, two names, the source file and the target file. Each name
    of `extra` is a table file or a prefix, also beside a hub data set.
    """

    path: str | None = None
    """folder that relative file names start from"""
    dataset: str | None = None
    """name of a Hugging Face data set, or "builtin" for the English-Korean corpus"""
    dataset_config: str | None = None
    """configuration of the data set, such as "de-en" of wmt/wmt14"""
    train: tuple[str, ...] = ("train",)
    """training pairs"""
    extra: tuple[str, ...] = ()
    """more training corpora to mix in, such as back-translations: local tables or prefixes"""
    weights: tuple[float, ...] = ()
    """proportions of train and of each extra corpus in every batch; by default their sizes"""
    validation: tuple[str, ...] = ("validation",)
    """pairs to choose checkpoints and settings by"""
    test: tuple[str, ...] = ()
    """pairs for the final score, never looked at before"""
    source: str = "source"
    """source column ("translation.en" looks into a dictionary) or suffix of the text files"""
    target: str = "target"
    """target column or suffix"""
    joint_vocabulary: bool = True
    """learn one vocabulary for both sides together"""
    tokenizer_type: Literal["bpe", "unigram"] = "bpe"
    """how sentencepiece learns the model.vocab_size pieces, on 2 million sentences at most"""
    subword_dropout: float = 0.0
    """share of byte-pair merges left out of training text: its words are split in several ways"""
    segmentations: int = 10
    """with subword_dropout, number of ways to split training text; the epochs use them in turn"""
    target_length: int = 128
    """target positions of a packed row; longer sentences are left out of training"""
    source_length: int = 0
    """source positions of a packed row; 0 chooses the shortest that keeps target rows full"""
    batch_tokens: int = 25_000
    """target positions of a step, over all devices and accumulation steps together"""
    cache_dir: str | None = None
    """where text and token ids are kept; by default in the cache of Hugging Face datasets"""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if self.source == self.target:
            raise UserError(f"data.source and data.target are both {self.source!r}: name two")
        if not 0.0 <= self.subword_dropout < 1.0:
            raise UserError(f"data.subword_dropout is {self.subword_dropout}: give 0 up to below 1")
        if self.subword_dropout and self.tokenizer_type != "bpe":
            raise UserError(
                f"data.subword_dropout is {self.subword_dropout} but data.tokenizer_type is "
                f"{self.tokenizer_type!r}, which merges nothing: set it to 'bpe'"
            )
        if self.segmentations < 1:
            raise UserError(f"data.segmentations is {self.segmentations}: give at least 1")
        if self.target_length < 2:
            raise UserError(f"data.target_length is {self.target_length}: give at least 2")
        if self.source_length < 0 or self.source_length == 1:
            raise UserError(f"data.source_length is {self.source_length}: give at least 2, or 0")
        if self.batch_tokens < self.target_length:
            raise UserError(
                f"data.batch_tokens is {self.batch_tokens}: give at least a row of "
                f"data.target_length={self.target_length}"
            )
        if self.weights and len(self.weights) != 1 + len(self.extra):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for {1 + len(self.extra)} training "
                "corpora: give one for data.train, then one for each of data.extra"
            )
        if not all(1e-9 <= weight <= 1e9 for weight in self.weights):
            raise UserError(f"data.weights are {self.weights}: give numbers above 0, at most 1e9")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its learning-rate schedule (§5.3)."""

    peak_learning_rate: float | None = None
    """highest learning rate; by default the paper's (d_model · warmup_steps)^-0.5"""
    warmup_steps: int = 4000
    """steps of linear warm-up, before decay with the inverse square root of the step"""
    cooldown_steps: int = 0
    """last steps, in which the rate falls linearly to 0; none with 0, as in the paper"""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW), times the learning rate"""
    clip_norm: float = 0.0
    """largest norm of a step's gradient; 0 does not clip"""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        if self.warmup_steps < 1:
            raise UserError(f"optimizer.warmup_steps is {self.warmup_steps}: give at least 1")
        if self.cooldown_steps < 0:
            raise UserError(f"optimizer.cooldown_steps is {self.cooldown_steps}: give 0 or more")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: give 0 up to below 1")
        if not 0.0 < self.epsilon < math.inf:
            raise UserError(f"optimizer.epsilon is {self.epsilon}: give more than 0")
        for name in ("weight_decay", "clip_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: give at least 0")
        if self.peak_learning_rate is not None and not 0.0 < self.peak_learning_rate < math.inf:
            raise UserError(
                f"optimizer.peak_learning_rate is {self.peak_learning_rate}: give more than 0"
            )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """When to evaluate, what decides, and how to decode."""

    every: int = 0
    """steps between evaluations, each of which saves a checkpoint; 0 is once an epoch"""
    metric: Literal["bleu", "chrf", "loss"] = "bleu"
    """validation metric of the best checkpoint and of early stopping"""
    patience: int = 0
    """evaluations without improvement before training stops; 0 never stops early"""
    validation_beam_size: int = 1
    """beams while training; 1 is greedy"""
    beam_size: int = 4
    """beams of the final evaluation"""
    length_penalty: float = 0.6
    """alpha of the length penalty"""
    length_penalty_form: PenaltyForm = "gnmt"
    """((5 + length) / 6)^alpha as in the paper, or length^alpha as in fairseq"""
    bleu_tokenize: str = "13a"
    """sacreBLEU's tokenizer; "none" for text that is tokenised already"""

    def __post_init__(self) -> None:
        check_fields(self, "evaluate.")
        for name in ("every", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"evaluate.{name} is {getattr(self, name)}: give at least 0")
        for name in ("validation_beam_size", "beam_size"):
            try:
                self.search(getattr(self, name))
            except UserError as error:
                raise UserError(f"evaluate.{str(error).replace('beam_size', name)}") from error

    def search(self, beam_size: int) -> GenerationConfig:
        """Return the settings of the search, with `beam_size` beams and one translation each."""
        return GenerationConfig(
            beam_size=beam_size,
            n_best=1,
            length_penalty=self.length_penalty,
            length_penalty_form=self.length_penalty_form,
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay on disk and how many are averaged at the end."""

    keep_last: int = 5
    """latest checkpoints to keep"""
    keep_best: int = 1
    """best checkpoints to keep in addition"""
    average: int = 5
    """latest checkpoints to average when training ends (§6.1); 1 averages none"""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint.")
        if self.keep_last < 1 or self.keep_best < 0 or self.average < 1:
            raise UserError(
                f"checkpoint.keep_last is {self.keep_last}, keep_best {self.keep_best} and average "
                f"{self.average}: give at least 1, 0 and 1"
            )
        if self.average > self.keep_last:
            raise UserError(
                f"checkpoint.average is {self.average} but only keep_last={self.keep_last} "
                "checkpoints stay: raise checkpoint.keep_last"
            )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices share the work; of what is computed only dropout's noise depends on it."""

    strategy: Literal["pmap", "mesh"] = "pmap"
    """pmap: every device has the whole model; mesh: data x fsdp x tensor, for models too large"""
    fsdp: int = 1
    """with mesh: devices that parameters and optimizer state are spread over"""
    tensor: int = 1
    """with mesh: devices that heads, hidden layers and vocabulary are spread over"""
    coordinator: str | None = None
    """with --distributed True, HOST:PORT of process 0, where JAX does not find it by itself"""
    processes: int | None = None
    """with coordinator: how many processes there are"""
    process: int | None = None
    """with coordinator: which of them this is, from 0"""

    def __post_init__(self) -> None:
        check_fields(self, "parallel.")
        for name in ("fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name} is {getattr(self, name)}: give at least 1")
        if self.strategy == "pmap" and (self.fsdp > 1 or self.tensor > 1):
            raise UserError(
                f"parallel.fsdp={self.fsdp} and parallel.tensor={self.tensor} need "
                "--parallel.strategy mesh: pmap keeps the whole model on every device"
            )
        told = (self.coordinator, self.processes, self.process)
        if any(value is None for value in told) and any(value is not None for value in told):
            raise UserError(
                "parallel.coordinator, parallel.processes and parallel.process go together: "
                "give all three, or none where JAX finds the other hosts by itself"
            )
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise UserError(
                f"parallel.coordinator is {self.coordinator!r}: give HOST:PORT, any free port of "
                "the host of process 0"
            )
        if self.process is not None and not 0 <= self.process < (self.processes or 0):
            raise UserError(
                f"parallel.process is {self.process} of parallel.processes={self.processes}: "
                "count from 0"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole experiment. `python -m train fit CONFIG --section.field VALUE` changes any field."""

    run: str = ""
    """run directory; by default runs/CONFIG"""
    steps: int = 100_000
    """optimizer steps"""
    accumulate: int = 1
    """parts a device splits its batch into, to save memory; rounding and dropout noise change"""
    seed: int = 0
    """random seed of initialisation, data order and dropout"""
    log_every: int = 50
    """steps between progress reports"""
    distributed: bool = False
    """one of several processes, as on a TPU pod: wait for the others (jax.distributed)"""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "run", os.path.expanduser(self.run))
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give at least 0")
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.optimizer.cooldown_steps > self.steps:
            raise UserError(
                f"optimizer.cooldown_steps is {self.optimizer.cooldown_steps} and steps is "
                f"{self.steps}: give at most {self.steps}"
            )
        if self.parallel.coordinator is not None and not self.distributed:
            raise UserError("parallel.coordinator is given: give --distributed True with it")
        if self.model.quantized:
            raise UserError(
                "model.quantized is True, but int8 cannot be trained: leave it out, and "
                "translate with --dtype int8"
            )
        if self.model.embeddings == "shared" and not self.data.joint_vocabulary:
            raise UserError(
                "data.joint_vocabulary is False but model.embeddings is 'shared': share a "
                "vocabulary, or set model.embeddings to 'target' or 'separate'"
            )
        if self.model.source_vocab_size not in (None, self.model.vocab_size):
            raise UserError(
                f"model.source_vocab_size is {self.model.source_vocab_size}, but the trainer "
                "learns vocabularies of model.vocab_size pieces: leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, nested, as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`. Missing fields keep their defaults."""
        return _from_dict(cls, fields, "")


def _from_dict(cls: type, fields: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(fields, Mapping):
        raise UserError(f"{prefix.rstrip('.')} is {fields!r}: give an object with its fields")
    hints = get_type_hints(cls)
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise UserError(f"unknown field {prefix}{name}: choose one of {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[name]):
            value = _from_dict(hints[name], value, f"{prefix}{name}.")
        values[name] = value
    return cls(**values)


def flatten(config: TrainConfig | dict[str, Any]) -> dict[str, Any]:
    """Return {"model.d_model": 512, …}: every field under the name the command line gives it.

    Args:
      config: the configuration, or the nested dictionary that config.json holds.
    """
    fields = config if isinstance(config, dict) else dataclasses.asdict(config)
    return flatten_dict(fields, sep=".")


def read_section(run: str | Path, name: str) -> Any:
    """Return a section of a run's configuration, or its defaults if the run has no such section.

    Raises:
      UserError: as for `read_train_config`.
    """
    section, saved = get_type_hints(TrainConfig)[name], read_config(run).get(name, {})
    try:
        return _from_dict(section, saved, f"{name}.")
    except UserError as error:
        raise UserError(f"{run}/{CONFIG_FILE}: {error}") from error


def read_train_config(run: str | Path) -> TrainConfig:
    """Return the configuration that a run was trained with.

    Raises:
      UserError: the directory holds no run of `train`, or one of another version.
    """
    saved = read_config(run)
    saved.pop("version")
    try:
        return TrainConfig.from_dict(saved)
    except UserError as error:
        raise UserError(f"{run}/{CONFIG_FILE}: {error}") from error
