"""Attentive probe: one learned query attends to the frozen patch tokens, then a linear layer.

Keys and values are linear in the tokens. Each token is first standardized, so that a learning rate
has the same meaning for every method. Query and output have no projection. Trained with AdamW on
random crops and flips.

Source: CAPI (Darcet et al. 2025), classification probe, which tries ten learning rates; one is
used here.

Letters: B batch, N patches, D width, A heads, K classes, H W image height and width, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmim_jax.evaluators.base import Params
from lmim_jax.evaluators.common import probe_layers
from lmim_jax.evaluators.common.probe_training import Probe, Schedule, Task, TrainingBatch, Weights
from lmim_jax.models import normalization
from lmim_jax.models.attention import attend
from lmim_jax.utils.errors import UserError

HEAD_WIDTH = 64
DEVIATION = 0.02  # of all initial weights
EPSILON = 1e-6  # of the standardization


@dataclasses.dataclass(frozen=True)
class Evaluator(Probe):
    """Attentive probe on one feature; the fields are explained in configs/evaluate.py."""

    feature: str
    b1: float
    b2: float

    def init(
        self, task: Task, pretrained: Params, image: jax.ShapeDtypeStruct, rng: Array
    ) -> tuple[Params, Params]:
        """Query [A, D / A], the layer of keys and values, and the classifier; no buffers.

        Raises:
          UserError: the feature has no vector per patch.
        """

        def encode(images: Array) -> Array:
            return probe_layers.frozen_feature(task.method, pretrained, images, self.feature)

        shape = jax.eval_shape(encode, image).shape
        if len(shape) != 3:
            raise UserError(
                f"evaluator {self.name}: feature={self.feature!r} has no patches; use a feature "
                "such as 'patches'"
            )
        width = shape[-1]
        heads = number_of_heads(width)
        keys = jax.random.split(rng, 3)
        trained = {
            "query": DEVIATION * jax.random.normal(keys[0], (heads, width // heads)),
            "key_value": probe_layers.linear_init(keys[1], width, 2 * width, DEVIATION),
            "head": probe_layers.linear_init(keys[2], width, task.classes, DEVIATION),
        }
        return trained, {}

    def optimizer(self, learning_rate: Schedule, trained: Params) -> optax.GradientTransformation:
        """AdamW without weight decay of biases."""

        def is_decayed(x: Array) -> bool:
            return x.ndim > 1

        return optax.adamw(
            learning_rate,
            self.b1,
            self.b2,
            weight_decay=self.weight_decay,
            mask=jax.tree.map(is_decayed, trained),
        )

    def loss(
        self, task: Task, weights: Weights, batch: TrainingBatch
    ) -> tuple[Float[Array, ""], Params]:
        """See `probe_layers.supervised_loss`."""
        logits = self.logits(task, weights, batch.images)
        loss = probe_layers.supervised_loss(task.kind, logits, batch.labels)
        return loss, weights.buffers

    def logits(
        self, task: Task, weights: Weights, images: Float[Array, "B H W C"]
    ) -> Float[Array, "B K"]:
        """Logits of test images."""
        trained = weights.trained
        x = probe_layers.frozen_feature(task.method, weights.pretrained, images, self.feature)
        x = normalization.standardize_tokens(x, EPSILON)
        batch, tokens, width = x.shape
        heads, head_width = trained["query"].shape
        key_value = probe_layers.linear(trained["key_value"], x.reshape(-1, width))
        key_value = key_value.reshape(batch, tokens, 2 * heads, head_width)
        key, value = jnp.split(key_value, 2, axis=2)
        query = jnp.broadcast_to(trained["query"][None, None], (batch, 1, heads, head_width))
        pooled = attend(query, key, value, "xla").reshape(batch, width)
        return probe_layers.linear(trained["head"], pooled)


def number_of_heads(width: int) -> int:
    """The largest number of heads that divides the width, at most one per HEAD_WIDTH channels."""
    heads = max(1, width // HEAD_WIDTH)
    while width % heads:
        heads -= 1
    return heads
