"""Datasets prepared by TFDS in ArrayRecord files, as sources: random access, images still encoded.

Nothing here imports TensorFlow or the code that prepared the dataset.
"""

import base64
import copy
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import weakref
from collections.abc import Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from lmim_jax.data import records as packed_records
from lmim_jax.data import staging
from lmim_jax.data.decode import BadImage
from lmim_jax.data.label_file import Targets
from lmim_jax.data.shared_array import SharedArray, share
from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io, buckets, commands, descriptors, faults
from lmim_jax.utils.checksum import names_checksum
from lmim_jax.utils.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

log = logging.getLogger(__name__)

CHECKED_LABELS = 64  # cached labels that are compared with the records
FILE_NAMES = ("file", "file_name", "filename", "image/filename")  # features of examples
INFO = "dataset_info.json"  # in the folder of each dataset
READERS = 16  # threads that read labels
BUCKET_REPLY = "last message of"  # in errors of Google's client, which has tried again by itself
NAME_END = "\0"  # between names of files; none contains it
VERSION = re.compile(r"\d+\.\d+\.\d+")
MOST_VERSIONS = 64  # entries of a folder that holds versions of a dataset, and nothing else
LABELS = 16_384  # labels that are read, and told to other processes, at a time

# Files of the datasets that are in use: each may stay open once it has been read from
_num_files: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def cache_folder() -> pathlib.Path:
    """The user's cache folder of this package."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "lmim_jax"


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared dataset, or the images of some of its classes; see `sources.Source`.

    Attributes:
      records: random access to serialized `tf.train.Example`s.
      title: dataset/version/split.
      classes: names of the classes; empty: unlabeled.
      image_feature: name of the image in an example.
      label_feature: name of the label; None: unlabeled.
      mask_feature: name of the object mask; None: there is none.
      kept: the records that belong to the source; None: all.
      labels: the classes of these records; None: as stored.
      targets: labels that are no classes; None: there are none.
      labels_checksum: of a file that chose the records and their labels; "": there was none.
      modalities: names of the images of several modalities in an example, instead of
        `image_feature`; (): there is one.
    """

    records: Sequence[bytes]
    title: str
    classes: tuple[str, ...]
    image_feature: str
    label_feature: str | None
    mask_feature: str | None
    kept: SharedArray | None = None
    labels: SharedArray | None = None
    targets: Targets | None = None
    labels_checksum: str = ""
    modalities: tuple[str, ...] = ()

    def __len__(self) -> int:
        if self.kept is None:
            return len(self.records)
        return len(self.kept.array)

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image, class -1: unlabeled.

        Raises:
          BadImage: the record is damaged.
          OSError: it cannot be read.
        """
        example = self._example(index)
        files = []
        for feature in self.modalities or (self.image_feature,):
            if not example[feature].bytes_list.value:
                raise BadImage(f"the record is damaged: it holds no {feature}")
            files.append(example[feature].bytes_list.value[0])
        image = packed_records.pack(files)
        if self.labels is not None:
            return image, int(self.labels.array[index])
        if self.label_feature is None:
            return image, -1
        labels = example[self.label_feature].int64_list.value
        return image, labels[0] if labels else -1

    def label(self, index: int) -> int:
        """The class of an image; -1: none, or the record is damaged."""
        try:
            return self.record(index)[1]
        except BadImage:
            return -1

    def mask(self, index: int) -> bytes | None:
        """The encoded object mask of an image, or None where the dataset has none."""
        if self.mask_feature is None:
            return None
        return self._example(index)[self.mask_feature].bytes_list.value[0]

    def feature_values(self, index: int, name: str) -> Shaped[np.ndarray, " n"] | None:
        """A numeric feature of an image, flattened; None if the dataset has no such feature."""
        example = self._example(index)
        if name not in example:
            return None
        kind = example[name].WhichOneof("kind")
        if kind not in ("int64_list", "float_list"):
            return None
        return np.array(getattr(example[name], kind).value)

    def file_name(self, index: int) -> str:
        """The name of the file that an image was; "": it is not stored, or the record is damaged.

        `lmim prepare` and TFDS's imagenet2012 store it.
        """
        try:
            example = self._example(index)
        except BadImage:
            return ""
        for feature in FILE_NAMES:
            if feature in example and example[feature].bytes_list.value:
                return example[feature].bytes_list.value[0].decode("utf-8", "surrogateescape")
        return ""

    def name(self, index: int) -> str:
        """Dataset, split and position in it."""
        return f"{self.title}[{self._position(index)}]"

    def identity(self) -> dict[str, Any]:
        """The title and number of images; with a choice of classes, a checksum of their names."""
        identity = {"source": self.title, "images": len(self)}
        if self.modalities:
            identity["modalities"] = ",".join(self.modalities)
        if self.kept is not None:
            identity["classes"] = names_checksum(self.classes)
        if self.labels_checksum:
            identity["labels"] = self.labels_checksum
        return identity

    def _position(self, index: int) -> int:
        """The position of an image among all records."""
        if self.kept is None:
            return index
        return int(self.kept.array[index])

    def _example(self, index: int) -> Any:
        """The features of an example, by name.

        Raises:
          BadImage: the record is damaged.
          OSError: it cannot be read.
        """
        from google.protobuf import message
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            serialized = self.records[int(self._position(index))]
            return tf_example_pb2.Example.FromString(serialized).features.feature
        except (RuntimeError, ValueError, message.DecodeError) as error:
            self._raise_if_unavailable(error)
            raise BadImage(f"the record is damaged: {error}") from error

    def _raise_if_unavailable(self, error: Exception) -> None:
        """Raise an OSError unless it is the record that is damaged, or its file missing."""
        number = faults.number_of(error)
        # A file that may not be read any more holds thousands of images
        unavailable = BUCKET_REPLY in str(error) or number in faults.DENIED
        opened = faults.OPENED.search(str(error))
        if opened and faults.has_vanished(pathlib.Path(opened[1]).parent):
            unavailable = True
        if not unavailable and not faults.is_environment_fault(error):
            return
        # A reader that could not open its file would fail forever: a copy opens new ones
        object.__setattr__(self, "records", copy.copy(self.records))
        if number in faults.ABSENT:
            number = errno.ESTALE
        number = number or errno.EIO
        raise OSError(number, f"{os.strerror(number)}: {faults.first_line(error)}") from error


def open_split(
    builder: "tfds.core.DatasetBuilder", split: str, modalities: tuple[str, ...] = ()
) -> TfdsSource:
    """A split of a TFDS builder whose files exist, as a source.

    Args:
      builder: of the dataset.
      split: name or slice.
      modalities: see `TfdsSource`.

    Raises:
      UserError: no such split, no ArrayRecord files (with the command that makes them), or no image
        in the examples.
    """
    import tensorflow_datasets as tfds

    info = builder.info
    formats = sorted(known.value for known in info.available_file_formats())
    if "array_record" not in formats:
        folder = str(builder.data_dir)
        where = "beside it"
        if folder.startswith("gs://"):
            folder = f"DIR/{info.full_name}"
            where = "beside a local copy, and copy them to the bucket with its dataset_info.json"
        raise UserError(
            f"{info.full_name} in {builder.data_dir} is prepared as {' and '.join(formats)}, "
            f"which does not support random access; write ArrayRecord files {where}: "
            + commands.line("prepare", f"--tfrecord={folder}")
        )
    try:
        records = builder.as_data_source(split=split, file_format="array_record").data_source
    except (ValueError, KeyError, AssertionError) as error:
        splits = []
        for name, found in info.splits.items():
            splits.append(f"{name} ({found.num_examples:,})")
        raise UserError(
            f"{info.full_name} has no split {split!r}; available: {', '.join(splits)}"
        ) from error
    _check_descriptors(records, len(info.splits[split].filenames), info.full_name)
    features = dict(info.features.items())
    images = []
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            images.append(name)
    image_feature = _choose_image(images, modalities, info.full_name, list(features))
    classes: tuple[str, ...] = ()
    label_feature = None
    if isinstance(features.get("label"), tfds.features.ClassLabel):
        classes = tuple(features["label"].names)
        label_feature = "label"
    mask_feature = None
    if "mask" in images:
        mask_feature = "mask"
    return TfdsSource(
        records=records,
        title=f"{info.full_name}/{split}",
        classes=classes,
        image_feature=image_feature,
        label_feature=label_feature,
        mask_feature=mask_feature,
        modalities=modalities,
    )


def _check_descriptors(records: Sequence[bytes], num_files: int, title: str) -> None:
    """Raise a UserError if the files in use, with these, are more than a process may open."""
    _num_files[records] = num_files
    needed = sum(_num_files.values()) + descriptors.SPARE
    limit = descriptors.raise_limit()
    if needed > limit:
        raise UserError(
            f"{title} has {num_files:,} files, all of which stay open, but this process may open "
            f"only {limit:,} in all (ulimit -n) and needs about {needed:,}: raise the hard limit "
            "of open files (ulimit -Hn; LimitNOFILE of a service, --ulimit nofile of a container), "
            "or make a dataset of fewer, larger files with lmim prepare"
        )


def _choose_image(
    images: Sequence[str], modalities: Sequence[str], title: str, features: Sequence[str]
) -> str:
    """The feature to train on, that of the first modality where there are several.

    Of one modality, it is "image", or else the only one that is not "mask".

    Args:
      images: features that are images.
      modalities: those that are asked for; (): one, by its usual name.
      title: of the dataset.
      features: all of them.

    Raises:
      UserError: there is none, or it is unclear which one.
    """
    unknown = [name for name in modalities if name not in images]
    if unknown:
        raise UserError(
            f"{title} has no image {unknown[0]!r}, which a path of config.data.modalities names; "
            f"it has: {', '.join(sorted(images)) or 'none'}"
        )
    if modalities:
        return modalities[0]
    if "image" in images:
        return "image"
    candidates = [name for name in images if name != "mask"]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(
            f"{title} has the images {', '.join(sorted(candidates))}, and none of them is the "
            "image to train on; a recipe such as interactive_mim_vit_s trains on several, the "
            "paths of config.data.modalities"
        )
    raise UserError(
        f"{title}: none of its features is the image to train on: {', '.join(features)}"
    )


def open_tfds(
    name: str,
    folder: buckets.Pathname,
    split: str,
    stage: str = "",
    together: Sequence[str] = (),
    modalities: tuple[str, ...] = (),
) -> TfdsSource:
    """A split of a dataset prepared by TFDS or by `lmim prepare`.

    Args:
      name: dataset, dataset/config or dataset/config:version; "": `folder` is that of the dataset
        itself, see `find_version`, or in a bucket holds only one.
      folder: TFDS's data_dir; "": its default folder.
      split: name or slice, such as train[:1%].
      stage: a local folder that datasets in buckets are copied to, see `staging`; "": none.
      together: splits that will be opened too, and are copied with this one.
      modalities: see `TfdsSource`.

    Raises:
      UserError: there is no such dataset; or see `open_split` and `staging.stage`.
    """
    # Slow to import, and not needed for folders
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    root = buckets.path(folder or tfds.core.constants.DATA_DIR)
    if isinstance(root, buckets.BucketPath):
        builder = _find_in_bucket(name, root)
    else:
        builder = _find_in_folder(name, root)
    source = open_split(builder, split, modalities)
    dataset = buckets.path(str(builder.data_dir))
    if not isinstance(dataset, buckets.BucketPath):
        if stage:
            log.info("config.data.stage is not used: %s is not in a bucket", dataset)
        return source
    if not stage:
        _report_cost(dataset)
        return source
    shards: set[str] = set()
    for needed in {split, *together}:
        open_split(builder, needed, modalities)  # exists
        for file in builder.info.splits[needed].filenames:
            shards.add(file.replace(".tfrecord-", ".array_record-"))
    copy_folder = staging.stage(dataset, shards, stage)
    staged = read_only_builder.builder_from_directory(str(copy_folder))
    return open_split(staged, split, modalities)


def find_version(folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """The prepared dataset that a local folder is, or its newest version in it; None: it is none.

    Args:
      folder: such as DIR/NAME/1.0.0 or DIR/NAME; folders of any number of images are none.
    """
    path = pathlib.Path(folder).expanduser()
    if (path / INFO).is_file():
        return path
    versions = []
    if path.is_dir():
        with os.scandir(path) as entries:
            for entry in itertools.islice(entries, MOST_VERSIONS):
                if VERSION.fullmatch(entry.name) and pathlib.Path(entry.path, INFO).is_file():
                    versions.append(pathlib.Path(entry.path))
    return max(versions, key=_version_numbers, default=None)


def _version_numbers(folder: pathlib.Path) -> list[int]:
    return [int(number) for number in folder.name.split(".")]


def split_names(dataset: pathlib.Path) -> list[str]:
    """The names of the splits of a prepared dataset, given its folder."""
    info = json.loads((dataset / INFO).read_text())
    return [split["name"] for split in info["splits"]]


def has_split(dataset: pathlib.Path, split: str) -> bool:
    """Whether a prepared dataset has a split, or that of a slice such as train[90%:]."""
    return split.partition("[")[0] in split_names(dataset)


def _find_in_folder(name: str, root: pathlib.Path) -> "tfds.core.DatasetBuilder":
    """The builder of a dataset in a local folder, or a UserError that lists what is there."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    dataset = None if name else find_version(root)
    if dataset is not None:
        return read_only_builder.builder_from_directory(str(dataset))
    if not name:
        raise UserError(
            "config.data.name is empty; give the name of a TFDS dataset, such as imagenet2012"
        )
    try:
        return read_only_builder.builder_from_files(name, data_dir=str(root))
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        datasets = []
        if root.is_dir():
            datasets = sorted(path.name for path in root.glob("[!.]*"))
        raise UserError(
            f"config.data.name={name!r}: no prepared dataset of that name in {root} "
            f"(config.data.dir), which holds: {', '.join(datasets[:20]) or 'nothing'}"
        ) from error


