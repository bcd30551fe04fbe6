"""Supervised training on the run's own labelled images, for evaluators that train: batches, steps, accuracy.

A *trainer* is an evaluator with the fields batch_size, epochs, warmup_epochs, base_lr, min_lr, scale and seed (see
configs/evaluate.py), and these functions, all but `run` pure:

  run(method, params, data) -> figures                 accuracy(self, method, params, data)
  init(task, params, images, rng) -> (trained, buffers)  `images`: a shape [1, H, W, C]; trained: what has gradients
  optimizer(rate, trained) -> optax transformation     rate: learning rate, function of the step
  loss(task, params, trained, buffers, images, labels, rng, keys) -> (scalar, buffers)
  logits(task, params, trained, buffers, images) -> [B, K]

params are those of the pretraining method and stay as they are. `rng` serves the batch, `keys` [B] the images.
Letters: B batch, K classes.
"""

import dataclasses
import functools
import logging
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmim_jax.distributed import sharding
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration
from lmim_jax.utils.prng import image_keys

log = logging.getLogger(__name__)

LOG_SECONDS = 20.0  # between lines of progress


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned: classes of images, seen through a method. augment: gives training images."""

    method: object
    augment: object
    classes: int


def accuracy(trainer, method, params, data):
    """Train on the labelled training images, then classify the test images.

    The state is split over all devices as that of a run. What the last step leaves counts, not the best epoch.

    Returns:
      {"top1": percent of the test images, and "top5" where there are at least 6 classes}; {} where there are no labels
      or no test images.

    Raises:
      UserError: a batch does not fit the devices or the number of images.
    """
    if not data.classes or data.sources["test"] is None:
        return {}
    name = type(trainer).__module__.split(".")[-1]
    per_epoch = _steps_per_epoch(
        name, trainer.batch_size, len(data.sources["train"]), data.mesh.size
    )
    steps = max(1, round(trainer.epochs * per_epoch))
    augment = dataclasses.replace(
        data.augment, scale=tuple(trainer.scale), image_size=data.augment.eval_size
    )
    task = Task(method, augment, len(data.classes))
    create, step, hits = _programs(trainer, task, data.mesh, steps, per_epoch, data.config.channels)
    state, progress = create(params), _Progress(name, steps, per_epoch, trainer.batch_size)
    for batch in data.training(trainer.batch_size, steps, trainer.seed):
        state, loss = step(state, params, batch)
        progress.add(loss)
    progress.end()
    right, valid = [], []
    for batch in data.batches("test", trainer.batch_size):
        found = jax.device_get(hits(state, params, batch))
        right.append(found["hits"])
        valid.append(found["index"] >= 0)
    right = np.concatenate(right)[np.concatenate(valid)]
    return {
        figure: 100 * float(np.mean(right[:, i]))
        for i, figure in enumerate(("top1", "top5")[: right.shape[1]])
    }


def _steps_per_epoch(name, batch_size, images, devices):
    """floor(images / batch); the remainder of an epoch is dropped."""
    if batch_size % devices or not 0 < batch_size <= images:
        upper = images // devices * devices
        raise UserError(
            f"evaluator {name}: batch_size={batch_size} must be a multiple of the {devices} device(s), and at most the "
            f"{images} training images"
            + (f"; try {min(max(batch_size // devices, 1) * devices, upper)}" * bool(upper))
        )
    return images // batch_size


@functools.lru_cache(maxsize=4)
def _programs(trainer, task, mesh, steps, per_epoch, channels):
    """Jitted (params) -> state, (state, params, batch) -> (state, loss), (state, params, batch) -> hits."""
    peak = trainer.base_lr * trainer.batch_size / 256
    warmup = trainer.warmup_epochs * per_epoch
    rate = schedules.warmup_cosine(0.0, peak, trainer.min_lr, warmup, steps)

    def placed(state):
        return jax.lax.with_sharding_constraint(state, sharding.state_sharding(state, mesh))

    def create(params):
        image = jax.ShapeDtypeStruct((1, *task.augment.image_size, channels), jnp.float32)
        trained, buffers = trainer.init(task, params, image, jax.random.key(trainer.seed))
        trained = jax.tree.map(jnp.copy, trained)  # weights of the run must not be donated
        opt_state = trainer.optimizer(rate, trained).init(trained)
        return placed(
            {
                "step": jnp.zeros((), jnp.int32),
                "trained": trained,
                "buffers": buffers,
                "opt": opt_state,
            }
        )

    def step(state, params, batch):
        positions = jnp.asarray(sharding.batch_positions(mesh, len(batch["label"])))
        rng, keys = image_keys(jax.random.key(trainer.seed), state["step"], positions)
        crop_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        images, trained = task.augment(crop_keys, batch), state["trained"]
        loss = lambda trained: trainer.loss(
            task, params, trained, state["buffers"], images, batch["label"], rng, keys
        )
        (loss, buffers), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, opt_state = trainer.optimizer(rate, trained).update(
            gradients, state["opt"], trained
        )
        trained = optax.apply_updates(trained, updates)
        return placed(
            {"step": state["step"] + 1, "trained": trained, "buffers": buffers, "opt": opt_state}
        ), loss

    def hits(state, params, batch):
        logits = trainer.logits(task, params, state["trained"], state["buffers"], batch["images"])
        best = jax.lax.top_k(logits, 5 if task.classes > 5 else 1)[1] == batch["label"][:, None]
        figures = [best[:, 0], best.any(axis=1)][: 1 + (task.classes > 5)]
        return {"hits": jnp.stack(figures, axis=1), "index": batch["index"]}

    return (
        jax.jit(create),
        jax.jit(step, donate_argnums=0),
        jax.jit(hits, out_shardings=sharding.replicated(mesh)),
    )


class _Progress:
    """Tells of the training now and then; fetches each loss one step late."""

    def __init__(self, name, steps, per_epoch, batch_size):
        self._name, self._steps, self._per_epoch, self._batch = name, steps, per_epoch, batch_size
        self._done, self._pending, self._losses = 0, None, []
        self._began = self._told = None  # the first step compiles

    def add(self, loss):
        """Take the loss (on the device) of the next step."""
        pending, self._pending = self._pending, loss
        if pending is not None:
            self._see(pending)

    def end(self):
        """Wait for the last step."""
        self._see(self._pending)

    def _see(self, loss):
        self._losses.append(float(jax.device_get(loss)))
        self._done += 1
        now = time.perf_counter()
        if self._began is None:
            self._began = self._told = now
        last = self._done == self._steps
        if not last and now - self._told < LOG_SECONDS:
            return
        speed = (self._done - 1) / max(now - self._began, 1e-9)
        mean = float(np.mean(self._losses))
        log.info(
            "%s: step %d/%d  epoch %.1f/%.1f  loss %.4f  %.4g images/s  ETA %s",
            *(
                self._name,
                self._done,
                self._steps,
                self._done / self._per_epoch,
                self._steps / self._per_epoch,
                mean,
            ),
            *(speed * self._batch, duration((self._steps - self._done) / max(speed, 1e-9))),
        )
        if not math.isfinite(mean):
            log.warning(
                "%s: the loss is not finite; its figures mean nothing. Lower its base_lr",
                self._name,
            )
        self._told, self._losses = now, []
