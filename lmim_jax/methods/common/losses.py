"""Pure loss functions on arrays, computed in float32 whatever the dtype of the inputs.

Letters: B batch, M masked patches, N tokens, D width, P pixels of a patch, C channels,
h w grid rows and columns.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmim_jax.models.normalization import l2_normalize, token_moments

Scalar = Float[Array, ""]


def mean_over_devices(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Average over devices inside a `shard_map` over the batch; elsewhere return x unchanged."""
    return _reduce_over_devices(jax.lax.pmean, x)


def sum_over_devices(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Add up over devices inside a `shard_map` over the batch; elsewhere return x unchanged."""
    return _reduce_over_devices(jax.lax.psum, x)


def _reduce_over_devices(
    reduce: Callable[..., Array], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Combine the results of devices inside a `shard_map` over the batch."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
        return x
    return reduce(x, axes)


def sinkhorn(
    logits: Float[Array, "B N K"], tau: float, iterations: int, positionwise: bool
) -> Float[Array, "B N K"]:
    """Assign tokens to clusters softly, so that every cluster gets as much as any other.

    The exponentials of logits / tau are scaled alternately: every cluster to sum 1 over the tokens,
    every token to sum 1 over the clusters. The tokens are those of the whole batch on all devices,
    by themselves at each position or all together. There is no gradient.

    Args:
      logits: affinities of tokens and clusters.
      tau: temperature.
      iterations: how often both are scaled.
      positionwise: whether clusters are balanced at each of the N positions.

    Source: CAPI's released `sinkhorn_knopp`, with its 1e-8 and the maximum shifted to e^50.
    """
    tokens = (0,) if positionwise else (0, 1)

    def total(x: Array) -> Array:
        return sum_over_devices(x.sum(axis=tokens, keepdims=True))

    x = jax.lax.stop_gradient(logits).astype(jnp.float32) / tau
    highest = _reduce_over_devices(jax.lax.pmax, x.max(axis=tokens, keepdims=True))
    x = jnp.exp(x - highest + 50)
    for _ in range(iterations):
        x = x / (total(x) + 1e-8)
        x = x / (x.sum(axis=-1, keepdims=True) + 1e-8)
    return x


def soft_cross_entropy(
    logits: Float[Array, "B N K"], assignments: Float[Array, "B N K"], tau: float
) -> Scalar:
    """Cross-entropy of softmax(logits / tau) with given distributions, averaged over tokens."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32) / tau)
    return -jnp.mean(jnp.sum(assignments * log_probabilities, axis=-1))


def standardize_over_patches(x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
    """Standardize every channel of an image over its patches: mean 0, standard deviation 1.

    The standard deviation is unbiased (ddof=1), so M must be at least 2. Gradients flow through
    both moments.

    Source: official Latent MIM `pred2unit`: (x - mean) / (std + 1e-4).
    """
    x = x.astype(jnp.float32)
    centered = x - x.mean(axis=1, keepdims=True)
    return centered / (x.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def standardize_pixels(
    patches: Float[Array, "B M P"], channels: int
) -> tuple[Float[Array, "B M P"], Float[Array, "B M P"], Float[Array, "B M P"]]:
    """Shift and scale every channel of a patch to mean 0 and variance 1 over its pixels.

    The variance is biased (ddof=0), and 1e-5 is added to it, so that a constant patch becomes 0.

    Args:
      patches: pixels in the order (row, column, channel).
      channels: C.

    Returns:
      (standardized patches, means, standard deviations), float32.

    Source: BootMAE. MAE standardizes all channels of a patch together, by the unbiased variance.
    """
    x = patches.astype(jnp.float32).reshape(*patches.shape[:-1], -1, channels)
    mean = x.mean(axis=-2, keepdims=True)
    stddev = jnp.sqrt(x.var(axis=-2, keepdims=True) + 1e-5)
    standardized = ((x - mean) / stddev).reshape(patches.shape)
    means = jnp.broadcast_to(mean, x.shape).reshape(patches.shape)
    stddevs = jnp.broadcast_to(stddev, x.shape).reshape(patches.shape)
    return standardized, means, stddevs


def masked_neighbors(masked: Int[Array, "B M"], grid: tuple[int, int]) -> Float[Array, "B M"]:
    """Compute which share of the 3 x 3 neighborhood of each masked patch is masked.

    A patch belongs to its own neighborhood; positions outside the grid count as visible.

    Args:
      masked: ids of masked patches.
      grid: (h, w).

    Source: `weight_mask` of BootMAE.
    """
    h, w = grid
    rows = jnp.arange(len(masked))[:, None]
    mask = jnp.zeros((len(masked), h * w)).at[rows, masked].set(1)
    padded = jnp.pad(mask.reshape(-1, h, w), ((0, 0), (1, 1), (1, 1)))
    neighborhoods = [
        padded[:, row : row + h, column : column + w] for row in range(3) for column in range(3)
    ]
    counts = sum(neighborhoods)
    return jnp.take_along_axis(counts.reshape(-1, h * w) / 9, masked, axis=1)


def discrimination_logits(
    predictions: Float[Array, "B M D"], targets: Float[Array, "B M D"], tau: float
) -> Float[Array, "B M M"]:
    """Compute the cosine of every prediction with every target of its image, divided by tau."""
    predictions = l2_normalize(predictions)
    targets = l2_normalize(targets)
    # At default precision, float32 products are TF32 on GPUs and one bfloat16 pass on TPUs.
    cosines = jnp.einsum("bid,bjd->bij", predictions, targets, precision="highest")
    return cosines / tau


def other_image_logits(
    predictions: Float[Array, "R M D"],
    targets: Float[Array, "R M D"],
    tau: float,
    rows_per_image: int = 1,
) -> Float[Array, "R M G"]:
    """Compute the cosine of every prediction with one target of every other image, divided by tau.

    It is the target in the same place of the list of masked patches; the images are those of the
    whole batch on all devices.

    Args:
      predictions: of the images on this device.
      targets: of the same images.
      tau: temperature.
      rows_per_image: successive rows that are of one image.

    Returns:
      The logits with the G rows of the batch, -inf for those of the own image.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    targets = l2_normalize(targets)
    own = jnp.arange(len(targets))
    if axes:
        own = own + len(targets) * jax.lax.axis_index(axes)
        targets = jax.lax.all_gather(targets, axes, tiled=True)
    cosines = jnp.einsum("rid,gid->rig", l2_normalize(predictions), targets, precision="highest")
    image = own[:, None, None] // rows_per_image
    is_own = image == jnp.arange(len(targets))[None, None] // rows_per_image
    return jnp.where(is_own, -jnp.inf, cosines / tau)


def near_duplicates(targets: Float[Array, "B M D"], threshold: float) -> Bool[Array, "B M M"]:
    """Find targets of an image that are nearly the same: uniform sky, sea, padding.

    Args:
      targets: of patches.
      threshold: the cosine above which two targets are. A target is no duplicate of itself.

    Source: OlmoEarth's released code, with 0.999: such targets are no negatives of each other.
    """
    cosines = discrimination_logits(targets, targets, 1.0)
    return (cosines > threshold) & ~jnp.eye(targets.shape[1], dtype=bool)[None]


def patch_infonce(logits: Float[Array, "B M N"], tau: float) -> Scalar:
    """Patch discrimination: each prediction must pick its own target, the diagonal of the logits.

    This is 2 tau times the cross-entropy, averaged over images and patches; chance is 2 tau ln N.

    Args:
      logits: as returned by `discrimination_logits`, perhaps with those of `other_image_logits`
        after them; -inf for targets that are no negatives.
      tau: temperature of these logits.

    Source: Latent MIM, section 3.2; official `infonce_patches`.
    """
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    return 2 * tau * jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own)


def patch_accuracy(logits: Float[Array, "B M N"]) -> Scalar:
    """Compute the share of predictions that are closest to their own target; chance is 1 / N."""
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    return jnp.mean(own >= logits.max(axis=-1))


def norm_l2(predictions: Float[Array, "B M D"], targets: Float[Array, "B M D"]) -> Scalar:
    """Mean squared error to targets that are standardized per token, see `token_moments`.

    Source: official Latent MIM `norm_l2`, after MAE's normalized pixels.
    """
    mean, stddev = token_moments(targets)
    return mse(predictions, (targets.astype(jnp.float32) - mean) / stddev)


def mse(
    predictions: Float[Array, "B ... D"],
    targets: Float[Array, "B ... D"],
    mask: Bool[Array, "B ..."] | None = None,
) -> Scalar:
    """Mean squared error; mask: see `_mean`."""
    return _mean(jnp.square(_difference(predictions, targets)), mask)


def l1(
    predictions: Float[Array, "B ... D"],
    targets: Float[Array, "B ... D"],
    mask: Bool[Array, "B ..."] | None = None,
) -> Scalar:
    """Mean absolute error; mask: see `_mean`."""
    return _mean(jnp.abs(_difference(predictions, targets)), mask)


def smooth_l1(
    predictions: Float[Array, "B ... D"],
    targets: Float[Array, "B ... D"],
    mask: Bool[Array, "B ..."] | None = None,
) -> Scalar:
    """Huber loss with threshold 1, torch's `smooth_l1_loss`; mask: see `_mean`.

    An error x costs x^2 / 2 below 1, and x - 1 / 2 above.
    """
    error = jnp.abs(_difference(predictions, targets))
    return _mean(jnp.where(error < 1, 0.5 * error * error, error - 0.5), mask)


def _difference(predictions: Array, targets: Array) -> Array:
    return predictions.astype(jnp.float32) - targets.astype(jnp.float32)


def _mean(errors: Float[Array, "B ... D"], mask: Bool[Array, "B ..."] | None) -> Scalar:
    """Average errors over everything, or over the tokens of each image where `mask` is true."""
    if mask is None:
        return errors.mean()
    counts = mask.sum(axis=tuple(range(1, mask.ndim)), keepdims=True)
    weight = mask / counts
    return (errors.mean(axis=-1) * weight).sum() / len(mask)


# Losses that compare a prediction with its own target alone, by their names in configs
REGRESSION_LOSSES: dict[str, Callable[..., Scalar]] = {
    "norm_l2": norm_l2,
    "mse": mse,
    "l1": l1,
    "smooth_l1": smooth_l1,
}


def similarity(tokens: Float[Array, "B N D"]) -> Scalar:
    """Mean cosine over all ordered pairs of tokens of an image, pairs with itself included.

    This equals the squared norm of the mean unit vector, so it takes O(N D) without the N x N
    matrix. The result is averaged over all images of the (micro-)batch on all devices.

    Source: Latent MIM, section 3.3; official `avg_pairwise_sim`.
    """
    center = l2_normalize(tokens).mean(axis=1)
    return mean_over_devices(jnp.mean(jnp.sum(center * center, axis=-1)))
