"""Features of single patches.

Images may be enlarged by a factor `zoom`, which gives a finer grid of patches than in training.

Letters: B batch, I images of a split, N patches, D width, C channels, H W image height and width.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import ENCODER_FREE, EvaluatedMethod, Params
from lmim_jax.evaluators.common import image_features
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.models.layers import patchify
from lmim_jax.utils.errors import UserError


def enlarge(augment: Augment, zoom: int) -> Augment:
    """The augmentation whose evaluation images are `zoom` times as large."""
    height, width = augment.eval_size
    return dataclasses.replace(
        augment, eval_resize=zoom * augment.eval_resize, eval_size=(zoom * height, zoom * width)
    )


def patch_vectors(
    method: EvaluatedMethod,
    augment: Augment,
    params: Params,
    images: Float[Array, "B H W C"],
    feature: str,
) -> Float[Array, "B N D"]:
    """One vector per patch, row by row.

    Args:
      method: the pretraining method.
      augment: the augmentation that normalized the images.
      params: weights of the method.
      images: normalized images.
      feature: one of the method's features with a vector per patch ("patches", "patches_prenorm"),
        or one of `ENCODER_FREE`.

    Returns:
      float32 [B, N, D].

    Raises:
      UserError: there is no such feature, or it has no vector per patch.
    """
    batch, height, width, channels = images.shape
    side = method.patch_size
    grid = (height // side, width // side)
    number_of_patches = grid[0] * grid[1]
    if feature in ENCODER_FREE:

        def cut(x: Array) -> Array:
            """[B, H, W, C] -> patches as small images [B N, side, side, C]."""
            return patchify(x, grid, side).reshape(-1, side, side, channels)

        found = image_features.encoder_free_feature(
            cut(images), cut(augment.denormalize(images)), feature
        )
        return found.reshape(batch, number_of_patches, -1)
    features = method.features(params, images)
    suitable = []
    for name, value in features.items():
        if value.ndim == 3 and value.shape[1] == number_of_patches:
            suitable.append(name)
    if feature not in suitable:
        choices = ", ".join([*suitable, *ENCODER_FREE])
        raise UserError(f"feature={feature!r} has no vector per patch; choices: {choices}")
    return features[feature].astype(jnp.float32)


@functools.lru_cache(maxsize=8)
def jit_patch_vectors(
    method: EvaluatedMethod, augment: Augment, mesh: Mesh, feature: str
) -> Callable[[Params, Float[Array, "B H W C"]], Float[Array, "B N D"]]:
    """Jitted (params, images) -> `patch_vectors`.

    The batch is divided over the devices; the result is on all processes.
    """

    def encode(params: Params, images: Array) -> Array:
        images = jax.lax.with_sharding_constraint(images, sharding.batch_sharding(mesh))
        return patch_vectors(method, augment, params, images, feature)

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def split_patch_features(
    method: EvaluatedMethod,
    params: Params,
    data: EvaluationData,
    split: str,
    feature: str,
    batch_size: int,
) -> tuple[Float[np.ndarray, "I N D"], Int[np.ndarray, " I"]]:
    """Features of the patches of all readable images of a split.

    Args:
      method: the pretraining method.
      params: its weights.
      data: images of the size at which they are to be encoded.
      split: "train" or "test".
      feature: see `patch_vectors`.
      batch_size: images encoded at a time.

    Returns:
      float32 [I, N, D], and the indices of the images in the split; numpy.
    """
    encode = jit_patch_vectors(method, data.augment, data.mesh, feature)
    replicate = jax.jit(_identity, out_shardings=sharding.replicated(data.mesh))
    tokens = []
    indices = []
    for batch in data.batches(split, batch_size):
        index = np.asarray(jax.device_get(replicate(batch["index"])))
        found = np.asarray(jax.device_get(encode(params, batch["images"])))
        check_finite(found[index >= 0], params, batch["images"])
        tokens.append(found[index >= 0])
        indices.append(index[index >= 0])
    return np.concatenate(tokens), np.concatenate(indices)


def _identity(x: Array) -> Array:
    return x
