"""One step on many devices: as copies of each other, or as parts of one machine.

A runner places the state and the batches and compiles the step. Of the numbers, the choice of
runner changes only dropout's noise: the step sums over everything and divides once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import TrainConfig
from train.data.rows import HostBatch
from train.mesh import in_mesh, make_mesh, shardings
from train.step import Batch

AXIS = "data"


class Runner(Protocol):
    """How the devices share the work; `make_runner` chooses.

    Attributes:
      row_parts: number of parts into which the devices split the rows of a batch.
    """

    @property
    def row_parts(self) -> int: ...

    def create(self, make_state: Callable[[], Any]) -> Any:
        """Return what `make_state` returns, placed as the steps expect it."""

    def parallel_train_step(self, train_step: Callable) -> Any:
        """Return `(state, batch, rng) -> (state, metrics)` on all devices.

        The old state is donated. The function has a method `lower`, which takes the same arguments,
        concrete or abstract, and returns a `jax.stages.Lowered`.
        """

    def abstract_state(self, state: Any) -> Any:
        """Return shapes with the shardings of what `to_save` returns."""

    def abstract_batch(self, batch: Any) -> Any:
        """Return the shapes of a batch as `place` lays it out."""

    def parallel_eval_step(self, eval_step: Callable) -> Callable[[Any, Batch], Any]:
        """Return `(params, batch) -> sums` over all devices."""

    def place(self, rows_per_batch: int, read: Callable[[slice], HostBatch]) -> Batch:
        """Read this process's rows of a global batch and lay them out for its devices."""

    def whole(self, params: Any) -> Any:
        """All of the parameters on this process's first device; a collective under a mesh."""

    def to_save(self, state: Any) -> Any:
        """The state as global arrays over all processes, the form that is saved and restored."""

    def from_saved(self, state: Any) -> Any:
        """The inverse of `to_save`."""


def make_runner(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Runner:
    """Return the runner that `config.parallel` names, on `devices` or, by default, on all.

    Raises:
      UserError: the devices or the model cannot be split this way.
    """
    parallel = config.parallel
    if parallel.strategy == "mesh":
        return MeshParallel(make_mesh(parallel, config.model, devices or jax.devices()))
    return DataParallel(tuple(devices) if devices else None)


def batch_parts(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> int:
    """Return the number of equal parts of a training batch, over devices and accumulation.

    Raises:
      UserError: as for `make_runner`.
    """
    return make_runner(config, devices).row_parts * config.accumulate


def completed(rows: int, parts: int) -> int:
    """Return `rows` rounded up to a multiple of `parts`: empty rows are added at a batch's end."""
    return -(-rows // parts) * parts


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """`jax.pmap`: every device has all of the state, and takes its rows of the batch.

    The state has no device axis: it looks the same on one device and on a thousand.

    Attributes:
      devices: by default all devices of all processes.
    """

    devices: tuple[jax.Device, ...] | None = None

    @property
    def row_parts(self) -> int:
        return len(self.devices or jax.devices())

    def create(self, make_state: Callable[[], Any]) -> Any:
        # A first state placed unlike those that the step returns would make it compile twice.
        return jax.jit(make_state, out_shardings=self._replicated())()

    def parallel_train_step(self, train_step: Callable) -> Any:
        return jax.pmap(
            partial(train_step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0, None),
            out_axes=None,
            donate_argnums=0,
            devices=self.devices,
        )

    def abstract_state(self, state: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._everywhere()), state
        )

    def abstract_batch(self, batch: Any) -> Any:
        devices = len(self._local())
        return {
            name: jax.ShapeDtypeStruct((devices, x.shape[0] // devices, *x.shape[1:]), x.dtype)
            for name, x in batch.items()
        }

    def parallel_eval_step(self, eval_step: Callable) -> Any:
        return jax.pmap(
            partial(eval_step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=self.devices,
        )

    def place(self, rows_per_batch: int, read: Callable[[slice], HostBatch]) -> Any:
        """Return [devices, rows, …]; `pmap` itself moves it to the devices."""
        rows, index = rows_per_batch // jax.process_count(), jax.process_index()
        devices = len(self._local())
        return {
            name: x.reshape(devices, -1, *x.shape[1:])
            for name, x in read(slice(index * rows, (index + 1) * rows)).items()
        }

    def whole(self, params: Any) -> Any:
        return jax.tree.map(lambda x: x.addressable_data(0), params)

    def to_save(self, state: Any) -> Any:
        # `pmap` returns to each process its own copies; with one process, these are all of them.
        if jax.process_count() == 1:
            return state
        everywhere = self._everywhere()
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)),
            self.whole(state),
        )

    def from_saved(self, state: Any) -> Any:
        return jax.device_put(self.whole(state), self._replicated())

    def _local(self) -> tuple[jax.Device, ...]:
        return self.devices or tuple(jax.local_devices())

    def _replicated(self) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self._local()), (AXIS,)), PartitionSpec())

    def _everywhere(self) -> NamedSharding:
        devices = np.array(self.devices or jax.devices())
        return NamedSharding(Mesh(devices, (AXIS,)), PartitionSpec())


