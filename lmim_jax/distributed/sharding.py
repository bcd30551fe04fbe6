"""The device mesh, and where arrays live on it.

The mesh has two axes. The batch is split over both; there are `data` copies of the state, each
divided into `fsdp` shards.

Letters: B global batch size.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from lmim_jax.utils.errors import UserError

DATA = "data"
FSDP = "fsdp"
AXES = (DATA, FSDP)
BATCH = PartitionSpec(AXES)  # of arrays with a leading batch axis

Rules = Sequence[tuple[str, str | int]]
DEFAULT_RULES: Rules = ((".*", "largest"),)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a mesh with axes `data` and `fsdp`.

    Shards of a copy are neighbors: `fsdp` stays inside a TPU slice or a host with GPUs as far as it
    divides their devices, so that parameters are gathered over the fast interconnect, and gradients
    are averaged over the network between slices or hosts.

    Args:
      data: number of copies of the state; -1: as many as the devices allow.
      fsdp: number of shards of each copy; -1: as many as the devices allow.
      devices: None: all devices of all hosts.

    Raises:
      UserError: see `mesh_sizes`.
    """
    devices = devices or jax.devices()
    sizes = mesh_sizes(data, fsdp, len(devices))
    # Auto axes: Linen does not support Explicit ones, the default of jax.
    axis_types = (AxisType.Auto,) * 2
    per_slice = collections.Counter(_slice_index(device) for device in devices)
    if len(per_slice) == 1:
        return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
    # jax.make_mesh refuses several slices.
    return Mesh(_arrange_slices(devices, sizes, per_slice), AXES, axis_types=axis_types)


def _slice_index(device: jax.Device) -> int:
    """The TPU slice of a device, or its host where it is a GPU or CPU: jax numbers both alike."""
    return getattr(device, "slice_index", 0)


