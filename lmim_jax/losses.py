"""Pure loss functions on arrays. Everything is computed in float32, whatever comes in.

Letters: B batch, M masked patches, N tokens, D width.
"""

import jax
import jax.numpy as jnp


def mean_over_devices(x):
    """The mean of `x` over the devices, inside a `shard_map` over the batch; `x` itself elsewhere."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.pmean(x, axes) if axes else x


def unit(x):
    """Scale the last axis to length 1 (float32; length at least 1e-12, as torch's `normalize`)."""
    x = x.astype(jnp.float32)
    # sqrt of a clamped square: the gradient at x = 0 is 0, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def standardize_over_patches(x):
    """Per image and channel, mean 0 and (unbiased) deviation 1 over the patch axis: [B, M, D] -> [B, M, D].

    Source: official `pred2unit`: (x - mean) / (std + 1e-4), with gradient through both. Needs M >= 2.
    """
    x = x.astype(jnp.float32)
    return (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def discrimination_logits(predictions, targets, tau):
    """Cosine of every prediction with every target of its image, over tau: [B, M, D] x 2 -> float32 [B, M, M]."""
    predictions, targets = unit(predictions), unit(targets)
    return jnp.einsum("bid,bjd->bij", predictions, targets, preferred_element_type=jnp.float32) / tau


def patch_infonce(logits, tau):
    """Patch discrimination: each prediction must pick its own target, the diagonal of `logits` [B, M, M].

    2 tau times the cross-entropy, mean over images and patches. Chance is 2 tau ln M.
    Source: Latent MIM, section 3.2; official `infonce_patches`.
    """
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    return 2 * tau * jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own)


def patch_accuracy(logits):
    """Share of predictions whose own target scores highest: [B, M, M] -> scalar. Chance is 1 / M."""
    return jnp.mean(jnp.diagonal(logits, axis1=1, axis2=2) >= logits.max(axis=-1))


def norm_l2(predictions, targets):
    """Mean squared error to targets standardised per token over channels (unbiased variance, eps 1e-6).

    Source: official `norm_l2`, from MAE's normalised pixels.
    """
    targets = targets.astype(jnp.float32)
    mean, variance = targets.mean(axis=-1, keepdims=True), targets.var(axis=-1, ddof=1, keepdims=True)
    return mse(predictions, (targets - mean) / jnp.sqrt(variance + 1e-6))


def mse(predictions, targets, mask=None):
    """Mean squared error; mask: see `_mean`."""
    return _mean(jnp.square(predictions.astype(jnp.float32) - targets.astype(jnp.float32)), mask)


def l1(predictions, targets, mask=None):
    """Mean absolute error; mask: see `_mean`."""
    return _mean(jnp.abs(predictions.astype(jnp.float32) - targets.astype(jnp.float32)), mask)


def smooth_l1(predictions, targets, mask=None):
    """Huber loss with threshold 1 (torch's `smooth_l1_loss`): quadratic below, linear above; mask: see `_mean`."""
    error = jnp.abs(predictions.astype(jnp.float32) - targets.astype(jnp.float32))
    return _mean(jnp.where(error < 1, 0.5 * error * error, error - 0.5), mask)


def _mean(errors, mask):
    """Mean of errors [B, ..., D] over everything, or, per image, over the tokens where `mask` [B, ...] is true."""
    if mask is None:
        return errors.mean()
    weight = mask / mask.sum(axis=tuple(range(1, mask.ndim)), keepdims=True)
    return (errors.mean(axis=-1) * weight).sum() / len(mask)


def layer_norm(x, epsilon):
    """Last axis to mean 0 and (biased) variance 1, without scale and bias, float32 (torch's `layer_norm`)."""
    x = x.astype(jnp.float32)
    return (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + epsilon)


REGRESSION = {"norm_l2": norm_l2, "mse": mse, "l1": l1, "smooth_l1": smooth_l1}


def similarity(tokens):
    """Mean cosine over all ordered pairs of an image's tokens, self-pairs included, mean over images: scalar.

    Equal to the squared norm of the mean unit vector, so O(N D), without the N x N matrix.
    The mean is over all images of the (micro-)batch on all devices.
    Source: Latent MIM, section 3.3; official `avg_pairwise_sim`.
    """
    center = unit(tokens).mean(axis=1)
    return mean_over_devices(jnp.mean(jnp.sum(center * center, axis=-1)))
