"""Shapes, loops and collectives of a compiled program, read from its text (XLA's HLO)."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\((.*?)\)(?:,|$)")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
# Element type, sizes, axes from minor to major, tile of the last axes, memory: 1 is on the chip
_ARRAY = re.compile(
    r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]"
    r"(?:\{([\d,]*)(?::(?:T\(([\d,]+)\))?[^}]*?(?:S\((\d+)\))?[^}S]*)?\})?"
)
ON_CHIP = "1"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Some collectives of a program that are alike.

    Attributes:
      kind: one of KINDS.
      group: number of devices that take part together.
      shapes: of the results, as "f32[768,768]".
      size: bytes of the whole arrays.
      times: how often they run in one run of the program.
    """

    kind: str
    group: int
    shapes: tuple[str, ...]
    size: int
    times: int

    @property
    def wire_bytes(self) -> int:
        """Bytes that each device sends in a ring, over all `times`."""
        factor = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            factor = 2 * factor
        elif self.kind in ("collective-permute", "collective-broadcast"):
            factor = 1
        return round(self.times * factor * self.size)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One collective in the text of a program."""

    kind: str
    group: int
    shapes: tuple[str, ...]


class _Computations:
    """The computations of a program: what each one contains.

    Attributes:
      entry: name of the computation that runs first.
      operations: {computation: its collectives}.
      calls: {computation: [(computation that it calls, how often)]}.
    """

    def __init__(self, text: str) -> None:
        self.entry = ""
        self.operations: dict[str, list[_Operation]] = collections.defaultdict(list)
        self.calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
        name = ""
        for line in text.splitlines():
            opening = _COMPUTATION.match(line)
            if opening:
                name = opening[2]
                if opening[1]:
                    self.entry = name
            else:
                self._read(name, line)

    def _read(self, computation: str, line: str) -> None:
        """Read one line of a computation."""
        times = _iterations(line)
        for called in _CALLED.findall(line):
            self.calls[computation].append((called, times))
        branches = _BRANCHES.search(line)
        if branches:
            for called in re.findall(r"[\w.\-]+", branches[1]):
                self.calls[computation].append((called, 1))
        collective = _COLLECTIVE.search(line)
        if collective:
            types, kind, start, operands = collective.groups()
            results = shapes(types)
            if start:
                results = _results_of_start(results, operands.count("%"))
            self.operations[computation].append(_Operation(kind, _group_size(line), results))

    def executions(self) -> collections.Counter[str]:
        """How often each computation runs in one run of the program."""
        counts: collections.Counter[str] = collections.Counter()
        waiting = [(self.entry, 1)]
        while waiting:
            computation, times = waiting.pop()
            counts[computation] += times
            for called, iterations in self.calls[computation]:
                waiting.append((called, times * iterations))
        return counts


def executions(text: str) -> collections.Counter[str]:
    """How often each computation runs in one run of a compiled program.

    Args:
      text: see `collectives`. Of a conditional, all branches are taken to run.
    """
    return _Computations(text).executions()


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program that involve several devices.

    Args:
      text: `compiled.as_text()`. Loops must have a known number of iterations, as `lax.scan` has.
    """
    program = _Computations(text)
    counts: collections.Counter[_Operation] = collections.Counter()
    for computation, times in program.executions().items():
        for operation in program.operations[computation]:
            counts[operation] += times
    found = []
    for operation, times in counts.items():
        if operation.group == 1:
            continue
        size = num_bytes(operation.shapes)
        if operation.kind == "reduce-scatter":  # its result is one device's part
            size *= operation.group
        found.append(
            Collective(operation.kind, operation.group, operation.shapes, size=size, times=times)
        )
    return found


def _iterations(line: str) -> int:
    """How often an instruction runs what it calls."""
    count = _TRIP_COUNT.search(line)
    if count and " while(" in line:
        return int(count[1])
    return 1


def _results_of_start(shapes: tuple[str, ...], operands: int) -> tuple[str, ...]:
    """The results among the shapes in the type of the start of an asynchronous collective.

    The type is that of the results alone, or (operands, results, counters).

    Args:
      shapes: all in the type.
      operands: their number.
    """
    if len(shapes) < 2 * operands:
        return shapes
    return shapes[operands : 2 * operands]


def shapes(type_text: str) -> tuple[str, ...]:
    """The shapes in the type of an instruction, a tuple or not: "f32[768,768]", ..."""
    return tuple(f"{element}[{sizes}]" for element, sizes in _SHAPE.findall(type_text))


def arrays(type_text: str) -> tuple[str, ...]:
    """The arrays in the type of an instruction, a tuple or not, with their layouts."""
    return tuple(match[0] for match in _ARRAY.finditer(type_text))


def num_bytes(shapes: Sequence[str]) -> int:
    """Bytes of arrays of these shapes."""
    total = 0
    for shape in shapes:
        element, _, sizes = shape.rstrip("]").partition("[")
        total += _bits(element) * math.prod(_integers(sizes)) // 8
    return total


def memory_bytes(type_text: str) -> int:
    """Bytes that the arrays in the type of an instruction take of the device's main memory.

    On TPUs, arrays consist of whole tiles, such as 8 x 128, and some are in memory on the chip,
    which is not counted.

    Args:
      type_text: with layouts, as "bf16[256,177]{0,1:T(8,128)(2,1)S(1)}", or a tuple of such.
    """
    total = 0
    for element, sizes, minor_to_major, tile, memory in _ARRAY.findall(type_text):
        if memory == ON_CHIP:
            continue
        lengths = _integers(sizes)
        axes = _integers(minor_to_major)
        for axis, side in zip(axes, reversed(_integers(tile)), strict=False):
            lengths[axis] = math.ceil(lengths[axis] / side) * side
        total += _bits(element) * math.prod(lengths) // 8
    return total


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _bits(element: str) -> int:
    """Bits of an element of a type such as "bf16" or "pred"."""
    width = re.search(r"\d+", element)
    return int(width[0]) if width else 8


def _group_size(line: str) -> int:
    """How many devices take part in a collective together.

    Raises:
      ValueError: the text does not say.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return len(np.unique(re.findall(r"\d+", pairs[1])))
    raise ValueError(f"no group of devices in: {line[:300]}")
