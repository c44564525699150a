"""Training goes on in a run directory only with the same experiment and the same text."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import jax

from jaxformer.checkpoints import checkpoint_steps
from jaxformer.errors import UserError, reason
from jaxformer.files import write_text
from jaxformer.run_directory import CONFIG_FILE, read_config
from train.config import TrainConfig, flatten, read_train_config
from train.data.corpus import EncodedCorpus

# Digests of the sentences' lengths.
_LENGTHS_FILE = "lengths.json"

# Fields that may differ from the run directory's config.json when a run goes on: how long it is,
# how it is monitored, where its files are and how much memory it takes, but not what is trained.
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


def check_same_run(config: TrainConfig, run: Path) -> None:
    """Refuse to go on in a run directory with another experiment.

    Without a checkpoint there is nothing to go on with, and its files are written anew: a run that
    failed at its start accepts a corrected configuration. What is not a run is left alone.
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
            f"{run} is at step {reached} and steps is {config.steps}: give at least {reached}"
        )
    if config.steps != before["steps"] and cooldown and falls_from < reached:
        raise UserError(
            f"{run} has steps={before['steps']}, and since step {falls_from} its learning rate "
            f"falls towards that step: keep steps={before['steps']} to go on, or give another "
            f"--run to train for {config.steps}"
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
                f"give {before[name]!r} to go on with it, or another --run to start anew"
            )


def check_same_text(run: Path, corpora: Mapping[str, EncodedCorpus]) -> None:
    """Refuse to go on with text other than what the run has seen under the same name.

    Text is recognised by the lengths of all sentences, in tokens of the run's own vocabulary: at no
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
            known = json.loads(path.read_text(encoding="utf-8"))
            before = {name: known[name] for name in here}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({reason(error)}): delete it to go on") from error
        for name, digest in here.items():
            if before[name] != digest:
                raise UserError(
                    f"{run} has seen other text as {name}: give that text to go on, or another "
                    "--run to start anew"
                )
    elif jax.process_index() == 0:
        write_text(path, json.dumps(here, indent=2) + "\n", advice="choose another --run")
