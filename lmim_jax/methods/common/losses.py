"""Pure loss functions on arrays. Everything is computed in float32, whatever comes in.

Letters: B batch, M masked patches, N tokens, D width, P pixels of a patch, h w grid rows and columns.
"""

import jax
import jax.numpy as jnp

from lmim_jax.models.normalization import l2_normalize, token_moments


def mean_over_devices(x):
    """The mean of `x` over the devices, inside a `shard_map` over the batch; `x` itself elsewhere."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.pmean(x, axes) if axes else x


def standardize_over_patches(x):
    """Per image and channel, mean 0 and (unbiased) deviation 1 over the patch axis: [B, M, D] -> [B, M, D].

    Source: official `pred2unit`: (x - mean) / (std + 1e-4), with gradient through both. Needs M >= 2.
    """
    x = x.astype(jnp.float32)
    return (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def standardize_pixels(patches, channels):
    """Per patch and channel, mean 0 and (biased) variance 1 over the pixels: (result, mean, deviation), each [B, M, P].

    P = pixels x channels, channels last. The variance gets 1e-5 added, so flat patches become 0.
    Source: BootMAE. (MAE standardises over all channels of a patch at once, by the unbiased variance.)
    """
    x = patches.astype(jnp.float32).reshape(*patches.shape[:-1], -1, channels)
    mean, deviation = x.mean(axis=-2, keepdims=True), jnp.sqrt(x.var(axis=-2, keepdims=True) + 1e-5)
    back = lambda y: jnp.broadcast_to(y, x.shape).reshape(patches.shape)
    return back((x - mean) / deviation), back(mean), back(deviation)


def masked_neighbours(masked, grid):
    """Share of the 3 x 3 neighbourhood of every masked patch that is masked: ids [B, M] -> float32 [B, M].

    A patch is in its own neighbourhood; beyond the border nothing is masked. Source: BootMAE's `weight_mask`.
    """
    h, w = grid
    mask = jnp.zeros((len(masked), h * w)).at[jnp.arange(len(masked))[:, None], masked].set(1)
    padded = jnp.pad(mask.reshape(-1, h, w), ((0, 0), (1, 1), (1, 1)))
    around = sum(
        padded[:, row : row + h, column : column + w] for row in range(3) for column in range(3)
    )
    return jnp.take_along_axis(around.reshape(-1, h * w) / 9, masked, axis=1)


def discrimination_logits(predictions, targets, tau):
    """Cosine of every prediction with every target of its image, over tau: [B, M, D] x 2 -> float32 [B, M, M]."""
    predictions, targets = l2_normalize(predictions), l2_normalize(targets)
    return (
        jnp.einsum("bid,bjd->bij", predictions, targets, preferred_element_type=jnp.float32) / tau
    )


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
    """Mean squared error to targets standardised per token over channels, see `token_moments`.

    Source: official `norm_l2`, from MAE's normalised pixels.
    """
    mean, deviation = token_moments(targets)
    return mse(predictions, (targets.astype(jnp.float32) - mean) / deviation)


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


REGRESSION = {"norm_l2": norm_l2, "mse": mse, "l1": l1, "smooth_l1": smooth_l1}


def similarity(tokens):
    """Mean cosine over all ordered pairs of an image's tokens, self-pairs included, mean over images: scalar.

    Equal to the squared norm of the mean unit vector, so O(N D), without the N x N matrix.
    The mean is over all images of the (micro-)batch on all devices.
    Source: Latent MIM, section 3.3; official `avg_pairwise_sim`.
    """
    center = l2_normalize(tokens).mean(axis=1)
    return mean_over_devices(jnp.mean(jnp.sum(center * center, axis=-1)))
