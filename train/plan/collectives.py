"""What devices send each other in one run of a compiled program."""

import dataclasses
import re
from math import prod

from train.costs.hlo import Instruction, Program, shape_bytes

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
      kind: such as "all-reduce".
      bytes: size of the whole array of a group: the result of an all-reduce or an all-gather, the
        input of a reduce-scatter.
      group: devices in each group.
      times: how often it is executed; a loop whose length depends on the data counts as one round.
    """

    kind: str
    bytes: float
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all, in a ring, which is the least possible."""
        share = (self.group - 1) / self.group
        passes = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.times * self.bytes * passes.get(self.kind, share)


def collectives(program: Program, devices: int) -> list[Collective]:
    """Return the collectives of a program for `devices` devices, without groups of one."""
    runs = program.runs()
    found = []
    for name, instructions in program.computations.items():
        if any("AsyncCollectiveDone" in one.attributes for one in instructions.values()):
            continue  # TPU: it repeats what was begun in another computation
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _KINDS or not runs[name]:
                continue
            group = _group_size(instruction.attributes, devices)
            size = _bytes(kind, instruction, group)
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                # TPU: each device keeps its part of the sum, in the same fusion.
                kind = "reduce-scatter"
            if group > 1:
                found.append(Collective(kind, size, group, runs[name]))
    return found


def _bytes(kind: str, instruction: Instruction, group: int) -> float:
    # Links carry an array whichever memory of the chip it lies in.
    sizes = shape_bytes(instruction.type.replace("S(1)", ""))
    if instruction.opcode == "collective-permute-start":
        return sizes[1]  # operand, result, and two flags
    if instruction.opcode == "all-gather-start":
        return sum(sizes[len(sizes) // 2 :])  # operands, results
    return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _group_size(attributes: str, devices: int) -> int:
    """Return the devices of a group, from any of HLO's three notations.

    {{0,1},{2,3}}: the groups themselves; [2,4]<=[8]: 2 groups of 4; mesh['data'=2,'fsdp'=4]
    {'fsdp'}: all devices along an axis. {} is one group of all devices.
    """
    if "source_target_pairs=" in attributes:
        return devices
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # 'data':(1)2 is a part of an axis, of 2 devices.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
