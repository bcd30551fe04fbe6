"""A folder of images -> the files of a TFDS dataset, shard by shard: every shard is made whole or not at all."""

import hashlib
import io
import json
import pathlib
import shutil

import numpy as np
from PIL import Image

from lmim_jax.data import decode, sources
from lmim_jax.data.prepare import tfrecord
from lmim_jax.utils import atomic_io

PER_SHARD, SHARD_BYTES = 5000, 128 << 20  # at most so many images, about so many bytes in a file
UNFINISHED, MANIFEST, BAD = "unfinished", "manifest.json", "bad_files.txt"


class Task:
    """One shard to be written: which images, and where to."""

    def __init__(self, path, split, source, shrink):
        self.path, self.split, self.source, self.shrink = path, split, source, shrink
        self.note = (
            path.parent / UNFINISHED / f"{path.name}.json"
        )  # what is known of it when it is done


def tasks(target, name, split, source, shrink):
    """The shards of a split: equal runs of its images, in order."""
    size = sum(pathlib.Path(source.root, file).stat().st_size for file in source.files)
    count = max(-(-len(source) // PER_SHARD), -(-size // SHARD_BYTES))
    for i, part in enumerate(np.array_split(np.arange(len(source)), count)):
        chosen = slice(int(part[0]), int(part[-1]) + 1)
        images = sources.FolderSource(
            source.root, source.files[chosen], source.labels[chosen], source.classes, ()
        )
        yield Task(
            target / f"{name}-{split}.array_record-{i:05d}-of-{count:05d}", split, images, shrink
        )


def write(task):
    """Write one shard and the note about it, unless they are there."""
    if task.note.exists():
        return
    bad = []

    def examples():
        for i in range(len(task.source)):
            try:
                data, label = task.source.record(i)
                yield _example(_shrunk(data, task.shrink), label, task.source.files[i])
            except (decode.BadImage, OSError) as error:
                bad.append(f"{task.source.name(i)}: {error}")

    count = tfrecord.write_array_record(task.path, examples())
    atomic_io.write(task.note, json.dumps({**facts(task.path), "records": count, "bad": bad}))


def _shrunk(data, shrink):
    """The encoded image, decoded once to see that it can be, with a short side of at most `shrink`."""
    pixels = decode.decode(data, 0, 3)
    short = min(pixels.shape[:2])
    if not 0 < shrink < short:
        return data
    size = [round(side * shrink / short) for side in pixels.shape[1::-1]]
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _example(image, label, name):
    """A serialised tf.train.Example; the same bytes for the same content."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["file"].bytes_list.value.append(name.encode("utf-8", "surrogateescape"))
    if label >= 0:
        feature["label"].int64_list.value.append(label)
    return example.SerializeToString(deterministic=True)


def facts(path):
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def finish(target, classes, tasks):
    """Write what TFDS wants to know, the report of bad files, and last the manifest."""
    import tensorflow_datasets as tfds

    notes = [json.loads(task.note.read_text()) for task in tasks]
    features = {"image": tfds.features.Image(), "file": tfds.features.Text()}
    features |= {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    splits = []
    for split in dict.fromkeys(task.split for task in tasks):
        mine = [note for task, note in zip(tasks, notes, strict=True) if task.split == split]
        lengths, size = [note["records"] for note in mine], sum(note["bytes"] for note in mine)
        splits.append(tfds.core.SplitInfo(split, lengths, size))
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=features, split_infos=splits, check_data=False
    )
    bad = [line for note in notes for line in note.pop("bad")]
    atomic_io.write(target / BAD, "".join(f"{line}\n" for line in bad))
    manifest = {task.path.name: note for task, note in zip(tasks, notes, strict=True)}
    atomic_io.write(target / MANIFEST, json.dumps(manifest, indent=2))
    shutil.rmtree(target / UNFINISHED)
    tfrecord.sweep(target)
