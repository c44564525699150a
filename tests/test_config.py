"""Impossible models are refused with one helpful line; the paper's models have its sizes."""

import dataclasses
import json
import re
from typing import get_args

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxformer import config as config_module
from jaxformer.config import PRESETS, TransformerConfig
from jaxformer.errors import UserError
from train.config import DataConfig, EvaluateConfig, OptimizerConfig, ParallelConfig, TrainConfig

NAN = float("nan")

# (the field to blame, its value, other fields, what the fix must say)
IMPOSSIBLE = [
    ("norm", "middle", {}, "post, pre"),
    ("activation", "tanh", {}, "relu, gelu, swish, glu, reglu, geglu, swiglu"),
    ("embeddings", "tied", {}, "shared, target, separate"),
    ("positions", "rotary", {}, "sinusoidal, sinusoidal_concat, learned"),
    ("dtype", "float16", {}, "float32, bfloat16"),
    ("flash_attention", "triton", {}, "auto, cudnn, pallas, none"),
    ("d_model", 0, {}, "at least 1"),
    ("d_model", 15, {"num_heads": 3}, "even"),
    ("d_ff", 0, {}, "at least 1"),
    ("num_heads", 0, {}, "at least 1"),
    ("num_heads", 7, {}, "divisor of d_model=512"),
    ("head_dim", 0, {}, "at least 1, or None"),
    ("value_dim", -3, {}, "at least 1, or None"),
    ("encoder_layers", 0, {}, "at least 1"),
    ("decoder_layers", -1, {}, "at least 1"),
    ("vocab_size", 3, {}, "at least 4"),
    ("source_vocab_size", 3, {"embeddings": "separate"}, "at least 4"),
    ("source_vocab_size", 99, {}, '37000 (vocab_size) or set embeddings to "target"'),
    ("dropout", 1.0, {}, "from 0 up to, not including, 1"),
    ("dropout", NAN, {}, "from 0 up to, not including, 1"),
    ("attention_dropout", -0.1, {}, "from 0 up to, not including, 1"),
    ("activation_dropout", 1.5, {}, "from 0 up to, not including, 1"),
    ("label_smoothing", 1.0, {}, "from 0 up to, not including, 1"),
    ("max_length", 1, {}, "at least 2"),
    ("layer_norm_epsilon", 0.0, {}, "small positive number"),
    ("layer_norm_epsilon", NAN, {}, "small positive number"),
]


