"""The names of the files that the images of a source are, or were; and lists of such names."""

import collections
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lmim_jax.data import tfds_source
from lmim_jax.data.tfds_source import TfdsSource
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError


class Found(NamedTuple):
    """The images of a list.

    Attributes:
      indices: of the images in their source, sorted.
      missing: names in the list that no image has.
    """

    indices: Int[np.ndarray, " n"]
    missing: tuple[str, ...]


def file_names(source: Any) -> list[str]:
    """Paths below the folder, or the names that records store; all processes must call it.

    Raises:
      UserError: the records store no names.
    """
    if not isinstance(source, TfdsSource):
        return list(source.files)
    names = tfds_source.read_file_names(source)
    if not any(names):
        raise UserError(f"{source.title}: its records do not store the names of files")
    return names


def find_listed(path: str, source: Any) -> Found:
    """The images in a list of names of files, one per line, such as SimCLR's 1percent.txt.

    Args:
      path: of the list.
      source: the images; a line is a path below their folder, or its last part.

    Raises:
      UserError: the list cannot be read or names no image, or a name is that of several images.
    """
    try:
        lines = buckets.path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of images ({error})") from error
    names = file_names(source)
    places = {name: place for place, name in enumerate(names)}
    short = [name.rpartition("/")[2] for name in names]
    short_places = {name: place for place, name in enumerate(short)}
    counts = collections.Counter(short)
    indices = set()
    missing = []
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        place = places.get(name)
        if place is None and counts[name] > 1:
            raise UserError(
                f"{path}, line {number}: {counts[name]} images are called {name!r}; give their "
                "paths below the folder"
            )
        if place is None:
            place = short_places.get(name)
        if place is None:
            missing.append(name)
        else:
            indices.add(place)
    if not indices:
        raise UserError(
            f"{path} names none of the {len(names):,} images, such as {names[0]!r}; its first name "
            f"is {missing[0] if missing else ''!r}"
        )
    return Found(np.array(sorted(indices), np.int64), tuple(missing))
