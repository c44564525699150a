"""Attention without its weights in memory: kernels that accelerators have for equation 1.

The plain form writes scores and weights, [B, N, T, S], and reads them back. A flash kernel (Dao et
al., 2022) goes through the keys a block at a time and keeps neither, so that memory grows with the
length of a row instead of its square, and there is far less memory traffic. The kernels are JAX's
own: cuDNN's on NVIDIA GPUs, one in Pallas on TPUs.

They are used in bfloat16 only: GPUs have none for float32, where exactness matters more than speed.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.config import FlashAttention
from jaxformer.fields import check_choice
from jaxformer.masks import Mask, SegmentMask, dense_mask
from jaxformer.sharding import num_shards

# The TPU's kernel works on squares of this many queries and keys.
_TPU_BLOCK = 128


def flash_kernel(
    kernel: FlashAttention,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N Hv"],
    mask: Mask | None,
) -> Callable[..., Float[Array, "B T N Hv"]] | None:
    """Return a function of the same arrays with the result of `dot_product_attention`.

    None where the kernel cannot handle the case: a dtype other than bfloat16; values of another
    width than the keys; for cuDNN, a GPU older than Ampere, odd lengths, or heads wider than 128 or
    of a width that is not a multiple of 8; on a TPU, lengths that are not multiples of 128, heads
    that are wider than 128 and no multiple of it, a dense mask, or arrays that a mesh splits.
    "auto" takes the TPU's kernel only where it can tell that no mesh does: on one chip, inside
    `shard_map` and `pmap`, or with logical axis rules.
    """
    check_choice("flash", kernel, FlashAttention)
    if kernel == "auto":
        backends: dict[str, FlashAttention] = {"gpu": "cudnn", "tpu": "pallas"}
        kernel = backends.get(jax.default_backend(), "none")
        if kernel == "pallas" and not _know_what_is_split():
            kernel = "none"
    if query.dtype != jnp.bfloat16 or value.shape != key.shape:
        return None
    lengths, width = (query.shape[1], key.shape[1]), query.shape[-1]
    if kernel == "cudnn" and _cudnn_can(lengths, width):
        return _cudnn
    if kernel == "pallas" and _pallas_can(lengths, width, mask):
        return _pallas
    return None


def _cudnn_can(lengths: tuple[int, int], width: int) -> bool:
    ampere = all(map(_is_ampere, jax.local_devices()))
    return ampere and not any(n % 2 for n in lengths) and width % 8 == 0 and width <= 128


def _is_ampere(device: Any) -> bool:
    try:
        return float(device.compute_capability) >= 8.0
    except (AttributeError, ValueError):  # not a GPU, or an AMD one: "gfx942"
        return False


def _know_what_is_split() -> bool:
    """Whether `num_shards` can tell; under a plain `jax.jit` only XLA knows, and only later."""
    alone = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual
    return alone or bool(nn.get_logical_axis_rules())


def _pallas_can(lengths: tuple[int, int], width: int, mask: Mask | None) -> bool:
    blocks = not any(n % _TPU_BLOCK for n in lengths) and (width < 128 or width % 128 == 0)
    whole = num_shards("batch") == num_shards("heads") == 1  # XLA cannot split a Pallas kernel
    return blocks and whole and (mask is None or isinstance(mask, SegmentMask))


def _cudnn(query, key, value, mask):
    batch_size, length, num_heads, _ = query.shape
    allowed = dense_mask(mask, (batch_size, num_heads, length, key.shape[1]))
    if allowed is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    # For a query that sees nothing, cuDNN's gradient is NaN: let it see all, and zero its output.
    allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], query.shape[1], key.shape[1]))
    sees = jnp.any(allowed, axis=-1, keepdims=True)
    out = jax.nn.dot_product_attention(
        query, key, value, mask=allowed | ~sees, implementation="cudnn"
    )
    return jnp.where(jnp.swapaxes(sees, 1, 2), out, 0)


def _pallas(query, key, value, mask):
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    def block(length):
        return next(size for size in (512, 256, _TPU_BLOCK) if length % size == 0)

    q, k = block(query.shape[1]), block(key.shape[1])
    blocks = tpu.BlockSizes(
        block_b=1,
        block_q=q,
        block_k_major=k,
        block_k=k,
        block_q_major_dkv=q,
        block_k_major_dkv=k,
        block_q_dkv=q,
        block_k_dkv=k,
        block_q_dq=q,
        block_k_major_dq=k,
        block_k_dq=k,
    )
    causal, segments, sees = False, None, None
    if mask is not None:
        causal = mask.causal
        # Padding is segment 0, which no query sees: the kernel would let padding see padding.
        segments = tpu.SegmentIds(mask.query, jnp.where(mask.key == 0, -1, mask.key))
        sees = jnp.any(mask.dense(), axis=-1)[:, 0, :, None, None]
    out = tpu.flash_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
        segment_ids=segments,
        causal=causal,
        sm_scale=query.shape[-1] ** -0.5,
        block_sizes=blocks,
    )
    out = jnp.swapaxes(out, 1, 2)
    return out if sees is None else jnp.where(sees, out, 0)
