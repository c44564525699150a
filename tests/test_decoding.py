"""Beam search against exhaustive search and a plain-Python beam, on models that are tables."""

import functools
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.beam import (
    BeamSearch,
    best_extensions,
    gather_beams,
    gnmt_length_penalty,
    power_length_penalty,
)
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID
from jaxformer.decoding import beam_search, greedy_search, sample
from jaxformer.top_k import log_normalizer, top_k

NODES = 1009
PAPER = gnmt_length_penalty(0.6)
PENALTIES = [PAPER, gnmt_length_penalty(0.0), gnmt_length_penalty(2.0), power_length_penalty(1.0)]
# Most tests share these sizes and thus one compiled program; length limits give smaller ones.
B, K, T, V = 3, 2, 7, 5


def next_node(node, token, vocab_size=V):
    """Number prefixes like the nodes of a tree, so that logits may depend on a whole prefix."""
    return (node * vocab_size + token + 1) % NODES


def random_table(seed, batch_size=B, vocab_size=V, eos_bonus=0.0):
    table = np.random.default_rng(seed).normal(size=(batch_size, NODES, vocab_size)) * 2
    table[:, :, EOS_ID] += eos_bonus
    return table.astype(np.float32)


def limits_of(table, limits, max_length):
    return np.array([max_length] * len(table) if limits is None else limits, np.int32)


def table_model(table):
    """Step function and state maker of a model with logits table[b, node of the prefix]."""
    table = jnp.asarray(table)

    def step_fn(tokens, state):
        rows = jnp.arange(len(table))[:, None]
        walked = next_node(state["node"], tokens, table.shape[-1])
        node = jnp.where(state["index"] == 0, 0, walked)  # bos leads to the root
        return table[rows, node], {"index": state["index"] + 1, "node": node}

    def init_state(beam_size):
        return {"index": jnp.int32(0), "node": jnp.zeros((len(table), beam_size), jnp.int32)}

    return step_fn, init_state


@functools.partial(jax.jit, static_argnames=("beam_size", "max_length"))
def jitted_beam_search(table, limits, penalties, beam_size, max_length):
    step_fn, init_state = table_model(table)
    return beam_search(
        step_fn,
        init_state(beam_size),
        batch_size=len(table),
        beam_size=beam_size,
        max_length=max_length,
        length_limits=limits,
        length_penalty=lambda length: penalties[length.astype(jnp.int32)],
    )


def beam(table, limits=None, beam_size=K, max_length=T, penalty=PAPER):
    """Penalties are looked up in an array, so that one compiled program serves all of them."""
    limits = limits_of(table, limits, max_length)
    penalties = penalty(np.arange(max_length + 2, dtype=np.float32))
    return jitted_beam_search(table, limits, penalties, beam_size, max_length)


@jax.jit
def jitted_greedy_search(table, limits, penalties):
    step_fn, init_state = table_model(table)
    return greedy_search(
        step_fn,
        init_state(1),
        batch_size=len(table),
        max_length=T,
        length_limits=limits,
        length_penalty=lambda length: penalties[length.astype(jnp.int32)],
    )


def greedy(table, limits=None):
    penalties = PAPER(np.arange(T + 2, dtype=np.float32))
    return jitted_greedy_search(table, limits_of(table, limits, T), penalties)


@functools.partial(jax.jit, static_argnames=("num_samples", "max_length", "options"))
def jitted_sample(table, rng, limits, num_samples, max_length, options):
    step_fn, init_state = table_model(table)
    return sample(
        step_fn,
        init_state(num_samples),
        rng,
        batch_size=len(table),
        num_samples=num_samples,
        max_length=max_length,
        length_limits=limits,
        **dict(options),
    )


def draw(table, seed=0, limits=None, num_samples=K, max_length=T, **options):
    limits = limits_of(table, limits, max_length)
    options = tuple(options.items())
    return jitted_sample(table, jax.random.key(seed), limits, num_samples, max_length, options)


def log_probs_of(table):
    table = np.asarray(table, np.float64)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def hypotheses(result, row):
    """(tokens, score) of the slots that hold a hypothesis; checks what holds for every result."""
    found = []
    leaves = (np.asarray(leaf)[row] for leaf in result)
    for tokens, score, log_prob, length in zip(*leaves, strict=True):
        assert not np.isnan(score)
        assert (tokens[length:] == PAD_ID).all()
        assert EOS_ID not in tokens[: max(length - 1, 0)]
        if log_prob == -np.inf:
            assert (score, length) == (-np.inf, 0)
        else:
            found.append((tuple(tokens[:length].tolist()), float(score)))
    return found


