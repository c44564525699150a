"""Many sentences in few rows: started one by one, given more room, with no effect on results."""

import functools
import threading
import time

import jax
import jaxtyping
import numpy as np
import pytest

import jaxformer.generator as module
from jaxformer.config import EOS_ID
from jaxformer.errors import UserError
from jaxformer.generation import generate
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator
from jaxformer.quantization import quantize
from random_run import SEPARATE as CONFIG
from random_run import params_of
from train.benchmark.compiles import count_compiles

OPTIONS = GenerationConfig(beam_size=3, max_length_extra=4)


def make_generator(*configs, num_devices=1):
    configs = configs or (CONFIG,)
    return Generator(configs, tuple(map(params_of, configs)), jax.devices()[:num_devices])


def random_sources(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [[*draw.integers(4, CONFIG.vocab_size, n - 1).tolist(), EOS_ID] for n in lengths]


SOURCES = random_sources(np.random.default_rng(1).integers(2, 17, 70))


def assert_same(found, expected, rtol=1e-4):
    length = min(found.sequences.shape[-1], expected.sequences.shape[-1])
    assert not found.sequences[..., length:].any() and not expected.sequences[..., length:].any()
    np.testing.assert_array_equal(found.sequences[..., :length], expected.sequences[..., :length])
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=rtol)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=rtol)


def assert_bit_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def results_of_one_batch(options, with_prefix=False, configs=(CONFIG,)):
    source_ids = np.zeros((len(SOURCES), 16), np.int32)
    for row, source in enumerate(SOURCES):
        source_ids[row, : len(source)] = source
    keys = jax.random.split(jax.random.key(5), len(SOURCES)) if options.sampling else None
    prefix = None
    if with_prefix:
        prefix = np.array([[9, 11][: row % 3] + [0] * (2 - row % 3) for row in range(len(SOURCES))])
    params = tuple(map(params_of, configs))
    return generate(configs, params, source_ids, options, prefix=prefix, keys=keys)


ALONE, ENSEMBLE = (CONFIG,), (CONFIG, CONFIG.replace(norm="pre"))
LONG = {"max_length_ratio": 2.0, "max_length_extra": 1, "min_length_ratio": 1.6}


@pytest.fixture
def shapes(monkeypatch):
    """Rows per device, length, room and slots of searches, with two sentences for each row."""
    shapes, search = [], module.search_continuously

    def spy(*args):
        shapes.append(tuple(args[1])[:4])
        return search(*args)

    monkeypatch.setattr(module, "search_continuously", spy)
    monkeypatch.setattr(module, "_SENTENCES_PER_ROW", 2)
    return shapes


@pytest.mark.parametrize(
    ("options", "configs", "num_devices", "with_prefix"),
    [
        (GenerationConfig(beam_size=3, **LONG), ENSEMBLE, 1, False),
        pytest.param(
            GenerationConfig(beam_size=3, coverage_penalty=0.4, **LONG),
            *(ALONE, 2, True),
            marks=pytest.mark.slow,
        ),
        (
            GenerationConfig(beam_size=2, sampling=True, no_repeat_ngram_size=2, **LONG),
            *(ALONE, 2, True),
        ),
        pytest.param(
            GenerationConfig(beam_size=1, **LONG), *(ALONE, 8, False), marks=pytest.mark.slow
        ),
    ],
)
def test_every_sentence_is_as_in_one_large_batch(
    shapes, options, configs, num_devices, with_prefix
):
    """Whether it starts beside others that are under way, or starts again with more room."""
    generator = make_generator(*configs, num_devices=num_devices)
    keys = jax.random.split(jax.random.key(5), len(SOURCES)) if options.sampling else None
    prefixes = [[9, 11][: row % 3] for row in range(len(SOURCES))] if with_prefix else None
    tokens = 16 * 16 * (1 if num_devices == 1 else num_devices // 2)
    found = generator.generate(SOURCES, options, batch_tokens=tokens, keys=keys, prefixes=prefixes)
    expected = results_of_one_batch(options, with_prefix, configs)
    for row, one in enumerate(found):
        assert_same(one, jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), expected))
    rows = tokens // 16 // num_devices
    assert {shape[2] for shape in shapes} == {33}
    usual, every = sorted({shape[3] for shape in shapes})  # some needed more
    assert every == options.num_beams * 33
    times = sum(shape == (rows, 16, 33, usual) for shape in shapes)
    assert times >= 70 / (2 * rows * num_devices)


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({}, 24 + 16),
        ({"length_penalty_form": "power"}, 32 + 16),
        ({"sampling": True}, 2 * 24),
        ({"max_length_extra": 0, "max_length_ratio": 0.5}, 2 * 8),
    ],
)
def test_searches_that_last_longer_have_more_slots(changes, slots):
    options = GenerationConfig(beam_size=2, **changes)
    assert module._usual_slots(options, 16, options.max_length(16)) == slots


