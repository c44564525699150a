"""What a checkpoint consists of, whether it fits a run, and what can go wrong on disk."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxformer.errors import UserError
from jaxformer.fingerprint import fingerprint
from jaxformer.run import OPTIMIZER, PARAMS, reason


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what was written."""


def split(state: Any) -> dict[str, Any]:
    """Take the parameters out: the rest is the same dataclass with None in their place."""
    return {PARAMS: state.params, OPTIMIZER: dataclasses.replace(state, params=None)}


def fingerprints(items: Mapping[str, Any]) -> dict[str, int]:
    """Return what `jaxformer.run.is_intact` compares with."""
    return {name: fingerprint(tree) for name, tree in items.items()}


def describe(tree: Any) -> dict[str, str]:
    """Map the path of each array to its type: {"decoder/kernel": "float32[3,5]"}."""

    def dtype_and_shape(leaf: Any) -> str:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # that is how orbax saves a key
        return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): dtype_and_shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def saved_arrays(path: Path) -> dict[str, str]:
    """Describe what was saved in `path`, without reading the arrays."""
    handler = ocp.StandardCheckpointHandler()
    try:
        return describe(handler.metadata(epath.Path(path)).tree)
    finally:
        handler.close()


def check_same_arrays(saved: dict[str, str], wanted: dict[str, str], path: Path) -> None:
    """Raise `UserError` with the first array that is not the same in both descriptions."""
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name, "missing"), wanted.get(name, "missing")
        if there != here:
            raise UserError(
                f"{path} is of another configuration: {name} is {there} there and {here} here; "
                "train with the run's own config.json or choose another run directory"
            )


@contextlib.contextmanager
def saving(directory: Path) -> Iterator[None]:
    """Turn what a disk can do to a checkpoint that is written into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        # Tensorstore reports a full disk by a ValueError. Others are errors of the program.
        if isinstance(error, OSError) or "[os_error_code=" in str(error):
            raise UserError(
                f"cannot save checkpoints in {directory}: {reason(error)}; "
                "free disk space or choose another run directory"
            ) from error
        raise


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Turn what can be wrong with a checkpoint that is read into a `DamagedCheckpoint`."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(
            f"cannot read checkpoint {directory}: {reason(error)}; "
            "delete it to go on from the one before"
        ) from error
