"""Frozen features of image files of any size, in batches of images of one shape.

Letters: B batch, I images, N patches, D width, H W image height and width, C channels.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.data.augment.device import Augment
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import EvaluatedMethod, Params
from lmim_jax.utils import faults

KINDS = ("cls", "mean", "patches")
MAX_ASPECT = 20  # the patches of more elongated images may not fit in memory

Size = tuple[int, int]


class ExtractedFeatures(NamedTuple):
    """Features of the readable images of a folder, in the order of their names.

    Attributes:
      names: names of the images.
      grids: rows and columns of their patches.
      features: by kind, an array per image: [D], and for "patches" [N, D].
      unreadable: (name, problem) of the other files.
    """

    names: list[str]
    grids: Int32[np.ndarray, "I 2"]
    features: dict[str, list[Float32[np.ndarray, "..."]]]
    unreadable: list[tuple[str, str]]


class Extractor:
    """A frozen encoder for images of any size, on all devices of this process.

    Attributes:
      method: the pretraining method.
      size: the short side of resized images, in pixels.
      kinds: the requested features, of KINDS.
      batch_size: images encoded at a time.
    """

    def __init__(
        self,
        method: EvaluatedMethod,
        params: Params,
        transform: Augment,
        *,
        size: int,
        kinds: Sequence[str],
        norm: bool,
        batch_size: int,
    ) -> None:
        """Place the weights on the devices.

        Args:
          method: see the attributes of the class, also for `size`, `kinds` and `batch_size`.
          params: weights of the method.
          transform: gives the normalization and the interpolation.
          norm: features after the final norm; or before it.
        """
        self.method = method
        self.size = size
        self.kinds = kinds
        self.batch_size = batch_size
        self._resample = Image.Resampling[transform.interpolation.upper()]
        suffix = "" if norm else "_prenorm"

        def encode(params: Params, images: UInt8[Array, "B H W C"]) -> dict[str, Array]:
            features = method.features(params, transform.normalize(images.astype(jnp.float32)))
            patches = features[f"patches{suffix}"].astype(jnp.float32)
            found = {"patches": patches, "mean": patches.mean(axis=1)}
            if "cls" in features:
                found["cls"] = features[f"cls{suffix}"].astype(jnp.float32)
            return {kind: found[kind] for kind in kinds if kind in found}

        mesh = sharding.make_mesh(devices=jax.local_devices())
        self._placement = sharding.batch_sharding(mesh)
        self._encode = jax.jit(encode, out_shardings=self._placement)
        self._params = jax.device_put(params, sharding.replicated(mesh))

    def shape(self, height: int, width: int) -> Size:
        """Height and width in pixels that an image of this size is resized to."""
        short = min(height, width)
        return self._resized_side(height, short), self._resized_side(width, short)

    def _resized_side(self, side: int, short: int) -> int:
        """The resized length of a side: a multiple of the patch size."""
        patch_size = self.method.patch_size
        return max(1, round(side * self.size / short / patch_size)) * patch_size

    def prepare(self, data: bytes) -> UInt8[np.ndarray, "H W C"]:
        """Decode and resize an image.

        Raises:
          BadImage: the bytes are not an image, or it is too elongated.
        """
        pixels = decode.decode(data, 0, self.method.channels)
        height, width, channels = pixels.shape
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise decode.BadImage(f"the aspect ratio of {width} x {height} pixels is too large")
        out_height, out_width = self.shape(height, width)
        image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
        resized = np.asarray(image.resize((out_width, out_height), self._resample))
        return resized.reshape(out_height, out_width, -1)

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "H W C"]]
    ) -> dict[str, Float32[np.ndarray, "..."]]:
        """Features of images of one shape, by kind: [B, D] and, for patches, [B, N, D]."""
        devices = len(jax.local_devices())
        rows = -(-self.batch_size // devices) * devices
        # One batch size: one compilation per shape of images
        padding = [images[0]] * (rows - len(images))
        batch = np.stack(list(images) + padding)
        found = self._encode(self._params, jax.device_put(batch, self._placement))
        return {kind: np.asarray(value)[: len(images)] for kind, value in found.items()}


class _Batches:
    """Collects images of equal shape and encodes them as soon as they fill a batch."""

    def __init__(self, extractor: Extractor) -> None:
        self.grids: dict[int, Size] = {}
        self.features: dict[int, dict[str, np.ndarray]] = {}
        self._extractor = extractor
        self._waiting: dict[Size, dict[int, np.ndarray]] = {}

    def add(self, index: int, image: UInt8[np.ndarray, "H W C"]) -> int:
        """Add an image; the number of images that were encoded now."""
        shape = image.shape[:2]
        waiting = self._waiting.setdefault(shape, {})
        waiting[index] = image
        if len(waiting) < self._extractor.batch_size:
            return 0
        return self.encode(shape)

    def waiting_shapes(self) -> list[Size]:
        """Shapes of the images that wait for others."""
        return list(self._waiting)

    def encode(self, shape: Size) -> int:
        """Encode the waiting images of a shape; their number."""
        waiting = self._waiting.pop(shape)
        found = self._extractor(list(waiting.values()))
        patch_size = self._extractor.method.patch_size
        for row, index in enumerate(waiting):
            self.grids[index] = (shape[0] // patch_size, shape[1] // patch_size)
            self.features[index] = {kind: value[row] for kind, value in found.items()}
        return len(waiting)


def extract_from_files(
    extractor: Extractor,
    root: str | pathlib.Path,
    names: Sequence[str],
    progress: Callable[[int], object],
) -> ExtractedFeatures:
    """Features of all images that can be read.

    Args:
      extractor: the encoder.
      root: the folder.
      names: paths of the images below it.
      progress: called with numbers of images that are done.
    """

    def read(name: str) -> UInt8[np.ndarray, "H W C"] | Exception:
        path = pathlib.Path(root, name)
        try:
            return faults.retry(
                lambda: extractor.prepare(path.read_bytes()),
                lambda: str(path),
                faults.RETRY_SECONDS,
            )
        except (decode.BadImage, OSError) as error:
            return error

    batches = _Batches(extractor)
    unreadable = []
    read_ahead = 2 * extractor.batch_size
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), read_ahead):
            part = names[start : start + read_ahead]
            for index, image in enumerate(pool.map(read, part), start):
                if isinstance(image, Exception):
                    unreadable.append((names[index], " ".join(str(image).split())))
                    progress(1)
                else:
                    progress(batches.add(index, image))
    for shape in batches.waiting_shapes():
        progress(batches.encode(shape))
    order = sorted(batches.features)
    features: dict[str, list[np.ndarray]] = {}
    for index in order:
        for kind, value in batches.features[index].items():
            features.setdefault(kind, []).append(value)
    grids = np.array([batches.grids[index] for index in order], np.int32)
    return ExtractedFeatures([names[index] for index in order], grids, features, unreadable)
