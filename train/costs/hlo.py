"""The text of a compiled program, read: its instructions, its loops and the bytes it moves."""

import dataclasses
import itertools
import re
from collections.abc import Iterable
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

# These only name values, or wait for a transfer that is counted at another instruction.
_MOVE_NOTHING = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all "
    "partition-id replica-id opt-barrier async-start async-update domain".split()
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATES = frozenset(("dynamic-update-slice", "scatter"))


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

    @property
    def updates(self) -> tuple[str, ...]:
        """Of a scatter or a dynamic-update-slice: what is written into as many first operands."""
        if self.opcode == "dynamic-update-slice":
            return self.operands[1:2]
        return self.operands[-(len(self.operands) // 2) :]  # arrays, indices, updates

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """Computations that it runs: a loop's body, a fusion's content."""
        found = _CALLEES.findall(self.attributes)
        return tuple(
            name for one, many in found for name in (one, *re.findall(r"[\w.-]+", many)) if name
        )


Computation = dict[str, Instruction]


class Program:
    """The computations of a compiled program, and how often a run of it executes each.

    Args:
      text: as `jax.stages.Compiled.as_text` returns it.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
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

    def trip_count(self, loop: Instruction) -> int | None:
        """Return how many iterations a loop has, None where that depends on the data.

        XLA for CPU and GPU states it. For TPU the loop's condition does: `index < constant`, with
        an index that starts at 0, which is how JAX writes `scan`.
        """
        if found := _TRIP_COUNT.search(loop.attributes):
            return int(found[1])
        name = re.findall(r"\bcondition=%?([\w.-]+)", loop.attributes)[0]
        condition = self.computations[name]
        root = _root(condition)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            limit = condition[root.operands[1]]
            if limit.opcode == "constant":
                return int(limit.arguments)
        return None

    def runs(self) -> dict[str, int]:
        """How often each computation is executed; loops of unknown length count as one round."""
        counts = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                for callee in instruction.callees:
                    visit(callee, times * self._repeats(instruction))

        visit(self.entry, 1)
        return counts

    def endless_loops(self) -> list[Instruction]:
        """Loops whose length depends on the data."""
        return [
            instruction
            for instructions in self.computations.values()
            for instruction in instructions.values()
            if instruction.opcode == "while" and self.trip_count(instruction) is None
        ]

    def search_step_bytes(self) -> float:
        """Bytes moved by a step of a search, by `bytes_moved`.

        The search is its largest loop of unknown length, which runs until the sentences are done.
        Such loops inside it are left out, as the one in which waiting sentences begin.
        """
        loops = self.endless_loops()
        rounds = {loop.name: sum(map(self.bytes_moved, loop.callees)) for loop in loops}

        def outermost(names: Iterable[str]) -> float:
            """Bytes of the loops of unknown length in these computations."""
            total = 0.0
            for instruction in itertools.chain.from_iterable(
                self.computations[name].values() for name in names
            ):
                if instruction.name in rounds:
                    total += rounds[instruction.name]
                elif instruction.opcode in ("call", "conditional"):
                    total += outermost(instruction.callees)
            return total

        search = max(loops, key=lambda loop: rounds[loop.name])
        return rounds[search.name] - outermost(search.callees)

    def bytes_moved(self, start: str | None = None) -> float:
        """Bytes of main memory that a run reads and writes, estimated.

        Every instruction reads its operands and writes its result; values inside a fusion stay on
        the chip. If an operand is only sliced, the slices count; if an array is updated in place,
        the update counts.

        Args:
          start: the computation to begin with; by default the whole program.
        """
        start = start or self.entry
        total = 0.0
        for instruction in self.computations[start].values():
            if instruction.opcode in ("while", "call", "conditional", "async-start"):
                for callee in instruction.callees:
                    total += self._repeats(instruction) * self.bytes_moved(callee)
            total += self._moved_by(self.computations[start], instruction)
        return total

    def _repeats(self, instruction: Instruction) -> int:
        if instruction.opcode != "while":
            return 1
        times = self.trip_count(instruction)
        return 1 if times is None else times

    def _moved_by(self, around: Computation, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode in _MOVE_NOTHING or opcode.endswith("-done"):
            return 0.0
        if opcode == "fusion":
            return self._moved_by_fusion(around, instruction)
        if opcode in _SLICES:
            return 2 * num_bytes(instruction.type)
        if opcode in _UPDATES:
            return 2 * sum(num_bytes(around[name].type) for name in instruction.updates)
        if opcode in ("copy-start", "slice-start"):
            # (result, operand, …) or ((operand), result, …): what is copied is the smaller one.
            sizes = [size for size in shape_bytes(_everywhere(instruction.type)) if size > 4]
            ends = shape_bytes(instruction.type)
            return min(sizes, default=0.0) * sum(size > 4 for size in ends)
        written = shape_bytes(instruction.type)
        read = sum(num_bytes(around[name].type) for name in instruction.operands)
        return sum(written[:1] if opcode.endswith("-start") else written) + read

    def _moved_by_fusion(self, around: Computation, fusion: Instruction) -> float:
        inside = self.computations[fusion.callees[0]]
        root = _root(inside)
        if "AsyncCollective" in root.attributes:
            # The one that begins returns operand and result; the others only wait.
            begins = "AsyncCollectiveStart" in root.attributes
            return sum(shape_bytes(fusion.type)[:2]) if begins else 0.0
        results = root.operands if root.opcode == "tuple" else (root.name,)
        sizes = iter(shape_bytes(fusion.type))
        moved = 0.0
        for name in results:
            made = inside[name]
            # It may make several arrays, as a reduction to a maximum and its index does.
            size = sum(itertools.islice(sizes, len(shape_bytes(made.type))))
            while made.opcode == "bitcast":
                made = inside[made.operands[0]]
            if made.opcode in _UPDATES and _is_given(inside, made.operands[0]):
                updates = (_everywhere(inside[name].type) for name in made.updates)
                size = min(size, sum(map(num_bytes, updates)))
            moved += size
        assert next(sizes, None) is None, f"{fusion.name} has more results than its root"
        for index, operand in enumerate(fusion.operands):
            whole = num_bytes(around[operand].type)
            if whole:
                moved += min(whole, self._read_of(inside, _parameter(inside, index)))
        return moved

    def _read_of(self, inside: Computation, name: str) -> float:
        """Bytes that a fused computation reads of one of its values."""
        total = 0.0
        for reader in inside.values():
            for position in (i for i, operand in enumerate(reader.operands) if operand == name):
                if reader.opcode == "fusion":
                    nested = self.computations[reader.callees[0]]
                    total += self._read_of(nested, _parameter(nested, position))
                elif reader.opcode == "bitcast":
                    total += self._read_of(inside, reader.name)
                elif reader.opcode in _SLICES and position == 0:
                    total += num_bytes(_everywhere(reader.type))
                elif reader.opcode not in _UPDATES or position >= len(reader.updates):
                    total += num_bytes(_everywhere(inside[name].type))
        return total


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.is_root)


def _is_given(computation: Computation, name: str) -> bool:
    """Whether a value is a parameter, and so in main memory already."""
    made = computation[name]
    while made.opcode == "bitcast":
        made = computation[made.operands[0]]
    return made.opcode == "parameter"


def _parameter(computation: Computation, index: int) -> str:
    return next(
        one.name
        for one in computation.values()
        if one.opcode == "parameter" and one.arguments == str(index)
    )


def _everywhere(kind: str) -> str:
    """Return a type without the memory spaces of its arrays."""
    return kind.replace("S(1)", "")


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
