"""What is read from compiled programs, compared with figures worked out by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxformer.config import TransformerConfig
from jaxformer.generation_config import GenerationConfig
from jaxformer.transformer import Transformer
from packed_rows import BATCH, KEY, SOURCE, SPLITTABLE, TARGET
from train.config import DataConfig, ParallelConfig, TrainConfig
from train.costs.flops import decode_step_flops
from train.costs.hlo import Program
from train.parallel import make_runner
from train.plan.collectives import Collective, collectives
from train.plan.machines import present_machine
from train.plan.programs import DoesNotFit, decode_program, device_bytes, step_program
from train.step import make_training

CONFIG = TrainConfig(
    model=SPLITTABLE,
    data=DataConfig(target_length=TARGET, source_length=SOURCE, batch_tokens=16 * TARGET),
)
ROWS = len(BATCH["labels"])
MESH = dataclasses.replace(CONFIG, parallel=ParallelConfig(strategy="mesh", fsdp=2, tensor=2))

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


@pytest.fixture(scope="module")
def planned():
    return {
        config.parallel.strategy: step_program(config, present_machine(), ROWS, SOURCE)
        for config in (CONFIG, MESH)
    }


@pytest.fixture(scope="module", params=[CONFIG, MESH], ids=["pmap", "mesh"])
def real(request):
    """State, batch and program of a run."""
    config = request.param
    runner, training = make_runner(config), make_training(Transformer(config.model), config)
    state = runner.create(partial(training.create_state, jax.random.key(0)))
    batch = runner.place(ROWS, lambda rows: {name: x[rows] for name, x in BATCH.items()})
    compiled = runner.parallel_train_step(training.train_step).lower(state, batch, KEY).compile()
    return config.parallel.strategy, state, compiled


def test_the_planned_program_is_the_one_that_runs(planned, real):
    strategy, state, compiled = real
    plan, memory = planned[strategy], compiled.memory_analysis()
    assert plan.arguments == memory.argument_size_in_bytes
    assert plan.temporaries == memory.temp_size_in_bytes
    assert plan.results == memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert plan.xla_flops == compiled.cost_analysis()["flops"]
    device = jax.devices()[0]
    for planned_bytes, tree in ((plan.parameters, state.params), (plan.optimizer, state.opt_state)):
        live = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert planned_bytes == live == device_bytes(tree)
    assert plan.memory > 3 * plan.parameters


def test_copies_sum_their_gradients_and_nothing_else(planned):
    plan = planned["pmap"]
    # Besides the gradients: loss, nll and weight.
    (found,) = plan.collectives
    assert found == Collective("all-reduce", plan.parameters + 3 * 4, group=8, times=1)
    assert found.sent == 2 * 7 / 8 * found.bytes


def test_parts_are_gathered_in_the_loop_over_the_layers(planned):
    assert planned["mesh"].parameters < planned["pmap"].parameters / 2
    gathers = [one for one in planned["mesh"].collectives if one.kind == "all-gather"]
    # A layer's hidden/kernel is [16, 24]; a device has [8, 12] and gathers it along fsdp.
    hidden = [one for one in gathers if one.bytes == 16 * 12 * 4]
    assert {one.group for one in hidden} == {2}
    assert 2 in {one.times for one in hidden}


@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_bytes_moved_are_those_that_xla_counts_beside_the_loops(
    strategy, planned, real, monkeypatch
):
    name, _, compiled = real
    if name == strategy:
        program = Program(compiled.as_text())
        assert planned[strategy].bytes_moved == program.bytes_moved()
        once = moved_if_loops_ran_once(program, monkeypatch)
        assert once == pytest.approx(planned[strategy].xla_bytes, rel=0.03)
        assert planned[strategy].bytes_moved > 1.2 * once


def moved_if_loops_ran_once(program, patch):
    patch.setattr(Program, "_repeats", lambda *_: 1)
    return program.bytes_moved()


def over_all(function, *shapes):
    """The program of `function` on 8 devices, each with its part of the first axis."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(mapped).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    ("kind", "function", "size", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "d")[0], 8 * 24, 7 * 24),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x[0], "d", tiled=True), 24, 21),
        ("all-to-all", lambda x: jax.lax.all_to_all(x[0], "d", 0, 0, tiled=True), 24, 21),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]),
            24,
            24,
        ),
    ],
)
def test_each_kind_of_collective(kind, function, size, sent):
    """Every device has [1, 24] float32."""
    (found,) = collectives(over_all(function, (8, 24)), 8)
    assert (found.kind, found.bytes, found.group, found.times) == (kind, 4 * size, 8, 1)
    assert found.sent == 4 * sent


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(monkeypatch):
    def function(x):
        def add(carry, _):
            return jnp.sin(jax.lax.pmean(carry, "d")) + x, None

        return jax.lax.scan(add, x, None, length=5)[0]

    program = over_all(function, (8, 1000))
    (found,) = collectives(program, 8)
    assert (found.kind, found.bytes, found.times) == ("all-reduce", 4000, 5)
    assert found.sent == 5 * 2 * 7 / 8 * 4000
    moved = program.bytes_moved()
    # An iteration reads the carry and x, and writes the carry.
    assert moved - moved_if_loops_ran_once(program, monkeypatch) >= 4 * 3 * 4000


