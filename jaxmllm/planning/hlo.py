"""Reads a compiled program's text: the collectives, and what the compiler itself reckons its parts to take.

The text is XLA's HLO after scheduling, one program a chip. Loops are multiplied out. Only the computations that control
flow reaches count for cycles; what a fusion holds inside is part of the fusion.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPERATION = re.compile(r"(?<![\w.-])([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FLOPS = re.compile(r'"cost_estimate":\{"flops":"?(\d+)"?')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges between chips of one kind and size of group.

    Attributes:
      kind: XLA's name for it.
      group: chips that take part in one of them.
      count: how often it happens, loops multiplied out.
      size: bytes that a chip holds of the results (of what goes in, for ``reduce-scatter``), all of them together.
    """

    kind: str
    group: int
    count: int
    size: int

    def sent(self) -> float:
        """Bytes that a chip sends to its neighbour where the group forms a ring."""
        share = (self.group - 1) / max(1, self.group)
        return self.size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program's text says.

    Attributes:
      cycles: the compiler's estimates of all its parts that have one; copies between memories and kernels have none.
      collectives: by kind and group, those that take most bytes first.
      kernels: kernels called (Pallas), loops multiplied out.
    """

    cycles: int
    collectives: tuple[Collective, ...]
    kernels: int


def read_hlo(text: str, steps: int = 1) -> Reading:
    """Reads the text of a compiled program.

    Args:
      text: ``compiled.as_text()``.
      steps: trips of loops whose length is data.
    """
    computations, entry = _split(text)
    cycles, kernels = 0, 0
    found: dict[tuple[str, int], list[int]] = {}
    for times, instruction, fused in _walk(computations, entry, 1, False, steps):
        operation = _operation(instruction)
        if not fused:
            estimate = _CYCLES.search(instruction)
            cycles += times * int(estimate.group(1)) if estimate else 0
        if operation == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction:
            kernels += times
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            group = _group(instruction)
            entry_of = found.setdefault((kind, group), [0, 0])
            entry_of[0] += times
            entry_of[1] += times * _payload(operation, instruction, group)
    collectives = [Collective(kind, group, *values) for (kind, group), values in found.items()]
    return Reading(cycles, tuple(sorted(collectives, key=lambda each: -each.size)), kernels)


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of every computation, and the name of the first one that runs."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = computations.setdefault(begins.group(2), [])
            entry = begins.group(2) if begins.group(1) else entry
        elif line == "}":  # attributes of kernels go over several lines, which begin with braces too
            current = None
        elif current is not None:
            current.append(line)
    if not entry:
        raise ValueError("not the text of a compiled program: no ENTRY computation")
    return computations, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int, fused: bool, steps: int
) -> Iterator[tuple[int, str, bool]]:
    """Every instruction that runs: how often, its text, and whether it is part of a fusion."""
    for line in computations.get(name, ()):
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        instruction = found.group(2)
        yield times, instruction, fused
        operation = _operation(instruction)
        if operation == "while":
            condition, body = (_attribute(instruction, key) for key in ("condition", "body"))
            trips = _trips(computations.get(condition, ()), steps)
            for inner, count in ((condition, trips + 1), (body, trips)):
                yield from _walk(computations, inner, times * count, fused, steps)
        elif operation == "fusion":
            yield from _walk(computations, _attribute(instruction, "calls"), times, True, steps)
        elif operation == "call":
            yield from _walk(computations, _attribute(instruction, "to_apply"), times, fused, steps)
        elif operation == "async-start":
            yield from _walk(computations, _attribute(instruction, "calls"), times, fused, steps)
        elif operation == "conditional":
            for branch in re.findall(r"%([\w.-]+)", _branches(instruction)):
                yield from _walk(computations, branch, times, fused, steps)


def _operation(instruction: str) -> str:
    """The name of the operation: the first word after the result's shape that opens a parenthesis."""
    found = _OPERATION.search(re.sub(r"\{[^{}]*\}", "", instruction.split(", metadata=")[0]))
    return found.group(1) if found else ""


def _attribute(instruction: str, key: str) -> str:
    found = re.search(rf"\b{key}=%([\w.-]+)", instruction)
    return found.group(1) if found else ""


def _branches(instruction: str) -> str:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction)
    return found.group(1) if found else " ".join(re.findall(r"(?:true|false)_computation=(%[\w.-]+)", instruction))


def _trips(condition: list[str] | tuple[str, ...], steps: int) -> int:
    """Trips of a loop that counts up to a constant; ``steps`` where the end is data."""
    constants = {}
    for line in condition:
        found = re.match(r"\s+(?:ROOT )?%(\S+) = s32\[\]\S* constant\((\d+)\)", line)
        if found:
            constants[found.group(1)] = int(found.group(2))
        if line.lstrip().startswith("ROOT") and "direction=LT" in line:
            operands = re.search(r"compare\(([^)]*)\)", line)
            limit = operands.group(1).split("%")[-1].strip() if operands else ""
            return constants.get(limit, steps)
    return steps


def _group(instruction: str) -> int:
    """Chips of one group."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction)
    if listed:
        return listed.group(1).count(",") + 1
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction)
    if tiled:
        return int(tiled.group(1))
    of_mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction)
    if of_mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", of_mesh.group(2)))
    return 2  # a permutation sends to one other chip


def _payload(operation: str, instruction: str, group: int) -> int:
    """Bytes of the result that a chip holds."""
    result = instruction[: instruction.index(f" {operation}(")]
    sizes = [
        math.prod(int(length) for length in lengths.split(",") if length) * WIDTHS.get(kind, 4)
        for kind, lengths in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", result))
    ]
    if operation in ("all-gather-start", "collective-permute-start"):
        return sizes[1] if len(sizes) > 1 else sum(sizes)  # the operand, the result, and what keeps them in step
    return sum(sizes) * (group if operation.startswith("reduce-scatter") else 1)