@pytest.fixture
def without_type_checks(monkeypatch):
    """As for users: conftest.py's import hook would refuse a wrong Literal first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("field, value, others, fix", IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_field_value_and_fix(field, value, others, fix):
    with pytest.raises(UserError) as caught:
        TransformerConfig(**others, **{field: value})
    message = str(caught.value)
    assert message.startswith(f"TransformerConfig.{field} is {value!r}: ")
    assert fix in message
    assert "\n" not in message


def test_every_field_that_can_be_impossible_is_in_the_table():
    fields = {f.name for f in dataclasses.fields(TransformerConfig) if f.type != "bool"}
    assert {field for field, *_ in IMPOSSIBLE} == fields


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 7, "head_dim": 73},
        {"d_model": 15, "num_heads": 3, "positions": "learned"},
        {"source_vocab_size": 99, "embeddings": "separate"},
        {"source_vocab_size": 99, "embeddings": "target"},
        {"source_vocab_size": 37_000, "embeddings": "shared"},
        {"vocab_size": 4, "d_ff": 1, "max_length": 2, "dropout": 0.0, "label_smoothing": 0.0},
        *[{"norm": name} for name in get_args(config_module.Norm)],
        *[{"activation": name} for name in get_args(config_module.Activation)],
        *[{"positions": name} for name in get_args(config_module.Positions)],
    ],
)
def test_possible_values_are_accepted(changes):
    config = TransformerConfig(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_widths_of_a_head_default_to_the_paper():
    config = TransformerConfig(d_model=36, num_heads=3)
    assert (config.query_key_dim, config.head_value_dim) == (12, 12)
    config = config.replace(head_dim=5)
    assert (config.query_key_dim, config.head_value_dim) == (5, 5)
    config = config.replace(value_dim=7)
    assert (config.query_key_dim, config.head_value_dim) == (5, 7)


def test_replace_checks_names_and_values():
    config = TransformerConfig().replace(d_ff=31)
    assert config == TransformerConfig(d_ff=31)
    with pytest.raises(UserError, match=r"no field 'd_fff': choose one of .*'d_ff'"):
        config.replace(d_fff=3)
    with pytest.raises(UserError, match=r"TransformerConfig\.d_ff is 0"):
        config.replace(d_ff=0)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = PRESETS[name].replace(head_dim=7, layer_norm_epsilon=1e-5, embeddings="target")
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", 128.0, "d_model is 128.0: give a whole number"),
        ("head_dim", "8", "head_dim is '8': give a whole number"),
        ("vocab_size", None, "vocab_size is None: give a whole number"),
        ("dropout", "0.1", "dropout is '0.1': give a number"),
        ("remat", 1, "remat is 1: give True or False"),
    ],
)
def test_values_of_another_kind(field, value, message):
    with pytest.raises(UserError, match=re.escape(f"TransformerConfig.{message}")):
        TransformerConfig(**{field: value})


@pytest.mark.usefixtures("without_type_checks")
def test_values_of_numpy_and_jax_become_those_of_json():
    config = TransformerConfig(
        d_model=np.int64(64), dropout=np.float32(0.25), remat=np.True_, dtype=jnp.bfloat16
    )
    assert config == TransformerConfig(d_model=64, dropout=0.25, remat=True, dtype="bfloat16")
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    data = DataConfig(train=["a", "b"], weights=[np.float64(0.5)])
    assert (data.train, data.weights) == (("a", "b"), (0.5,))
    with pytest.raises(UserError, match=r"dtype is .*: choose one of float32, bfloat16"):
        TransformerConfig(dtype=jnp.float16)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (EvaluateConfig, {"metric": "BLEU"}, "evaluate.metric is 'BLEU': choose one of bleu, "),
        (DataConfig, {"batch_tokens": 2048.0}, "data.batch_tokens is 2048.0: give a whole number"),
        (DataConfig, {"train": "train"}, "data.train is 'train': give several, each a string"),
        (TrainConfig, {"accumulate": 1.5}, "accumulate is 1.5: give a whole number"),
        (TrainConfig, {"model": {}}, "model is {}: give a TransformerConfig"),
        (
            TrainConfig,
            {"data": DataConfig(joint_vocabulary=False)},
            "data.joint_vocabulary is False but model.embeddings is 'shared'",
        ),
        (DataConfig, {"batch_tokens": 99}, "data.batch_tokens is 99: give at least a row of data."),
        (EvaluateConfig, {"validation_beam_size": 0}, "evaluate.validation_beam_size is 0: give"),
        (EvaluateConfig, {"length_penalty": 11.0}, "evaluate.length_penalty is 11.0: give"),
        (ParallelConfig, {"tensor": 2}, "need --parallel.strategy mesh"),
        (OptimizerConfig, {"epsilon": 0}, "optimizer.epsilon is 0: give more than 0"),
        (TrainConfig, {"accumulate": 10**20}, "accumulate is 100000000000000000000: give at most"),
        (
            ParallelConfig,
            {"coordinator": "1234", "processes": 2, "process": 0},
            "'1234': give HOST",
        ),
    ],
)
def test_a_configuration_file_in_python_is_checked_as_well(section, values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        section(**values)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": "x"}, "data is 'x': give an object with its fields"),
        ({"evaluate": None}, "evaluate is None: give an object with its fields"),
        ({"data": {"target_length": "32"}}, "data.target_length is '32': give a whole number"),
        ({"data": {"weights": [1, "a"]}}, "data.weights is [1, 'a']: give several, each a number"),
        ({"data": {"path": 3}}, "data.path is 3: give a string or None"),
        ({"data": {"joint_vocabulary": 1}}, "data.joint_vocabulary is 1: give True or False"),
        ({"steps": True}, "steps is True: give a whole number"),
        (
            {"evaluate": {"metric": "ter"}},
            "evaluate.metric is 'ter': choose one of bleu, chrf, loss",
        ),
    ],
)
def test_sections_of_another_kind(section, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig.from_dict(section)


def test_a_whole_number_is_a_number():
    assert TrainConfig.from_dict({"optimizer": {"beta1": 0}}).optimizer.beta1 == 0


def test_from_dict_keeps_defaults_and_refuses_what_it_does_not_know():
    assert TransformerConfig.from_dict({"d_ff": 31}) == TransformerConfig(d_ff=31)
    with pytest.raises(ValueError, match="no field 'layers'"):  # a UserError is a ValueError
        TransformerConfig.from_dict({"layers": 6})


def test_configs_are_values():
    """Frozen, and hashable because linen modules with equal configs must share compilations."""
    config = TransformerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3
    assert len({config, TransformerConfig(), config.replace(remat=True)}) == 2
    with pytest.raises(TypeError):
        PRESETS["base"] = config
