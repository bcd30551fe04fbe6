"""Crops made on the host by Pillow: the same boxes as on the device, and the same pixels within one level."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from lmim_jax.data.augment import device
from lmim_jax.utils.errors import UserError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclasses.dataclass(frozen=True)
class HostCrop:
    """What `Augment.__call__` does to images, up to normalisation, one by one.

    augment: the augmentation. keys: (step, positions in the global batch [B]) -> its keys [B]. longest: the canvas.
    """

    augment: device.Augment
    keys: Callable
    longest: int

    @property
    def size(self):
        """(height, width) of a crop."""
        return self.augment.image_size

    def draws(self, step, positions):
        """The random numbers of the images at some positions of a step: a list of dicts of numpy arrays."""
        with jax.default_device(_cpu()):
            draws = jax.device_get(
                _draws(self.augment, self.keys)(np.int32(step), np.asarray(positions, np.int32))
            )
        return [{name: column[i] for name, column in draws.items()} for i in range(len(positions))]

    def box(self, draw, height, width):
        """The crop box (top, left, height, width) in an image of this size."""
        size = np.array((height, width), np.int32)
        return device.fit_crop(draw, size, self.longest, self.augment.ratio, xp=np)

    def __call__(self, pixels, draw):
        """Crop, resize (horizontally, then vertically), flip: uint8 [h, w, C] -> [*size, C]."""
        top, left, height, width = (int(v) for v in self.box(draw, *pixels.shape[:2]))
        crop = pixels[top : top + height, left : left + width]
        method = FILTERS[self.augment.interpolation]
        image = Image.fromarray(crop.squeeze() if crop.shape[2] == 1 else crop)
        image = image.resize((self.size[1], height), method).resize(self.size[::-1], method)
        out = np.asarray(image).reshape(*self.size, -1)
        return out[:, ::-1] if draw["flip"] else out


@functools.lru_cache(maxsize=2)
def _draws(augmentation, keys):
    """Jitted (step, positions) -> draws, a column each."""
    return jax.jit(lambda step, positions: jax.vmap(augmentation.draw)(keys(step, positions)))


@functools.cache
def _cpu():
    """The host as a device of jax."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "config.data.resize_on=host draws its crops on the CPU, which jax was told to leave out: "
            "add cpu to the environment variable JAX_PLATFORMS"
        ) from error


def from_config(config, augmentation, keys):
    """A HostCrop where `config.data` asks for one, else None; `keys` as in HostCrop, picklable and hashable."""
    if config.resize_on not in ("device", "host"):
        raise UserError(f"config.data.resize_on={config.resize_on!r} is none of: device | host")
    return HostCrop(augmentation, keys, config.canvas) if config.resize_on == "host" else None
