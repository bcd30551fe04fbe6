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
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from lmim_jax.data.augment.device import KERNELS, Augment
from lmim_jax.data.eval.eval_data import Batch, EvaluationData, only_labeled, targets_of
from lmim_jax.data.label_file import CLASSES, MULTILABEL, REGRESSION
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results, is_possible
from lmim_jax.evaluators.common import outcome
from lmim_jax.evaluators.common.outcome import Answers
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration
from lmim_jax.utils.prng import image_keys

log = logging.getLogger(__name__)

LOG_SECONDS = 5.0  # between lines of progress

Schedule = Callable[[Array], Array]
Rate = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a probe learns.

    Attributes:
      method: the pretraining method, which gives the features.
      augment: the augmentation of training images.
      classes: number of classes, or of labels.
      kind: of labels, see data/label_file.py.
      mean: of each label of kind regression, over the training images; else ().
      deviation: of each label, likewise.
    """

    method: EvaluatedMethod
    augment: Augment
    classes: int
    kind: str = CLASSES
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def standardized(self, labels: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
        """Labels as they are learned."""
        if not self.mean:
            return labels
        return (labels - jnp.asarray(self.mean)[None]) / jnp.asarray(self.deviation)[None]

    def answers(self, outputs: Float[Array, "B K"]) -> Float[Array, "B K"]:
        """Probabilities, or numbers in their own unit, from what `logits` returns."""
        if self.mean:
            outputs = outputs * jnp.asarray(self.deviation)[None] + jnp.asarray(self.mean)[None]
        return outcome.activate(self.kind, outputs)


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
      labels: their classes, or labels, as `Task.standardized` returns them.
      rng: random key for what is drawn once per batch.
      keys: random keys for what is drawn per image.
    """

    images: Float[Array, "B H W C"]
    labels: Shaped[Array, "B ..."]
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
    total_steps: int
    base_lr: Any
    min_lr: float
    weight_decay: Any
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: str
    seed: int

    needs_labels = True
    label_kinds: ClassVar[tuple[str, ...]] = (CLASSES, MULTILABEL, REGRESSION)
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
    def optimizer(
        self, learning_rate: Schedule, weight_decay: Rate, trained: Params
    ) -> optax.GradientTransformation:
        """The optimizer of the trained parameters; the learning rate is a function of the step."""

    def learning_rate(self, base_lr: Rate, length: "Length") -> Schedule:
        """The learning rate as a function of the step: a line from 0, then half a cosine.

        Args:
          base_lr: the peak for a batch of 256 images; it grows with the batch.
          length: of training.
        """
        return schedules.warmup_cosine(
            0.0,
            base_lr * self.batch_size / 256,
            self.min_lr,
            self.warmup_epochs * length.steps_per_epoch,
            length.steps,
        )

    def augmentation(self, augment: Augment) -> Augment:
        """The augmentation of training images.

        Args:
          augment: that of the run, which gives sizes and normalization.
        """
        return dataclasses.replace(
            augment,
            scale=self.scale,
            ratio=self.ratio,
            flip=self.flip,
            interpolation=self.interpolation,
            image_size=augment.eval_size,
        )

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
          percent of the most frequent class of the test images; "top1_NAME" of additional test
          images}; for labels that are no classes, see `target_metrics`; {} if labels have no
          meaning.

        Raises:
          UserError: the batch size does not fit the devices or the number of images, or the probe
            diverged.
        """
        if not is_possible(self, data):
            return {}
        data = self.prepare(data)
        length = self.length(data)
        task = task_of(method, self.augmentation(data.augment), data)
        programs = build_programs(self, task, data.mesh, length, data.config.channels)
        state = train(self, programs, params, data, length)
        return self.test(task, programs, params, state, data)

    def prepare(self, data: EvaluationData) -> EvaluationData:
        """The labeled images, resampled as this probe does, for training and for the test.

        Raises:
          UserError: unknown interpolation.
        """
        if self.interpolation not in KERNELS:
            raise UserError(
                f"evaluator {self.name}: interpolation={self.interpolation!r} must be one of: "
                f"{' | '.join(KERNELS)}"
            )
        if data.augment.interpolation != self.interpolation:
            augment = dataclasses.replace(data.augment, interpolation=self.interpolation)
            data = data.with_augment(augment)
        return only_labeled(data)

    def length(self, data: EvaluationData) -> "Length":
        """The length of training on some images.

        Raises:
          UserError: the batch size does not fit the devices or the number of images.
        """
        images = len(data.sources["train"])
        check_batch_size(self.name, self.batch_size, images, data.mesh.size)
        if self.total_steps:
            return Length(self.total_steps, self.total_steps / self.epochs)
        steps_per_epoch = images // self.batch_size  # the remainder of an epoch is dropped
        return Length(max(1, round(self.epochs * steps_per_epoch)), steps_per_epoch)

    def test(
        self,
        task: Task,
        programs: "Programs",
        params: Params,
        state: Params,
        data: EvaluationData,
    ) -> Results:
        """The metrics of the test images, see `run`."""
        targets = data.targets
        answers = self._answer(programs, params, state, data, "test")
        results: Results = {}
        results.update(outcome.measure(task.kind, answers))
        values = targets.values if targets else None
        results.update(outcome.baselines(task.kind, answers, values))
        for name, accepted in data.accepted.items():
            found = self._answer(programs, params, state, data, name)
            results[f"top1_{name}"] = accepted.accuracy(found.indices, found.predicted[:, 0])
        if data.keep:
            names = targets.names if targets else data.classes
            weights = outcome.fetch({name: state[name] for name in ("trained", "buffers")})
            statistics = {"mean": task.mean, "deviation": task.deviation}
            data.keep(outcome.Outcome(self, task.kind, names, answers, weights, statistics))
        return results

    def outputs(
        self, task: Task, params: Params, weights: Params, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Probabilities or numbers, by stored weights.

        Args:
          task: as it was learned.
          params: of the method; of a fine-tuned classifier, only their shapes count.
          weights: those of the outcome, as a tree.
          images: normalized images.
        """
        found = Weights(params, weights["trained"], weights.get("buffers", {}))
        return task.answers(self.logits(task, found, images))

    def _answer(
        self, programs: "Programs", params: Params, state: Params, data: EvaluationData, split: str
    ) -> Answers:
        """The answers for the labeled images of a split.

        Raises:
          UserError: logits are not finite.
        """
        targets = targets_of(data.sources[split])
        parts = []
        for batch in data.batches(split, self.batch_size):
            found = jax.device_get(programs.score(state, params, batch))
            counted = found["index"] >= 0
            if targets is None:
                counted = counted & (found["label"] >= 0)
            if not found["finite"][counted].all():
                raise UserError(
                    f"{self.name}: its outputs are not finite, so that nothing can be measured; "
                    "lower its base_lr"
                )
            parts.append({name: column[counted] for name, column in found.items()})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        truth = columns["label"]
        if targets:
            truth = targets.values[columns["index"]]
        return Answers(columns["index"], truth, columns["predicted"], columns.get("probability"))


