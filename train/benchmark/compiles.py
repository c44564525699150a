"""What JAX traces, lowers and compiles in a block of code."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax.monitoring


class Compiles(NamedTuple):
    """Names of functions and programs, such as "f" and "jit(f)", and the seconds that each took."""

    traces: list[tuple[str, float]]  # also of functions that are no programs
    lowerings: list[tuple[str, float]]
    compilations: list[tuple[str, float]]

    def seconds(self) -> dict[str, float]:
        """What the programs took together."""
        programs = {name for name, _ in self.lowerings}
        return {
            "trace_seconds": sum(took for name, took in self.traces if f"jit({name})" in programs),
            "lower_seconds": sum(took for _, took in self.lowerings),
            "compile_seconds": sum(took for _, took in self.compilations),
        }


@contextlib.contextmanager
def time_compiles() -> Iterator[Compiles]:
    """Yield what is traced, lowered and compiled in the block, by any thread, as it is done."""
    found = Compiles([], [], [])
    lists = {
        "/jax/core/compile/jaxpr_trace_duration": found.traces,
        "/jax/core/compile/jaxpr_to_mlir_module_duration": found.lowerings,
        "/jax/core/compile/backend_compile_duration": found.compilations,
    }

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event in lists:
            lists[event].append((str(details.get("fun_name", "?")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def count_compiles() -> Iterator[list[str]]:
    """Yield a list that has, after the block, the name of each program compiled in it."""
    names: list[str] = []
    with time_compiles() as found:
        yield names
    names += [name for name, _ in found.compilations]
