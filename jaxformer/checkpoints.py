"""The checkpoints of a run directory: listing them, choosing one, and their parameters.

Parameters can be read without the optimizer state and without knowing the model, or how many
devices or processes saved them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import UserError, reason
from jaxformer.fingerprint import fingerprint
from jaxformer.run_directory import check_name

CHECKPOINTS_DIR = "checkpoints"
AVERAGE = "average"
PARAMS, OPTIMIZER, METRICS, INFO = "params", "optimizer", "metrics", "info"


def checkpoint_steps(run: str | Path) -> list[int]:
    """Return the steps of the finished checkpoints in ascending order, [] if there are none."""
    directory = Path(run) / CHECKPOINTS_DIR
    if not directory.is_dir():
        return []
    # A checkpoint that is still being written has a longer name.
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def evaluations(run: str | Path) -> dict[int, dict[str, Any]]:
    """Return the record of each checkpoint that was evaluated, by step in ascending order.

    A record holds "values", such as {"loss": 2.1, "bleu": 33.0}, and names the "metric" among them,
    with its "mode", by which the training that wrote it selects the best checkpoint. Records that
    cannot be read are left out.
    """
    directory = Path(run) / CHECKPOINTS_DIR
    records = {
        step: _read_json(directory / str(step) / METRICS / METRICS)
        for step in checkpoint_steps(run)
    }
    return {step: record for step, record in records.items() if _is_evaluation(record)}


def _is_evaluation(record: dict[str, Any]) -> bool:
    values = record.get("values")
    named = isinstance(record.get("metric"), str) and record.get("mode") in ("min", "max")
    numbers = isinstance(values, dict) and all(isinstance(x, int | float) for x in values.values())
    return named and numbers


def best_step(run: str | Path) -> int | None:
    """Return the step with the best validation metric, None if no checkpoint was evaluated.

    Each record names the metric by which its training selects; the newest record decides. Among
    equals the latest checkpoint is the best.
    """
    records = evaluations(run)
    if not records:
        return None
    newest = records[max(records)]
    metric = newest["metric"]
    scores = {
        step: record["values"][metric]
        for step, record in reversed(records.items())
        if metric in record["values"]
    }
    select = min if newest["mode"] == "min" else max
    return select(scores, key=scores.__getitem__, default=None)


def find_checkpoint(run: str | Path, checkpoint: int | str | None = None) -> Path:
    """Return the directory of a checkpoint: "average", "best", "last" or a step.

    None stands for the average, unless training went on after it was made; otherwise for the best
    checkpoint; otherwise for the last.

    Raises:
      UserError: there is no such checkpoint, or none at all yet.
    """
    directory, steps = Path(run) / CHECKPOINTS_DIR, checkpoint_steps(run)
    average = directory / AVERAGE
    if not steps and not average.is_dir():
        raise UserError(f"{run} has no checkpoint yet: train longer, or give another run")
    if checkpoint is None:
        latest = _info(average).get("latest")
        if average.is_dir() and isinstance(latest, int) and latest >= max(steps, default=0):
            return average
        best = best_step(run)
        return directory / str(max(steps) if best is None else best)
    if checkpoint == AVERAGE and average.is_dir():
        return average
    if checkpoint == "best" and (best := best_step(run)) is not None:
        return directory / str(best)
    if checkpoint == "last" and steps:
        return directory / str(steps[-1])
    if str(checkpoint).isdecimal() and int(checkpoint) in steps:
        return directory / str(int(checkpoint))
    raise UserError(
        f"{run} has no checkpoint {checkpoint!r}: choose average, best or last, "
        f"where they exist, or one of the steps {', '.join(map(str, steps)) or '(none)'}"
    )


def load_params(run: str | Path, checkpoint: int | str | None = None) -> dict[str, Any]:
    """Return a checkpoint's parameters: nested dictionaries of numpy arrays, as they were saved.

    Args:
      run: the run directory.
      checkpoint: as for `find_checkpoint`.

    It waits for no other process, so each of several may call it alone. If training in progress
    removes the checkpoint meanwhile, the one that is "last" or "best" by then is read instead.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    while True:
        directory = find_checkpoint(run, checkpoint)
        try:
            return _read_params(directory)
        except UserError:
            if find_checkpoint(run, checkpoint) == directory:
                raise


def _read_params(directory: Path) -> dict[str, Any]:
    params = read_arrays(directory / PARAMS)
    if not is_intact(directory, PARAMS, params):
        raise UserError(
            f"{directory} is damaged: the parameters are not those that were saved; "
            "copy the checkpoint again or choose another"
        )
    return params


def is_intact(checkpoint: Path, item: str, tree: Any) -> bool:
    """Whether `tree`, read from an item of `checkpoint`, is what was saved there.

    Also True if the checkpoint keeps no fingerprint of the item.
    """
    saved = _info(checkpoint).get("fingerprints", {})
    if not isinstance(saved, dict):
        return False
    return saved.get(item) is None or saved[item] == fingerprint(tree)


def describe_arrays(tree: Any) -> dict[str, str]:
    """Map the path of each array to its type: {"decoder/kernel": "float32[3,5]"}."""

    def dtype_and_shape(leaf: Any) -> str:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # that is how orbax saves a key
        return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): dtype_and_shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def check_same_arrays(saved: dict[str, str], wanted: dict[str, str], path: Path) -> None:
    """Raise `UserError`, naming the first array that differs between the two descriptions."""
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "missing"), wanted.get(name, "missing")
        if there != here:
            raise UserError(
                f"{path} is of another configuration: {name} is {there} there and {here} here; "
                "use the run's own config.json or choose another run directory"
            )


def save_params(run: str | Path, step: int, params: Mapping[str, Any]) -> None:
    """Write a checkpoint of parameters alone: nested dictionaries of arrays.

    Raises:
      UserError: the checkpoint exists already, or it cannot be written.
    """
    import orbax.checkpoint as ocp

    check_name(run)
    path = Path(run).absolute() / CHECKPOINTS_DIR / str(step)
    if path.exists():
        raise UserError(f"{run} has a checkpoint {step} already: give another step")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(path, args=ocp.args.Composite(**{PARAMS: ocp.args.StandardSave(params)}))
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: tensorstore, on a full disk
        raise UserError(f"cannot write {run}: {reason(error)}; choose another place") from error


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the pytree of arrays that orbax saved in the directory `path`, as numpy arrays.

    Raises:
      UserError: the directory is incomplete or damaged, or orbax cannot read one of that name.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    check_name(path)
    # The bare handler, unlike orbax's checkpointers, waits for no other process.
    handler = ocp.PyTreeCheckpointHandler()
    directory = epath.Path(path.absolute())
    try:
        saved = handler.metadata(directory).tree
        # Numpy arrays, because the devices that the checkpoint names may not exist here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except MemoryError:
        raise
    except Exception as error:  # damaged JSON and arrays can raise anything
        raise UserError(
            f"cannot read {path}: {reason(error)}; copy the checkpoint again or choose another"
        ) from error
    finally:
        handler.close()


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object stored beside the arrays, {} if there is none or it is unreadable."""
    try:
        noted = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _info(checkpoint: Path) -> dict[str, Any]:
    return _read_json(checkpoint / INFO / "metadata")
