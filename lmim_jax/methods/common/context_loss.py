"""A loss on the visible patches, beside that on the masked ones (V-JEPA 2.1, arXiv 2603.14482).

The predictor also says what it is given: the latents of the visible patches. An error weighs
1 / sqrt(d), where d is how far the patch is from the nearest masked one.

Letters: B batch, V visible patches, M masked patches, N patches, D width.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmim_jax.methods.common.losses import Scalar


def nearest_masked(
    visible: Int[Array, "B V"],
    masked: Int[Array, "B M"],
    grid: tuple[int, int],
    mask: Bool[Array, "B M"] | None = None,
) -> Float[Array, "B V"]:
    """Compute the distance of every visible patch to the nearest masked one, in patches.

    Distances are Euclidean, and at least 1; infinite where nothing is masked.

    Args:
      visible: ids of patches.
      masked: ids of patches.
      grid: (rows, columns).
      mask: False for entries of `masked` that are padding; None: there are none.
    """
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=1)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)  # [N, N]
    if mask is None:
        mask = jnp.ones(masked.shape, bool)
    rows = jnp.arange(len(masked))[:, None]
    hidden = jnp.zeros((len(masked), len(places)), bool).at[rows, masked].max(mask)
    candidates = jnp.where(
        hidden[:, None], jnp.asarray(distances, jnp.float32)[visible], jnp.inf
    )  # [B, V, N]
    return jnp.maximum(candidates.min(axis=2), 1)


def context_loss(
    predictions: Float[Array, "B V D"],
    targets: Float[Array, "B V D"],
    distances: Float[Array, "B V"],
    mask: Bool[Array, "B V"] | None = None,
) -> Scalar:
    """Mean absolute error of each visible patch / sqrt(distance), averaged over patches and images.

    Args:
      predictions: for the visible patches.
      targets: of the same patches.
      distances: see `nearest_masked`.
      mask: False for patches that are padding; None: there are none.
    """
    errors = jnp.abs(predictions.astype(jnp.float32) - targets.astype(jnp.float32)).mean(axis=2)
    weighted = errors / jnp.sqrt(distances)
    if mask is None:
        return weighted.mean()
    return ((weighted * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)).mean()
