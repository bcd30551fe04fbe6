"""Semantic segmentation from patch features: clusters without training, and trained classifiers.

Clusters (as in the figure of the Latent MIM paper): the patches of each image are clustered by
Ward's method, one tree cut at several numbers of clusters K. Hungarian matching assigns clusters to
the classes in the image by IoU; remaining clusters count as background (class 0). The metric is the
mean IoU of the classes in an image, averaged over images.
Classifiers: a vote of the nearest patches, and logistic regression, assign a class to each test
patch. The mean IoU over classes is computed over the pixels of all test images; the accuracy is
over patches, by the class of most of their pixels.

Letters: I images, N patches, D width, C classes, P patches of all images, H W image height and
width.
"""

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int32
from scipy.optimize import linear_sum_assignment

from lmim_jax.data.eval import segmentation_masks
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers, clustering, patch_features
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class PatchesWithMasks:
    """The patches of a split.

    Attributes:
      tokens: feature of each patch.
      masks: the class of each pixel.
    """

    tokens: Float[np.ndarray, "I N D"]
    masks: Int[np.ndarray, "I H W"]


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Clusters and classifiers on one feature; the fields are explained in configs/evaluate.py."""

    images: str
    masks: str
    ignore: int
    train_images: int
    test_images: int
    feature: str
    zoom: int
    center: bool
    clusters: tuple[int, ...]
    bank: int
    k: int
    l2: tuple[float, ...]
    iterations: int
    batch_size: int

    takes = "patches"
    supports_pixel_baselines = True
    cost = 6.0

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"miou<K>", "knn_miou", "knn_accuracy", "linear_miou", "linear_accuracy"} in percent."""
        data = segmentation_masks.open_images_with_masks(
            data,
            images=self.images,
            masks=self.masks,
            max_train=self.train_images,
            max_test=self.test_images,
            augment=patch_features.enlarge(data.augment, self.zoom),
        )
        train = self._encode(method, params, data, "train")
        test = self._encode(method, params, data, "test")
        classes = self._find_classes(train, test)
        train_pixels = count_pixels(train.masks, classes, method.patch_size)
        test_pixels = count_pixels(test.masks, classes, method.patch_size)
        results: Results = {}
        results.update(
            self._classify(train.tokens, train_pixels, test.tokens, test_pixels, data.mesh)
        )
        background = classes.index(0) if 0 in classes else None
        results.update(self._cluster(test.tokens, test_pixels, background))
        return results

    def _encode(
        self, method: EvaluatedMethod, params: Params, data: EvaluationData, split: str
    ) -> PatchesWithMasks:
        """Features and masks of the readable images of a split."""
        tokens, indices = patch_features.split_patch_features(
            method, params, data, split, self.feature, self.batch_size
        )
        return PatchesWithMasks(tokens, segmentation_masks.read_masks(data, split, indices))

    def _find_classes(self, train: PatchesWithMasks, test: PatchesWithMasks) -> list[int]:
        """The numbers of all classes in the masks of both splits, sorted."""
        found = set(np.unique(train.masks).tolist()) | set(np.unique(test.masks).tolist())
        classes = sorted(found - {self.ignore})
        if len(classes) < 2:
            raise UserError(
                f"the masks have fewer than two classes ({classes}): there is nothing to segment"
            )
        return classes

    def _cluster(
        self,
        tokens: Float[np.ndarray, "I N D"],
        pixels: Int[np.ndarray, "I N C"],
        background: int | None,
    ) -> dict[str, float]:
        """The metrics of the clusters of the test images."""
        if self.center:
            # What remains without the mean of each position depends on the image, not the position
            tokens = tokens - tokens.mean(axis=0)
        cuts = [clustering.nested_clusters(image, self.clusters) for image in tokens]
        metrics = {}
        for count in self.clusters:
            scores = []
            for cut, image_pixels in zip(cuts, pixels, strict=True):
                scores.append(matched_iou(cut[count], image_pixels, background))
            metrics[f"miou{count}"] = 100 * float(np.nanmean(scores))
        return metrics

    def _classify(
        self,
        train_tokens: Float[np.ndarray, "I N D"],
        train_pixels: Int[np.ndarray, "I N C"],
        test_tokens: Float[np.ndarray, "I N D"],
        test_pixels: Int[np.ndarray, "I N C"],
        mesh: Mesh,
    ) -> dict[str, float]:
        """The metrics of the classifiers."""
        num_classes = train_pixels.shape[-1]
        width = train_tokens.shape[-1]
        pixels = train_pixels.reshape(-1, num_classes)
        valid = np.flatnonzero(pixels.any(axis=1))
        chosen = np.random.default_rng(0).permutation(valid)[: self.bank]
        bank = train_tokens.reshape(-1, width)[chosen]
        labels = pixels[chosen].argmax(axis=1)
        queries = test_tokens.reshape(-1, width)
        by_neighbors = classifiers.predict_by_neighbors(
            bank, labels, queries, k=self.k, num_classes=num_classes, mesh=mesh
        )
        by_regression = classifiers.predict_by_regression(
            bank,
            labels,
            queries,
            num_classes=num_classes,
            l2=self.l2,
            iterations=self.iterations,
            mesh=mesh,
        )
        truth = test_pixels.reshape(-1, num_classes)
        metrics = {}
        for name, predicted in (("knn", by_neighbors), ("linear", by_regression.classes)):
            metrics[f"{name}_miou"] = 100 * float(np.mean(iou(predicted, truth)))
            metrics[f"{name}_accuracy"] = 100 * patch_accuracy(predicted, truth)
        return metrics