def task_of(method: EvaluatedMethod, augment: Augment, data: EvaluationData) -> Task:
    """What is learned from the training images."""
    targets = data.targets
    if targets is None:
        return Task(method, augment, len(data.classes))
    mean, deviation = outcome.standardization(targets.kind, targets.values)
    return Task(method, augment, len(targets.names), targets.kind, mean, deviation)


def train(
    probe: Probe, programs: Any, params: Params, data: EvaluationData, length: "Length"
) -> Params:
    """The state after training.

    Args:
      probe: the probe.
      programs: its `create` and `step`, see `Programs`; losses may be those of several heads.
      params: of the pretraining method.
      data: the images.
      length: of training.
    """
    state = programs.create(params)
    epoch = max(1, len(data.sources["train"]) // probe.batch_size)
    progress = Progress(probe.name, length.steps, epoch, probe.batch_size)
    for batch in data.training(probe.batch_size, length.steps, probe.seed):
        state, loss = programs.step(state, params, batch)
        progress.add(loss)
    progress.end()
    return state


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


class Length(NamedTuple):
    """The length of training.

    Attributes:
      steps: optimizer steps in all.
      steps_per_epoch: steps of what schedules call an epoch.
    """

    steps: int
    steps_per_epoch: float


class Programs(NamedTuple):
    """The jitted functions of a probe.

    Attributes:
      create: (params of the method) -> state.
      step: (state, params, batch of canvases) -> (state, loss).
      score: (state, params, batch of test images) -> {"predicted" and, for classes,
        "probability": see `outcome.Answers`, with 5 classes of more than 5, else with one;
        "finite": bool [B], whether the logits are; "index" and "label": as in the batch}.
    """

    create: Callable[[Params], Params]
    step: Callable[[Params, Params, Batch], tuple[Params, Array]]
    score: Callable[[Params, Params, Batch], Batch]


class Rates(NamedTuple):
    """What probes that are trained together differ in: learning rate per 256 images, decay."""

    base_lr: Rate
    weight_decay: Rate


def create_head(
    probe: Probe, rates: Rates, task: Task, params: Params, length: Length, channels: int
) -> Params:
    """What is trained, before training: {"trained", "buffers", "opt"}.

    Args:
      probe: the probe; its learning rate and weight decay are not used.
      rates: these.
      task: what it learns.
      params: of the pretraining method.
      length: of training.
      channels: of images.
    """
    image = jax.ShapeDtypeStruct((1, *task.augment.image_size, channels), jnp.float32)
    trained, buffers = probe.init(task, params, image, jax.random.key(probe.seed))
    trained = jax.tree.map(jnp.copy, trained)  # weights of the run must not be donated
    learning_rate = probe.learning_rate(rates.base_lr, length)
    optimizer = probe.optimizer(learning_rate, rates.weight_decay, trained)
    return {"trained": trained, "buffers": buffers, "opt": optimizer.init(trained)}


def train_head(
    probe: Probe,
    rates: Rates,
    task: Task,
    params: Params,
    length: Length,
    head: Params,
    batch: TrainingBatch,
) -> tuple[Params, Float[Array, ""]]:
    """What `create_head` returns after a step, and the loss; the other arguments are as there."""
    trained = head["trained"]

    def loss_fn(trained: Params) -> tuple[Array, Params]:
        return probe.loss(task, Weights(params, trained, head["buffers"]), batch)

    (loss, buffers), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    learning_rate = probe.learning_rate(rates.base_lr, length)
    optimizer = probe.optimizer(learning_rate, rates.weight_decay, trained)
    updates, opt_state = optimizer.update(gradients, head["opt"], trained)
    trained = optax.apply_updates(trained, updates)
    return {"trained": trained, "buffers": buffers, "opt": opt_state}, loss


def augmented_batch(
    probe: Probe, task: Task, mesh: Mesh, step: Array, batch: Batch
) -> TrainingBatch:
    """The batch of a step, augmented."""
    positions = jnp.asarray(sharding.batch_positions(mesh, len(batch["label"])))
    rng, keys = image_keys(jax.random.key(probe.seed), step, positions)
    crop_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    images = task.augment(crop_keys, batch)
    labels = batch["label"] if task.kind == CLASSES else batch["target"]
    return TrainingBatch(images, task.standardized(labels), rng, keys)


@functools.lru_cache(maxsize=4)
def build_programs(probe: Probe, task: Task, mesh: Mesh, length: Length, channels: int) -> Programs:
    """Build the programs of a probe; each is compiled on its first call."""
    rates = Rates(probe.base_lr, probe.weight_decay)

    def place(state: Params) -> Params:
        return jax.lax.with_sharding_constraint(state, sharding.state_sharding(state, mesh))

    def create(params: Params) -> Params:
        head = create_head(probe, rates, task, params, length, channels)
        return place({"step": jnp.zeros((), jnp.int32), **head})

    def step(state: Params, params: Params, batch: Batch) -> tuple[Params, Array]:
        training_batch = augmented_batch(probe, task, mesh, state["step"], batch)
        head, loss = train_head(probe, rates, task, params, length, state, training_batch)
        return place({"step": state["step"] + 1, **head}), loss

    def score(state: Params, params: Params, batch: Batch) -> Batch:
        weights = Weights(params, state["trained"], state["buffers"])
        logits = probe.logits(task, weights, batch["images"])
        top = outcome.TOP_K if task.classes > outcome.TOP_K else 1
        return {
            **outcome.summarize(task.kind, task.answers(logits), top),
            "finite": jnp.isfinite(logits).all(axis=1),
            "index": batch["index"],
            "label": batch["label"],
        }

    return Programs(
        create=jax.jit(create),
        step=jax.jit(step, donate_argnums=0),
        score=jax.jit(score, out_shardings=sharding.replicated(mesh)),
    )


class Progress:
    """Logs the progress of training from time to time; fetches each loss one step late.

    Of several heads, the smallest loss counts.
    """

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
        losses = np.asarray(jax.device_get(loss), np.float32)
        finite = losses[np.isfinite(losses)]
        self._losses.append(float(finite.min()) if finite.size else math.nan)
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
