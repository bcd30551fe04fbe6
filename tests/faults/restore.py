"""Restores the newest state of a run on the devices of the flags of `lmim train`.

Prints the step and a checksum of the state.
"""

import os
import sys

flags_of_devices = os.environ["XLA_FLAGS"]

import jax  # noqa: E402
import processes  # noqa: E402
from absl import flags  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from lmim_jax.cli import app, train  # noqa: E402
from lmim_jax.distributed import multihost, sharding  # noqa: E402
from lmim_jax.perf import aot  # noqa: E402
from lmim_jax.train.checkpoints import Checkpoints  # noqa: E402

os.environ["XLA_FLAGS"] = flags_of_devices  # not the 8 devices of tests

RECIPES = train.RECIPES
define_flags = train.define_flags


def main(_):
    """Restore and print."""
    given = flags.FLAGS
    multihost.initialize(given.coordinator, given.num_processes, given.process_id, given.heartbeat)
    config = given.config
    parts = aot.build_for_images(config, images=48)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    with Checkpoints(given.workdir, config) as checkpoints:
        state = checkpoints.restore(parts.abstract_state(), parts.state_sharding(mesh))
    sharded = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    assert bool(sharded) == (mesh.shape["fsdp"] > 1)
    state = state.replace(rng=jax.random.key_data(state.rng))
    state = multihost_utils.process_allgather(state, tiled=True)
    print("step", int(state.step), processes.digest_of_tree(state))


if __name__ == "__main__":
    app.run(sys.modules["__main__"], sys.argv)
