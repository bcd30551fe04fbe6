"""The labelled images that evaluators see: every image once, unaugmented; or a fixed random few."""

import dataclasses
import functools

import jax
import numpy as np

from lmim_jax import sharding
from lmim_jax.data import background, decode, loader


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
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return len(self.indices)

    def record(self, index):
        """(encoded bytes, class) of the image."""
        return self.source.record(self.indices[index])

    def name(self, index):
        """The name of the image in its source."""
        return self.source.name(self.indices[index])


class Evaluation:
    """Images of both splits for evaluators.

    sources: {"train": source, "test": source or None}; config: `config.data`; augment: an `augment.Augment`; mesh:
    where batches are placed; check: called at every batch, may raise to cut an evaluation short.
    """

    def __init__(self, sources, config, augment, mesh, check=lambda: None):
        self.sources, self.config, self.augment, self.mesh, self._check = sources, config, augment, mesh, check
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
        for batch in background.ahead(crew, place, self.config.timeout, images.reading):
            self._check()
            yield {"images": self._transform(batch), "label": batch["label"], "index": batch["index"]}

    def training(self, batch_size, steps, seed):
        """Iterate over training images in the random order of a seed, every one once an epoch.

        Yields:
          `steps` batches {"image": [B, K, K, C] uint8, "size": [B, 2], "label": [B]}, canvases over all devices.
        """
        order = dict(seed=seed, batch_size=batch_size, steps=steps, start=0, mesh=self.mesh)
        for batch in loader.training(self.sources["train"], self.config, **order):
            self._check()
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
            *(decode.on_canvas(f, self.config.canvas, self.config.channels) for f in files), strict=True
        )
        return {"image": np.stack(images), "size": np.stack(sizes)}

    def _decoded(self, source):
        threads = background.threads_of(self.config)
        return loader.Decoded(source, self.config.canvas, self.config.channels, threads, replace=False)

    def _crew(self, images, batch_size, workers):
        """Batches of this process's rows, numpy."""
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
        first, rows = loader.rows_of_process(batch_size)
        order = EvaluationOrder(images, batch_size, first, rows, background.parts_of(workers, rows))
        return background.Crew(order, 0, workers)

    def _placed(self, batch):
        """A batch on the devices; index is -1 for what is to be left out."""
        index = np.where(batch["bad"] >= 0, -1, batch["index"])
        return sharding.to_global({**{k: batch[k] for k in ("image", "size", "label")}, "index": index}, self.mesh)
