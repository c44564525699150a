"""Ids of any integer type keep their meaning, and what is no id is reported in one line."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxformer.attention import MultiHeadAttention, dot_product_attention
from jaxformer.config import EOS_ID, TransformerConfig
from jaxformer.decoding import beam_search
from jaxformer.dropout import dropout
from jaxformer.embedding import Embedding
from jaxformer.errors import UserError
from jaxformer.generation import generate
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator
from jaxformer.ids import as_ids, shift_right
from jaxformer.linear import Linear
from jaxformer.losses import cross_entropy
from jaxformer.masks import causal_mask, padding_mask, segment_mask
from jaxformer.positions import segment_positions
from jaxformer.schedules import cooldown, warmup_inverse_sqrt
from jaxformer.scoring import token_log_probs
from jaxformer.transformer import Transformer
from random_run import CONFIG, params_of

KEY = jax.random.key(0)
OPTIONS = GenerationConfig(beam_size=1, max_length_extra=2)


@pytest.fixture(autouse=True)
def own_checks(monkeypatch):
    """Type checks would come first, so they are off."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_any_integers_are_the_same_ids(dtype):
    assert_array_equal(as_ids(np.array([0, 7, 127], dtype)), [0, 7, 127])
    assert as_ids(jnp.array([1], dtype)).dtype == jnp.int32


@pytest.mark.parametrize("value", [-1, -(2**40), 2**31, 2**32 + 5, 2**63 - 1])
def test_what_does_not_fit_is_no_id(value):
    assert as_ids(np.array([value, 5])).tolist() == [-1, 5]
    table = Embedding(10, 8)
    vectors = table.apply(table.init(KEY, jnp.zeros((1, 1), int)), np.array([[value, 5]]))
    assert np.isnan(vectors[0, 0]).all() and np.isfinite(vectors[0, 1]).all()


def test_labels_of_few_bits_are_not_another_token():
    """-1 as int8 is not id 255 of 256, nor is 36,000 as int16 id 7,464 of 37,000."""
    hidden, draw = jnp.ones((1, 4)), np.random.default_rng(0)
    for size, label in ((256, np.int8(-1)), (300, np.int8(-1)), (37_000, np.int16(-29_536))):
        embedding = jnp.asarray(draw.normal(size=(size, 4)), jnp.float32)
        assert np.isnan(cross_entropy(hidden, embedding, np.array([label]))[0])
    expected = cross_entropy(hidden, embedding, np.array([44]))
    assert_array_equal(cross_entropy(hidden, embedding, np.array([44], np.int8)), expected)
    assert np.isnan(cross_entropy(hidden, embedding, np.array([2**32 + 44]))[0])


def test_what_is_no_token_has_no_log_probability():
    labels = np.array([[4, -1], [4, CONFIG.vocab_size], [4, 5]])
    found = token_log_probs(CONFIG, params_of(), np.full((3, 2), 6), labels)
    assert_array_equal(np.isfinite(found), [[True, False], [True, False], [True, True]])