def _find_in_bucket(name: str, root: buckets.BucketPath) -> "tfds.core.DatasetBuilder":
    """The builder of a dataset in a bucket, or a UserError that says what is lacking."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        if (root / INFO).is_file():
            return read_only_builder.builder_from_directory(str(root))
        if name:
            return read_only_builder.builder_from_files(name, data_dir=str(root))
        names = root.files()
    except (tfds.core.registered.DatasetNotFoundError, ValueError, OSError) as error:
        problem = buckets.problem(root) or f"no prepared dataset {name!r} in {root}"
        raise UserError(f"{problem} (config.data)") from error
    found = []
    for file in names:
        if pathlib.PurePosixPath(file).name == INFO:
            found.append(file.removesuffix(f"/{INFO}"))
    if len(found) > 1:
        listed = ", ".join(found[:20])
        raise UserError(f"{root} holds several datasets; give one as config.data.name: {listed}")
    if not found:
        prepare = commands.line("prepare", "--folder=IMAGES", "--out=DIR", "--name=NAME")
        raise UserError(
            f"{root} holds no prepared dataset, and images in buckets are read only from one: "
            f"{prepare}, then: gcloud storage cp --recursive DIR {root}"
        )
    return read_only_builder.builder_from_directory(str(root / found[0]))


@functools.cache
def _report_cost(dataset: buckets.BucketPath) -> None:
    """Say, once, what reading in place costs."""
    log.warning(
        "%s is read in place, by one request for each image: at a latency of 50 ms, 8 threads read "
        "99 images/s. If steps wait for data, copy it once to a local disk of each host: "
        "--config.data.stage=DIR",
        dataset,
    )


def select_classes(source: TfdsSource, names: Sequence[str]) -> TfdsSource:
    """The images of some classes, numbered in the order of `names`.

    Labels are stored in the records, so process 0 reads all records, once; the labels are kept in
    its cache folder. All processes must call it.

    Raises:
      UserError: a class does not exist.
    """
    unknown = sorted(set(names) - set(source.classes))
    if unknown:
        raise UserError(
            f"{source.title} has no class {', '.join(unknown[:5])}; see config.data.classes"
        )
    labels = _read_labels(source)
    new_label = np.full(len(source.classes), -1)
    for number, name in enumerate(names):
        new_label[source.classes.index(name)] = number
    unknown_class = labels < 0
    if unknown_class.any():
        log.warning(
            "%s: %d records have no class or are damaged: left out, see config.data.classes",
            source.title,
            unknown_class.sum(),
        )
    kept = np.flatnonzero(~unknown_class & (new_label[labels] >= 0))
    new_labels = new_label[labels[kept]].astype(np.int32)
    if source.kept is not None:
        kept = source.kept.array[kept]
    return dataclasses.replace(
        source, classes=tuple(names), kept=share(kept), labels=share(new_labels)
    )


def read_file_names(source: TfdsSource) -> list[str]:
    """`file_name` of every image; process 0 reads all records. All processes must call it."""
    names: list[str] = []
    for start in range(0, len(source), LABELS):
        text = multihost.decide(functools.partial(_joined_file_names, source, start))
        names += text.split(NAME_END)
    return names


def _joined_file_names(source: TfdsSource, start: int) -> str:
    """The file names of LABELS records from `start`, as text."""
    with futures.ThreadPoolExecutor(READERS) as pool:
        indices = range(start, min(start + LABELS, len(source)))
        return NAME_END.join(pool.map(source.file_name, indices))


def _read_labels(source: TfdsSource) -> Int[np.ndarray, " N"]:
    """The class of every image, int32; process 0 reads them from its cache or all records."""
    # The repr of the records contains a hash of their paths
    key = f"{source.title} {source.records!r}".encode()
    if source.kept is not None:
        key += source.kept.array.tobytes()
    path = cache_folder() / "labels" / f"{hashlib.sha256(key).hexdigest()[:16]}.npy"
    cached = None
    if jax.process_index() == 0:
        cached = _cached_labels(source, path)
    parts = []
    for start in range(0, len(source), LABELS):
        # In parts: the other processes do not wait for long
        text = multihost.decide(functools.partial(_encoded_labels, source, cached, start))
        parts.append(np.frombuffer(base64.b64decode(text), np.int32))
    labels = np.concatenate(parts)
    if jax.process_index() == 0 and cached is None:
        try:
            with atomic_io.open_new(path) as file:
                np.save(file, labels)
        except OSError as error:
            log.warning("the labels are read again next time: %s", error)
    return labels


def _cached_labels(source: TfdsSource, path: pathlib.Path) -> Int[np.ndarray, " N"] | None:
    """The labels in a file of the cache; None if there are none, or those of other images."""
    try:
        labels = np.load(path)
    except (OSError, ValueError, EOFError):  # there is none, or it is damaged
        labels = None
    if labels is not None and _labels_match(source, labels):
        return labels
    log.info("reading the labels of %s, once: %d records", source.title, len(source))
    return None


def _encoded_labels(source: TfdsSource, cached: Int[np.ndarray, " N"] | None, start: int) -> str:
    """The labels of LABELS records from `start`, int32, as text."""
    indices = range(start, min(start + LABELS, len(source)))
    if cached is not None:
        labels = cached[indices.start : indices.stop]
    else:
        with futures.ThreadPoolExecutor(READERS) as pool:
            found = pool.map(source.label, indices)
            labels = np.fromiter(found, np.int32, len(indices))
    return base64.b64encode(labels.astype(np.int32).tobytes()).decode()


def _labels_match(source: TfdsSource, labels: Int[np.ndarray, " N"]) -> bool:
    """Whether cached labels have the right number and, in a random sample, the right values."""
    sample = np.random.default_rng(0).integers(0, len(source), CHECKED_LABELS)
    if len(labels) != len(source):
        return False
    return all(source.label(index) == labels[index] for index in sample)