def count_pixels(
    masks: Int[np.ndarray, "I H W"], classes: list[int], patch_size: int
) -> Int32[np.ndarray, "I N C"]:
    """How many pixels of each class a patch has."""
    images, height, width = masks.shape
    rows = height // patch_size
    columns = width // patch_size
    cells = masks.reshape(images, rows, patch_size, columns, patch_size)
    counts = []
    for number in classes:
        count = (cells == number).sum(axis=(2, 4), dtype=np.int32)
        counts.append(count.reshape(images, rows * columns))
    return np.stack(counts, axis=-1)


def patch_accuracy(predicted: Int[np.ndarray, " P"], pixels: Int[np.ndarray, "P C"]) -> float:
    """Share of the patches, 0 .. 1, whose predicted class is that of most of their pixels.

    Patches without a pixel of any class do not count.
    """
    counted = pixels.any(axis=1)
    return float(np.mean((predicted == pixels.argmax(axis=1))[counted]))


def iou(
    predicted: Int[np.ndarray, " P"], pixels: Int[np.ndarray, "P C"]
) -> Float[np.ndarray, " c"]:
    """IoU of each class that has pixels.

    Args:
      predicted: class of each patch, -1 for none.
      pixels: how many pixels of each class a patch has.
    """
    num_classes = pixels.shape[-1]
    # table[i, j]: pixels of class j in patches of predicted class i; row -1, the last: no class
    table = np.zeros((num_classes + 1, num_classes))
    np.add.at(table, predicted, pixels)
    intersection = np.diag(table)
    predicted_pixels = table[:-1].sum(axis=1)
    true_pixels = table.sum(axis=0)
    union = predicted_pixels + true_pixels - intersection
    return (intersection / np.maximum(union, 1))[true_pixels > 0]


def matched_iou(
    clusters: Int[np.ndarray, " N"], pixels: Int[np.ndarray, "N C"], background: int | None
) -> float:
    """Mean IoU of the classes in an image after Hungarian matching of clusters to classes.

    NaN where no pixel has a class.

    Args:
      clusters: cluster of each patch.
      pixels: how many pixels of each class a patch has.
      background: the class of unmatched clusters; None: no class.
    """
    _, clusters = np.unique(clusters, return_inverse=True)
    table = np.zeros((clusters.max() + 1, pixels.shape[-1]))
    np.add.at(table, clusters, pixels)
    present = np.flatnonzero(table.sum(axis=0))
    if not len(present):
        return math.nan
    overlap = table[:, present]
    union = overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0) - overlap
    rows, columns = linear_sum_assignment(-overlap / np.maximum(union, 1))
    unmatched = -1 if background is None else background
    class_of_cluster = np.full(len(table), unmatched)
    class_of_cluster[rows] = present[columns]
    return float(np.mean(iou(class_of_cluster[clusters], pixels)))