def row_of(result, row):
    return jax.tree.map(lambda leaf: leaf[row], result)


def assert_same_hypotheses(found, expected):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-4)


def assert_bit_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def exhaustive(log_probs, limit, penalty):
    """All hypotheses, the finished ones first, each group best first."""
    vocab_size = log_probs.shape[-1]
    others = [token for token in range(vocab_size) if token != EOS_ID]
    finished, unfinished = [], []
    for length in range(1, limit + 1):
        for prefix in itertools.product(others, repeat=length - 1):
            for last in range(vocab_size) if length == limit else [EOS_ID]:
                node, total = 0, 0.0
                for token in (*prefix, last):
                    total += log_probs[node, token]
                    node = next_node(node, token, vocab_size)
                group = finished if last == EOS_ID else unfinished
                group.append(((*prefix, last), total / penalty(length)))
    by_score = functools.partial(sorted, key=lambda hypothesis: -hypothesis[1])
    return by_score(finished) + by_score(unfinished)


def plain_beam(log_probs, beam_size, limit, penalty, early_stopping=False):
    """Beam search on Python lists by its docstring's rules, but for the one that stops exactly."""
    live, finished = [((), 0.0, 0)], []
    for _ in range(limit):
        extensions = [
            ((*tokens, token), total + log_probs[node, token], node)
            for tokens, total, node in live
            for token in range(log_probs.shape[-1])
        ]
        extensions.sort(key=lambda extension: -extension[1])
        extensions = extensions[: 2 * beam_size]
        for tokens, total, _ in extensions[: beam_size if early_stopping else None]:
            if tokens[-1] == EOS_ID:
                finished.append((tokens, total / penalty(len(tokens))))
        live = [
            (tokens, total, next_node(node, tokens[-1], log_probs.shape[-1]))
            for tokens, total, node in extensions
            if tokens[-1] != EOS_ID
        ][:beam_size]
        if early_stopping and len(finished) >= beam_size:
            break
    finished.sort(key=lambda hypothesis: -hypothesis[1])
    unfinished = [(tokens, total / penalty(len(tokens))) for tokens, total, _ in live]
    return (finished[:beam_size] + unfinished)[:beam_size]


def plain_greedy(log_probs, limit, penalty):
    tokens, total, node = [], 0.0, 0
    while len(tokens) < limit and EOS_ID not in tokens:
        tokens.append(int(log_probs[node].argmax()))
        total += log_probs[node, tokens[-1]]
        node = next_node(node, tokens[-1])
    return [(tuple(tokens), total / penalty(len(tokens)))]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("vocab_size", "limit", "beam_size"), [(3, 4, 24), (4, 3, 41)])
def test_a_beam_as_wide_as_the_space_is_exhaustive_search(vocab_size, limit, beam_size, penalty):
    table = random_table(0, batch_size=2, vocab_size=vocab_size)
    result = beam(table, beam_size=beam_size, max_length=limit, penalty=penalty)
    for row, log_probs in enumerate(log_probs_of(table)):
        expected = exhaustive(log_probs, limit, penalty)[:beam_size]
        assert_same_hypotheses(hypotheses(result, row), expected)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("beam_size", "vocab_size", "eos_bonus"), [(3, 7, 2), (5, 3, 0)])
def test_agrees_with_a_plain_beam_that_never_stops_early(beam_size, vocab_size, eos_bonus, penalty):
    table = random_table(1, batch_size=31, vocab_size=vocab_size, eos_bonus=eos_bonus)
    limits = 1 + np.arange(31) % 8
    result = beam(table, limits, beam_size=beam_size, max_length=8, penalty=penalty)
    for row, log_probs in enumerate(log_probs_of(table)):
        expected = plain_beam(log_probs, beam_size, limits[row], penalty)
        assert_same_hypotheses(hypotheses(result, row), expected)


def test_one_beam_is_greedy_search():
    table, limits = random_table(2, batch_size=31, eos_bonus=1), 1 + np.arange(31) % T
    result = greedy(table, limits)
    assert_bit_equal(result, beam(table, limits, beam_size=1))
    for row, log_probs in enumerate(log_probs_of(table)):
        expected = plain_greedy(log_probs, limits[row], PAPER)
        assert_same_hypotheses(hypotheses(result, row), expected)


