"""Images with boxes, from annotation files in the format of COCO.

Letters: N images, A boxes, M boxes of the fullest image, K classes.
"""

import collections
import dataclasses
import io
import json
import logging
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from lmim_jax.data import folder_listing
from lmim_jax.data.folder_source import FolderSource, first_few
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

KEYS = ("images", "annotations", "categories")
ALL_CLASSES = -1  # the label of a region in which boxes of any class neither count nor are learned
OUTSIDE = 1.0  # pixels beyond the border that are taken for rounding
CHECKED = 32  # image files whose size is compared with the annotations

Entry = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class BoxSplit:
    """The images and boxes of a split.

    Attributes:
      source: the images, in the order of the file.
      ids: of the images, as in the file.
      sizes: height and width of each image in pixels.
      classes: names of the classes.
      image: of each box, its place in `source`.
      boxes: left, top, right, bottom in pixels, inside of the image.
      labels: class of each box; ALL_CLASSES: a region that is ignored.
      crowd: whether a box is a region with several objects, which is not learned, and in which
        detections do not count.
      areas: of each object in pixels, as in the file: that of its outline in COCO.
    """

    source: FolderSource
    ids: tuple[int, ...]
    sizes: Int[np.ndarray, "N 2"]
    classes: tuple[str, ...]
    image: Int[np.ndarray, " A"]
    boxes: Float[np.ndarray, "A 4"]
    labels: Int[np.ndarray, " A"]
    crowd: Bool[np.ndarray, " A"]
    areas: Float[np.ndarray, " A"]

    def padded(self, most: int) -> Float[np.ndarray, "N M 5"]:
        """What is learned, for batches of one shape.

        Args:
          most: M is no larger; an image with more boxes keeps its largest ones. 0: M is that of the
            fullest image.

        Returns:
          Left, top, right, bottom as shares of the image, and the class; -1: padding. float32.
        """
        learned = np.flatnonzero(~self.crowd)
        by_size = learned[np.argsort(-self.areas[learned], kind="stable")]
        order = by_size[np.argsort(self.image[by_size], kind="stable")]
        counts = np.bincount(self.image[order], minlength=len(self.sizes))
        fullest = int(counts.max())
        if most and fullest > most:
            full = self.source.name(int(counts.argmax()))
            log.warning(
                "%d image(s) have more than max_boxes=%d boxes, such as %s with %d; their largest "
                "boxes are kept",
                int((counts > most).sum()),
                most,
                full,
                fullest,
            )
            fullest = most
        rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[self.image[order]]
        order = order[rank < fullest]
        rank = rank[rank < fullest]
        table = np.full((len(self.sizes), fullest, 5), -1, np.float32)
        image = self.image[order]
        table[image, rank, :4] = self.boxes[order] / np.tile(self.sizes[image][:, ::-1], 2)
        table[image, rank, 4] = self.labels[order]
        return table

    def counts(self) -> Int[np.ndarray, " K"]:
        """The number of boxes of each class."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.classes))


def open_split(
    path: str,
    annotations: str,
    images: str,
    classes: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> BoxSplit:
    """The images of an annotation file that is made like COCO's instances_*.json.

    A `bbox` of four numbers is left, top, width, height; of five, the middle, width, height and
    angle in degrees, counterclockwise (detectron2's XYWHA); of eight, the corners. The last two are
    rotated boxes, of which the enclosing box is taken.

    Args:
      path: folder of the dataset.
      annotations: the file, below `path`.
      images: the folder of its images, below `path`.
      classes: names of categories that are the classes, in this order; (): all that are not
        ignored, in the order of their numbers.
      ignored: names of categories whose boxes are regions that do not count.

    Raises:
      UserError: the folder, the file, an image or a category is missing, there are no boxes, or a
        box or an image in the file has no meaning.
    """
    root = buckets.local_path(path)
    if not path or not root.is_dir():
        raise UserError(f"path={path!r} is not a folder; give the folder of the dataset with boxes")
    file = root / annotations
    content = _read(file)
    categories, names = _read_categories(file, content["categories"], classes, ignored)
    entries = _unique(file, "images", content["images"])
    folder = root / images
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; train_images and test_images name the folders")
    files = _image_files(file, folder, entries.values())
    source = FolderSource(
        root=str(folder), files=folder_listing.share_names(files), labels=None, classes=()
    )
    sizes = _read_sizes(file, source, list(entries.values()))
    places = {number: place for place, number in enumerate(entries)}
    found = _read_boxes(file, content["annotations"], places, categories, sizes)
    split = BoxSplit(source, tuple(entries), sizes, names, *found)
    if split.crowd.all():
        raise UserError(
            f"{file}: no box of the classes {first_few(list(names))} in {len(files):,} images"
        )
    empty = [name for name, count in zip(names, split.counts(), strict=True) if not count]
    if empty:
        log.warning("%s: no boxes of %s", file, first_few(empty))
    return split


def _read(file: pathlib.Path) -> dict[str, list[Entry]]:
    """The lists of an annotation file."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as annotations in JSON ({error})") from error
    for key in KEYS:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise UserError(
                f"{file} has no list {key!r}; annotations of COCO have the lists {', '.join(KEYS)}"
            )
        if not entries:
            raise UserError(f"{file}: the list {key!r} is empty")
    return content


