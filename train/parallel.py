"""One step, run on every device: each takes its rows of the batch, and all end with one state."""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def replicate(tree: Any, devices: list[jax.Device] | None = None) -> Any:
    """Put the same arrays on each of this process's devices, as `data_parallel_train` does.

    A state that begins in another form would have the first two steps compiled separately.
    """
    return jax.device_put(tree, _replicated(devices or jax.local_devices()))


def span_processes(tree: Any) -> Any:
    """Replicated arrays as arrays of all processes together, the form that is saved and restored.

    `pmap` returns each process its own copies; with one process they are all there is.
    """
    if jax.process_count() == 1:
        return tree
    sharding = _replicated(jax.devices())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(on_one_device(x))),
        tree,
    )


def _replicated(devices: list[jax.Device]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


def on_one_device(tree: Any) -> Any:
    """This process's own copy of replicated arrays, on its first device, without copying."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def data_parallel_train(train_step: Callable, devices: list[jax.Device] | None = None) -> Any:
    """Return `(state, batch, rng) -> (state, metrics)` over `devices`, by default all, or one.

    The batch is [devices, rows, …]; state, key and metrics are replicated and have no device axis,
    so they look the same on one device and on a thousand. The old state's memory is reused.
    """
    return jax.pmap(
        partial(train_step, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )


def data_parallel_eval(eval_step: Callable) -> Callable:
    """Return `(params, batch) -> sums` over all devices, laid out as for training."""
    return jax.pmap(
        partial(eval_step, axis_name=AXIS), axis_name=AXIS, in_axes=(None, 0), out_axes=None
    )


def split_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[R, …] to [devices, R / devices, …], over this process's devices."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


def host_rows(rows_per_batch: int) -> slice:
    """The rows of the global batch that this process's devices take."""
    rows = rows_per_batch // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def prefetch(make: Callable[[int], Any], steps: range, depth: int = 4) -> Iterator[Any]:
    """Yield `make(step)` for each step, made ahead by a thread so that no device waits for it.

    Leaving the loop ends the thread; an exception in `make` is raised here.
    """
    ready: queue.Queue = queue.Queue(depth)
    abandoned = threading.Event()

    def put(item: Any) -> bool:
        while not abandoned.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for step in steps:
                if not put((make(step), None)):
                    return
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        abandoned.set()
        thread.join()
