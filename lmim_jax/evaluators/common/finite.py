"""Nothing is measured on features that are not finite: one error that names the cause."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lmim_jax.utils.errors import UserError


def check_finite(features: Float[np.ndarray, "..."], params: Any, images: Any) -> None:
    """Check features.

    Args:
      features: of the images that count.
      params: the weights that they were computed with.
      images: the normalized images that they were computed from.

    Raises:
      UserError: they are not finite.
    """
    if np.isfinite(features).all():
        return
    cause = "the encoder overflows on these images; try config.method.dtype=float32"
    if not _all_finite(params):
        cause = "the weights are not finite: the run has diverged; lower config.optimizer.base_lr"
    elif not _all_finite(images):
        cause = "the normalized images are not; check config.augment"
    raise UserError(f"features are not finite, so that nothing can be measured: {cause}")


@jax.jit
def _all_finite(tree: Any) -> Array:
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.isfinite(leaf).all()
    return finite
