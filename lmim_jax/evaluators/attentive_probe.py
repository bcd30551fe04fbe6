"""Attentive probe: one learned query attends to the frozen patch tokens, then a linear layer.

Keys and values are linear in the tokens. Each token is first standardized, so that a learning rate
has the same meaning for every method. Query and output have no projection. Trained with AdamW on
random crops and flips. Several learning rates and weight decays are chosen among on held-out
training images, see common/probe_grid.py.

As queries and attention are linear in keys and values, the key layer is applied to the query, and
the value layer to the attended tokens: a head needs no memory for keys and values of every token,
so that dozens of heads train at once. The bias of the keys cancels in the softmax.

Source: CAPI (Darcet et al. 2025), classification probe.

Letters: B batch, N patches, D width, A heads, K classes, H W image height and width, C channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lmim_jax.evaluators.base import Params
from lmim_jax.evaluators.common import probe_layers
from lmim_jax.evaluators.common.probe_grid import GridProbe
from lmim_jax.evaluators.common.probe_training import Rate, Schedule, Task, TrainingBatch, Weights
from lmim_jax.models import normalization
from lmim_jax.utils.errors import UserError

HEAD_WIDTH = 64
DEVIATION = 0.02  # of all initial weights
EPSILON = 1e-6  # of the standardization


@dataclasses.dataclass(frozen=True)
class Evaluator(GridProbe):
    """Attentive probe on one feature; the fields are explained in configs/evaluate.py."""

    b1: float
    b2: float

    takes = "patches"

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

    def optimizer(
        self, learning_rate: Schedule, weight_decay: Rate, trained: Params
    ) -> optax.GradientTransformation:
        """AdamW without weight decay of biases."""

        def is_decayed(x: Array) -> bool:
            return x.ndim > 1

        return optax.adamw(
            learning_rate,
            self.b1,
            self.b2,
            weight_decay=weight_decay,
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
        return probe_layers.linear(trained["head"], attend(trained, x))


def attend(trained: Params, x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
    """Attention of the query to tokens, softmax(q k^T / sqrt(D / A)) v, of all heads, in float32.

    Args:
      trained: see `Evaluator.init`.
      x: tokens.
    """
    x = x.astype(jnp.float32)
    width = x.shape[-1]
    query = trained["query"]
    heads, head_width = query.shape
    kernels = trained["key_value"]["kernel"].reshape(width, 2, heads, head_width)
    precision = jax.lax.Precision.HIGHEST
    queries = jnp.einsum("ak,dak->ad", query, kernels[:, 0], precision=precision)
    logits = jnp.einsum("ad,bnd->ban", queries, x, precision=precision)
    attention = jax.nn.softmax(logits / math.sqrt(head_width), axis=-1)
    attended = jnp.einsum("ban,bnd->bad", attention, x, precision=precision)
    values = jnp.einsum("bad,dak->bak", attended, kernels[:, 1], precision=precision)
    return values.reshape(len(x), width) + trained["key_value"]["bias"][None, width:]


def number_of_heads(width: int) -> int:
    """The largest number of heads that divides the width, at most one per HEAD_WIDTH channels."""
    heads = max(1, width // HEAD_WIDTH)
    while width % heads:
        heads -= 1
    return heads
