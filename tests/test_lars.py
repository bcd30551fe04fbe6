"""LARS against a plain numpy version of MAE's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmim_jax.optim.lars import lars

RNG = np.random.default_rng(0)
SHAPES = {"kernel": (5, 3), "conv": (2, 3, 4), "bias": (3,), "zero": (4, 2), "still": (2, 2)}
START = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
START["zero"][:] = 0
GRADIENTS = [
    {n: RNG.normal(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(6)
]
for number, step in enumerate(GRADIENTS):
    step["still"][:] = 0
    step["zero"][:] *= number > 2  # both norms are 0 at first, then that of the weights only


def learning_rate(step):
    """Far from constant, so that the order of learning rate and momentum matters."""
    return 0.5 * (1 + jnp.cos(step))


def several_axes(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def plain(decay, momentum=0.9, trust=0.001):
    """MAE's definition, tensor by tensor, in float64."""
    weights = {name: w.astype(np.float64) for name, w in START.items()}
    buffers = {name: np.zeros_like(w) for name, w in weights.items()}
    for number, gradients in enumerate(GRADIENTS):
        for name, gradient in gradients.items():
            w, g = weights[name], gradient.astype(np.float64)
            if w.ndim > 1:
                g = g + decay * w
                norms = np.linalg.norm(w), np.linalg.norm(g)
                g = g * (trust * norms[0] / norms[1] if min(norms) > 0 else 1.0)
            buffers[name] = momentum * buffers[name] + g
            weights[name] = w - float(learning_rate(number)) * buffers[name]
    return weights


def train(optimizer):
    weights = {name: jnp.asarray(w) for name, w in START.items()}
    state = optimizer.init(weights)
    for gradients in GRADIENTS:
        updates, state = jax.jit(optimizer.update)(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_equals_that_of_mae(decay):
    ours = train(lars(learning_rate, weight_decay=decay))
    for name, expected in plain(decay).items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_lars_of_optax_differs():
    optimizer = optax.lars(
        learning_rate,
        momentum=0.9,
        trust_coefficient=0.001,
        weight_decay_mask=several_axes,
        trust_ratio_mask=several_axes,
    )
    other = train(optimizer)
    assert (
        np.abs(other["bias"] - plain(0.0)["bias"]).max() > 0.1
    )  # the learning rate before the momentum
