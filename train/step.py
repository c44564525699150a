"""The training and the evaluation step: pure functions of arrays, the same under every runner."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxformer.losses import LossSums
from jaxformer.transformer import Transformer
from train.config import TrainConfig
from train.optimizer import make_optimizer, make_schedule
from train.state import TrainState, create_state

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def _loss_sums(model: Transformer, params: Any, batch: Batch, rng: jax.Array | None) -> LossSums:
    """The loss sums of a packed batch; without `rng` there is no dropout."""
    sums: Any = model.apply(
        {"params": params},
        batch["source_ids"],
        batch["target_ids"],
        batch["labels"],
        source_segment_ids=batch["source_segment_ids"],
        target_segment_ids=batch["target_segment_ids"],
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
        method="loss",
    )
    return sums


def _sum_over_devices(totals: Any, axis_name: str | None) -> Any:
    """`totals` summed over the axis, if there is one."""
    if axis_name is None:
        return totals
    if jax.default_backend() == "cpu" and jax.lax.axis_size(axis_name) == 1:
        # On a CPU even a sum over one device is computed, as a copy. The barrier keeps what else it
        # did: the layers' gradients are stacked once, not by each pass of the optimizer over them.
        return jax.lax.optimization_barrier(totals)
    return jax.lax.psum(totals, axis_name)


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return `train_step(state, batch, rng, *, axis_name=None) -> (state, metrics)`.

    Losses, token counts and gradients are *summed* over the parts of the batch and, if there is an
    axis, over it by `psum`; then they are divided once, by the total number of real target tokens.
    So the update is the same however a batch is spread over devices and parts; a mean of means
    would weight a token by how full the part around it happens to be.

    `batch` holds this device's rows of a dictionary that `train.data.batches.Batches` makes; their
    number must be a multiple of `accumulate`. `rng` is the same key at every step and on every
    device: step, device and part are folded in here.
    """

    def summed_loss(params: Any, part: Batch, rng: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = _loss_sums(model, params, part, rng)
        return sums.loss, sums

    def gradients(params: Any, batch: Batch, rng: jax.Array) -> tuple[LossSums, Any]:
        gradient = jax.grad(summed_loss, has_aux=True)
        if accumulate == 1:
            gradient_sum, sums = gradient(params, batch, rng)
            return sums, gradient_sum

        def add_part(total: Any, part: Any) -> tuple[Any, None]:
            index, rows = part
            gradient_sum, sums = gradient(params, rows, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, (sums, gradient_sum)), None

        # A part is every `accumulate`-th row: each device of a mesh then has a share of every part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = LossSums(*[jnp.zeros((), jnp.float32)] * 3), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add_part, zeros, (jnp.arange(accumulate), parts))[0]

    def train_step(
        state: TrainState, batch: Batch, rng: jax.Array, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        totals = gradients(state.params, batch, rng)
        sums, gradient_sum = _sum_over_devices(totals, axis_name)
        tokens = jnp.maximum(sums.weight, 1.0)
        scale = 1.0 / tokens  # on a CPU, XLA would write out quotients that several operations use
        gradient = jax.tree.map(lambda g: g * scale, gradient_sum)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": sums.loss / tokens,
            "nll": sums.nll / tokens,
            "tokens": sums.weight,
            # Of the sums: Adam squares `gradient`, and XLA would write out squares that both use.
            "gradient_norm": scale * optax.global_norm(gradient_sum),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


class Training(NamedTuple):
    """The functions that a runner compiles."""

    create_state: Callable[[jax.Array], TrainState]  # from a key
    train_step: Callable[..., tuple[TrainState, Metrics]]  # as `make_train_step` returns it


def make_training(model: Transformer, config: TrainConfig) -> Training:
    """Return how `config` says that a model is initialised and trained."""
    schedule = make_schedule(config.optimizer, model.config.d_model, config.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    return Training(
        partial(create_state, model, optimizer),
        make_train_step(model, optimizer, schedule, accumulate=config.accumulate),
    )


def make_eval_step(model: Transformer) -> Callable[..., LossSums]:
    """Return `eval_step(params, batch, *, axis_name=None) -> LossSums`, without dropout."""

    def eval_step(params: Any, batch: Batch, *, axis_name: str | None = None) -> LossSums:
        return _sum_over_devices(_loss_sums(model, params, batch, rng=None), axis_name)

    return eval_step
