"""Additional test images of ImageNet: ImageNet-V2, and the labels "ReaL" of the validation images.

Sources: Recht et al. 2019, Do ImageNet classifiers generalize to ImageNet?; Beyer et al. 2020, Are
we done with ImageNet? (real.json of github.com/google-research/reassessed-imagenet).
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from lmim_jax.data import folder_source
from lmim_jax.data.eval.eval_data import AcceptedClasses, Subset
from lmim_jax.data.eval.file_names import file_names
from lmim_jax.data.folder_source import FolderSource
from lmim_jax.data.shared_array import share
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

V2 = "v2"
REAL = "real"
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")  # counted from 1
LISTED = 3


class ExtraTest(NamedTuple):
    """Test images and what counts as correct for them."""

    source: Any
    accepted: AcceptedClasses


def open_v2(path: str, classes: tuple[str, ...]) -> ExtraTest:
    """The images of ImageNet-V2: a folder for each class.

    Folders are named as the classes, or by their numbers, 0 .. 999, in the order of ImageNet, which
    is that of the sorted names of all classes.

    Args:
      path: of the folder, such as imagenetv2-matched-frequency-format-val.
      classes: of the training images.

    Raises:
      UserError: there is no such folder, or its subfolders are not these classes.
    """
    top = pathlib.Path(path).expanduser()
    if not top.is_dir():
        raise UserError(f"--imagenet_v2={path}: no such folder")
    found = folder_source.list_once(top, {})
    numbers = _class_numbers(found.classes, classes, path)
    labels = np.full(len(found.images), folder_source.NO_CLASS, np.int32)
    start = 0
    for name, count in found.runs:
        labels[start : start + count] = numbers.get(name, folder_source.NO_CLASS)
        start += count
    kept = np.flatnonzero(labels >= 0)
    source = FolderSource(str(top), found.images.select(kept), share(labels[kept]), classes)
    return ExtraTest(source, AcceptedClasses(labels[kept], np.arange(len(kept) + 1)))


def _class_numbers(folders: tuple[str, ...], classes: tuple[str, ...], path: str) -> dict[str, int]:
    """The class of each folder."""
    if not folders:
        raise UserError(f"--imagenet_v2={path} holds no folders with images")
    if set(folders) <= set(classes) and not all(name.isdecimal() for name in folders):
        return {name: classes.index(name) for name in folders}
    if all(name.isdecimal() for name in folders):
        largest = max(int(name) for name in folders)
        if largest < len(classes) and list(classes) == sorted(classes, key=_natural):
            return {name: int(name) for name in folders}
        raise UserError(
            f"--imagenet_v2={path}: its folders are numbers up to {largest}, which count all "
            f"classes of ImageNet in order; these images have {len(classes)} classes"
        )
    unknown = sorted(set(folders) - set(classes))
    raise UserError(
        f"--imagenet_v2={path}: no classes of these images: {', '.join(unknown[:LISTED])} "
        f"({len(unknown)} of {len(folders)} folders)"
    )


def _natural(name: str) -> tuple[int, str]:
    """Sorts numbers as numbers, and other names as text."""
    return (int(name), "") if name.isdecimal() else (0, name)


def open_real(path: str, test: Any, classes: tuple[str, ...]) -> ExtraTest:
    """The validation images of ImageNet that have labels in real.json, with these.

    Args:
      path: of the file: a list of class numbers for each image, in the order of their names.
      test: the source of the test images, whose files have their original names.
      classes: of the training images.

    Raises:
      UserError: the file or the images are others.
    """
    labels = _read_real(path, len(classes))
    if test is None:
        raise UserError(f"--imagenet_real={path}: there are no test images")
    indices = []
    found: list[list[int]] = []
    for index, name in enumerate(file_names(test)):
        match = VALIDATION.search(name)
        number = int(match[1]) if match else 0
        if not 0 < number <= len(labels):
            raise UserError(
                f"--imagenet_real={path}: the test image {test.name(index)} is not one of "
                f"ILSVRC2012_val_00000001 .. {len(labels):08d}"
            )
        if labels[number - 1]:
            indices.append(index)
            found.append(labels[number - 1])
    if not indices:
        raise UserError(f"--imagenet_real={path}: no test image has a label in it")
    starts = np.concatenate([[0], np.cumsum([len(own) for own in found])])
    accepted = AcceptedClasses(np.concatenate([np.array(own) for own in found]), starts)
    return ExtraTest(Subset(test, tuple(indices), classes), accepted)


def _read_real(path: str, classes: int) -> list[list[int]]:
    try:
        labels = json.loads(buckets.path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--imagenet_real={path} cannot be read ({error})") from error
    if not isinstance(labels, list) or not all(isinstance(own, list) for own in labels):
        raise UserError(f"--imagenet_real={path} must be a list of lists of class numbers")
    for number, own in enumerate(labels, 1):
        for label in own:
            if not isinstance(label, int) or not 0 <= label < classes:
                raise UserError(
                    f"--imagenet_real={path}: image {number} has the label {label!r}, but these "
                    f"images have {classes} classes, in the order of ImageNet"
                )
    return labels
