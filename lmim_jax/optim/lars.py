"""LARS as MAE's linear probe uses it (the form of MoCo v3)."""

import jax
import optax


def lars(learning_rate, *, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
    """Momentum on gradients that are scaled, for each tensor, to its own norm.

    g + weight_decay w, times trust_coefficient |w| / |that| (1 where a norm is 0), for tensors with more than one
    axis; biases and scales are left as they are. Then mu <- momentum mu + g and w <- w - learning_rate mu.

    `optax.lars` differs in two ways: it multiplies by the learning rate before the momentum, so that a schedule acts
    late, on what is added from now on; and it scales and decays tensors of one axis too.

    Args:
      learning_rate: number, or function of the step.

    Source: MAE, `util/lars.py`.
    """
    matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), matrices),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )
