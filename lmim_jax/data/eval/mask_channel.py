"""Images that carry the classes of their pixels as one more channel, for training on both."""

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.data.eval.segmentation_sets import Labels
from lmim_jax.data.image_options import ImageOptions

VOID = 255  # in the channel: the pixel does not count
MOST_CLASSES = VOID


@dataclasses.dataclass(frozen=True)
class WithMask:
    """A source (see data/sources.py) whose records are images with one more channel.

    Attributes:
      source: images that have masks.
      labels: what the numbers in the masks mean.
      canvas: larger images are shrunk to this long side.
      channels: of the images.
      options: what is done to their pixels.
      retry_seconds: how long a failing storage is waited for.
      classes: of whole images: none.
    """

    source: Any
    labels: Labels
    canvas: int
    channels: int
    options: ImageOptions
    retry_seconds: float
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> tuple[bytes, int]:
        """An array [h, w, channels + 1] in the format NPY, uint8, and -1 for its class.

        Raises:
          UserError: the mask cannot be used.
        """
        data = self.source.record(index)[0]
        pixels = decode.decode(data, self.canvas, self.channels, self.options)
        found = self.labels.read(self.source, index, self.retry_seconds)
        numbers = np.where(found < 0, VOID, found).astype(np.uint8)
        height, width = pixels.shape[:2]
        if numbers.shape != (height, width):
            shrunk = Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST)
            numbers = np.asarray(shrunk)
        file = io.BytesIO()
        np.save(file, np.concatenate([pixels, numbers[..., None]], axis=-1))
        return file.getvalue(), -1

    def mask(self, index: int) -> None:
        """None: the mask is in the record."""
        return None

    def name(self, index: int) -> str:
        """The name of an image in its source."""
        return self.source.name(index)

    def identity(self) -> dict[str, Any]:
        """What distinguishes these images from others, as JSON values."""
        return {**self.source.identity(), "mask": "channel"}
