"""Label-smoothed cross entropy, fused with the tied softmax and computed in chunks of tokens.

The logits of a batch, [B·T, V], are by far the largest array of a training step. Here they exist
for one chunk of tokens at a time: the chunk's loss *and its gradients* are formed while its logits
are at hand, so the backward pass has nothing to recompute and only scales what is already there.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import PAD_ID
from jaxformer.errors import UserError
from jaxformer.ids import as_ids
from jaxformer.sharding import constrain, num_shards


class LossSums(NamedTuple):
    """Sums over all real tokens, each a float32 scalar; divide by `weight` for the means."""

    loss: Float[Array, ""]  # label-smoothed cross entropy, nats: what is optimised
    nll: Float[Array, ""]  # cross entropy without smoothing, nats: exp(nll / weight) = perplexity
    weight: Float[Array, ""]  # number of labels that are not padding


def cross_entropy(
    hidden: Float[Array, "*B D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, "*B"],
    *,
    label_smoothing: float = 0.0,
    chunk_size: int = 1024,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Label-smoothed cross entropy of softmax(hidden · embeddingᵀ), summed over real tokens.

    The target distribution is (1 - ε) · onehot(label) + ε / V over the whole vocabulary, the
    convention of `torch.nn.functional.cross_entropy` and of Szegedy et al. (2016), which §5.4
    cites. Sums, never means: add them up over devices and batches, then divide once.

    Args:
      hidden: the decoder's output, float32 or bfloat16, with any number of leading axes.
      embedding: the softmax matrix, tied to the embedding (§3.4).
      labels: ids; a token whose label is 0 (padding) adds nothing to the loss or the gradients.
        A label outside 0 … V - 1 makes the loss NaN.
      label_smoothing: ε, at least 0 and below 1.
      chunk_size: tokens whose logits exist at once. Memory is chunk_size · V floats, not B · T · V.

    Returns:
      loss_sum (nats) and weight_sum (tokens), float32 scalars.

    Raises:
      UserError: `labels` are not integers or not one for each token, `hidden` is not floating-point
        or not of the embedding's width, or ε or `chunk_size` is out of range.
    """
    sums = cross_entropy_sums(
        hidden, embedding, labels, label_smoothing=label_smoothing, chunk_size=chunk_size
    )
    return sums.loss, sums.weight


