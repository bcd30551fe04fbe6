"""FCOS: which place learns which box, the loss, and detections.

A place is a vector of a map of the pyramid; it lies at the middle of its cell. Boxes are left, top,
right, bottom in pixels of the input.

Source: FCOS (Tian et al., ICCV 2019, arXiv 1904.01355; extended as arXiv 2006.09214).

Letters: B batch, L places of all maps, M boxes of an image, K classes, P candidates.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

# Of the focal loss (Lin et al., ICCV 2017), as in FCOS
ALPHA = 0.25
GAMMA = 2.0
MOST_STRIDES = 1000.0  # of a distance, against overflow
RANGE = 4.0  # a map learns boxes of 4 .. 8 strides: 64 .. 128 pixels at a stride of 16
CANDIDATES = 1000  # of each map, with the highest scores; as in FCOS


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of all maps.

    Attributes:
      points: x and y of each.
      strides: of its map.
      low: the largest of the four distances to its box is at least this.
      high: and at most this.
      counts: places of each map.
    """

    points: Float[np.ndarray, "L 2"]
    strides: Float[np.ndarray, " L"]
    low: Float[np.ndarray, " L"]
    high: Float[np.ndarray, " L"]
    counts: tuple[int, ...]


def lay_out(grid: tuple[int, int], strides: tuple[float, ...], patch_size: int) -> Places:
    """The places of a `SimpleFeaturePyramid`.

    Args:
      grid: rows and columns of patches of the input.
      strides: of the maps, in pixels, the finest first.
      patch_size: side of a patch in pixels.
    """
    points = []
    stride_of = []
    low = []
    high = []
    counts = []
    rows, columns = (0, 0)
    for level, stride in enumerate(strides):
        if level < len(strides) - 1:
            rows, columns = (int(side * patch_size // stride) for side in grid)
        else:  # every second vector of the map before
            rows, columns = (-(-rows // 2), -(-columns // 2))
        y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        middles = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride
        count = len(middles)
        points.append(middles)
        counts.append(count)
        stride_of.append(np.full(count, stride))
        low.append(np.full(count, RANGE * stride if level else 0.0))
        high.append(np.full(count, 2 * RANGE * stride if level < len(strides) - 1 else np.inf))
    return Places(
        np.concatenate(points).astype(np.float32),
        np.concatenate(stride_of).astype(np.float32),
        np.concatenate(low).astype(np.float32),
        np.concatenate(high).astype(np.float32),
        tuple(counts),
    )


def assign(
    places: Places,
    boxes: Float[Array, "M 4"],
    labels: Int[Array, " M"],
    radius: float,
) -> tuple[Int[Array, " L"], Float[Array, "L 4"]]:
    """What each place learns.

    A place learns a box that it lies in, near its middle, if the largest distance to a side is in
    the range of the map; of several boxes the one with the smallest area, and of equal ones the
    first.

    Args:
      places: of all maps.
      boxes: of an image.
      labels: their classes; -1: padding.
      radius: how far from the middle of its box a place may be, in strides, along either axis; 0:
        anywhere in the box.

    Returns:
      The class of each place, -1: background, and its distances to left, top, right, bottom, which
      have a meaning only where there is a class.

    Source: arXiv 1904.01355, section 3.2, for ranges and areas; center sampling with a radius of
    1.5: arXiv 2006.09214 (there, the region around the middle is cut off at the box).
    """
    x, y = places.points[:, 0, None], places.points[:, 1, None]
    left, top, right, bottom = (boxes[None, :, side] for side in range(4))
    nearest = jnp.minimum(jnp.minimum(x - left, right - x), jnp.minimum(y - top, bottom - y))
    largest = jnp.maximum(jnp.maximum(x - left, right - x), jnp.maximum(y - top, bottom - y))
    suits = (nearest > 0) & (labels >= 0)[None]
    suits &= (largest >= places.low[:, None]) & (largest <= places.high[:, None])
    if radius:
        away = jnp.maximum(jnp.abs(2 * x - left - right), jnp.abs(2 * y - top - bottom)) / 2
        suits &= away < radius * places.strides[:, None]
    area = (right - left) * (bottom - top)
    area = jnp.where(suits, area, jnp.inf)
    chosen = area.argmin(axis=1)
    found = boxes[chosen]
    distances = jnp.concatenate(
        [places.points - found[:, :2], found[:, 2:] - places.points], axis=1
    )
    return jnp.where(suits.any(axis=1), labels[chosen], -1), distances


def centerness(distances: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """1 in the middle of a box, 0 at its border: equation 3 of arXiv 1904.01355."""
    across = jnp.sort(distances[..., 0::2], axis=-1)
    down = jnp.sort(distances[..., 1::2], axis=-1)
    ratio = across[..., 0] * down[..., 0] / jnp.maximum(across[..., 1] * down[..., 1], 1e-12)
    return jnp.sqrt(jnp.maximum(ratio, 0.0))


def generalized_iou(
    predicted: Float[Array, "... 4"], target: Float[Array, "... 4"]
) -> Float[Array, "..."]:
    """Generalized IoU of boxes around the same place, -1 .. 1 (Rezatofighi et al., CVPR 2019).

    Args:
      predicted: distances to left, top, right, bottom, all positive.
      target: likewise.
    """

    def area(distances: Array) -> Array:
        sides = distances[..., :2] + distances[..., 2:]
        return sides[..., 0] * sides[..., 1]

    inner = area(jnp.minimum(predicted, target))
    outer = area(jnp.maximum(predicted, target))
    union = area(predicted) + area(target) - inner
    return inner / union - (outer - union) / outer


def decode_distances(x: Float[Array, "... L 4"]) -> Float[Array, "... L 4"]:
    """Distances in strides from the outputs of the network."""
    return jnp.exp(jnp.minimum(x, math.log(MOST_STRIDES)))


def loss(
    outputs: dict[str, Float[Array, "B L _"]],
    labels: Int[Array, "B L"],
    distances: Float[Array, "B L 4"],
    strides: Float[np.ndarray, " L"],
) -> Float[Array, ""]:
    """The loss of a batch: classes, boxes and centerness.

    Classes have the focal loss, divided by the number of places with a box. Boxes have 1 - GIoU,
    weighted by their centerness and divided by its sum. Centerness has the binary cross-entropy.

    Args:
      outputs: see `pyramid.FcosHead`.
      labels: see `assign`.
      distances: see `assign`; in pixels.
      strides: of all places.

    Source: the authors' code with its improvements (arXiv 2006.09214); the first version had the
    logarithm of IoU instead of GIoU.
    """
    is_box = labels >= 0
    count = jnp.maximum(is_box.sum(), 1)
    classes = outputs["logits"].shape[-1]
    focal = optax.sigmoid_focal_loss(
        outputs["logits"], jax.nn.one_hot(labels, classes), alpha=ALPHA, gamma=GAMMA
    )
    # The values of places without a box have no meaning, and must not make gradients NaN
    target = jnp.where(is_box[..., None], distances / strides[None, :, None], 1.0)
    weight = jnp.where(is_box, centerness(target), 0.0)
    found = decode_distances(outputs["distances"])
    boxes = (1 - generalized_iou(found, target)) * weight
    near = optax.sigmoid_binary_cross_entropy(outputs["centerness"][..., 0], weight)
    near = jnp.where(is_box, near, 0.0)
    return focal.sum() / count + boxes.sum() / jnp.maximum(weight.sum(), 1e-6) + near.sum() / count


def candidates(
    outputs: dict[str, Float[Array, "B L _"]], places: Places
) -> tuple[Float[Array, "B P 4"], Float[Array, "B P"], Int[Array, "B P"], Float[Array, "B P"]]:
    """The boxes with the highest scores of each map.

    A score is the square root of class times centerness, as in the authors' code.

    Returns:
      Boxes, their scores, their classes, and the probability of these.
    """
    probability = jax.nn.sigmoid(outputs["logits"])
    score = jnp.sqrt(probability * jax.nn.sigmoid(outputs["centerness"]))
    distances = decode_distances(outputs["distances"]) * places.strides[None, :, None]
    points = jnp.asarray(places.points)[None]
    boxes = jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)
    classes = score.shape[-1]
    parts: list[list[Array]] = [[], [], [], []]
    start = 0
    for count in places.counts:
        flat = score[:, start : start + count].reshape(len(score), -1)
        best, index = jax.lax.top_k(flat, min(CANDIDATES, flat.shape[1]))
        place = start + index // classes
        parts[0].append(jnp.take_along_axis(boxes, place[..., None], axis=1))
        parts[1].append(best)
        parts[2].append(index % classes)
        of_map = probability[:, start : start + count].reshape(len(score), -1)
        parts[3].append(jnp.take_along_axis(of_map, index, axis=1))
        start += count
    found_boxes, scores, labels, probabilities = (jnp.concatenate(part, axis=1) for part in parts)
    return found_boxes, scores, labels, probabilities


def suppress(
    boxes: Float[np.ndarray, "P 4"],
    scores: Float[np.ndarray, " P"],
    labels: Int[np.ndarray, " P"],
    overlap: float,
    most: int,
) -> Int[np.ndarray, " _"]:
    """Non-maximum suppression within each class.

    Args:
      boxes: of an image.
      scores: of the boxes.
      labels: their classes.
      overlap: a box whose IoU with a better one of its class is above this is left out.
      most: so many boxes are kept.

    Returns:
      The indices of the kept boxes, the best first.
    """
    kept = []
    for label in np.unique(labels):
        order = np.flatnonzero(labels == label)
        order = order[np.argsort(-scores[order], kind="stable")]
        while len(order):
            kept.append(order[0])
            rest = order[1:]
            order = rest[iou(boxes[order[0]], boxes[rest]) <= overlap]
    found = np.array(kept, np.int64)
    return found[np.argsort(-scores[found], kind="stable")[:most]]


def iou(box: Float[np.ndarray, "4"], others: Float[np.ndarray, "P 4"]) -> Float[np.ndarray, " P"]:
    """Intersection over union of a box and others."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    inner = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    union = np.prod(box[2:] - box[:2]) + areas - inner
    return inner / np.maximum(union, 1e-12)
