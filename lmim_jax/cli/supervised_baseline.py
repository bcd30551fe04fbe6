"""The ceiling of a dataset: what the encoder of a recipe reaches when it is trained *with* labels.

    lmim supervised-baseline --config=configs/quickstart.py [--epochs=20] [--config.KEY=VALUE ...]

Trains the recipe's encoder and a linear layer on the mean of its patch features, by cross-entropy, with the recipe's
crops and data, and prints the accuracy on the test images. Nothing is saved.
"""

import logging
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags

from lmim_jax.data import loader, sources
from lmim_jax.data.augment import device
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console
from lmim_jax.utils.prng import image_keys

log = logging.getLogger("lmim_jax.cli.supervised_baseline")

RECIPES: dict[str, str | None] = {"config": "quickstart"}


def train(config, epochs, learning_rate):
    """Accuracy on the test images, in percent, of the recipe's encoder trained with labels."""
    mesh = sharding.make_mesh()
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    if not source["train"].classes or source["test"] is None:
        raise UserError(
            "this dataset has no labels, or no test images: it has no ceiling to measure"
        )
    per_epoch = loader.steps_per_epoch(source["train"], config.batch_size)
    steps = epochs * per_epoch
    method = methods.from_config(config.method, total_steps=steps, steps_per_epoch=per_epoch)
    # Crops as in training, at the size of evaluation: whole images, without the gap between patches
    augmentation = device.from_config(
        config.augment, image_size=method.feature_size, eval_size=method.feature_size
    )
    head = nn.Dense(len(source["train"].classes))
    optimizer = optax.adamw(
        optax.cosine_onecycle_schedule(steps, learning_rate), b2=0.95, weight_decay=0.05
    )

    def logits(params, images):
        patches = method.features(params, images)["patches"]
        return head.apply({"params": params["head"]}, patches.mean(axis=1))

    @jax.jit
    def init(rng):
        params = method.init(rng)
        params["head"] = head.init(rng, jnp.zeros((1, method.width)))["params"]
        return params, optimizer.init(params)

    @jax.jit
    def step(params, opt_state, i, batch):
        _, keys = image_keys(jax.random.key(config.seed), i, jnp.arange(len(batch["image"])))
        images = augmentation(keys, batch)

        def loss(params):
            entropy = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images), batch["label"]
            )
            return entropy.mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state = init(jax.random.key(config.seed))
    batches = loader.training_batches(
        source["train"],
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=steps,
        start=0,
        mesh=mesh,
    )
    began = time.perf_counter()
    for i, batch in enumerate(batches):
        params, opt_state, value = step(params, opt_state, jnp.int32(i), batch)
        if (i + 1) % per_epoch == 0:
            left = (time.perf_counter() - began) / (i + 1) * (steps - i - 1)
            log.info(
                "epoch %d/%d  loss %.4f  ETA %s",
                (i + 1) // per_epoch,
                epochs,
                value,
                duration(left),
            )

    data = EvaluationData(source, config.data, augmentation, mesh)
    predict = jax.jit(lambda params, images: logits(params, images).argmax(axis=-1))
    right = [
        (np.asarray(predict(params, batch["images"])) == batch["label"])[
            np.asarray(batch["index"]) >= 0
        ]
        for batch in data.batches("test", config.batch_size)
    ]
    return 100 * float(np.concatenate(right).mean())


def main(arguments):
    """Run the command."""
    log_to_console()
    accuracy = train(flags.FLAGS.config, flags.FLAGS.epochs, flags.FLAGS.learning_rate)
    log.info("trained with labels: %.1f %% of the test images are classified right", accuracy)


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe; default: configs/quickstart.py.", lock_config=True
    )
    flags.DEFINE_integer("epochs", 20, "Epochs of supervised training.")
    flags.DEFINE_float("learning_rate", 1e-3, "Peak of the one-cycle learning rate.")
