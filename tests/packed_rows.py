"""Rows with very different numbers of tokens, and a comparison of two trainings on them."""

import jax
import numpy as np
import pytest

from jaxformer.config import TransformerConfig

VOCABULARY, SOURCE, TARGET = 40, 11, 13
#: A model that can be split over heads, widths and vocabulary, and is quick to compile.
SPLITTABLE = TransformerConfig(
    vocab_size=64,
    d_model=16,
    d_ff=24,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=2,
    scan_layers=True,
    dropout=0.0,  # dropout is slow to compile
)
KEY = jax.random.key(5)


def packed_rows(lengths, seed=0):
    """Row r holds random pairs of the lengths `lengths[r]`: [(source, target), …], with eos."""
    draw = np.random.default_rng(seed)
    shapes = {"source_ids": SOURCE, "target_ids": TARGET, "labels": TARGET}
    shapes |= {"source_segment_ids": SOURCE, "target_segment_ids": TARGET}
    batch = {name: np.zeros((len(lengths), length), np.int32) for name, length in shapes.items()}
    for row, pairs in enumerate(lengths):
        s = t = 0
        for segment, (source, target) in enumerate(pairs, start=1):
            batch["source_ids"][row, s : s + source] = [
                *draw.integers(4, VOCABULARY, source - 1),
                2,
            ]
            batch["source_segment_ids"][row, s : s + source] = segment
            labels = [*draw.integers(4, VOCABULARY, target - 1), 2]
            batch["labels"][row, t : t + target] = labels
            batch["target_ids"][row, t : t + target] = [1, *labels[:-1]]
            batch["target_segment_ids"][row, t : t + target] = segment
            s, t = s + source, t + target
    return batch


# Rows of 0 to 13 target tokens; of 8 devices, two have nothing but padding.
PAIRS = [[(5, 6), (6, 7)], [(11, 13)], [], [], [(2, 2)], [], [(4, 9)], [(3, 3), (3, 3)]]
PAIRS += [[], [], [(7, 12)], [(9, 2)], [(6, 2)], [], [(5, 4), (6, 9)], [(8, 8)]]
BATCH = packed_rows(PAIRS)
TOKENS = sum(target for row in PAIRS for _, target in row)


def run_steps(step, state, batch, number=3):
    """Return the state and the metrics after each step."""
    history = []
    for _ in range(number):
        state, metrics = step(state, batch, KEY)
        history.append(jax.device_get((state, metrics)))
    return history


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, expected
    )


def largest_difference(actual, expected):
    differences = jax.tree.map(lambda a, b: np.abs(np.subtract(a, b)).max(), actual, expected)
    return max(jax.tree.leaves(differences))


def assert_same_training(history, expected):
    for (state, metrics), (expected_state, expected_metrics) in zip(history, expected, strict=True):
        assert state.step == expected_state.step
        assert_close(state.params, expected_state.params)
        assert metrics.keys() == expected_metrics.keys()
        for name, value in metrics.items():
            assert value == pytest.approx(expected_metrics[name], abs=1e-5, rel=1e-5), name