def test_the_penalties_are_those_of_their_papers():
    assert gnmt_length_penalty(0.6)(7.0) == 2**0.6
    assert power_length_penalty(0.5)(9.0) == 3.0
    assert gnmt_length_penalty(0.0)(7.0) == power_length_penalty(0.0)(7.0) == 1.0


def test_ties_go_to_the_lower_beam_the_lower_token_and_the_older_hypothesis():
    table = np.zeros((B, NODES, V), np.float32)
    table[:, :, EOS_ID] = -np.inf
    assert hypotheses(greedy(table, [3, 3, 3]), 0)[0][0] == (0, 0, 0)
    found = hypotheses(beam(table, [2, 2, 2]), 0)
    assert [tokens for tokens, _ in found] == [(0, 0), (0, 1)]

    halves = np.full((B, NODES, V), -np.inf, np.float32)
    halves[:, 0, [EOS_ID, 3]] = 0  # eos at once, or certainly one token later
    halves[:, 1:, EOS_ID] = 0
    found = hypotheses(beam(halves, penalty=gnmt_length_penalty(0.0)), 0)
    assert [tokens for tokens, _ in found] == [(EOS_ID,), (3, EOS_ID)]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    limits=st.lists(st.integers(0, T), min_size=B, max_size=B),
    order=st.permutations(range(B)),
)
def test_a_sentence_does_not_depend_on_its_batch(seed, limits, order):
    table, limits, order = random_table(seed, eos_bonus=2), np.array(limits), np.array(order)
    for search in (beam, greedy):
        together = search(table, limits)
        assert_bit_equal(search(table[order], limits[order]), row_of(together, order))
        for row in range(B):
            alone = search(table[row : row + 1], limits[row : row + 1])
            assert_bit_equal(row_of(alone, 0), row_of(together, row))


def test_what_the_model_says_after_the_end_changes_nothing():
    table, limits = random_table(3), jnp.array([2, T, 4])

    @jax.jit
    def search(spoil):
        step_fn, init_state = table_model(table)

        def spoiled_step(tokens, state):
            late = (state["index"] >= limits)[:, None, None]
            logits, state = step_fn(tokens, state)
            return jnp.where(late & spoil, jnp.nan, logits), state

        return beam_search(
            spoiled_step,
            init_state(K),
            batch_size=B,
            beam_size=K,
            max_length=T,
            length_limits=limits,
        )

    assert_bit_equal(search(True), search(False))


def test_eos_does_not_starve_the_beam():
    # eos is the likeliest first token; both other beams must still get to their own eos.
    probs = np.full((B, NODES, V), 1e-6, np.float32)
    probs[:, 0, [EOS_ID, 3, 4]] = 0.4, 0.35, 0.25
    probs[:, [next_node(0, 3), next_node(0, 4)], EOS_ID] = 0.9
    result = beam(np.log(probs, dtype=np.float32), penalty=power_length_penalty(1.0))
    assert [tokens for tokens, _ in hypotheses(result, 0)] == [(3, EOS_ID), (4, EOS_ID)]


def test_unfinished_beams_rank_after_finished_ones_and_are_normalized():
    # eos can only be the first token, so one hypothesis finishes and the others never do.
    table = random_table(4)
    table[:, :, EOS_ID] = -np.inf
    table[:, 0, EOS_ID] = 0
    result = row_of(beam(table, [4, 4, 4], penalty=gnmt_length_penalty(2.0)), 0)
    assert result.sequences[0, 0] == EOS_ID
    assert result.lengths.tolist() == [1, 4]
    assert result.scores[1] > result.scores[0]
    np.testing.assert_allclose(result.scores, result.log_probs / np.array([1, 2.25]), rtol=1e-6)


def test_a_limit_beyond_the_longest_sequence_is_cut():
    table = random_table(14)
    table[:, :, EOS_ID] = -np.inf
    assert_bit_equal(beam(table, [T + 3, T + 1, 2]), beam(table, [T, T, 2]))