def _unique(file: pathlib.Path, key: str, entries: Iterable[Entry]) -> dict[int, Entry]:
    """{id: entry} of a list."""
    found: dict[int, Entry] = {}
    for entry in entries:
        number = entry.get("id")
        if not isinstance(number, int) or number in found:
            raise UserError(
                f"{file}: an entry of {key!r} has the id {number!r}, not one of its own"
            )
        found[number] = entry
    return found


def _read_categories(
    file: pathlib.Path, entries: Sequence[Entry], classes: Sequence[str], ignored: Sequence[str]
) -> tuple[dict[int, int | None], tuple[str, ...]]:
    """({id of a category: class, ALL_CLASSES, or None: left out}, names of the classes)."""
    ids: dict[str, int] = {}
    for number, entry in sorted(_unique(file, "categories", entries).items()):
        name = entry.get("name")
        if not isinstance(name, str) or name in ids:
            raise UserError(f"{file}: category {number} has the name {name!r}, not one of its own")
        ids[name] = number
    for key, given in (("classes", classes), ("ignore", ignored)):
        for name in given:
            if name not in ids:
                raise UserError(f"{key}: {file} has no category {name!r}{did_you_mean(name, ids)}")
    both = sorted(set(classes) & set(ignored))
    if both:
        raise UserError(f"{both} are in `classes` and in `ignore`; a category is one of them")
    names = tuple(classes) or tuple(name for name in ids if name not in ignored)
    if not names:
        raise UserError(f"ignore={tuple(ignored)} are all categories of {file}")
    numbers: dict[int, int | None] = dict.fromkeys(ids.values())
    for name in ignored:
        numbers[ids[name]] = ALL_CLASSES
    for place, name in enumerate(names):
        numbers[ids[name]] = place
    return numbers, names


def _image_files(file: pathlib.Path, folder: pathlib.Path, entries: Iterable[Entry]) -> list[str]:
    """The names of the images, all of which exist, below their folder."""
    names = [str(entry.get("file_name", "")) for entry in entries]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{file}: several images have the file_name {first_few(twice)}")
    missing = [name for name in names if not name or not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{file}: {len(missing):,} of {len(names):,} images are not in {folder}: "
            f"{first_few(missing)}; complete the folder, or take them out of the file"
        )
    return names


def _read_sizes(
    file: pathlib.Path, source: FolderSource, entries: Sequence[Entry]
) -> Int[np.ndarray, "N 2"]:
    """Height and width of each image; a few files are compared with what the annotations say."""
    checked = set(np.linspace(0, len(entries) - 1, CHECKED).astype(int).tolist())
    sizes = np.zeros((len(entries), 2), np.int64)
    for place, entry in enumerate(entries):
        given = (entry.get("height"), entry.get("width"))
        known = all(isinstance(side, int) and side > 0 for side in given)
        if known:
            sizes[place] = np.array(given)
        if known and place not in checked:
            continue
        try:
            with Image.open(io.BytesIO(source.record(place)[0])) as image:
                stored = (image.height, image.width)
        except OSError as error:
            raise UserError(f"{source.name(place)} cannot be read: {error}") from error
        if known and stored != given:
            raise UserError(
                f"{source.name(place)} has {stored[1]} x {stored[0]} pixels, and by {file} "
                f"{given[1]} x {given[0]}: boxes would lie elsewhere"
            )
        sizes[place] = stored
    return sizes


