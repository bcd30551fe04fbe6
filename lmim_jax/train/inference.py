"""A trained encoder for use in notebooks and scripts: images in, features out.

    model = lmim_jax.load("runs/vit_b")
    features = model.encode(model.preprocess(["a.jpg", "b.jpg"]))
    features.mean  # float32 [2, D]

Letters: B images, H image height, W image width, C channels, N patches, D width, K canvas side.
"""

import functools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.evaluators.common import image_features
from lmim_jax.train import modality_subset
from lmim_jax.train.runs import Run, open_run
from lmim_jax.utils.errors import UserError

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Array


class EncodedImages(NamedTuple):
    """Features of images, numpy arrays.

    Attributes:
      cls: of the CLS token; None for an encoder without one.
      patches: of the patches, row by row.
      mean: the mean over the patches.
      image: the representation of an image that the recipe chose, `config.representation.image`.
    """

    cls: Float[np.ndarray, "B D"] | None
    patches: Float[np.ndarray, "B N D"]
    mean: Float[np.ndarray, "B D"]
    image: Float[np.ndarray, "B D"]


class Model:
    """A trained encoder with the preprocessing that it was trained with.

    Attributes:
      method: the pretraining method; `method.features(params, images)` returns all features of a
        batch, see methods/base.py.
      params: its parameters, a tree of float32 arrays.
      config: as the model was trained with.
      weights: "online" or "target": which encoder it is.
      step: optimizer steps that the weights have been trained for.
    """

    method: Any
    params: Any
    config: ConfigDict
    weights: str
    step: int

    def __init__(self, run: Run, weights: str) -> None:
        """Wrap a run.

        Args:
          run: see `runs.open_run`.
          weights: "online" or "target".

        Raises:
          UserError: the run has no such weights.
        """
        self.method = run.method
        self.params = run.encoder_params(weights)
        self.config = run.config
        self.weights = weights
        self.step = run.step
        self._augmentation = run.augmentation

    def __repr__(self) -> str:
        method = self.method
        return (
            f"Model({self.config.method.name}, {method.depth} layers, width {method.width}, "
            f"{self.weights} weights of step {self.step})"
        )

    def preprocess(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 64
    ) -> Float[Array, "B H W C"]:
        """Prepare images for `encode`, exactly as the evaluators do.

        The short side is resized to `config.augment.eval_resize` pixels with antialiasing (see
        `Augment.resized`), the center is cropped, and channels are normalized.

        Args:
          images: one image or several: paths of files, PIL images, or arrays [H, W], [H, W, 1] or
            [H, W, C] (a batch [B, H, W, C] counts as several). Arrays are uint8 with values from 0
            to 255, or floating point with values from 0 to 1.
          batch_size: images at a time.

        Returns:
          float32, also for a single image with a batch axis. H and W are `method.feature_size`.

        Raises:
          UserError: an image cannot be read, or an array has another shape, dtype or range.
        """
        several = _as_list(images)
        if not several:
            raise UserError("no images: give at least one")
        batches = []
        for start in range(0, len(several), batch_size):
            part = several[start : start + batch_size]
            canvases, sizes = self._canvases(part, start, batch_size if start else len(part))
            batches.append(self._transform({"image": canvases, "size": sizes})[: len(part)])
        return jnp.concatenate(batches)

    def encode(
        self, images: Float[Array, "B H W C"], batch_size: int = 64, norm: bool = True
    ) -> EncodedImages:
        """Encode images.

        Args:
          images: from `preprocess`; or normalized in the same way, at any size whose sides are
            multiples of the patch size.
          batch_size: images at a time.
          norm: features after the encoder's final norm; False: before it. It does not concern
            `image`.

        Returns:
          The features, float32.

        Raises:
          UserError: the images have another shape or dtype.
        """
        self._check_preprocessed(images)
        rows = min(batch_size, len(images))
        parts = []
        for start in range(0, len(images), rows):
            batch = jnp.asarray(images[start : start + rows])
            count = len(batch)
            padding = [(0, rows - count), (0, 0), (0, 0), (0, 0)]  # one shape: one compilation
            features = jax.device_get(self._encode(self.params, jnp.pad(batch, padding), norm))
            parts.append({name: value[:count] for name, value in features.items()})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return EncodedImages(joined.get("cls"), joined["patches"], joined["mean"], joined["image"])

    @functools.cached_property
    def _transform(self) -> Any:
        return jax.jit(self._augmentation.evaluation)

    @functools.cached_property
    def _encode(self) -> Any:
        """Jitted (params, images, norm) -> {"cls", "patches", "mean", "image"}."""
        chosen = self.config.representation.image

        def encode(params: Any, images: Float[Array, "B H W C"], norm: bool) -> dict[str, Array]:
            features = self.method.features(params, images)
            suffix = "" if norm else "_prenorm"
            patches = features[f"patches{suffix}"].astype(jnp.float32)
            found = {"patches": patches, "mean": patches.mean(axis=1)}
            found["image"] = image_features.concatenate_parts(features, chosen)
            if f"cls{suffix}" in features:
                found["cls"] = features[f"cls{suffix}"].astype(jnp.float32)
            return found

        return jax.jit(encode, static_argnums=2)

    def _canvases(
        self, images: list[ImageLike], first: int, rows: int
    ) -> tuple[UInt8[np.ndarray, "B K K C"], Int32[np.ndarray, "B 2"]]:
        """Images on canvases, and their sizes; padded to `rows` with empty images.

        Args:
          images: to be placed.
          first: number of the first one, for error messages.
          rows: of the result.
        """
        side = self.config.data.canvas
        channels = self.config.data.channels
        options = ImageOptions.from_config(self.config.data)
        canvases = np.zeros((rows, side, side, channels), np.uint8)
        sizes = np.ones((rows, 2), np.int32)
        for row, image in enumerate(images):
            pixels = _pixels(image, side, channels, options, f"image {first + row}")
            sizes[row] = decode.place_on_canvas(pixels, canvases[row])
        return canvases, sizes

    def _check_preprocessed(self, images: Float[Array, "B H W C"]) -> None:
        """Raise a UserError unless the images can be encoded."""
        advice = "encode takes what model.preprocess(images) returns"
        if getattr(images, "ndim", None) != 4 or not len(images):
            raise UserError(f"{advice}: a batch [B, H, W, C]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{advice}: floating-point numbers, not {images.dtype}")
        height, width, channels = images.shape[1:]
        patch = self.method.patch_size
        if channels != self.method.channels:
            raise UserError(f"{advice}: {self.method.channels} channels, not {channels}")
        if height % patch or width % patch:
            raise UserError(
                f"{advice}: sides that are multiples of the patch size {patch}, not {height} x "
                f"{width} pixels"
            )