def test_a_limit_of_zero_gives_the_empty_hypothesis():
    table, length = random_table(5), power_length_penalty(1.0)
    for result in (
        beam(table, max_length=0),
        beam(table, [0, -1, 0], penalty=length),
        greedy(table, [T, 0, 1]),
    ):
        assert hypotheses(result, 1) == [((), 0.0)]


def test_impossible_tokens_and_prefixes_give_no_nan():
    table = random_table(6, vocab_size=3)
    table[:, :, 0] = -np.inf
    table[0, next_node(0, 1, 3)] = -np.inf  # nothing may follow token 1
    table[1] = -np.inf
    result = beam(table, [T, T, 2], beam_size=5)
    assert [tokens for tokens, _ in hypotheses(result, 0)] == [(EOS_ID,)]
    assert hypotheses(result, 1) == []
    assert len(hypotheses(result, 2)) == 3  # eos; 1 eos; 1 1
    nothing = np.full((B, NODES, V), -np.inf, np.float32)
    drawn = draw(nothing, num_samples=1, top_p=1e-6)
    assert hypotheses(drawn, 1) == []
    assert not drawn.lengths.any() and not drawn.sequences.any()


def test_scores_are_float32_for_bfloat16_logits():
    table = random_table(7).astype(jnp.bfloat16)
    assert_bit_equal(beam(table), beam(table.astype(jnp.float32)))


def test_stops_when_every_sentence_is_done():
    # From step `row` on, a row is certain of eos: greedy search has finished the last row after
    # B steps, and no second beam has to run to the limit.
    table = np.zeros((B, 50, V), np.float32)
    for row in range(B):
        table[row, row:, EOS_ID] = 30
        table[row, :row, EOS_ID] = -np.inf
    calls = []

    def step_fn(tokens, index):
        jax.debug.callback(lambda: calls.append(1))
        logits = jnp.asarray(table)[:, index, None]
        return jnp.broadcast_to(logits, (*tokens.shape, V)), index + 1

    def steps(run, *args):
        calls.clear()
        jax.block_until_ready(run(*args))
        jax.effects_barrier()
        return len(calls)

    options = {"batch_size": B, "max_length": 50}

    @jax.jit
    def search(limits):
        return beam_search(step_fn, jnp.int32(0), beam_size=K, length_limits=limits, **options)

    assert B <= steps(search, np.array([50, 50, 50])) <= B + 1
    assert steps(search, np.array([0, 2, 1])) == 2
    assert steps(search, np.array([0, 0, 0])) == 0
    assert steps(jax.jit(lambda: greedy_search(step_fn, jnp.int32(0), **options))) == B
    rng = jax.random.key(0)
    assert steps(jax.jit(lambda: sample(step_fn, jnp.int32(0), rng, **options))) == B


def test_the_second_call_compiles_nothing():
    beam(random_table(8), [T, 2, 4])
    compiled = jitted_beam_search._cache_size()
    beam(random_table(9, eos_bonus=3), [0, T, 1])
    assert jitted_beam_search._cache_size() == compiled


def test_reorder_may_know_another_layout():
    table = random_table(10)
    step_fn, init_state = table_model(table)

    def layered_step(tokens, state):
        logits, new = step_fn(tokens, {**state, "node": state["node"][0]})
        return logits, {**new, "node": new["node"][None]}

    def reorder(state, beams):
        return {**state, "node": jnp.take_along_axis(state["node"], beams[None], axis=2)}

    state = init_state(K)
    layered = {**state, "node": state["node"][None]}
    search = functools.partial(
        beam_search, layered_step, layered, batch_size=B, beam_size=K, max_length=T
    )
    result = jax.jit(lambda: search(reorder=reorder))()
    expected = beam(table)
    np.testing.assert_array_equal(result.sequences, expected.sequences)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(1, 3, 2\).*reorder="):
        search()


@pytest.mark.parametrize(("size", "k"), [(1280, 10), (1301, 10), (4099, 1), (17, 5)])
def test_top_k_in_chunks_is_top_k(size, k):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(B, K, size)).astype(np.float32)
    mostly_impossible = np.where(rng.random(normal.shape) < 0.998, -np.inf, normal)
    jitted = jax.jit(top_k, static_argnums=1)
    for values in (normal, np.round(normal * 2), mostly_impossible):
        assert_bit_equal(jitted(values, k), jax.lax.top_k(values, k))


