"""A sample of the patches of many images, drawn from a stream in bounded memory.

Letters: N patches of an image, D width, S patches of the sample, c label cells of a patch.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Int16

SLACK = 8  # the buffers are larger than the sample by this part of it


@dataclasses.dataclass(frozen=True)
class Patches:
    """Patches with labels.

    Attributes:
      features: float32.
      labels: class of each patch.
      cells: classes of equal parts of each patch, -1: none.
      images: index of the image of each patch.
    """

    features: Float[np.ndarray, "S D"]
    labels: Int[np.ndarray, " S"]
    cells: Int16[np.ndarray, "S c"]
    images: Int[np.ndarray, " S"]

    def select(self, rows: Bool[np.ndarray, " S"]) -> "Patches":
        """Some of the patches, in their order."""
        return Patches(self.features[rows], self.labels[rows], self.cells[rows], self.images[rows])


class PatchSample:
    """Draws a given number of patches from a stream, every one with the same probability.

    Every patch gets a random number that depends on the seed, its image, and its place in it, and
    those with the smallest numbers are kept (bottom-k sampling, a reservoir whose result depends on
    neither the order of the stream nor its division into batches).

    Args:
      size: of the sample, at most.
      seed: of the random numbers.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._filled = 0
        self._limit = np.inf  # patches with larger numbers are in no sample
        self._buffers: dict[str, np.ndarray] = {}

    def add(
        self,
        image: int,
        features: Float[np.ndarray, "N D"],
        labels: Int[np.ndarray, " N"],
        cells: Int16[np.ndarray, "N c"],
    ) -> None:
        """Add the patches of an image; those with the label -1 are in no sample."""
        keys = np.random.default_rng((self._seed, image)).random(len(labels))
        chosen = np.flatnonzero((labels >= 0) & (keys < self._limit))
        values = {
            "keys": keys[chosen],
            "places": chosen,
            "features": features[chosen],
            "labels": labels[chosen],
            "cells": cells[chosen],
            "images": np.full(len(chosen), image),
        }
        self._make_room(values)
        end = self._filled + len(chosen)
        for name, value in values.items():
            self._buffers[name][self._filled : end] = value
        self._filled = end

    def finish(self) -> Patches:
        """The sample, ordered by image and place; the buffers are given up."""
        self._shrink()
        buffers = self._buffers
        self._buffers = {}
        if not self._filled:
            return Patches(
                np.zeros((0, 1), np.float32),
                np.zeros(0, np.int64),
                np.zeros((0, 1), np.int16),
                np.zeros(0, np.int64),
            )
        kept = {name: buffer[: self._filled] for name, buffer in buffers.items()}
        order = np.lexsort((kept["places"], kept["images"]))
        return Patches(
            features=kept["features"][order],
            labels=kept["labels"][order],
            cells=kept["cells"][order],
            images=kept["images"][order],
        )

    def _make_room(self, values: dict[str, np.ndarray]) -> None:
        """Buffers that the new values fit in; they grow up to the size of the sample and SLACK."""
        needed = self._filled + len(values["keys"])
        capacity = len(self._buffers["keys"]) if self._buffers else 0
        if needed <= capacity:
            return
        largest = self._size + max(self._size // SLACK, len(values["keys"]))
        if needed > largest:
            self._shrink()
            needed = self._filled + len(values["keys"])
        if needed <= capacity:
            return
        rows = min(max(2 * capacity, needed), largest)
        for name, value in values.items():
            grown = np.empty((rows, *value.shape[1:]), value.dtype)
            if capacity:
                grown[: self._filled] = self._buffers[name][: self._filled]
            self._buffers[name] = grown

    def _shrink(self) -> None:
        """Keep the patches with the smallest numbers, as many as the sample has."""
        if self._filled <= self._size:
            return
        keys = self._buffers["keys"][: self._filled]
        order = np.argpartition(keys, self._size - 1)
        self._limit = keys[order[self._size - 1]]
        holes = np.sort(order[: self._size])
        moved = holes[holes >= self._size]
        free = np.setdiff1d(np.arange(self._size), holes, assume_unique=True)
        for buffer in self._buffers.values():
            buffer[free] = buffer[moved]
        self._filled = self._size
