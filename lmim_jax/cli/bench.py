"""Benchmarks. What there is:

    lmim bench --what=checkpoint --config=configs/vit_b.py [--folder=DIR]
    lmim bench --what=input --config=configs/vit_b.py --config.data.path=IMAGES
    lmim bench --what=step --config=configs/vit_b.py [--profile=DIR]
    lmim bench --what=step --config=configs/vit_b.py --compare=configs/vit_b.py --compare.KEY=VALUE
    lmim bench --what=train --config=configs/vit_b.py --config.data.path=IMAGES

checkpoint: how long a save holds up training, until it is safe, and a verified restore; beside plain Orbax
(its CheckpointManager, default options), on the state of the recipe's method.
input: how many images the host delivers, by stage and as a whole, beside Pillow and numpy as torchvision uses them.
step: the train step alone, on random images: images/s, utilisation, compile time, memory, what its program holds.
train: the whole loop with its input pipeline, beside the step alone.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import orbax.checkpoint as ocp
from absl import flags
from ml_collections import config_flags

from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.perf import bench_input, bench_train
from lmim_jax.train import checkpoints as checkpoint
from lmim_jax.train.state import create
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {"config": "quickstart", "compare": None}


def checkpoints(config, folder, repeats):
    """{"gigabytes", "ours": {"stall", "safe", "restore"}, "orbax": {...}}, seconds, medians."""
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    optimizer, _ = adamw.from_config(config.optimizer, warmup_steps=1, total_steps=1)
    state, shardings = create(method, optimizer, config.seed, sharding.make_mesh())
    state = jax.block_until_ready(state)
    sizes = [
        leaf.nbytes for leaf in jax.tree.leaves(state.replace(rng=jax.random.key_data(state.rng)))
    ]
    runs = {"ours": [], "orbax": []}
    for repeat in range(repeats):
        for name, measure in (("ours", _ours), ("orbax", _orbax)):
            with tempfile.TemporaryDirectory(dir=folder) as run:
                runs[name].append(measure(state, shardings, config, pathlib.Path(run), repeat + 1))
    keys = "stall", "safe", "restore"
    medians = {
        name: dict(zip(keys, map(statistics.median, zip(*found, strict=True)), strict=True))
        for name, found in runs.items()
    }
    return {"gigabytes": sum(sizes) / 1e9, **medians}


def _ours(state, shardings, config, run, step):
    """Seconds (stall, until sealed, restore with verification)."""
    with checkpoint.Checkpoints(run, config) as saves:
        began = time.perf_counter()
        saves.save(state, step)
        stall = time.perf_counter() - began
        saves.wait(must_succeed=True)
        safe = time.perf_counter() - began
    with checkpoint.Checkpoints(run, config) as saves:
        began = time.perf_counter()
        jax.block_until_ready(saves.restore(state, shardings).params)
        return stall, safe, time.perf_counter() - began


def _orbax(state, shardings, config, run, step):
    """The same with Orbax's manager alone: nothing is verified."""
    del config
    with ocp.CheckpointManager(run / "orbax") as manager:
        began = time.perf_counter()
        manager.save(step, args=ocp.args.StandardSave(state))
        stall = time.perf_counter() - began
        manager.wait_until_finished()
        safe = time.perf_counter() - began
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    with ocp.CheckpointManager(run / "orbax") as manager:
        began = time.perf_counter()
        restore = ocp.args.StandardRestore(jax.tree.map(place, state, shardings))
        jax.block_until_ready(manager.restore(step, args=restore).params)
        return stall, safe, time.perf_counter() - began


def main(arguments):
    """Run the command."""
    if flags.FLAGS.what in ("step", "train"):
        return bench_train.main()
    log_to_console()
    if flags.FLAGS.what == "input":
        found = bench_input.measure(flags.FLAGS.config, flags.FLAGS.images, flags.FLAGS.repeats)
        print(json.dumps(found, indent=2), bench_input.table(found), sep="\n\n")
        return
    found = checkpoints(flags.FLAGS.config, flags.FLAGS.folder, flags.FLAGS.repeats)
    print(json.dumps(found, indent=2))
    print(f"\n{found['gigabytes']:.2f} GB        stall    safe after    restore   (seconds)")
    for name in ("ours", "orbax"):
        print(
            f"{name:<12}"
            + "".join(f"{found[name][key]:>11.2f}" for key in ("stall", "safe", "restore"))
        )


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe; default: configs/quickstart.py.", lock_config=True
    )
    flags.DEFINE_enum(
        "what", None, ["checkpoint", "input", "step", "train"], "What to measure.", required=True
    )
    flags.DEFINE_string(
        "folder", None, "checkpoint: where to write; default: the system's temporary folder."
    )
    flags.DEFINE_integer("images", 1000, "input: how many images each measurement takes.")
    flags.DEFINE_integer("repeats", 3, "checkpoint, input: how often; medians are reported.")
    bench_train.define_flags()
