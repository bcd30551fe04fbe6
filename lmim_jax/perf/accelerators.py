"""Specifications of accelerators, and the lower bounds on communication time that follow from them.

Sources: Cloud TPU documentation (pages v5e, v5p, v6e, machine types), NVIDIA's data sheets. FLOP/s
are for dense bfloat16. Of the data center network of v5e and v6e, the documentation gives the
bandwidth of a pod of 256 chips: 6.4 and 25.6 Tbit/s; of v5p, that of a chip: 50 Gbit/s.
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
      network_bandwidth: bytes per second per chip between nodes with GPUs, or TPU slices.
    """

    flops: float
    memory: float
    bandwidth: float
    link_bandwidth: float
    chips_per_host: int
    host_cores: int
    network_bandwidth: float


CHIPS = {
    "v5e": Chip(
        flops=197e12,
        memory=16.9e9,
        bandwidth=819e9,
        link_bandwidth=200e9,
        chips_per_host=4,
        host_cores=112,
        network_bandwidth=3.125e9,
    ),
    "v5p": Chip(
        flops=459e12,
        memory=102.8e9,
        bandwidth=2765e9,
        link_bandwidth=600e9,
        chips_per_host=4,
        host_cores=208,
        network_bandwidth=6.25e9,
    ),
    "v6e": Chip(
        flops=918e12,
        memory=33.5e9,
        bandwidth=1640e9,
        link_bandwidth=400e9,
        chips_per_host=4,
        host_cores=180,
        network_bandwidth=12.5e9,
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
DEVICE_KINDS = {  # words in jax's `device_kind` -> key of CHIPS; the first match counts
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "A100": "a100",
    "H100 PCIe": "",  # slower than other H100s and not in the table, like the next one
    "H100 NVL": "",
    "H100": "h100",
    "H200 NVL": "",  # slower than other H200s
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
      slices: number of TPU slices, or of nodes with GPUs: inside one, chips have fast links.
    """

    kind: str
    chip: Chip
    chips: int
    hosts: int
    slices: int


def find_chip(device_kind: str) -> Chip | None:
    """The specification of jax's `device_kind`, such as "NVIDIA H200"; None: not in the table."""
    for words, name in DEVICE_KINDS.items():
        if re.search(rf"\b{words}\b", device_kind):
            return CHIPS.get(name)
    return None


def parse_topology(name: str) -> Topology:
    """Parse the name of a topology.

    Args:
      name: "v5e:4x4", TPU chips along each axis; "2xv5e:4x4", two such slices; "h200:8x4", GPUs of
        a node x nodes.

    Raises:
      UserError: the name is not of that form, or the kind of chip is not known.
    """
    size = r"[1-9]\d*"
    match = re.fullmatch(rf"(?:({size})x)?(\w+):({size}(?:x{size})*)", name)
    count, kind, shape = None, "", ""
    if match:
        count, kind, shape = match.groups()
    if kind not in CHIPS or (count and kind not in TPUS):
        raise UserError(
            f"--topology={name} must be one of: v5e:4x4, 2xv5e:4x4 (slices), v5p:2x2x4, v6e:8x8, "
            "..., h200:8, h100:8x4 (GPUs per node x nodes)"
        )
    chip = CHIPS[kind]
    sizes = [int(size) for size in shape.split("x")]
    chips = math.prod(sizes)
    if kind in TPUS:
        slices = int(count or 1)
        hosts = slices * math.ceil(chips / chip.chips_per_host)
        return Topology(kind, chip, slices * chips, hosts, slices)
    node = dataclasses.replace(chip, chips_per_host=sizes[0])
    nodes = chips // sizes[0]
    return Topology(kind, node, chips, hosts=nodes, slices=nodes)


def network_seconds(topology: Topology, wire_bytes: float) -> float:
    """A lower bound on the time of collectives.

    Between TPU slices or nodes with GPUs, messages are first reduced inside each, then every chip
    exchanges its share with the others.

    Args:
      topology: the chips.
      wire_bytes: what each chip would send in a ring of all chips.
    """
    chip = topology.chip
    if topology.chips == 1:
        return 0.0
    seconds = wire_bytes / (LINK_UTILIZATION * chip.link_bandwidth)
    if topology.slices > 1:
        per_chip = wire_bytes / (topology.chips // topology.slices)
        seconds += per_chip / (LINK_UTILIZATION * chip.network_bandwidth)
    return seconds
