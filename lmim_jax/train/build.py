"""The parts of a training run that do not depend on its data: method, augmentation, optimizer.

Training and the ahead-of-time tools (planning, benchmarks) build them in the same way.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lmim_jax.data import modalities
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.augment.host import HostCrop, make_host_crop
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.train import extension, frozen_teacher, state, step
from lmim_jax.utils.errors import UserError, did_you_mean
from lmim_jax.utils.prng import augment_keys

DERIVED = ("frozen", "modalities")  # of config.method: stored, see `complete`, but not given
LEAST = {  # options -> their least value
    "micro_batches": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "checkpoint_keep": 0,
    "checkpoint_minutes": 0,
    "checkpoint_max_failures": 1,
    "gauge_images": 0,
    "data.canvas": 1,
    "data.channels": 1,
    "data.threads": 0,
    "data.workers": -1,
    "data.max_bad_fraction": 0,
    "method.patch_size": 1,
    "method.width": 1,
    "method.depth": 1,
    "method.heads": 1,
    "optimizer.base_lr": 0,
    "optimizer.warmup_epochs": 0,
    "optimizer.weight_decay": 0,
    "optimizer.floor": 0,
    "optimizer.warmup_start": 0,
    "optimizer.cosine_share": 0,
    "method.mask_ratio": 0,
    "method.prediction_ratio": 0,
    "method.drop_path": 0,
}
SHARES = (  # of something: at most 1
    "data.max_bad_fraction",
    "optimizer.floor",
    "optimizer.warmup_start",
    "optimizer.cosine_share",
    "method.mask_ratio",
    "method.prediction_ratio",
    "method.drop_path",
)
NONFINITE_CHOICES = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class TrainingParts:
    """What a recipe consists of.

    Attributes:
      config: the recipe, see configs/vit_b.py and `complete`.
      steps_per_epoch: optimizer steps in an epoch.
      total_steps: length of the run.
      method: see methods/base.py.
      augmentation: of training images, (keys [B], batch) -> images [B, H, W, C].
      optimizer: with its schedules.
      learning_rate: as a function of the step.
      host_crop: crops training images on the host; None where the augmentation does it on the
        device (`config.data.resize_on`).
    """

    config: ConfigDict
    steps_per_epoch: int
    total_steps: int
    method: Any
    augmentation: Augment
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any]
    host_crop: HostCrop | None

    def abstract_state(self) -> state.TrainState:
        """The shapes and dtypes of the state."""

        def init() -> state.TrainState:
            return state.init_state(self.method, self.optimizer, jax.random.key(0))

        return jax.eval_shape(init)

    def state_sharding(self, mesh: Mesh | AbstractMesh) -> Any:
        """The shardings of the state, a tree like it."""
        options = self.config.mesh
        return sharding.state_sharding(
            self.abstract_state(), mesh, rules=options.rules, min_size=options.min_size
        )

    def abstract_batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a batch of `size` images, as the data loader returns it."""
        data = self.config.data
        shapes = {"label": jax.ShapeDtypeStruct((size,), "int32")}
        if data.resize_on == "host":
            height, width = self.method.image_size
            crops = (size, height, width, data.channels)
            shapes["image"] = jax.ShapeDtypeStruct(crops, "uint8")
        else:
            canvases = (size, data.canvas, data.canvas, data.channels)
            shapes["image"] = jax.ShapeDtypeStruct(canvases, "uint8")
            shapes["size"] = jax.ShapeDtypeStruct((size, 2), "int32")
        return shapes

    def batch_bytes(self, size: int) -> int:
        """Bytes of a batch of `size` images in host memory."""
        arrays = self.abstract_batch(size).values()
        return sum(array.size * array.dtype.itemsize for array in arrays)

    def create_state(self, mesh: Mesh) -> tuple[state.TrainState, Any]:
        """A fresh state on the devices, and its shardings; see `state.jit_init`."""
        init, shardings = self.jit_init(mesh)
        return init(), shardings

    def jit_init(self, mesh: Mesh) -> tuple[Any, Any]:
        """The jitted function that makes a fresh state, and its shardings; see `state.jit_init`."""
        return state.jit_init(
            self.method,
            self.optimizer,
            self.config.seed,
            mesh,
            rules=self.config.mesh.rules,
            min_size=self.config.mesh.min_size,
        )

    def jit_train_step(self, mesh: Mesh, shardings: Any) -> Any:
        """The jitted train step, with the state donated; see `step.jit_train_step`."""
        return step.jit_train_step(
            self.config, self.method, self.augmentation, self.optimizer, mesh, shardings
        )

    def schedule_evaluators(self) -> list[evaluators.Scheduled]:
        """The evaluators of `config.evaluators`.

        Raises:
          UserError: see `evaluators.base.from_config`.
        """
        abstract = jax.eval_shape(self.method.init, jax.random.key(0))
        return evaluators.from_config(
            self.config.evaluators,
            steps_per_epoch=self.steps_per_epoch,
            has_target="encoder" in self.method.target_of(abstract),
        )


