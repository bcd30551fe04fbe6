"""One of several processes that read the stream.

    python stream_process.py COORDINATOR COUNT RANK IMAGES WORKERS START

Prints a checksum of its rows of every global batch.
"""

import hashlib
import sys

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lmim_jax.configs import vit_b
from lmim_jax.data import loader, sources
from lmim_jax.distributed import multihost, sharding

OPTIONS = vit_b.data().to_dict() | dict(
    canvas=40, channels=3, threads=2, timeout=120.0, max_bad_fraction=0.2
)
STEPS, BATCH = 12, 8


def main(coordinator, count, rank, images, workers, start):
    """Read the rows of this process and print their checksums."""
    multihost.initialize(coordinator, int(count), int(rank))
    config = ConfigDict({**OPTIONS, "workers": int(workers)})
    batches = loader.training_batches(
        sources.open_folder(images, "train"),
        config,
        seed=0,
        batch_size=BATCH,
        steps=STEPS,
        start=int(start),
        mesh=sharding.make_mesh(),
    )
    for batch in batches:
        shards = sorted(
            batch["image"].addressable_shards, key=lambda shard: shard.index[0].start or 0
        )
        rows = np.concatenate([np.asarray(shard.data) for shard in shards])
        print("rows", hashlib.sha256(rows.tobytes()).hexdigest(), flush=True)
    # Exiting early would end the other process
    multihost_utils.sync_global_devices("all rows are read")


if __name__ == "__main__":
    main(*sys.argv[1:])