@dataclasses.dataclass(frozen=True)
class MeshParallel:
    """`jax.jit` over a mesh of data × fsdp × tensor: XLA splits one program over all devices.

    Parameters and optimizer state are created, kept and updated in parts, as `train.mesh` says.
    Dropout's noise is the same however many devices the mesh has.
    """

    mesh: Mesh

    @property
    def row_parts(self) -> int:
        # The devices along `tensor` have the same rows.
        return self.mesh.shape[AXIS] * self.mesh.shape["fsdp"]

    def create(self, make_state: Callable[[], Any]) -> Any:
        with in_mesh(self.mesh):
            placed = shardings(self.mesh, jax.eval_shape(make_state))
            return jax.jit(make_state, out_shardings=placed)()

    def parallel_train_step(self, train_step: Callable) -> Any:
        def step(state: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
            state, metrics = train_step(state, batch, rng)
            # Without this, XLA might return it in another layout and recompile the next step.
            return jax.lax.with_sharding_constraint(state, shardings(self.mesh, state)), metrics

        return _WithinMesh(self.mesh, jax.jit(step, donate_argnums=0))

    def abstract_state(self, state: Any) -> Any:
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            shardings(self.mesh, state),
        )

    def abstract_batch(self, batch: Any) -> Any:
        by_rows = self._by_rows()
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows), batch
        )

    def parallel_eval_step(self, eval_step: Callable) -> Any:
        return _WithinMesh(self.mesh, jax.jit(eval_step))

    def place(self, rows_per_batch: int, read: Callable[[slice], HostBatch]) -> Any:
        by_rows = self._by_rows()
        mine = by_rows.addressable_devices_indices_map((rows_per_batch,)).values()
        spans = [index[0].indices(rows_per_batch) for index in mine if index is not None]
        first, last = min(span[0] for span in spans), max(span[1] for span in spans)

        def part(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows_per_batch)
            return x[start - first : stop - first]

        return {
            name: jax.make_array_from_callback(
                (rows_per_batch, *x.shape[1:]), by_rows, partial(part, x)
            )
            for name, x in read(slice(first, last)).items()
        }

    def whole(self, params: Any) -> Any:
        return jax.tree.map(lambda x: x.addressable_data(0), _gather(self.mesh)(params))

    def to_save(self, state: Any) -> Any:
        return state

    def from_saved(self, state: Any) -> Any:
        return state

    def _by_rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec((AXIS, "fsdp")))


@lru_cache(maxsize=1)  # JAX would compile each new function anew
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


@dataclasses.dataclass(frozen=True)
class _WithinMesh:
    """A jitted function that is called and lowered inside `in_mesh`."""

    mesh: Mesh
    function: Any

    def __call__(self, *arguments: Any) -> Any:
        with in_mesh(self.mesh):
            return self.function(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        with in_mesh(self.mesh):
            return self.function.lower(*arguments)
