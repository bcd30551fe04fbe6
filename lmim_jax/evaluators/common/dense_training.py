"""Training of heads on maps of patches, with the encoder frozen or trained too.

The base class of evaluators that are trained on images with boxes or masks. Their files say what
the network is, what is learned and what is measured; data, optimizer and steps are here.

Letters: B batch, H W height and width of the input, h w rows and columns of patches, N = h w
patches, D width, I images, T numbers of an image.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lmim_jax.data import loader
from lmim_jax.data.augment.device import KERNELS
from lmim_jax.data.augment.view import Fit
from lmim_jax.data.eval.eval_data import Batch, EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params
from lmim_jax.evaluators.common.probe_training import Length, Progress, check_batch_size
from lmim_jax.models.layer_stack import POLICIES, stochastic_depth, with_remat_and_scan
from lmim_jax.optim import layer_decay, schedules
from lmim_jax.optim.adamw import match_rules
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.prng import image_keys

ZOOM = 2  # of images where no size is given


@dataclasses.dataclass(frozen=True)
class DenseTask:
    """What is learned.

    Attributes:
      method: the pretraining method, which gives the features.
      augment: gives the size of the input, `eval_size`, and how it is normalized.
      classes: number of classes.
      channels: of images.
    """

    method: EvaluatedMethod
    augment: Fit
    classes: int
    channels: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.augment.eval_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the input."""
        height, width = self.size
        return height // self.method.patch_size, width // self.method.patch_size


