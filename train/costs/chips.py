"""What one chip can do, according to its maker."""

import dataclasses

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as its data sheet describes it.

    Attributes:
      name: how the name of a topology begins, or the name of the GPU.
      device_kind: what JAX calls a device of it.
      flops: of dense bfloat16 matrix products, FLOP/s.
      memory: bytes.
      memory_bandwidth: bytes/s, read and written.
      interconnect: bytes/s that it sends over all its links together. If the sheet gives the sum
        of both directions, half of that.
      source: the page that says so.
      devices: number of JAX devices; two TensorCores that JAX sees as one ("megacore") are one.
      pod: chips of the largest machine; 0 where the sheet has none.
      dimensions: of the torus that the chips of a machine form; 0 for GPUs.
    """

    name: str
    device_kind: str
    flops: float
    memory: int
    memory_bandwidth: float
    interconnect: float
    source: str
    devices: int = 1
    pod: int = 0
    dimensions: int = 0


_CLOUD = "cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA data sheet, "

CHIPS = (
    # The page has no figure for the links of a chip: 6 of 50 GB/s, Jouppi et al. (2023), Table 4.
    Chip("v4", "TPU v4", 275e12, 32 * _GIB, 1200e9, 300e9, f"{_CLOUD}v4", 1, 4096, 3),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * _GIB, 819e9, 200e9, f"{_CLOUD}v5e", 1, 256, 2),
    Chip("v5p", "TPU v5", 459e12, 95 * _GIB, 2765e9, 600e9, f"{_CLOUD}v5p", 1, 8960, 3),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * _GIB, 1638e9, 400e9, f"{_CLOUD}v6e", 1, 256, 2),
    Chip("tpu7x", "TPU7x", 2307e12, 192 * _GIB, 7380e9, 600e9, f"{_CLOUD}tpu7x", 2, 9216, 3),
    Chip("A100 40GB", "NVIDIA A100-SXM4-40GB", 312e12, 40 * _GIB, 1555e9, 300e9, f"{_NVIDIA}A100"),
    Chip("A100 80GB", "NVIDIA A100-SXM4-80GB", 312e12, 80 * _GIB, 2039e9, 300e9, f"{_NVIDIA}A100"),
    Chip("H100", "NVIDIA H100 80GB HBM3", 989e12, 80 * _GIB, 3350e9, 450e9, f"{_NVIDIA}H100"),
    Chip("H200", "NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9, f"{_NVIDIA}H200"),
)


def chip_of(device: jax.Device) -> Chip | None:
    """Return the chip that `device` is, or is a part of; None where there is no sheet."""
    kinds = {chip.device_kind: chip for chip in CHIPS}
    return kinds.get(device.device_kind)