@pytest.mark.parametrize(("size", "count"), [(1999, 6), (1600, 10), (1280, 1), (300, 4)])
def test_extensions_in_chunks_are_the_best_of_all(size, count):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(B, K, size)).astype(np.float32)
    mostly_impossible = np.where(rng.random(normal.shape) < 0.99, -np.inf, normal)
    beams = np.array([[-1.5, -1.5], [-0.25, -np.inf], [0.0, -70.0]], np.float32)
    for logits in (normal, np.round(normal * 2), mostly_impossible):
        normalizer = jax.jit(log_normalizer)(logits)
        np.testing.assert_allclose(
            normalizer, jax.nn.logsumexp(logits, axis=-1, keepdims=True), rtol=1e-6
        )
        all_totals = (beams[:, :, None] + (logits - np.asarray(normalizer))).reshape(B, -1)
        totals, index = jax.lax.top_k(all_totals, count)
        expected = totals, index // size, index % size
        assert_bit_equal(
            jax.jit(best_extensions, static_argnums=3)(beams, logits, normalizer, count), expected
        )


def test_all_logits_are_searched_for_maxima_once():
    def best(log_probs, logits):
        return best_extensions(log_probs, logits, log_normalizer(logits), 4)

    log_probs, logits = jnp.zeros((2, 3)), jnp.zeros((2, 3, 10000))
    program = jax.jit(best).lower(log_probs, logits).compile().as_text()
    maxima = re.findall(r"reduce_max\S* = f32\[(\S+)\]\S* reduce\(%([^,]+),", program)
    assert [shape for shape, _ in maxima] == ["2,3,125", "2,3"]
    of_chunks = re.search(rf"{maxima[1][1]}: f32\[2,3,(\d+)\]", program)
    assert int(of_chunks[1]) <= 125


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}]
)
def test_sampling_without_chance_is_greedy_search(options):
    table = random_table(11, eos_bonus=1)
    drawn, best = draw(table, num_samples=1, **options), greedy(table)
    assert_bit_equal(drawn, best._replace(scores=best.log_probs))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"top_p": 0.71}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.4, 0.3, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.8}, [0.16, 0.09, 0, 0, 0]),
    ],
)
def test_sampled_frequencies_match_the_probabilities(options, expected):
    shuffle, count = np.array([3, 0, 4, 1, 2]), 20_000
    probs = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    table = np.zeros((1, NODES, V), np.float32)
    table[:, :, shuffle] = np.log(probs)
    result = draw(table, num_samples=count, max_length=1, **options)
    tokens = np.asarray(result.sequences)[0, :, 0]
    observed = np.bincount(tokens, minlength=V)[shuffle]
    expected = count * np.array(expected) / np.sum(expected)
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < 18.5  # the 0.1% point of chi-square with four degrees of freedom
    model_log_probs = np.log(probs)[np.argsort(shuffle)]
    np.testing.assert_allclose(result.log_probs[0], model_log_probs[tokens], rtol=1e-5)


def test_steps_rows_and_samples_draw_independently():
    table = np.zeros((2, NODES, 4), np.float32)
    table[:, :, EOS_ID] = -np.inf
    result = draw(table, num_samples=3000, max_length=2)
    (first, second), (other, _) = np.asarray(result.sequences).swapaxes(1, 2)
    for left, right in [(first, second), (first, other), (first[1:], first[:-1])]:
        pairs = np.bincount(left * 4 + right, minlength=16)
        pairs = pairs[pairs > 0]
        assert len(pairs) == 9
        statistic = ((pairs - len(left) / 9) ** 2 / (len(left) / 9)).sum()
        assert statistic < 26.1  # the 0.1% point of chi-square with eight degrees of freedom


def test_samples_are_the_first_of_more():
    table = random_table(14)
    more = draw(table, num_samples=5)
    assert_bit_equal(draw(table), jax.tree.map(lambda leaf: leaf[:, :K], more))


def test_samples_follow_from_key_and_row_alone():
    table, limits = random_table(12, eos_bonus=1).astype(jnp.bfloat16), [5, T, 0]
    together = draw(table, limits=limits)
    others = np.concatenate([table[:1], random_table(13)[1:].astype(jnp.bfloat16)])
    others = draw(others, limits=[5, 1, 1])
    assert_bit_equal(row_of(together, 0), row_of(others, 0))
    another_key = draw(table, seed=1, limits=limits)
    assert (together.sequences != another_key.sequences).any()
    for row, log_probs in enumerate(log_probs_of(table)):
        for tokens, score in hypotheses(together, row):
            node, total = 0, 0.0
            for token in tokens:
                total += log_probs[node, token]
                node = next_node(node, token)
            np.testing.assert_allclose(score, total, rtol=1e-4)
            assert len(tokens) == limits[row] or (
                tokens[-1] == EOS_ID and len(tokens) < limits[row]
            )


