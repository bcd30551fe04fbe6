"""Datasets that TFDS has prepared, in ArrayRecord files, as sources: any record at once, images still encoded.

Nothing here imports TensorFlow, nor the code that prepared the dataset.
"""

import dataclasses
import hashlib
import io
import logging
import os
import pathlib
from concurrent import futures

import numpy as np

from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)


def cache():
    """The user's cache folder of this package."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lmim_jax"


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A split of a prepared dataset, or the images of some of its classes.

    records: random access to serialised examples. title: dataset/version/split. classes: names.
    features: names of the image, the label and the mask in an example, None where there is none.
    kept, labels: int arrays, which records there are and their classes; None: all, as stored.
    """

    records: object
    title: str
    classes: tuple[str, ...]
    features: tuple[str, str | None, str | None]
    kept: np.ndarray | None = None
    labels: np.ndarray | None = None
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return len(self.records if self.kept is None else self.kept)

    def record(self, index):
        """(encoded bytes, class) of image `index`; -1 without classes."""
        image, label, _ = self.features
        example = self._example(index)
        if self.labels is not None:
            return _bytes(example, image), int(self.labels[index])
        return _bytes(example, image), example[label].int64_list.value[0] if label else -1

    def mask(self, index):
        """The encoded object mask of image `index`, or None where the dataset has none."""
        return _bytes(self._example(index), self.features[2]) if self.features[2] else None

    def numbers(self, index, name):
        """A feature of numbers of image `index`, flat, as stored: [n]; None where the dataset has no such feature."""
        example = self._example(index)
        if name not in example:
            return None
        kind = example[name].WhichOneof("kind")
        return (
            np.array(getattr(example[name], kind).value)
            if kind in ("int64_list", "float_list")
            else None
        )

    def name(self, index):
        """Dataset, split and place in it."""
        return f"{self.title}[{index if self.kept is None else self.kept[index]}]"

    def identity(self):
        """What tells these images from others, for config.json."""
        chosen = (
            {}
            if self.kept is None
            else {"classes": hashlib.sha256("\n".join(self.classes).encode()).hexdigest()}
        )
        return {"source": self.title, "images": len(self), **chosen}

    def _example(self, index):
        """The features of an example; OSError where it cannot be read."""
        from google.protobuf import message
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            raw = self.records[int(index if self.kept is None else self.kept[index])]
            return tf_example_pb2.Example.FromString(raw).features.feature
        except (
            RuntimeError,
            ValueError,
            message.DecodeError,
        ) as error:  # as ArrayRecord tells damage
            raise OSError(f"the record is damaged: {error}") from error


def _bytes(example, name):
    return example[name].bytes_list.value[0]


def split_of(builder, split):
    """A split of a TFDS builder whose files are there, as a source.

    Raises:
      UserError: no such split, no ArrayRecord files (with the command that makes them), or no image in the examples.
    """
    import tensorflow_datasets as tfds

    info = builder.info
    formats = {known.value for known in info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{info.full_name} in {builder.data_dir} is prepared as {' and '.join(sorted(formats))}, which cannot be "
            f"read at random; make ArrayRecord files beside it: "
            f"lmim prepare --tfrecord={builder.data_dir}"
        )
    try:
        source = builder.as_data_source(split=split, file_format="array_record")
    except (ValueError, KeyError, AssertionError) as error:
        known = ", ".join(f"{name} ({found.num_examples:,})" for name, found in info.splits.items())
        raise UserError(f"{info.full_name} has no split {split!r}; there are: {known}") from error
    named = dict(info.features.items())
    images = [name for name, feature in named.items() if isinstance(feature, tfds.features.Image)]
    image = (
        "image" if "image" in images else images[0] if len(set(images) - {"mask"}) == 1 else None
    )
    if image is None:
        raise UserError(
            f"{info.full_name}: none of its features is the image to learn from: {', '.join(named)}"
        )
    labelled = isinstance(named.get("label"), tfds.features.ClassLabel)
    classes = tuple(named["label"].names) if labelled else ()
    features = image, "label" if labelled else None, "mask" if "mask" in images else None
    return Tfds(source.data_source, f"{info.full_name}/{split}", classes, features)


def open_tfds(name, folder, split):
    """A split of a dataset prepared by TFDS or by tools.prepare.

    Args:
      name: dataset, dataset/config or dataset/config:version. folder: TFDS's data_dir; "": its default folder.
      split: name or slice, such as train[:1%].

    Raises:
      UserError: see `split_of`, or there is no such dataset.
    """
    import tensorflow_datasets as tfds  # slow to import, and not needed for folders
    from tensorflow_datasets.core import read_only_builder

    if not name:
        raise UserError(
            "config.data.name is empty; give the name of a TFDS dataset, such as imagenet2012"
        )
    root = (
        pathlib.Path(folder).expanduser() if folder else pathlib.Path(tfds.core.constants.DATA_DIR)
    )
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=str(root))
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        there = sorted(path.name for path in root.glob("[!.]*")) if root.is_dir() else []
        raise UserError(
            f"config.data.name={name!r}: no prepared dataset of that name in {root} (config.data.dir), which holds: "
            f"{', '.join(there[:20]) or 'nothing'}"
        ) from error
    return split_of(builder, split)


def only(source, names):
    """The images of some classes, numbered in the order of `names`.

    Labels lie in the records, so all of them are read, once; they are kept in the cache folder.
    """
    if unknown := sorted(set(names) - set(source.classes)):
        raise UserError(
            f"{source.title} has no class {', '.join(unknown[:5])}; see config.data.classes"
        )
    labels = _labels(source)
    number = np.full(len(source.classes), -1)
    number[[source.classes.index(name) for name in names]] = range(len(names))
    kept = np.flatnonzero(number[labels] >= 0)
    return dataclasses.replace(source, classes=tuple(names), kept=kept, labels=number[labels][kept])


def _labels(source):
    """The class of every record, int32, from the cache or by reading all."""
    digest = hashlib.sha256(f"{source.title} {source.records!r}".encode()).hexdigest()[
        :16
    ]  # repr: a hash of paths
    path = cache() / "labels" / f"{digest}.npy"
    if path.exists():
        labels = np.load(path)
        some = np.random.default_rng(0).integers(0, len(source), 64)
        if len(labels) == len(source) and all(source.record(i)[1] == labels[i] for i in some):
            return labels
    log.info("reading the labels of %s, once: %d records", source.title, len(source))
    with futures.ThreadPoolExecutor(16) as pool:
        labels = np.fromiter(
            pool.map(lambda i: source.record(i)[1], range(len(source))), np.int32, len(source)
        )
    stream = io.BytesIO()
    np.save(stream, labels)
    atomic_io.write(path, stream.getvalue())
    return labels
