"""Makes a run of an official checkpoint, which can then be evaluated, exported and trained further.

    lmim import-weights FILE --format=mae --config=mae_vit_b --workdir=RUN --config.data.path=IMAGES
    lmim import-weights FILE --format=mae --config=mae_vit_b --workdir=RUN --nodata

FILE: a state dict as .safetensors or .npz, or a PyTorch file (.pth, .pt, .pth.tar; needs torch >=
2.6, and only tensors are read). --format: the method whose official code wrote it: latent_mim |
pilamim | mae | ijepa | bootmae | capi | data2vec2. --config: the recipe, with the sizes of that
model; the optimizer starts afresh at step 0.

Every array of the file must belong to the model, and every array of the model must be in the file:
missing, unexpected and differently shaped arrays are listed and are an error. If a file holds only
an encoder, the rest can be initialized as in a new run: --fresh='decoder.*|mask_token'.
--drop=REGEX leaves arrays of the file out. Both can be given several times.

--nodata: without the training images of the recipe; they are recorded when training starts.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from lmim_jax.cli import app
from lmim_jax.convert.official import base as official
from lmim_jax.data import loader, modalities, sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.methods.base import Method
from lmim_jax.optim import adamw
from lmim_jax.train import checkpoint_manifest, lock, workdir
from lmim_jax.train.build import complete
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.state import TrainState, init_state
from lmim_jax.utils import array_io, atomic_io, buckets, commands
from lmim_jax.utils.checksum import file_checksum
from lmim_jax.utils.errors import UserError, did_you_mean
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {"config": None}


class CheckpointContents(NamedTuple):
    """What was read from an official checkpoint.

    Attributes:
      tree: arrays as in a `TrainState`: {"params": ...}, and "target" if the file has a teacher.
      dropped: names of arrays that were left out on request.
      fresh: official names that the file lacks, to be initialized as in a new run.
      not_read: what else the file holds.
    """

    tree: dict[str, Any]
    dropped: list[str]
    fresh: list[str]
    not_read: list[str]


def read(
    path: str | pathlib.Path, method: Method, drop: Sequence[str] = (), fresh: Sequence[str] = ()
) -> CheckpointContents:
    """Read the arrays of a checkpoint, all of which must belong to the method.

    Args:
      path: see `array_io.read`.
      method: of the recipe.
      drop: regexes on whole names in the file, which are left out.
      fresh: regexes on whole official names that the file may lack.

    Raises:
      UserError: naming the file and what is missing, unexpected or different.
    """
    trained = official.entries(method)
    spec = official.describe(method)
    needed = trained | spec.constants
    roots = {name.split(".")[0] for name in needed}
    arrays, not_read = array_io.read(path, roots, spec.beside)
    arrays = official.rename(method, arrays)
    unused = [name for name in arrays if _matches_any(spec.unused, name)]
    arrays = {name: array for name, array in arrays.items() if name not in unused}
    not_read = not_read + unused
    dropped = [name for name in arrays if _matches_any(drop, name)]
    arrays = {name: array for name, array in arrays.items() if name not in dropped}
    absent = []
    for name in needed:
        if name not in arrays and (name in dropped or _matches_any(fresh, name)):
            absent.append(name)
    _check_used("drop", drop, dropped, min(needed))
    _check_used("fresh", fresh, absent, min(needed))
    try:
        official.check(method, arrays, missing_ok=absent)
    except UserError as error:
        hint = "--fresh=REGEX initializes what is missing; --drop=REGEX leaves arrays out"
        raise UserError(f"{path} does not fit the recipe: {error}; {hint}") from error
    return CheckpointContents(
        tree=official.from_official(method, arrays),
        dropped=dropped,
        fresh=[name for name in absent if name in trained],
        not_read=not_read,
    )


def _matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether a regex matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _check_used(flag: str, patterns: Sequence[str], found: Sequence[str], example: str) -> None:
    """Raise a UserError for a regex that matches none of the names found."""
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in found):
            raise UserError(
                f"--{flag}={pattern} fits no name; it must fit a whole one, such as {example}"
            )


def import_weights(
    path: str | pathlib.Path,
    config: ConfigDict,
    folder: buckets.Pathname,
    identity: dict[str, Any] | None,
    drop: Sequence[str] = (),
    fresh: Sequence[str] = (),
) -> list[str]:
    """Make a run of a checkpoint.

    Args:
      path: the checkpoint.
      config: the recipe.
      folder: of the run.
      identity: of its training images, see `workdir.claim`; None: not known yet.
      drop: see `read`.
      fresh: see `read`.

    Returns:
      Lines that say what was imported.

    Raises:
      UserError: see `read`; or the folder holds a run.
    """
    folder = buckets.path(folder)
    if (folder / "config.json").exists() or checkpoint_manifest.steps(folder):
        raise UserError(f"--workdir={folder} holds a run already; give another folder")
    method = methods.from_config(
        modalities.method_options(config), total_steps=1, steps_per_epoch=1
    )
    augmentation = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    config = complete(config, method, augmentation)
    contents = read(path, method, drop, fresh)
    state = _create_state(config, method, contents.tree)
    origin = {
        "file": pathlib.Path(path).name,
        "sha256": file_checksum(pathlib.Path(path)),
        "dropped": contents.dropped,
        "fresh": contents.fresh,
        "not_read": contents.not_read,
    }
    with lock.Lock(folder) as held:
        with Checkpoints(folder, config, held) as checkpoints:
            checkpoints.save(state, 0)
        atomic_io.write(folder / "imported.json", json.dumps(origin, indent=2) + "\n")
        workdir.claim(folder, config.to_dict(), identity)
    leaves = jax.tree.leaves(contents.tree)
    count = sum(leaf.size for leaf in leaves)
    lines = [f"{len(leaves)} arrays, {count:,} numbers: all belong to the model"]
    if contents.dropped:
        lines.append(f"left out (--drop): {', '.join(contents.dropped)}")
    if contents.fresh:
        lines.append(f"initialized as in a new run: {', '.join(contents.fresh)}")
    if contents.not_read:
        lines.append(f"not part of the model, not read: {', '.join(contents.not_read)}")
    return lines


def _create_state(config: ConfigDict, method: Method, tree: dict[str, Any]) -> TrainState:
    """A state at step 0 with imported arrays, on the devices of the recipe's mesh."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    optimizer, _ = adamw.from_config(
        config.optimizer, warmup_steps=0, total_steps=1, steps_per_epoch=1
    )

    def create(arrays: dict[str, Any]) -> TrainState:
        return _merge_into_fresh_state(method, optimizer, config.seed, arrays)

    shardings = sharding.state_sharding(
        jax.eval_shape(create, tree),
        mesh,
        rules=config.mesh.rules,
        min_size=config.mesh.min_size,
    )
    return jax.jit(create, out_shardings=shardings)(tree)


