"""A folder of images -> the files of a TFDS dataset, shard by shard.

Each shard is written completely or not at all, so that an interrupted conversion can be resumed.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.data.prepare import tfrecord
from lmim_jax.data.sources import FolderSource
from lmim_jax.utils import atomic_io, faults

SHARD_BYTES = 1 << 30  # at most, by estimate; more than half of it where there are several shards
SAMPLE = 100  # images that are shrunk to estimate how large the others will be

# Names in the folder of the dataset
UNFINISHED = "unfinished"
MANIFEST = "manifest.json"
BAD = "bad_files.txt"


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to be written.

    Attributes:
      path: the file.
      split: name of the split.
      source: the images of the split.
      images: which of them belong to the shard.
      shrink: short side in pixels above which images are shrunk to it; 0: never.
    """

    path: pathlib.Path
    split: str
    source: FolderSource
    images: range
    shrink: int

    @property
    def note_path(self) -> pathlib.Path:
        """The file with the checksum, number of records and bad files of the finished shard."""
        return self.path.parent / UNFINISHED / f"{self.path.name}.json"


def plan_shards(
    target: pathlib.Path, name: str, split: str, source: FolderSource, shrink: int
) -> Iterator[ShardTask]:
    """The shards of a split: equal runs of its images, in order.

    Args:
      target: folder of the dataset.
      name: of the dataset.
      split: name of the split.
      source: its images.
      shrink: see `ShardTask`.
    """
    size = sum(pathlib.Path(source.root, file).stat().st_size for file in source.files)
    if shrink:
        size = int(size * _size_ratio(source, shrink))
    count = min(len(source), max(1, -(-size // SHARD_BYTES)))
    for i, part in enumerate(np.array_split(np.arange(len(source)), count)):
        images = range(int(part[0]), int(part[-1]) + 1)
        path = target / f"{name}-{split}.array_record-{i:05d}-of-{count:05d}"
        yield ShardTask(path, split, source, images, shrink)


def _size_ratio(source: FolderSource, shrink: int) -> float:
    """Bytes of shrunk images / bytes of the files, of a sample; 1.0 where none can be decoded."""
    before = 0
    after = 0
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)):
        try:
            shrunk, _ = _read_image(source, int(index), shrink)
        except (decode.BadImage, OSError):
            continue
        before += pathlib.Path(source.name(int(index))).stat().st_size
        after += len(shrunk)
    return after / before if before else 1.0


def write_shard(task: ShardTask) -> None:
    """Write one shard and the note about it, unless they exist."""
    if task.note_path.exists():
        return
    bad: list[str] = []

    def examples() -> Iterator[bytes]:
        for index in task.images:
            file = task.source.files[index]
            try:
                data, label = _read_image(task.source, index, task.shrink)
            except (decode.BadImage, OSError) as error:
                bad.append(f"{task.source.name(index)}: {error}")
                continue
            yield _serialize_example(data, label, file)

    count = tfrecord.write_array_record(task.path, examples())
    note = {**file_facts(task.path), "records": count, "bad": bad}
    atomic_io.write(task.note_path, json.dumps(note))


def _read_image(source: FolderSource, index: int, shrink: int) -> tuple[bytes, int]:
    """(encoded bytes, class) of an image that can be decoded, shrunk."""

    def read() -> tuple[bytes, int]:
        data, label = source.record(index)
        return _shrink_image(data, shrink), label

    return faults.retry(read, lambda: source.name(index), faults.RETRY_SECONDS)


def _shrink_image(data: bytes, shrink: int) -> bytes:
    """The encoded image, with a short side of at most `shrink`.

    Raises:
      BadImage: it cannot be decoded.
    """
    if not decode.verify(data):  # more than 8 bits or other bands: kept as they are
        return data
    pixels = decode.decode(data, 0, 3)
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not 0 < shrink < short:
        return data
    size = (round(width * shrink / short), round(height * shrink / short))
    shrunk = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    shrunk.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _serialize_example(image: bytes, label: int, name: str) -> bytes:
    """A serialized tf.train.Example; the same bytes for the same content."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["file"].bytes_list.value.append(name.encode("utf-8", "surrogateescape"))
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
    features: dict[str, Any] = {"image": tfds.features.Image(), "file": tfds.features.Text()}
    if classes:
        features["label"] = tfds.features.ClassLabel(names=classes)
    splits = _split_infos(tasks, notes)
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=features, split_infos=splits, check_data=False
    )
    bad = []
    manifest = {}
    for task, note in zip(tasks, notes, strict=True):
        bad += note.pop("bad")
        manifest[task.path.name] = note
    atomic_io.write(target / BAD, "".join(f"{line}\n" for line in bad))
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
