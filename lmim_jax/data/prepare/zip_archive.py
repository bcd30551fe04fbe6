"""A zip file with images: its folders are splits and classes, as those of a folder of images."""

import collections
import pathlib
import zipfile
import zlib

import numpy as np

from lmim_jax.data.decode import NPY_SUFFIX, SUFFIXES
from lmim_jax.data.image_options import BadImage
from lmim_jax.data.prepare import folders, packed
from lmim_jax.utils import faults
from lmim_jax.utils.errors import UserError

ENCRYPTED = 1  # a bit of the flags of a member
# A member that unpacks to more bytes than this, and to so many times its own, is a bomb
BOMB_BYTES = 1 << 26
BOMB_RATIO = 200
HIDDEN = (".", "__MACOSX")


def open_zip(path: str) -> zipfile.ZipFile:
    """A zip file, whose directory is read.

    Raises:
      UserError: it is none, or truncated.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{path} is no whole zip file ({faults.first_line(error)}); fetch it again"
        ) from error


def open_splits(path: str, label: str) -> packed.Opened:
    """Sources of the splits of a zip file.

    A single folder that holds all others is skipped. Folders are splits and classes, see `folders`.
    Files are sorted by path.

    Args:
      path: of the zip file.
      label: "none": no labels.

    Raises:
      UserError: it is damaged or encrypted, holds different files of the same name, or no images.
    """
    with open_zip(path) as archive:
        found = archive.infolist()
    left_out: collections.Counter[str] = collections.Counter()
    images = _images(path, found, left_out)
    if not images:
        suffixes = ", ".join(f"{count:,} {why}" for why, count in left_out.most_common(3))
        raise UserError(f"{path}: no images in this zip file; {suffixes or 'it is empty'}")
    top = _common_folder(images)
    names = [name.removeprefix(top) for name in images]
    splits, prefixes = folders.splits_of(names)
    parts = {}
    for split in folders.in_order(splits):
        rows = [row for row, other in enumerate(splits) if other == split]
        prefix = prefixes[rows[0]]
        inner = [names[row].removeprefix(prefix) for row in rows]
        places = [images[top + names[row]] for row in rows]
        labels: list[str | None] = [None] * len(inner)
        if label != packed.NO_LABEL:
            labels = folders.labels_of(inner, required=not prefix)
        sizes = [found[place].file_size for place in places]
        part = packed.Part(
            path, inner, np.array(places, np.int64), np.array(sizes, np.int64), labels
        )
        parts[split] = [part]
    unused = splits.count("")
    if unused:
        left_out["images that are in no folder of a split"] = unused
    return packed.Opened(packed.open_parts(ZipSource, parts).splits, dict(left_out))


def _images(
    path: str, found: list[zipfile.ZipInfo], left_out: collections.Counter[str]
) -> dict[str, int]:
    """{name: place in the directory} of the images, sorted; what else there is, is counted."""
    places: dict[str, int] = {}
    for place, member in enumerate(found):
        name = member.filename.removeprefix("./")
        if member.is_dir() or any(part.startswith(HIDDEN) for part in name.split("/")):
            continue
        if not name.lower().endswith(SUFFIXES):
            left_out[f"{pathlib.PurePosixPath(name).suffix or 'other'} files"] += 1
            continue
        if member.flag_bits & ENCRYPTED:
            raise UserError(
                f"{path} is encrypted ({name}); unpack it with its password, and prepare the folder"
            )
        if name in places:
            former = found[places[name]]
            if (former.CRC, former.file_size) != (member.CRC, member.file_size):
                raise UserError(
                    f"{path} holds two different files of the name {name!r}; pack it again"
                )
            left_out["files that occur twice"] += 1
            continue
        places[name] = place
    others = {_folder(name) for name in places if not name.lower().endswith(NPY_SUFFIX)}
    images = {}
    for name in sorted(places):
        if name.lower().endswith(NPY_SUFFIX) and _folder(name) in others:
            left_out[f"{NPY_SUFFIX} files"] += 1
        else:
            images[name] = places[name]
    return images


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _common_folder(names: dict[str, int]) -> str:
    """The folder that holds all others, with its "/": "" if there is none."""
    top = ""
    while True:
        firsts = {name.removeprefix(top).partition("/")[0] for name in names}
        seconds = {name.removeprefix(top).count("/") for name in names}
        (first, *others) = sorted(firsts)
        # A folder of images is no folder of folders
        if others or min(seconds) < 2 or first == packed.TRAIN:
            return top
        top += f"{first}/"


class ZipSource(packed.PackedSource):
    """Images in a zip file; `places` are those in its directory."""

    def read(self, path: str, index: int) -> bytes:
        """The bytes of an image; BadImage if they are damaged or a bomb."""
        archive = packed.opened(open_zip, path)
        member = archive.infolist()[int(self.places.array[index])]
        most = max(BOMB_BYTES, BOMB_RATIO * member.compress_size)
        if member.file_size > most:
            raise BadImage(
                f"{member.compress_size:,} bytes that unpack to {member.file_size:,}: a zip bomb"
            )
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise BadImage(faults.first_line(error)) from error
        except OSError:
            packed.opened.cache_clear()
            raise