def misshapen_step(tokens, state):
    return jnp.zeros((B, V)), state


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gnmt_length_penalty(-0.5), "alpha is -0.5: give 0"),
        (lambda: power_length_penalty(-1.0), "alpha is -1.0: give 0"),
        (lambda: beam(random_table(0), beam_size=0), "beam_size is 0: give 1"),
        (
            lambda: search_with(random_table(0), options=(("n_best", 3),)),
            "n_best is 3: give 1 to 2, or None for all",
        ),
        (lambda: beam(random_table(0), max_length=-1), "max_length is -1: give 0"),
        (
            lambda: beam(random_table(0), [1, 2]),
            r"the shape of length_limits is \(2,\): make it \[3\]",
        ),
        (
            lambda: greedy_search(misshapen_step, 0, batch_size=B, max_length=2),
            r"the shape of the logits is \(3, 5\): make step_fn return \[3, 1, 'V'\]",
        ),
        (lambda: gather_beams(jnp.zeros(B * K), jnp.zeros((B, K), jnp.int32)), "a state leaf is"),
        (lambda: draw(random_table(0), num_samples=0), "num_samples is 0: give 1"),
        (lambda: draw(random_table(0), temperature=-1.0), "temperature is -1.0: give 0"),
        (lambda: draw(random_table(0), top_k=0), "top_k is 0: give at least 1"),
        (lambda: draw(random_table(0), top_p=1.5), "top_p is 1.5: give more than 0"),
    ],
)
def test_unusable_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------
# What can be asked for each sentence
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("beam_size", "options"))
def search_with(table, beam_size=K, options=(), **arrays):
    step_fn, init_state = table_model(table)
    return beam_search(
        step_fn,
        init_state(beam_size),
        batch_size=len(table),
        beam_size=beam_size,
        max_length=T,
        **dict(options),
        **arrays,
    )