# As the TPU compiler writes it: memory spaces, axis names instead of device numbers, sums of which
# each device keeps its part, and collectives with a beginning and an end.
TPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %s = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[64,128]) -> f32[8,128] {
  %p = f32[64,128]{1,0:T(8,128)S(1)} parameter(0)
  %r = f32[64,128]{1,0:T(8,128)S(1)} all-reduce(%p), replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  ROOT %d = f32[8,128]{1,0:T(8,128)} dynamic-slice(%r, %c), dynamic_slice_sizes={8,128}
}

%begin (p: f32[8,128]) -> (f32[8,128], f32[64,128], u32[]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %a = f32[64,128]{1,0:T(8,128)} all-gather(%p), channel_id=8, replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %c = (f32[8,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}

%end (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(8,128)S(1)} parameter(0)
  %a = f32[64,128]{1,0:T(8,128)} all-gather(%p), channel_id=8, replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %c = f32[64,128]{1,0:T(8,128)S(1)} custom-call(%a), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p0: f32[64,128], p1: f32[8,128]) -> f32[8,128] {
  %p0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p0)
  %copy-done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %f = f32[8,128]{1,0:T(8,128)} fusion(%copy-done), kind=kCustom, calls=%all-reduce-scatter.1
  %g = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%p1), replica_groups=mesh['a'=2,'b'=8] {'a'}, dimensions={0}
  %h = bf16[16,128]{1,0} all-gather-done(%g)
  %i = (f32[8,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) fusion(%f), kind=kCustom, calls=%begin
  %j = f32[64,128]{1,0:T(8,128)S(1)} get-tuple-element(%i), index=1
  %k = f32[64,128]{1,0:T(8,128)S(1)} fusion(%j), kind=kCustom, calls=%end
  ROOT %m = (f32[64,128]{1,0}, bf16[16,128]{1,0}) tuple(%k, %h)
}
"""  # noqa: E501


def test_programs_for_tpu_are_read():
    program = Program(TPU)
    assert collectives(program, 16) == [
        Collective("reduce-scatter", 64 * 128 * 4, group=8, times=1),
        Collective("all-gather", 64 * 128 * 4, group=8, times=1),
        Collective("all-gather", 16 * 128 * 2, group=2, times=1),
    ]
    # The copy reads p0, the sum writes its part and the second gather reads it; the first gather
    # reads p1 and writes its result.
    moved = 64 * 128 * 4 + 2 * 8 * 128 * 4 + 8 * 128 * 2 + 16 * 128 * 2
    assert program.bytes_moved() == pytest.approx(moved, rel=0.05)


# A loop in a TPU program says in its condition how often it runs.
LOOP = """HloModule jit_scan, is_scheduled=true

%fewer (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] LIMIT
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%round (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%t), index=1
  %r = f32[8,128]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %u = (s32[], f32[8,128]{1,0}) tuple(%i, %r)
}

