"""Which device holds which part: the mesh data × fsdp × tensor and the rules for arrays on it."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError
from train.config import ParallelConfig

# Logical axes of activations and parameters, and the mesh axes that they are split over. The
# vocabulary is split over fsdp too: each of these devices looks up and scores its own pieces for
# all their tokens, so that the largest matrix, embedding and softmax in one, is never gathered.
RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab_batch", "data"),
    ("vocab", ("fsdp", "tensor")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
)

# Axes of parameters by the end of their path; stacked layers have one more axis in front. The other
# parameters are small, and whole on every device. The optimizer's moments follow their parameters.
PARAMETERS = (
    (r"embedding/embedding", ("vocab", None)),
    (r"attention/(query|key|value)/kernel", ("embed", "heads", None)),
    (r"attention/(query|key|value)/bias", ("heads", None)),
    (r"attention/output/kernel", ("heads", None, "embed")),
    (r"feed_forward/(hidden|gate)/kernel", ("embed", "mlp")),
    (r"feed_forward/(hidden|gate)/bias", ("mlp",)),
    (r"feed_forward/output/kernel", ("mlp", "embed")),
)


def make_mesh(
    config: ParallelConfig, model: TransformerConfig, devices: Sequence[jax.Device]
) -> Mesh:
    """Return the mesh of all `devices`; the axis `data` takes what fsdp and tensor leave over.

    Raises:
      UserError: the devices or an axis of the model cannot be split this way.
    """
    fsdp, tensor = config.fsdp, config.tensor
    if len(devices) % (fsdp * tensor):
        raise UserError(
            f"{len(devices)} devices cannot be split into data x fsdp x tensor with parallel.fsdp="
            f"{fsdp} and parallel.tensor={tensor}: {fsdp} x {tensor} = {fsdp * tensor} does not "
            f"divide {len(devices)}"
        )
    vocabularies = {"vocab_size": model.vocab_size, "source_vocab_size": model.source_vocab_size}
    for name, size, parts, product in (
        ("num_heads", model.num_heads, tensor, f"parallel.tensor={tensor}"),
        ("d_ff", model.d_ff, tensor, f"parallel.tensor={tensor}"),
        ("d_model", model.d_model, fsdp, f"parallel.fsdp={fsdp}"),
        *(
            (name, size, fsdp * tensor, f"parallel.fsdp x parallel.tensor = {fsdp} x {tensor}")
            for name, size in vocabularies.items()
        ),
    ):
        if size is not None and size % parts:
            raise UserError(
                f"model.{name}={size} cannot be split by {product}: the next multiple of {parts} "
                f"is {-(-size // parts) * parts}"
            )
    shape = len(devices) // (fsdp * tensor), fsdp, tensor
    axes = ("data", "fsdp", "tensor")
    return Mesh(np.array(devices).reshape(shape), axes, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def in_mesh(mesh: Mesh) -> Iterator[None]:
    """Map the logical axis names of the modules to the axes of `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of each array of `tree`, in the same structure.

    Args:
      mesh: from `make_mesh`.
      tree: parameters, or a state that holds parameters and their moments; shapes suffice.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        spec = nn.logical_to_mesh_axes(_axes("/".join(map(str, names)), leaf.ndim), RULES)
        return NamedSharding(mesh, spec or PartitionSpec())

    return jax.tree.map_with_path(sharding, tree)


def _axes(path: str, ndim: int) -> tuple[str | None, ...]:
    for pattern, axes in PARAMETERS:
        if re.search(rf"{pattern}$", path):
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim
