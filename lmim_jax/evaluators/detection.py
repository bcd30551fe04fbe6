"""Detection: boxes of objects, by an anchor-free head on a pyramid from the last block.

The simple feature pyramid of ViTDet and the head, the assignment and the loss of FCOS are trained
on images with boxes, with the encoder frozen or fine-tuned; average precision is that of COCO. The
pairing of the two is ours: ViTDet was published with Mask R-CNN.

Letters: B batch, H W height and width of the input, C channels, M boxes of an image, P candidates,
L places of all maps.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lmim_jax.data import decode
from lmim_jax.data.augment import view
from lmim_jax.data.eval import coco
from lmim_jax.data.eval.coco import BoxSplit
from lmim_jax.data.eval.eval_data import Batch, EvaluationData
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import coco_metrics, fcos
from lmim_jax.evaluators.common.coco_metrics import Detections
from lmim_jax.evaluators.common.dense_training import DenseProbe, DenseTask, train
from lmim_jax.models import pyramid
from lmim_jax.utils import box_plot
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

SHOWN_PIXELS = 640  # long side of images in the picture


@dataclasses.dataclass(frozen=True)
class Evaluator(DenseProbe):
    """A detector on one feature; the fields are explained in configs/evaluate.py."""

    path: str
    train_annotations: str
    test_annotations: str
    train_images: str
    test_images: str
    classes: tuple[str, ...]
    ignore: tuple[str, ...]
    max_boxes: int
    features: int
    depth: int
    radius: float
    threshold: float
    overlap: float
    most: int
    shown: int
    shown_score: float

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Train on the training images, then measure on the test images.

        Returns:
          "ap", "ap50", "ap75", "ap_small", "ap_medium" and "ap_large" in percent, without those for
          which there are no boxes; the picture "boxes" and the table "class_ap".

        Raises:
          UserError: see `coco.open_split` and `DenseProbe`; pycocotools is not installed, or
            training diverged.
        """
        self.check(method.patch_size)
        coco_metrics.require_pycocotools()
        splits = self._open()
        sources = {name: split.source for name, split in splits.items()}
        augment = self.fit(method, data)
        data = data.with_sources(sources, augment, as_stored=True)
        classes = len(splits["train"].classes)
        task = DenseTask(method, augment, classes, data.config.channels)
        table = splits["train"].padded(self.max_boxes)
        trained = train(self, task, params, data, table.reshape(len(table), -1))
        found, seen = self.detect(task, params, trained, data, splits["test"])
        precision = coco_metrics.measure(splits["test"], found, seen)
        results: Results = {**precision.metrics}
        results["class_ap"] = coco_metrics.class_table(splits["train"], splits["test"], precision)
        if self.shown:
            results["boxes"] = self._picture(splits["test"], found, seen, data)
        return results

    def _open(self) -> dict[str, BoxSplit]:
        """Both splits; the classes of the test images are those of the training images."""
        train_split = coco.open_split(
            self.path, self.train_annotations, self.train_images, self.classes, self.ignore
        )
        test_split = coco.open_split(
            self.path, self.test_annotations, self.test_images, train_split.classes, self.ignore
        )
        for name, split in (("train", train_split), ("test", test_split)):
            log.info("%s: %d images, %d boxes", name, len(split.ids), int((~split.crowd).sum()))
        return {"train": train_split, "test": test_split}

    def network(self, task: DenseTask, dtype: Any) -> nn.Module:
        """See `pyramid.Detector`."""
        return pyramid.Detector(task.classes, self.features, self.depth, dtype)

    def places(self, task: DenseTask) -> fcos.Places:
        """The places of predictions."""
        patch_size = task.method.patch_size
        return fcos.lay_out(task.grid, pyramid.strides(patch_size), patch_size)

    def view(self, task: DenseTask, keys: Array, batch: Batch) -> tuple[Array, Any]:
        """Images [B, H, W, C], and what each of L places learns: classes and distances."""
        places = self.places(task)

        def one(key: Array, image: Array, size: Array, target: Array) -> tuple[Array, Any]:
            whole = view.fitting_scale(size, task.size)
            drawn = view.draw_view(key, size, task.size, whole, self.scale, self.flip)
            pixels = view.view_pixels(drawn, image, size, task.size, task.augment)
            table = target.reshape(-1, 5)
            boxes, is_seen = view.view_boxes(drawn, table[:, :4], task.size)
            labels = jnp.where(is_seen, table[:, 4], -1).astype(jnp.int32)
            return pixels, fcos.assign(places, boxes, labels, self.radius)

        return jax.vmap(one)(keys, batch["image"], batch["size"], batch["target"])

    def loss(self, task: DenseTask, outputs: Any, targets: Any) -> Float[Array, ""]:
        """See `fcos.loss`."""
        labels, distances = targets
        return fcos.loss(outputs, labels, distances, self.places(task).strides)

    def detect(
        self,
        task: DenseTask,
        params: Params,
        trained: Params,
        data: EvaluationData,
        split: BoxSplit,
    ) -> tuple[Detections, np.ndarray]:
        """Detections in the test images, and the places of those that could be read.

        Args:
          task: as it was learned.
          params: of the pretraining method.
          trained: see `dense_training.train`.
          data: the images.
          split: the test images.

        Raises:
          UserError: scores are not finite.
        """
        program = _jit_candidates(self, task, data.mesh)
        seen: list[int] = []
        parts: list[list[np.ndarray]] = [[], [], [], []]
        for batch in data.batches("test", self.batch_size):
            found = jax.device_get(program(params, trained, batch))
            for row in np.flatnonzero(found["index"] >= 0):
                index = int(found["index"][row])
                seen.append(index)
                if not np.isfinite(found["scores"][row]).all():
                    raise UserError(
                        f"{self.name}: its scores are not finite, so that nothing can be measured; "
                        "lower its base_lr"
                    )
                chosen = np.flatnonzero(found["probability"][row] > self.threshold)
                height, width = split.sizes[index].tolist()
                boxes = found["boxes"][row, chosen] * np.array([width, height, width, height])
                scores = found["scores"][row, chosen]
                labels = found["labels"][row, chosen]
                kept = fcos.suppress(boxes, scores, labels, self.overlap, self.most)
                parts[0].append(np.full(len(kept), index))
                parts[1].append(boxes[kept])
                parts[2].append(scores[kept])
                parts[3].append(labels[kept])
        image, boxes, scores, labels = (np.concatenate(part) for part in parts)
        return Detections(image, boxes, scores, labels), np.array(seen)

    def _picture(
        self, split: BoxSplit, found: Detections, seen: np.ndarray, data: EvaluationData
    ) -> np.ndarray:
        """A few test images, with true boxes and detections."""
        full = np.intersect1d(split.image[~split.crowd], seen)
        chosen = full[np.linspace(0, len(full) - 1, self.shown).astype(int)]
        options = ImageOptions.from_config(data.config)
        shown = []
        for index in np.unique(chosen).tolist():
            file = split.source.record(index)[0]
            pixels = decode.decode(file, SHOWN_PIXELS, data.config.channels, options)
            factor = len(pixels) / split.sizes[index, 0]
            true = np.flatnonzero((split.image == index) & ~split.crowd)
            is_here = (found.image == index) & (found.scores >= self.shown_score)
            rows = {
                "truth": box_plot.Boxes(factor * split.boxes[true], split.labels[true], None),
                "found": box_plot.Boxes(
                    factor * found.boxes[is_here], found.labels[is_here], found.scores[is_here]
                ),
            }
            shown.append(box_plot.Boxed(pixels, rows))
        note = f"Found: all detections with a score of at least {self.shown_score:g}."
        return box_plot.plot_boxes(shown, split.classes, note)


@functools.lru_cache(maxsize=2)
def _jit_candidates(
    probe: Evaluator, task: DenseTask, mesh: Mesh
) -> Callable[[Params, Params, Batch], dict[str, Array]]:
    """Jitted (params, trained, batch) -> candidates; boxes are shares of the image, clipped."""

    def find(params: Params, trained: Params, batch: Batch) -> dict[str, Array]:
        outputs = probe.outputs(task, params, trained, batch["images"])
        boxes, scores, labels, probability = fcos.candidates(outputs, probe.places(task))

        def relative(of_image: Array, size: Array) -> Array:
            seen = view.whole_view(size, task.size).resized
            return jnp.clip(of_image / jnp.tile(seen[::-1], 2)[None], 0.0, 1.0)

        return {
            "boxes": jax.vmap(relative)(boxes, batch["size"]),
            "scores": scores,
            "labels": labels,
            "probability": probability,
            "index": batch["index"],
        }

    return jax.jit(find, out_shardings=sharding.replicated(mesh))