ENTRY %main (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,128]{1,0}) while(%p), condition=%fewer, body=%round
}
"""


def test_loops_for_tpu_go_round_as_often_as_their_condition_says():
    for limit, times, endless in (
        ("constant(6)", 6, []),
        ("get-tuple-element(%t), index=0", 1, ["w"]),  # depends on the data: counted once
    ):
        program = Program(LOOP.replace("LIMIT", limit))
        assert collectives(program, 8) == [Collective("collective-permute", 8 * 128 * 4, 8, times)]
        assert [loop.name for loop in program.endless_loops()] == endless


# A fusion may end in one instruction that makes several arrays, alone or in a tuple beside others.
SEVERAL = """HloModule jit_best, is_scheduled=true

%larger (a: f32[], i: s32[], b: f32[], j: s32[]) -> (f32[], s32[]) {
  %a = f32[] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[] parameter(2)
  %j = s32[] parameter(3)
  %m = f32[] maximum(%a, %b)
  ROOT %t = (f32[], s32[]) tuple(%m, %i)
}

%best (p: f32[64,128], q: s32[64,128]) -> (f32[64], s32[64]) {
  %p = f32[64,128]{1,0} parameter(0)
  %q = s32[64,128]{1,0} parameter(1)
  %z = f32[] constant(0)
  %n = s32[] constant(0)
  ROOT %r = (f32[64]{0}, s32[64]{0}) reduce(%p, %q, %z, %n), dimensions={1}, to_apply=%larger
}

%beside (p: f32[64,128], q: s32[64,128]) -> ((f32[64], s32[64]), f32[64,128]) {
  %p = f32[64,128]{1,0} parameter(0)
  %q = s32[64,128]{1,0} parameter(1)
  %z = f32[] constant(0)
  %n = s32[] constant(0)
  %r = (f32[64]{0}, s32[64]{0}) reduce(%p, %q, %z, %n), dimensions={1}, to_apply=%larger
  %d = f32[64,128]{1,0} add(%p, %p)
  ROOT %u = ((f32[64]{0}, s32[64]{0}), f32[64,128]{1,0}) tuple(%r, %d)
}

ENTRY %main (p0: f32[64,128], p1: s32[64,128]) -> (f32[64], s32[64]) {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = s32[64,128]{1,0} parameter(1)
  %f = (f32[64]{0}, s32[64]{0}) fusion(%p0, %p1), kind=kLoop, calls=%best
  ROOT %g = ((f32[64]{0}, s32[64]{0}), f32[64,128]{1,0}) fusion(%p0, %p1), kind=kLoop, calls=%beside
}
"""


def test_fusions_of_several_results_are_counted():
    array, best = 64 * 128 * 4, 2 * 64 * 4
    # Each reads both arrays and writes the two results; the second also writes an array.
    assert Program(SEVERAL).bytes_moved() == 2 * (2 * array + best) + array


# Rows of a cache are written, by a fusion and by an instruction on its own.
SCATTERS = """HloModule jit_write, is_scheduled=true

