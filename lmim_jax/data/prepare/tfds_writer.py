"""Images -> the files of a TFDS dataset, shard by shard.

Each shard is written completely or not at all, so that an interrupted conversion can be resumed.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lmim_jax.data import decode, records
from lmim_jax.data.folder_listing import ENCODING
from lmim_jax.data.image_options import MAX_PIXELS, ImageOptions
from lmim_jax.data.prepare import tfrecord
from lmim_jax.data.sources import Source
from lmim_jax.utils import atomic_io, faults

SHARD_BYTES = 1 << 30  # at most, by estimate; more than half of it where there are several shards
SAMPLE = 100  # images that are shrunk to estimate how large the others will be

# Names in the folder of the dataset
UNFINISHED = "unfinished"
MANIFEST = "manifest.json"
BAD = "bad_files.txt"
IMAGE = ("image",)  # the feature of images of one modality

_counter: Any = None  # of a process that writes shards: a multiprocessing.Value


def count_images_in(counter: Any) -> None:
    """In a process that writes shards: add the images that are done to a shared counter."""
    global _counter
    _counter = counter


def count_progress(images: int) -> None:
    """Add to the counter, if there is one."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += images


class Images(Source, Protocol):
    """A source that can be written."""

    @property
    def files(self) -> Sequence[str]:
        """Names of the images, which are stored with them."""

    def num_bytes(self) -> int:
        """The bytes of all images."""


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to be written.

    Attributes:
      path: the file.
      split: name of the split.
      source: the images of the split.
      images: which of them belong to the shard.
      shrink: short side in pixels above which images are shrunk to it; 0: never.
      num_bytes: of the shard, by estimate.
      max_pixels: images of more are bad.
    """

    path: pathlib.Path
    split: str
    source: Images
    images: range
    shrink: int
    num_bytes: int
    max_pixels: int

    @property
    def note_path(self) -> pathlib.Path:
        """The file with the checksum, number of records and bad files of the finished shard."""
        return self.path.parent / UNFINISHED / f"{self.path.name}.json"


def plan_shards(
    target: pathlib.Path,
    name: str,
    split: str,
    source: Images,
    shrink: int,
    shard_bytes: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ShardTask]:
    """The shards of a split: equal runs of its images, in order.

    Args:
      target: folder of the dataset.
      name: of the dataset.
      split: name of the split.
      source: its images.
      shrink: see `ShardTask`.
      shard_bytes: of a shard, at most; None: SHARD_BYTES.
      max_pixels: see `ShardTask`.
    """
    size = source.num_bytes()
    if shrink:
        size = int(size * _size_ratio(source, shrink, max_pixels))
    count = min(len(source), max(1, -(-size // (shard_bytes or SHARD_BYTES))))
    for i, part in enumerate(np.array_split(np.arange(len(source)), count)):
        images = range(int(part[0]), int(part[-1]) + 1)
        path = target / f"{name}-{split}.array_record-{i:05d}-of-{count:05d}"
        yield ShardTask(path, split, source, images, shrink, size // count, max_pixels)


def _size_ratio(source: Images, shrink: int, max_pixels: int) -> float:
    """Bytes of shrunk images / bytes of the images, of a sample; 1.0 where none can be decoded."""
    before = 0
    after = 0
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)):
        try:
            shrunk, _, num_bytes = _read_image(source, int(index), shrink, max_pixels)
        except (decode.BadImage, OSError):
            continue
        before += num_bytes
        after += len(shrunk)
    return after / before if before else 1.0


def write_shard(task: ShardTask) -> None:
    """Write one shard and the note about it, unless they exist."""
    if task.note_path.exists():
        count_progress(len(task.images))
        return
    bad: list[str] = []

    def examples() -> Iterator[bytes]:
        for index in task.images:
            file = task.source.files[index]
            try:
                data, label, _ = _read_image(task.source, index, task.shrink, task.max_pixels)
            except (decode.BadImage, OSError) as error:
                reason = str(error).replace("config.data.max_pixels", "--max_pixels")
                bad.append(f"{task.source.name(index)}: {reason}")
                continue
            finally:
                count_progress(1)
            yield _serialize_example(data, label, file, features_of(task.source))

    count = tfrecord.write_array_record(task.path, examples())
    note = {**file_facts(task.path), "records": count, "bad": bad}
    atomic_io.write(task.note_path, json.dumps(note))


def _read_image(source: Images, index: int, shrink: int, max_pixels: int) -> tuple[bytes, int, int]:
    """(encoded bytes, class, former number of bytes) of an image that can be decoded, shrunk."""

    def read() -> tuple[bytes, int, int]:
        data, label = source.record(index)
        files = records.unpack(data)
        shrunk = [_shrink_image(file, shrink, max_pixels) for file in files]
        if any(new is old for new, old in zip(shrunk, files, strict=True)):
            shrunk = files  # of several modalities all or none: their sizes must stay equal
        return records.pack(shrunk), label, len(data)

    return faults.retry(read, lambda: source.name(index), faults.RETRY_SECONDS)


def _shrink_image(data: bytes, shrink: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """The encoded image, with a short side of at most `shrink`.

    Its EXIF orientation is kept, and so is transparency, in a PNG file.

    Raises:
      BadImage: it cannot be decoded, or has more than `max_pixels`.
    """
    options = ImageOptions(max_pixels=max_pixels)
    if not decode.verify(data, options):  # more than 8 bits or other bands: kept as they are
        return data
    pixels = decode.decode(data, 0, 3, options)
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not 0 < shrink < short:
        return data
    size = (round(width * shrink / short), round(height * shrink / short))
    shrunk = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    orientation = decode.orientation(data)
    if orientation != 1:
        exif[decode.EXIF_ORIENTATION] = orientation
    stream = io.BytesIO()
    alpha = decode.alpha(data, options)
    if alpha is None:
        shrunk.save(stream, "JPEG", quality=90, exif=exif)
    else:  # apart from the colors, which would be lost where it is 0
        shrunk.putalpha(Image.fromarray(alpha).resize(size, Image.Resampling.BICUBIC))
        shrunk.save(stream, "PNG", exif=exif)
    return stream.getvalue()


def features_of(source: Any) -> tuple[str, ...]:
    """The names of the images in an example: the modalities of a source."""
    return getattr(source, "modalities", ()) or IMAGE


def _serialize_example(image: bytes, label: int, name: str, features: Sequence[str]) -> bytes:
    """A serialized tf.train.Example; the same bytes for the same content."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    for modality, file in zip(features, records.unpack(image), strict=True):
        feature[modality].bytes_list.value.append(file)
    feature["file"].bytes_list.value.append(name.encode(*ENCODING))
    if label >= 0:
        feature["label"].int64_list.value.append(label)
    return example.SerializeToString(deterministic=True)


