"""Video object segmentation by label propagation from nearest patches (DINO, Caron et al. 2021).

The objects of the first frame are followed through the video without training. The label of a patch
is the mean of the labels of its `topk` most similar patches, weighted by exp(cosine / temperature),
in the first frame and the `past` previous frames, within a square of `radius` patches. The metrics
are J and F as defined by DAVIS 2017, averaged over all objects, and their mean; `still_JF` is the
mean for the unchanged mask of the first frame, which a tracker must exceed.

Source: the official DINO `eval_video_segmentation.py`, but frames are resized with antialiased
bicubic interpolation.

Letters: T frames, F frames in the context, h w grid rows and columns, N = h w patches, D width,
L labels (0: background), H W height and width of a frame, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from lmim_jax.data.eval import video_clips
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers, davis_metrics, patch_features
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.utils.errors import UserError

# The long side of frames is a multiple of this many patches (in DINO 64 pixels, 4 patches of 16)
LONG_SIDE_UNIT = 4

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Label propagation on one feature; the fields are explained in configs/evaluate.py."""

    path: str
    listed: str
    feature: str
    side: int
    topk: int
    radius: int
    past: int
    temperature: float
    batch_size: int

    takes = "patches"
    supports_pixel_baselines = True
    cost = 8.0

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"J", "F", "JF", "still_JF"} in percent, means over all objects of all clips."""
        side = self.side or 2 * min(data.augment.eval_size)
        if side % method.patch_size:
            raise UserError(
                f"video_segmentation: side={side} is not a multiple of the patch size, "
                f"{method.patch_size}"
            )
        if data.config.channels not in (1, 3):
            raise UserError(
                f"video_segmentation: frames are gray or in colors, and this run has "
                f"{data.config.channels} channels"
            )
        tracked = []
        still = []
        for clip in video_clips.open_clips(self.path, self.listed):
            data.check()
            truth = np.stack([clip.mask(time) for time in range(len(clip))])
            first = truth[0]
            if not first.any():
                raise UserError(
                    f"clip {clip.name}: the mask of its first frame shows no object to follow"
                )
            found = self._track(method, params, data, clip, first, side)
            tracked.append(davis_metrics.object_scores(truth, found))
            unchanged = np.broadcast_to(first, truth.shape)
            still.append(davis_metrics.object_scores(truth, unchanged))
        region, contour = 100 * np.concatenate(tracked).mean(axis=0)
        return {
            "J": float(region),
            "F": float(contour),
            "JF": float(region + contour) / 2,
            "still_JF": float(100 * np.concatenate(still).mean()),
        }

    def _track(
        self,
        method: EvaluatedMethod,
        params: Params,
        data: EvaluationData,
        clip: video_clips.Clip,
        first: Int[np.ndarray, "H W"],
        side: int,
    ) -> Int[np.ndarray, "T H W"]:
        """Masks of all frames, given the first one."""
        frames = np.stack([clip.frame(time, data.config.channels) for time in range(len(clip))])
        images = resize_frames(frames, side, LONG_SIDE_UNIT * method.patch_size)
        height, width = images.shape[1:3]
        grid = (height // method.patch_size, width // method.patch_size)
        tokens = self._encode(method, params, data, images)
        known = [_one_hot_labels(first, grid)]
        masks = [first]
        propagate = jit_propagate(grid, self.topk, self.radius, self.temperature, self.past + 1)
        for time in range(1, len(clip)):
            context, valid = self._context(time)
            context_labels = np.stack([known[i] for i in context])
            labels = np.asarray(propagate(tokens[time], tokens[context], context_labels, valid))
            known.append(labels)
            label_map = labels.reshape(grid[0], grid[1], -1)
            masks.append(_labels_to_mask(label_map, (height, width), first.shape))
        return np.stack(masks)

    def _context(self, time: int) -> tuple[Int[np.ndarray, " F"], Bool[np.ndarray, " F"]]:
        """Indices of the frames that labels are propagated from, and which of them are valid.

        There are always past + 1 frames, so that only one shape is compiled for.
        """
        size = self.past + 1
        frames = [0, *range(max(1, time - self.past), time)]
        return np.pad(frames, (0, size - len(frames))), np.arange(size) < len(frames)

    def _encode(
        self,
        method: EvaluatedMethod,
        params: Params,
        data: EvaluationData,
        images: UInt8[np.ndarray, "T H W C"],
    ) -> Float[np.ndarray, "T N D"]:
        """Patch features of all frames, scaled to length 1."""
        encode = patch_features.jit_patch_vectors(method, data.augment, data.mesh, self.feature)
        size = -(-self.batch_size // data.mesh.size) * data.mesh.size
        tokens = []
        for start in range(0, len(images), size):
            levels = images[start : start + size].astype(np.float32)
            batch = np.asarray(data.augment.normalize(levels))
            padded = np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
            found = np.asarray(jax.device_get(encode(params, padded)))
            check_finite(found[: len(batch)], params, padded)
            tokens.append(found[: len(batch)])
        return classifiers.l2_normalize_rows(np.concatenate(tokens))


def resize_frames(
    frames: UInt8[np.ndarray, "T H W C"], side: int, unit: int
) -> UInt8[np.ndarray, "T H2 W2 C"]:
    """Frames with a short side of `side`, and a long side of `side` or a multiple of `unit`."""
    height, width = frames.shape[1:3]
    long_side = side * max(height, width) // min(height, width) // unit * unit
    long_side = max(side, long_side)
    size = (long_side, side) if width >= height else (side, long_side)
    resized = []
    for frame in frames:
        image = Image.fromarray(frame.squeeze()).resize(size, Image.Resampling.BICUBIC)
        resized.append(np.asarray(image).reshape(size[1], size[0], -1))
    return np.stack(resized)


def _one_hot_labels(mask: Int[np.ndarray, "H W"], grid: Grid) -> Float[np.ndarray, "N L"]:
    """One-hot labels of patches from a mask, by nearest pixels."""
    one_hot = np.eye(mask.max() + 1, dtype=np.float32)
    rows, columns = grid
    image = Image.fromarray(mask.astype(np.uint8))
    small = np.asarray(image.resize((columns, rows), Image.Resampling.NEAREST))
    return one_hot[small].reshape(-1, len(one_hot))


@functools.lru_cache(maxsize=8)
def jit_propagate(
    grid: Grid, topk: int, radius: int, temperature: float, context: int
) -> Callable[..., Float[Array, "N L"]]:
    """Compile the propagation of labels to a frame.

    Args:
      grid: rows and columns of patches.
      topk: number of similar patches.
      radius: the largest distance of similar patches, along either axis.
      temperature: of the weights.
      context: F, number of frames that labels are propagated from.

    Returns:
      Jitted (features of the frame [N, D], features of the context [F, N, D], labels of the
      context [F, N, L], which frames of the context are valid [F]) -> labels of the frame [N, L].
    """
    rows, columns = grid
    number_of_patches = rows * columns
    row, column = np.divmod(np.arange(number_of_patches), columns)
    near_rows = np.abs(row[:, None] - row[None, :]) <= radius
    near_columns = np.abs(column[:, None] - column[None, :]) <= radius
    near = near_rows & near_columns  # [N, N]
    topk = min(topk, context * number_of_patches)

    def propagate(frame: Array, tokens: Array, labels: Array, valid: Array) -> Array:
        cosine = jnp.einsum("nd,fmd->nfm", frame, tokens, precision=jax.lax.Precision.HIGHEST)
        allowed = near[:, None] & valid[None, :, None]
        largest = jnp.max(cosine, axis=(1, 2), keepdims=True, where=allowed, initial=-jnp.inf)
        # Over the largest, as exp may be too large for float32
        weight = jnp.where(allowed, jnp.exp((cosine - largest) / temperature), 0.0)
        weight = weight.reshape(number_of_patches, -1)
        smallest = jax.lax.top_k(weight, topk)[0][:, -1:]
        weight = jnp.where(weight < smallest, 0.0, weight)
        weight /= weight.sum(axis=1, keepdims=True)
        labels = labels.reshape(-1, labels.shape[-1])
        return jnp.matmul(weight, labels, precision=jax.lax.Precision.HIGHEST)

    return jax.jit(propagate)


def _labels_to_mask(
    labels: Float[np.ndarray, "h w L"], size: tuple[int, int], out: tuple[int, ...]
) -> Int[np.ndarray, "H W"]:
    """The label with the largest value at each pixel.

    Labels are enlarged bilinearly to `size`, and each is stretched to 0 .. 1; then the mask is
    resized to the size of the frame, `out`, by nearest pixels.
    """
    planes = []
    for label in range(labels.shape[-1]):
        plane = np.asarray(_resize_bilinear(labels[..., label], size))
        if plane.max() > 0:
            spread = np.ptp(plane) or 1.0
            plane = (plane - plane.min()) / spread
        planes.append(plane)
    mask = Image.fromarray(np.argmax(planes, axis=0).astype(np.uint8))
    height, width = out
    return np.asarray(mask.resize((width, height), Image.Resampling.NEAREST)).astype(np.int32)


def _resize_bilinear(plane: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Image.Image:
    """A plane at another size (height, width), with half-pixel centers."""
    height, width = size
    image = Image.fromarray(plane.astype(np.float32))
    return image.resize((width, height), Image.Resampling.BILINEAR)
