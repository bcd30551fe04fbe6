"""Frozen features of image files of any size, in batches of images of one shape."""

import os
import pathlib
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.distributed import sharding

KINDS = ("cls", "mean", "patches")
LONGEST = 20  # times as long as wide: a strip beyond that would be more patches than memory holds


class Extractor:
    """A frozen encoder over images of any size, on all devices of this process."""

    def __init__(self, method, params, transform, *, size, kinds, norm, batch_size):
        """Place the weights.

        Args:
          method, params: see `saved.Model`. transform: an `augment.Augment`, for colours and the kind of resize.
          size: the short side in pixels. kinds: of KINDS. norm: features after the final norm; or before it.
          batch_size: images at a time.
        """
        self.method, self.size, self.kinds, self.batch_size = method, size, kinds, batch_size
        self._resample = Image.Resampling[transform.interpolation.upper()]
        mesh, end = sharding.make_mesh(devices=jax.local_devices()), "" if norm else "_prenorm"

        def run(params, images):
            found = method.features(params, transform.normalize(images.astype(jnp.float32)))
            patches = found[f"patches{end}"].astype(jnp.float32)
            out = {"patches": patches, "mean": patches.mean(axis=1)}
            out |= {"cls": found[f"cls{end}"].astype(jnp.float32)} if "cls" in found else {}
            return {name: out[name] for name in kinds if name in out}

        self._placement = sharding.batch_sharding(mesh)
        self._run = jax.jit(run, out_shardings=self._placement)
        self._params = jax.device_put(params, sharding.replicated(mesh))

    def shape(self, height, width):
        """(height, width) in pixels that an image is resized to."""
        patch, short = self.method.patch_size, min(height, width)
        sides = (
            max(1, round(side * self.size / short / patch)) * patch for side in (height, width)
        )
        return tuple(sides)

    def prepare(self, data):
        """Encoded bytes -> uint8 [H, W, C], resized; BadImage where they are no image."""
        pixels = decode.decode(data, 0, self.method.channels)
        if max(pixels.shape[:2]) > LONGEST * min(pixels.shape[:2]):
            raise decode.BadImage(f"a strip of {pixels.shape[1]} x {pixels.shape[0]} pixels")
        height, width = self.shape(*pixels.shape[:2])
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        return np.asarray(image.resize((width, height), self._resample)).reshape(height, width, -1)

    def __call__(self, images):
        """Images of one shape, uint8 [H, W, C] each -> {kind: float32 [B, D] or, for patches, [B, N, D]}."""
        devices = jax.local_devices()
        rows = -(-self.batch_size // len(devices)) * len(devices)
        batch = np.stack(
            [*images, *[images[0]] * (rows - len(images))]
        )  # one shape of batch: one compilation
        out = self._run(self._params, jax.device_put(batch, self._placement))
        return {name: np.asarray(value)[: len(images)] for name, value in out.items()}


def extract(extractor, root, names, progress):
    """Features of all images that can be read.

    Args:
      extractor: an Extractor. root: the folder; names: of the files in it. progress: called with a number of images.

    Returns:
      (names, grids [n, 2], {kind: list of an array per image}), [(name, what is wrong with it)].
    """
    found, bad, waiting = {}, [], {}

    def read(name):
        try:
            return extractor.prepare(pathlib.Path(root, name).read_bytes())
        except (decode.BadImage, OSError) as error:
            return error

    def flush(shape):
        indices, images = zip(*waiting.pop(shape), strict=True)
        out = extractor(images)
        for row, index in enumerate(indices):
            grid = tuple(side // extractor.method.patch_size for side in shape)
            found[index] = grid, {name: value[row] for name, value in out.items()}
        progress(len(indices))

    ahead = 2 * extractor.batch_size
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), ahead):
            part = names[start : start + ahead]
            for index, image in enumerate(pool.map(read, part), start):
                if isinstance(image, Exception):
                    bad.append((names[index], " ".join(str(image).split())))
                    progress(1)
                    continue
                waiting.setdefault(image.shape[:2], []).append((index, image))
                if len(waiting[image.shape[:2]]) == extractor.batch_size:
                    flush(image.shape[:2])
        for shape in list(waiting):
            flush(shape)
    order = sorted(found)
    kinds = found[order[0]][1] if order else ()
    features = {name: [found[i][1][name] for i in order] for name in kinds}
    return (
        [names[i] for i in order],
        np.array([found[i][0] for i in order], np.int32),
        features,
        bad,
    )
