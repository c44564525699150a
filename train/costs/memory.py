"""Bytes that a compiled program asks for."""

from typing import Any


def program_memory(compiled: Any) -> int:
    """Bytes that one device needs to run a `jax.stages.Compiled`, with arguments and code."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
