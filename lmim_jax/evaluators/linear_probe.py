"""Linear probe as MAE's: batch normalisation without parameters and a linear layer on a frozen feature.

Trained with LARS on crops and flips; the figures are those after the last epoch.
Source: MAE, appendix A; official `main_linprobe.py`. It differs in one thing: crops are drawn with torchvision's ten
tries, MAE's only once.
"""

import dataclasses

import jax

from lmim_jax.evaluators.common import image_features, probe_layers, probe_training
from lmim_jax.optim.lars import lars

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A trainer, see supervised.py; the fields are explained in configs/evaluate.py."""

    feature: str
    batch_size: int
    epochs: float
    warmup_epochs: float
    base_lr: float
    min_lr: float
    momentum: float
    weight_decay: float
    trust_coefficient: float
    scale: tuple[float, float]
    seed: int

    def run(self, method, params, data):
        """{"top1", "top5"} in percent; {} where there are no labels or no test images."""
        return probe_training.accuracy(self, method, params, data)

    def init(self, task, params, images, rng):
        """The linear layer; running statistics."""
        width = jax.eval_shape(lambda x: self._features(task, params, x), images).shape[-1]
        return probe_layers.linear_init(
            rng, width, task.classes, 0.01
        ), probe_layers.batch_norm_init(width)

    def optimizer(self, rate, trained):
        """LARS."""
        del trained
        constants = dict(weight_decay=self.weight_decay, trust_coefficient=self.trust_coefficient)
        return lars(rate, momentum=self.momentum, **constants)

    def loss(self, task, params, trained, buffers, images, labels, rng, keys):
        """Cross-entropy; the running statistics after the batch."""
        del rng, keys
        x, buffers = probe_layers.batch_norm_train(
            self._features(task, params, images), buffers, EPSILON
        )
        return probe_layers.cross_entropy(probe_layers.linear(trained, x), labels), buffers

    def logits(self, task, params, trained, buffers, images):
        """[B, K]."""
        return probe_layers.linear(
            trained, probe_layers.batch_norm(self._features(task, params, images), buffers, EPSILON)
        )

    def _features(self, task, params, images):
        return jax.lax.stop_gradient(
            image_features.vectors(task.method, task.augment, params, images, self.feature)
        )