@pytest.mark.parametrize("beam_size", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_early_stopping(beam_size, seed):
    table = random_table(seed, eos_bonus=1.5)
    result = search_with(table, beam_size, (("early_stopping", True),))
    exact = search_with(table, beam_size)
    for row, log_probs in enumerate(log_probs_of(table)):
        expected = plain_beam(log_probs, beam_size, T, PAPER, early_stopping=True)
        assert_same_hypotheses(hypotheses(result, row), expected)
        assert float(exact.scores[row, 0]) >= float(result.scores[row, 0]) - 1e-6


@pytest.mark.parametrize("penalty", [gnmt_length_penalty, power_length_penalty])
def test_a_search_is_a_pytree_and_can_be_pickled(penalty):
    search = BeamSearch(3, length_penalty=penalty(0.7))
    lengths = jnp.array([1.0, 6.0])
    expected = penalty(0.7)(lengths)
    for copy in (pickle.loads(pickle.dumps(search)), jax.jit(lambda search: search)(search)):
        assert copy.beam_size == 3
        np.testing.assert_allclose(copy.length_penalty(lengths), expected, rtol=1e-6)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("n_best", [1, 2])
def test_the_best_alone_are_the_first_of_all(n_best, early_stopping):
    for seed in range(5):
        table = random_table(seed, eos_bonus=1.5)
        options = (("early_stopping", early_stopping),)
        every = search_with(table, 3, options)
        best = search_with(table, 3, (*options, ("n_best", n_best)))
        assert_bit_equal(best, jax.tree.map(lambda leaf: leaf[:, :n_best], every))


def test_the_best_alone_are_sure_sooner():
    # eos is all but certain at first; later it is as likely as any other token.
    table = np.zeros((1, 50, V), np.float32)
    table[:, 0, EOS_ID] = 20
    steps = []

    def step_fn(tokens, index):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.broadcast_to(jnp.asarray(table)[:, index, None], (1, 4, V)), index + 1

    @functools.partial(jax.jit, static_argnums=0)
    def search(n_best):
        options = {"length_penalty": gnmt_length_penalty(0.0), "n_best": n_best}
        return beam_search(
            step_fn, jnp.int32(0), batch_size=1, beam_size=4, max_length=50, **options
        )

    for n_best, expected in ((1, 1), (4, 3)):
        steps.clear()
        jax.block_until_ready(search(n_best))
        jax.effects_barrier()
        assert len(steps) == expected


def test_minimum_lengths():
    table = random_table(3, eos_bonus=4)
    minimum = jnp.array([0, 3, 6], jnp.int32)
    result, free = search_with(table, min_lengths=minimum), search_with(table)
    assert (np.asarray(result.lengths) >= np.asarray(minimum)[:, None]).all()
    assert (np.asarray(free.lengths)[1:, 0] < np.asarray(minimum)[1:]).all()
    assert_bit_equal(row_of(result, 0), row_of(free, 0))


def test_a_prefix_is_as_if_the_model_wanted_nothing_else():
    table = random_table(5)
    prefix = jnp.array([[3, 4, 0], [4, 0, 0], [0, 0, 0]], jnp.int32)
    result = search_with(table, prefix=prefix)
    forced = np.array(table)
    forced[0, 0, [0, 1, 2, 4]] = -np.inf
    forced[0, next_node(0, 3), [0, 1, 2, 3]] = -np.inf
    forced[1, 0, [0, 1, 2, 3]] = -np.inf
    expected = search_with(forced)
    np.testing.assert_array_equal(result.sequences, expected.sequences)
    # But log-probabilities are the model's: forced tokens do not count as certain.
    log_probs = log_probs_of(table)
    lost = [log_probs[0, 0, 3] + log_probs[0, next_node(0, 3), 4], log_probs[1, 0, 4], 0.0]
    np.testing.assert_allclose(
        result.log_probs, expected.log_probs + np.array(lost, np.float32)[:, None], rtol=1e-4
    )


@pytest.mark.parametrize("size", [1, 2])
def test_ngrams_occur_once(size):
    table = random_table(8, eos_bonus=-9)
    result = search_with(table, options=(("no_repeat_ngram_size", size),))
    free = search_with(table)

    def repeats(result):
        count = 0
        for row in range(B):
            for tokens, _ in hypotheses(result, row):
                grams = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
                count += len(grams) - len(set(grams))
        return count

    assert repeats(result) == 0 and repeats(free) > 0


def test_wrong_shapes_of_what_is_asked(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"the shape of min_lengths is \(2,\): make it \[3\]"):
        search_with(random_table(0), min_lengths=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"the shape of prefix is \(2, 4\): make it \[3, P\]"):
        search_with(random_table(0), prefix=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"the shape of prefix is \(3,\): make it \[3, P\]"):
        search_with(random_table(0), prefix=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="no_repeat_ngram_size is -1"):
        search_with(random_table(0), options=(("no_repeat_ngram_size", -1),))


@pytest.mark.parametrize("n_best", [None, 1])
def test_what_is_not_finished_is_ranked_by_score_too(n_best):
    """A bonus may put the most probable hypothesis last."""

    def step_fn(tokens, first):
        logits = jnp.array([-9.0, -9.0, -jnp.inf, 1.0, 0.9, 0.8])
        started = jnp.where(first == -1, tokens, first)
        first = jnp.where(tokens == BOS_ID, -1, started)
        return jnp.broadcast_to(logits, (*tokens.shape, 6)), first

    result = beam_search(
        step_fn,
        jnp.zeros((1, 3), jnp.int32),
        batch_size=1,
        beam_size=3,
        max_length=2,
        n_best=n_best,
        bonus=lambda first: jnp.where(first == 3, -5.0, 0.0),
        length_penalty=gnmt_length_penalty(0.0),
    )
    best_first = [[4, 3], [3, 3], [3, 4]]
    assert result.sequences[0].tolist() == best_first[:n_best]
    assert np.all(np.diff(result.scores[0]) <= 0)


def test_a_prefix_may_repeat_an_ngram():
    prefix = jnp.array([[3, 3, 0]] * B, jnp.int32)
    options = (("no_repeat_ngram_size", 1),)
    result = search_with(random_table(5), prefix=prefix, options=options)
    assert (np.asarray(result.sequences)[:, 0, :2] == 3).all()
    assert np.isfinite(result.log_probs[:, 0]).all()
