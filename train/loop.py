"""A run from start to end: build, restore, step, report, evaluate, save; then average and test."""

import time
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.checkpoints import find_checkpoint, load_params
from jaxformer.errors import UserError, machine_errors
from jaxformer.terminal import as_argument, warn
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from train.allocator import return_free_memory
from train.checkpoint import Checkpoints
from train.config import TrainConfig, flatten
from train.evaluate import LossEvaluator, make_translate
from train.hosts import (
    agreed,
    agreed_steps,
    check_alike,
    check_shared,
    initialize_hosts,
    noticing_lost_processes,
    together,
)
from train.lock import only_process, only_trainer
from train.log import Log, check_finite, describe, examples
from train.machine import describe_machine
from train.metrics import MetricsWriter, read_metrics
from train.parallel import make_runner
from train.preemption import Preempted, Preemption
from train.prefetch import prefetch
from train.prepare import RunData, prepare
from train.progress import Progress
from train.scores import Quality, bleu_metric, lower_is_better, score
from train.step import Batch, make_training

# Where a process finds its files and the other processes; all other fields are the same in all.
_OF_EACH_PROCESS = {
    "run",
    "data.path",
    "data.cache_dir",
    "parallel.coordinator",
    "parallel.process",
}


def fit(config: TrainConfig) -> Path:
    """Train as `config` says, from the last checkpoint if there is one; return the run directory.

    Raises:
      UserError: the configuration, the data or the run directory cannot be used; the loss became
        nan or infinite; a device has too little memory; or another process failed, or was given
        another configuration or other text.
      Preempted: SIGTERM arrived; the steps done so far are saved.
    """
    if not config.run:
        raise UserError("run is empty: name the directory to train in")
    run = Path(config.run)
    with (
        ExitStack() as held,
        machine_errors(
            "lower data.batch_tokens or, to train the same, raise accumulate or set model.remat"
        ),
        noticing_lost_processes(),
    ):
        if config.distributed:
            hosts = config.parallel
            held.enter_context(only_process(hosts.coordinator, hosts.process))
            initialize_hosts(hosts)
        with together():
            if jax.process_index() == 0:
                held.enter_context(only_trainer(run))
        check_shared(run)
        fields = flatten(config).items()
        check_alike(
            {name: value for name, value in fields if name not in _OF_EACH_PROCESS},
            "give all the same command",
        )
        _train(config, run)
    return run


def _train(config: TrainConfig, run: Path) -> None:
    bleu_metric(config.evaluate.bleu_tokenize)  # fails now rather than after an epoch
    runner, chief = make_runner(config), jax.process_index() == 0
    evaluate, metric = config.evaluate, config.evaluate.metric
    data = prepare(config)
    batches = data.batches
    with Checkpoints(
        run,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        metric=metric,
        mode="min" if lower_is_better(metric) else "max",
    ) as checkpoints:
        model = Transformer(config.model)
        training = make_training(model, config)
        init_rng, dropout_rng = jax.random.split(jax.random.key(config.seed))
        make_state = partial(training.create_state, init_rng)
        if not agreed_steps(checkpoints.all_steps()[-1:], 1):
            state = runner.create(make_state)
        else:
            saved = runner.abstract_state(jax.eval_shape(make_state))
            state = runner.from_saved(checkpoints.restore(saved))
        start = int(state.step)
        train_step = runner.parallel_train_step(training.train_step)
        validation_loss = LossEvaluator(
            model,
            data.validation,
            source_length=batches.source_length,
            target_length=batches.target_length,
            rows_per_batch=batches.rows_per_batch,
            runner=runner,
        )

        def load(step: int) -> Batch:
            return runner.place(data.rows_per_step, partial(batches.at, step))

        with (
            MetricsWriter(run, start_step=start, active=chief) as writer,
            Progress(config.steps, start, active=chief) as progress,
            Preemption() as preemption,
        ):
            for line in describe(config, state.params, batches, start):
                progress.message(line)
            writer.write(start, "start", describe_machine(jax.devices()))
            log = Log(writer, progress, batches, data.rows_per_step)
            history = _validation_history(run, metric, start)
            signatures_shown = False
            evaluate_every = evaluate.every or batches.steps_per_epoch
            steps = range(start, config.steps)

            def out_of_patience() -> bool:
                alone = _out_of_patience(history, metric, evaluate.patience)
                return bool(agreed(np.array([alone]))[0])

            def validate(params: Any, done: int) -> dict[str, float]:
                """Score the validation split; record and show its scores; return process 0's."""
                nonlocal signatures_shown
                began = time.monotonic()
                losses = validation_loss(params)
                check_finite("validation loss", losses["loss"], done)
                whole, beam_size = runner.whole(params), evaluate.validation_beam_size
                scored = _evaluate(config, data, whole, ["validation"], beam_size)
                quality, _ = scored["validation"]
                writer.write(done, "validation", losses | quality.to_dict())
                progress.message(
                    f"step {done:,}: validation loss {losses['loss']:.3f}  "
                    f"ppl {losses['perplexity']:.2f}  BLEU {quality.bleu.value:.2f}  "
                    f"chrF {quality.chrf.value:.2f}  exact match {quality.exact_match:.1%}  "
                    f"({time.monotonic() - began:.1f} s)"
                )
                if not signatures_shown:
                    signatures_shown = True
                    for name in (quality.bleu, quality.chrf):
                        progress.message(f"here {name.name} is {name.signature}")
                numbers = losses | {"bleu": quality.bleu.value, "chrf": quality.chrf.value}
                values = agreed(np.array(list(numbers.values())))
                return dict(zip(numbers, values.tolist(), strict=True))

            no_gain = f"no better {metric} in {evaluate.patience} evaluations: stopping"
            if out_of_patience():
                steps = range(0)
                progress.message(no_gain)
            ready = log.timed(prefetch(load, steps))
            for step, batch in zip(steps, ready, strict=True):
                state, metrics = train_step(state, batch, dropout_rng)
                log.add(metrics)
                done = step + 1
                evaluating = done % evaluate_every == 0 or done == config.steps
                if done % config.log_every == 0 or evaluating or step == start:
                    log.flush(done)
                if step == start:
                    return_free_memory()
                progress.update(done)
                if evaluating:
                    scores = validate(state.params, done)
                    checkpoints.save(runner.to_save(state), scores)
                    history.append(scores[metric])
                    log.restart_clock()
                if preemption.reached(done):
                    log.flush(done)  # raises if what is about to be saved is not finite
                    checkpoints.save(runner.to_save(state))
                    progress.message(
                        f"stopped by SIGTERM; step {done:,} is saved: run the same command again "
                        "to go on"
                    )
                    raise Preempted
                if evaluating and out_of_patience():
                    progress.message(no_gain)
                    break
            ready.close()  # otherwise its thread would go on waiting to hand over a batch

            try:
                preemption.stop_at_once()
                _finish(config, data, checkpoints, int(state.step), writer, progress)
            except Preempted:
                progress.message(
                    "stopped by SIGTERM; all steps are saved: run the same command again to score"
                )
                raise