def _arrange_slices(
    devices: Sequence[jax.Device], sizes: tuple[int, int], per_slice: Mapping[int, int]
) -> np.ndarray:
    """Arrange the devices of several slices as a mesh.

    Args:
      devices: of all slices.
      sizes: (data, fsdp).
      per_slice: number of devices by slice.

    Returns:
      [data, fsdp], devices.
    """
    count = per_slice[_slice_index(devices[0])]
    if set(per_slice.values()) != {count}:  # slices of unequal sizes: simply one after the other
        ordered = sorted(devices, key=lambda device: (_slice_index(device), device.id))
        return np.array(ordered).reshape(sizes)
    data, fsdp = sizes
    inner_fsdp = math.gcd(fsdp, count)
    # It divides `data`: a / b in lowest terms is count / fsdp, and data = slices * a / b.
    inner_data = count // inner_fsdp
    return mesh_utils.create_hybrid_device_mesh(
        (inner_data, inner_fsdp),
        (data // inner_data, fsdp // inner_fsdp),
        devices,
        allow_split_physical_axes=True,
    )


def platform(mesh: Mesh | AbstractMesh) -> str:
    """The platform of a mesh's devices; that of the default devices where it has none."""
    if isinstance(mesh, AbstractMesh):
        return jax.default_backend()
    return mesh.devices.flat[0].platform


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """Resolve -1 in the sizes of the mesh.

    Args:
      data: number of copies of the state, or -1.
      fsdp: number of shards of each copy, or -1.
      count: number of devices.

    Returns:
      (data, fsdp).

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    data_size, fsdp_size = data, fsdp
    if data == -1:
        data_size = count // max(fsdp, 1)
    if fsdp == -1:
        fsdp_size = count // max(data, 1)
    if data_size * fsdp_size != count or min(data_size, fsdp_size) < 1:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not the number of devices, "
            f"{count}; set one of them to -1 to use all that are left"
        )
    return data_size, fsdp_size


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: split along the first axis, over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(
    abstract: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES, min_size: int = 1 << 16
) -> Any:
    """Choose the sharding of every array of a state by its path and shape.

    The same rules apply to parameters, optimizer state and EMA.

    Args:
      abstract: tree of arrays or shapes.
      mesh: if its axis `fsdp` has size 1, everything is replicated.
      rules: pairs of (regex on the path, such as "opt_state/0/mu/encoder/block00/attn/qkv/kernel",
        choice); the first full match wins. The choice is "replicated"; the number of the dimension
        to split over `fsdp`; or "largest", the largest dimension that can be split.
      min_size: "largest" replicates arrays with fewer elements.

    Returns:
      A tree like `abstract`, of shardings.

    Raises:
      UserError: no rule matches a path, or a dimension cannot be split.
    """
    shards = mesh.shape[FSDP]

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = _split_axis(name, leaf.shape, shards, rules, min_size)
        if axis is None or shards == 1:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))

    return jax.tree_util.tree_map_with_path(choose, abstract)


def _split_axis(
    name: str, shape: tuple[int, ...], shards: int, rules: Rules, min_size: int
) -> int | None:
    """The dimension of an array to split into `shards`; None: replicate it."""
    choice = _first_match(name, rules)
    divisible = [axis for axis, size in enumerate(shape) if size % shards == 0]
    if choice == "replicated":
        return None
    if choice == "largest":
        if math.prod(shape) < min_size:
            return None
        return max(divisible, key=lambda axis: shape[axis], default=None)
    if choice not in divisible:
        raise UserError(
            f"config.mesh.rules: dimension {choice!r} of {name} {shape} cannot be split into "
            f"{shards} shards"
        )
    return int(choice)


def _first_match(name: str, rules: Rules) -> str | int:
    for pattern, choice in rules:
        if re.fullmatch(pattern, name):
            return choice
    raise UserError(
        f"config.mesh.rules: no rule matches {name}; end the list with ('.*', 'largest')"
    )


def gather_shards(tree: Any, specs: Any) -> Any:
    """Inside a shard_map: gather the whole arrays of which this device holds shards.

    Args:
      tree: this device's shards.
      specs: tree of their PartitionSpecs.
    """

    def gather(x: Array, spec: PartitionSpec) -> Array:
        if FSDP not in spec:
            return x
        return jax.lax.all_gather(x, FSDP, axis=spec.index(FSDP), tiled=True)

    return jax.tree.map(gather, tree, specs)


def reduce_scatter_mean(tree: Any, specs: Any) -> Any:
    """Inside a shard_map: average arrays over devices; every device keeps its shard of the mean.

    Args:
      tree: whole arrays.
      specs: tree of the PartitionSpecs of the result.
    """
    if jax.lax.axis_size(AXES) == 1:  # XLA would copy them
        return tree

    def mean(x: Array, spec: PartitionSpec) -> Array:
        if FSDP not in spec:
            return jax.lax.pmean(x, AXES)
        shard = jax.lax.psum_scatter(x, FSDP, scatter_dimension=spec.index(FSDP), tiled=True)
        return jax.lax.pmean(shard / jax.lax.axis_size(FSDP), DATA)

    return jax.tree.map(mean, tree, specs)


def check_batch(batch_size: int, micro_batches: int, devices: int) -> None:
    """Check that every device gets equally many images of every micro-batch.

    Args:
      batch_size: images of a step, over all devices.
      micro_batches: parts that a step is divided into.
      devices: number of devices.

    Raises:
      UserError: it does not; the message names the nearest batch sizes that work.
    """
    valid = micro_batches >= 1 and batch_size >= 1
    if valid and batch_size % (devices * micro_batches) == 0:
        return
    unit = devices * max(micro_batches, 1)
    lower = batch_size // unit * unit
    upper = -(-batch_size // unit) * unit
    nearest = f"{max(upper, unit)}"
    if 0 < lower < upper:
        nearest = f"{lower} or {upper}"
    raise UserError(
        f"config.batch_size={batch_size} is not divisible by {devices} device(s) x "
        f"config.micro_batches={micro_batches}; try config.batch_size={nearest}"
    )


def place_array(array: Shaped[np.ndarray, "..."], sharding: NamedSharding) -> Array:
    """Distribute an array that every process holds as a whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_global(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """Assemble arrays over the whole mesh from every process's rows of a batch.

    Args:
      batch: this process's rows, arrays with a leading batch axis, by name.
      mesh: where they go.
    """
    sharding = batch_sharding(mesh)
    arrays = {}
    for name, rows in batch.items():
        arrays[name] = jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    return arrays


def batch_positions(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " B"]:
    """Find where in the batch, as read, every row of a global array made by `to_global` was.

    Process p of P reads rows p B / P .. (p + 1) B / P and splits them over its own devices. Where a
    mesh orders devices by their interconnect, as on TPUs, those of a process need not be neighbors
    in it.

    Args:
      mesh: of the global array.
      batch_size: B, rows of the global array.

    Returns:
      int32.
    """
    owners = np.array([device.process_index for device in mesh.devices.flat])
    blocks = np.empty(len(owners), np.int32)
    blocks[np.argsort(owners, kind="stable")] = np.arange(len(owners))
    rows = batch_size // len(owners)
    return (blocks[:, None] * rows + np.arange(rows, dtype=np.int32)).reshape(-1)
