"""Number of objects and a distance of images, as classes: CLEVR's, and those of the embedded `shapes/several`."""

import dataclasses

import numpy as np

from lmim_jax.data import sources, tfds_source
from lmim_jax.data.synthetic import scenes
from lmim_jax.utils.errors import UserError

CLEVR = (
    8.0,
    8.5,
    9.0,
    9.5,
    10.0,
)  # where VTAB divides the distance of the nearest object from the camera
SEVERAL = tuple(np.linspace(*scenes.NEAREST, 7)[1:-1])
BINS = len(CLEVR) + 1


@dataclasses.dataclass(frozen=True)
class Attributed:
    """Images of a TFDS dataset, as a source (see sources.py) with labels count x BINS + distance.

    CLEVR: the number of objects, and the distance of the nearest one from the camera, divided as in VTAB (Zhai et al.
    2019). `shapes/several`: the number, and the distance of the two nearest centres, in as many equal bins.
    """

    images: tfds_source.Tfds
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return len(self.images)

    def record(self, index):
        """(encoded bytes, label) of image `index`."""
        if (coordinates := self.images.numbers(index, "objects/pixel_coords")) is not None:
            nearest = coordinates[2::3].min()  # of (x, y, distance)
            count, distance = len(coordinates) // 3, np.searchsorted(CLEVR, nearest)
        else:
            count = self.images.numbers(index, "count")[0]
            distance = np.searchsorted(SEVERAL, self.images.numbers(index, "nearest")[0])
        return self.images.record(index)[0], int(count * BINS + distance)

    def mask(self, index):
        """The encoded mask of image `index`, or None."""
        return self.images.mask(index)

    def name(self, index):
        """Dataset, split and place in it."""
        return self.images.name(index)

    def identity(self):
        """What tells these images from others."""
        return self.images.identity()


def source(name, folder, split):
    """A split of a TFDS dataset, or of `shapes/several` where the name is "".

    Raises:
      UserError: no such dataset, or it tells neither number nor distance of objects.
    """
    images = (
        tfds_source.open_tfds(name, folder, split) if name else sources.shapes("", split, "several")
    )
    if all(images.numbers(0, key) is None for key in ("objects/pixel_coords", "nearest")):
        raise UserError(
            f"{images.title} tells no number of objects nor distances; attributes take a prepared clevr (name=clevr), "
            'or with name="" the embedded images'
        )
    return Attributed(images)
