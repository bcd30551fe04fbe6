"""Features of single patches, on a grid `zoom` times as fine as in training: of images that many times as large.

Letters: B batch, N patches, D width, C channels, H W image height and width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import image_features
from lmim_jax.models.layers import patchify
from lmim_jax.utils.errors import UserError


def enlarged(augment, zoom):
    """The augmentation whose evaluation images are `zoom` times as large."""
    size = tuple(zoom * side for side in augment.eval_size)
    return dataclasses.replace(augment, eval_resize=zoom * augment.eval_resize, eval_size=size)


def features(method, augment, params, images, name):
    """One vector per patch: images [B, H, W, C] -> float32 [B, N, D], by row, then column.

    name: key of the method's features that has a row per patch ("patches", "patches_prenorm"), or one of pooling.FIXED.

    Raises:
      UserError: no such feature, or not one of patches.
    """
    batch, height, width, channels = images.shape
    side = method.patch_size
    grid = height // side, width // side
    if name in image_features.FIXED:
        cut = lambda x: patchify(x, grid, side).reshape(-1, side, side, channels)
        return image_features.fixed(cut(images), cut(augment.levels(images)), name).reshape(
            batch, grid[0] * grid[1], -1
        )
    found = method.features(params, images)
    fit = [
        key
        for key, value in found.items()
        if value.ndim == 3 and value.shape[1] == grid[0] * grid[1]
    ]
    if name not in fit:
        raise UserError(
            f"feature={name!r} is not one of patches; there are: {', '.join([*fit, *image_features.FIXED])}"
        )
    return found[name].astype(jnp.float32)


@functools.lru_cache(maxsize=8)
def encoder(method, augment, mesh, name):
    """Jitted (params, images [B, H, W, C]) -> `features` on all processes, the batch divided over the devices."""

    def encode(params, images):
        images = jax.lax.with_sharding_constraint(images, sharding.batch_sharding(mesh))
        return features(method, augment, params, images, name)

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def of_split(method, params, data, split, name, batch_size):
    """Features of the patches of all readable images of a split: (float32 [B, N, D], index int [B]), numpy.

    data: an `EvaluationData`, whose images are the size they are to be encoded at; index: their places there.
    """
    encode, rows = encoder(method, data.augment, data.mesh, name), []
    whole = jax.jit(lambda index: index, out_shardings=sharding.replicated(data.mesh))
    for batch in data.batches(split, batch_size):
        index = np.asarray(jax.device_get(whole(batch["index"])))
        rows.append(
            (
                np.asarray(jax.device_get(encode(params, batch["images"])))[index >= 0],
                index[index >= 0],
            )
        )
    tokens, index = zip(*rows, strict=True)
    return np.concatenate(tokens), np.concatenate(index)
