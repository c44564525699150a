"""How many programs XLA compiles meanwhile."""

import contextlib
from collections.abc import Iterator

import jax.monitoring


@contextlib.contextmanager
def count_compiles() -> Iterator[list[str]]:
    """Yield a list that grows by the name of each program that is compiled in the block."""
    names: list[str] = []

    def listen(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