%newer (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%write (p: f32[64,128], i: s32[2,1], u: f32[2,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %u = f32[2,128]{1,0} parameter(2)
  ROOT %s = f32[64,128]{1,0} scatter(%p, %i, %u), to_apply=%newer
}

ENTRY %main (p0: f32[64,128], p1: s32[2,1], p2: f32[2,128]) -> f32[64,128] {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = s32[2,1]{1,0} parameter(1)
  %p2 = f32[2,128]{1,0} parameter(2)
  %f = f32[64,128]{1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%write
  ROOT %g = f32[64,128]{1,0} scatter(%f, %p1, %p2), to_apply=%newer
}
"""


def test_of_what_is_written_in_place_the_new_rows_count():
    rows, where = 2 * 128 * 4, 2 * 4
    assert Program(SCATTERS).bytes_moved() == (2 * rows + where) + 2 * rows


def test_of_an_array_made_where_it_is_written_everything_counts():
    rows, where, everything = 2 * 128 * 4, 2 * 4, 64 * 128 * 4
    zeros = "%z = f32[] constant(0)\n  %p = f32[64,128]{1,0} broadcast(%z), dimensions={}"
    made = SCATTERS.replace("%p = f32[64,128]{1,0} parameter(0)", zeros, 1)
    made = made.replace("s32[2,1]{1,0} parameter(1)", "s32[2,1]{1,0} parameter(0)", 1)
    made = made.replace("f32[2,128]{1,0} parameter(2)", "f32[2,128]{1,0} parameter(1)", 1)
    made = made.replace("fusion(%p0, %p1, %p2)", "fusion(%p1, %p2)")
    assert Program(made).bytes_moved() == (everything + where + rows) + 2 * rows


# A round of the search has two operations, and a loop in which waiting sentences begin.
SEARCH = """HloModule jit_search, is_scheduled=true

%waiting (t: (s32[], f32[10])) -> pred[] {
  %t = (s32[], f32[10]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %c = pred[] compare(%i, %i), direction=LT
}

%begin (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[10]{0} get-tuple-element(%t), index=1
  %y = f32[10]{0} negate(%x)
  ROOT %u = (s32[], f32[10]) tuple(%i, %y)
}

%step (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]) parameter(0)
  %b = (s32[], f32[10]) while(%t), condition=%waiting, body=%begin
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[10]{0} get-tuple-element(%b), index=1
  %y = f32[10]{0} exponential(%x)
  %z = f32[10]{0} negate(%y)
  ROOT %u = (s32[], f32[10]) tuple(%i, %z)
}

ENTRY %main (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]) parameter(0)
  ROOT %w = (s32[], f32[10]) while(%p), condition=%waiting, body=%step
}
"""


def test_a_step_of_a_search_is_without_the_sentences_that_begin():
    condition = 1 + 2 * 4
    assert Program(SEARCH).search_step_bytes() == 2 * (2 * 10 * 4) + condition
    assert Program(SEARCH).bytes_moved() == 3 * (2 * 10 * 4) + 2 * condition


def test_decoding_reads_the_parameters_and_the_past_at_each_token():
    options = GenerationConfig(beam_size=2)
    small = decode_program(CONFIG, present_machine(), options, 4, 8)
    assert small.memory > 0 and small.compile_seconds > 0
    params = jax.eval_shape(
        Transformer(CONFIG.model).init, jax.random.key(0), *jnp.ones((2, 1, 2), jnp.int32)
    )
    decoder = {name: params["params"][name] for name in ("decoder", "embedding")}
    read = sum(4 * leaf.size for leaf in jax.tree.leaves(decoder))
    assert small.step_bytes > read
    assert decode_program(CONFIG, present_machine(), options, 8, 8).step_bytes > small.step_bytes


def test_flops_of_a_token_are_those_that_xla_counts():
    """XLA also counts element-wise work, so the model is wide enough to make that small."""
    config = TransformerConfig(
        vocab_size=300, d_model=192, d_ff=500, num_heads=4, encoder_layers=1, decoder_layers=1
    )
    sentences, beams, source, room = 2, 3, 20, 10
    model = Transformer(config)
    ids = jnp.ones((sentences, source), jnp.int32)
    params = model.init(jax.random.key(0), ids, ids)
    cache = model.apply(
        params,
        jnp.zeros((sentences, source, config.d_model)),
        ids,
        beam_size=beams,
        max_length=room,
        method="init_cache",
    )
    step = jax.jit(lambda params, tokens: model.apply(params, tokens, cache, method="decode_step"))
    tokens = jnp.ones((sentences, beams), jnp.int32)
    counted = step.lower(params, tokens).compile().cost_analysis()["flops"]
    flops = decode_step_flops(config, sentences, beams, source, beams * room)
    assert flops == pytest.approx(counted, rel=0.05)
    assert flops < counted


def test_what_does_not_fit_says_how_much_it_would_need():
    used = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by more"
    temporaries = "memory required for HLO temporaries (89.25G) exceeds available HBM (15.75G)."
    for message, needed in ((used, 20.5), (temporaries, 89.25)):
        refusal = DoesNotFit(message)
        assert (refusal.needed, refusal.reason) == (needed * 2**30, message)
    assert DoesNotFit("RESOURCE_EXHAUSTED: no").needed is None