def test_beams_that_share_too_little_of_their_past_begin_once_more(shapes, monkeypatch):
    """If there are many such sentences, all room is given at once the next time."""
    monkeypatch.setattr(module, "_SLOTS_PER_BEAM", 1)
    generator = make_generator()
    expected = results_of_one_batch(OPTIONS)
    for slots in ({23, 60}, {60}):
        found = generator.generate(SOURCES, OPTIONS, batch_tokens=256)
        for row, one in enumerate(found):
            assert_same(one, jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), expected))
        assert {shape[3] for shape in shapes} == slots
        shapes.clear()


@pytest.mark.parametrize("seed", range(2))
def test_neither_order_nor_company_changes_a_bit(seed, monkeypatch):
    """A sentence that starts at others' tenth token is searched as if it started with them."""
    monkeypatch.setattr(module, "_SLOTS_PER_BEAM", 20)  # else some start again, in another shape
    order = np.random.default_rng(seed).permutation(len(SOURCES))
    generator = make_generator()
    found = generator.generate(SOURCES, OPTIONS, batch_tokens=256)
    moved = generator.generate([SOURCES[index] for index in order], OPTIONS, batch_tokens=256)
    for place, index in enumerate(order):
        assert_bit_equal(moved[place], found[index])
    some = [index for index in order if index % 3][:40]
    for index, one in zip(
        some,
        generator.generate([SOURCES[i] for i in some], OPTIONS, batch_tokens=256),
        strict=True,
    ):
        assert_bit_equal(one, found[index])


