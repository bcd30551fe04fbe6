"""The number of objects and a distance as image classes: of CLEVR and of embedded scenes."""

import dataclasses
from typing import Any

import numpy as np

from lmim_jax.data import sources, tfds_source
from lmim_jax.data.augment.device import Squash
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.synthetic import scenes
from lmim_jax.utils.errors import UserError

# Where VTAB divides the distance of the nearest object from the camera
CLEVR_BOUNDARIES = (8.0, 8.5, 9.0, 9.5, 10.0)
# Equal bins for the embedded scenes
SEVERAL_BOUNDARIES = tuple(np.linspace(*scenes.NEAREST, 7)[1:-1])
DISTANCE_BINS = len(CLEVR_BOUNDARIES) + 1


@dataclasses.dataclass(frozen=True)
class CountsAndDistances:
    """Images of a TFDS dataset, as a source with the labels count x DISTANCE_BINS + distance.

    CLEVR: the number of objects, and the distance of the nearest one from the camera, divided as in
    VTAB (Zhai et al. 2019). `shapes/several`: the number of objects, and the distance between the
    two nearest centers, in equally many equal bins.

    Attributes:
      images: the dataset.
      classes: names of the classes; always empty, as labels combine two attributes.
    """

    images: tfds_source.TfdsSource
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def record(self, index: int) -> tuple[bytes, int]:
        """Encoded bytes and label of an image."""
        coordinates = self.images.feature_values(index, "objects/pixel_coords")
        if coordinates is not None:
            count = len(coordinates) // 3
            nearest = coordinates[2::3].min()  # of (x, y, distance)
            distance = np.searchsorted(CLEVR_BOUNDARIES, nearest)
        else:
            count = self._scalar(index, "count")
            distance = np.searchsorted(SEVERAL_BOUNDARIES, self._scalar(index, "nearest"))
        encoded, _ = self.images.record(index)
        return encoded, int(count * DISTANCE_BINS + distance)

    def mask(self, index: int) -> bytes | None:
        """The encoded segmentation mask of an image, or None."""
        return self.images.mask(index)

    def name(self, index: int) -> str:
        """Dataset, split and index."""
        return self.images.name(index)

    def identity(self) -> dict[str, Any]:
        """What distinguishes these images from others, as JSON values."""
        return self.images.identity()

    def _scalar(self, index: int, feature: str) -> Any:
        """The value of a scalar feature of an embedded scene."""
        values = self.images.feature_values(index, feature)
        assert values is not None, f"{self.images.title} has no feature {feature}"
        return values[0]


def open_split(name: str, folder: str, split: str) -> CountsAndDistances:
    """A split of a TFDS dataset, or of `shapes/several` for the name "".

    Args:
      name: name of the dataset, such as "clevr".
      folder: the `data_dir` of TFDS; "": the default.
      split: name of the split.

    Raises:
      UserError: there is no such dataset, or it has neither counts nor distances.
    """
    if name:
        images = tfds_source.open_tfds(name, folder, split)
    else:
        images = sources.open_shapes("", split, "several")
    has_clevr_labels = images.feature_values(0, "objects/pixel_coords") is not None
    has_scene_labels = images.feature_values(0, "nearest") is not None
    if not has_clevr_labels and not has_scene_labels:
        raise UserError(
            f"{images.title} has no number of objects and no distances; the evaluator needs a "
            'prepared clevr (name=clevr) or, with name="", the embedded images'
        )
    return CountsAndDistances(images)


def open_data(
    data: EvaluationData, *, name: str, folder: str, train_split: str, test_split: str
) -> EvaluationData:
    """Images labeled by number and distance of objects, read like those of the run.

    Images are seen whole: resized without regard to their aspect ratio, not cropped.

    Args:
      data: the images of the run.
      name: name of the dataset, see `open_split`.
      folder: see `open_split`.
      train_split: name of its training split.
      test_split: name of its test split.

    Raises:
      UserError: see `open_split`.
    """
    splits = {
        "train": open_split(name, folder, train_split),
        "test": open_split(name, folder, test_split),
    }
    return data.with_sources(splits, Squash(**vars(data.augment)))


def split_label(label: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of a `CountsAndDistances`, int [N] -> {"count": int [N], "distance": int [N]}."""
    return {
        "count": np.floor_divide(label, DISTANCE_BINS),
        "distance": np.mod(label, DISTANCE_BINS),
    }
