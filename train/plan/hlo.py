"""The text of a compiled program, read: its instructions, its loops and the bytes it moves."""

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property

_ITEMSIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLEES = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)

# They name values, or wait for what another instruction has counted.
_MOVE_NOTHING = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all "
    "partition-id replica-id opt-barrier async-start async-update domain".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.-]+)", self.arguments))

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """Computations that it runs: a loop's body, a fusion's content."""
        found = _CALLEES.findall(self.attributes)
        return tuple(
            name for one, many in found for name in (one, *re.findall(r"[\w.-]+", many)) if name
        )

    @property
    def trip_count(self) -> int | None:
        """How often a loop goes round, None where that depends on the data."""
        found = _TRIP_COUNT.search(self.attributes)
        return int(found[1]) if found else None


class Program:
    """The computations of a compiled program, and how often a run of it executes each.

    Args:
      text: as `jax.stages.Compiled.as_text` returns it.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                root, name, kind, opcode, rest = found.groups()
                arguments, attributes = _split_at_closing_bracket(rest)
                current[name] = Instruction(
                    name, kind, opcode, arguments, attributes, root is not None
                )

    def runs(self, repeats: Callable[[Instruction], int]) -> dict[str, int]:
        """How often each computation is executed, if a loop goes round `repeats(loop)` times."""
        counts = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                inner = times * repeats(instruction) if instruction.opcode == "while" else times
                for callee in instruction.callees:
                    visit(callee, inner)

        visit(self.entry, 1)
        return counts

    def loops(self) -> list[tuple[Instruction, int]]:
        """All loops, each with how often it is begun."""
        counts = self.runs(known_trips)
        return [
            (instruction, counts[name])
            for name, instructions in self.computations.items()
            for instruction in instructions.values()
            if instruction.opcode == "while" and counts[name]
        ]

    def bytes_moved(self, start: str, repeats: Callable[[Instruction], int]) -> float:
        """Bytes of main memory that a run of computation `start` reads and writes, estimated.

        Every instruction reads its operands and writes its result, and what is fused stays on the
        chip. Of an operand that is only sliced, the slices count; of an array that is updated in
        place, the update. So does XLA's own count, which has each loop go round once.
        """
        total = 0.0
        for instruction in self.computations[start].values():
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                times = repeats(instruction) if instruction.opcode == "while" else 1
                total += times * sum(self.bytes_moved(c, repeats) for c in instruction.callees)
            total += self._moved_by(start, instruction)
        return total

    def _moved_by(self, computation: str, instruction: Instruction) -> float:
        if instruction.opcode in _MOVE_NOTHING or instruction.opcode.endswith("-done"):
            return 0.0
        types = self.computations[computation]
        if instruction.opcode == "fusion":
            return self._moved_by_fusion(computation, instruction)
        if instruction.opcode in _SLICES:
            return 2 * num_bytes(instruction.type)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * num_bytes(types[instruction.operands[1]].type)
        written = sum(
            shape_bytes(instruction.type)[: 1 if "-start" in instruction.opcode else None]
        )
        return written + sum(num_bytes(types[name].type) for name in instruction.operands)

    def _moved_by_fusion(self, computation: str, fusion: Instruction) -> float:
        inside = self.computations[fusion.callees[0]].values()
        by_name = self.computations[fusion.callees[0]]
        root = next(instruction for instruction in inside if instruction.is_root)
        updates = [one for one in inside if one.opcode == "dynamic-update-slice"]
        written = num_bytes(fusion.type)
        if root.opcode == "bitcast":
            root = by_name[root.operands[0]]
        if root in updates:
            written = num_bytes(by_name[root.operands[1]].type)
        moved = written
        parameters = [one for one in inside if one.opcode == "parameter"]
        parameters.sort(key=lambda one: int(one.arguments))
        for parameter, operand in zip(parameters, fusion.operands, strict=True):
            readers = [one for one in inside if parameter.name in one.operands]
            if all(one.opcode in _SLICES and one.operands[0] == parameter.name for one in readers):
                moved += sum(num_bytes(one.type) for one in readers)
            elif not all(one in updates and one.operands[0] == parameter.name for one in readers):
                moved += num_bytes(self.computations[computation][operand].type)
        return moved


def known_trips(loop: Instruction) -> int:
    """Times that a loop goes round; 1 where that depends on the data."""
    return 1 if loop.trip_count is None else loop.trip_count


def shape_bytes(kind: str) -> list[float]:
    """Bytes of each array in a type; those in a TPU's vector memory, S(1), take none of the HBM."""
    sizes = []
    for name, dimensions, layout in _SHAPE.findall(kind):
        size = _ITEMSIZES.get(name) or int(re.findall(r"\d+", name)[0]) / 8
        for dimension in re.findall(r"\d+", dimensions):
            size *= int(dimension)
        sizes.append(0.0 if "S(1)" in layout else size)
    return sizes


def num_bytes(kind: str) -> float:
    """Bytes of all arrays in a type together."""
    return sum(shape_bytes(kind))


def _split_at_closing_bracket(text: str) -> tuple[str, str]:
    """Return what stands before and after the bracket that closes an operand list."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""
