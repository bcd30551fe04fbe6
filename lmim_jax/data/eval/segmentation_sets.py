"""Official folder layouts of segmentation datasets, and their masks as classes.

Letters: H W height and width of a mask, C classes.
"""

import dataclasses
import io
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16, Int32
from PIL import Image

from lmim_jax.data import folder_listing, samples, sources
from lmim_jax.data.decode import SUFFIXES, BadImage
from lmim_jax.data.eval.eval_data import Subset, random_indices
from lmim_jax.data.eval.segmentation_masks import ImagesWithMasks, decode_mask
from lmim_jax.utils import buckets, faults
from lmim_jax.utils.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

IGNORED = -1  # the class of pixels that do not count
UNKNOWN = -2  # of pixels whose number is neither a class nor ignored
LARGEST = 65_535  # number in a mask
LISTED = 3  # names in a message

# Folders of images and masks of a split, below the dataset: the first that exist are taken
FOLDERS = (
    ("{split}/images", "{split}/masks"),
    ("{split}/images", "{split}/labels"),
    ("images/{split}", "masks/{split}"),
    ("images/{split}", "labels/{split}"),
    ("images/{split}", "annotations/{split}"),
    ("{split}", "{split}annot"),
    ("{split}", "{split}_labels"),
)
# Of CamVid as published, where lists divide the images
CAMVID_FOLDERS = (
    ("701_StillsRaw_full", "LabeledApproved_full"),
    ("images", "labels"),
    ("images", "masks"),
)
CAMVID_MASK = "_L"  # at the end of the name of a mask in colors

# Colors of CamVid's 32 classes and their number among SegNet's 11 classes; 11: void
# Source: Badrinarayanan et al., SegNet, 2017, and label_colors.txt of CamVid
CAMVID_COLORS = {
    (128, 128, 128): 0,  # Sky
    (0, 128, 64): 1,  # Bridge
    (128, 0, 0): 1,  # Building
    (64, 192, 0): 1,  # Wall
    (64, 0, 64): 1,  # Tunnel
    (192, 0, 128): 1,  # Archway
    (192, 192, 128): 2,  # Column_Pole
    (0, 0, 64): 2,  # TrafficCone
    (128, 64, 128): 3,  # Road
    (128, 0, 192): 3,  # LaneMkgsDriv
    (192, 0, 64): 3,  # LaneMkgsNonDriv
    (0, 0, 192): 4,  # Sidewalk
    (64, 192, 128): 4,  # ParkingBlock
    (128, 128, 192): 4,  # RoadShoulder
    (128, 128, 0): 5,  # Tree
    (192, 192, 0): 5,  # VegetationMisc
    (192, 128, 128): 6,  # SignSymbol
    (128, 128, 64): 6,  # Misc_Text
    (0, 64, 64): 6,  # TrafficLight
    (64, 64, 128): 7,  # Fence
    (64, 0, 128): 8,  # Car
    (64, 128, 192): 8,  # SUVPickupTruck
    (192, 128, 192): 8,  # Truck_Bus
    (192, 64, 128): 8,  # Train
    (128, 64, 64): 8,  # OtherMoving
    (64, 64, 0): 9,  # Pedestrian
    (192, 128, 64): 9,  # Child
    (64, 0, 192): 9,  # CartLuggagePram
    (64, 128, 64): 9,  # Animal
    (0, 128, 192): 10,  # Bicyclist
    (192, 0, 192): 10,  # MotorcycleScooter
    (0, 0, 0): 11,  # Void
}
COLORS = {"camvid": CAMVID_COLORS}  # layout: {color in masks: number}


class Pair(NamedTuple):
    """An image and its mask: paths relative to the folder of the dataset."""

    image: str
    mask: str


# -- layouts


