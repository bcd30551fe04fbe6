"""Normalizations without parameters, in float32."""

import jax
import jax.numpy as jnp


def l2_normalize(x):
    """Scale the last axis to length 1 (float32; length at least 1e-12, as torch's `normalize`)."""
    x = x.astype(jnp.float32)
    # sqrt of a clamped square: the gradient at x = 0 is 0, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def token_moments(x):
    """Mean and (unbiased) deviation of every token over its channels, 1e-6 added to the variance: [..., 1], float32."""
    x = x.astype(jnp.float32)
    return x.mean(axis=-1, keepdims=True), jnp.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + 1e-6)


def standardize_tokens(x, epsilon):
    """Last axis to mean 0 and (biased) variance 1, without scale and bias, float32 (torch's `layer_norm`)."""
    x = x.astype(jnp.float32)
    return (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(
        x.var(axis=-1, keepdims=True) + epsilon
    )
