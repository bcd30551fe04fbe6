"""A recipe that trains in seconds: 4 x 4 patches of 4 pixels, 16 wide, 1 deep."""

import jax

from lmim_jax.configs import evaluate, small, vit_b
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.train import workdir
from lmim_jax.train.build import build
from lmim_jax.train.checkpoints import Checkpoints

SIZES = dict(
    grid=(4, 4), patch_size=4, gap=1, width=16, depth=1, heads=2, num_visible=4, projector_depth=1
)
SIZES |= dict(
    decoder_width=8, decoder_depth=1, decoder_heads=2, projector_width=24, latent_decoder_width=12
)
SIZES |= dict(context_capacity=8, min_context=1, mask_batch=2, dtype="float32")
SIZES |= dict(block_total=8, block_smallest=2, block_largest=4)
SIZES |= dict(decoder_groups=8, target_start=0)

CHOSEN = {  # instead of what the recipe `own` chooses, for a run of a moment
    "total_steps": 2,
    "batch_size": 8,
    "micro_batches": 1,
    "gauge_images": 8,
    "method.grid": "(4,4)",
    "method.patch_size": 4,
    "method.gap": 1,
    "method.num_visible": 4,
    "method.width": 16,
    "method.depth": 1,
    "method.heads": 2,
    "method.decoder_width": 8,
    "method.decoder_depth": 1,
    "method.decoder_heads": 2,
    "method.projector_width": 16,
    "augment.eval_resize": 16,
}
EVALUATORS = {  # what is smaller than in configs/evaluate.py
    "logistic_regression": dict(batch_size=16, l2=(1e-3, 1e-1), iterations=50),
    "neighbors": dict(batch_size=16, images=2, count=2),
    "fewshot": dict(batch_size=16, shots=(1, 4), percent=(50,), draws=2, iterations=50),
    "linear_probe": dict(batch_size=16, epochs=1.0, warmup_epochs=0.5),
    "attentive_probe": dict(batch_size=16, epochs=1.0, warmup_epochs=0.5),
    "finetune": dict(batch_size=16, epochs=1.0, warmup_epochs=0.5),
}

EVALUATED = {  # what `lmim evaluate` writes of its model and its images
    "run": "RUN",
    "step": 3,
    "checkpoint": 64 * "a",
    "weights": {"a": "online"},
    "classes": 4,
    "images": {"train": 4096, "test": 16},
}


def get_config():
    """vit_b, shrunk; data.path is to be given."""
    config = vit_b.get_config()
    config.batch_size = 8
    config.epochs = 2
    config.data.update(canvas=40, threads=1)
    config.augment.eval_resize = 16
    _shrink(config.method)
    config.optimizer.update(base_lr=0.03, warmup_epochs=0.5)
    config.evaluators.knn.update(every=1.0, batch_size=16, k=(5,))
    config.evaluators.visualization.update(every=2.0, images=2)
    del config.evaluators.neighbors
    config.update(log_every=2, checkpoint_every=3, gauge_images=16)
    return config


def evaluator(name):
    """The config section of any evaluator, shrunk."""
    sections = {**evaluate.get_config(), **vit_b.evaluators(), **get_config().evaluators}
    section = {**sections[name], **EVALUATORS.get(name, {})}
    base.fill_in({name: section}, vit_b.representation())
    return section


def method(name):
    """The config section of any method, shrunk: that of its small twin in configs/small.py."""
    section = small.get_config(f"{name},shapes").method
    _shrink(section)
    return section


def _shrink(section):
    """Give a method's config section the sizes above, as far as it has such keys."""
    section.update({key: value for key, value in SIZES.items() if key in section})


def run(config, folder):
    """Make `folder` a run of `config` with its fresh state as the checkpoint of step 0."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])  # quicker than eight
    parts = build(config, steps_per_epoch=1)
    state, _ = parts.create_state(mesh)
    with Checkpoints(folder, parts.config) as checkpoints:
        checkpoints.save(state, 0)
    workdir.claim(folder, parts.config.to_dict(), None)
    return folder
