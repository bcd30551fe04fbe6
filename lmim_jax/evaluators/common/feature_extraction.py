"""Frozen features of image files of any size, with few compiled programs.

A whole image becomes a sequence of patches, which is padded to one of few lengths and masked, so
that images of any aspect ratio are encoded together. A method without `patch_features`, or with
several modalities, needs a program for each size of images. Square crops, as evaluators take them,
all have one size.

Letters: B batch, I images, N patches, P pixel values of a patch, D width, H W image height and
width, C channels, K canvas side.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt8
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.folder_source import FolderSource
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.data.paired_source import PairedSource
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import Params
from lmim_jax.evaluators.common import image_features
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.methods.base import Method
from lmim_jax.models.layers import patchify
from lmim_jax.utils import cores, faults

# Features with a meaning of their own here; any other name is a vector for an image, as evaluators
# understand it: see configs/evaluate.py
KINDS = ("image", "cls", "mean", "patches")
MAX_ASPECT = 20  # the patches of more elongated images may not fit in memory

Size = tuple[int, int]
Batch = dict[str, Array]


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


class PreparedImage(NamedTuple):
    """An image for `Extractor`.

    Attributes:
      shape: images of one shape can be encoded together; see `Extractor.room`.
      grid: rows and columns of patches.
      arrays: what the encoder is given.
    """

    shape: Size
    grid: Size
    arrays: dict[str, np.ndarray]


def select_features(
    features: dict[str, Array],
    kinds: Sequence[str],
    norm: bool,
    image: str,
    mask: Bool[Array, "B N"] | None = None,
) -> dict[str, Array]:
    """The requested ones of the features of a batch, float32.

    Args:
      features: what `method.features` returned.
      kinds: names of KINDS, or of other features as `image_features.parse_feature` takes them.
      norm: whether those of KINDS, except "image", are taken after the final norm.
      image: the feature that "image" stands for.
      mask: False for patches that only pad; None: there are none.

    Returns:
      {kind: [B, D], or for "patches" [B, N, D]}; without "cls" where the encoder has none.

    Raises:
      UserError: there is no such feature.
    """
    suffix = "" if norm else "_prenorm"
    found = {}
    for kind in kinds:
        if kind == "image":
            found[kind] = image_features.concatenate_parts(features, image, mask)
        elif kind == "patches":
            found[kind] = features[f"patches{suffix}"].astype(jnp.float32)
        elif kind == "mean":
            found[kind] = image_features.concatenate_parts(features, f"patches{suffix}", mask)
        elif kind != "cls":
            found[kind] = image_features.concatenate_parts(features, kind, mask)
        elif "cls" in features:
            found[kind] = features[f"cls{suffix}"].astype(jnp.float32)
    return found


def feature_shapes(method: Method, kinds: Sequence[str], image: str) -> dict[str, tuple[int, ...]]:
    """The shape of each requested feature of an image of the size of training; no weights needed.

    Args:
      method: the pretraining method.
      kinds: the requested features, see `select_features`.
      image: the feature that "image" stands for.

    Raises:
      UserError: the method has no such feature.
    """
    images = jax.ShapeDtypeStruct((1, *method.feature_size, method.channels), jnp.float32)

    def encode(params: Params, images: Array) -> dict[str, Array]:
        return select_features(method.features(params, images), kinds, norm=True, image=image)

    params = jax.eval_shape(method.init, jax.random.key(0))
    found = jax.eval_shape(encode, params, images)
    return {kind: value.shape[1:] for kind, value in found.items()}


class Extractor:
    """A frozen encoder for images of any size, on all devices of this process.

    Attributes:
      method: the pretraining method.
      size: the short side of resized images, in pixels.
      kinds: the requested features, see `select_features`.
      batch_size: images encoded at a time.
      compiled: shapes of images that a program has been compiled for.
    """

    def __init__(
        self,
        method: Any,
        params: Params,
        transform: Augment,
        *,
        size: int,
        kinds: Sequence[str],
        norm: bool,
        image: str,
        batch_size: int,
        canvas: int | None = None,
        options: ImageOptions = decode.DEFAULTS,
    ) -> None:
        """Place the weights on the devices.

        Args:
          method: see the attributes of the class, also for `size`, `kinds` and `batch_size`.
          params: weights of the method.
          transform: gives the normalization and the interpolation.
          norm: features after the final norm; or before it.
          image: the feature that "image" stands for.
          canvas: images are cropped as by evaluators, which read them on canvases of this side
            (`config.data.canvas`); None: whole images.
          options: what is done to the pixels of a file.
        """
        self.method = method
        self.size = size
        self.kinds = kinds
        self.batch_size = batch_size
        self.compiled: set[Size] = set()
        self._norm = norm
        self._image = image
        # Padding at the end would not be that of each of several modalities
        joins = hasattr(method, "patch_features") and not method.modalities
        self._pads = canvas is None and joins
        self._resample = Image.Resampling[transform.interpolation.upper()]
        self._transform = transform
        self._options = options
        self._canvas = 0
        if canvas is not None:
            self._transform = _with_crops(transform, method, size)
            self._canvas = max(canvas, 2 * max(self._transform.eval_size))
        mesh = sharding.make_mesh(devices=jax.local_devices())
        self._placement = sharding.batch_sharding(mesh)
        self._encode = jax.jit(self._features, out_shardings=self._placement)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._positions: dict[Size, Float32[np.ndarray, "N D"]] = {}

    def _features(self, params: Params, batch: Batch) -> dict[str, Array]:
        """The requested features of the arrays of prepared images."""
        method = self.method
        if self._canvas:
            features = method.features(params, self._transform.evaluation(batch))
        elif self._pads:
            patches = batch["patches"]
            pixels = patches.reshape(*patches.shape[:2], -1, method.channels).astype(jnp.float32)
            normalized = self._transform.normalize(pixels).reshape(patches.shape)
            mask = batch["mask"]
            features = method.patch_features(params, normalized, batch["positions"], mask)
            return select_features(features, self.kinds, self._norm, self._image, mask)
        else:
            images = batch["image"].astype(jnp.float32)
            features = method.features(params, self._transform.normalize(images))
        return select_features(features, self.kinds, self._norm, self._image)

    def shape(self, height: int, width: int) -> Size:
        """Height and width in pixels that a whole image of this size is resized to."""
        short = min(height, width)
        return self._resized_side(height, short), self._resized_side(width, short)

    def _resized_side(self, side: int, short: int) -> int:
        """The resized length of a side: a multiple of the patch size."""
        patch_size = self.method.patch_size
        return max(1, round(side * self.size / short / patch_size)) * patch_size

    def prepare(self, data: bytes) -> PreparedImage:
        """Decode and resize an image.

        Raises:
          BadImage: the bytes are not an image, or it is too elongated.
        """
        channels = self.method.channels
        patch_size = self.method.patch_size
        pixels = decode.decode(data, self._canvas, channels, self._options)
        if self._canvas:
            image = np.zeros((self._canvas, self._canvas, channels), np.uint8)
            size = np.array(decode.place_on_canvas(pixels, image), np.int32)
            height, width = self._transform.eval_size
            grid = (height // patch_size, width // patch_size)
            return PreparedImage((height, width), grid, {"image": image, "size": size})
        resized = self._resize(pixels)
        height, width = resized.shape[:2]
        grid = (height // patch_size, width // patch_size)
        if not self._pads:
            return PreparedImage((height, width), grid, {"image": resized})
        patches = patchify(resized[None], grid, patch_size)[0]
        return PreparedImage((1, self._padded_length(len(patches))), grid, {"patches": patches})

    def _resize(self, pixels: UInt8[np.ndarray, "_ _ C"]) -> UInt8[np.ndarray, "H W C"]:
        height, width = pixels.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise decode.BadImage(f"the aspect ratio of {width} x {height} pixels is too large")
        out_height, out_width = self.shape(height, width)
        return decode.resize(pixels, (out_width, out_height), self._resample)

    def _padded_length(self, count: int) -> int:
        """The number of patches of a square image, doubled until `count` patches fit."""
        length = (self.size // self.method.patch_size) ** 2
        while length < count:
            length *= 2
        return length

    def room(self, shape: Size, others: Collection[Size]) -> Size | None:
        """The one of some other shapes that images of this shape can be padded to; None: none is.

        At most every second patch is padding then.
        """
        for other in sorted(others):
            if self._pads and shape[1] < other[1] <= 2 * shape[1]:
                return other
        return None

    def __call__(
        self, images: Sequence[PreparedImage], shape: Size
    ) -> list[dict[str, Float32[np.ndarray, "..."]]]:
        """The features of at most `batch_size` images, by kind: [D] and, for patches, [N, D].

        Args:
          images: of this shape, or padded to it.
          shape: see `PreparedImage`.
        """
        self.compiled.add(shape)
        devices = len(jax.local_devices())
        rows = -(-self.batch_size // devices) * devices
        # One batch size: one compilation per shape of images
        filled = list(images) + [images[0]] * (rows - len(images))
        if self._pads:
            batch = self._padded_batch(filled, shape[1])
        else:
            batch = {}
            for name in images[0].arrays:
                batch[name] = np.stack([image.arrays[name] for image in filled])
        found = jax.device_get(self._encode(self._params, jax.device_put(batch, self._placement)))
        features = []
        for row, image in enumerate(images):
            own = {kind: value[row] for kind, value in found.items()}
            if "patches" in own:
                own["patches"] = own["patches"][: image.grid[0] * image.grid[1]]
            for value in own.values():
                check_finite(value, self._params, {})
            features.append(own)
        return features

    def _padded_batch(self, images: Sequence[PreparedImage], length: int) -> dict[str, np.ndarray]:
        """Patches, their positions and the mask of images, padded to `length` patches."""
        count = len(images)
        width = images[0].arrays["patches"].shape[1]
        patches = np.zeros((count, length, width), np.uint8)
        numbers = self._positions_of(images[0].grid).shape[1]  # of a position
        positions = np.zeros((count, length, numbers), np.float32)
        mask = np.zeros((count, length), bool)
        for row, image in enumerate(images):
            own = image.arrays["patches"]
            patches[row, : len(own)] = own
            positions[row, : len(own)] = self._positions_of(image.grid)
            mask[row, : len(own)] = True
        return {"patches": patches, "positions": positions, "mask": mask}

    def _positions_of(self, grid: Size) -> Float32[np.ndarray, "N D"]:
        if grid not in self._positions:
            self._positions[grid] = np.asarray(self.method.positions_of(self._params, grid))[0]
        return self._positions[grid]


def _with_crops(transform: Augment, method: Method, size: int) -> Augment:
    """The transform of evaluators, scaled so that the short side of crops is `size` pixels."""
    scale = size / min(method.feature_size)
    sides = []
    for side in method.feature_size:
        sides.append(max(1, round(scale * side / method.patch_size)) * method.patch_size)
    eval_size = (sides[0], sides[1])
    eval_resize = max(round(scale * transform.eval_resize), min(eval_size))
    return dataclasses.replace(transform, eval_size=eval_size, eval_resize=eval_resize)


class _Batches:
    """Collects images that can be encoded together, and encodes full batches at once."""

    def __init__(self, extractor: Extractor) -> None:
        self.grids: dict[int, Size] = {}
        self.features: dict[int, dict[str, np.ndarray]] = {}
        self._extractor = extractor
        self._waiting: dict[Size, dict[int, PreparedImage]] = {}

    def add(self, index: int, image: PreparedImage) -> int:
        """Add an image; the number of images that were encoded now."""
        waiting = self._waiting.setdefault(image.shape, {})
        waiting[index] = image
        if len(waiting) < self._extractor.batch_size:
            return 0
        return self._encode(self._waiting.pop(image.shape), image.shape)

    def finish(self) -> Iterable[int]:
        """Encode the images that still wait; yields their numbers.

        The few images of a shape that no program was compiled for join those of a larger one.
        """
        while self._waiting:
            shape = min(self._waiting)
            waiting = self._waiting.pop(shape)
            compiled = self._extractor.compiled
            room = self._extractor.room(shape, compiled | self._waiting.keys())
            if room is None or shape in compiled:
                yield self._encode(waiting, shape)
                continue
            for index, image in waiting.items():
                yield self.add(index, image._replace(shape=room))

    def _encode(self, images: dict[int, PreparedImage], shape: Size) -> int:
        found = self._extractor(list(images.values()), shape)
        for (index, image), features in zip(images.items(), found, strict=True):
            self.grids[index] = image.grid
            self.features[index] = features
        return len(images)


def extract_from_files(
    extractor: Extractor,
    source: FolderSource | PairedSource,
    progress: Callable[[int], object],
) -> ExtractedFeatures:
    """Features of all images that can be read.

    Args:
      extractor: the encoder.
      source: the images.
      progress: called with numbers of images that are done.
    """

    def read(index: int) -> PreparedImage | Exception:
        try:
            return faults.retry(
                lambda: extractor.prepare(source.record(index)[0]),
                lambda: source.name(index),
                faults.RETRY_SECONDS,
            )
        except (decode.BadImage, OSError) as error:
            return error

    names = source.files
    batches = _Batches(extractor)
    unreadable = []
    read_ahead = 2 * extractor.batch_size
    with futures.ThreadPoolExecutor(len(cores.available())) as pool:
        for start in range(0, len(source), read_ahead):
            part = range(start, min(start + read_ahead, len(source)))
            for index, image in zip(part, pool.map(read, part), strict=True):
                if isinstance(image, Exception):
                    unreadable.append((names[index], " ".join(str(image).split())))
                    progress(1)
                else:
                    progress(batches.add(index, image))
    for count in batches.finish():
        progress(count)
    order = sorted(batches.features)
    features: dict[str, list[np.ndarray]] = {}
    for index in order:
        for kind, value in batches.features[index].items():
            features.setdefault(kind, []).append(value)
    grids = np.array([batches.grids[index] for index in order], np.int32)
    return ExtractedFeatures([names[index] for index in order], grids, features, unreadable)