def load(
    folder: str | os.PathLike[str], weights: str | None = None, modalities: Sequence[str] = ()
) -> Model:
    """Load a trained encoder.

    Args:
      folder: the --workdir of a run, of which the newest good checkpoint is read; or a folder made
        by `lmim export --format=flax`.
      weights: "online", or "target" for the teacher's encoder. None: the choice of the recipe,
        `config.representation.weights`; of an exported folder, those that it holds.
      modalities: of a run on several, those that images have; (): all, as arrays of all channels.

    Raises:
      UserError: there is no run or no good checkpoint, or it has no such weights.
    """
    run = modality_subset.choose(open_run(folder), modalities)
    return Model(run, run.choose_weights(weights))


def _as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """The images one by one."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | jax.Array):
        return list(np.asarray(images)) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise UserError(f"{type(images).__name__} is not an image: {ACCEPTED}")
    return list(images)


ACCEPTED = "give paths, PIL images, or arrays [H, W, C]"


def _pixels(
    image: ImageLike, canvas: int, channels: int, options: ImageOptions, name: str
) -> UInt8[np.ndarray, "h w C"]:
    """The pixels of an image, shrunk until it fits a canvas.

    Args:
      image: as `Model.preprocess` accepts it.
      canvas: side of the canvas.
      channels: of the result.
      options: what is done to the pixels of a file.
      name: for error messages.
    """
    if isinstance(image, str | os.PathLike):
        path = pathlib.Path(image).expanduser()
        try:
            return decode.decode(path.read_bytes(), canvas, channels, options)
        except (decode.BadImage, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read: {reason}") from error
    if isinstance(image, np.ndarray | jax.Array):
        array = np.asarray(image)
        # Of 4 bands, the last may be thermal: Pillow would take it for opacity
        if array.ndim == 3 and array.shape[-1] == channels and channels not in (1, 3):
            _check_values(array, name)
            return decode.fit_array(array, canvas, ())
        image = _image_of_array(array, name)
    if not isinstance(image, Image.Image):
        raise UserError(f"{name} is a {type(image).__name__}: {ACCEPTED}")
    try:
        return decode.fit_to_canvas(image, canvas, channels, options)
    except decode.BadImage as error:
        raise UserError(f"{name}: {error}") from error


def _image_of_array(array: np.ndarray, name: str) -> Image.Image:
    """A PIL image of an array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]; see `Model.preprocess`."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in decode.MODES)
    if not is_image or not array.size:
        raise UserError(
            f"{name} has the shape {array.shape}; arrays must be [height, width, channels], with "
            "1, 3 or 4 channels, or those of the model"
        )
    _check_values(array, name)
    if np.issubdtype(array.dtype, np.floating):
        array = np.rint(array * 255).astype(np.uint8)
    return Image.fromarray(array)


def _check_values(array: np.ndarray, name: str) -> None:
    """Raise a UserError unless values are uint8, or floating point in 0 .. 1."""
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"{name} has values from {array.min():g} to {array.max():g}; floating-point images "
                "must be in 0 .. 1 (uint8 images in 0 .. 255)"
            )
    elif array.dtype != np.uint8:
        raise UserError(
            f"{name} has the dtype {array.dtype}; arrays must be uint8 (0 .. 255) or floating "
            "point (0 .. 1)"
        )
