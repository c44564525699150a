"""The fused loss against the plain one: same sums, same gradients, much less memory."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxformer.config import PAD_ID
from jaxformer.errors import UserError
from jaxformer.losses import cross_entropy, cross_entropy_sums

B, T, D, V = 3, 7, 5, 11


def example(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    embedding = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    labels = rng.integers(1, V, (B, T))
    labels[0, 4:] = labels[2, 0] = PAD_ID
    return hidden, embedding, jnp.asarray(labels, jnp.int32)


def plain(hidden, embedding, labels, label_smoothing):
    """-Σ target · log_softmax with all logits at once: (loss, nll) sums over real tokens."""
    log_probs = jax.nn.log_softmax(jnp.einsum("...D,VD->...V", hidden, embedding))
    onehot = jax.nn.one_hot(labels, V)
    target = (1 - label_smoothing) * onehot + label_smoothing / V
    real = (labels != PAD_ID)[..., None]
    return -jnp.sum(real * target * log_probs), -jnp.sum(real * onehot * log_probs)


@pytest.mark.parametrize(
    "chunk_size, label_smoothing",
    [(1, 0.1), (4, 0.0), (8, 0.1), (B * T, 0.3), (1000, 0.1)],
)
def test_is_the_plain_cross_entropy(chunk_size, label_smoothing):
    """With chunks of one token, of several, with a remainder, of all, and of more than all."""
    hidden, embedding, labels = example()

    @jax.jit
    def fused(hidden, embedding):
        sums = cross_entropy_sums(
            hidden, embedding, labels, label_smoothing=label_smoothing, chunk_size=chunk_size
        )
        return sums.loss, sums

    @jax.jit
    def reference(hidden, embedding):
        return plain(hidden, embedding, labels, label_smoothing)

    gradients, sums = jax.grad(fused, argnums=(0, 1), has_aux=True)(hidden, embedding)
    expected = jax.grad(reference, argnums=(0, 1), has_aux=True)(hidden, embedding)[0]
    loss, nll = reference(hidden, embedding)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-6)
    assert sums.weight == jnp.sum(labels != PAD_ID) == B * T - 4
    np.testing.assert_allclose(gradients[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(gradients[1], expected[1], atol=1e-5)
    # Without gradients the value comes from another program.
    value, _ = fused(hidden, embedding)
    np.testing.assert_allclose(value, loss, rtol=1e-6)


def test_padding_labels_weigh_nothing():
    hidden, embedding, labels = example()
    loss = jax.jit(
        jax.value_and_grad(functools.partial(cross_entropy, label_smoothing=0.1), has_aux=True)
    )
    (value, weight), d_hidden = loss(hidden, embedding, labels)
    padding = np.asarray(labels == PAD_ID)
    assert not np.any(np.asarray(d_hidden)[padding])
    assert np.all(np.any(np.asarray(d_hidden)[~padding], axis=-1))
    # The vectors at padding do not matter.
    hidden = jnp.where(padding[..., None], 1e4, hidden)
    (other, other_weight), _ = loss(hidden, embedding, labels)
    assert (other, other_weight) == (value, weight)
    (nothing, no_weight), d_hidden = loss(hidden, embedding, jnp.zeros_like(labels))
    assert nothing == no_weight == 0 and not np.any(d_hidden)


@pytest.mark.parametrize("shape", [(21,), (7, 3), (1, 3, 7), (7, 1, 3, 1)])
def test_any_number_of_leading_axes(shape):
    hidden, embedding, labels = example()
    hidden, labels = hidden.reshape(*shape, D), labels.reshape(shape)
    loss, weight = cross_entropy(hidden, embedding, labels, label_smoothing=0.1, chunk_size=8)
    assert loss.shape == weight.shape == () and loss.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose(loss, plain(hidden, embedding, labels, 0.1)[0], rtol=1e-6)
    assert weight == B * T - 4


def test_uniform_logits_cost_log_v_however_they_are_smoothed():
    _, embedding, labels = example()
    for label_smoothing in (0.0, 0.1, 0.9):
        loss, nll, weight = cross_entropy_sums(
            jnp.zeros((B, T, D)), embedding, labels, label_smoothing=label_smoothing
        )
        np.testing.assert_allclose(loss / weight, np.log(V), rtol=1e-6)
        np.testing.assert_allclose(nll / weight, np.log(V), rtol=1e-6)


def test_gradients_of_gradients():
    """As for a penalty on the gradient's norm; forward over reverse is impossible."""
    hidden, embedding, labels = example()

    def penalty(loss):
        def norm(hidden, embedding):
            gradients = jax.grad(loss, argnums=(0, 1))(hidden, embedding)
            return sum(jnp.sum(leaf**2) for leaf in gradients)

        return jax.grad(norm, argnums=(0, 1))(hidden, embedding)

    found = penalty(lambda *x: cross_entropy(*x, labels, label_smoothing=0.1, chunk_size=4)[0])
    expected = penalty(lambda *x: plain(*x, labels, 0.1)[0])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_scaled_loss():
    """As when it is divided by the tokens of all devices; the reported nll has no gradient."""
    hidden, embedding, labels = example()

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(inputs, scales):
        def scaled(inputs):
            sums = cross_entropy_sums(*inputs, labels, label_smoothing=0.1, chunk_size=8)
            return scales[0] * sums.loss + scales[1] * sums.nll + scales[2] * sums.weight

        return jax.grad(scaled)(inputs)

    once, scaled = (gradients((hidden, embedding), s) for s in ((1.0, 0, 0), (-0.25, 3.0, 2.0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-0.25 * a, b, rtol=1e-5), once, scaled)


def test_bfloat16_hidden_with_a_float32_loss():
    hidden, embedding, labels = example(dtype=jnp.bfloat16)

    @jax.jit
    def run(hidden, embedding):
        return jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True)(
            hidden, embedding, labels, label_smoothing=0.1, chunk_size=8
        )

    (loss, weight), (d_hidden, d_embedding) = run(hidden, embedding)
    assert loss.dtype == weight.dtype == d_embedding.dtype == jnp.float32
    assert d_hidden.dtype == jnp.bfloat16
    # The embedding is rounded; from there on logits and sums are exact.
    rounded = embedding.astype(jnp.bfloat16).astype(jnp.float32)
    exact = plain(hidden.astype(jnp.float32), rounded, labels, 0.1)[0]
    np.testing.assert_allclose(loss, exact, rtol=2e-6)
    expected = jax.grad(lambda *inputs: plain(*inputs, labels, 0.1)[0], argnums=(0, 1))(
        hidden.astype(jnp.float32), rounded
    )
    for actual, wanted in zip((d_hidden, d_embedding), expected, strict=True):
        error = np.abs(np.asarray(actual, np.float32) - wanted)
        assert np.max(error) < 2**-6 * np.max(np.abs(wanted))