@dataclasses.dataclass(frozen=True)
class DenseProbe(base.Evaluator, abc.ABC):
    """A network on a map of patches; the fields are explained in configs/evaluate.py."""

    batch_size: int
    feature: str
    frozen: bool
    size: tuple[int, ...]
    epochs: float
    warmup_epochs: float
    total_steps: int
    base_lr: float
    min_lr: float
    weight_decay: float
    b1: float
    b2: float
    layer_decay: float
    drop_path: float
    remat: str
    scale: tuple[float, float]
    flip: bool
    interpolation: str
    seed: int

    takes = "patches"
    trains = True
    cost = 100.0

    @property
    def name(self) -> str:
        """The name of the evaluator, that of its module."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def network(self, task: DenseTask, dtype: Any) -> nn.Module:
        """The network: map of patches [B, h, w, D] -> outputs."""

    @abc.abstractmethod
    def view(self, task: DenseTask, keys: Array, batch: Batch) -> tuple[Array, Any]:
        """Augmented images [B, H, W, C] and what is learned from them."""

    @abc.abstractmethod
    def loss(self, task: DenseTask, outputs: Any, targets: Any) -> Float[Array, ""]:
        """The loss of a batch."""

    def check(self, patch_size: int) -> None:
        """Raise a UserError for options without a meaning."""
        for key, value, choices in (
            ("remat", self.remat, POLICIES),
            ("interpolation", self.interpolation, KERNELS),
        ):
            if value not in choices:
                raise UserError(
                    f"evaluator {self.name}: {key}={value!r} must be one of: {' | '.join(choices)}"
                )
        if self.size and (len(self.size) != 2 or any(side % patch_size for side in self.size)):
            raise UserError(
                f"evaluator {self.name}: size={self.size} must be height and width in pixels, "
                f"multiples of the patch size {patch_size}"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(
                f"evaluator {self.name}: scale={self.scale} must be the lowest and the highest "
                "factor, above 0"
            )

    def fit(self, method: EvaluatedMethod, data: EvaluationData) -> Fit:
        """How images are brought to the size of the input."""
        size = tuple(self.size)
        if not size:
            size = tuple(ZOOM * side for side in data.augment.eval_size)
        if min(size) < 2 * method.patch_size:
            raise UserError(
                f"evaluator {self.name}: size={size} must be at least two patches of "
                f"{method.patch_size} pixels along either axis"
            )
        options = {**vars(data.augment), "eval_size": size, "interpolation": self.interpolation}
        return Fit(**options)

    def length(self, images: int, devices: int) -> Length:
        """The length of training on so many images.

        Raises:
          UserError: the batch size does not fit the devices or the number of images.
        """
        check_batch_size(self.name, self.batch_size, images, devices)
        if self.total_steps:
            return Length(self.total_steps, self.total_steps / self.epochs)
        steps = images // self.batch_size  # the remainder of an epoch is dropped
        return Length(max(1, round(self.epochs * steps)), steps)

    def optimizer(self, trained: Params, length: Length) -> optax.GradientTransformation:
        """AdamW; with the encoder, its learning rate decays from layer to layer."""
        learning_rate = schedules.warmup_cosine(
            0.0,
            self.base_lr * self.batch_size / 256,
            self.min_lr,
            self.warmup_epochs * length.steps_per_epoch,
            length.steps,
        )
        if self.frozen:
            decayed = match_rules(layer_decay.DECAY_RULES, trained, "weight_decay")
            return optax.adamw(
                learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=decayed
            )
        return layer_decay.adamw(
            learning_rate,
            trained,
            b1=self.b1,
            b2=self.b2,
            eps=1e-8,
            weight_decay=self.weight_decay,
            decay=self.layer_decay,
        )

    def patch_map(
        self, task: DenseTask, params: Params, trained: Params, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B N D"]:
        """The feature of each patch, row by row."""

        def encode(weights: Params) -> Array:
            return task.method.features(weights, images)[self.feature]

        if self.frozen:
            return jax.lax.stop_gradient(encode(params))
        encode = with_remat_and_scan(encode, self.remat, scan_layers=False)
        return encode({**params, "encoder": trained["encoder"]})

    def outputs(
        self, task: DenseTask, params: Params, trained: Params, images: Float[Array, "B H W C"]
    ) -> Any:
        """What the network says of normalized images."""
        x = self.patch_map(task, params, trained, images)
        x = x.reshape(len(images), *task.grid, x.shape[-1])
        return self.network(task, x.dtype).apply({"params": trained["head"]}, x)


class DensePrograms(NamedTuple):
    """The jitted functions of training.

    Attributes:
      create: params of the method -> state, {"step", "trained", "opt"}.
      step: (state, params, batch of canvases) -> (state, loss).
    """

    create: Callable[[Params], Params]
    step: Callable[[Params, Params, Batch], tuple[Params, Array]]


@functools.lru_cache(maxsize=4)
def build_programs(probe: DenseProbe, task: DenseTask, mesh: Mesh, length: Length) -> DensePrograms:
    """Build the programs; each is compiled on its first call."""

    def place(state: Params) -> Params:
        return jax.lax.with_sharding_constraint(state, sharding.state_sharding(state, mesh))

    def create(params: Params) -> Params:
        image = jnp.zeros((1, *task.size, task.channels))
        features = jax.eval_shape(task.method.features, params, image)[probe.feature]
        x = jnp.zeros((1, *task.grid, features.shape[-1]), features.dtype)
        network = probe.network(task, features.dtype)
        trained = {"head": network.init(jax.random.key(probe.seed), x)["params"]}
        if not probe.frozen:  # weights of the run must not be donated
            trained["encoder"] = jax.tree.map(jnp.copy, params["encoder"])
        opt = probe.optimizer(trained, length).init(trained)
        return place({"step": jnp.zeros((), jnp.int32), "trained": trained, "opt": opt})

    def step(state: Params, params: Params, batch: Batch) -> tuple[Params, Array]:
        positions = jnp.asarray(sharding.batch_positions(mesh, len(batch["image"])))
        rng, keys = image_keys(jax.random.key(probe.seed), state["step"], positions)
        images, targets = probe.view(task, keys, batch)

        def loss_fn(trained: Params) -> Array:
            with stochastic_depth(rng, 0.0 if probe.frozen else probe.drop_path):
                outputs = probe.outputs(task, params, trained, images)
            return probe.loss(task, outputs, targets)

        loss, gradients = jax.value_and_grad(loss_fn)(state["trained"])
        optimizer = probe.optimizer(state["trained"], length)
        updates, opt = optimizer.update(gradients, state["opt"], state["trained"])
        trained = optax.apply_updates(state["trained"], updates)
        return place({"step": state["step"] + 1, "trained": trained, "opt": opt}), loss

    return DensePrograms(create=jax.jit(create), step=jax.jit(step, donate_argnums=0))


def check_feature(task: DenseTask, params: Params, feature: str) -> None:
    """Raise a UserError unless the method has this feature, with a vector per patch."""
    image = jax.ShapeDtypeStruct((1, *task.size, task.channels), jnp.float32)
    count = task.grid[0] * task.grid[1]
    suitable = []
    for name, value in jax.eval_shape(task.method.features, params, image).items():
        if value.ndim == 3 and value.shape[1] == count:
            suitable.append(name)
    if feature not in suitable:
        raise UserError(
            f"feature={feature!r} has no vector per patch; choices: {', '.join(suitable)}"
        )


def train(
    probe: DenseProbe,
    task: DenseTask,
    params: Params,
    data: EvaluationData,
    targets: Float[np.ndarray, "I T"] | None = None,
) -> Params:
    """What was trained: {"head", and "encoder" unless it is frozen}.

    Args:
      probe: what is trained.
      task: what it learns.
      params: of the pretraining method.
      data: its training images are learned from.
      targets: numbers of each of them, which become part of the batches.
    """
    check_feature(task, params, probe.feature)
    source = data.sources["train"]
    length = probe.length(len(source), data.mesh.size)
    programs = build_programs(probe, task, data.mesh, length)
    state = programs.create(params)
    epoch = max(1, len(source) // probe.batch_size)
    progress = Progress(probe.name, length.steps, epoch, probe.batch_size)
    batches = loader.training_batches(
        source,
        data.config,
        seed=probe.seed,
        batch_size=probe.batch_size,
        steps=length.steps,
        start=0,
        mesh=data.mesh,
        check=data.wait_check,
        targets=targets,
    )
    for batch in batches:
        data.check()
        state, loss = programs.step(state, params, batch)
        progress.add(loss)
    progress.end()
    return state["trained"]