def file_facts(path: pathlib.Path) -> dict[str, Any]:
    """Size in bytes and checksum of a file."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": checksum}


def finish_dataset(
    target: pathlib.Path, classes: Sequence[str], tasks: Sequence[ShardTask]
) -> None:
    """Write TFDS's metadata, the list of bad files, and last the manifest."""
    import tensorflow_datasets as tfds

    notes = []
    for task in tasks:
        notes.append(json.loads(task.note_path.read_text()))
    features: dict[str, Any] = {}
    for modality in features_of(tasks[0].source):
        features[modality] = tfds.features.Image()
    features["file"] = tfds.features.Text()
    if classes:
        names = [name.encode(*ENCODING).decode("utf-8", "backslashreplace") for name in classes]
        features["label"] = tfds.features.ClassLabel(names=names)
    splits = _split_infos(tasks, notes)
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=features, split_infos=splits, check_data=False
    )
    bad = []
    manifest = {}
    for task, note in zip(tasks, notes, strict=True):
        bad += note.pop("bad")
        manifest[task.path.name] = note
    atomic_io.write(target / BAD, "".join(f"{line}\n" for line in bad).encode(*ENCODING))
    atomic_io.write(target / MANIFEST, json.dumps(manifest, indent=2))
    shutil.rmtree(target / UNFINISHED)
    tfrecord.remove_temporary_files(target)


def _split_infos(tasks: Sequence[ShardTask], notes: Sequence[dict[str, Any]]) -> list[Any]:
    """TFDS's description of the splits: number of records of each shard, and size in bytes."""
    import tensorflow_datasets as tfds

    lengths: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for task, note in zip(tasks, notes, strict=True):
        lengths.setdefault(task.split, []).append(note["records"])
        sizes[task.split] = sizes.get(task.split, 0) + note["bytes"]
    return [tfds.core.SplitInfo(split, lengths[split], sizes[split]) for split in lengths]
