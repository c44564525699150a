"""The story of a run: build, restore, step, report, evaluate, save; in the end average and test."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.errors import UserError
from jaxformer.run import (
    SOURCE_TOKENIZER_FILE,
    TOKENIZER_FILE,
    load_tokenizers,
    read_config,
    write_config,
)
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from train.checkpoint import Checkpoints
from train.config import EvaluateConfig, TrainConfig, flatten
from train.data.batches import Batches
from train.data.corpus import EncodedCorpus, encode_corpus
from train.data.packing import Packing, choose_source_length, pack
from train.data.sources import load_split
from train.data.tokenizer import learn_tokenizers
from train.evaluate import LossEvaluator, Quality, decoder, score
from train.metrics import MetricsWriter, read_metrics
from train.parallel import data_parallel_train, host_rows, prefetch, split_rows
from train.progress import Progress
from train.state import create_state, make_optimizer, make_schedule
from train.step import make_train_step

# What may differ from the run directory's config.json when a run is resumed: how long and how
# closely watched it is, not what is trained.
_MAY_CHANGE = ("run", "steps", "log_every", "data.path", "data.cache_dir", "data.test")
_MAY_CHANGE_SECTIONS = ("evaluate.", "checkpoint.")


def fit(config: TrainConfig) -> Path:
    """Train as `config` says, or go on where the run directory stands; return the directory.

    Raises:
      UserError: the configuration, the data or the run directory cannot be used, or the loss
        became nan.
    """
    run = Path(config.run)
    chief = jax.process_index() == 0
    rows_per_batch = _rows_per_batch(config)
    _check_same_run(config, run)

    pairs = {split: load_split(config.data, split) for split in ("train", "validation")}
    if config.data.test:
        pairs["test"] = load_split(config.data, "test")
    if chief:
        write_config(run, config.to_dict())
    source_tokenizer, target_tokenizer = _tokenizers(config, run, pairs["train"])
    corpus, validation_corpus = (
        encode_corpus(pairs[split], source_tokenizer, target_tokenizer, config.data.cache_dir)
        for split in ("train", "validation")
    )
    packing = _pack(config, corpus)
    batches = Batches(corpus, packing, rows_per_batch, seed=config.seed)
    evaluate_every = config.evaluate.every or batches.steps_per_epoch

    model = Transformer(config.model)
    schedule = make_schedule(config.optimizer, config.model.d_model)
    optimizer = make_optimizer(config.optimizer, schedule)
    init_rng, dropout_rng = jax.random.split(jax.random.key(config.seed))
    state = create_state(model, optimizer, init_rng)
    train_step = data_parallel_train(
        make_train_step(model, optimizer, schedule, accumulate=config.accumulate)
    )
    validation_loss = LossEvaluator(
        model,
        validation_corpus,
        source_length=packing.source_length,
        target_length=packing.target_length,
        rows_per_batch=rows_per_batch,
    )

    def translator(params: Any) -> Translator:
        # On one device: decoding would otherwise repeat itself on every one.
        params = jax.device_put(params, jax.local_devices()[0])
        return Translator(config.model, params, source_tokenizer, target_tokenizer)

    def evaluate(params: Any, split: str, *, beam_size: int) -> tuple[Quality, list[str]]:
        translate = decoder(translator(params), config.evaluate, beam_size=beam_size)
        hypotheses = translate(pairs[split]["source"][:])
        references = pairs[split]["target"][:]
        quality = score(hypotheses, references, bleu_tokenize=config.evaluate.bleu_tokenize)
        return quality, hypotheses

    def make_batch(step: int) -> tuple[dict[str, np.ndarray], int]:
        batch = batches.at(step, host_rows(rows_per_batch))
        return split_rows(batch), int(np.count_nonzero(batch["labels"]))

    metric = config.evaluate.metric
    with Checkpoints(
        run,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        metric=metric,
        mode="min" if metric == "loss" else "max",
    ) as checkpoints:
        if (latest := checkpoints.latest_step()) is not None:
            state = checkpoints.restore(state, latest)
        start = latest or 0
        with (
            MetricsWriter(run, start_step=start, active=chief) as writer,
            Progress(config.steps, start, active=chief) as progress,
        ):
            for line in _describe(config, state.params, corpus, packing, batches, start):
                progress.message(line)
            report = _Report(writer, progress, batches.steps_per_epoch)
            stopped = _out_of_patience(config.evaluate, read_metrics(run)) if start else False
            steps = range(start, start if stopped else config.steps)
            for step, (batch, _) in zip(
                steps, report.timed(prefetch(make_batch, steps)), strict=True
            ):
                state, metrics = train_step(state, batch, dropout_rng)
                report.add(metrics)
                done = step + 1
                evaluating = done % evaluate_every == 0 or done == config.steps
                if done % config.log_every == 0 or evaluating or done == start + 1:
                    report.flush(done)
                if not evaluating:
                    progress.update(done)
                    continue
                began = time.monotonic()
                quality, _ = evaluate(
                    state.params, "validation", beam_size=config.evaluate.validation_beam_size
                )
                values = validation_loss(state.params) | quality.to_dict()
                writer.write(done, "validation", values)
                checkpoints.save(state, _numbers(values))
                progress.message(
                    f"step {done:,}: validation loss {values['loss']:.3f}  ppl "
                    f"{values['perplexity']:.2f}  {quality.bleu.name} {quality.bleu.value:.2f}  "
                    f"{quality.chrf.name} {quality.chrf.value:.2f}  exact match "
                    f"{quality.exact_match:.1%}  ({time.monotonic() - began:.1f}s)"
                )
                report.restart_clock()
                if _out_of_patience(config.evaluate, read_metrics(run)):
                    progress.message(
                        f"no gain in {metric} over {config.evaluate.patience} evaluations: stopping"
                    )
                    break
            done = int(state.step)
            averaged = checkpoints.all_steps()[-config.checkpoint.average :]
            params = state.params
            if len(averaged) > 1:
                params = checkpoints.average(averaged)
                checkpoints.save_average(params, averaged)
                progress.message(f"averaged the checkpoints of steps {_join(averaged)}")
            for split in list(pairs)[1:]:
                quality, hypotheses = evaluate(params, split, beam_size=config.evaluate.beam_size)
                writer.write(done, f"final_{split}", quality.to_dict())
                progress.message(f"\n{split}, beam {config.evaluate.beam_size}:\n{quality}")
            for line in _examples(pairs[split], hypotheses):
                progress.message(line)
    return run


def _rows_per_batch(config: TrainConfig) -> int:
    """Rows of the global batch, a multiple of the parts it is split into."""
    parts = jax.device_count() * config.accumulate
    rows = config.data.batch_tokens // config.data.target_length // parts * parts
    if rows == 0:
        raise UserError(
            f"data.batch_tokens={config.data.batch_tokens} is less than one row of "
            f"data.target_length={config.data.target_length} for each of {parts} parts "
            f"({jax.device_count()} devices x accumulate={config.accumulate}): "
            f"give at least {parts * config.data.target_length}"
        )
    return rows


def _check_same_run(config: TrainConfig, run: Path) -> None:
    """A run directory holds one experiment: refuse to go on with another one in it."""
    if not (run / "config.json").exists():
        return
    saved = read_config(run)
    saved.pop("version")
    try:
        before = flatten(TrainConfig.from_dict(saved))
    except UserError as error:
        raise UserError(f"{run}/config.json: {error}; choose another --run") from error
    for name, value in flatten(config).items():
        if name in _MAY_CHANGE or name.startswith(_MAY_CHANGE_SECTIONS):
            continue
        if before[name] != value:
            raise UserError(
                f"{run} holds a run with {name}={before[name]!r}, not {value!r}: "
                "give that value to go on with it, or another --run to start anew"
            )


def _tokenizers(config: TrainConfig, run: Path, train: Any) -> tuple[Tokenizer, Tokenizer]:
    """Load the run's tokenizers, or learn them on the training split, one process for all."""
    first = TOKENIZER_FILE if config.data.joint_vocabulary else SOURCE_TOKENIZER_FILE
    if jax.process_index() == 0 and not (run / first).exists():
        learn_tokenizers(
            train,
            run,
            vocab_size=config.model.vocab_size,
            joint=config.data.joint_vocabulary,
            model_type=config.data.tokenizer_type,
        )
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("tokenizers")
    return load_tokenizers(run)


