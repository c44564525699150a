"""Machines to plan for: the one that is here, and TPU slices that only the compiler knows."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from math import prod

import jax

from jaxformer.errors import UserError, one_line
from train.costs.chips import CHIPS, Chip, chip_of

TPUS = {chip.name: chip for chip in CHIPS if chip.dimensions}

# Make libtpu only compile and not look for chips: it must not query the cloud's metadata server,
# lock chips that may be here, or complain that there are none.
_COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for, and what is known of them.

    Attributes:
      name: such as "v5e:4x4".
      devices: in the order of a run's `jax.devices()`.
      memory: bytes of a device.
      chip: what a chip can do, None where there is no data sheet.
    """

    name: str
    devices: tuple[jax.Device, ...]
    memory: int
    chip: Chip | None

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def present_machine() -> Machine:
    """Return this machine with all its devices; CPU devices share its main memory."""
    devices = tuple(jax.devices())
    chip = chip_of(devices[0])
    stats = devices[0].memory_stats() or {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    memory = stats.get("bytes_limit", chip.memory // chip.devices if chip else memory)
    return Machine(f"{len(devices)} x {devices[0].device_kind}", devices, memory, chip)


def tpu_machine(topology: str) -> Machine:
    """Return a TPU slice by its name, such as "v5e:4x4"; nothing can run on it.

    Raises:
      UserError: there is no such chip or slice, or libtpu is not installed.
    """
    chip = chip_of_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{topology} needs the compiler of libtpu, which is not installed: "
            'pip install -e ".[tpu]" (or "jax[tpu]"; no TPU is needed)'
        )
    from jax.experimental.topologies import get_topology_desc

    # A v4 chip is one device of a run, and would be two without this.
    cores = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    with _environment(_COMPILER_ONLY):
        try:
            devices = get_topology_desc(platform="tpu", topology_name=topology, **cores).devices
        except Exception as error:  # JaxRuntimeError, RuntimeError or ValueError, by version
            raise UserError(f"libtpu refuses the topology {topology}: {one_line(error)}") from error
    return Machine(topology, tuple(devices), chip.memory // chip.devices, chip)


def chip_of_topology(topology: str) -> Chip:
    """Return the chip of a slice.

    Raises:
      UserError: there is no chip of that name, or no slice of that shape.
    """
    name, _, shape = topology.partition(":")
    chip = TPUS.get(name)
    forms = ", ".join(f"{one.name}:{'x'.join('ABC'[: one.dimensions])}" for one in TPUS.values())
    if chip is None:
        raise UserError(f"no TPU {name!r} in topology {topology!r}: give one of {forms}")
    if not re.fullmatch("x".join([r"[1-9]\d*"] * chip.dimensions), shape):
        raise UserError(
            f"topology {topology!r} does not say how many chips there are along each axis: "
            f"give one of {forms}, such as {name}:{'x'.join('221'[: chip.dimensions])}"
        )
    chips = prod(map(int, shape.split("x")))
    if chips > chip.pod:
        raise UserError(
            f"topology {topology} has {chips:,} chips, a {name} pod {chip.pod:,}: make it smaller"
        )
    return chip


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set the variables that are not set yet; libtpu reads them when it is loaded."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
