"""The images that evaluators see: each image once and unaugmented, or a fixed random sample.

Evaluators that need other data than the images of the run (segmentation masks, video clips, CLEVR)
open it themselves, with the other modules of this package.

Letters: B batch, K canvas side, H W image height and width, C channels.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from lmim_jax.data import decode, loader, prefetch, tfds_source
from lmim_jax.data.activity import Activity
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.data.label_file import Targets
from lmim_jax.data.sources import Source
from lmim_jax.distributed import sharding
from lmim_jax.utils import faults

SPLITS = ("train", "test")
SAMPLED_LABELS = 64  # records that are read to know whether images have classes

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvaluationOrder:
    """Every image once, in order, padded to whole batches.

    Attributes:
      images: the images, decoded on access.
      batch_size: images of a global batch.
      first_row: the first row of a global batch that belongs to this process.
      rows: rows of a global batch that belong to this process.
      parts: how many elements make up a batch, see `loader.TrainingOrder`.
    """

    images: loader.BatchDecoder
    batch_size: int
    first_row: int
    rows: int
    parts: int

    def __len__(self) -> int:
        return -(-len(self.images.source) // self.batch_size) * self.parts

    def __getitem__(self, i: int) -> Batch:
        batch, part = divmod(int(i), self.parts)
        begin = part * self.rows // self.parts
        end = (part + 1) * self.rows // self.parts
        indices = batch * self.batch_size + self.first_row + np.arange(begin, end)
        return self.images.batch(np.where(indices < len(self.images.source), indices, -1))


def batch_bytes(config: ConfigDict, batch_size: int) -> int:
    """Bytes of the canvases that this process decodes of an evaluation batch.

    Args:
      config: `config.data`, see configs/vit_b.py.
      batch_size: images per batch, of all processes.
    """
    rows = -(-batch_size // jax.process_count())
    return rows * config.canvas**2 * config.channels


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some images of a source, as a source (see data/sources.py).

    Attributes:
      source: the source that the images come from.
      indices: places of the chosen images in `source`.
      classes: names of the classes; empty, so that evaluators treat a subset as unlabeled.
      targets: labels of the chosen images that are no classes; likewise.
    """

    source: Source
    indices: tuple[int, ...]
    classes: tuple[str, ...] = ()
    targets: Targets | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> tuple[bytes, int]:
        """Encoded bytes and class of an image."""
        return self.source.record(self.indices[index])

    def mask(self, index: int) -> bytes | None:
        """The encoded segmentation mask of an image, or None."""
        return self.source.mask(self.indices[index])

    def identity(self) -> dict[str, Any]:
        """What distinguishes these images from others, as JSON values."""
        return {**self.source.identity(), "chosen": list(self.indices)}

    def name(self, index: int) -> str:
        """The name of an image in its source."""
        return self.source.name(self.indices[index])


class AcceptedClasses(NamedTuple):
    """The classes that count as correct for each image of a split.

    Attributes:
      classes: numbers of classes, of image after image.
      starts: [N + 1], where those of each image start.
    """

    classes: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " N+1"]

    def accuracy(self, indices: Int[np.ndarray, " Q"], predicted: Int[np.ndarray, " Q"]) -> float:
        """Percent of some images for which the predicted class is one of theirs."""
        correct = 0
        for index, answer in zip(indices, predicted, strict=True):
            own = self.classes[self.starts[index] : self.starts[index + 1]]
            correct += int(answer in own)
        return 100 * correct / len(indices)


def _no_progress(batches: Iterable[Batch], split: str, total: int) -> Iterable[Batch]:
    """The default of `progress`: show nothing."""
    del split, total
    return batches