def _pack(config: TrainConfig, corpus: EncodedCorpus) -> Packing:
    source_lengths, target_lengths = corpus.source.lengths, corpus.target.lengths
    source_length = config.data.source_length or choose_source_length(
        source_lengths, target_lengths, config.data.target_length, seed=config.seed
    )
    return pack(
        source_lengths,
        target_lengths,
        source_length=source_length,
        target_length=config.data.target_length,
        seed=config.seed,
    )


class _Report:
    """Collects the metrics of steps and shows their means now and then.

    Between reports nothing waits for the device, so that it always has the next step queued.
    """

    def __init__(self, writer: MetricsWriter, progress: Progress, steps_per_epoch: int) -> None:
        self._writer, self._progress = writer, progress
        self._steps_per_epoch = steps_per_epoch
        self._pending: list[dict[str, jax.Array]] = []
        self._waited = 0.0
        self._start = time.monotonic()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on and note how long each was waited for."""
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._pending.append(metrics)

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training."""
        self._start, self._waited = time.monotonic(), 0.0

    def flush(self, step: int) -> None:
        """Report the steps since the last time; raises `UserError` if a loss was not finite."""
        steps = jax.device_get(self._pending)
        seconds = time.monotonic() - self._start
        tokens = sum(float(metrics["tokens"]) for metrics in steps)
        for ago, metrics in enumerate(reversed(steps)):
            if not math.isfinite(metrics["loss"]):
                raise UserError(
                    f"the loss is {metrics['loss']} at step {step - ago}: lower "
                    "optimizer.peak_learning_rate or set optimizer.clip_norm; the checkpoints "
                    "saved before are intact"
                )

        def mean(name: str) -> float:
            return sum(float(m[name]) * float(m["tokens"]) for m in steps) / max(tokens, 1.0)

        values = {
            "loss": mean("loss"),
            "nll": mean("nll"),
            "perplexity": math.exp(min(mean("nll"), 700.0)),
            "gradient_norm": float(np.mean([m["gradient_norm"] for m in steps])),
            "learning_rate": float(steps[-1]["learning_rate"]),
            "target_tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "host_wait": self._waited / seconds,
            "epoch": step / self._steps_per_epoch,
        }
        self._writer.write(step, "train", values)
        self._progress.update(step, values)
        self._pending = []
        self.restart_clock()


