"""Pictures of a few fixed held-out images: what the model is given, and what its features see.

Letters: K images, h w grid rows and columns, D width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import clustering, patch_features
from lmim_jax.utils import plotting

REFERENCE = (
    64  # images whose mean feature at each position is subtracted: what is left tells of the image
)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Two pictures; the fields are explained in configs/vit_b.py."""

    feature: str
    images: int
    zoom: int
    clusters: int

    def run(self, method, params, data):
        """{"given": picture, "seen": picture}."""
        batch, indices = data.sample(data.held_out, max(self.images, REFERENCE))
        canvases = {name: batch[name] for name in ("image", "size")}
        return {
            "given": self._given(method, data, canvases, indices),
            "seen": self._seen(method, params, data, canvases, indices),
        }

    def _given(self, method, data, canvases, indices):
        """Crops, windows and masks, drawn as in training; the same draw at every evaluation."""
        crops, views = jax.device_get(drawing(method, data.augment, data.mesh)(canvases))
        count = min(self.images, len(indices))
        windows = [windows_of(method, views, k) for k in range(count)]
        return plotting.plot_masking(whole_images(data, canvases)[:count], crops[:count], windows)

    def _seen(self, method, params, data, canvases, indices):
        """PCA and clusters of the features of enlarged images, on a grid `zoom` times as fine as in training."""
        enlarged = patch_features.enlarged(data.augment, self.zoom)
        inputs, tokens = jax.device_get(
            _encode(method, enlarged, data.mesh, self.feature)(params, canvases)
        )
        tokens = tokens[: len(indices)]
        tokens = (tokens - tokens.mean(axis=0))[: self.images]
        masks = data.object_masks(data.held_out, indices[: self.images])
        if masks is not None:
            masks = np.asarray(enlarged.levels(enlarged.evaluation(masks))).mean(-1) > 127
        shape = (len(tokens), *(self.zoom * side for side in method.grid))
        clusters = np.stack(
            [clustering.nested(of_image, (self.clusters,))[self.clusters] for of_image in tokens]
        )
        colors = pca_rgb(tokens).reshape(*shape, 3)
        return plotting.plot_features(inputs[: self.images], colors, clusters.reshape(shape), masks)


@functools.lru_cache(maxsize=2)
def drawing(method, augment, mesh):
    """Jitted canvases -> (crops as levels, views), drawn as in training, on all processes."""

    def draw(canvases):
        keys = jax.random.split(jax.random.key(0), len(canvases["image"]))
        return augment.levels(augment(keys, canvases)), method.sample(jax.random.key(0), keys)

    return jax.jit(draw, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=2)
def _encode(method, augment, mesh, feature):
    """Jitted (params, canvases) -> (images as levels, a feature [K, N, D] float32), on all processes."""

    def encode(params, canvases):
        images = augment.evaluation(canvases)
        return augment.levels(images), method.features(params, images)[feature].astype(jnp.float32)

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def pca_rgb(tokens):
    """The three main components of all patches of all images as colours: [K, N, D] -> [K, N, 3] in 0 .. 1.

    Each component is stretched so that its 2nd and 98th percentiles are 0 and 1.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    centered = flat - flat.mean(axis=0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:3]
    components = centered @ np.pad(axes, ((0, 3 - len(axes)), (0, 0))).T
    low, high = np.percentile(components, (2, 98), axis=0)
    return np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(
        *tokens.shape[:2], 3
    )


def windows_of(method, views, k):
    """Patches of training image k: a list of (top, left, side, visible), in pixels of the crop."""
    (height, width), (h, w) = method.image_size, method.grid
    offsets = (
        views["offsets"][k].reshape(-1, 2) if "offsets" in views else np.zeros((h * w, 2), int)
    )
    visible = views["visible"][k]
    visible = set(
        visible[views["visible_mask"][k]].tolist() if "visible_mask" in views else visible.tolist()
    )
    return [
        (i // w * (height // h) + top, i % w * (width // w) + left, method.patch_size, i in visible)
        for i, (top, left) in enumerate(offsets.tolist())
    ]


def whole_images(data, canvases):
    """The images as they are, cut out of their canvases: a list of [H, W, C]."""
    copy = jax.jit(lambda x: x, out_shardings=sharding.replicated(data.mesh))
    canvases = jax.device_get(copy(canvases))
    return [
        canvas[:h, :w] for canvas, (h, w) in zip(canvases["image"], canvases["size"], strict=True)
    ]
