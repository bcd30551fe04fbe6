"""What a compiled program communicates, read from its text (XLA's HLO)."""

import collections
import dataclasses
import math
import re

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Some equal collectives: kind, devices in a group, shapes as text, bytes of the whole arrays, how many a run."""

    kind: str
    group: int
    shapes: tuple[str, ...]
    size: int
    times: int

    @property
    def scalar(self):
        """Whether it carries single numbers only."""
        return all(shape.endswith("[]") for shape in self.shapes)

    @property
    def wire_bytes(self):
        """Bytes that each device sends, all times together, in a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(
            self.kind, share
        )
        return round(self.times * factor * self.size)


def collectives(text):
    """The collectives of a compiled program.

    Args:
      text: `compiled.as_text()`. Loops must have a known number of rounds, as `lax.scan` has.

    Returns:
      [Collective], those between several devices.
    """
    found, calls, entry, name = (
        collections.defaultdict(list),
        collections.defaultdict(list),
        None,
        None,
    )
    for line in text.splitlines():
        if opens := _COMPUTATION.match(line):
            name = opens[2]
            entry = name if opens[1] else entry
            continue
        rounds = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
        times = int(rounds[1]) if rounds and " while(" in line else 1
        calls[name] += [(called, times) for called in _CALLED.findall(line)]
        branches = re.search(r"branch_computations=\{(.*?)\}", line)
        calls[name] += [
            (called, 1) for called in re.findall(r"[\w.\-]+", branches[1] if branches else "")
        ]
        if collective := _COLLECTIVE.search(line):
            found[name].append((collective[2], _group(line), _shapes(*collective.groups())))
    counts, waiting = collections.Counter(), [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        for operation in found[name]:
            counts[operation] += times
        waiting += [(called, times * rounds) for called, rounds in calls[name]]
    return [
        Collective(
            kind, group, shapes, _size(shapes) * (group if kind == "reduce-scatter" else 1), times
        )
        for (kind, group, shapes), times in counts.items()
        if group > 1
    ]


def _shapes(types, kind, start):
    """Shapes of the results, as "f32[768,768]"."""
    shapes = tuple(f"{kind}[{sizes}]" for kind, sizes in _SHAPE.findall(types))
    if start and kind in (
        "all-gather",
        "collective-permute",
    ):  # (operands, results, and a permute's two counters)
        shapes = shapes[:2] if kind == "collective-permute" else shapes
        return shapes[len(shapes) // 2 :]
    return shapes


def _size(shapes):
    """Bytes."""
    total = 0
    for shape in shapes:
        kind, _, sizes = shape.partition("[")
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        total += bits * math.prod(int(size) for size in sizes[:-1].split(",") if size) // 8
    return total


def _group(line):
    """How many devices take part together."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return len(np.unique(re.findall(r"\d+", pairs[1])))
    raise ValueError(f"no group of devices in: {line[:300]}")
