"""Linear probe: batch normalization without parameters and a linear layer on a frozen feature.

Trained with LARS on random crops and flips.

Source: MAE (He et al. 2022), appendix A; official `main_linprobe.py`. One difference: crops are
drawn with the ten tries of torchvision; MAE draws only once.

Letters: B batch, H W image height and width, C channels, D width, K classes.
"""

import dataclasses

import jax
import optax
from jaxtyping import Array, Float

from lmim_jax.evaluators.base import Params
from lmim_jax.evaluators.common import image_features, probe_layers
from lmim_jax.evaluators.common.probe_training import Probe, Schedule, Task, TrainingBatch, Weights
from lmim_jax.optim.lars import lars

EPSILON = 1e-6
DEVIATION = 0.01  # of the initial weights


@dataclasses.dataclass(frozen=True)
class Evaluator(Probe):
    """Linear probe on one feature; the fields are explained in configs/evaluate.py."""

    feature: str
    momentum: float
    trust_coefficient: float

    def init(
        self, task: Task, pretrained: Params, image: jax.ShapeDtypeStruct, rng: Array
    ) -> tuple[Params, Params]:
        """The linear layer, and the running statistics of the batch normalization."""

        def encode(images: Array) -> Array:
            return self.frozen_vectors(task, pretrained, images)

        width = jax.eval_shape(encode, image).shape[-1]
        layer = probe_layers.linear_init(rng, width, task.classes, DEVIATION)
        return layer, probe_layers.batch_norm_init(width)

    def optimizer(self, learning_rate: Schedule, trained: Params) -> optax.GradientTransformation:
        """LARS."""
        del trained
        return lars(
            learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            trust_coefficient=self.trust_coefficient,
        )

    def loss(
        self, task: Task, weights: Weights, batch: TrainingBatch
    ) -> tuple[Float[Array, ""], Params]:
        """The loss, and the running statistics after the batch."""
        x = self.frozen_vectors(task, weights.pretrained, batch.images)
        x, statistics = probe_layers.batch_norm_train(x, weights.buffers, EPSILON)
        logits = probe_layers.linear(weights.trained, x)
        return probe_layers.supervised_loss(task.kind, logits, batch.labels), statistics

    def logits(
        self, task: Task, weights: Weights, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Logits of test images."""
        x = self.frozen_vectors(task, weights.pretrained, images)
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