def test_beams_too_many_for_the_first_step_alone():
    """The vocabulary lacks the two tokens per beam that `BeamSearch.first` needs."""
    options = GenerationConfig(beam_size=CONFIG.vocab_size // 2 + 1, max_length_extra=2)
    expected = generate((CONFIG,), (params_of(),), np.array([[5, 6, EOS_ID]]), options)
    (found,) = make_generator().generate([[5, 6, EOS_ID]], options)
    assert_same(found, jax.tree.map(lambda leaf: np.asarray(leaf[0]), expected))


@pytest.mark.parametrize(
    "every",
    [
        [{"length_penalty": alpha} for alpha in (0.6, 0.0, 1.3)],
        [{"sampling": True, "temperature": t, "top_p": p} for t, p in ((1.0, 0.9), (0.4, 0.5))],
    ],
)
def test_other_numbers_compile_nothing(every):
    generator = make_generator()

    def search(numbers):
        options = GenerationConfig(beam_size=3, max_length_extra=4, **numbers)
        keys = jax.random.split(jax.random.key(0), 4) if options.sampling else None
        found = generator.generate(SOURCES[:4], options, keys=keys, few_shapes=True)
        return [one.sequences.tolist() for one in found]

    first = search(every[0])
    with count_compiles() as compiled:
        others = list(map(search, every[1:]))
    assert not compiled
    assert first not in others


def test_two_searches_at_once_are_one(monkeypatch):
    monkeypatch.setattr(module, "_SLOTS_PER_BEAM", 20)  # else some start again, in another shape
    generator = make_generator()
    threads = set()
    search = module.search_continuously

    def spy(*args):
        threads.add(threading.get_ident())
        time.sleep(0.1)  # let the other thread run
        return search(*args)

    monkeypatch.setattr(module, "search_continuously", spy)
    at_once = generator.generate(SOURCES, OPTIONS, batch_tokens=256)
    assert len(threads) == 2
    monkeypatch.setattr(generator, "_at_once", 1)
    for ours, alone in zip(
        at_once, generator.generate(SOURCES, OPTIONS, batch_tokens=256), strict=True
    ):
        assert_bit_equal(ours, alone)


def test_threads_for_one_sentence_are_kept(monkeypatch):
    """This guards the speed of sentences one by one."""
    generator = make_generator()
    (expected,) = generator.generate(SOURCES[:1], OPTIONS)
    time.sleep(0.1)  # until the thread waits for more
    monkeypatch.setattr(threading, "Thread", None)
    (found,) = generator.generate(SOURCES[:1], OPTIONS)
    assert_bit_equal(found, expected)


def test_what_searches_has_the_settings_of_its_caller(monkeypatch):
    def settings():
        config = jax.config
        return (
            config.jax_enable_x64,
            config.jax_default_prng_impl,
            config.jax_threefry_partitionable,
        )

    def spy(*_):
        seen.append(settings())
        raise UserError("seen")

    monkeypatch.setattr(module, "search_continuously", spy)
    generator, seen = make_generator(), []
    jax.eval_shape(jax.random.key, 0)  # cached for the default settings, which do not count here
    options = GenerationConfig(sampling=True)
    with (
        jax.enable_x64(True),
        jax.default_prng_impl("rbg"),
        jax.threefry_partitionable(False),
        pytest.raises(UserError, match="seen"),
    ):
        keys = jax.random.split(jax.random.key(0), len(SOURCES))
        generator.generate(SOURCES, options, keys=keys)
    assert set(seen) == {(True, "rbg", False)} != {settings()}


@pytest.mark.parametrize(
    ("number", "few_rows", "rows", "parts"),
    [
        (1, False, 1, 1),
        (16, False, 16, 1),  # with 8 each, two threads would have half of their rows idle
        (20, False, 16, 2),
        (40, False, 16, 2),
        (64, False, 16, 2),  # with 32 each, rows would be idle once their sentence is done
        (128, False, 32, 2),
        (1100, False, 32, 4),
        (1, True, 1, 1),
        (3, True, 1, 2),
        (9, True, 4, 2),
        (80, True, 32, 2),
    ],
)
def test_each_thread_has_its_share_and_few_rows_are_idle(number, few_rows, rows, parts):
    generator = make_generator()
    assert generator._at_once == 2
    assert generator._rows_and_parts(OPTIONS, number, 16, None, few_rows) == (rows, parts)
    generator._at_once = 1
    of_one, alone = generator._rows_and_parts(OPTIONS, number, 16, None, False)
    assert of_one >= rows and alone <= parts


def test_other_devices_encode_as_many_as_there_are_rows():
    generator = make_generator()
    expected = generator.generate(SOURCES, OPTIONS, batch_tokens=256)
    generator._on_cpu = False
    for one, other in zip(
        generator.generate(SOURCES, OPTIONS, batch_tokens=256), expected, strict=True
    ):
        assert_same(one, other)


def test_a_second_time_compiles_nothing():
    make_generator().generate(SOURCES, OPTIONS, batch_tokens=256)
    with count_compiles() as compiled:
        make_generator().generate(SOURCES[::-1], OPTIONS, batch_tokens=256)
    assert compiled == []


def test_few_shapes_compile_one_program_and_find_the_same():
    generator = make_generator()
    expected = results_of_one_batch(OPTIONS)
    rows = [row for row, source in enumerate(SOURCES) if len(source) >= 5]
    sources = [SOURCES[row] for row in rows] + random_sources([20, 30, 40] * 10)
    with count_compiles() as compiled:
        found = generator.generate(sources, OPTIONS, batch_tokens=64 * 48, few_shapes=True)
    assert len(compiled) == 1
    for row, one in zip(rows, found, strict=False):
        assert_same(one, jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), expected))


def test_rows_do_not_wait_for_the_longest_sentence():
    """With 200 sentences in 32 rows, a tenth of them long."""
    lengths = np.where(np.arange(200) % 10, 4, 16)
    options = GenerationConfig(
        beam_size=1, max_length_ratio=1.0, max_length_extra=0, min_length_ratio=1.0
    )
    generator = make_generator()
    generator.generate(random_sources(lengths), options, batch_tokens=512)
    assert generator.needed_steps == lengths.sum()
    assert generator.needed_steps / generator.computed_steps > 0.7


