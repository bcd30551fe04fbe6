"""Objects of the first frame followed through a video by nearest patches alone (DINO, Caron et al. 2021).

The label of a patch is the mean of those of its `topk` most similar patches, weighted by exp(cosine / temperature), in
the first frame and the `past` frames before, not farther than `radius` patches away (a square). Then J and F as DAVIS
2017 measures them, of every object, and their mean; `still_JF` is that of the first mask, kept: what a tracker has to
beat. Source: the official DINO `eval_video_segmentation.py` (but for bicubic, antialiased resizing of frames).

Letters: T frames, F frames in the context, h w grid rows and columns, N = h w patches, D width, C labels (0: none).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lmim_jax.evaluators.common import davis_metrics, patch_features
from lmim_jax.utils.errors import UserError

STEP = (
    4  # the long side is a multiple of so many patches: of DINO's 64 pixels, where patches have 16
)


@dataclasses.dataclass(frozen=True)
class Evaluator:
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

    takes_pixels = True

    def run(self, method, params, data):
        """{"J", "F", "JF", "still_JF"} in percent, means over all objects of all clips."""
        side = self.side or 2 * min(data.augment.eval_size)
        if side % method.patch_size:
            raise UserError(
                f"video: side={side} is no multiple of the patch size, {method.patch_size}"
            )
        followed, still = [], []
        for clip in data.clips(self.path, self.listed):
            data.check()
            truth = np.stack([clip.mask(time) for time in range(len(clip))])
            if not truth[0].any():
                raise UserError(
                    f"clip {clip.name}: the mask of its first frame shows no object to follow"
                )
            found = self._follow(method, params, data, clip, truth[0], side)
            followed.append(davis_metrics.scores(truth, found))
            still.append(davis_metrics.scores(truth, np.broadcast_to(truth[0], truth.shape)))
        j, f = 100 * np.concatenate(followed).mean(axis=0)
        return {
            "J": float(j),
            "F": float(f),
            "JF": float(j + f) / 2,
            "still_JF": float(100 * np.concatenate(still).mean()),
        }

    def _follow(self, method, params, data, clip, first, side):
        """Masks of all frames, int [T, H, W], from the first one."""
        frames = np.stack([clip.frame(time, data.config.channels) for time in range(len(clip))])
        images = _resized(frames, side, STEP * method.patch_size)
        grid = tuple(side // method.patch_size for side in images.shape[1:3])
        tokens = self._features(method, params, data, images)
        labels = np.eye(first.max() + 1, dtype=np.float32)
        small = np.asarray(
            Image.fromarray(first.astype(np.uint8)).resize(grid[::-1], Image.Resampling.NEAREST)
        )
        known = [labels[small].reshape(-1, len(labels))]
        step = _propagate(grid, self.topk, self.radius, self.temperature, self.past + 1)
        found = [first]
        for time in range(1, len(clip)):
            context = [0, *range(max(1, time - self.past), time)]
            rows = np.pad(context, (0, self.past + 1 - len(context)))  # one shape, one compilation
            there = np.arange(self.past + 1) < len(context)
            known.append(
                np.asarray(
                    step(tokens[time], tokens[rows], np.stack([known[i] for i in rows]), there)
                )
            )
            found.append(_drawn(known[-1].reshape(*grid, -1), images.shape[1:3], first.shape))
        return np.stack(found)

    def _features(self, method, params, data, images):
        """Patch features of all frames, of length 1: float32 [T, N, D]."""
        encode = patch_features.encoder(method, data.augment, data.mesh, self.feature)
        size = -(-self.batch_size // data.mesh.size) * data.mesh.size
        rows = []
        for start in range(0, len(images), size):
            part = np.asarray(
                data.augment.normalize(images[start : start + size].astype(np.float32))
            )
            padded = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            rows.append(np.asarray(jax.device_get(encode(params, padded)))[: len(part)])
        tokens = np.concatenate(rows)
        return tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)


def _resized(frames, side, unit):
    """Frames [T, H, W, C] with a short side of `side` and a long one that is a multiple of `unit`, or `side` too."""
    height, width = frames.shape[1:3]
    long = max(side, side * max(height, width) // min(height, width) // unit * unit)
    size = (long, side) if width >= height else (side, long)
    resized = [
        Image.fromarray(frame.squeeze()).resize(size, Image.Resampling.BICUBIC) for frame in frames
    ]
    return np.stack([np.asarray(frame).reshape(*size[::-1], -1) for frame in resized])


@functools.lru_cache(maxsize=8)
def _propagate(grid, topk, radius, temperature, context):
    """Jitted (frame [N, D], context [F, N, D], its labels [F, N, C], there bool [F]) -> labels of the frame [N, C]."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    apart = lambda x: np.abs(x[:, None] - x[None, :])
    near = (apart(row) <= radius) & (apart(column) <= radius)  # [N, N]
    topk = min(topk, context * len(row))

    def step(frame, tokens, labels, there):
        cosine = jnp.einsum("nd,fmd->nfm", frame, tokens, precision=jax.lax.Precision.HIGHEST)
        weight = jnp.where(near[:, None] & there[None, :, None], jnp.exp(cosine / temperature), 0.0)
        weight = weight.reshape(len(row), -1)
        least = jax.lax.top_k(weight, topk)[0][:, -1:]
        weight = jnp.where(weight < least, 0.0, weight)
        weight /= weight.sum(axis=1, keepdims=True)
        return jnp.matmul(
            weight, labels.reshape(-1, labels.shape[-1]), precision=jax.lax.Precision.HIGHEST
        )

    return jax.jit(step)


def _drawn(labels, size, out):
    """Soft labels [h, w, C] -> the largest at every pixel, int32 of shape `out`.

    Enlarged bilinearly to `size`, each label stretched to 0 .. 1, then the nearest pixels of the frame's own size.
    """
    planes = [np.asarray(_enlarged(labels[..., c], size)) for c in range(labels.shape[-1])]
    stretched = [
        (plane - plane.min()) / (np.ptp(plane) or 1.0) if plane.max() > 0 else plane
        for plane in planes
    ]
    winner = Image.fromarray(np.argmax(stretched, axis=0).astype(np.uint8))
    return np.asarray(winner.resize(out[::-1], Image.Resampling.NEAREST)).astype(np.int32)


def _enlarged(plane, size):
    """A plane [h, w] at another size, bilinearly, half-pixel centres."""
    return Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
