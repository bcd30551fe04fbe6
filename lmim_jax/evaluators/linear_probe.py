"""Linear probe: batch normalization without parameters and a linear layer on a frozen feature.

Trained with LARS on random crops and flips. Fields with several values are chosen on held-out
training images, see common/probe_grid.py.

Sources: MAE (He et al. 2022), appendix A; official `main_linprobe.py`. I-JEPA (Assran et al. 2023),
appendix A.2: several features, with and without batch normalization, and a learning rate that falls
in steps.

Letters: B batch, H W image height and width, C channels, D width, K classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from lmim_jax.data.augment.device import CROP_TRIES, Augment, SingleTry
from lmim_jax.data.label_file import CLASSES, MULTILABEL
from lmim_jax.evaluators.base import Params
from lmim_jax.evaluators.common import image_features, probe_layers
from lmim_jax.evaluators.common.probe_grid import GridProbe, as_choices
from lmim_jax.evaluators.common.probe_training import (
    Length,
    Rate,
    Schedule,
    Task,
    TrainingBatch,
    Weights,
)
from lmim_jax.optim import schedules
from lmim_jax.optim.lars import lars
from lmim_jax.utils.errors import UserError

EPSILON = 1e-6
DEVIATION = 0.01  # of the initial weights


@dataclasses.dataclass(frozen=True)
class Evaluator(GridProbe):
    """Linear probe on one feature; the fields are explained in configs/evaluate.py."""

    normalize: Any
    momentum: float
    trust_coefficient: float
    decay_epochs: float
    crop_tries: int

    label_kinds = (CLASSES, MULTILABEL)  # with squared errors, LARS diverges

    def choices(self) -> dict[str, Sequence[Any]]:
        """The values to choose from, also of features and normalization."""
        features = [feature.strip() for feature in self.feature.split("|")]
        normalize = as_choices(self.normalize)
        return {"feature": features, "normalize": normalize, **super().choices()}

    def augmentation(self, augment: Augment) -> Augment:
        """The augmentation of training images."""
        if self.crop_tries not in (1, CROP_TRIES):
            raise UserError(
                f"evaluator {self.name}: crop_tries={self.crop_tries} must be 1 or {CROP_TRIES}"
            )
        augment = super().augmentation(augment)
        if self.crop_tries == CROP_TRIES:
            return augment
        fields = {}
        for field in dataclasses.fields(Augment):
            fields[field.name] = getattr(augment, field.name)
        return SingleTry(**fields)

    def learning_rate(self, base_lr: Rate, length: Length) -> Schedule:
        """The learning rate; with `decay_epochs`, it falls in steps."""
        if not self.decay_epochs:
            return super().learning_rate(base_lr, length)
        return schedules.warmup_staircase(
            base_lr * self.batch_size / 256,
            self.warmup_epochs * length.steps_per_epoch,
            self.decay_epochs * length.steps_per_epoch,
        )

    def init(
        self, task: Task, pretrained: Params, image: jax.ShapeDtypeStruct, rng: Array
    ) -> tuple[Params, Params]:
        """The linear layer, and the running statistics of the batch normalization."""

        def encode(images: Array) -> Array:
            return self.frozen_vectors(task, pretrained, images)

        width = jax.eval_shape(encode, image).shape[-1]
        layer = probe_layers.linear_init(rng, width, task.classes, DEVIATION)
        return layer, probe_layers.batch_norm_init(width)

    def optimizer(
        self, learning_rate: Schedule, weight_decay: Rate, trained: Params
    ) -> optax.GradientTransformation:
        """LARS."""
        del trained
        return lars(
            learning_rate,
            momentum=self.momentum,
            weight_decay=weight_decay,
            trust_coefficient=self.trust_coefficient,
        )

    def loss(
        self, task: Task, weights: Weights, batch: TrainingBatch
    ) -> tuple[Float[Array, ""], Params]:
        """The loss, and the running statistics after the batch."""
        x = self.frozen_vectors(task, weights.pretrained, batch.images)
        statistics = weights.buffers
        if self.normalize:
            x, statistics = probe_layers.batch_norm_train(x, statistics, EPSILON)
        logits = probe_layers.linear(weights.trained, x)
        return probe_layers.supervised_loss(task.kind, logits, batch.labels), statistics

    def logits(
        self, task: Task, weights: Weights, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Logits of test images."""
        x = self.frozen_vectors(task, weights.pretrained, images)
        if self.normalize:
            x = probe_layers.batch_norm(x, weights.buffers, EPSILON)
        return probe_layers.linear(weights.trained, x)

    def frozen_vectors(
        self, task: Task, pretrained: Params, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B D"]:
        """The feature of each image, without gradients."""
        vectors = image_features.image_vectors(
            task.method, task.augment, pretrained, images, self.feature
        )
        return jax.lax.stop_gradient(vectors)
