"""Paths of images whose folders are splits and classes, as in a folder of images.

If there is a folder train/, splits are the topmost folders, and classes the folders in them. Else
all images are for training, and the topmost folders are the classes, if every image is in one.
"""

from collections.abc import Iterable, Sequence

from lmim_jax.data.prepare import packed


def splits_of(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The split of each path, "": none; and what to take off the path, such as train/."""
    if not any(name.startswith(f"{packed.TRAIN}/") for name in names):
        return [packed.TRAIN] * len(names), [""] * len(names)
    splits = []
    prefixes = []
    for name in names:
        top, slash, _ = name.partition("/")
        is_split = slash and top in packed.SPLITS
        splits.append(top if is_split else "")
        prefixes.append(f"{top}/" if is_split else "")
    return splits, prefixes


def in_order(splits: Iterable[str]) -> list[str]:
    """The splits that occur: train, test, val, validation, others."""
    found = dict.fromkeys(filter(None, splits))
    known = [split for split in packed.SPLITS if split in found]
    return known + [split for split in found if split not in known]


def labels_of(names: Sequence[str], *, required: bool) -> list[str | None]:
    """The topmost folder of each path, None: there is none.

    Args:
      names: paths from the folder of the split on.
      required: if one of them has no folder, none has a class.
    """
    labels: list[str | None] = []
    for name in names:
        labels.append(name.partition("/")[0] if "/" in name else None)
    absolute = any(name.startswith("/") for name in names)
    if absolute or (required and None in labels):
        return [None] * len(names)
    return labels
