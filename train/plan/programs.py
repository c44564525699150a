"""The programs of a run, compiled for devices that need not be there, and what they need."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.errors import UserError, one_line
from jaxformer.generation import generate
from jaxformer.generation_config import GenerationConfig
from jaxformer.transformer import Transformer, parameter_shapes
from train.config import TrainConfig
from train.costs.hlo import Program
from train.costs.memory import program_memory
from train.parallel import make_runner
from train.plan.collectives import Collective, collectives
from train.plan.machines import Machine
from train.step import make_training

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(Exception):
    """The compiler found no way to run a program in a device's memory.

    Attributes:
      needed: bytes that it would take, None where the compiler does not say.
      reason: what the compiler says.
    """

    def __init__(self, message: str):
        super().__init__(message)
        # The total that it tries to hold or, where these alone are too large, the temporaries.
        found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
        self.needed = None
        if found:
            number, unit = found[1] or found[3], found[2] or found[4]
            self.needed = int(float(number) * _UNITS[unit])
        # After its first sentence the compiler lists every array.
        self.reason = message[:200]


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The compiled training step, in figures for one device.

    Attributes:
      parameters, optimizer: bytes of the state that the device holds.
      arguments: bytes of all that the step is given: state, rows of the batch, key.
      temporaries: bytes that XLA plans in addition: activations, gradients, data in transit.
      results: bytes of results that do not reuse the memory of the old state.
      code: bytes of the program itself.
      xla_flops, xla_bytes: XLA's own counts, in which each loop has one iteration.
      bytes_moved: bytes of main memory read and written, loops counted in full.
      collectives: what the devices send each other.
      compile_seconds: of tracing, lowering and compiling.
    """

    parameters: int
    optimizer: int
    arguments: int
    temporaries: int
    results: int
    code: int
    xla_flops: float
    xla_bytes: float
    bytes_moved: float
    collectives: tuple[Collective, ...]
    compile_seconds: float

    @property
    def memory(self) -> int:
        """Bytes that the device needs while the step runs."""
        return self.arguments + self.temporaries + self.results + self.code


def step_program(
    config: TrainConfig, machine: Machine, rows: int, source_length: int
) -> StepProgram:
    """Compile the step that `train.loop.fit` runs, for a global batch of `rows`.

    Raises:
      UserError: the model or the devices cannot be split as `config.parallel` says.
      DoesNotFit: on a TPU, whose compiler refuses a program that the memory cannot hold.
    """
    began = time.perf_counter()
    runner = make_runner(config, machine.devices)
    architecture = config.model
    if architecture.flash_attention == "auto" and machine.devices[0].platform == "tpu":
        # "auto" must choose for `machine`, not for this computer.
        architecture = architecture.replace(flash_attention="pallas")
    training = make_training(Transformer(architecture), config)
    key = jax.eval_shape(jax.random.key, 0)
    state = runner.abstract_state(jax.eval_shape(training.create_state, key))
    batch = runner.abstract_batch(_batch(rows, source_length, config.data.target_length))
    with _refusals():
        step = runner.parallel_train_step(training.train_step)
        compiled = step.lower(state, batch, key).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    program = Program(compiled.as_text())
    return StepProgram(
        parameters=device_bytes(state.params),
        optimizer=device_bytes(state.opt_state),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        xla_flops=cost["flops"],
        xla_bytes=cost["bytes accessed"],
        bytes_moved=program.bytes_moved(),
        collectives=tuple(collectives(program, len(machine.devices))),
        compile_seconds=time.perf_counter() - began,
    )


@dataclasses.dataclass(frozen=True)
class DecodeProgram:
    """`jaxformer.generation.generate`, compiled for one device.

    Attributes:
      memory: bytes that the device needs, parameters among them.
      step_bytes: bytes of main memory that one token of every beam reads and writes.
      compile_seconds: of tracing, lowering and compiling.
    """

    memory: int
    step_bytes: float
    compile_seconds: float


def decode_program(
    config: TrainConfig,
    machine: Machine,
    options: GenerationConfig,
    sentences: int,
    source_length: int,
) -> DecodeProgram:
    """Compile the search for one batch of sentences, on the machine's first device.

    Raises:
      DoesNotFit: as for `step_program`.
    """
    began = time.perf_counter()
    here = jax.sharding.SingleDeviceSharding(machine.devices[0])
    params, sources = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (
            parameter_shapes(config.model),
            jax.ShapeDtypeStruct((sentences, source_length), jnp.int32),
        ),
    )
    search = jax.jit(generate, static_argnums=(0, 3))
    with _refusals():
        compiled = search.lower(config.model, params, sources, options).compile()
    text = compiled.as_text()
    assert text is not None
    return DecodeProgram(
        memory=program_memory(compiled),
        step_bytes=Program(text).search_step_bytes(),
        compile_seconds=time.perf_counter() - began,
    )


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _batch(rows: int, source_length: int, target_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as `train.data.batches.Batches` makes it."""
    lengths = {"source_ids": source_length, "target_ids": target_length, "labels": target_length}
    lengths |= {"source_segment_ids": source_length, "target_segment_ids": target_length}
    return {
        name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name, length in lengths.items()
    }


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Raise `DoesNotFit` for a program that needs too much memory, `UserError` for others."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = one_line(error)
        if "RESOURCE_EXHAUSTED" in reason:
            raise DoesNotFit(reason) from error
        raise UserError(
            f"the compiler gives up: {reason}; try another topology, or a smaller model"
        ) from error
