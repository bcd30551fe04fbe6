"""Fine-tuning as MAE's: all weights of the encoder are trained with labels, under strong regularisation.

Mean of the patch tokens before the final norm, a norm of its own, a linear layer. RandAugment, random erasing, mixup
or cutmix, smooth labels, stochastic depth; AdamW with learning rates that fall by layer.
Source: MAE, appendix A; official `main_finetune.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from lmim_jax.data.augment import mixup as mixing
from lmim_jax.data.augment.randaugment import randaugment
from lmim_jax.evaluators.common import probe_layers, probe_training
from lmim_jax.models import normalization
from lmim_jax.models.layer_stack import POLICIES, stochastic_depth
from lmim_jax.optim import layer_decay
from lmim_jax.utils.errors import UserError

FEATURE = "patches_prenorm"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A trainer, see supervised.py; the fields are explained in configs/evaluate.py."""

    batch_size: int
    epochs: float
    warmup_epochs: float
    base_lr: float
    min_lr: float
    layer_decay: float
    b1: float
    b2: float
    weight_decay: float
    drop_path: float
    randaugment: tuple[int, float, float]
    erasing: float
    mixup: float
    cutmix: float
    switch: float
    label_smoothing: float
    scale: tuple[float, float]
    remat: str
    seed: int

    def run(self, method, params, data):
        """{"top1", "top5"} in percent; {} where there are no labels or no test images."""
        if self.remat not in POLICIES:
            raise UserError(
                f"evaluator finetune: remat={self.remat!r} is none of: {' | '.join(POLICIES)}"
            )
        if self.batch_size % (2 * data.mesh.size) and (self.mixup or self.cutmix):
            raise UserError(
                f"evaluator finetune: batch_size={self.batch_size}: every device mixes pairs of images"
            )
        return probe_training.accuracy(self, method, params, data)

    def init(self, task, params, images, rng):
        """The pretrained encoder; norm and linear layer."""
        width = jax.eval_shape(lambda x: task.method.features(params, x)[FEATURE], images).shape[-1]
        return {
            "encoder": params["encoder"],
            "fc_norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "head": probe_layers.linear_init(rng, width, task.classes, 2e-5),
        }, {}

    def optimizer(self, rate, trained):
        """AdamW with falling learning rates."""
        constants = dict(
            b1=self.b1, b2=self.b2, eps=1e-8, weight_decay=self.weight_decay, decay=self.layer_decay
        )
        return layer_decay.adamw(rate, trained, **constants)

    def loss(self, task, params, trained, buffers, images, labels, rng, keys):
        """Cross-entropy with mixed, smooth targets."""
        images = self._disturbed(task.augment, images, keys)
        targets = mixing.smooth(labels, task.classes, self.label_smoothing)
        mix_key, depth_key = jax.random.split(rng)
        images, targets = mixing.mix(mix_key, images, targets, self.mixup, self.cutmix, self.switch)

        def logits(trained):
            with stochastic_depth(depth_key, self.drop_path):
                return self.logits(task, params, trained, buffers, images)

        if self.remat != "none":
            logits = jax.checkpoint(logits, policy=POLICIES[self.remat])
        return optax.softmax_cross_entropy(logits(trained), targets).mean(), buffers

    def logits(self, task, params, trained, buffers, images):
        """[B, K]."""
        del buffers
        x = task.method.features({**params, "encoder": trained["encoder"]}, images)[FEATURE]
        x = normalization.standardize_tokens(probe_layers.pooled(x), 1e-6)
        x = x * trained["fc_norm"]["scale"][None] + trained["fc_norm"]["bias"][None]
        return probe_layers.linear(trained["head"], x)

    def _disturbed(self, augment, images, keys):
        """RandAugment, on levels, and random erasing of normalised images [B, H, W, C]."""

        def one(key, image):
            color_key, erase_key = jax.random.split(key)
            if self.randaugment[0]:
                fill = jnp.round(255 * jnp.asarray(augment.mean, jnp.float32))
                image = augment.normalize(
                    randaugment(color_key, augment.levels(image), fill, *self.randaugment)
                )
            return mixing.erase(erase_key, image, self.erasing) if self.erasing else image

        return jax.vmap(one)(keys, images)
