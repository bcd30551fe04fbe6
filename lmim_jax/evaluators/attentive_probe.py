"""Attentive probe: one learned query reads the frozen patch tokens by attention, and a linear layer classifies.

Keys and values are linear in the tokens, which are normalised to mean 0 and deviation 1 each, so that a learning rate
means the same for every method; query and output have no layer of their own. Trained with AdamW on crops and flips.
Source: CAPI (Darcet et al. 2025), classification probe; it tries ten learning rates where this takes one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from lmim_jax.evaluators.common import probe_layers, probe_training
from lmim_jax.models import normalization
from lmim_jax.models.attention import attend
from lmim_jax.utils.errors import UserError

HEAD_WIDTH = 64
DEVIATION = 0.02  # of all initial weights


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A trainer, see supervised.py; the fields are explained in configs/evaluate.py."""

    feature: str
    batch_size: int
    epochs: float
    warmup_epochs: float
    base_lr: float
    min_lr: float
    b1: float
    b2: float
    weight_decay: float
    scale: tuple[float, float]
    seed: int

    def run(self, method, params, data):
        """{"top1", "top5"} in percent; {} where there are no labels or no test images."""
        return probe_training.accuracy(self, method, params, data)

    def init(self, task, params, images, rng):
        """Query [A, D / A] of A heads, keys and values, the linear layer."""
        shape = jax.eval_shape(
            lambda x: probe_layers.frozen(task.method, params, x, self.feature), images
        ).shape
        if len(shape) != 3:
            raise UserError(
                f"evaluator attentive: feature={self.feature!r} has no patches; take one such as 'patches'"
            )
        width = shape[-1]
        heads = next(
            heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0
        )
        keys = jax.random.split(rng, 3)
        return {
            "query": DEVIATION * jax.random.normal(keys[0], (heads, width // heads)),
            "key_value": probe_layers.linear_init(keys[1], width, 2 * width, DEVIATION),
            "head": probe_layers.linear_init(keys[2], width, task.classes, DEVIATION),
        }, {}

    def optimizer(self, rate, trained):
        """AdamW; biases are not decayed."""
        decayed = jax.tree.map(lambda x: x.ndim > 1, trained)
        return optax.adamw(rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=decayed)

    def loss(self, task, params, trained, buffers, images, labels, rng, keys):
        """Cross-entropy."""
        del rng, keys
        return probe_layers.cross_entropy(
            self.logits(task, params, trained, buffers, images), labels
        ), buffers

    def logits(self, task, params, trained, buffers, images):
        """[B, K]."""
        del buffers
        x = normalization.standardize_tokens(
            probe_layers.frozen(task.method, params, images, self.feature), 1e-6
        )
        batch, tokens, width = x.shape
        heads, of_head = trained["query"].shape
        both = probe_layers.linear(trained["key_value"], x.reshape(-1, width)).reshape(
            batch, tokens, 2 * heads, of_head
        )
        key, value = jnp.split(both, 2, axis=2)
        query = jnp.broadcast_to(trained["query"][None, None], (batch, 1, heads, of_head))
        return probe_layers.linear(
            trained["head"], attend(query, key, value, "xla").reshape(batch, width)
        )
