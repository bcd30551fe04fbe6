"""Trains the encoder of a recipe with labels, as an upper bound for a dataset.

    lmim supervised-baseline --config=quickstart
    lmim supervised-baseline --config=quickstart --epochs=12 --config.seed=1 --out=baseline.json

Trains the encoder and a linear layer on the mean of its patch features by cross-entropy, with the
crops and the data of the recipe, and prints the accuracy on the test images. Weights are not saved.
"""

import functools
import json
import logging
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from lmim_jax.cli import app
from lmim_jax.data import inventory, loader, modalities, pixel_range, sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import EvaluationData, only_labeled
from lmim_jax.distributed import multihost, sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.evaluators.common.classifiers import majority
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.methods import base as methods
from lmim_jax.methods.base import Method
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console
from lmim_jax.utils.prng import image_keys

RECIPES: dict[str, str | None] = {"config": "quickstart"}
WEIGHT_DECAY = 0.05
B2 = 0.95  # of AdamW

log = logging.getLogger(__name__)


class Classifier:
    """An encoder with a linear layer on the mean of its patch features, and its training step."""

    def __init__(
        self,
        method: Method,
        classes: int,
        optimizer: optax.GradientTransformation,
        augmentation: Augment,
        seed: int,
    ) -> None:
        """Store the parts.

        Args:
          method: whose encoder is trained.
          classes: how many there are.
          optimizer: an optax transformation.
          augmentation: crops images to `method.feature_size`.
          seed: of weights and crops.
        """
        self.method = method
        self.optimizer = optimizer
        self.augmentation = augmentation
        self.seed = seed
        self._head = nn.Dense(classes)

    def logits(self, params: Any, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Scores of the K classes."""
        patches = self.method.features(params, images)["patches"]
        return self._head.apply({"params": params["head"]}, patches.mean(axis=1))

    @functools.partial(jax.jit, static_argnums=0)
    def init(self) -> tuple[Any, Any]:
        """Fresh parameters and state of the optimizer."""
        rng = jax.random.key(self.seed)
        params = self.method.init(rng)
        params["head"] = self._head.init(rng, jnp.zeros((1, self.method.width)))["params"]
        return params, self.optimizer.init(params)

    @functools.partial(jax.jit, static_argnums=0)
    def step(
        self, params: Any, opt_state: Any, step: Int[Array, ""], batch: dict[str, Array]
    ) -> tuple[Any, Any, Float[Array, ""]]:
        """One optimizer step.

        Args:
          params: of the encoder and the linear layer.
          opt_state: of the optimizer.
          step: number of the step.
          batch: canvases and labels, see `loader.training_batches`.

        Returns:
          (params, opt_state, cross-entropy before the step).
        """
        rows = jnp.arange(len(batch["image"]))
        _, keys = image_keys(jax.random.key(self.seed), step, rows)
        images = self.augmentation(keys, batch)

        def loss(params: Any) -> Float[Array, ""]:
            logits = self.logits(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    @functools.partial(jax.jit, static_argnums=0)
    def predict(self, params: Any, images: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """`logits`, jitted."""
        return self.logits(params, images)


def train(config: ConfigDict, epochs: int, learning_rate: float) -> dict[str, Any]:
    """Train the encoder of a recipe with labels.

    Args:
      config: the recipe.
      epochs: passes over the training images.
      learning_rate: the peak of the one-cycle schedule.

    Returns:
      {"accuracy" on the test images, that of always answering their most "frequent_class", both in
      percent; "losses": the last cross-entropy of each epoch}.

    Raises:
      UserError: accuracies on this dataset would have no meaning, or training diverged.
    """
    mesh = sharding.make_mesh()
    listings: sources.Listings = {}
    splits = sources.open_splits(config.data, listings)
    for line in inventory.describe_config(config.data, splits, listings, "--config.data"):
        log.info("%s", line)
    source = splits["train"]
    ranges, lines = pixel_range.resolve_all(config.data, source)
    pixel_range.set_ranges(config.data, ranges)
    for line in lines:
        log.info("%s", line)
    problem = evaluators.labels_problem(source.classes, splits)
    if problem:
        raise UserError(f"nothing can be measured: {problem}")
    method = methods.from_config(
        modalities.method_options(config), total_steps=1, steps_per_epoch=1
    )  # only encodes
    # Crops as in training, at the size of evaluation: whole images, no gap between patches
    augmentation = Augment.from_config(
        config.augment, image_size=method.feature_size, eval_size=method.feature_size
    )
    data = only_labeled(EvaluationData(splits, config.data, augmentation, mesh))
    source = data.sources["train"]
    per_epoch = loader.steps_per_epoch(source, config.batch_size)
    steps = epochs * per_epoch
    schedule = optax.cosine_onecycle_schedule(steps, learning_rate)
    optimizer = optax.adamw(schedule, b2=B2, weight_decay=WEIGHT_DECAY)
    classifier = Classifier(method, len(data.classes), optimizer, augmentation, config.seed)
    params, losses = _fit(classifier, source, config, epochs, per_epoch, mesh)
    accuracy, frequent = _accuracy(classifier, params, data, config.batch_size)
    return {"accuracy": accuracy, "frequent_class": frequent, "losses": losses}


def _fit(
    classifier: Classifier,
    source: sources.Source,
    config: ConfigDict,
    epochs: int,
    per_epoch: int,
    mesh: Mesh,
) -> tuple[Any, list[float]]:
    """Train, with a line of the log per epoch; the parameters and the last loss of each epoch."""
    steps = epochs * per_epoch
    losses = []
    params, opt_state = classifier.init()
    batches = loader.training_batches(
        source,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=steps,
        start=0,
        mesh=mesh,
    )
    start = time.perf_counter()
    for i, batch in enumerate(batches):
        params, opt_state, loss = classifier.step(params, opt_state, jnp.int32(i), batch)
        done = i + 1
        if done % per_epoch == 0:
            losses.append(float(loss))
            left = (time.perf_counter() - start) / done * (steps - done)
            log.info(
                "epoch %d/%d  loss %.4f  ETA %s", len(losses), epochs, losses[-1], duration(left)
            )
    return params, losses


def _accuracy(
    classifier: Classifier, params: Any, data: EvaluationData, batch_size: int
) -> tuple[float, float]:
    """The accuracy on the test images, and that of their most frequent class, in percent."""
    correct = []
    labels = []
    for batch in data.batches("test", batch_size):
        logits = np.asarray(classifier.predict(params, batch["images"]))
        label = np.asarray(batch["label"])
        counted = (np.asarray(batch["index"]) >= 0) & (label >= 0)
        check_finite(logits[counted], params, batch["images"])
        correct.append((logits.argmax(axis=-1) == label)[counted])
        labels.append(label[counted])
    return 100 * float(np.concatenate(correct).mean()), majority(np.concatenate(labels))


def main(arguments: list[str]) -> None:
    """Train and print the accuracy."""
    app.no_arguments(arguments, "--epochs=20")
    app.keep_freed_memory()
    log_to_console()
    given = flags.FLAGS
    found = train(given.config, given.epochs, given.learning_rate)
    log.info(
        "trained with labels: %.1f %% of the test images are classified correctly (%.1f %% are of "
        "the most frequent class)",
        found["accuracy"],
        found["frequent_class"],
    )
    if given.out:
        record = {
            "epochs": given.epochs,
            "learning_rate": given.learning_rate,
            "seed": given.config.seed,
            **found,
            "device": jax.devices()[0].device_kind,
            "versions": multihost.versions(),
        }
        atomic_io.write(given.out, json.dumps(record, indent=2) + "\n")


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_recipe(
        "config",
        "The recipe: a name or a file. Examples: --config=quickstart, --config.batch_size=64",
    )
    flags.DEFINE_integer("epochs", 20, "Epochs of supervised training. Example: --epochs=12")
    flags.DEFINE_float(
        "learning_rate",
        1e-3,
        "Peak of the one-cycle learning rate. Example: --learning_rate=5e-4",
    )
    flags.DEFINE_string(
        "out", None, "A JSON file for the accuracy and the losses. Example: --out=baseline.json"
    )
