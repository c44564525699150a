"""What the machine can do at best, measured: the yardstick of everything else."""

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.errors import UserError
from train.costs.chips import chip_of


def measured_devices(number: int | None, *, beside_peer: bool) -> list[jax.Device]:
    """The first `number` devices of this process, by default all of them.

    Raises:
      UserError: there are fewer, or several, which add to the speed, are to be measured beside a
        peer.
    """
    available = jax.local_devices()
    if number is not None and not 1 <= number <= len(available):
        raise UserError(
            f"{number} devices are asked for, {len(available)} are here: give 1 to {len(available)}"
        )
    devices = available[:number]
    if beside_peer and separate_devices(devices) > 1:
        raise UserError(f"a peer uses one device and we use {len(devices)}: give --devices 1")
    return devices


def separate_devices(devices: Sequence[jax.Device]) -> int:
    """How many devices add to the machine's speed: simulated CPU devices share its cores."""
    return 1 if devices[0].platform == "cpu" else len(devices)


class Yardstick:
    """What one device can do at best, as measured so far: other work may have lowered some."""

    def __init__(self, device: jax.Device) -> None:
        self._device = device
        self._best: dict[str, float] = {}

    def matmul(self, dtype: str) -> float:
        """Measure again; return the best `matmul_peak` in FLOP/s."""
        return self._keep(dtype, matmul_peak(dtype, self._device))

    def bandwidth(self) -> float:
        """Measure again; return the best `memory_bandwidth` in bytes/s."""
        return self._keep("bandwidth", memory_bandwidth(self._device))

    def _keep(self, name: str, value: float) -> float:
        self._best[name] = max(value, self._best.get(name, 0.0))
        return self._best[name]


def matmul_peak(dtype: str, device: jax.Device) -> float:
    """FLOP/s of the product of two large square matrices on one device, the best of ten.

    With int8 it is that of 8-bit integers summed in 32 bits.
    """
    size = 2048 if device.platform == "cpu" else 8192
    # Random, because the power that a GPU draws, and so its clock, depends on the numbers.
    keys = jax.random.split(jax.random.key(0))
    integers = dtype == "int8"
    draw = partial(jax.random.randint, minval=-127, maxval=128) if integers else jax.random.normal
    a, b = (jax.device_put(draw(key, (size, size), dtype=dtype), device) for key in keys)
    product = partial(jnp.matmul, preferred_element_type="int32" if integers else None)
    return 2 * size**3 / _best_seconds(jax.jit(product), a, b)


def memory_bandwidth(device: jax.Device) -> float:
    """Bytes a second, read and written, of an array far larger than any cache; the best of ten."""
    array = jax.device_put(jnp.ones(2**26, jnp.float32), device)
    return 2 * array.nbytes / _best_seconds(jax.jit(jnp.negative), array)


def _best_seconds(function: Callable, *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def datasheet_peak(dtype: str, device: jax.Device) -> float | None:
    """FLOP/s of one device as its maker states it, where known.

    None for float32: what its products are computed in depends on precision settings.
    """
    chip = chip_of(device)
    return chip.flops / chip.devices if chip and dtype == "bfloat16" else None


def peak_memory(devices: Sequence[jax.Device]) -> int:
    """Most bytes in use so far, on the fullest device; on CPU, see `process_peak`."""
    stats = [device.memory_stats() for device in devices]
    if all(found and "peak_bytes_in_use" in found for found in stats):
        return max(found["peak_bytes_in_use"] for found in stats if found)
    return process_peak()


def forget_process_peak() -> None:
    """Reset `process_peak` to what the process holds now; does nothing except on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak() -> int:
    """Most bytes of main memory that this process has held since `forget_process_peak`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
