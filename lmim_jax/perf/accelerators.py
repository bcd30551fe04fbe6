"""Figures of accelerators, and what they allow at best: floors of a step's time.

Sources: Cloud TPU documentation (pages v5e, v5p, v6e, machine types), NVIDIA's data sheets. Dense bfloat16.
"""

import dataclasses
import math
import re

from lmim_jax.utils.errors import UserError

LINE_RATE = 0.8  # share of a link's rate that a ring reaches: an assumption


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, decimal units.

    flops: a second, bfloat16. memory: bytes a program may use. bandwidth: of that memory, bytes a second.
    link: bytes a second it sends to its neighbours, all links in one direction. host: chips of a host. cores: virtual
    cores of that host (two to a physical core); 0: not known. wire: bytes a second per chip between hosts, where these
    are not part of the same torus; 0: they are.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    host: int
    cores: int
    wire: float = 0.0


CHIPS = {
    "v5e": Chip(197e12, 16.9e9, 819e9, 200e9, 4, 112),
    "v5p": Chip(459e12, 102.8e9, 2765e9, 600e9, 4, 208),
    "v6e": Chip(918e12, 33.5e9, 1640e9, 400e9, 4, 180),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 8, 0, 25e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 8, 208, 50e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 8, 208, 50e9),
    "b200": Chip(2250e12, 180e9, 8000e9, 900e9, 8, 0, 50e9),
}
TPUS = "v5e", "v5p", "v6e"
KINDS = {  # part of jax's `device_kind`, the first that fits
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "A100": "a100",
    "H100 PCIe": "",  # slower than the others of that name, and not in the table; nor is the next one
    "H100 NVL": "",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
}


def of_device(kind):
    """The Chip of jax's `device_kind`, such as "NVIDIA H200"; None: not in the table."""
    return next((CHIPS.get(name) for part, name in KINDS.items() if part in kind), None)


def topology(name):
    """(kind, Chip, chips, hosts) of "v5e:4x4" (chips along each axis) or "h200:8x4" (GPUs of a node x nodes).

    Raises:
      UserError: no such thing.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"--topology={name} is none of: v5e:4x4, v5p:2x2x4, v6e:8x8, ..., h200:8, h100:8x4 (GPUs x nodes)"
        )
    chip, sizes = CHIPS[kind], [int(size) for size in shape.split("x")]
    count = math.prod(sizes)
    if kind in TPUS:
        return kind, chip, count, -(-count // chip.host)
    return kind, dataclasses.replace(chip, host=sizes[0]), count, count // sizes[0]


def network_seconds(chip, chips, wire_bytes):
    """At least so long for messages of which a ring of all chips would send `wire_bytes` from each.

    Between GPU nodes: first inside the nodes, then each GPU its share between them.
    """
    if chips == 1:
        return 0.0
    seconds = wire_bytes / (LINE_RATE * chip.link)
    nodes = chips // chip.host
    if chip.wire and nodes > 1:
        seconds += wire_bytes / chip.host / (LINE_RATE * chip.wire)
    return seconds
