"""`shapes`, the embedded dataset: drawn on first use, so that everything runs without a download.

Ten classes of objects, each a body with four or five parts in an arrangement, colors and kinds that
are typical of the class. Position, scale, rotation, mirroring, hue, saturation and brightness of an
object, the background, small shapes that lie on it, and noise vary so much that neither pixels nor
colors alone reveal the class.

8,192 train and 2,048 test JPEGs of 64 x 64 pixels, with object masks, as a TFDS dataset in
ArrayRecord files. Image i of a split is a function of (major version, split, i) alone.

Two more configs serve evaluations (see scenes.py): `shapes/several`, images of 2 to 5 objects with
their number, the distance between the two nearest and masks of classes; and `shapes/clips`, short
clips of moving objects with masks of each.
"""

import contextlib
import dataclasses
import fcntl
import io
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from lmim_jax.data.synthetic import drawing, scenes
from lmim_jax.data.synthetic.drawing import CLASSES, DRAWN, SIZE
from lmim_jax.utils import buckets

log = logging.getLogger(__name__)

# Number of examples of each split
SPLITS = {"train": 8192, "test": 2048}
SEVERAL = {"train": 1536, "test": 512}
CLIPS = {"test": 24}

IMAGE_SEED = 2
IMAGE = tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg")
MASK = tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png")

Example = dict[str, Any]


def _keep_log_record(record: logging.LogRecord) -> bool:
    """Drops TFDS's notice of a custom config, which is intended here."""
    return "custom data configuration" not in str(record.msg)


logging.getLogger("absl").addFilter(_keep_log_record)


def draw(
    split: str, index: int
) -> tuple[UInt8[np.ndarray, "64 64 3"], int, UInt8[np.ndarray, "64 64"]]:
    """One image: (image, label, object mask of 0 and 255)."""
    rng = np.random.default_rng([IMAGE_SEED, sorted(SPLITS).index(split), index])
    label = int(rng.integers(len(CLASSES)))
    picture = drawing.draw_background(rng)
    mask = Image.new("L", (DRAWN, DRAWN))
    drawing.draw_distractors(rng, picture)  # behind the object
    pose = drawing.Pose(
        scale=rng.uniform(0.7, 1.05) * SIZE,
        center=rng.uniform(0.65, 1.35, 2) * SIZE,
        angle=rng.uniform(-0.6, 0.6),
        mirror=rng.choice([-1, 1]),
    )
    drawing.draw_object(rng, label, pose, picture, mask, 255)
    coverage = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return drawing.render(rng, picture), label, (coverage > 127) * np.uint8(255)


def _encode_jpeg(pixels: UInt8[np.ndarray, "H W 3"]) -> io.BytesIO:
    return _encode(pixels, format="JPEG", quality=92)


def _encode_png(mask: UInt8[np.ndarray, "H W"]) -> io.BytesIO:
    return _encode(mask, format="PNG")


def _encode(array: np.ndarray, **options: Any) -> io.BytesIO:
    """The file of an image, as a stream for TFDS, which needs no TensorFlow for encoded bytes."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, **options)
    stream.seek(0)
    return stream


def _labeled_example(split: str, index: int) -> Example:
    image, label, mask = draw(split, index)
    return {"image": _encode_jpeg(image), "mask": _encode_png(mask), "label": label}


def _several_example(split: str, index: int) -> Example:
    image, mask, count, nearest = scenes.draw_still(split, index)
    return {
        "image": _encode_jpeg(image),
        "mask": _encode_png(mask),
        "count": count,
        "nearest": nearest,
    }


def _clip_example(split: str, index: int) -> Example:
    frames, masks = scenes.draw_clip(split, index)
    return {
        "frames": [_encode_jpeg(frame) for frame in frames],
        "masks": [_encode_png(mask) for mask in masks],
    }


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One config of the dataset.

    Attributes:
      splits: number of examples of each split.
      features: TFDS features of an example.
      make_example: (split, index) -> example.
    """

    splits: dict[str, int]
    features: dict[str, Any]
    make_example: Callable[[str, int], Example]


def _dataset_config(kind: str | None) -> DatasetConfig:
    """A config by name; None: the default, which has no name."""
    if kind == "several":
        features = {"image": IMAGE, "mask": MASK, "count": np.int64, "nearest": np.float32}
        return DatasetConfig(SEVERAL, features, _several_example)
    if kind == "clips":
        sequence = tfds.features.Sequence
        features = {"frames": sequence(IMAGE), "masks": sequence(MASK)}
        return DatasetConfig(CLIPS, features, _clip_example)
    if kind is None:
        label = tfds.features.ClassLabel(names=CLASSES)
        features = {"image": IMAGE, "mask": MASK, "label": label}
        return DatasetConfig(SPLITS, features, _labeled_example)
    raise KeyError(kind)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `shapes`; the default has no config name, and keeps its place on disk."""

    name = "shapes"
    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Larger objects, distractors."}  # noqa: RUF012  (read by TFDS)
    pkg_dir_path = None  # and no BUILDER_CONFIGS, of which TFDS would make one the default

    @property
    def _dataset(self) -> DatasetConfig:
        if self.builder_config is None:
            return _dataset_config(None)
        return _dataset_config(self.builder_config.name)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._dataset.features)
        return self.dataset_info_from_configs(features=features, description=__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Example]]]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._dataset.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, Example]]:
        config = self._dataset
        for index in range(config.splits[split]):
            yield f"{index:05d}", config.make_example(split, index)


def prepare(folder: str | os.PathLike, kind: str | None = None) -> Shapes:
    """The builder of `shapes`, drawn into a folder unless it is there already.

    Safe for several processes at once.

    Args:
      folder: where the dataset is stored.
      kind: None, "several" or "clips".
    """
    folder = buckets.local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = None
    if kind is not None:
        config = tfds.core.BuilderConfig(
            name=kind, version=Shapes.VERSION, description="see scenes.py"
        )
    with (folder / "shapes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # wait for another process that is drawing it
        builder = Shapes(data_dir=str(folder), file_format="array_record", config=config)
        if not pathlib.Path(builder.data_dir).exists():
            log.info(
                "drawing the dataset `%s`, once, into %s (takes seconds)",
                builder.info.full_name,
                builder.data_dir,
            )
            for rest in pathlib.Path(builder.data_dir).parent.glob("incomplete.*"):
                shutil.rmtree(rest)  # of a process that was killed: we hold the lock
            tfds.disable_progress_bar()
            # TFDS prints that it downloads, which it does not, and makes a folder for it
            with (
                contextlib.redirect_stdout(io.StringIO()),
                tempfile.TemporaryDirectory() as downloads,
            ):
                builder.download_and_prepare(download_dir=downloads)
    return builder