def _finish(
    config: TrainConfig,
    data: RunData,
    checkpoints: Checkpoints,
    step: int,
    writer: MetricsWriter,
    progress: Progress,
) -> None:
    """Average the last checkpoints, translate and score all splits, and show a few translations.

    It scores what `Translator.load` would load: the average or, without one, the best checkpoint.
    """
    beam_size = config.evaluate.beam_size
    most = config.checkpoint.average
    averaged = agreed_steps(checkpoints.evaluated_steps()[-most:], most)
    if len(averaged) > 1:
        params, averaged = checkpoints.average(averaged)
        checkpoints.save_average(params, averaged)
        steps_text = ", ".join(f"{step:,}" for step in averaged)
        progress.message(f"averaged the checkpoints of steps {steps_text}")
    else:
        checkpoints.remove_average()
        params = load_params(config.run)
        progress.message(f"scoring checkpoint {find_checkpoint(config.run).name}")
    splits = [split for split in data.pairs if split != "train"]
    scored = _evaluate(config, data, params, splits, beam_size)
    for split, (quality, _) in scored.items():
        writer.write(step, f"final_{split}", quality.to_dict())
        progress.message(f"\n{split}, beam {beam_size}:\n{quality}")
    pairs, (_, hypotheses) = data.pairs[splits[-1]], scored[splits[-1]]
    for line in examples(pairs["source"][:], hypotheses, pairs["target"][:]):
        progress.message(line)
    progress.message(f"\ntry it: jaxformer translate {as_argument(config.run)}")


def _evaluate(
    config: TrainConfig, data: RunData, params: Any, splits: list[str], beam_size: int
) -> dict[str, tuple[Quality, list[str]]]:
    """Translate the splits and score each; every process does all of it, on its own devices."""
    translator = Translator(config.model, params, data.source_tokenizer, data.target_tokenizer)
    translate = make_translate(translator, config.evaluate, beam_size=beam_size)
    # All splits at once: the longest sentence of all decides which programs are compiled.
    lines = [line for split in splits for line in data.pairs[split]["source"][:]]
    in_parts: list[str] = []
    translations = iter(translate(lines, warn=in_parts.append))
    if in_parts and jax.process_index() == 0:  # a count: line numbers across splits mean nothing
        warn(
            f"{len(in_parts)} of the {len(lines)} sentences of {' and '.join(splits)} are "
            "longer than the model takes at once, and translated in parts: raise model.max_length"
        )
    scored = {}
    for split in splits:
        references = data.pairs[split]["target"][:]
        hypotheses = list(islice(translations, len(references)))
        quality = score(hypotheses, references, bleu_tokenize=config.evaluate.bleu_tokenize)
        scored[split] = quality, hypotheses
    return scored


def _validation_history(run: Path, metric: str, start: int) -> list[float]:
    """The metric's values at all evaluations up to step `start` that recorded a number."""
    return [
        record[metric]
        for record in read_metrics(run)
        if record["split"] == "validation" and record["step"] <= start
        if record.get(metric) is not None
    ]


def _out_of_patience(history: list[float], metric: str, patience: int) -> bool:
    """Whether none of the last `patience` evaluations beat the best one before them."""
    if patience == 0 or len(history) <= patience:
        return False
    before, last = history[:-patience], history[-patience:]
    if lower_is_better(metric):
        return min(last) >= min(before)
    return max(last) <= max(before)
