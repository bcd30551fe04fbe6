"""Normalizations without parameters, computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scale the last axis to length 1, float32; lengths are clamped to 1e-12, as in torch."""
    x = x.astype(jnp.float32)
    # The root of a clamped square: the gradient at x = 0 is 0 instead of NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def token_moments(x: Float[Array, "... D"]) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Compute the mean and the standard deviation of every token over its channels.

    The variance is unbiased (ddof=1), and 1e-6 is added to it, as in MAE's normalized targets.

    Returns:
      (mean, standard deviation), float32.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = x.var(axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + 1e-6)


def standardize_tokens(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """Shift and scale every token to mean 0 and variance 1, float32.

    This is torch's functional `layer_norm` without scale and bias: the variance is biased
    (ddof=0). The layer with parameters is `layers.layer_norm`.

    Args:
      x: tokens.
      epsilon: added to the variance.
    """
    x = x.astype(jnp.float32)
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + epsilon)
