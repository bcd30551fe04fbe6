"""WebDataset shards: tar files whose members make up samples by the names up to the first point.

    train-0000.tar: 000001.jpg 000001.cls 000002.jpg 000002.cls ...

A shard is read from its start to its end, header after header; `.tar.gz` is unpacked on the way.
"""

import dataclasses
import gzip
import json
import pathlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from lmim_jax.data.decode import NPY_SUFFIX, SUFFIXES
from lmim_jax.data.image_options import BadImage
from lmim_jax.data.prepare import packed
from lmim_jax.utils.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz")
LABEL = "cls"
BLOCK = 512  # bytes; a tar ends with blocks of zeros
CHUNK = 1 << 20  # bytes that are unpacked at a time
LONGEST_LABEL = 1 << 24  # bytes of a member that holds a label
SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # key, kind
JSON_FIELD = re.compile(r"((?:.*\.)?json)\.(.+)")  # kind, field


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
      name: without "./".
      start: its first byte in the (unpacked) tar.
      size: bytes.
    """

    name: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Looks through shards; can be pickled.

    Attributes:
      image: kind of the members that are the images, such as jpg; "": the only image of a sample.
      label: kind of the members that hold the class as text, such as cls; json.FIELD: a field of
        the members json; "": cls; "none": no labels.
    """

    image: str
    label: str

    def __call__(self, path: str) -> packed.Part:
        """The samples of a shard, in the order of their first members.

        Raises:
          UserError: the shard is damaged, a sample holds several images, or a label is no text.
        """
        label_kind = self.label or LABEL
        field = ""
        in_json = JSON_FIELD.fullmatch(label_kind)
        if in_json:
            label_kind, field = in_json.groups()
        label_kind = label_kind.lower()  # as kinds of members are
        samples: dict[str, dict[str, Member]] = {}
        labels: dict[str, str | None] = {}
        with open_tar(path) as file:
            for member in members(path, file):
                named = SAMPLE.fullmatch(member.name)
                if not named:
                    continue
                key = named[1]
                kind = named[2].lower()
                sample = samples.setdefault(key, {})
                if kind in sample:
                    raise UserError(
                        f"{path} holds {member.name!r} twice, at bytes {sample[kind].start:,} and "
                        f"{member.start:,}: keys must be unique in a shard"
                    )
                sample[kind] = member
                if kind == label_kind:
                    labels[key] = _read_label(path, file, member, field)
        return self._part(path, samples, labels)

    def _part(
        self, path: str, samples: dict[str, dict[str, Member]], labels: dict[str, str | None]
    ) -> packed.Part:
        images = []
        of_images = []
        for key, sample in samples.items():
            image = self._choose(path, key, sample)
            if image is not None:
                images.append(image)
                of_images.append(labels.get(key))
        left_out = {}
        if len(images) < len(samples):
            what = f"a .{self.image}" if self.image else "an image"
            left_out[f"samples without {what}"] = len(samples) - len(images)
        return packed.Part(
            path=path,
            names=[image.name for image in images],
            places=np.array([image.start for image in images], np.int64),
            sizes=np.array([image.size for image in images], np.int64),
            labels=of_images,
            left_out=left_out,
        )

    def _choose(self, path: str, key: str, sample: dict[str, Member]) -> Member | None:
        """The image of a sample; None: it has none."""
        if self.image:
            return sample.get(self.image.lower())
        kinds = [kind for kind in sample if f".{kind}".endswith(SUFFIXES)]
        arrays = [kind for kind in kinds if f".{kind}".endswith(NPY_SUFFIX)]
        plain = [kind for kind in kinds if "." not in kind]
        for candidates in (_without(plain, arrays), _without(kinds, arrays), arrays):
            if len(candidates) > 1:
                raise UserError(
                    f"{path}: the sample {key!r} holds several images ({', '.join(candidates)}); "
                    f"say which to use, as in --image={candidates[0]}"
                )
            if candidates:
                return sample[candidates[0]]
        return None


def _without(kinds: list[str], others: list[str]) -> list[str]:
    return [kind for kind in kinds if kind not in others]


class TarSource(packed.PackedSource):
    """Images in tars; `places` are their first bytes in the (unpacked) tar."""

    def read(self, path: str, index: int) -> bytes:
        """The bytes of an image; from .tar.gz, in order of the index if it is to be fast."""
        size = int(self.sizes.array[index])
        try:
            file = packed.opened(open_tar, path)
            file.seek(int(self.places.array[index]))
            data = file.read(size)
        except (OSError, EOFError, zlib.error):
            packed.opened.cache_clear()
            raise
        if len(data) < size:
            raise BadImage(f"{path} is shorter than it was before")
        return data


def open_tar(path: str) -> BinaryIO:
    """A tar file, unpacked if it is compressed."""
    if path.lower().endswith(".tar"):
        return pathlib.Path(path).open("rb")
    return cast(BinaryIO, gzip.open(path, "rb"))


def members(path: str, file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar, in order.

    Args:
      path: for messages.
      file: its content, from `open_tar`.

    Raises:
      UserError: it is damaged or ends too early; tarfile takes most damage for the end.
    """
    last = None
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (found := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all
                offset = archive.offset
                last = found
                if found.isreg() and not found.issparse():
                    yield Member(found.name.removeprefix("./"), found.offset_data, found.size)
            offset = archive.offset
        file.seek(offset)
        end = file.read(BLOCK)
        while isinstance(file, gzip.GzipFile) and file.read(CHUNK):
            pass  # its checksum is at its end
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(_damage(path, offset, last, str(error))) from error
    if len(end) < BLOCK:
        raise UserError(_damage(path, offset, last, "the end of the archive is missing"))
    if any(end):
        raise UserError(_damage(path, offset, last, "this is no header of a member"))


def _damage(path: str, offset: int, last: tarfile.TarInfo | None, reason: str) -> str:
    where = "which is no tar archive"
    if last is not None:
        where = f"after or in the member {last.name!r} (from byte {last.offset:,} on)"
    return (
        f"{path} is truncated or damaged at byte {offset:,}, {where}: {reason}; fetch it again, or "
        "give the other files"
    )


def _read_label(path: str, file: BinaryIO, member: Member, field: str) -> str | None:
    """The text of a member, or a field of its JSON; None: empty, or no such field.

    Raises:
      UserError: it is something else.
    """
    where = f"{path}, {member.name}"
    if member.size > LONGEST_LABEL:
        raise UserError(f"{where}: {member.size:,} bytes are no label")
    file.seek(member.start)
    try:
        text = file.read(member.size).decode()
        if not field:
            return text.strip() or None
        value = json.loads(text)
    except ValueError as error:  # of both
        raise UserError(f"{where} cannot be read as a label ({error})") from error
    for key in field.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f"{where}: {field} is {str(value)[:40]!r}, which is no class; classes are whole "
            "numbers or texts"
        )
    return str(value).strip() or None
