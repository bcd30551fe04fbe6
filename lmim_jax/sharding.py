"""Device mesh, and where arrays live on it."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmim_jax.errors import UserError

DATA = "data"  # mesh axis over which the batch is split


def make_mesh():
    """All devices of all hosts on one axis, `data`. Auto axes: jax's default, Explicit, is not what Linen expects."""
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def of_batch(mesh):
    """Batch arrays are split along their first axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh):
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_state(abstract, mesh):
    """Shardings of a state tree: replicated (data parallel), the right choice up to ViT-B and beyond."""
    return jax.tree.map(lambda _: replicated(mesh), abstract)


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


def to_global(batch, mesh):
    """This process's rows of a batch (dict of numpy arrays) -> arrays over the whole mesh."""
    placement = of_batch(mesh)
    return {name: jax.make_array_from_process_local_data(placement, np.asarray(rows)) for name, rows in batch.items()}