def _read_boxes(
    file: pathlib.Path,
    entries: Sequence[Entry],
    places: Mapping[int, int],
    categories: Mapping[int, int | None],
    sizes: Int[np.ndarray, "N 2"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arrays `image`, `boxes`, `labels`, `crowd` and `areas` of a `BoxSplit`."""
    strangers = [entry.get("id") for entry in entries if entry.get("image_id") not in places]
    if strangers:
        raise UserError(
            f"{file}: {len(strangers):,} of {len(entries):,} annotations are of images that it "
            f"does not list, such as annotation {strangers[0]}"
        )
    image = []
    boxes = []
    labels = []
    crowd = []
    areas = []
    for entry in entries:
        name = f"{file}: annotation {entry.get('id')}"
        if entry.get("category_id") not in categories:
            raise UserError(
                f"{name} has category_id={entry.get('category_id')}, which is not listed"
            )
        label = categories[entry["category_id"]]
        if label is None:
            continue
        box = enclosing_box(entry.get("bbox"), name)
        image.append(places[entry["image_id"]])
        boxes.append(box)
        labels.append(label)
        crowd.append(bool(entry.get("iscrowd", 0)) or label == ALL_CLASSES)
        areas.append(float(entry.get("area") or (box[2] - box[0]) * (box[3] - box[1])))
    found = (
        np.array(image, np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, bool),
        np.array(areas, np.float64),
    )
    kept = _clip(file, found[1], sizes[found[0]])
    image_kept, boxes_kept, labels_kept, crowd_kept, areas_kept = (part[kept] for part in found)
    return image_kept, boxes_kept, labels_kept, crowd_kept, areas_kept


def enclosing_box(bbox: Any, name: str) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a `bbox`, see `open_split`.

    Args:
      bbox: its numbers.
      name: of the annotation, for messages.

    Raises:
      UserError: it is something else.
    """
    numbers = np.array([])
    if isinstance(bbox, list) and all(isinstance(one, int | float) for one in bbox):
        numbers = np.array(bbox, np.float64)
    if len(numbers) not in (4, 5, 8) or not np.isfinite(numbers).all():
        raise UserError(
            f"{name} has bbox={bbox!r}; expected [left, top, width, height], or a rotated box: "
            "[middle x, middle y, width, height, degrees] or four corners"
        )
    if len(numbers) == 8:
        corners = numbers.reshape(4, 2)
        low = corners.min(axis=0)
        high = corners.max(axis=0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])
    left, top, width, height = numbers[:4].tolist()
    if len(numbers) == 5:
        angle = math.radians(numbers[4])
        sine = abs(math.sin(angle))
        cosine = abs(math.cos(angle))
        across = width * cosine + height * sine
        down = width * sine + height * cosine
        return left - across / 2, top - down / 2, left + across / 2, top + down / 2
    return left, top, left + width, top + height


def _clip(
    file: pathlib.Path, boxes: Float[np.ndarray, "A 4"], sizes: Int[np.ndarray, "A 2"]
) -> Int[np.ndarray, " _"]:
    """Clip boxes to their images, in place; the indices of those with an area.

    Raises:
      UserError: boxes are outside of their images, or seem to be shares of these.
    """
    if len(boxes) and boxes.max() <= 1:
        raise UserError(f"{file}: no box is beyond 1; boxes are given in pixels, not as shares")
    limits = np.tile(sizes[:, ::-1], 2)
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    flat = int((~has_area).sum())
    if flat:
        log.warning("%s: %d box(es) without an area are left out", file, flat)
    clipped = np.clip(boxes, 0, limits)
    is_inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    outside = np.flatnonzero(has_area & ~is_inside)
    if len(outside):
        box = boxes[outside[0]].round(1).tolist()
        height, width = sizes[outside[0]].tolist()
        raise UserError(
            f"{file}: {len(outside):,} of {len(boxes):,} boxes are outside of their images, such "
            f"as {box} (left, top, right, bottom) of an image of {width} x {height} pixels"
        )
    beyond = np.abs(clipped - boxes).max(axis=1, initial=0) > OUTSIDE
    if (beyond & has_area).any():
        count = int((beyond & has_area).sum())
        log.warning("%s: %d box(es) reach beyond their images and are cut off there", file, count)
    boxes[:] = clipped
    return np.flatnonzero(has_area)
