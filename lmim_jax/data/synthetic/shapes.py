"""`shapes`, the embedded dataset: drawn on first use, so that everything runs without a download.

Ten classes of objects, each a body with four or five parts in a class-typical arrangement, colours and kinds. Position,
scale, rotation, mirroring, hue, saturation and brightness of the whole object, the background and the small shapes that
lie on it, and noise are nuisance: so much of each that neither pixels nor colours alone give the class away.
8,192 train and 2,048 test JPEGs of 64 x 64 pixels, with object masks, as a TFDS dataset in ArrayRecord files.
Image i of a split is a function of (major version, split, i) alone.

Two configs beside it serve evaluations (scenes.py draws them): `shapes/several`, images of 2 to 5 objects with their
number, the nearest distance between two and masks of classes; and `shapes/clips`, short clips of moving objects with
masks of each.
"""

import contextlib
import dataclasses
import fcntl
import io
import logging
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lmim_jax.data.synthetic import drawing, scenes
from lmim_jax.data.synthetic.drawing import CLASSES, DRAWN, SIZE

log = logging.getLogger(__name__)
logging.getLogger("absl").addFilter(
    lambda record: "custom data configuration" not in str(record.msg)
)  # as meant here

SPLITS = {"train": 8192, "test": 2048}
SEVERAL = {"train": 1536, "test": 512}
CLIPS = {"test": 24}


def draw(split, index):
    """One image: (picture uint8 [64, 64, 3], label, mask uint8 [64, 64] of 0 and 255)."""
    rng = np.random.default_rng([2, sorted(SPLITS).index(split), index])
    label = int(rng.integers(len(CLASSES)))
    picture, mask = drawing.background(rng), Image.new("L", (DRAWN, DRAWN))
    drawing.distractors(rng, picture)  # behind the object
    scale, center = rng.uniform(0.7, 1.05) * SIZE, rng.uniform(0.65, 1.35, 2) * SIZE
    pose = drawing.Pose(scale, center, rng.uniform(-0.6, 0.6), rng.choice([-1, 1]))
    drawing.paint(rng, label, pose, picture, mask, 255)
    mask = mask.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return drawing.photograph(rng, picture), label, (np.asarray(mask) > 127) * np.uint8(255)


def _jpeg(pixels):
    return _encoded(pixels, format="JPEG", quality=92)


def _png(mask):
    return _encoded(mask, format="PNG")


def _encoded(array, **options):
    """The file bytes of an image, as a stream for TFDS (encoded bytes need no TensorFlow)."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, **options)
    stream.seek(0)
    return stream


IMAGE = tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg")
MASK = tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png")


def _one(split, index):
    picture, label, mask = draw(split, index)
    return {"image": _jpeg(picture), "mask": _png(mask), "label": label}


def _several(split, index):
    picture, mask, count, nearest = scenes.still(split, index)
    return {"image": _jpeg(picture), "mask": _png(mask), "count": count, "nearest": nearest}


def _clip(split, index):
    frames, masks = scenes.clip(split, index)
    return {"frames": [_jpeg(frame) for frame in frames], "masks": [_png(mask) for mask in masks]}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One config of the dataset: how many examples a split has, of which features, and (split, index) -> an example."""

    splits: dict
    features: dict
    example: object


def _kinds():
    """The configs by name; None is the default, which has none."""
    label, clip = tfds.features.ClassLabel(names=CLASSES), tfds.features.Sequence
    several = {"image": IMAGE, "mask": MASK, "count": np.int64, "nearest": np.float32}
    return {
        None: Kind(SPLITS, {"image": IMAGE, "mask": MASK, "label": label}, _one),
        "several": Kind(SEVERAL, several, _several),
        "clips": Kind(CLIPS, {"frames": clip(IMAGE), "masks": clip(MASK)}, _clip),
    }


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `shapes`; the default has no config, and keeps its place on disk."""

    name = "shapes"
    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Larger objects, distractors."}  # noqa: RUF012  (read by TFDS)
    pkg_dir_path = None  # and no BUILDER_CONFIGS, of which TFDS would make one the default

    @property
    def _kind(self):
        return _kinds()[self.builder_config and self.builder_config.name]

    def _info(self):
        features = tfds.features.FeaturesDict(self._kind.features)
        return self.dataset_info_from_configs(features=features, description=__doc__)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self._kind.splits}

    def _generate_examples(self, split):
        for i in range(self._kind.splits[split]):
            yield f"{i:05d}", self._kind.example(split, i)


def prepare(folder, kind=None):
    """The builder of `shapes`, drawn into `folder` unless it is there already; safe for several processes at once.

    Args:
      folder: where it is kept. kind: None, "several" or "clips".
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = kind and tfds.core.BuilderConfig(
        name=kind, version=Shapes.VERSION, description="see scenes.py"
    )
    with (folder / "shapes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be drawing: wait for it
        builder = Shapes(data_dir=str(folder), file_format="array_record", config=config)
        if not pathlib.Path(builder.data_dir).exists():
            log.info(
                "drawing the dataset `%s`, once, into %s (seconds)",
                builder.info.full_name,
                builder.data_dir,
            )
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(
                io.StringIO()
            ):  # TFDS talks of a download, and there is none
                builder.download_and_prepare()
    return builder
