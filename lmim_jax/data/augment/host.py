"""Crops made on the host by Pillow: the same boxes as on the device, pixels equal within one level.

Letters: B batch, h w height and width of an image, S T of a crop, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped, UInt8
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.data.augment.device import Augment, CropDraw, fit_crop
from lmim_jax.data.decode import resize
from lmim_jax.utils.errors import UserError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

DrawKeys = Callable[[Any, Any], Shaped[Array, " B"]]


@dataclasses.dataclass(frozen=True)
class HostCrop:
    """Crops, resizes and flips images one by one, as `Augment.__call__` does before normalization.

    Attributes:
      augment: the augmentation.
      keys: (step, positions in the global batch [B]) -> its keys [B]; can be pickled and hashed.
      longest: side of the canvas.
    """

    augment: Augment
    keys: DrawKeys
    longest: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a crop."""
        return self.augment.image_size

    def draws(self, step: int, positions: Sequence[int] | Int[np.ndarray, " B"]) -> list[CropDraw]:
        """The random numbers of the images at some positions of a step, as numpy arrays."""
        draw_batch = _jitted_draws(self.augment, self.keys)
        with jax.default_device(_cpu()):
            columns = jax.device_get(draw_batch(np.int32(step), np.asarray(positions, np.int32)))
        draws = []
        for row in range(len(positions)):
            draws.append({name: column[row] for name, column in columns.items()})
        return draws

    def box(self, draw: CropDraw, height: int, width: int) -> Int[np.ndarray, "4"]:
        """The crop box (top, left, height, width) in an image of this size, int32."""
        size = np.array((height, width), np.int32)
        return fit_crop(draw, size, self.longest, self.augment.ratio, xp=np)

    def __call__(
        self, pixels: UInt8[np.ndarray, "h w C"], draw: CropDraw
    ) -> UInt8[np.ndarray, "S T C"]:
        """Crop, resize (horizontally, then vertically) and flip one image."""
        image_height, image_width = pixels.shape[:2]
        top, left, height, width = self.box(draw, image_height, image_width).tolist()
        crop = pixels[top : top + height, left : left + width]
        out_height, out_width = self.size
        method = FILTERS[self.augment.interpolation]
        narrow = resize(crop, (out_width, height), method)
        out = resize(narrow, (out_width, out_height), method)
        if draw["flip"]:
            return out[:, ::-1]
        return out


@functools.lru_cache(maxsize=2)
def _jitted_draws(augment: Augment, keys: DrawKeys) -> Callable[[Any, Any], CropDraw]:
    """Jitted (step, positions [B]) -> draws, with a leading batch axis."""

    def draw_batch(step: Array, positions: Array) -> CropDraw:
        return jax.vmap(augment.draw)(keys(step, positions))

    return jax.jit(draw_batch)


@functools.cache
def _cpu() -> jax.Device:
    """The CPU as a jax device.

    Raises:
      UserError: jax may not use the CPU.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "config.data.resize_on=host draws its crops on the CPU, which JAX_PLATFORMS excludes: "
            "add cpu to this environment variable"
        ) from error


def make_host_crop(config: ConfigDict, augment: Augment, keys: DrawKeys) -> HostCrop | None:
    """A HostCrop if `config.data.resize_on` is "host", or None if it is "device".

    Raises:
      UserError: it is neither.
    """
    if config.resize_on == "device":
        return None
    if config.resize_on == "host":
        return HostCrop(augment, keys, config.canvas)
    raise UserError(f"config.data.resize_on={config.resize_on!r} must be one of: device | host")
