"""What a number was measured on."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import flax
import jax

import jaxformer
from jaxformer.errors import UserError


def cores() -> int:
    """CPU cores of this process, which may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Devices, versions and flags, for a record."""
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "flax": flax.__version__,
        "prng": jax.config.values["jax_default_prng_impl"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def engine_version(name: str) -> str:
    """Package and version behind an engine's name, such as "torch-compile" or "ctranslate2".

    Raises:
      UserError: it is not installed.
    """
    if name == "jaxformer":  # need not be installed
        return f"jaxformer {jaxformer.__version__}"
    package = {"torch-compile": "torch", "marian": "pymarian", "flax-plain": "flax"}.get(name, name)
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError as error:
        extra = '-e ".[parity]"' if package in ("torch", "transformers") else package
        raise UserError(f"{package} is not installed: pip install {extra}") from error
