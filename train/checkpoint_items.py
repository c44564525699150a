"""What a checkpoint consists of, whether it fits a run, and what can go wrong on disk."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from jaxformer.checkpoints import OPTIMIZER, PARAMS, describe_arrays
from jaxformer.errors import UserError, reason
from jaxformer.fingerprint import fingerprint


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what was written."""


def split(state: Any) -> dict[str, Any]:
    """Take the parameters out: the rest is the same dataclass with None in their place."""
    return {PARAMS: state.params, OPTIMIZER: dataclasses.replace(state, params=None)}


def fingerprints(items: Mapping[str, Any]) -> dict[str, int]:
    """Return what `jaxformer.checkpoints.is_intact` compares with."""
    return {name: fingerprint(tree) for name, tree in items.items()}


def saved_arrays(path: Path) -> dict[str, str]:
    """Describe what was saved in `path`, without reading the arrays."""
    handler = ocp.StandardCheckpointHandler()
    try:
        return describe_arrays(handler.metadata(epath.Path(path)).tree)
    finally:
        handler.close()


@contextlib.contextmanager
def saving_checkpoint(directory: Path) -> Iterator[None]:
    """Turn the errors of a disk while a checkpoint is written into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        # Tensorstore reports a full disk as a ValueError; other ValueErrors are bugs.
        if isinstance(error, OSError) or "[os_error_code=" in str(error):
            raise UserError(
                f"cannot save checkpoints in {directory}: {reason(error)}; "
                "free disk space or choose another run directory"
            ) from error
        raise


@contextlib.contextmanager
def reading_checkpoint(directory: Path) -> Iterator[None]:
    """Turn errors while a checkpoint is read, except lack of memory, into `DamagedCheckpoint`."""
    try:
        yield
    except Exception as error:  # damaged JSON and damaged arrays can raise anything
        if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise DamagedCheckpoint(
            f"cannot read checkpoint {directory}: {reason(error)}; "
            "delete it to go on from the one before"
        ) from error
