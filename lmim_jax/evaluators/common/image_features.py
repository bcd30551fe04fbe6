"""The representation of an image: a feature of a method, by its name, as one vector.

"pixels" and "histogram" are features that need no encoder; configs/evaluate.py has the syntax.

Letters: B batch, N images of a split, H W image height and width, C channels, D width of a feature.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32

from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import Batch, EvaluationData, targets_of
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import ENCODER_FREE, EvaluatedMethod, Params
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.utils import array_memory
from lmim_jax.utils.errors import UserError, did_you_mean

POOLS = ("mean", "cls", "both")
HISTOGRAM_LEVELS = 6  # per channel
JOINT_CHANNELS = 4  # of more channels, each has a histogram of its own


class Labeled(NamedTuple):
    """Features of the images of a split.

    Attributes:
      features: one vector each.
      labels: their classes; -1: none.
      indices: the places of the images in their source; None: unknown.
    """

    features: Float[np.ndarray, "N D"]
    labels: Int32[np.ndarray, " N"]
    indices: Int32[np.ndarray, " N"] | None = None

    @property
    def places(self) -> Int32[np.ndarray, " N"]:
        """`indices`, which are known."""
        assert self.indices is not None
        return self.indices


class FeaturePart(NamedTuple):
    """One of the features that are concatenated: its name and how it is pooled, one of POOLS."""

    name: str
    pool: str


def split_features(
    method: EvaluatedMethod,
    params: Params,
    data: EvaluationData,
    split: str,
    feature: str,
    batch_size: int,
) -> Labeled:
    """A feature of every readable image of a split.

    Args:
      method: the pretraining method.
      params: its weights.
      data: the images.
      split: "train" or "test".
      feature: such as "cls" or "cls+patches_prenorm", see `parse_feature`.
      batch_size: images encoded at a time.

    Returns:
      Features and labels in the order of the images; from `data.cache` if they are there.

    Raises:
      UserError: the method has no such feature.
    """

    def compute() -> Labeled:
        return _compute_split_features(method, params, data, split, feature, batch_size)

    # Pixels are not cached: they take more room on disk than time to compute
    if data.cache is None or not needs_encoder(feature):
        return compute()
    return data.cache.get(method, params, data, split, feature, compute)


def labeled_features(
    method: EvaluatedMethod,
    params: Params,
    data: EvaluationData,
    split: str,
    feature: str,
    batch_size: int,
) -> Labeled:
    """`split_features` of the images that have a class, or labels that are no classes.

    Raises:
      UserError: the method has no such feature, or no readable image has a class.
    """
    found = split_features(method, params, data, split, feature, batch_size)
    if data.targets:
        return found
    known = found.labels >= 0
    if not known.any():
        raise UserError(f"no readable image of the {split} split has a class")
    if known.all():
        return found
    # In place: the features are the caller's, and may fill most of the memory
    features = array_memory.compact_rows(found.features, known)
    indices = None if found.indices is None else found.indices[known]
    return Labeled(features, found.labels[known], indices)


def _compute_split_features(
    method: EvaluatedMethod,
    params: Params,
    data: EvaluationData,
    split: str,
    feature: str,
    batch_size: int,
) -> Labeled:
    encode = jit_image_vectors(method, data.augment, data.mesh, feature)
    total = len(data.sources[split])
    labels = np.empty(total, np.int32)
    indices = np.empty(total, np.int32)
    features = np.empty((0, 0), np.float32)
    count = 0
    for batch in data.batches(split, batch_size):
        found = jax.device_get(encode(params, batch))
        valid = found["index"] >= 0
        vectors = found["features"][valid]
        check_finite(vectors, params, batch["images"])
        if not features.size:
            features = array_memory.empty((total, vectors.shape[1]), np.float32)
        features[count : count + len(vectors)] = vectors
        labels[count : count + len(vectors)] = found["label"][valid]
        indices[count : count + len(vectors)] = found["index"][valid]
        count += len(vectors)
    return Labeled(features[:count], labels[:count], indices[:count])


def targets_of_rows(data: EvaluationData, split: str, found: Labeled) -> Float[np.ndarray, "N T"]:
    """The labels, which are no classes, of the images of `labeled_features`."""
    targets = targets_of(data.sources[split])
    assert targets is not None
    return targets.values[found.places]


@functools.lru_cache(maxsize=8)
def jit_image_vectors(
    method: EvaluatedMethod, augment: Augment, mesh: Mesh, feature: str
) -> Callable[[Params, Batch], Batch]:
    """Jitted (params, batch) -> {"features": [B, D], "label": [B], "index": [B]}, replicated."""

    def encode(params: Params, batch: Batch) -> Batch:
        return {
            "features": image_vectors(method, augment, params, batch["images"], feature),
            "label": batch["label"],
            "index": batch["index"],
        }

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def image_vectors(
    method: EvaluatedMethod,
    augment: Augment,
    params: Params,
    images: Float[Array, "B H W C"],
    feature: str,
) -> Float[Array, "B D"]:
    """The vectors that `feature` names, concatenated.

    Args:
      method: the pretraining method.
      augment: the augmentation that normalized the images.
      params: weights of the method.
      images: normalized images.
      feature: such as "cls" or "cls+patches_prenorm", see `parse_feature`.

    Returns:
      float32 [B, D].

    Raises:
      UserError: the method has no such feature.
    """
    parts = parse_feature(feature)
    known: dict[str, Any] = {}
    for part in parts:
        if part.name in ENCODER_FREE:
            known[part.name] = encoder_free_feature(images, augment.denormalize(images), part.name)
    if needs_encoder(feature):
        known.update(method.features(params, images))
    return concatenate_parts(known, feature)


def concatenate_parts(
    features: dict[str, Array], feature: str, mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B D"]:
    """The vectors that `feature` names, concatenated.

    Args:
      features: by name, see `methods.base.Method.features`.
      feature: such as "cls" or "cls+patches_prenorm", see `parse_feature`.
      mask: False for patches that only pad images to equal length; None: there are none.

    Returns:
      float32 [B, D].

    Raises:
      UserError: there is no such feature.
    """
    vectors = [_pool(features, part, mask) for part in parse_feature(feature)]
    return jnp.concatenate(vectors, axis=-1)


def encoder_free_feature(
    images: Float[Array, "B H W C"], levels: Float[Array, "B H W C"], name: str
) -> Float[Array, "B D"]:
    """A feature that needs no encoder, one vector per image.

    Args:
      images: normalized images.
      levels: the same images as levels 0 .. 255.
      name: "pixels": the image itself. "histogram": the square root of the share of pixels in each
        of 6^C colors, so that the cosine of two images is the Bhattacharyya coefficient; of more
        than 4 channels, the same of each channel's 6 levels, one after the other.
    """
    if name == "pixels":
        return images.reshape(len(images), -1)
    level = (levels * (HISTOGRAM_LEVELS / 256)).astype(jnp.int32)
    level = jnp.minimum(level, HISTOGRAM_LEVELS - 1)
    channels = images.shape[-1]
    if channels > JOINT_CHANNELS:
        histograms = [_shares(level[..., i], HISTOGRAM_LEVELS) for i in range(channels)]
        return jnp.sqrt(jnp.concatenate(histograms, axis=-1) / channels)
    color = level @ HISTOGRAM_LEVELS ** jnp.arange(channels)
    return jnp.sqrt(_shares(color, HISTOGRAM_LEVELS**channels))


def _shares(colors: Int[Array, "B H W"], number: int) -> Float[Array, "B N"]:
    """The share of the pixels of each image that have each of N colors."""

    def count_colors(row: Array) -> Array:
        return jnp.bincount(row, length=number)

    return jax.vmap(count_colors)(colors.reshape(len(colors), -1)) / colors[0].size


def parse_feature(feature: str) -> list[FeaturePart]:
    """The parts of a feature: "cls+block07/tokens:both" concatenates two; see configs/evaluate.py.

    Raises:
      UserError: there is no such pool.
    """
    parts = []
    for part in feature.split("+"):
        name, _, pool = part.strip().partition(":")
        pool = pool or "mean"
        if pool not in POOLS:
            raise UserError(f"feature {feature!r}: {pool!r} must be one of: {' | '.join(POOLS)}")
        parts.append(FeaturePart(name, pool))
    return parts


def needs_encoder(feature: str) -> bool:
    """Whether `feature` has a part that is not in ENCODER_FREE."""
    return any(part.name not in ENCODER_FREE for part in parse_feature(feature))


def _pool(
    features: dict[str, Array], part: FeaturePart, mask: Bool[Array, "B N"] | None
) -> Float[Array, "B D"]:
    """One vector per image of a feature of a method.

    In "blockNN/tokens", "/normed" and "/mlp" the first row is that of the CLS token, where the
    method has one: it can be chosen ("cls"), left out ("mean") or concatenated with the mean of the
    others ("both"). Any other feature only has the mean over its rows, or itself where it is one
    vector per image.

    Raises:
      UserError: there is no such feature, it has no vectors, or it has no CLS token to choose.
    """
    name, pool = part
    if name not in features:
        raise UserError(
            f"feature {name!r}: the method has no feature of that name"
            f"{did_you_mean(name, [*features, *ENCODER_FREE])}"
        )
    x = features[name].astype(jnp.float32)
    if x.ndim not in (2, 3):
        raise UserError(f"feature {name!r} has no vectors for images or patches to evaluate")
    has_cls = name.endswith(("/tokens", "/normed", "/mlp")) and "cls" in features
    if pool != "mean" and not has_cls:
        raise UserError(
            f"feature {name!r} has no CLS token for :{pool}; "
            f"concatenate features instead: cls+{name}"
        )
    if x.ndim == 2:
        return x
    if not has_cls:
        return _mean(x, None if name == "registers" else mask)
    cls = x[:, 0]
    mean = _mean(x[:, 1:], mask)
    if pool == "both":
        return jnp.concatenate([cls, mean], axis=-1)
    return cls if pool == "cls" else mean


def _mean(x: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None) -> Float[Array, "B D"]:
    """The mean over the patches that are not padding."""
    if mask is None:
        return x.mean(axis=1)
    weights = mask[..., None].astype(x.dtype)
    return (x * weights).sum(axis=1) / weights.sum(axis=1)