def cross_entropy_sums(
    hidden: Float[Array, "*B D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, "*B"],
    *,
    label_smoothing: float = 0.0,
    chunk_size: int = 1024,
) -> LossSums:
    """Like `cross_entropy`, with the unsmoothed loss beside the smoothed one.

    Only `loss` carries gradients: `nll` is there to be reported.

    Raises:
      UserError: as for `cross_entropy`.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise UserError(f"label_smoothing is {label_smoothing}: give 0 up to below 1")
    if chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}: give at least 1")
    labels = as_ids(labels, "labels")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise UserError(f"predictions are {hidden.dtype}: give floating-point numbers")
    if hidden.shape[-1:] != embedding.shape[1:]:
        raise UserError(
            f"predictions are {list(hidden.shape)}, the embedding {list(embedding.shape)}: give "
            "both the same width"
        )
    if hidden.shape[:-1] != labels.shape:
        raise UserError(
            f"labels are {list(labels.shape)}, predictions {list(hidden.shape[:-1])}: give a label "
            "for each; of targets bos … eos the inputs are all but the last token, the labels all "
            "but the first"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    labels = labels.reshape(-1)
    loss, nll = _fused(hidden, embedding, labels, label_smoothing, chunk_size)
    weight = jnp.sum(labels != PAD_ID).astype(jnp.float32)
    return LossSums(loss, jax.lax.stop_gradient(nll), weight)


def _chunks(hidden, labels, chunk_size):
    """Split the tokens into chunks [chunks, G, T, …], padded with tokens of weight 0.

    Over a mesh, each of G groups of devices works on a chunk of its own; without one G is 1.
    """
    groups = num_shards("vocab_batch")
    hidden, labels = _pad(hidden, 0, groups), _pad(labels, 0, groups)
    hidden, labels = hidden.reshape(groups, -1, hidden.shape[-1]), labels.reshape(groups, -1)
    chunk_size = max(1, min(chunk_size, labels.shape[1]))
    chunk_size += chunk_size % 2
    hidden, labels = _pad(hidden, 1, chunk_size), _pad(labels, 1, chunk_size)
    hidden = hidden.reshape(groups, -1, chunk_size, hidden.shape[-1]).swapaxes(0, 1)
    labels = labels.reshape(groups, -1, chunk_size).swapaxes(0, 1)
    return (
        constrain(hidden, None, "vocab_batch", None, None),
        constrain(labels, None, "vocab_batch", None),
    )


def _joined(chunks, num_tokens):
    """The inverse of `_chunks` for [chunks, G, T, D]: [tokens, D]."""
    groups = chunks.shape[1]
    per_group = -(-num_tokens // groups)
    tokens = chunks.swapaxes(0, 1).reshape(groups, -1, chunks.shape[-1])[:, :per_group]
    return tokens.reshape(-1, chunks.shape[-1])[:num_tokens]


def _pad(x, axis, multiple):
    padding = [(0, 0)] * x.ndim
    padding[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, padding, constant_values=PAD_ID)


def _mean(embedding):
    """The mean row, float32 [D]: its logit is the mean logit, with no need to read them all."""
    return jnp.mean(embedding.astype(jnp.float32), axis=0)


def _chunk_losses(hidden, embedding, mean, labels, label_smoothing):
    """Logits, log-sum-exp, is-label mask and the two loss sums of one chunk, all in float32."""
    logits = jnp.einsum("GTD,VD->GTV", hidden, embedding, preferred_element_type=jnp.float32)
    logits = constrain(logits, "vocab_batch", None, "vocab")
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_normalizer = constrain(log_normalizer, "vocab_batch", None, None)
    # A label below 0 would count from the end: moved past it, it gives NaN like any invalid id.
    labels = jnp.where(labels < 0, embedding.shape[0], labels)
    is_label = labels[..., None] == jnp.arange(embedding.shape[0], dtype=labels.dtype)[None, None]
    label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    real = labels != PAD_ID
    nll = log_normalizer[..., 0] - label_logit
    loss = nll = jnp.where(real, nll, 0.0)
    if label_smoothing:  # with ε = 0 a token of probability 0 would give 0 · inf, NaN
        # -Σ_v (ε/V) log p_v, the smoothed share of the loss, needs only the mean logit (not as a
        # matrix product: TPUs round its factors to bfloat16).
        uniform = log_normalizer[..., 0] - jnp.sum(
            hidden.astype(jnp.float32) * mean[None, None], axis=-1
        )
        loss = (1.0 - label_smoothing) * nll + label_smoothing * jnp.where(real, uniform, 0.0)
    return logits, log_normalizer, is_label, jnp.sum(loss), jnp.sum(nll)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused(hidden, embedding, labels, label_smoothing, chunk_size):
    embedding = embedding.astype(hidden.dtype)

    def step(sums, chunk):
        *_, loss, nll = _chunk_losses(chunk[0], embedding, mean, chunk[1], label_smoothing)
        return (sums[0] + loss, sums[1] + nll), None

    mean = _mean(embedding)
    return jax.lax.scan(step, (0.0, 0.0), _chunks(hidden, labels, chunk_size))[0]


def _fused_forward(hidden, embedding, labels, label_smoothing, chunk_size):
    compute = embedding.astype(hidden.dtype)
    mean, transposed = _mean(compute), compute.dtype == jnp.float32

    def step(carry, chunk):
        loss_sum, nll_sum, d_embedding = carry
        hidden, labels = chunk
        logits, log_normalizer, is_label, loss, nll = _chunk_losses(
            hidden, compute, mean, labels, label_smoothing
        )
        # ∂loss/∂logits = softmax(logits) - target distribution
        target = jnp.where(is_label, 1.0 - label_smoothing, 0.0) + label_smoothing / logits.shape[2]
        d_logits = jnp.where(
            (labels != PAD_ID)[..., None], jnp.exp(logits - log_normalizer) - target, 0
        )
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("GTV,VD->GTD", d_logits, compute)
        d_hidden = constrain(d_hidden, "vocab_batch", None, None)
        # Summed over two axes instead of one, and transposed in float32: of all ways to write this,
        # the fastest with XLA on CPU, and twice as fast as others.
        d_logits, hidden = (x.reshape(len(x), 2, -1, x.shape[2]) for x in (d_logits, hidden))
        if transposed:
            d_embedding += jnp.einsum("GCTD,GCTV->GDV", hidden, d_logits)
            d_embedding = constrain(d_embedding, "vocab_batch", None, "vocab")
        else:
            d_embedding += jnp.einsum(
                "GCTV,GCTD->GVD", d_logits, hidden, preferred_element_type=jnp.float32
            )
            d_embedding = constrain(d_embedding, "vocab_batch", "vocab", None)
        return (loss_sum + loss, nll_sum + nll, d_embedding), d_hidden

    chunks = _chunks(hidden, labels, chunk_size)
    # Each group sums its own chunks; the groups are summed once, after the loop.
    shape = embedding.shape[::-1] if transposed else embedding.shape
    d_embedding = jnp.zeros((chunks[0].shape[1], *shape), jnp.float32)
    (loss, nll, d_embedding), d_hidden = jax.lax.scan(step, (0.0, 0.0, d_embedding), chunks)
    d_hidden = _joined(d_hidden, len(hidden))
    d_embedding = jnp.sum(d_embedding, axis=0)
    d_embedding = (d_embedding.T if transposed else d_embedding).astype(embedding.dtype)
    return (loss, nll), (d_hidden, d_embedding, labels)


def _fused_backward(label_smoothing, chunk_size, residuals, cotangents):
    d_hidden, d_embedding, labels = residuals
    d_loss, _ = cotangents
    no_gradient = np.zeros(labels.shape, jax.dtypes.float0)

    def scaled(gradient: Array) -> Array:
        return (d_loss * gradient.astype(jnp.float32)).astype(gradient.dtype)

    return scaled(d_hidden), scaled(d_embedding), no_gradient


_fused.defvjp(_fused_forward, _fused_backward)
