"""Latent MIM on the synthetic dataset `shapes`, in minutes on a laptop CPU; downloads nothing.

    lmim train --config=quickstart --workdir=RUN

It is the default recipe of `lmim train` and `./launch/local.sh`.
"""

from ml_collections import ConfigDict

from lmim_jax.configs import evaluate, vit_b


def get_config() -> ConfigDict:
    """vit_b and its differences."""
    config = vit_b.get_config()
    config.batch_size = 128
    config.micro_batches = 4  # the working set fits a CPU's cache: 1.4 times as fast
    config.epochs = 12
    config.data.update(source="shapes", canvas=64)
    config.augment.eval_resize = 64
    config.method.update(
        grid=(8, 8), patch_size=8, gap=2, width=96, depth=4, heads=4, num_visible=10
    )
    config.method.update(
        decoder_width=64, decoder_depth=2, decoder_heads=4, projector_width=256, dtype="float32"
    )
    # On flat shapes, 0.75 adds a constant to all latents
    config.method.update(similarity_start=0.5, similarity_end=0.0)
    config.optimizer.update(base_lr=4e-3, warmup_epochs=1.0)
    config.evaluators.logistic_regression = evaluate.get_config().logistic_regression
    config.evaluators.logistic_regression.update(every=4.0, batch_size=64, baselines=True)
    # Fewer than usual, for speed: weak ones for features, and strong ones for raw pixels
    config.evaluators.logistic_regression.update(l2=(1e-6, 1e-5, 1e-4, 1.0, 10.0), iterations=150)
    config.evaluators.knn.update(every=4.0, batch_size=64, baselines=True)
    config.evaluators.visualization.every = 4.0
    config.update(log_every=64, checkpoint_every=256, gauge_images=256)
    return config