def test_steps_that_are_not_needed_are_counted():
    options = GenerationConfig(beam_size=2, max_length_ratio=1.0, max_length_extra=0)
    generator = make_generator()
    generator.generate(random_sources([8, 4, 2]), options)
    steps = generator.computed_steps // 4
    assert generator.computed_steps == 4 * steps and 0 < steps <= 8
    assert steps <= generator.needed_steps <= min(8, steps) + 4 + 2


@pytest.mark.parametrize(
    ("options", "devices"), [(OPTIONS, 2), (GenerationConfig(sampling=True, beam_size=1), 1)]
)
def test_the_programs_of_its_searches_are_at_hand(options, devices, monkeypatch):
    # JAX puts shapes in place of the numbers of a `Sampling`, which the tests' type checks refuse.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    keys = jax.random.split(jax.random.key(0), 4) if options.sampling else None
    generator = make_generator(num_devices=devices)
    generator.generate(random_sources([4, 5, 6, 7]), options, keys=keys)
    assert generator.turns
    with count_compiles() as compiled:
        for shape, turns in generator.turns.items():
            assert turns > 0
            program = generator.lower(options, shape).compile()
            assert program.memory_analysis().temp_size_in_bytes > 0
    assert compiled == []


def test_a_translation_of_no_tokens_needs_no_steps():
    options = GenerationConfig(beam_size=2, max_length_ratio=0.0, max_length_extra=0)
    generator = make_generator()
    (found,) = generator.generate(random_sources([4]), options)
    assert not found.lengths.any() and generator.needed_steps == 0


def test_keys_of_another_kind_are_refused():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 1)
    with pytest.raises(UserError, match="give keys of jax_default_prng_impl"):
        make_generator().generate(SOURCES[:1], GenerationConfig(sampling=True), keys=keys)


@pytest.mark.parametrize("few_shapes", [False, True])
def test_padding_stays_within_learned_positions(few_shapes):
    config = CONFIG.replace(positions="learned", max_length=9)
    options = GenerationConfig(beam_size=2)
    generator = make_generator(config)
    source = [5, 6, 7, 8, 5, 6, 7, 8, EOS_ID]
    (found,) = generator.generate([source], options, few_shapes=few_shapes)
    assert found.sequences.shape == (2, 9)
    alone = generate((config,), (params_of(config),), np.array([source]), options)
    np.testing.assert_array_equal(found.sequences, alone.sequences[0])


def test_a_source_longer_than_learned_positions_is_refused():
    generator = make_generator(CONFIG.replace(positions="learned", max_length=9))
    with pytest.raises(UserError, match="a source has 10 tokens and the model 9 learned positions"):
        generator.generate([[5] * 9 + [EOS_ID]], OPTIONS)


def test_wide_models_search_as_many_hypotheses_of_long_sentences_as_of_short_ones():
    """On a CPU, up to a limit; narrow ones have fewer rows the longer the sentences."""

    def rows(d_model, beam_size=4, quantized=False):
        config = CONFIG.replace(d_model=d_model, num_heads=2, quantized=quantized)
        params = quantize(params_of()) if quantized else params_of()  # not looked at
        generator, options = Generator(config, params), GenerationConfig(beam_size=beam_size)
        return [generator._tokens_at_once(options, n) // n for n in (8, 32, 128)]

    assert rows(256) == [64, 16, 4]
    assert rows(512, 5) == rows(512, 5, quantized=True) == [64, 64, 32]
    assert rows(512, 1) == [320, 128, 32]
    assert rows(256, quantized=True) == [8, 8, 4]
    assert rows(256, beam_size=3, quantized=True) == [64, 16, 4]


def test_kernels_that_come_first_find_the_same():
    """The model is wide enough, and its rows few enough, for that: 16 rows of 2 beams."""
    config = CONFIG.replace(d_model=256, num_heads=2, decoder_layers=1)
    options = GenerationConfig(beam_size=2, max_length_extra=4)
    sources = random_sources([15] * 16)
    found = make_generator(config).generate(sources, options, batch_tokens=256)
    expected = generate((config,), (params_of(config),), np.array(sources), options)
    for row, result in enumerate(found):
        assert_same(result, jax.tree.map(lambda leaf, row=row: leaf[row], expected))
