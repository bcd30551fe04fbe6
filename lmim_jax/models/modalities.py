"""Images of several co-registered modalities as tokens on one grid, and back.

An image has the channels of all modalities side by side. Each position of the grid has one token
per modality: token m N + i is position i of modality m. Arrays of tokens hold as many of each
modality, one modality after the other, so that they are divided by equal parts. Patches of
modalities with fewer values are padded with zeros.

Letters: B batch, H W image height and width, C channels, M modalities, N positions, T tokens,
P values of the longest patch, D width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from lmim_jax.models.layers import Dense, Dtype, patchify, replace_patches


class Modality(NamedTuple):
    """One modality of images.

    Attributes:
      name: in configs and parameters; "": there is no other one.
      channels: of its part of an image.
      patch_size: side of its patches in pixels, after averaging where it is less than that of the
        grid, which it must divide.
    """

    name: str
    channels: int
    patch_size: int

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.patch_size**2 * self.channels


def split_channels(
    images: Shaped[Array | np.ndarray, "... C"], modalities: Sequence[Modality]
) -> list[Shaped[Array | np.ndarray, "... _"]]:
    """The channels of each modality; of a single one, the images."""
    parts = []
    first = 0
    for modality in modalities:
        parts.append(images[..., first : first + modality.channels])
        first += modality.channels
    return parts


def patchify_all(
    images: Float[Array, "B H W C"],
    modalities: Sequence[Modality],
    grid: tuple[int, int],
    patch_size: int,
    gap: int = 0,
    offsets: Int[Array, "B h w 2"] | None = None,
) -> Float[Array, "B M*N P"]:
    """Cut the patches of every modality out of images.

    Args:
      images: see `layers.patchify`, also for the other arguments.
      modalities: in the order of their channels.
      grid: rows and columns.
      patch_size: side of a patch in pixels of the image.
      gap: between patches.
      offsets: of patches; the same for all modalities.
    """
    if len(modalities) == 1:
        return _average(patchify(images, grid, patch_size, gap, offsets), modalities[0], patch_size)
    longest = max(modality.patch_dim for modality in modalities)
    parts = []
    for modality, pixels in zip(modalities, split_channels(images, modalities), strict=True):
        patches = patchify(pixels, grid, patch_size, gap, offsets)
        patches = _average(patches, modality, patch_size)
        padding = longest - modality.patch_dim
        parts.append(jnp.pad(patches, ((0, 0), (0, 0), (0, padding))))
    return jnp.concatenate(parts, axis=1)


def _average(patches: Array, modality: Modality, patch_size: int) -> Array:
    """Shrink patches to the side of a modality by means over squares of pixels."""
    factor = patch_size // modality.patch_size
    if factor == 1:
        return patches
    side = modality.patch_size
    shape = (*patches.shape[:2], side, factor, side, factor, modality.channels)
    return patches.reshape(shape).mean(axis=(3, 5)).reshape(*patches.shape[:2], -1)


def replace_all(
    images: Float[Array, "B H W C"],
    tokens: Int[Array, "B T"],
    patches: Float[Array, "B T P"],
    modalities: Sequence[Modality],
    grid: tuple[int, int],
    patch_size: int,
) -> Float[Array, "B H W C"]:
    """Replace some patches of every modality of images.

    Args:
      images: without gap.
      tokens: ids, as many of each modality, one modality after the other.
      patches: what to put there.
      modalities: see `patchify_all`, also for the other arguments.
      grid: rows and columns.
      patch_size: side of a patch in pixels of the image.
    """
    count = len(modalities)
    positions = jnp.split(tokens % (grid[0] * grid[1]), count, axis=1)
    parts = []
    for modality, pixels, ids, values in zip(
        modalities,
        split_channels(images, modalities),
        positions,
        jnp.split(patches, count, axis=1),
        strict=True,
    ):
        values = _repeat(values[..., : modality.patch_dim], modality, patch_size)
        parts.append(replace_patches(pixels, ids, values, grid, patch_size))
    return jnp.concatenate(parts, axis=-1)


def _repeat(patches: Array, modality: Modality, patch_size: int) -> Array:
    """Enlarge patches of a modality to the side of the grid's by repeating pixels."""
    factor = patch_size // modality.patch_size
    side = modality.patch_size
    pixels = patches.reshape(*patches.shape[:2], side, side, modality.channels)
    pixels = jnp.repeat(jnp.repeat(pixels, factor, axis=2), factor, axis=3)
    return pixels.reshape(*patches.shape[:2], -1)


def embed_patches(
    parent: nn.Module,
    patches: Float[Array, "B T P"],
    widths: Sequence[tuple[str, int]],
    width: int,
    dtype: Dtype,
) -> Float[Array, "B T D"]:
    """Embed patches by one linear layer per modality and add the embedding of the modality.

    Parameters of `parent`: patch_embed; of several modalities, patch_embed_NAME and
    modality_embed_NAME [1, 1, D].

    Args:
      parent: the module, in its compact method.
      patches: as many of each modality, one modality after the other.
      widths: (name, values of a patch) of each modality; (): one, without a name.
      width: D.
      dtype: of the computation.
    """
    if not widths:
        return Dense(width, dtype, name="patch_embed")(patches)
    parts = []
    for (name, values), part in zip(widths, jnp.split(patches, len(widths), axis=1), strict=True):
        x = Dense(width, dtype, name=f"patch_embed_{name}")(part[..., :values])
        init = nn.initializers.normal(0.02)
        embedding = parent.param(f"modality_embed_{name}", init, (1, 1, width))
        parts.append(x + embedding.astype(dtype))
    return jnp.concatenate(parts, axis=1)


def predict_patches(
    x: Float[Array, "B T d"], widths: Sequence[tuple[str, int]], width: int, dtype: Dtype
) -> Float[Array, "B T P"]:
    """Map tokens to patches by one linear layer per modality, in a compact method of a module.

    Parameters: head; of several modalities, head_NAME.

    Args:
      x: as many tokens of each modality, one modality after the other.
      widths: see `embed_patches`.
      width: P, to which shorter patches are padded with zeros.
      dtype: of the computation.
    """
    if not widths:
        return Dense(width, dtype, name="head")(x)
    parts = []
    for (name, values), part in zip(widths, jnp.split(x, len(widths), axis=1), strict=True):
        y = Dense(values, dtype, name=f"head_{name}")(part)
        parts.append(jnp.pad(y, ((0, 0), (0, 0), (0, width - values))))
    return jnp.concatenate(parts, axis=1)


def mean_over_modalities(
    x: Float[Array, "..."], count: int, first: int, axis: int
) -> Float[Array, "..."]:
    """Average the tokens of each position along an axis; the `first` ones in front are kept."""
    if count == 1:
        return x
    before, tokens = jnp.split(x, [first], axis)
    parts = jnp.stack(jnp.split(tokens, count, axis))
    return jnp.concatenate([before, parts.mean(axis=0)], axis)


def merge_attention(
    weights: Float[Array, "B A T T"], count: int, first: int
) -> Float[Array, "B A _ _"]:
    """Attention between positions: what goes to all tokens of one, from the mean token of one."""
    if count == 1:
        return weights
    merged = mean_over_modalities(weights, count, first, axis=3)
    merged = merged.at[..., first:].multiply(count)  # a sum over the tokens attended to
    return mean_over_modalities(merged, count, first, axis=2)
