"""What a number was measured on."""

import os
import platform
from collections.abc import Sequence
from typing import Any

import flax
import jax


def describe_machine(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Devices, versions and flags, for a record."""
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "flax": flax.__version__,
        "prng": jax.config.values["jax_default_prng_impl"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
