"""Latent MIM on a folder of your own images, with settings that are chosen for them.

    lmim train DIR
    lmim train DIR --hours=2 --config.batch_size=64 --workdir=RUN

The same as --config=own --config.data.path=DIR. What follows are the values before anything is
chosen. lmim_jax/perf/choices.py looks at the images and the machine, and chooses splits,
resolution, encoder, precision, batch size, micro-batches, epochs, and how often to log and to
evaluate. It prints every choice with the option that changes it. Options on the command line are
kept. All values are stored in the run, which resumes with them.
"""

from typing import Any

from ml_collections import ConfigDict

from lmim_jax.configs import evaluate, vit_b, vit_s, vit_ti

# Options of the method that make up the size of an encoder with its decoder and projector
SIZE_KEYS = (
    *("width", "depth", "heads"),
    *("decoder_width", "decoder_depth", "decoder_heads", "projector_width"),
)


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.hours = 0.0  # of training, for which epochs are chosen; 0: minutes on CPUs, else 1
    config.report = True
    config.batch_size = 128
    config.epochs = 100
    config.data.update(held_out=0.1, canvas=160)
    config.augment.eval_resize = 73
    config.method.update(grid=(8, 8), patch_size=8, gap=2, num_visible=10, dtype="float32")
    config.method.update(sizes()["mini"]["method"])
    config.optimizer.update(base_lr=sizes()["mini"]["base_lr"], warmup_epochs=10.0)
    section = evaluate.get_config().logistic_regression
    section.update(every=50.0, batch_size=64, baselines=True, iterations=150)
    config.evaluators.logistic_regression = section
    config.evaluators.knn.update(every=50.0, batch_size=64, baselines=True)
    config.evaluators.visualization.every = 50.0
    config.evaluators.neighbors.update(images=8)
    config.update(log_every=50, checkpoint_every=500, gauge_images=256)
    return config


def sizes() -> dict[str, dict[str, Any]]:
    """{name: {"method": options, "base_lr": learning rate per 256 images}}, small to large.

    Learning rates fall with the width. That of vit_b is the paper's; those of mini were tried on
    small images; those between them were not.
    """
    mini = dict(width=96, depth=4, heads=4)
    mini |= dict(decoder_width=64, decoder_depth=2, decoder_heads=4, projector_width=256)
    found: dict[str, dict[str, Any]] = {"mini": {"method": mini, "base_lr": 4e-3}}
    rates = {"ti": (vit_ti, 1e-3), "s": (vit_s, 5e-4), "b": (vit_b, 1.5e-4)}
    for name, (recipe, base_lr) in rates.items():
        method = recipe.get_config().method
        options = {key: method[key] for key in SIZE_KEYS}
        found[name] = {"method": options, "base_lr": base_lr}
    return found
