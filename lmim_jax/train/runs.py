"""Opening a training run or an exported model: its config, its method, its weights, its images.

Weights and images are read when they are first used.
"""

import copy
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmim_jax.data import sources
from lmim_jax.data.augment.device import Augment, published_resize
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.train import checkpoint_manifest, checkpoints, workdir
from lmim_jax.train.state import initial_params
from lmim_jax.utils import array_io, buckets
from lmim_jax.utils.checksum import file_checksum
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"  # of an exported folder, which has no checkpoints
REQUIRED = {"method", "data", "augment", "seed"}  # sections of the config of any run


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a training state.

    Attributes:
      params: float32 tree.
      target: float32 tree of what the EMA tracks; {} where there is no teacher.
      step: optimizer steps done.
      checkpoint: SHA-256 of the manifest of the checkpoint they were read from, which in turn
        contains those of all its files; of an exported model, that of its file; "" for weights
        from elsewhere.
    """

    params: Any
    target: Any
    step: int
    checkpoint: str = ""

    def placed_on(self, mesh: Mesh) -> "Weights":
        """The same weights, replicated on all devices of a mesh."""
        trees = (self.params, self.target)
        params, target = jax.device_put(trees, sharding.replicated(mesh))
        return dataclasses.replace(self, params=params, target=target)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training run, or a model exported with `lmim export --format=flax`.

    Attributes:
      folder: of the run or of the exported model.
      config: as it was trained with.
      method: without schedules; see methods/base.py.
      exported: of an exported model, which weights it holds, "online" or "target"; None for a run.
      loaded: weights that are in memory already; None: the newest good ones of the folder.
      opened: images that are open already; None: those of `config.data`.
      modalities: those that it was restricted to, see modality_subset.py; (): all.
    """

    folder: buckets.Path
    config: ConfigDict
    method: Any
    exported: str | None = None
    loaded: Weights | None = None
    opened: EvaluationData | None = None
    modalities: tuple[str, ...] = ()

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights, as numpy arrays, read on first use.

        Raises:
          UserError: nothing was saved yet, or no checkpoint is good.
        """
        if self.loaded is not None:
            return self.loaded
        if self.exported:
            return _read_exported(self.folder, self.method)
        step = checkpoints.newest_step(self.folder)
        checksum = checkpoint_manifest.checksum(checkpoint_manifest.steps(self.folder)[step])
        params, target = checkpoints.read_weights(self.folder, self.method, step)
        return Weights(params, target, step, checksum)

    @property
    def params(self) -> Any:
        """The online weights (of an exported model: the exported ones)."""
        return self.weights.params

    @property
    def target(self) -> Any:
        """The teacher's weights; {} where there are none."""
        return self.weights.target

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.weights.step

    @functools.cached_property
    def has_target(self) -> bool:
        """Whether there is a target encoder beside the online one."""
        abstract = jax.eval_shape(self.method.init, jax.random.key(0))
        return not self.exported and "encoder" in self.method.target_of(abstract)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices."""
        return sharding.make_mesh()

    @functools.cached_property
    def placed_weights(self) -> Weights:
        """The weights, on all devices."""
        return self.weights.placed_on(self.mesh)

    def initial_weights(self, mesh: Mesh) -> Weights:
        """The weights before training, on all devices of a mesh."""

        def init() -> tuple[Any, Any]:
            params = initial_params(self.method, self.config.seed)
            return params, self.method.target_of(params)

        params, target = jax.jit(init, out_shardings=sharding.replicated(mesh))()
        return Weights(params, target, 0)

    @functools.cached_property
    def data(self) -> EvaluationData:
        """The images of the run, on all devices.

        Raises:
          UserError: they do not exist.
        """
        if self.opened is not None:
            return self.opened
        return self.open_images(self.config.data, self.mesh)

    @functools.cached_property
    def augmentation(self) -> Augment:
        """The augmentation of the run; its `evaluation` prepares images for the encoder."""
        return Augment.from_config(
            self.config.augment,
            image_size=self.method.image_size,
            eval_size=self.method.feature_size,
        )

    def open_images(
        self,
        data_config: ConfigDict,
        mesh: Mesh,
        listings: sources.Listings | None = None,
        **options: Any,
    ) -> EvaluationData:
        """Open images for evaluation: unaugmented, at the size that the encoder was trained on.

        Args:
          data_config: like `config.data`, such as that of the run itself.
          mesh: where batches are placed.
          listings: see `sources.open_folder`.
          **options: of `EvaluationData`.

        Raises:
          UserError: they do not exist.
        """
        splits = sources.open_splits(data_config, listings)
        return EvaluationData(splits, data_config, self.augmentation, mesh, **options)

    def data_config(self, defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> ConfigDict:
        """The data options of the run.

        Args:
          defaults: all data options, for those that did not exist when the run was made.
          changes: {option: value}, instead of those of the run.
        """
        options = dict(defaults)
        for key, value in self.config.data.items():
            if key in defaults:
                options[key] = value
        return ConfigDict({**options, **changes})

    def choose_weights(self, wanted: str | None) -> str:
        """Which weights to use, "online" or "target".

        Args:
          wanted: either, or None: the choice of the recipe, `config.representation.weights`; of an
            exported model, those that it holds.

        Raises:
          UserError: an exported model holds the other ones.
        """
        if self.exported:
            if wanted not in (None, self.exported):
                raise UserError(
                    f"{self.folder} holds the {self.exported} weights; for others, export the run "
                    "again"
                )
            return self.exported
        return wanted or self.config.representation.weights

    def encoder_params(self, which: str) -> Any:
        """The parameters for `method.features`.

        Args:
          which: "online", or "target": with the teacher's weights in place of the online ones.

        Raises:
          UserError: it is something else, or there is no teacher's encoder.
        """
        if which not in ("online", "target"):
            raise UserError(f"weights {which!r} must be one of: online | target")
        if self.exported or which == "online":  # in an exported folder, they are chosen already
            return self.params
        if "encoder" not in self.target:
            raise UserError(
                f"{self.folder}: this run has no target encoder; use the online weights"
            )
        return {**self.params, **self.target}

    def placed_encoder(self, which: str) -> Any:
        """`encoder_params`, on all devices."""
        return jax.device_put(self.encoder_params(which), sharding.replicated(self.mesh))


def open_run(folder: buckets.Pathname, images: str | os.PathLike[str] = "") -> Run:
    """Open a run with its newest good checkpoint, or an exported model.

    Args:
      folder: the --workdir of a run, or a folder made by `lmim export --format=flax`.
      images: where the images of the run are now; "": where they were (`config.data.path`).

    Raises:
      UserError: it is neither.
    """
    folder = buckets.path(folder)
    config = read_config(folder)
    exported = config.pop("exported", None)
    config = with_tuples(config)
    config.data.path = str(images) or config.data.path
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    _mend_resize(config.augment, min(method.feature_size))
    return Run(folder, config, method, exported=exported["weights"] if exported else None)


def _mend_resize(augment: ConfigDict, smallest: int) -> None:
    """Replace an `eval_resize` below the crop of test images, which older versions accepted."""
    if augment.eval_resize < smallest:
        mended = published_resize((smallest, smallest))
        log.warning(
            "this run has config.augment.eval_resize=%d, less than its images of %d pixels: %d is "
            "used instead",
            augment.eval_resize,
            smallest,
            mended,
        )
        augment.eval_resize = mended


def _read_exported(folder: buckets.Path, method: Any) -> Weights:
    """The weights of an exported model; its file lacks networks without parameters."""
    with buckets.local_file(folder / WEIGHTS_FILE) as file:
        arrays, _ = array_io.read(file)
        checksum = file_checksum(file)
    step = read_config(folder)["exported"]["step"]
    abstract = jax.eval_shape(method.init, jax.random.key(0))
    every = flatten_dict(abstract, keep_empty_nodes=True, sep="/")
    empty = {name: node for name, node in every.items() if node is empty_node}
    return Weights(unflatten_dict(empty | arrays, sep="/"), {}, step, checksum)


def read_config(folder: buckets.Pathname) -> dict[str, Any]:
    """The config.json of a run, of plain values; options that it lacks are those of `FORMER`.

    Raises:
      UserError: there is none, or it is not that of a run.
    """
    path = buckets.path(folder, "config.json")
    try:
        config = json.loads(path.read_text())
        missing = sorted(REQUIRED - config.keys())
        if missing:
            raise KeyError(*missing)
        _complete(config)
    except buckets.BucketUnreachable:
        raise
    except FileNotFoundError as error:
        problem = buckets.problem(path.parent)
        if problem:
            raise UserError(problem) from error
        raise UserError(
            f"{folder} is not a run: it has no config.json; give the --workdir of one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as the config of a run ({type(error).__name__}: {error})"
        ) from error
    return config


def _complete(config: dict[str, Any]) -> None:
    """Give the config of a run what it did before there were options for it, in place."""
    for name, value in workdir.FORMER.items():
        section, _, option = name.rpartition(".")
        options = config.setdefault(section, {}) if section else config
        if section == "method" and not methods.has_option(options["name"], option):
            continue
        options.setdefault(option, copy.copy(value))
    config.setdefault("representation", _former_representation(config["evaluators"]))


def _former_representation(sections: dict[str, Any]) -> dict[str, str]:
    """The weights and features that the evaluators of a run measured before it had a choice."""
    found = {"weights": "online", "image": "patches_prenorm", "patches": "patches_prenorm"}
    for title in ("neighbors", "knn"):
        section = sections.get(title, {})
        found["weights"] = section.get("params", found["weights"])
        found["image"] = section.get("feature", found["image"])
    for title in ("pictures", "visualization"):
        found["patches"] = sections.get(title, {}).get("feature", found["patches"])
    return found


def with_tuples(value: Any) -> Any:
    """A ConfigDict of what JSON returned: dicts become ConfigDicts, and lists become tuples."""
    if isinstance(value, dict):
        return ConfigDict({key: with_tuples(x) for key, x in value.items()})
    if isinstance(value, list):
        return tuple(with_tuples(x) for x in value)
    return value


def flatten_params(tree: Any) -> dict[str, Any]:
    """{path with slashes: array}."""
    return flatten_dict(tree, sep="/")