def _out_of_patience(config: EvaluateConfig, records: list[dict[str, Any]]) -> bool:
    """Whether the last `patience` evaluations all failed to beat the best before them."""
    sign = -1.0 if config.metric == "loss" else 1.0
    values = [
        sign * record[config.metric]
        for record in records
        if record["split"] == "validation" and record.get(config.metric) is not None
    ]
    if config.patience == 0 or len(values) <= config.patience:
        return False
    return max(values[-config.patience :]) <= max(values[: -config.patience])


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _describe(
    config: TrainConfig,
    params: Any,
    corpus: EncodedCorpus,
    packing: Packing,
    batches: Batches,
    start: int,
) -> Iterator[str]:
    """What is about to happen, in a few lines."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = jax.devices()[0]
    yield f"run        {config.run}" + (f", from step {start:,}" if start else "")
    yield f"devices    {jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    yield f"model      {size / 1e6:.2f} million parameters, {config.model.dtype}"
    left_out = [
        f"{len(rows):,} {why}"
        for why, rows in (("empty", packing.empty), ("too long", packing.too_long))
        if len(rows)
    ]
    yield f"data       {len(corpus):,} pairs" + (
        f" ({' and '.join(left_out)} left out)" if left_out else ""
    )
    yield (
        f"batches    {batches.rows_per_batch} rows of {packing.source_length} source and "
        f"{packing.target_length} target positions, {packing.target_fill:.1%} of the target's "
        f"real; {batches.steps_per_epoch:,} steps an epoch"
    )


def _examples(pairs: Any, hypotheses: list[str], count: int = 5) -> Iterator[str]:
    """A few translations, evenly spread over the test set."""
    yield ""
    step = max(1, len(hypotheses) // count)
    for index in range(0, len(hypotheses), step)[:count]:
        row = pairs[index]
        yield f"source     {row['source']}\noutput     {hypotheses[index]}"
        yield f"reference  {row['target']}\n"


def _join(steps: list[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps)