def open_split(layout: str, path: str, split: str, most: int) -> Any:
    """The images of a split that have masks, as a source (see data/sources.py).

    Args:
      layout: one of LAYOUTS.
      path: the folder of the dataset, as it is unpacked.
      split: its name in the dataset.
      most: so many images, drawn at random, the same at every call; 0: all.

    Raises:
      UserError: unknown layout, a folder or list is missing, or an image or mask of a public
        dataset.
    """
    if layout not in LAYOUTS:
        raise UserError(
            f"layout={layout!r} must be one of: {' | '.join(LAYOUTS)}"
            f"{did_you_mean(layout, LAYOUTS)}"
        )
    root = buckets.local_path(path)
    if not path or not root.is_dir():
        raise UserError(f"path={path!r} is not a folder; give the folder of the dataset ({layout})")
    root, pairs = LAYOUTS[layout](root, split)
    pairs = _existing(root, pairs, split, strict=layout != "folder")
    images = folder_listing.share_names(pair.image for pair in pairs)
    folder = sources.FolderSource(root=str(root), files=images, labels=None, classes=())
    source: Any = ImagesWithMasks(folder, tuple(str(root / pair.mask) for pair in pairs))
    if most and most < len(source):
        return Subset(source, random_indices(source, most))
    return source


def _existing(root: pathlib.Path, pairs: list[Pair], split: str, strict: bool) -> list[Pair]:
    """The pairs of which both files exist; the others are named, with `strict` as an error."""
    missing = []
    found = []
    for pair in pairs:
        lacking = [name for name in pair if not (root / name).is_file()]
        missing += lacking[:1]
        if not lacking:
            found.append(pair)
    if not missing:
        return found
    listed = ", ".join(missing[:LISTED]) + ", ..." * (len(missing) > LISTED)
    message = (
        f"{root}: {len(missing):,} of {len(pairs):,} images of the split {split!r} lack a file: "
        f"{listed}"
    )
    if strict or not found:
        raise UserError(f"{message}; unpack the dataset again, figures of a part do not compare")
    log.warning("%s; they are left out", message)
    return found


