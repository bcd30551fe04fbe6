"""Fine-tuning: all weights of the encoder are trained with labels, with strong regularization.

The mean of the patch tokens before the final norm, a norm of its own, and a linear layer.
RandAugment, random erasing, mixup or cutmix, label smoothing, stochastic depth; AdamW with
layer-wise learning rate decay.

Source: MAE (He et al. 2022), appendix A; official `main_finetune.py`.

Letters: B batch, H W image height and width, C channels, D width, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmim_jax.data.augment import mixup as mixing
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.augment.randaugment import randaugment
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.label_file import CLASSES
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import probe_layers
from lmim_jax.evaluators.common.probe_training import (
    Probe,
    Rate,
    Schedule,
    Task,
    TrainingBatch,
    Weights,
)
from lmim_jax.models import normalization
from lmim_jax.models.layer_stack import POLICIES, stochastic_depth, with_remat_and_scan
from lmim_jax.optim import layer_decay
from lmim_jax.utils.errors import UserError

FEATURE = "patches_prenorm"
DEVIATION = 2e-5  # of the initial weights of the linear layer
EPSILON = 1e-6  # of the norm


@dataclasses.dataclass(frozen=True)
class Evaluator(Probe):
    """Fine-tuning; the fields are explained in configs/evaluate.py."""

    layer_decay: float
    b1: float
    b2: float
    drop_path: float
    randaugment: tuple[int, float, float]
    erasing: float
    mixup: float
    cutmix: float
    switch: float
    label_smoothing: float
    remat: str

    cost = 100.0

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Check the fields that depend on each other, then see `Probe.run`."""
        if self.remat not in POLICIES:
            raise UserError(
                f"evaluator {self.name}: remat={self.remat!r} must be one of: "
                f"{' | '.join(POLICIES)}"
            )
        mixes_images = bool(self.mixup or self.cutmix)
        if mixes_images and self.batch_size % (2 * data.mesh.size):
            raise UserError(
                f"evaluator {self.name}: batch_size={self.batch_size} must be a multiple of "
                f"{2 * data.mesh.size}: every device mixes pairs of images"
            )
        return super().run(method, params, data)

    def init(
        self, task: Task, pretrained: Params, image: jax.ShapeDtypeStruct, rng: Array
    ) -> tuple[Params, Params]:
        """The pretrained encoder, a norm and a linear layer; no buffers."""

        def encode(images: Array) -> Array:
            return task.method.features(pretrained, images)[FEATURE]

        width = jax.eval_shape(encode, image).shape[-1]
        trained = {
            "encoder": pretrained["encoder"],
            "fc_norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "head": probe_layers.linear_init(rng, width, task.classes, DEVIATION),
        }
        return trained, {}

    def optimizer(
        self, learning_rate: Schedule, weight_decay: Rate, trained: Params
    ) -> optax.GradientTransformation:
        """AdamW with layer-wise learning rate decay."""
        return layer_decay.adamw(
            learning_rate,
            trained,
            b1=self.b1,
            b2=self.b2,
            eps=1e-8,
            weight_decay=weight_decay,
            decay=self.layer_decay,
        )

    def loss(
        self, task: Task, weights: Weights, batch: TrainingBatch
    ) -> tuple[Float[Array, ""], Params]:
        """The loss with mixed targets; for classes, smoothed ones."""
        images = self._augment_colors_and_erase(task.augment, batch.images, batch.keys)
        targets = batch.labels
        if task.kind == CLASSES:
            targets = mixing.smooth_labels(batch.labels, task.classes, self.label_smoothing)
        mix_key, depth_key = jax.random.split(batch.rng)
        images, targets = mixing.mix_batch(
            mix_key, images, targets, self.mixup, self.cutmix, self.switch
        )

        compute_logits = with_remat_and_scan(self.logits, self.remat, scan_layers=False)
        with stochastic_depth(depth_key, self.drop_path):
            logits = compute_logits(task, weights, images)
        if task.kind == CLASSES:
            return optax.softmax_cross_entropy(logits, targets).mean(), weights.buffers
        return probe_layers.supervised_loss(task.kind, logits, targets), weights.buffers

    def logits(
        self, task: Task, weights: Weights, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Logits of test images."""
        trained = weights.trained
        params = {**weights.pretrained, "encoder": trained["encoder"]}
        x = task.method.features(params, images)[FEATURE]
        x = probe_layers.mean_over_patches(x)
        x = normalization.standardize_tokens(x, EPSILON)
        x = x * trained["fc_norm"]["scale"][None] + trained["fc_norm"]["bias"][None]
        return probe_layers.linear(trained["head"], x)

    def _augment_colors_and_erase(
        self, augment: Augment, images: Float[Array, "B H W C"], keys: Array
    ) -> Float[Array, "B H W C"]:
        """RandAugment, which works on levels, and random erasing of normalized images."""
        operations, magnitude, deviation = self.randaugment

        def augment_one(key: Array, image: Array) -> Array:
            color_key, erase_key = jax.random.split(key)
            if operations:
                fill = jnp.round(255 * jnp.asarray(augment.mean, jnp.float32))
                levels = randaugment(
                    color_key, augment.denormalize(image), fill, operations, magnitude, deviation
                )
                image = augment.normalize(levels)
            if self.erasing:
                image = mixing.random_erase(erase_key, image, self.erasing)
            return image

        return jax.vmap(augment_one)(keys, images)
