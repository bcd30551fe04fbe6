"""Official checkpoints into a run directory, which then evaluates, exports and goes on training.

    lmim import-weights FILE --format=mae --config=configs/mae_vit_b.py --workdir=RUN \\
        --config.data.path=IMAGES
    lmim import-weights FILE --format=mae --config=configs/mae_vit_b.py --workdir=RUN --nodata

FILE: a state dict as .safetensors or .npz, or a PyTorch file (.pth, .pt, .pth.tar; needs torch >= 2.6, and only
tensors are read). --format: latent_mim | pilamim | mae | ijepa, whose names it has. --config: the recipe, with the
sizes of that model; the optimiser starts afresh, at step 0.

Every array must find its place, and every place its array: what is missing, unexpected or of another shape is listed,
and is an error. Of a file with an encoder alone, the rest can start as in a new run, where you say so:
--fresh='decoder.*|mask_token'. --drop=REGEX leaves arrays of the file out. Both can be given several times.

--nodata: without the training images of the recipe; the run gets them when it is first trained.
"""

import hashlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_flags

from lmim_jax.convert.official import base as official
from lmim_jax.data import loader, sources
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.train import checkpoint_manifest, lock, workdir
from lmim_jax.train import checkpoints as checkpoint
from lmim_jax.train.state import init
from lmim_jax.utils import array_io, atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {"config": None}


def read(path, method, drop=(), fresh=()):
    """Read a checkpoint's arrays, all of which have a place in the method.

    Args:
      path: see `tensors.read`. drop: regexes on names in the file. fresh: on official names that it may lack.

    Returns:
      (our tree of them, names of what was dropped, of what starts afresh, of what else the file holds).

    Raises:
      UserError: naming the file, and what is missing, unexpected or different.
    """
    trained = official.entries(method)
    needed = trained | official.describe(method).fixed
    arrays, rest = array_io.read(path, roots={name.split(".")[0] for name in needed})
    dropped = [name for name in arrays if _matches(drop, name)]
    arrays = {name: x for name, x in arrays.items() if name not in dropped}
    absent = [
        name for name in needed if name not in arrays and (_matches(fresh, name) or name in dropped)
    ]
    for flag, patterns, found in (("drop", drop, dropped), ("fresh", fresh, absent)):
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in found):
                raise UserError(
                    f"--{flag}={pattern} fits no name; it must fit a whole one, such as {min(needed)}"
                )
    try:
        official.check(method, arrays, missing_ok=lambda name: name in absent)
    except UserError as error:
        hint = "--fresh=REGEX: what may start as in a new run; --drop=REGEX: what to leave out"
        raise UserError(f"{path} does not fit the recipe: {error}; {hint}") from error
    return (
        official.from_official(method, arrays),
        dropped,
        [name for name in absent if name in trained],
        rest,
    )


def import_weights(path, config, folder, identity, drop=(), fresh=()):
    """Make a run of a checkpoint; what happened, for people: lines.

    Args:
      path: the checkpoint. config: ConfigDict of the recipe. folder: of the run. identity: of its training images, see
      `workdir.claim`; None: not known yet. drop, fresh: see `read`.

    Raises:
      UserError: see `read`; or there is something in the folder.
    """
    folder = pathlib.Path(folder).expanduser()
    if (folder / "config.json").exists() or checkpoint_manifest.steps(folder):
        raise UserError(f"--workdir={folder} holds a run already; give another folder")
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    tree, dropped, absent, rest = read(path, method, drop, fresh)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    optimizer, _ = adamw.from_config(config.optimizer, warmup_steps=0, total_steps=1)
    begin = lambda tree: _begin(method, optimizer, config.seed, tree)
    layout = dict(rules=config.mesh.rules, min_size=config.mesh.min_size)
    shardings = sharding.state_sharding(jax.eval_shape(begin, tree), mesh, **layout)
    state = jax.jit(begin, out_shardings=shardings)(tree)
    origin = {"file": pathlib.Path(path).name, "sha256": _checksum(path)}
    origin |= {"dropped": dropped, "fresh": absent, "not_read": rest}
    with lock.Lock(folder):
        with checkpoint.Checkpoints(folder, config) as checkpoints:
            checkpoints.save(state, 0)
        atomic_io.write(folder / "imported.json", json.dumps(origin, indent=2) + "\n")
        workdir.claim(folder, config.to_dict(), identity)
    leaves = jax.tree.leaves(tree)
    count = sum(x.size for x in leaves)
    lines = [f"{len(leaves)} arrays, {count:,} numbers: every array has its place"]
    told = (
        ("left out (--drop)", dropped),
        ("start afresh", absent),
        ("no part of the model, not read", rest),
    )
    return lines + [f"{what}: {', '.join(names)}" for what, names in told if names]


def _begin(method, optimizer, seed, tree):
    """A fresh state with the arrays of `tree` in it; a teacher that is not there begins as a copy. Pure."""
    fresh = init(method, optimizer, jax.random.key(seed))
    flat = lambda tree: flatten_dict(tree, keep_empty_nodes=True)
    merge = lambda old, new: unflatten_dict(flat(old) | flat(new))
    params = merge(fresh.params, tree["params"])
    target = merge(jax.tree.map(jnp.copy, method.target_of(params)), tree.get("target", {}))
    return fresh.replace(params=params, target=target, opt_state=optimizer.init(params))


def _checksum(path):
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _matches(patterns, name):
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def main(arguments):
    """Run the command."""
    given = flags.FLAGS
    log_to_console()
    if len(arguments) != 1 or not given.config or not given.workdir:
        raise UserError(
            "give a file, a recipe and a folder: FILE --format=mae --config=... --workdir=..."
        )
    if given.format not in official.names():
        raise UserError(f"--format={given.format} is none of: {' | '.join(official.names())}")
    config = given.config
    if config.method.name != given.format:
        raise UserError(
            f"--format={given.format}, but the recipe is one of {config.method.name}; give another"
        )
    for pattern in given.drop + given.fresh:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from error
    identity = None
    if given.data:
        try:
            source = sources.from_config(config.data, "train")
            loader.steps_per_epoch(source, config.batch_size)
        except UserError as error:
            raise UserError(f"{error}; or import without training images: --nodata") from error
        identity = source.identity()
    lines = import_weights(arguments[0], config, given.workdir, identity, given.drop, given.fresh)
    run = given.workdir
    print("\n".join(lines))
    print(f"\n{run} is a run now, at step 0:\n")
    for command_line in (
        f"lmim features {run} IMAGES --out=features.npz",
        f"lmim export {run} --format=timm --out=DIR",
        f"python main.py --config=THE_SAME_RECIPE --workdir={run}",
    ):
        print(f"  {command_line}")


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe with the sizes of the model.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder of the run to make.")
    flags.DEFINE_string(
        "format", None, "Whose names the file has: latent_mim | pilamim | mae | ijepa."
    )
    flags.DEFINE_multi_string("drop", [], "Regex on whole names in the file that are left out.")
    flags.DEFINE_multi_string(
        "fresh", [], "Regex on whole official names that the file lacks, and that start afresh."
    )
    flags.DEFINE_bool(
        "data", True, "The training images of the recipe are there, and the run is one on them."
    )
