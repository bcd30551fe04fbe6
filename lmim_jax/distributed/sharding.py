"""Device mesh, and where arrays live on it.

The mesh has two axes. The batch is split over both; `data` copies of the state exist, each cut into `fsdp` parts.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmim_jax.utils.errors import UserError

DATA, FSDP = AXES = "data", "fsdp"
BATCH = PartitionSpec(AXES)  # of arrays with a leading batch axis


def make_mesh(data=-1, fsdp=1, devices=None):
    """A mesh over all devices of all hosts (or those given), with axes `data` and `fsdp`.

    Args:
      data: how many copies of the state; fsdp: into how many parts each is cut. -1 in one of them: what is left.

    Raises:
      UserError: see `mesh_sizes`.
    """
    sizes = mesh_sizes(data, fsdp, len(devices or jax.devices()))
    # Auto axes: jax's default, Explicit, is not what Linen expects
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def mesh_sizes(data, fsdp, count):
    """(data, fsdp) without -1, for `count` devices.

    Raises:
      UserError: they do not multiply to that number.
    """
    sizes = (
        count // max(fsdp, 1) if data == -1 else data,
        count // max(data, 1) if fsdp == -1 else fsdp,
    )
    if math.prod(sizes) != count or min(sizes) < 1:
        raise UserError(
            f"config.mesh.data={data} x config.mesh.fsdp={fsdp} is not the number of devices, {count}; "
            "-1 in one of them takes what is left"
        )
    return sizes


def batch_sharding(mesh):
    """Batch arrays are split along their first axis, over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh):
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(abstract, mesh, rules=((".*", "largest"),), min_size=1 << 16):
    """Shardings of a state tree: one rule for parameters, optimiser and EMA, by path and shape.

    Args:
      abstract: tree of arrays or shapes.
      mesh: where nothing is to be cut (`fsdp` is 1), everything is replicated.
      rules: (regex on the path, such as "opt_state/0/mu/encoder/block00/attn/qkv/kernel", how); first full match wins.
        how: "replicated"; the number of the dimension to cut over `fsdp`; or "largest", the largest that can be.
      min_size: arrays of fewer elements are replicated by "largest".

    Raises:
      UserError: a path that no rule matches, or a dimension that cannot be cut.
    """
    parts = mesh.shape[FSDP]

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        how = next((how for pattern, how in rules if re.fullmatch(pattern, name)), None)
        if how is None:
            raise UserError(
                f"config.mesh.rules: no rule matches {name}; end the list with ('.*', 'largest')"
            )
        fits = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if how == "largest":
            axis = (
                max(fits, key=lambda axis: leaf.shape[axis], default=None)
                if leaf.size >= min_size
                else None
            )
        else:
            axis = None if how == "replicated" else how
            if axis not in (None, *fits):
                raise UserError(
                    f"config.mesh.rules: dimension {how!r} of {name} {leaf.shape} cannot be cut in {parts}"
                )
        cut = parts > 1 and axis is not None
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP) if cut else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract)


def gather_shards(tree, specs):
    """Inside a shard_map: whole arrays, of which this device holds the parts that `specs` say."""
    whole = lambda x, spec: (
        jax.lax.all_gather(x, FSDP, axis=spec.index(FSDP), tiled=True) if FSDP in spec else x
    )
    return jax.tree.map(whole, tree, specs)


def reduce_scatter_mean(tree, specs):
    """Inside a shard_map: the mean over all devices of whole arrays, of which each keeps the part that `specs` say."""
    if jax.lax.axis_size(AXES) == 1:  # XLA would copy them
        return tree

    def mean(x, spec):
        if FSDP not in spec:
            return jax.lax.pmean(x, AXES)
        part = jax.lax.psum_scatter(x, FSDP, scatter_dimension=spec.index(FSDP), tiled=True)
        return jax.lax.pmean(part / jax.lax.axis_size(FSDP), DATA)

    return jax.tree.map(mean, tree, specs)


def check_batch(batch_size, micro_batches, devices):
    """Raise a UserError unless every device gets equally many images of every micro-batch."""
    if micro_batches < 1 or batch_size < 1 or batch_size % (devices * micro_batches):
        unit = devices * max(micro_batches, 1)
        lower, upper = batch_size // unit * unit, -(-batch_size // unit) * unit
        near = f"{lower} or {upper}" if 0 < lower < upper else f"{max(upper, unit)}"
        raise UserError(
            f"config.batch_size={batch_size} is not divisible by {devices} device(s) x "
            f"config.micro_batches={micro_batches}; try config.batch_size={near}"
        )


def place_array(array, where):
    """A numpy array that every process has whole -> an array with sharding `where`."""
    return jax.make_array_from_callback(array.shape, where, lambda part: array[part])


def to_global(batch, mesh):
    """This process's rows of a batch (dict of numpy arrays) -> arrays over the whole mesh."""
    placement = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(placement, np.asarray(rows))
        for name, rows in batch.items()
    }


def batch_positions(mesh, batch_size):
    """int32 [B]: the place in the batch, as read, of every row of a global array made by `to_global`.

    Process p reads rows p B / P .. (p + 1) B / P and cuts them up for its own devices; where the mesh orders devices
    by the wires between them, as on TPUs, those of a process need not be neighbours in it.
    """
    owner = np.array([device.process_index for device in mesh.devices.flat])
    block = np.empty(len(owner), np.int32)
    block[np.argsort(owner, kind="stable")] = np.arange(len(owner))
    rows = batch_size // len(owner)
    return (block[:, None] * rows + np.arange(rows, dtype=np.int32)).reshape(-1)
