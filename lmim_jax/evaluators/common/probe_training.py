"""Supervised training on the labeled images of a run: the base class of evaluators that train.

A probe is trained on augmented training images and then classifies the test images. Its file says
what is trained (`init`, `optimizer`, `loss`, `logits`); data, steps and accuracies are here.

Letters: B batch, H W image height and width, C channels, K classes.
"""

import abc
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import Batch, EvaluationData, only_labeled
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results, has_labels
from lmim_jax.evaluators.common.classifiers import majority
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration
from lmim_jax.utils.prng import image_keys

log = logging.getLogger(__name__)

LOG_SECONDS = 5.0  # between lines of progress
TOP_K = 5  # of the second accuracy, where there are more classes

Schedule = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a probe learns.

    Attributes:
      method: the pretraining method, which gives the features.
      augment: the augmentation of training images.
      classes: number of classes.
    """

    method: EvaluatedMethod
    augment: Augment
    classes: int


class Weights(NamedTuple):
    """All weights of a probe.

    Attributes:
      pretrained: parameters of the pretraining method, which are not changed.
      trained: parameters that have gradients.
      buffers: running statistics and the like, which `loss` updates.
    """

    pretrained: Params
    trained: Params
    buffers: Params


class TrainingBatch(NamedTuple):
    """A batch of augmented training images.

    Attributes:
      images: normalized images.
      labels: their classes.
      rng: random key for what is drawn once per batch.
      keys: random keys for what is drawn per image.
    """

    images: Float[Array, "B H W C"]
    labels: Int[Array, " B"]
    rng: Array
    keys: Array


@dataclasses.dataclass(frozen=True)
class Probe(base.Evaluator, abc.ABC):
    """An evaluator that trains; the fields are explained in configs/evaluate.py.

    `init`, `optimizer`, `loss` and `logits` are pure functions.
    """

    batch_size: int
    epochs: float
    warmup_epochs: float
    base_lr: float
    min_lr: float
    weight_decay: float
    scale: tuple[float, float]
    seed: int

    needs_labels = True
    trains = True
    cost = 50.0

    @property
    def name(self) -> str:
        """The name of the evaluator, that of its module."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def init(
        self, task: Task, pretrained: Params, image: jax.ShapeDtypeStruct, rng: Array
    ) -> tuple[Params, Params]:
        """The initial (trained, buffers); `image` is the shape [1, H, W, C] of one image."""

    @abc.abstractmethod
    def optimizer(self, learning_rate: Schedule, trained: Params) -> optax.GradientTransformation:
        """The optimizer of the trained parameters; the learning rate is a function of the step."""

    @abc.abstractmethod
    def loss(
        self, task: Task, weights: Weights, batch: TrainingBatch
    ) -> tuple[Float[Array, ""], Params]:
        """The loss, and the buffers after the batch."""

    @abc.abstractmethod
    def logits(
        self, task: Task, weights: Weights, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Logits of test images."""

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Train on the training images, then classify the test images.

        The state is sharded like that of a training run. The accuracy is the one after the last
        step, not that of the best epoch.

        Returns:
          {"top1": percent of the test images, "top5" with at least 6 classes, and "majority":
          percent of the most frequent class of the test images}; {} if labels have no meaning.

        Raises:
          UserError: the batch size does not fit the devices or the number of images, or the probe
            diverged.
        """
        if not has_labels(data):
            return {}
        data = only_labeled(data)
        images = len(data.sources["train"])
        check_batch_size(self.name, self.batch_size, images, data.mesh.size)
        steps_per_epoch = images // self.batch_size  # the remainder of an epoch is dropped
        steps = max(1, round(self.epochs * steps_per_epoch))
        augment = dataclasses.replace(
            data.augment, scale=self.scale, image_size=data.augment.eval_size
        )
        task = Task(method, augment, len(data.classes))
        programs = build_programs(
            self, task, data.mesh, steps, steps_per_epoch, data.config.channels
        )
        state = self._train(programs, params, data, steps, steps_per_epoch)
        correct, labels = self._classify(programs, params, state, data)
        accuracies: Results = {}
        for name, column in zip(("top1", "top5"), correct.T, strict=False):
            accuracies[name] = 100 * float(np.mean(column))
        accuracies["majority"] = majority(labels)
        return accuracies

    def _train(
        self,
        programs: "Programs",
        params: Params,
        data: EvaluationData,
        steps: int,
        steps_per_epoch: int,
    ) -> Params:
        """The state after training."""
        state = programs.create(params)
        progress = _Progress(self.name, steps, steps_per_epoch, self.batch_size)
        for batch in data.training(self.batch_size, steps, self.seed):
            state, loss = programs.step(state, params, batch)
            progress.add(loss)
        progress.end()
        return state

    def _classify(
        self, programs: "Programs", params: Params, state: Params, data: EvaluationData
    ) -> tuple[Bool[np.ndarray, "Q n"], Int[np.ndarray, " Q"]]:
        """Whether test images are classified correctly, see `Programs.score`; and their classes.

        Raises:
          UserError: logits are not finite.
        """
        correct = []
        labels = []
        for batch in data.batches("test", self.batch_size):
            found = jax.device_get(programs.score(state, params, batch))
            counted = (found["index"] >= 0) & (found["label"] >= 0)
            if not found["finite"][counted].all():
                raise UserError(
                    f"{self.name}: its outputs are not finite, so that nothing can be measured; "
                    "lower its base_lr"
                )
            correct.append(found["correct"][counted])
            labels.append(found["label"][counted])
        return np.concatenate(correct), np.concatenate(labels)


def check_batch_size(name: str, batch_size: int, images: int, devices: int) -> None:
    """Raise a UserError unless the batch divides over the devices and there are enough images."""
    if batch_size % devices == 0 and 0 < batch_size <= images:
        return
    message = (
        f"evaluator {name}: batch_size={batch_size} must be a multiple of the {devices} "
        f"device(s), and at most the {images} training images"
    )
    largest = images // devices * devices
    if largest:
        nearest = max(batch_size // devices, 1) * devices
        message += f"; try {min(nearest, largest)}"
    raise UserError(message)


class Programs(NamedTuple):
    """The jitted functions of a probe.

    Attributes:
      create: (params of the method) -> state.
      step: (state, params, batch of canvases) -> (state, loss).
      score: (state, params, batch of test images) -> {"correct": bool [B, 1 or 2], whether the
        true class has the largest logit, and with more than 5 classes whether it is among the
        largest 5; "finite": bool [B], whether the logits are; "index" and "label": as in the
        batch}.
    """

    create: Callable[[Params], Params]
    step: Callable[[Params, Params, Batch], tuple[Params, Array]]
    score: Callable[[Params, Params, Batch], Batch]


@functools.lru_cache(maxsize=4)
def build_programs(
    probe: Probe, task: Task, mesh: Mesh, steps: int, steps_per_epoch: int, channels: int
) -> Programs:
    """Build the programs of a probe; each is compiled on its first call."""
    learning_rate = schedules.warmup_cosine(
        0.0,
        probe.base_lr * probe.batch_size / 256,
        probe.min_lr,
        probe.warmup_epochs * steps_per_epoch,
        steps,
    )

    def place(state: Params) -> Params:
        return jax.lax.with_sharding_constraint(state, sharding.state_sharding(state, mesh))

    def create(params: Params) -> Params:
        image = jax.ShapeDtypeStruct((1, *task.augment.image_size, channels), jnp.float32)
        trained, buffers = probe.init(task, params, image, jax.random.key(probe.seed))
        trained = jax.tree.map(jnp.copy, trained)  # weights of the run must not be donated
        state = {
            "step": jnp.zeros((), jnp.int32),
            "trained": trained,
            "buffers": buffers,
            "opt": probe.optimizer(learning_rate, trained).init(trained),
        }
        return place(state)

    def step(state: Params, params: Params, batch: Batch) -> tuple[Params, Array]:
        positions = jnp.asarray(sharding.batch_positions(mesh, len(batch["label"])))
        rng, keys = image_keys(jax.random.key(probe.seed), state["step"], positions)
        crop_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        images = task.augment(crop_keys, batch)
        training_batch = TrainingBatch(images, batch["label"], rng, keys)

        def loss_fn(trained: Params) -> tuple[Array, Params]:
            weights = Weights(params, trained, state["buffers"])
            return probe.loss(task, weights, training_batch)

        trained = state["trained"]
        (loss, buffers), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        optimizer = probe.optimizer(learning_rate, trained)
        updates, opt_state = optimizer.update(gradients, state["opt"], trained)
        new_state = {
            "step": state["step"] + 1,
            "trained": optax.apply_updates(trained, updates),
            "buffers": buffers,
            "opt": opt_state,
        }
        return place(new_state), loss

    def score(state: Params, params: Params, batch: Batch) -> Batch:
        weights = Weights(params, state["trained"], state["buffers"])
        logits = probe.logits(task, weights, batch["images"])
        has_top_5 = task.classes > TOP_K
        _, largest = jax.lax.top_k(logits, TOP_K if has_top_5 else 1)
        correct = largest == batch["label"][:, None]
        columns = [correct[:, 0]]
        if has_top_5:
            columns.append(correct.any(axis=1))
        return {
            "correct": jnp.stack(columns, axis=1),
            "finite": jnp.isfinite(logits).all(axis=1),
            "index": batch["index"],
            "label": batch["label"],
        }

    return Programs(
        create=jax.jit(create),
        step=jax.jit(step, donate_argnums=0),
        score=jax.jit(score, out_shardings=sharding.replicated(mesh)),
    )


class _Progress:
    """Logs the progress of training from time to time; fetches each loss one step late."""

    def __init__(self, name: str, steps: int, steps_per_epoch: int, batch_size: int) -> None:
        self._name = name
        self._steps = steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._done = 0
        self._pending: Any = None
        self._losses: list[float] = []
        # Set after the first step, which compiles
        self._start_time: float | None = None
        self._log_time = 0.0

    def add(self, loss: Array) -> None:
        """Add the loss (on the device) of the next step."""
        pending = self._pending
        self._pending = loss
        if pending is not None:
            self._fetch(pending)

    def end(self) -> None:
        """Wait for the last step."""
        self._fetch(self._pending)

    def _fetch(self, loss: Array) -> None:
        self._losses.append(float(jax.device_get(loss)))
        self._done += 1
        now = time.perf_counter()
        if self._start_time is None:
            self._start_time = now
            self._log_time = now
        if self._done == self._steps or now - self._log_time >= LOG_SECONDS:
            self._log(now - self._start_time)
            self._log_time = now
            self._losses = []

    def _log(self, seconds: float) -> None:
        steps_per_second = (self._done - 1) / max(seconds, 1e-9)
        remaining = (self._steps - self._done) / max(steps_per_second, 1e-9)
        mean_loss = float(np.mean(self._losses))
        log.info(
            "%s: step %d/%d  epoch %.1f/%.1f  loss %.4f  %.4g images/s  ETA %s",
            self._name,
            self._done,
            self._steps,
            self._done / self._steps_per_epoch,
            self._steps / self._steps_per_epoch,
            mean_loss,
            steps_per_second * self._batch_size,
            duration(remaining),
        )
        if not math.isfinite(mean_loss):
            log.warning(
                "%s: the loss is not finite; lower its base_lr",
                self._name,
            )