ONES = jnp.ones((1, 3, 2, 4))
WRONG = {
    "source_ids are a list: give an array": lambda: generate(CONFIG, params_of(), [[4, 2]]),
    "prefix are a list": lambda: generate(
        CONFIG, params_of(), np.array([[4, 2]]), OPTIONS, prefix=[[5]]
    ),
    "the tokens of a sentence are float64": lambda: Generator(CONFIG, params_of()).generate(
        [[4.5, 2.0]], OPTIONS
    ),
    "sources are not lists of ids": lambda: Generator(CONFIG, params_of()).generate([4], OPTIONS),
    "give a GenerationConfig": lambda: Generator(CONFIG, params_of()).generate([[4]], {}),
    "devices is empty": lambda: Generator(CONFIG, params_of(), devices=[]),
    "or has one twice": lambda: Generator(CONFIG, params_of(), devices=2 * jax.devices()[:1]),
    "target_ids are float32": lambda: Transformer(CONFIG).init(
        KEY, jnp.ones((1, 2), int), jnp.ones((1, 2))
    ),
    "labels are a list": lambda: cross_entropy(jnp.ones((1, 4)), jnp.ones((9, 4)), [1]),
    "labels are a list: give an array": lambda: shift_right([[4, 2]]),
    r"labels are \(1, 2\) and segment_ids \(1, 3\)": lambda: shift_right(
        jnp.ones((1, 2), int), jnp.ones((1, 3), int)
    ),
    "ids are a list": lambda: padding_mask([[4, 2]]),
    "segment_ids are a list": lambda: segment_positions([[1, 1]]),
    "key_segment_ids are float32": lambda: segment_mask(jnp.ones((1, 2), int), jnp.ones((1, 2))),
    "give both the same width": lambda: cross_entropy(
        jnp.ones((1, 1)), jnp.ones((9, 8)), jnp.array([1])
    ),
    "predictions are int32": lambda: cross_entropy(
        jnp.ones((1, 8), jnp.int32), jnp.ones((9, 8)), jnp.array([1])
    ),
    r"a mask is \[1, 1, 3, 3\] and the scores are \[1, 2, 1, 3\]": lambda: dot_product_attention(
        ONES[:, :1], ONES, ONES, causal_mask(3)
    ),
    r"a mask is \[2, 1, 1, 3\]": lambda: dot_product_attention(
        ONES, ONES, ONES, jnp.ones((2, 1, 1, 3), bool)
    ),
    "a mask is True": lambda: dot_product_attention(ONES, ONES, ONES, True),
    "flash is 'cuddn'": lambda: dot_product_attention(ONES, ONES, ONES, flash="cuddn"),
    "a dropout rate is -0.5": lambda: MultiHeadAttention(2, 4, dropout_rate=-0.5).init(
        {"params": KEY, "dropout": KEY}, ONES[0], ONES[0], deterministic=False
    ),
    "the input of dropout is int32": lambda: dropout(jnp.ones((2, 4), jnp.int32), 0.5, KEY),
    "a linear map of 1 axes": lambda: Linear(0).init(KEY, jnp.ones((2, 3))),
    "a linear map of -1 axes": lambda: Linear(4, input_axes=-1).init(KEY, jnp.ones((2, 3))),
    "the cool-down has -5 steps": lambda: cooldown(lambda _: 1.0, steps=-5, end=10),
    "peak is -1.0": lambda: warmup_inverse_sqrt(warmup_steps=4, peak=-1.0),
    "warmup_steps is nan": lambda: warmup_inverse_sqrt(warmup_steps=float("nan"), peak=1.0),
    "dtype is None: choose one of": lambda: TransformerConfig(dtype=None),
    "length_penalty is 0.6: wrap it in gnmt_length_penalty": lambda: beam_search(
        lambda *_: None, None, batch_size=1, beam_size=2, max_length=3, length_penalty=0.6
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_one_line_says_what_is_wrong(message):
    with pytest.raises(UserError, match=message):
        WRONG[message]()


def test_nothing_to_attend_to_gives_zeros():
    nothing = ONES[:, :0]
    for mask in (None, jnp.ones((1, 1, 1, 0), bool)):
        assert_array_equal(dot_product_attention(ONES, nothing, nothing, mask), 0 * ONES)


def test_limits_may_be_a_list():
    def step(tokens, state):
        return jnp.zeros((*tokens.shape, 6)), state

    settings = {"batch_size": 2, "beam_size": 2, "max_length": 3}
    found = beam_search(step, None, length_limits=[1, 2], **settings)
    expected = beam_search(step, None, length_limits=jnp.array([1, 2]), **settings)
    assert_array_equal(found.sequences, expected.sequences)
    assert np.asarray(found.lengths).max() == 2 and EOS_ID < 6


def test_a_width_may_be_of_numpy():
    x = jnp.ones((2, 3))
    assert Linear(np.int64(4)).init_with_output(KEY, x)[0].shape == (2, 4)