def _voc(root: pathlib.Path, split: str) -> tuple[pathlib.Path, list[Pair]]:
    """Pascal VOC 2012: lists of names, JPEG images, masks with a palette."""
    root = _find_root(root, ("", "VOC2012", "VOCdevkit/VOC2012"), "SegmentationClass")
    names = _read_list(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    pairs = []
    for (name,) in names:
        pairs.append(Pair(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"))
    return root, pairs


def _ade20k(root: pathlib.Path, split: str) -> tuple[pathlib.Path, list[Pair]]:
    """ADE20K of the scene parsing challenge: images/SPLIT, annotations/SPLIT."""
    root = _find_root(root, ("", "ADEChallengeData2016"), "annotations")
    pairs = []
    for name in _list_images(root / "images" / split):
        stem = name.rpartition(".")[0]
        pairs.append(Pair(f"images/{split}/{name}", f"annotations/{split}/{stem}.png"))
    return root, pairs


def _cityscapes(root: pathlib.Path, split: str) -> tuple[pathlib.Path, list[Pair]]:
    """Cityscapes: leftImg8bit/SPLIT/CITY, gtFine/SPLIT/CITY with the numbers of labelIds."""
    suffix = "_leftImg8bit.png"
    pairs = []
    for name in _list_images(root / "leftImg8bit" / split):
        if name.endswith(suffix):
            mask = f"gtFine/{split}/{name.removesuffix(suffix)}_gtFine_labelIds.png"
            pairs.append(Pair(f"leftImg8bit/{split}/{name}", mask))
    if not pairs:
        raise UserError(f"{root}/leftImg8bit/{split}: no image is named *{suffix}")
    return root, pairs


def _camvid(root: pathlib.Path, split: str) -> tuple[pathlib.Path, list[Pair]]:
    """CamVid: a list SPLIT.txt of names or of pairs of paths, or folders as in `_folder`."""
    listing = root / f"{split}.txt"
    if not listing.is_file():
        return _folder(root, split)
    pairs = []
    masks: dict[str, str] = {}
    for entry in _read_list(listing):
        if len(entry) == 2:
            pairs.append(Pair(_below(root, entry[0]), _below(root, entry[1])))
            continue
        folders = _first_folders(root, CAMVID_FOLDERS, split)
        masks = masks or _by_stem(root, folders.mask)
        name = pathlib.PurePosixPath(entry[0])
        stem = name.name.removesuffix(".png")
        pairs.append(Pair(f"{folders.image}/{stem}.png", masks.get(stem, f"{folders.mask}/{stem}")))
    return root, pairs


def _folder(root: pathlib.Path, split: str) -> tuple[pathlib.Path, list[Pair]]:
    """Two folders of images and masks of the same names, one of FOLDERS."""
    folders = _first_folders(root, FOLDERS, split)
    masks = _by_stem(root, folders.mask)
    pairs = []
    for name in _list_images(root / folders.image):
        stem = name.rpartition(".")[0]
        pairs.append(Pair(f"{folders.image}/{name}", masks.get(stem, f"{folders.mask}/{stem}.png")))
    return root, pairs


LAYOUTS = {
    "voc": _voc,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "camvid": _camvid,
    "folder": _folder,
}


def _find_root(root: pathlib.Path, below: Sequence[str], wanted: str) -> pathlib.Path:
    """The first of these folders below `root` that has the subfolder `wanted`."""
    for name in below:
        if (root / name / wanted).is_dir():
            return root / name
    raise UserError(f"path={str(root)!r} has no folder {wanted}; is it that of another dataset?")


def _read_list(path: pathlib.Path) -> list[list[str]]:
    """The words of the lines of a file."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of a split cannot be read: {path} ({error})") from error
    entries = [line.split() for line in lines if line.strip()]
    if not entries:
        raise UserError(f"{path}: this list of a split is empty")
    return entries


def _list_images(folder: pathlib.Path) -> list[str]:
    """The names of the images below a folder, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; train_split and test_split name the splits")
    names = list(folder_listing.list_folder(folder).images)
    if not names:
        raise UserError(f"{folder}: no images in this folder (searched for {', '.join(SUFFIXES)})")
    return names


def _by_stem(root: pathlib.Path, folder: str) -> dict[str, str]:
    """{name without suffix and CamVid's "_L": path} of the masks in a folder."""
    found = {}
    for name in _list_images(root / folder):
        found[name.rpartition(".")[0].removesuffix(CAMVID_MASK)] = f"{folder}/{name}"
    return found


def _first_folders(root: pathlib.Path, choices: Iterable[tuple[str, str]], split: str) -> Pair:
    """The first two folders of `choices` that exist."""
    for names in choices:
        pair = Pair(names[0].format(split=split), names[1].format(split=split))
        if (root / pair.image).is_dir() and (root / pair.mask).is_dir():
            return pair
    expected = " or ".join(f"{image} and {mask}".format(split=split) for image, mask in choices)
    raise UserError(
        f"path={str(root)!r} has no images and masks of the split {split!r}; expected {expected}"
    )


def _below(root: pathlib.Path, name: str) -> str:
    """A path of a list that begins somewhere else: its longest end that exists below `root`."""
    parts = pathlib.PurePosixPath(name).parts
    for first in range(len(parts)):
        end = "/".join(parts[first:])
        if not end.startswith("/") and (root / end).is_file():
            return end
    return name.lstrip("/")


# -- masks


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the numbers in masks mean.

    Attributes:
      classes: number of each class in mask files.
      ignored: numbers of pixels that do not count.
      names: of the classes.
      colors: {color: number}, for masks in colors; empty: there are none.
    """

    classes: tuple[int, ...]
    ignored: tuple[int, ...]
    names: tuple[str, ...]
    colors: dict[tuple[int, int, int], int]

    @classmethod
    def from_options(
        cls, classes: Sequence[int], ignored: Sequence[int], names: Sequence[str], layout: str
    ) -> "Labels":
        """Labels, checked.

        Args:
          classes: numbers of the classes.
          ignored: numbers that do not count.
          names: of the classes; (): their numbers.
          layout: one of LAYOUTS.

        Raises:
          UserError: the numbers contradict each other.
        """
        both = sorted(set(classes) & set(ignored))
        if both:
            raise UserError(f"{both} are in `classes` and in `ignore`; a number is one of them")
        if len(set(classes)) < max(2, len(classes)):
            raise UserError(
                f"classes={tuple(classes)}: at least two different numbers are needed, or there "
                "is nothing to segment"
            )
        if min(classes) < 0 or max(classes) > LARGEST:
            raise UserError(f"classes={tuple(classes)}: numbers in masks are 0 .. {LARGEST}")
        if names and len(names) != len(classes):
            raise UserError(f"names has {len(names)} names for {len(classes)} classes")
        chosen = tuple(names) or tuple(str(number) for number in classes)
        return cls(tuple(classes), tuple(ignored), chosen, COLORS.get(layout, {}))

    def table(self) -> Int16[np.ndarray, " n"]:
        """The class of each number: 0 .. C - 1, IGNORED or UNKNOWN."""
        table = np.full(LARGEST + 1, UNKNOWN, np.int16)
        ignored = [number for number in self.ignored if 0 <= number <= LARGEST]
        table[ignored] = IGNORED
        table[list(self.classes)] = np.arange(len(self.classes))
        return table

    def read(self, source: Any, index: int, retry_seconds: float) -> Int16[np.ndarray, "H W"]:
        """The class of each pixel of an image, 0 .. C - 1 or IGNORED.

        Args:
          source: as `open_split` returns it.
          index: of the image.
          retry_seconds: how long a failing storage is waited for.

        Raises:
          UserError: the mask cannot be read, is not as large as the image, or has other numbers.
        """
        numbers = read_numbers(source, index, self.colors, retry_seconds)
        size = _image_size(source, index)
        name = source.name(index)
        if numbers.shape != size:
            raise UserError(
                f"{name} has {size[1]} x {size[0]} pixels, and its mask {numbers.shape[1]} x "
                f"{numbers.shape[0]}; they must lie on each other"
            )
        if numbers.min() < 0 or numbers.max() > LARGEST:
            raise UserError(f"the mask of {name} has numbers outside of 0 .. {LARGEST}")
        classes = self.table()[numbers]
        if (classes == UNKNOWN).any():
            unknown = np.unique(numbers[classes == UNKNOWN]).tolist()
            raise UserError(
                f"the mask of {name} has the numbers {unknown[:LISTED]}, which are neither in "
                "`classes` nor in `ignore`; add them to one of these"
            )
        return classes


def read_numbers(
    source: Any, index: int, colors: dict[tuple[int, int, int], int], retry_seconds: float
) -> Int32[np.ndarray, "H W"]:
    """The numbers in the mask of an image.

    Args:
      source: as `open_split` returns it.
      index: of the image.
      colors: see `Labels`.
      retry_seconds: how long a failing storage is waited for.

    Raises:
      UserError: it cannot be read.
    """

    def decode() -> Int32[np.ndarray, "H W"]:
        data = source.mask(index)
        numbers = _decode_colors(data, colors)
        return decode_mask(data) if numbers is None else numbers

    try:
        return faults.retry(decode, lambda: source.name(index), retry_seconds)
    except (BadImage, OSError) as error:
        raise UserError(f"the mask of {source.name(index)} cannot be used: {error}") from error


def _decode_colors(
    data: bytes, colors: dict[tuple[int, int, int], int]
) -> Int32[np.ndarray, "H W"] | None:
    """The numbers of a mask in colors; None: it has no colors, or they mean nothing."""
    if not colors:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("RGB", "RGBA"):
                return None
            pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    except Exception:  # damaged: reported by `decode_mask`
        return None
    packed = pixels @ np.array([1 << 16, 1 << 8, 1], np.int32)
    numbers = np.full(packed.shape, -1, np.int32)
    for (red, green, blue), number in colors.items():
        numbers[packed == (red << 16) + (green << 8) + blue] = number
    if (numbers < 0).any():
        row, column = np.argwhere(numbers < 0)[0]
        raise BadImage(f"the color {tuple(pixels[row, column].tolist())} is that of no class")
    return numbers


def _image_size(source: Any, index: int) -> tuple[int, int]:
    """(height, width) of an image, from the header of its file."""
    data = source.record(index)[0]
    if data.startswith(samples.NPY):
        return np.load(io.BytesIO(data)).shape[:2]
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except OSError as error:
        raise UserError(f"{source.name(index)} cannot be read: {error}") from error


def find_classes(split: Any, ignored: Sequence[int], layout: str, retry_seconds: float) -> set[int]:
    """The numbers in all masks of a source, without the ignored ones; reads every mask."""
    colors = COLORS.get(layout, {})
    found: set[int] = set()
    for index in range(len(split)):
        found |= set(np.unique(read_numbers(split, index, colors, retry_seconds)).tolist())
    return found - set(ignored)


def read_ade20k_names(path: str) -> tuple[str, ...]:
    """The names of the 150 classes, from objectInfo150.txt of the dataset; () if it is not there.

    Args:
      path: the folder of the dataset.
    """
    root = _find_root(buckets.local_path(path), ("", "ADEChallengeData2016"), "annotations")
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return ()
    names = []
    for line in file.read_text().splitlines()[1:]:
        names.append(line.rpartition("\t")[2].partition(",")[0].strip())
    return tuple(names)