class EvaluationData:
    """Images of both splits for evaluators.

    Attributes:
      sources: {"train": a source, "test": a source, or None where there is no test split}.
      config: `config.data`, see configs/vit_b.py.
      augment: the augmentation of the run; evaluators use its `evaluation` unless they train.
      mesh: the devices that batches are placed on.
      check: called before every batch, by all processes; it may raise to interrupt an evaluation.
      wait_check: called now and then while a batch is waited for, by each process on its own; it
        may raise.
      cache: a `FeatureCache` of evaluators/common/, or None: compute features on every request.
      accepted: {split: what counts as correct} of additional test images, which are in `sources`.
      keep: what evaluators give an `Outcome` of evaluators/common/ to; None: it is not kept.
    """

    def __init__(
        self,
        sources: dict[str, Any],
        config: ConfigDict,
        augment: Augment,
        mesh: Mesh,
        check: Callable[[], None] = prefetch.no_check,
        wait_check: Callable[[], None] = prefetch.no_check,
        progress: Callable[[Iterable[Batch], str, int], Iterable[Batch]] = _no_progress,
        cache: Any = None,
    ) -> None:
        """Store the arguments; see the attributes of the class.

        Args:
          progress: passes on the batches of a split and may show how many have been read:
            (batches, split, number of batches) -> batches.
        """
        self.sources = sources
        self.config = config
        self.augment = augment
        self.mesh = mesh
        self.check = check
        self.wait_check = wait_check
        self.cache = cache
        self.accepted: dict[str, AcceptedClasses] = {}
        self.keep: Callable[[Any], None] | None = None
        self._progress = progress
        # By split, so that an unreadable image is reported once and not at every evaluation
        self._bad: dict[str, loader.BadImageMonitor] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where images are unlabeled."""
        return self.sources["train"].classes

    @property
    def targets(self) -> Targets | None:
        """The labels of the training images that are no classes; None: there are none."""
        return targets_of(self.sources["train"])

    @property
    def held_out(self) -> str:
        """The split for pictures and collapse metrics: "test", or "train" without a test split."""
        return "test" if self.sources["test"] else "train"

    def with_sources(
        self, sources: dict[str, Any], augment: Augment, *, as_stored: bool = False
    ) -> "EvaluationData":
        """Other images, read in the same way.

        The canvas is at least twice as large as the evaluation images: images that are not square
        are not shrunk below the size at which they are used.

        Args:
          sources: {"train": a source, "test": a source or None}.
          augment: gives the size of the evaluation images.
          as_stored: never turn images by their EXIF orientation: for masks and boxes, which lie on
            the pixels as they are stored.
        """
        config = ConfigDict(dict(self.config))
        if as_stored:
            config.exif_orientation = False
        config.canvas = max(config.canvas, 2 * max(augment.eval_size))
        return EvaluationData(
            sources,
            config,
            augment,
            self.mesh,
            check=self.check,
            wait_check=self.wait_check,
            progress=self._progress,
            cache=self.cache,
        )

    def with_augment(self, augment: Augment) -> "EvaluationData":
        """The same images, prepared in another way."""
        other = copy.copy(self)
        other.augment = augment
        other.__dict__.pop("_transform", None)  # it is cached
        return other

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Iterate over a split, in order.

        Args:
          split: "train" or "test".
          batch_size: images per batch, rounded up to a multiple of the number of devices.

        Yields:
          {"images": float32 [B, H, W, C] normalized, "label": int32 [B], "index": int32 [B],
          "size": int32 [B, 2], height and width of the decoded image, which fits the canvas}, split
          over all devices. The index is -1 for padding and for images that cannot be read:
          ignore these rows.
        """
        needed = batch_bytes(self.config, batch_size)
        workers = prefetch.num_workers(self.config, needed)
        images = self._decoded(self.sources[split], workers)
        if split not in self._bad:
            prefetch.check_shared_memory(needed, workers)
            self._bad[split] = loader.BadImageMonitor(images, self.config.max_bad_fraction)

        def place(batch: Batch) -> Batch:
            self._bad[split].record(batch["bad"])
            return self._placed(batch)

        pool = self._worker_pool(images, batch_size, workers)
        batches = prefetch.Prefetcher(
            pool,
            place,
            self.config.timeout,
            activity=images.activity,
            describe_reads=images.describe_reads,
            check=self.wait_check,
        )
        total = -(-len(images.source) // batch_size)
        for batch in self._progress(batches, split, total):
            self.check()
            yield {
                "images": self._transform(batch),
                "label": batch["label"],
                "index": batch["index"],
                "size": batch["size"],
            }

    def training(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """Iterate over the training images in a random order, each image once per epoch.

        Args:
          batch_size: global batch size, a multiple of the number of devices.
          steps: number of batches.
          seed: seed of the order.

        Yields:
          {"image": uint8 [B, K, K, C], "size": int32 [B, 2], "label": int32 [B]}, canvases split
          over all devices; with labels that are no classes, also "target" float32 [B, T].
        """
        targets = self.targets
        batches = loader.training_batches(
            self.sources["train"],
            self.config,
            seed=seed,
            batch_size=batch_size,
            steps=steps,
            start=0,
            mesh=self.mesh,
            check=self.wait_check,
            targets=targets.values if targets else None,
        )
        for batch in batches:
            self.check()
            yield batch

    def sample(self, split: str, count: int) -> tuple[Batch, tuple[int, ...]]:
        """A random sample of a split, the same one at every call.

        Args:
          split: "train" or "test".
          count: number of images; at most all images of the split are returned.

        Returns:
          The batch, padded to a multiple of the number of devices: as from `batches`, and the
          canvases "image" uint8 [B, K, K, C] and "size" int32 [B, 2]. And the indices of the images
          in their source, in the order of the rows.
        """
        source = self.sources[split]
        indices = random_indices(source, count)
        (batch,) = self._worker_pool(
            self._decoded(Subset(source, indices)), len(indices), workers=0
        )
        batch = self._placed(batch)
        batch["images"] = self._transform(batch)
        return batch, indices

    def object_masks(self, split: str, indices: Iterable[int]) -> dict[str, np.ndarray] | None:
        """Segmentation masks of some images as canvases, in which 255 is an object and 0 is not.

        Returns:
          {"image": uint8 [B, K, K, C], "size": int [B, 2]}, numpy; None if an image has no mask.
        """
        images = []
        sizes = []
        for index in indices:
            file = self.sources[split].mask(index)
            if file is None:
                return None
            image, size = decode.decode_to_canvas(file, self.config.canvas, self.config.channels)
            images.append(image)
            sizes.append(size)
        return {"image": np.stack(images), "size": np.stack(sizes)}

    @functools.cached_property
    def _transform(self) -> Callable[[Batch], jax.Array]:
        """Jitted canvases -> normalized images."""
        return jax.jit(self.augment.evaluation)

    def _decoded(self, source: Source, workers: int = 0) -> loader.BatchDecoder:
        return loader.BatchDecoder(
            source,
            self.config.canvas,
            self.config.channels,
            prefetch.num_threads(self.config, workers),
            replace=False,
            retry_seconds=loader.RETRY_SHARE * self.config.timeout,
            activity=Activity(workers),
            options=ImageOptions.from_config(self.config),
        )

    def _worker_pool(
        self, images: loader.BatchDecoder, batch_size: int, workers: int
    ) -> prefetch.WorkerPool:
        """An iterator over the rows of this process in each batch, numpy."""
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
        first, rows = loader.process_rows(batch_size)
        order = EvaluationOrder(images, batch_size, first, rows, prefetch.num_parts(workers, rows))
        return prefetch.WorkerPool(order, 0, workers, keep=True)

    def _placed(self, batch: Batch) -> Batch:
        """A batch on the devices; the index of an unreadable image becomes -1."""
        readable = {name: batch[name] for name in ("image", "size", "label")}
        readable["index"] = np.where(batch["bad"] >= 0, -1, batch["index"])
        return sharding.to_global(readable, self.mesh)


def known_labels(source: Any) -> tuple[Int[np.ndarray, " n"], bool]:
    """The classes of the images of a source, -1: none; without decoding an image.

    Returns:
      (classes, True); or (those of a few images, False) where labels are stored in the records.

    Raises:
      ReadFailed: the storage was at fault for minutes.
    """
    labels = getattr(source, "labels", None)
    if labels is not None:
        return np.asarray(getattr(labels, "array", labels)), True
    if not source.classes:
        return np.full(len(source), -1, np.int32), True
    places = np.unique(np.linspace(0, len(source) - 1, SAMPLED_LABELS).astype(int))
    labels = []
    for index in places:
        read = functools.partial(source.record, int(index))
        name = functools.partial(source.name, int(index))
        try:
            labels.append(faults.retry(read, name, faults.RETRY_SECONDS)[1])
        except (decode.BadImage, OSError):  # reported when the image is read
            continue
    return np.array(labels, np.int32), False


def targets_of(source: Any) -> Targets | None:
    """The labels of the images of a source that are no classes; None: there are none."""
    return getattr(source, "targets", None)


def only_labeled(data: EvaluationData) -> EvaluationData:
    """The same images without the training images that have no class."""
    source = data.sources["train"]
    labels, complete = known_labels(source)
    if (labels >= 0).all() or targets_of(source):
        return data
    labeled: Source
    if complete:
        indices = tuple(np.flatnonzero(labels >= 0).tolist())
        labeled = Subset(source, indices, data.classes)
    else:
        labeled = tfds_source.select_classes(source, source.classes)
    chosen = copy.copy(data)
    chosen.sources = {**data.sources, "train": labeled}
    return chosen


def with_held_out(data: EvaluationData, share: float, seed: int) -> EvaluationData:
    """The same images, with a random part of the training images as a split of its own.

    Args:
      data: the images.
      share: of the training images that are held out; at least one.
      seed: of the choice.

    Returns:
      The images with the splits "train", "held_out", which share no image, and "test".
    """
    source = data.sources["train"]
    order = np.random.default_rng(seed).permutation(len(source))
    count = max(1, round(share * len(source)))
    parts = []
    targets = data.targets
    for part in (order[count:], order[:count]):
        rows = np.sort(part)
        own = targets.select(rows) if targets else None
        parts.append(Subset(source, tuple(rows.tolist()), data.classes, own))
    chosen = copy.copy(data)
    chosen.sources = {**data.sources, "train": parts[0], "held_out": parts[1]}
    return chosen


def random_indices(source: Source, count: int) -> tuple[int, ...]:
    """Indices of at most `count` random images of a source, the same ones at every call."""
    return tuple(int(i) for i in loader.epoch_order(0, 0, len(source))[:count])
