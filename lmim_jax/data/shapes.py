"""`shapes`, the embedded dataset: drawn on first use, so that everything runs without a download.

Ten classes of objects, each a body with four or five parts in a class-typical arrangement, colours and kinds. Position,
scale, rotation, mirroring, hue, saturation and brightness of the whole object, the background and the small shapes that
lie on it, and noise are nuisance: so much of each that neither pixels nor colours alone give the class away.
8,192 train and 2,048 test JPEGs of 64 x 64 pixels, with object masks, as a TFDS dataset in ArrayRecord files.
Image i of a split is a function of (major version, split, i) alone.
"""

import colorsys
import contextlib
import fcntl
import io
import logging
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

log = logging.getLogger(__name__)

SIZE = 64
DRAWN = 2 * SIZE  # drawn at twice the size, then shrunk: smooth edges
SPLITS = {"train": 8192, "test": 2048}
CLASSES = tuple(f"object{i}" for i in range(10))


def _classes():
    """The ten objects: a body and parts, as fixed random numbers. Lengths in units of the object's size."""
    rng = np.random.default_rng(7)
    part = lambda: dict(
        kind=int(rng.integers(3)),
        center=rng.uniform(-0.75, 0.75, 2),
        half=rng.uniform(0.15, 0.3, 2),
        hsv=(rng.uniform(0, 1), rng.uniform(0.3, 1.0), rng.uniform(0.35, 1.0)),
    )
    objects = []
    for _ in CLASSES:
        parts = [part() for _ in range(rng.integers(4, 6))]
        aspect = rng.uniform(0.6, 1.5) ** 0.5
        body = dict(part(), center=np.zeros(2), half=0.8 * np.array([aspect, 1 / aspect]))
        objects.append([body, *parts])
    return objects


OBJECTS = _classes()


def _texture(rng):
    """A background of soft colour noise at three scales, float32 [SIZE, SIZE, 3]."""
    out = np.zeros((SIZE, SIZE, 3), np.float32) + rng.uniform(30, 225, 3).astype(np.float32)
    for cells in (3, 6, 12):
        noise = rng.normal(0, rng.uniform(8, 24), (cells, cells, 3)).astype(np.float32)
        planes = [Image.fromarray(noise[..., c]).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for c in range(3)]
        out += np.stack([np.asarray(plane) for plane in planes], -1)
    return np.clip(out, 0, 255).astype(np.uint8)


def _outline(kind):
    """A unit shape [points, 2]: ellipse, rectangle or triangle."""
    if kind == 0:
        angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]] if kind == 1 else [[0, -1], [1, 1], [-1, 1]], float)


def draw(split, index):
    """One image: (picture uint8 [64, 64, 3], label, mask uint8 [64, 64] of 0 and 255)."""
    rng = np.random.default_rng([2, sorted(SPLITS).index(split), index])
    label = int(rng.integers(len(CLASSES)))
    picture = Image.fromarray(_texture(rng)).resize((DRAWN, DRAWN), Image.Resampling.BILINEAR)
    mask = Image.new("L", (DRAWN, DRAWN))
    paint, paint_mask = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    for _ in range(rng.integers(5)):  # distractors, behind the object
        points = _outline(int(rng.integers(3))) * rng.uniform(6, 16, 2) + rng.uniform(0, DRAWN, 2)
        paint.polygon([tuple(point) for point in points], fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
    scale, center = rng.uniform(0.7, 1.05) * SIZE, rng.uniform(0.65, 1.35, 2) * SIZE
    angle, mirror = rng.uniform(-0.6, 0.6), rng.choice([-1, 1])
    hue, saturation, value = rng.uniform(-0.15, 0.15), rng.uniform(0.5, 1.3), rng.uniform(0.6, 1.2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for part in OBJECTS[label]:
        h, s, v = part["hsv"]
        s, v = s * saturation * rng.uniform(0.8, 1.2), v * value
        color = colorsys.hsv_to_rgb((h + hue + rng.normal(0, 0.03)) % 1, min(1, s), min(1, v))
        points = (_outline(part["kind"]) * part["half"] + part["center"]) * scale * [mirror, 1]
        polygon = [tuple(point) for point in points @ turn + center]
        paint.polygon(polygon, fill=tuple(int(255 * c) for c in color))
        paint_mask.polygon(polygon, fill=255)
    shrink = lambda image: image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = np.asarray(shrink(picture)) + rng.normal(0, 5, (SIZE, SIZE, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), label, (np.asarray(shrink(mask)) > 127) * np.uint8(255)


def _encoded(array, **options):
    """The file bytes of an image, as a stream for TFDS (encoded bytes need no TensorFlow)."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, **options)
    stream.seek(0)
    return stream


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `shapes`."""

    name = "shapes"
    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Larger objects, distractors."}  # noqa: RUF012  (read by TFDS)
    pkg_dir_path = None

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                "mask": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }
        )
        return self.dataset_info_from_configs(features=features, description=__doc__)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for i in range(SPLITS[split]):
            picture, label, mask = draw(split, i)
            yield (
                f"{i:05d}",
                {
                    "image": _encoded(picture, format="JPEG", quality=92),
                    "mask": _encoded(mask, format="PNG"),
                    "label": label,
                },
            )


def prepare(folder):
    """The builder of `shapes`, drawn into `folder` unless it is there already; safe for several processes at once."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "shapes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be drawing: wait for it
        builder = Shapes(data_dir=str(folder), file_format="array_record")
        if not pathlib.Path(builder.data_dir).exists():
            log.info("drawing the dataset `shapes`, once, into %s (about 20 s)", builder.data_dir)
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS talks of a download, and there is none
                builder.download_and_prepare()
    return builder
