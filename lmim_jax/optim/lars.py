"""LARS as in MAE's linear probe, which is the form of MoCo v3."""

from typing import Any

import jax
import optax


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """Build SGD with momentum on gradients that are scaled to the norm of their own tensor.

    For tensors with more than one axis, the gradient becomes g' = g + weight_decay w, times
    trust_coefficient |w| / |g'| (1 where a norm is 0); biases and scales keep theirs. Then
    mu <- momentum mu + g' and w <- w - learning_rate mu.

    `optax.lars` differs in two ways: it multiplies by the learning rate before the momentum, so a
    schedule acts late; and it scales and decays tensors of one axis too.

    Args:
      learning_rate: number, or function of the step.
      momentum: of the scaled gradients.
      weight_decay: of tensors with more than one axis.
      trust_coefficient: norm of an update / norm of its tensor, before the learning rate.

    Source: MAE, `util/lars.py`.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=_has_several_axes),
        optax.masked(
            optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), _has_several_axes
        ),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def _has_several_axes(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)
