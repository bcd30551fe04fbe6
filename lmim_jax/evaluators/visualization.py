"""Pictures of a few fixed held-out images: the input of the model, and its patch features.

Letters: K images, H W image height and width, C channels, h w grid rows and columns, N = h w
patches, D width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import Batch, EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Picture, Results
from lmim_jax.evaluators.common import clustering, patch_features
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.models.modalities import split_channels
from lmim_jax.utils import plotting

# Images whose mean feature at each position is subtracted: the rest depends on the image
REFERENCE_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Two pictures; the fields are explained in configs/vit_b.py."""

    feature: str
    images: int
    zoom: int
    clusters: int

    takes = "patches"

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"given": picture of the input, "seen": picture of the features}."""
        batch, indices = data.sample(data.held_out, max(self.images, REFERENCE_IMAGES))
        canvases = {"image": batch["image"], "size": batch["size"]}
        return {
            "given": self._plot_input(method, data, canvases, len(indices)),
            "seen": self._plot_features(method, params, data, canvases, indices),
        }

    def _plot_input(
        self, method: EvaluatedMethod, data: EvaluationData, canvases: Batch, available: int
    ) -> Picture:
        """Crops, windows and masks, drawn as in training; the same draw at every evaluation."""
        draw = jit_training_views(method, data.augment, data.mesh)
        crops, views = jax.device_get(draw(canvases))
        wholes = []
        parts = []
        windows = []
        for k, whole in enumerate(whole_images(data, canvases)[: min(self.images, available)]):
            wholes += split_channels(whole, method.inputs)
            parts += split_channels(crops[k], method.inputs)
            for number in range(len(method.inputs)):
                windows.append(training_windows(method, views, k, number))
        return plotting.plot_masking(wholes, parts, windows)

    def _plot_features(
        self,
        method: EvaluatedMethod,
        params: Params,
        data: EvaluationData,
        canvases: Batch,
        indices: tuple[int, ...],
    ) -> Picture:
        """PCA and clusters of the features of enlarged images, on a grid `zoom` times as fine."""
        augment = patch_features.enlarge(data.augment, self.zoom)
        encode = _jit_encode(method, augment, data.mesh, self.feature)
        inputs, tokens = jax.device_get(encode(params, canvases))
        tokens = tokens[: len(indices)]
        check_finite(tokens, params, inputs)
        if len(tokens) > 1:  # of a single image, nothing would remain
            tokens = (tokens - tokens.mean(axis=0))[: self.images]
        shape = (len(tokens), self.zoom * method.grid[0], self.zoom * method.grid[1])
        clusters = []
        for image_tokens in tokens:
            cuts = clustering.nested_clusters(image_tokens, (self.clusters,))
            clusters.append(cuts[self.clusters])
        return plotting.plot_features(
            np.stack([split_channels(image, method.inputs)[0] for image in inputs[: len(tokens)]]),
            pca_rgb(tokens).reshape(*shape, 3),
            np.stack(clusters).reshape(shape),
            object_pixels(data, indices[: self.images], augment),
        )


def object_pixels(
    data: EvaluationData, indices: Iterable[int], augment: Augment
) -> Bool[np.ndarray, "K H W"] | None:
    """Where held-out images show an object, at the size of evaluation images; None: no masks."""
    masks = data.object_masks(data.held_out, indices)
    if masks is None:
        return None
    levels = augment.denormalize(augment.evaluation(masks))
    return np.asarray(levels).mean(-1) > 127


@functools.lru_cache(maxsize=2)
def jit_training_views(
    method: EvaluatedMethod, augment: Augment, mesh: Mesh
) -> Callable[[Batch], tuple[Array, dict[str, Array]]]:
    """Jitted canvases -> (crops as levels 0 .. 255 [K, H, W, C], views), drawn as in training.

    The result is on all processes.
    """

    def draw(canvases: Batch) -> tuple[Array, dict[str, Array]]:
        keys = jax.random.split(jax.random.key(0), len(canvases["image"]))
        crops = augment.denormalize(augment(keys, canvases))
        return crops, _first_masks(method.sample(jax.random.key(0), keys), len(keys))

    return jax.jit(draw, out_shardings=sharding.replicated(mesh))


def _first_masks(views: dict[str, Array], images: int) -> dict[str, Array]:
    """One row of each image of what `sample` returns: where it has several masks, the first."""
    return {name: rows[:: len(rows) // images] for name, rows in views.items()}


@functools.lru_cache(maxsize=2)
def _jit_encode(
    method: EvaluatedMethod, augment: Augment, mesh: Mesh, feature: str
) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """Jitted (params, canvases) -> (images as levels, a feature [K, N, D]), on all processes."""

    def encode(params: Params, canvases: Batch) -> tuple[Array, Array]:
        images = augment.evaluation(canvases)
        tokens = method.features(params, images)[feature].astype(jnp.float32)
        return augment.denormalize(images), tokens

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def pca_rgb(tokens: Float[np.ndarray, "K N D"]) -> Float[np.ndarray, "K N 3"]:
    """The three principal components of all patches of all images, as colors in 0 .. 1.

    Each component is stretched so that its 2nd and 98th percentiles are 0 and 1.
    """
    images, patches, width = tokens.shape
    flat = tokens.reshape(-1, width)
    centered = flat - flat.mean(axis=0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:3]
    axes = np.pad(axes, ((0, 3 - len(axes)), (0, 0)))
    components = centered @ axes.T
    low, high = np.percentile(components, (2, 98), axis=0)
    colors = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colors.reshape(images, patches, 3)


def training_windows(
    method: EvaluatedMethod, views: dict[str, Any], k: int, number: int = 0
) -> list[tuple[int, int, int, bool]]:
    """The patches of a training image.

    Args:
      method: the pretraining method.
      views: what its `sample` returned, numpy.
      k: index of the image.
      number: of the modality.

    Returns:
      (top, left, side, visible) of each patch, in pixels of the crop.
    """
    height, width = method.image_size
    rows, columns = method.grid
    if "offsets" in views:
        offsets = views["offsets"][k].reshape(-1, 2)
    else:
        offsets = np.zeros((rows * columns, 2), int)
    visible = set((_visible_patches(views, k) - number * rows * columns).tolist())
    windows = []
    for i, (top, left) in enumerate(offsets.tolist()):
        row, column = divmod(i, columns)
        top += row * (height // rows)
        left += column * (width // columns)
        windows.append((top, left, method.patch_size, i in visible))
    return windows


def _visible_patches(views: dict[str, Any], k: int) -> Int[np.ndarray, " V"]:
    """Indices of the patches that the online encoder sees, without padding."""
    visible = views["visible"][k]
    if "visible_mask" in views:
        return visible[views["visible_mask"][k]]
    return visible


def whole_images(data: EvaluationData, canvases: Batch) -> list[UInt8[np.ndarray, "H W C"]]:
    """Images cut out of their canvases."""
    gather = jax.jit(_identity, out_shardings=sharding.replicated(data.mesh))
    local = jax.device_get(gather(canvases))
    images = []
    for canvas, (height, width) in zip(local["image"], local["size"], strict=True):
        images.append(canvas[:height, :width])
    return images


def _identity(tree: Batch) -> Batch:
    return tree
