"""What JAX traces and XLA compiles in a block of code."""

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring


@contextlib.contextmanager
def count_compiles() -> Iterator[list[str]]:
    """Yield a list to which the name of each program compiled in the block is appended."""
    names: list[str] = []

    def listen(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name", "?")))

    with _listener(listen):
        yield names


@contextlib.contextmanager
def time_traces() -> Iterator[list[float]]:
    """Yield a list to which the seconds of each trace in the block, even nested, are appended."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/jaxpr_trace_duration":
            seconds.append(duration)

    with _listener(listen):
        yield seconds


@contextlib.contextmanager
def _listener(listen: Callable[..., None]) -> Iterator[None]:
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
