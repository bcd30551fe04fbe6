"""Records of a prepared dataset with labels, or a selection, from a CSV file; see label_file.py.

The column `image` holds numbers of records, counted from 0 in each split, or the names of the files
that they were, where the records store these (`lmim prepare` and TFDS's imagenet2012 do). A column
`split` says which split a row belongs to; without it, all rows are for training.
"""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from lmim_jax.data import label_file, tfds_source
from lmim_jax.data.label_file import LabelFile, Targets
from lmim_jax.data.shared_array import share
from lmim_jax.data.tfds_source import TfdsSource
from lmim_jax.utils.errors import UserError


def open_split(source: TfdsSource, config: ConfigDict, split: str) -> TfdsSource | None:
    """The records of a split that are in `config.labels`, with its labels.

    Args:
      source: all records of the split.
      config: `config.data`.
      split: "train" or "test".

    Returns:
      The source; None for a test split without rows.

    Raises:
      UserError: a row cannot be read, or more than `config.max_bad_fraction` have no record.
    """
    file = label_file.read(config.labels, config.labels_kind)
    train_rows = _rows(file, config, "train")
    rows = _rows(file, config, split)
    if not len(rows):
        if split == "train":
            raise UserError(
                f"{file.path}: no row is of the split config.data.train_split="
                f"{config.train_split!r}"
            )
        return None
    part = file.select(rows.tolist())
    places = _places(source, part)
    missing = np.flatnonzero(places < 0)
    if len(missing) > config.max_bad_fraction * len(part) or len(missing) == len(part):
        first = int(missing[0])
        raise UserError(
            f"{part.where(first)}: there is no record {part.images[first]!r} among the "
            f"{len(source):,} of {source.title} (a number from 0 on, or the name of a file where "
            f"records store it); {len(missing):,} of {len(part):,} rows have no record"
        )
    order = np.argsort(places, kind="stable")[len(missing) :]
    part = part.select(order.tolist())
    places = places[order]
    for row in np.flatnonzero(places[1:] == places[:-1]).tolist():  # 5 and 05
        raise UserError(f"{part.where(row + 1)}: the same record as in {part.where(row)}")
    kept = share(places)
    checksum = hashlib.sha256(places.tobytes())
    if part.values is not None:
        checksum.update(part.values.tobytes() + "\n".join(part.names).encode())
        targets = Targets(part.kind, part.names, share(part.values.reshape(-1)))
        return dataclasses.replace(
            source,
            kept=kept,
            classes=(),
            label_feature=None,
            targets=targets,
            labels_checksum=checksum.hexdigest(),
        )
    if part.classes is None or file.classes is None:  # a list: labels as stored
        return dataclasses.replace(source, kept=kept, labels_checksum=checksum.hexdigest())
    present = np.unique(file.classes[train_rows])
    numbers = np.full(len(file.names), -1, np.int32)
    numbers[present] = np.arange(len(present))
    labels = numbers[part.classes]
    checksum.update(labels.tobytes())
    return dataclasses.replace(
        source,
        kept=kept,
        classes=tuple(file.names[number] for number in present),
        labels=share(labels),
        labels_checksum=checksum.hexdigest(),
    )


def _rows(file: LabelFile, config: ConfigDict, split: str) -> Int[np.ndarray, " n"]:
    """The rows of a split; slices such as train[:10%] count as the split."""
    if file.splits is None:
        if split == "test":
            return np.zeros(0, np.int64)
        return np.arange(len(file))
    name = {"train": config.train_split, "test": config.test_split}[split].partition("[")[0]
    return np.flatnonzero([found == name for found in file.splits])


def _places(source: TfdsSource, file: LabelFile) -> Int[np.ndarray, " n"]:
    """The record of each row; -1: there is none."""
    if all(image.isdecimal() for image in file.images):
        numbers = np.array([int(image) for image in file.images], np.int64)
        return np.where(numbers < len(source), numbers, -1)
    places = {name: place for place, name in enumerate(tfds_source.read_file_names(source))}
    return np.array([places.get(image, -1) for image in file.images], np.int64)
