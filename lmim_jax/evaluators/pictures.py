"""Pictures of a few fixed held-out images: what the model is given, and what its features see.

Letters: K images, h w grid rows and columns, D width.
"""

import dataclasses

import jax
import numpy as np
from scipy.cluster import hierarchy

from lmim_jax import pictures, sharding


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Two pictures; the fields are explained in configs/vit_b.py."""

    feature: str
    images: int
    zoom: int
    clusters: int

    def run(self, method, params, data):
        """{"given": picture, "seen": picture}."""
        batch, indices = data.sample(data.held_out, self.images)
        return {
            "given": self._given(method, data, batch, len(indices)),
            "seen": self._seen(method, params, data, batch, indices),
        }

    def _given(self, method, data, batch, count):
        """Crops, windows and masks, drawn as in training; the same draw at every evaluation."""

        def draw(batch):
            keys = jax.random.split(jax.random.key(0), len(batch["image"]))
            return data.augment.levels(data.augment(keys, batch)), method.sample(jax.random.key(0), keys)

        canvases = {name: batch[name] for name in ("image", "size")}
        crops, views = _on_host(draw, data.mesh, canvases)
        windows = [_windows(method, views, k) for k in range(count)]
        return pictures.masking(_whole(data, canvases)[:count], crops[:count], windows)

    def _seen(self, method, params, data, batch, indices):
        """PCA and clusters of the features of enlarged images, on a grid `zoom` times as fine as in training."""
        enlarged = dataclasses.replace(
            data.augment,
            eval_resize=self.zoom * data.augment.eval_resize,
            eval_size=tuple(self.zoom * side for side in data.augment.eval_size),
        )

        def of(params, batch):
            images = enlarged.evaluation(batch)
            return enlarged.levels(images), method.features(params, images)[self.feature]

        inputs, tokens = _on_host(of, data.mesh, params, {name: batch[name] for name in ("image", "size")})
        inputs, tokens = inputs[: len(indices)], tokens[: len(indices)].astype(np.float32)
        grid = tuple(self.zoom * side for side in method.grid)
        masks = data.masks(data.held_out, indices)
        if masks is not None:
            sizes = np.asarray(jax.device_get(batch["size"]))[: len(indices)]
            images = jax.jit(lambda batch: enlarged.levels(enlarged.evaluation(batch)))({"image": masks, "size": sizes})
            masks = np.asarray(images).mean(-1) > 127
        clusters = np.stack([cluster(of_image, self.clusters) for of_image in tokens])
        count = len(tokens)
        return pictures.features(
            inputs, pca_rgb(tokens).reshape(count, *grid, 3), clusters.reshape(count, *grid), masks
        )


def pca_rgb(tokens):
    """The three main components of all patches of all images as colours: [K, N, D] -> [K, N, 3] in 0 .. 1.

    Each component is stretched so that its 2nd and 98th percentiles are 0 and 1.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    centered = flat - flat.mean(axis=0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:3]
    components = centered @ np.pad(axes, ((0, 3 - len(axes)), (0, 0))).T
    low, high = np.percentile(components, (2, 98), axis=0)
    return np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(*tokens.shape[:2], 3)


def cluster(tokens, count):
    """Clusters of the patches of one image by Ward's hierarchical method: [N, D] -> [N] int, largest cluster 0."""
    labels = hierarchy.fcluster(hierarchy.linkage(tokens, "ward"), count, "maxclust") - 1
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    return np.argsort(order)[labels]


def _on_host(function, mesh, *args):
    """A function of sharded arrays, computed by all processes together; its results, numpy, on each of them."""
    return jax.device_get(jax.jit(function, out_shardings=sharding.replicated(mesh))(*args))


def _windows(method, views, k):
    """Patches of training image k: a list of (top, left, side, visible), in pixels of the crop."""
    (height, width), (h, w) = method.image_size, method.grid
    offsets = views["offsets"][k].reshape(-1, 2) if "offsets" in views else np.zeros((h * w, 2), int)
    visible = set(views["visible"][k].tolist())
    return [
        (i // w * (height // h) + top, i % w * (width // w) + left, method.patch_size, i in visible)
        for i, (top, left) in enumerate(offsets.tolist())
    ]


def _whole(data, canvases):
    """The images as they are, cut out of their canvases: a list of [H, W, C]."""
    images, sizes = _on_host(lambda batch: (batch["image"], batch["size"]), data.mesh, canvases)
    return [image[:height, :width] for image, (height, width) in zip(images, sizes, strict=True)]
