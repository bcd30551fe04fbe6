"""Semantic segmentation: a head is trained on pixels, with the encoder fine-tuned or frozen.

A linear layer of patches, or a small head on ViTDet's simple feature pyramid. Test images are seen
through windows that slide over them at full resolution; logits are averaged where windows overlap,
and every pixel of the mask counts.

Letters: B batch, H W height and width of the input, C channels, K classes, h w sides of an image
as it is seen.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int16, UInt8
from PIL import Image

from lmim_jax.data import decode, samples
from lmim_jax.data.augment import view
from lmim_jax.data.eval import segmentation_sets
from lmim_jax.data.eval.eval_data import Batch, EvaluationData
from lmim_jax.data.eval.mask_channel import MOST_CLASSES, VOID, WithMask
from lmim_jax.data.eval.segmentation_sets import Labels
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import pixel_labels
from lmim_jax.evaluators.common.dense_training import DenseProbe, DenseTask, train
from lmim_jax.evaluators.common.pixel_labels import Axis, Confusion
from lmim_jax.models import pyramid
from lmim_jax.utils import plotting
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

HEADS = ("linear", "pyramid")
LARGEST_CANVAS = 2048  # pixels; larger images are shrunk to this long side
SHOWN_PIXELS = 512  # long side of the pictures


@dataclasses.dataclass(frozen=True)
class Evaluator(DenseProbe):
    """Segmentation by a trained head; the fields are explained in configs/evaluate.py."""

    layout: str
    path: str
    train_split: str
    test_split: str
    train_images: int
    test_images: int
    classes: tuple[int, ...]
    names: tuple[str, ...]
    ignore: tuple[int, ...]
    head: str
    features: int
    short_side: int
    step: float
    shown: int

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Train on the training images, then measure on the test images.

        Returns:
          "miou", "pixels" and "majority_pixels" in percent, as of `segmentation_probe`; the picture
          "segments" and the table "classes".

        Raises:
          UserError: see `segmentation_sets.open_split` and `DenseProbe`, or training diverged.
        """
        self.check(method.patch_size)
        self._check_options()
        splits = {}
        for name, split, most in (
            ("train", self.train_split, self.train_images),
            ("test", self.test_split, self.test_images),
        ):
            splits[name] = segmentation_sets.open_split(self.layout, self.path, split, most)
            log.info("%s: %d images with masks", name, len(splits[name]))
        labels = self._labels(splits, data.config.timeout)
        augment = self.fit(method, data)
        task = DenseTask(method, augment, len(labels.classes), data.config.channels)
        trained = train(self, task, params, self._with_masks(splits, labels, data), None)
        return self._measure(_Windows(self, task, params, trained, data), splits["test"], labels)

    def _check_options(self) -> None:
        """Raise a UserError for options without a meaning."""
        if self.head not in HEADS:
            raise UserError(
                f"evaluator {self.name}: head={self.head!r} must be one of: {' | '.join(HEADS)}"
            )
        if not 0 < self.step <= 1:
            raise UserError(
                f"evaluator {self.name}: step={self.step} must be a share of the window in 0 .. 1"
            )

    def _labels(self, splits: dict[str, Any], retry_seconds: float) -> Labels:
        """What the numbers in the masks mean."""
        classes = self.classes
        if not classes:
            found: set[int] = set()
            for source in splits.values():
                found |= segmentation_sets.find_classes(
                    source, self.ignore, self.layout, retry_seconds
                )
            classes = tuple(sorted(found))
        names = self.names
        if not names and self.layout == "ade20k":
            names = segmentation_sets.read_ade20k_names(self.path)
        if len(classes) > MOST_CLASSES:
            raise UserError(f"{len(classes)} classes are more than {MOST_CLASSES}")
        return Labels.from_options(classes, self.ignore, names, self.layout)

    def _with_masks(
        self, splits: dict[str, Any], labels: Labels, data: EvaluationData
    ) -> EvaluationData:
        """The training images with their masks as one more channel."""
        source = splits["train"]
        canvas = min(LARGEST_CANVAS, max(_long_side(source, place) for place in range(len(source))))
        channels = data.config.channels
        records = WithMask(source, labels, canvas, channels, _as_stored(data), data.config.timeout)
        other = data.with_sources({"train": records, "test": None}, data.augment)
        # Records are uint8 arrays, which no option changes any more
        other.config.update(
            canvas=canvas,
            channels=channels + 1,
            range="full",
            transparency="ignore",
            exif_orientation=False,
        )
        return other

    def network(self, task: DenseTask, dtype: Any) -> nn.Module:
        """The head."""
        if self.head == "linear":
            return pyramid.LinearSegmenter(task.classes, dtype)
        return pyramid.PyramidSegmenter(task.classes, self.features, dtype)

    def view(self, task: DenseTask, keys: Array, batch: Batch) -> tuple[Array, Any]:
        """Images [B, H, W, C] and the classes of their pixels [B, H, W]; VOID: none."""

        def one(key: Array, canvas: Array, size: Array) -> tuple[Array, Array]:
            whole = jnp.float32(1.0)
            if self.short_side:
                whole = self.short_side / size.min()
            drawn = view.draw_view(key, size, task.size, whole, self.scale, self.flip)
            pixels = view.view_pixels(drawn, canvas[..., :-1], size, task.size, task.augment)
            return pixels, view.view_mask(drawn, canvas[..., -1], size, task.size, VOID)

        return jax.vmap(one)(keys, batch["image"], batch["size"])

    def loss(self, task: DenseTask, outputs: Any, targets: Any) -> Float[Array, ""]:
        """Mean cross-entropy of the pixels that have a class."""
        logits = _enlarge(outputs, task.size)
        counted = targets != VOID
        classes = jnp.where(counted, targets, 0).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
        return jnp.where(counted, losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)

    def _measure(self, windows: "_Windows", source: Any, labels: Labels) -> Results:
        """Classify the pixels of the test images."""
        counts = Confusion(len(labels.classes))
        places = np.linspace(0, len(source) - 1, max(1, self.shown)).astype(int)
        chosen = set(places.tolist()[: self.shown])
        shown = []
        for index in range(len(source)):
            windows.data.check()
            mask = labels.read(source, index, windows.data.config.timeout)
            pixels = windows.read(source, index)
            found = windows.classify(pixels, mask.shape)
            counts.add(mask, found)
            if index in chosen:
                step = -(-max(mask.shape) // SHOWN_PIXELS)
                size = (mask.shape[1], mask.shape[0])
                image = decode.resize(pixels, size)[::step, ::step]
                rows = {"truth": mask[::step, ::step], self.head: found[::step, ::step]}
                shown.append(plotting.Segmented(image, rows))
        if not counts.table.any():
            raise UserError("no pixel of the test masks has a class; check `classes` and `ignore`")
        results: Results = {
            "miou": 100 * counts.mean_iou(),
            "pixels": 100 * counts.accuracy(),
            "majority_pixels": 100 * counts.majority(),
            "classes": pixel_labels.class_table(labels.names, {self.head: counts}),
        }
        if shown:
            how = "frozen" if self.frozen else "fine-tuned"
            title = f"Segmentation, {how} encoder"
            results["segments"] = plotting.plot_segmentation(shown, labels.names, title)
        return results


class _Windows:
    """Classifies the pixels of whole images through windows of the size of the input.

    Attributes:
      data: gives the options of images and the devices.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        task: DenseTask,
        params: Params,
        trained: Params,
        data: EvaluationData,
    ) -> None:
        self.data = data
        self._evaluator = evaluator
        self._task = task
        self._params = params
        self._trained = trained
        self._logits = _jit_logits(evaluator, task, data.mesh)

    def read(self, source: Any, index: int) -> UInt8[np.ndarray, "h w C"]:
        """An image as it is seen: with `short_side`, resized to it.

        Raises:
          UserError: it cannot be read.
        """
        try:
            data = source.record(index)[0]
            pixels = decode.decode(data, LARGEST_CANVAS, self._task.channels, _as_stored(self.data))
        except (decode.BadImage, OSError) as error:
            raise UserError(f"{source.name(index)} cannot be used: {error}") from error
        short = self._evaluator.short_side
        if not short:
            return pixels
        height, width = pixels.shape[:2]
        scale = short / min(height, width)
        size = (max(1, round(scale * width)), max(1, round(scale * height)))
        method = getattr(Image.Resampling, self._evaluator.interpolation.upper())
        return decode.resize(pixels, size, method)

    def classify(
        self, pixels: UInt8[np.ndarray, "h w C"], size: tuple[int, int]
    ) -> Int16[np.ndarray, "_ _"]:
        """The class of each pixel of a mask of this height and width.

        Raises:
          UserError: logits are not finite.
        """
        augment = self._task.augment
        mean_level = np.array(augment.mean, np.float32)
        deviation = np.array(augment.std, np.float32)
        image = (pixels.astype(np.float32) / 255 - mean_level) / deviation
        height, width = image.shape[:2]
        rows, columns = self._task.size
        missing = ((0, max(0, rows - height)), (0, max(0, columns - width)), (0, 0))
        image = np.pad(image, missing)
        corners = list(self._corners(image.shape[:2]))
        total = np.zeros((*image.shape[:2], self._task.classes), np.float32)
        count = np.zeros((*image.shape[:2], 1), np.float32)
        for corner, logits in zip(corners, self._windows(image, corners), strict=True):
            place = np.s_[corner[0] : corner[0] + rows, corner[1] : corner[1] + columns]
            total[place] += logits
            count[place] += 1
        if not np.isfinite(total).all():
            raise UserError(
                f"{self._evaluator.name}: its outputs are not finite, so that nothing can be "
                "measured; lower its base_lr"
            )
        mean = (total / count)[:height, :width]
        if (height, width) == tuple(size):
            return mean.argmax(axis=-1).astype(np.int16)
        row_axis = Axis(0, size[0], height / size[0], 0.0)
        column_axis = Axis(0, size[1], width / size[1], 0.0)
        return pixel_labels.pixel_classes(
            jnp.asarray(mean), row_axis, column_axis, (height, width), "bilinear"
        )

    def _corners(self, size: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Top and left of each window; the last ones end at the border."""
        starts = []
        for side, window in zip(size, self._task.size, strict=True):
            step = max(1, round(self._evaluator.step * window))
            count = -(-(side - window) // step) + 1
            starts.append([min(number * step, side - window) for number in range(count)])
        for top in starts[0]:
            for left in starts[1]:
                yield top, left

    def _windows(
        self, image: Float[np.ndarray, "h w C"], corners: list[tuple[int, int]]
    ) -> Iterator[Float[np.ndarray, "H W K"]]:
        """The logits of each window."""
        mesh = self.data.mesh
        most = max(1, self._evaluator.batch_size // mesh.size) * mesh.size
        rows, columns = self._task.size
        for first in range(0, len(corners), most):
            part = corners[first : first + most]
            windows = [image[top : top + rows, left : left + columns] for top, left in part]
            missing = -len(windows) % mesh.size
            windows += [np.zeros_like(windows[0])] * missing
            batch = sharding.place_array(np.stack(windows), sharding.batch_sharding(mesh))
            found = jax.device_get(self._logits(self._params, self._trained, batch))
            yield from np.asarray(found)[: len(part)]


@functools.lru_cache(maxsize=2)
def _jit_logits(
    probe: Evaluator, task: DenseTask, mesh: Mesh
) -> Callable[[Params, Params, Array], Float[Array, "B H W K"]]:
    """Jitted (params, trained, images) -> logits of every pixel."""

    def logits(params: Params, trained: Params, images: Array) -> Array:
        return _enlarge(probe.outputs(task, params, trained, images), task.size)

    return jax.jit(logits, out_shardings=sharding.replicated(mesh))


def _enlarge(logits: Float[Array, "B _ _ K"], size: tuple[int, int]) -> Float[Array, "B H W K"]:
    """Interpolate logits to the pixels of the input."""
    return jax.image.resize(logits, (len(logits), *size, logits.shape[-1]), "bilinear")


def _as_stored(data: EvaluationData) -> ImageOptions:
    """The options of images, without turning them: masks lie on the images as they are stored."""
    return dataclasses.replace(ImageOptions.from_config(data.config), exif_orientation=False)


def _long_side(source: Any, index: int) -> int:
    """The longer side of an image in pixels."""
    try:
        header = samples.read_header(source.record(index)[0])
    except (decode.BadImage, OSError) as error:
        raise UserError(f"{source.name(index)} cannot be read: {error}") from error
    return max(header.width, header.height)