def test_large_logits_stay_finite():
    hidden, embedding, labels = example()
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda h: cross_entropy(1e4 * h, embedding, labels)[0])
    )(hidden)
    exact = plain(1e4 * hidden, embedding, labels, 0.0)[0]
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_vmap():
    """Over models, each with its own hidden vectors and softmax matrix."""
    examples = [example(seed) for seed in range(2)]
    labels = examples[0][2]
    hidden, embedding = (jnp.stack(arrays) for arrays in list(zip(*examples, strict=True))[:2])

    def value_and_grad(hidden, embedding):
        return jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True)(
            hidden, embedding, labels, label_smoothing=0.1, chunk_size=8
        )

    together = jax.jit(jax.vmap(value_and_grad))(hidden, embedding)
    alone = jax.jit(value_and_grad)
    for i in range(2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            jax.tree.map(lambda leaf, i=i: leaf[i], together),
            alone(hidden[i], embedding[i]),
        )


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """All logits of 8192 tokens are 256 MiB here; a chunk of them is 8."""
    vocab_size, d_model, chunk_size = 8192, 32, 256

    def temporary_bytes(tokens):
        run = jax.jit(
            jax.value_and_grad(
                functools.partial(cross_entropy, label_smoothing=0.1, chunk_size=chunk_size),
                argnums=(0, 1),
                has_aux=True,
            )
        )
        compiled = run.lower(
            jax.ShapeDtypeStruct((tokens, d_model), jnp.float32),
            jax.ShapeDtypeStruct((vocab_size, d_model), jnp.float32),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 8192 * vocab_size * 4
    one, two = temporary_bytes(8192), temporary_bytes(16_384)
    assert one < 0.2 * all_logits
    assert two - one < 0.05 * all_logits


@pytest.mark.parametrize("label", [-1, -100, 11])
def test_a_label_that_is_no_id_is_noticed(label):
    """-100 is what other libraries ignore; here padding is 0."""
    hidden, embedding = jnp.ones((3, 4)), jnp.ones((11, 4))
    loss, _ = cross_entropy(hidden, embedding, jnp.array([2, label, 0]))
    assert jnp.isnan(loss)
    assert jnp.isfinite(cross_entropy(hidden, embedding, jnp.array([2, 10, 0]))[0])


@pytest.mark.parametrize("shape", [(2, 5), (4, 4), (4, 2), (2,)])
def test_labels_that_are_not_one_a_prediction_are_refused(monkeypatch, shape):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    arguments = jnp.ones((2, 4, 8)), jnp.ones((5, 8)), jnp.ones(shape, jnp.int32)
    with pytest.raises(UserError, match=r"labels are .*, predictions \[2, 4\]: give a label for"):
        cross_entropy(*arguments)


def test_labels_that_are_no_integers_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match="labels are float32: give integers"):
        cross_entropy(jnp.ones((2, 8)), jnp.ones((5, 8)), jnp.ones(2))


def test_no_tokens_have_no_loss():
    sums = cross_entropy_sums(jnp.ones((0, 8)), jnp.ones((5, 8)), jnp.ones(0, jnp.int32))
    assert [float(x) for x in sums] == [0, 0, 0]


def test_a_bfloat16_table_has_a_bfloat16_gradient():
    arguments = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((5, 8), jnp.bfloat16), jnp.array([1, 2])
    gradients = jax.grad(lambda *x: cross_entropy(*x)[0], argnums=(0, 1))(*arguments)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_gradients_of_bfloat16_are_summed_in_float32():
    hidden, embedding, labels = example(dtype=jnp.bfloat16)
    gradient = jax.grad(lambda table: cross_entropy(hidden, table, labels)[0])(embedding)
    assert gradient.dtype == jnp.float32
    assert np.any(gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32))
