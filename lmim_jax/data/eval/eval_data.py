"""The labelled images that evaluators see: every image once, unaugmented; or a fixed random few."""

import dataclasses
import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from lmim_jax.data import decode, loader, prefetch
from lmim_jax.data.augment.device import Squash
from lmim_jax.data.eval import clevr, segmentation_masks, video_clips
from lmim_jax.distributed import sharding
from lmim_jax.utils.errors import UserError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class EvaluationOrder:
    """Every image once, in order, padded to whole batches; parts as in `loader.TrainingOrder`."""

    images: loader.Decoded
    batch_size: int
    first_row: int
    rows: int
    parts: int

    def __len__(self):
        return -(-len(self.images.source) // self.batch_size) * self.parts

    def __getitem__(self, i):
        batch, part = divmod(int(i), self.parts)
        rows = np.arange(part * self.rows // self.parts, (part + 1) * self.rows // self.parts)
        indices = batch * self.batch_size + self.first_row + rows
        return self.images.batch(np.where(indices < len(self.images.source), indices, -1))


@dataclasses.dataclass(frozen=True)
class Selected:
    """Some images of a source, as a source."""

    source: object
    indices: tuple[int, ...]
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return len(self.indices)

    def record(self, index):
        """(encoded bytes, class) of the image."""
        return self.source.record(self.indices[index])

    def mask(self, index):
        """The encoded mask of the image, or None."""
        return self.source.mask(self.indices[index])

    def identity(self):
        """What tells these images from others."""
        return {**self.source.identity(), "chosen": list(self.indices)}

    def name(self, index):
        """The name of the image in its source."""
        return self.source.name(self.indices[index])


class Evaluation:
    """Images of both splits for evaluators.

    sources: {"train": source, "test": source or None}; config: `config.data`; augment: an `augment.Augment`; mesh:
    where batches are placed; check: called at every batch, may raise to cut an evaluation short; progress: what passes
    on the batches of a split, and may show how many have come, (batches, split, total) -> batches; cache: a
    `feature_cache.FeatureCache`, or None where features are computed whenever they are needed.
    """

    def __init__(
        self,
        sources,
        config,
        augment,
        mesh,
        check=lambda: None,
        progress=lambda batches, *_: batches,
        cache=None,
    ):
        self.sources, self.config, self.augment, self.mesh, self.check = (
            sources,
            config,
            augment,
            mesh,
            check,
        )
        self._progress, self.cache = progress, cache
        self._bad = {}  # by split, so that a bad image is named once, not at every evaluation

    @property
    def classes(self):
        """Names of the classes; empty where images are unlabelled."""
        return self.sources["train"].classes

    @property
    def held_out(self):
        """The split to show and to watch: "test", or "train" where there is no other."""
        return "test" if self.sources["test"] else "train"

    @functools.cached_property
    def _transform(self):
        return jax.jit(self.augment.evaluation)

    def batches(self, split, batch_size):
        """Iterate over a split, as arrays over all devices.

        Yields:
          {"images": float32 [B, H, W, C] normalised, "label": int32 [B], "index": int32 [B]}; index is -1 for padding
          and for images that cannot be read: leave these out.
        """
        images = self._decoded(self.sources[split])
        if split not in self._bad:
            self._bad[split] = loader.BadImages(images, self.config.max_bad_fraction)

        def place(batch):
            self._bad[split].see(batch["bad"])
            return self._placed(batch)

        crew = self._crew(images, batch_size, self.config.workers)
        batches = prefetch.ahead(crew, place, self.config.timeout, images.reading)
        for batch in self._progress(batches, split, -(-len(images.source) // batch_size)):
            self.check()
            yield {
                "images": self._transform(batch),
                "label": batch["label"],
                "index": batch["index"],
            }

    def training(self, batch_size, steps, seed):
        """Iterate over training images in the random order of a seed, every one once an epoch.

        Yields:
          `steps` batches {"image": [B, K, K, C] uint8, "size": [B, 2], "label": [B]}, canvases over all devices.
        """
        order = dict(seed=seed, batch_size=batch_size, steps=steps, start=0, mesh=self.mesh)
        for batch in loader.training(self.sources["train"], self.config, **order):
            self.check()
            yield batch

    def sample(self, split, count):
        """The same random images of a split at every call: one batch, padded to a multiple of the devices.

        Returns:
          (batch, indices): as from `batches`, and the canvases "image" [B, K, K, C] uint8 and "size" [B, 2] int32;
          indices of the images in the source, in order of the rows.
        """
        source = self.sources[split]
        indices = tuple(int(i) for i in loader.epoch_order(0, 0, len(source))[:count])
        (batch,) = self._crew(self._decoded(Selected(source, indices)), len(indices), workers=0)
        batch = self._placed(batch)
        return {**batch, "images": self._transform(batch)}, indices

    def masks(self, split, indices):
        """Object masks of some images, as canvases {"image": uint8 [B, K, K, C] of 0 and 255, "size": [B, 2]}, numpy.

        None where an image has no mask.
        """
        files = [self.sources[split].mask(index) for index in indices]
        if None in files:
            return None
        images, sizes = zip(
            *(decode.on_canvas(f, self.config.canvas, self.config.channels) for f in files),
            strict=True,
        )
        return {"image": np.stack(images), "size": np.stack(sizes)}

    def masked(self, images, of_masks, counts, augment):
        """Images with masks of numbers, of this dataset or of two folders, see masks.py; their masks: `segments`.

        Args:
          images, of_masks: the folders; "": this dataset, in whose masks 255 is the object.
          counts: how many (training, test) images, at most, drawn at random: of the two splits where there are two,
            or else of two halves of the images.
          augment: their size.

        Returns:
          Another Evaluation.

        Raises:
          UserError: there are no masks; see `masks.folder`.
        """
        splits = (
            [segmentation_masks.folder(images, of_masks), None]
            if images or of_masks
            else [self.sources[s] for s in SPLITS]
        )
        if splits[0].mask(0) is None:
            raise UserError(
                "the images of this run have no masks to compare segments with; set `images` and `masks` of the "
                "evaluator to two folders with the same file names"
            )
        orders = [loader.epoch_order(0, 0, len(source)) if source else () for source in splits]
        if splits[1] is None:
            splits[1], half = splits[0], len(splits[0]) // 2
            orders = orders[0][half:], orders[0][:half]
        chosen = [
            tuple(int(i) for i in order[:count])
            for order, count in zip(orders, counts, strict=True)
        ]
        if not all(chosen):
            raise UserError(
                f"{len(splits[0])} image(s) with masks are too few: some train probes, others test them"
            )
        picked = {name: Selected(*of) for name, *of in zip(SPLITS, splits, chosen, strict=True)}
        return self._with(picked, augment)

    def segments(self, split, indices):
        """Masks of numbers of some images, as `batches` crops them, nearest pixels: int32 [n, H, W]; see masks.py."""
        source, found = self.sources[split], []
        for i in indices:
            try:
                found.append(
                    segmentation_masks.placed(
                        segmentation_masks.numbers(source.mask(i)), self.augment
                    )
                )
            except (decode.BadImage, OSError) as error:
                raise UserError(f"the mask of {source.name(i)} cannot be used: {error}") from error
        return np.stack(found)

    def attributed(self, name, folder, splits):
        """Images whose label is count x BINS + distance, see attributes.py: (another Evaluation, BINS).

        name, folder, splits: of a TFDS dataset, and its (training, test) splits; name "": `shapes/several`.
        """
        chosen = {
            key: clevr.source(name, folder, split)
            for key, split in zip(SPLITS, splits, strict=True)
        }
        return self._with(chosen, Squash(**vars(self.augment))), clevr.BINS

    def clips(self, path, listed):
        """The clips of a folder laid out as DAVIS, or for "" the embedded ones: a list of `clips.Clip`."""
        return video_clips.folder(path, listed) if path else video_clips.embedded()

    def _with(self, sources, augment):
        """The same way of reading, of other images; on a canvas twice as large as they are used, at least, so that one
        that is not square is not shrunk below that size.
        """
        config = ConfigDict(dict(self.config))
        config.canvas = max(config.canvas, *(2 * side for side in augment.eval_size))
        return Evaluation(
            sources, config, augment, self.mesh, self.check, self._progress, self.cache
        )

    def _decoded(self, source):
        threads = prefetch.threads_of(self.config)
        return loader.Decoded(
            source, self.config.canvas, self.config.channels, threads, replace=False
        )

    def _crew(self, images, batch_size, workers):
        """Batches of this process's rows, numpy."""
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
        first, rows = loader.rows_of_process(batch_size)
        order = EvaluationOrder(images, batch_size, first, rows, prefetch.parts_of(workers, rows))
        return prefetch.Crew(order, 0, workers)

    def _placed(self, batch):
        """A batch on the devices; index is -1 for what is to be left out."""
        index = np.where(batch["bad"] >= 0, -1, batch["index"])
        return sharding.to_global(
            {**{k: batch[k] for k in ("image", "size", "label")}, "index": index}, self.mesh
        )