def _merge_into_fresh_state(
    method: Method, optimizer: optax.GradientTransformation, seed: int, tree: dict[str, Any]
) -> TrainState:
    """A fresh state with the arrays of `tree`; a missing teacher starts as a copy. Pure."""
    fresh = init_state(method, optimizer, jax.random.key(seed))
    params = _merge(fresh.params, tree["params"])
    copied = jax.tree.map(jnp.copy, method.target_of(params))
    target = _merge(copied, tree.get("target", {}))
    return fresh.replace(params=params, target=target, opt_state=optimizer.init(params))


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The nested dict `old` with the leaves of `new` in place of its own."""
    leaves = flatten_dict(old, keep_empty_nodes=True)
    leaves.update(flatten_dict(new, keep_empty_nodes=True))
    return unflatten_dict(leaves)


def main(arguments: list[str]) -> None:
    """Import, and print what can be done with the run."""
    given = flags.FLAGS
    log_to_console()
    if len(arguments) != 1 or not given.config or not given.workdir:
        raise UserError(
            "give a file, a recipe and a folder: FILE --format=mae --config=mae_vit_b --workdir=RUN"
        )
    _check_flags()
    identity = None
    if given.data:
        identity = _identify_images(given.config)
    run = given.workdir
    lines = import_weights(arguments[0], given.config, run, identity, given.drop, given.fresh)
    print("\n".join(lines))
    print(f"\n{run} is a run now, at step 0:\n")
    for words in next_steps():
        print("  " + commands.line(*words))


def next_steps() -> list[list[str]]:
    """The words of commands that can follow the one that was given."""
    given = flags.FLAGS
    run = f"--workdir={given.workdir}"
    steps = [
        ["features", run, "FOLDER", "--out=features.npz"],
        ["export", run, "--format=flax", "--out=DIR"],
    ]
    if given.data:  # there is at least a batch of images
        recipe = config_flags.get_config_filename(given["config"])
        changes = config_flags.get_override_values(given["config"])
        options = [f"--config.{key}={value}" for key, value in changes.items()]
        steps.append(["train", f"--config={recipe}", *options, run])
    return steps


def _check_flags() -> None:
    """Raise a UserError for a wrong --format or regex."""
    given = flags.FLAGS
    formats = official.names()
    if given.format not in formats:
        hint = did_you_mean(given.format, formats)
        raise UserError(f"--format={given.format} must be one of: {' | '.join(formats)}{hint}")
    name = given.config.method.name
    if name != given.format:
        raise UserError(f"--format={given.format}, but the recipe is one of {name}; give another")
    for pattern in given.drop + given.fresh:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern!r} is not a regular expression: {error}") from error


def _identify_images(config: ConfigDict) -> dict[str, Any]:
    """What identifies the training images of a recipe.

    Raises:
      UserError: there are none, or fewer than a batch.
    """
    try:
        source = sources.from_config(config.data, "train")
        assert source is not None
        loader.steps_per_epoch(source, config.batch_size)
    except UserError as error:
        raise UserError(f"{error}; or import without training images: --nodata") from error
    return source.identity()


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_recipe(
        "config",
        "The recipe with the sizes of the model: a name or a file. "
        "Examples: --config=mae_vit_b, --config.data.path=photos",
    )
    app.define_workdir("The folder of the run to make.")
    flags.DEFINE_string(
        "format",
        None,
        "The method whose official code wrote the file: latent_mim | pilamim | mae | ijepa | "
        "bootmae | capi | data2vec2. Example: --format=mae",
    )
    flags.DEFINE_multi_string(
        "drop",
        [],
        "A regex on whole names in the file that are left out. Example: --drop='head.*'",
    )
    flags.DEFINE_multi_string(
        "fresh",
        [],
        "A regex on whole official names that the file lacks and that are initialized as in a new "
        "run. Example: --fresh='decoder.*|mask_token'",
    )
    flags.DEFINE_bool("data", True, "The training images of the recipe are here. Example: --nodata")