def complete(
    config: ConfigDict,
    method: Any,
    augmentation: Augment,
    frozen: dict[str, Any] | None = None,
) -> ConfigDict:
    """A copy of a recipe with the numbers that its unset options stand for, to be stored.

    Args:
      config: the recipe, in which options that follow the grid may be None, and the weights and
        features of evaluators may be empty.
      method: built from it.
      augmentation: built from it.
      frozen: `config.method` of the frozen teacher, see frozen_teacher.py.
    """
    config = config.copy_and_resolve_references()
    for key in method.SHARES:
        config.method[key] = getattr(method, key)
    with config.unlocked():
        if frozen:
            config.method.frozen = frozen
        if method.modalities:
            config.method.modalities = tuple(map(tuple, method.modalities))
    config.augment.eval_resize = augmentation.eval_resize
    evaluators.fill_in(config.evaluators, config.representation)
    return config


def check_numbers(config: ConfigDict) -> None:
    """Raise a UserError for a number of a recipe that has no meaning, such as a patch of 0 pixels.

    Args:
      config: see configs/vit_b.py.
    """
    for key, least in LEAST.items():
        section, _, name = key.rpartition(".")
        options = config[section] if section else config
        value = options.get(name)
        if value is not None and value < least:
            raise UserError(f"config.{key}={value} must be at least {least}")
        if value is not None and key in SHARES and value > 1:
            raise UserError(f"config.{key}={value} is a share: it must be at most 1")
    for key in ("method.grid", "augment.scale"):
        section, _, name = key.partition(".")
        values = config[section].get(name)
        if values is not None and not all(value > 0 for value in values):
            raise UserError(f"config.{key}={values} must be numbers above 0")
    for title, section in config.evaluators.items():
        if title != evaluators.STRICT and min(section.get("k", (1,)), default=0) < 1:
            raise UserError(f"config.evaluators.{title}.k={section['k']} must be numbers above 0")


def _check_best(config: ConfigDict) -> None:
    """Raise a UserError if `config.checkpoint_best` is a metric of no evaluator."""
    title, slash, _ = config.checkpoint_best.partition("/")
    titles = [name for name in config.evaluators if name != evaluators.STRICT]
    if slash and title not in titles:
        raise UserError(
            f"config.checkpoint_best={config.checkpoint_best!r}: config.evaluators has no {title!r}"
            f"{did_you_mean(title, titles)}"
        )


def build(config: ConfigDict, steps_per_epoch: int) -> TrainingParts:
    """Build the parts of a recipe.

    Args:
      config: see configs/vit_b.py.
      steps_per_epoch: optimizer steps in an epoch, floor(training images / batch size).

    Raises:
      UserError: the config has an invalid value.
    """
    if config.on_nonfinite not in NONFINITE_CHOICES:
        raise UserError(
            f"config.on_nonfinite={config.on_nonfinite!r} must be one of: "
            f"{' | '.join(NONFINITE_CHOICES)}"
        )
    _check_best(config)
    check_numbers(config)
    if config.method.channels != config.data.channels:
        raise UserError(
            f"config.method.channels={config.method.channels} must equal config.data.channels="
            f"{config.data.channels}, which it follows: set that one alone"
        )
    total_steps = config.total_steps or config.epochs * steps_per_epoch
    if total_steps < 1:
        raise UserError(
            f"config.epochs={config.epochs} and config.total_steps={config.total_steps or 0} are "
            "no length of a run: give one above 0, such as --config.epochs=100"
        )
    span = extension.span(config, total_steps)
    frozen = frozen_teacher.method_of(config)
    method = methods.from_config(
        {**modalities.method_options(config), "frozen": frozen},
        total_steps=span.steps,
        steps_per_epoch=steps_per_epoch,
    )
    method_class = methods.method_class(config.method.name)
    if config.micro_batches > 1 and method_class.needs_whole_batch(config.method):
        raise UserError(
            f"config.micro_batches={config.micro_batches}: {config.method.name} compares the "
            "images of a whole batch, which gradient accumulation would divide: give 1; to save "
            "memory, --config.remat=full, --config.mesh.fsdp=-1 or a smaller --config.batch_size"
        )
    augmentation = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    if len(augmentation.mean) != method.channels:
        raise UserError(
            f"config.augment.mean and std have {len(augmentation.mean)} numbers; with "
            f"config.data.channels={method.channels} they need {method.channels}, which lmim "
            f"prepare --folder=IMAGES --statistics --channels={method.channels} computes"
        )
    optimizer, learning_rate = adamw.from_config(
        config.optimizer,
        warmup_steps=span.warmup_steps,
        total_steps=span.steps,
        steps_per_epoch=span.steps_per_epoch,
        start=span.start,
    )
    crop_keys = functools.partial(augment_keys, config.seed)
    return TrainingParts(
        config=complete(config, method, augmentation, frozen),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        method=method,
        augmentation=augmentation,
        optimizer=optimizer,
        learning_rate=learning_rate,
        host_crop=make_host_crop(config.data, augmentation, crop_keys),
    )
