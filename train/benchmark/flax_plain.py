"""The same work, as a Linen user would write it with what Flax and Optax provide."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.config import PAD_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.positions import sinusoid


class PlainTransformer(nn.Module):
    """Encoder and decoder of Linen's own attention, Dense, LayerNorm and Embed."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array, *, deterministic: bool) -> jax.Array:
        """Logits [B, T, V] in float32."""
        config, dtype = self.config, self.config.dtype
        table = nn.Embed(config.vocab_size, config.d_model, dtype=dtype)
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)

        def embed(ids: jax.Array) -> jax.Array:
            positions = sinusoid(jnp.arange(ids.shape[1])[None], config.d_model)
            return dropout(table(ids) * config.d_model**0.5 + positions.astype(dtype))

        def attend(x: jax.Array, memory: jax.Array, mask: jax.Array) -> jax.Array:
            attention = nn.MultiHeadDotProductAttention(
                config.num_heads, use_bias=False, dtype=dtype, deterministic=True
            )
            return nn.LayerNorm(dtype=dtype)(x + dropout(attention(x, memory, mask=mask)))

        def feed_forward(x: jax.Array) -> jax.Array:
            hidden = nn.relu(nn.Dense(config.d_ff, dtype=dtype)(x))
            y = nn.Dense(config.d_model, dtype=dtype)(hidden)
            return nn.LayerNorm(dtype=dtype)(x + dropout(y))

        real = source != PAD_ID
        memory = embed(source)
        for _ in range(config.encoder_layers):
            memory = attend(memory, memory, nn.make_attention_mask(real, real))
            memory = feed_forward(memory)
        x = embed(target)
        for _ in range(config.decoder_layers):
            x = attend(x, x, nn.make_causal_mask(target))
            x = attend(x, memory, nn.make_attention_mask(target >= 0, real))
            x = feed_forward(x)
        return table.attend(x).astype(jnp.float32)


def plain_step(
    kind: str, config: TransformerConfig, batches: Sequence[dict[str, np.ndarray]]
) -> Callable[[], tuple[int, int]]:
    """Return a function that takes one step on one device and returns real tokens and positions.

    Raises:
      UserError: the model is not the post-norm one of the paper.
    """
    if (config.norm, config.activation, config.embeddings) != ("post", "relu", "shared"):
        raise UserError("flax-plain is post-norm with relu and shared embeddings: use such a model")
    model, adam = PlainTransformer(config), optax.adam(1e-4, b2=0.98, eps=1e-9)
    ids = jnp.ones((1, 2), jnp.int32)
    params = jax.jit(partial(model.init, deterministic=True))(jax.random.key(0), ids, ids)
    state = params, adam.init(params), jax.random.key(1)

    def loss(params: Any, batch: dict, rng: jax.Array) -> jax.Array:
        logits = model.apply(
            params,
            batch["source_ids"],
            batch["target_ids"],
            deterministic=False,
            rngs={"dropout": rng},
        )
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch["labels"], config.vocab_size), config.label_smoothing
        )
        real = batch["labels"] != PAD_ID
        return jnp.sum(optax.softmax_cross_entropy(logits, targets) * real) / jnp.sum(real)

    def train(state: Any, batch: dict) -> tuple[Any, jax.Array]:
        params, moments, rng = state
        rng, used = jax.random.split(rng)
        value, gradient = jax.value_and_grad(loss)(params, batch, used)
        updates, moments = adam.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments, rng), value

    def forward(state: Any, batch: dict) -> tuple[Any, Any]:
        source, target = batch["source_ids"], batch["target_ids"]
        return state, model.apply(state[0], source, target, deterministic=True)

    compiled = jax.jit(train if kind == "train" else forward, donate_argnums=0)

    def step(batch: dict[str, np.ndarray]) -> tuple[int, int]:
        nonlocal state
        state, out = compiled(state, batch)
        jax.block_until_ready((state, out))
        return int(np.count_nonzero(batch["labels"])), batch["labels"].size

    for batch in {batch["labels"].shape: batch for batch in batches}.values():
        step(batch)  # compiles
    ready = cycle(batches)
    return lambda: step(next(ready))
