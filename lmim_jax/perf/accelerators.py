"""Specifications of accelerators, and the lower bounds on communication time that follow from them.

Sources: Cloud TPU documentation (pages v5e, v5p, v6e, machine types), NVIDIA's data sheets. FLOP/s
are for dense bfloat16.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from lmim_jax.utils.errors import UserError

LINK_UTILIZATION = 0.8  # share of a link's bandwidth that a ring reaches: an assumption


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, in decimal units.

    Attributes:
      flops: per second, bfloat16.
      memory: bytes that a program can use.
      bandwidth: of that memory, bytes per second.
      link_bandwidth: bytes per second sent to neighbors, over all links, in one direction.
      chips_per_host: chips of one host.
      host_cores: virtual cores of that host (two to a physical core); 0: not known.
      network_bandwidth: bytes per second per chip between hosts that are not part of the same
        torus; 0: they are.
    """

    flops: float
    memory: float
    bandwidth: float
    link_bandwidth: float
    chips_per_host: int
    host_cores: int
    network_bandwidth: float = 0.0


CHIPS = {
    "v5e": Chip(
        flops=197e12,
        memory=16.9e9,
        bandwidth=819e9,
        link_bandwidth=200e9,
        chips_per_host=4,
        host_cores=112,
    ),
    "v5p": Chip(
        flops=459e12,
        memory=102.8e9,
        bandwidth=2765e9,
        link_bandwidth=600e9,
        chips_per_host=4,
        host_cores=208,
    ),
    "v6e": Chip(
        flops=918e12,
        memory=33.5e9,
        bandwidth=1640e9,
        link_bandwidth=400e9,
        chips_per_host=4,
        host_cores=180,
    ),
    "a100": Chip(
        flops=312e12,
        memory=80e9,
        bandwidth=2039e9,
        link_bandwidth=300e9,
        chips_per_host=8,
        host_cores=0,
        network_bandwidth=25e9,
    ),
    "h100": Chip(
        flops=989e12,
        memory=80e9,
        bandwidth=3350e9,
        link_bandwidth=450e9,
        chips_per_host=8,
        host_cores=208,
        network_bandwidth=50e9,
    ),
    "h200": Chip(
        flops=989e12,
        memory=141e9,
        bandwidth=4800e9,
        link_bandwidth=450e9,
        chips_per_host=8,
        host_cores=208,
        network_bandwidth=50e9,
    ),
    "b200": Chip(
        flops=2250e12,
        memory=180e9,
        bandwidth=8000e9,
        link_bandwidth=900e9,
        chips_per_host=8,
        host_cores=0,
        network_bandwidth=50e9,
    ),
}
TPUS = ("v5e", "v5p", "v6e")
DEVICE_KINDS = {  # part of jax's `device_kind` -> key of CHIPS; the first match counts
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "A100": "a100",
    "H100 PCIe": "",  # slower than other H100s and not in the table, like the next one
    "H100 NVL": "",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
}


class Topology(NamedTuple):
    """Chips and how they are distributed over hosts.

    Attributes:
      kind: key of CHIPS.
      chip: its specification; for GPUs, `chips_per_host` is that of this topology.
      chips: number of chips.
      hosts: number of hosts.
    """

    kind: str
    chip: Chip
    chips: int
    hosts: int


def find_chip(device_kind: str) -> Chip | None:
    """The specification of jax's `device_kind`, such as "NVIDIA H200"; None: not in the table."""
    for part, name in DEVICE_KINDS.items():
        if part in device_kind:
            return CHIPS.get(name)
    return None


def parse_topology(name: str) -> Topology:
    """Parse "v5e:4x4" (TPU chips along each axis) or "h200:8x4" (GPUs of a node x nodes).

    Raises:
      UserError: the name is not of that form, or the kind of chip is not known.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"--topology={name} must be one of: v5e:4x4, v5p:2x2x4, v6e:8x8, ..., "
            "h200:8, h100:8x4 (GPUs per node x nodes)"
        )
    chip = CHIPS[kind]
    sizes = [int(size) for size in shape.split("x")]
    chips = math.prod(sizes)
    if kind in TPUS:
        return Topology(kind, chip, chips, hosts=math.ceil(chips / chip.chips_per_host))
    node = dataclasses.replace(chip, chips_per_host=sizes[0])
    return Topology(kind, node, chips, hosts=chips // sizes[0])


def network_seconds(chip: Chip, chips: int, wire_bytes: float) -> float:
    """A lower bound on the time of collectives.

    Between GPU nodes, messages are first reduced inside the nodes, then each GPU exchanges its
    share with other nodes.

    Args:
      chip: the specification of each chip.
      chips: number of chips.
      wire_bytes: what each chip would send in a ring of all chips.
    """
    if chips == 1:
        return 0.0
    seconds = wire_bytes / (LINK_UTILIZATION * chip.link_bandwidth)
    nodes = chips // chip.chips_per_host
    if chip.network_bandwidth and nodes > 1:
        per_chip = wire_bytes / chip.chips_per_host
        seconds += per_chip / (LINK_UTILIZATION * chip.network_bandwidth)
    return seconds
