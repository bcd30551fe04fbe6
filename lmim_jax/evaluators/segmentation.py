"""Segments in patch features: clusters without any training, and probes that are trained on masks.

Clusters (after the paper's figure): the patches of each image by Ward's method, one tree cut at several K. Hungarian
matching pairs clusters with the classes in the image by IoU; clusters left over count as background (class 0). The
figure is the mean IoU of the classes in an image, and of that the mean over images.
Probes: a vote of nearest patches, and logistic regression, give each test patch a class; the mean IoU of classes is
over the pixels of all test images, the accuracy over patches by the class that most of their pixels have.

Letters: I images, N patches, D width, C classes.
"""

import dataclasses

import numpy as np
from scipy.optimize import linear_sum_assignment

from lmim_jax.evaluators.common import classifiers, clustering, patch_features
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Clusters and probes on one feature; the fields are explained in configs/evaluate.py."""

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

    takes_pixels = True

    def run(self, method, params, data):
        """{"miou<K>", "knn_miou", "knn_accuracy", "linear_miou", "linear_accuracy"} in percent."""
        augment = patch_features.enlarged(data.augment, self.zoom)
        data = data.masked(self.images, self.masks, (self.train_images, self.test_images), augment)
        tokens, maps = {}, {}
        for split in ("train", "test"):
            found = patch_features.of_split(
                method, params, data, split, self.feature, self.batch_size
            )
            tokens[split], maps[split] = found[0], data.segments(split, found[1])
        classes = sorted(
            {int(number) for of_split in maps.values() for number in np.unique(of_split)}
            - {self.ignore}
        )
        if len(classes) < 2:
            raise UserError(
                f"the masks have no more than one class ({classes}): there is nothing to tell apart"
            )
        counts = {split: pixels(maps[split], classes, method.patch_size) for split in maps}
        background = classes.index(0) if 0 in classes else None
        # Without the mean over images at each position, what is left tells of the image, not of the position
        mean = tokens["test"].mean(axis=0) if self.center else 0
        cuts = [clustering.nested(of_image, self.clusters) for of_image in tokens["test"] - mean]
        result = self._probes(tokens, counts, data.mesh)
        for k in self.clusters:
            of_images = [
                matched(cut[k], true, background)
                for cut, true in zip(cuts, counts["test"], strict=True)
            ]
            result[f"miou{k}"] = 100 * np.mean(of_images)
        return {name: float(value) for name, value in result.items()}

    def _probes(self, tokens, counts, mesh):
        """The figures of the probes."""
        flat = {split: tokens[split].reshape(-1, tokens[split].shape[-1]) for split in tokens}
        pixels_of = {split: counts[split].reshape(-1, counts[split].shape[-1]) for split in counts}
        valid = np.flatnonzero(pixels_of["train"].any(axis=1))
        chosen = np.random.default_rng(0).permutation(valid)[: self.bank]
        bank, labels = flat["train"][chosen], pixels_of["train"][chosen].argmax(axis=1)
        classes = pixels_of["train"].shape[-1]
        predicted = {
            "knn": classifiers.neighbours(bank, labels, flat["test"], self.k, classes, mesh),
            "linear": classifiers.linear(
                bank, labels, flat["test"], classes, self.l2, self.iterations, mesh
            ).classes,
        }
        truth, result = pixels_of["test"], {}
        counted = truth.any(axis=1)
        for name, found in predicted.items():
            result[f"{name}_miou"] = 100 * np.mean(iou(found, truth, classes))
            result[f"{name}_accuracy"] = 100 * np.mean((found == truth.argmax(axis=1))[counted])
        return result


def pixels(maps, classes, patch_size):
    """How many pixels of each class a patch has: maps int [I, H, W] -> int32 [I, N, C]."""
    count, height, width = maps.shape
    h, w = height // patch_size, width // patch_size
    cells = maps.reshape(count, h, patch_size, w, patch_size)
    found = [
        (cells == number).sum(axis=(2, 4), dtype=np.int32).reshape(count, h * w)
        for number in classes
    ]
    return np.stack(found, axis=-1)


def iou(labels, counts, num_classes):
    """IoU of the classes that there are: labels int [N] of patches, -1 for none, counts [N, C] of their true pixels."""
    table = np.zeros((num_classes + 1, num_classes))
    np.add.at(table, labels, counts)  # row -1, the last: patches of no class
    inside, found, true = np.diag(table), table[:-1].sum(axis=1), table.sum(axis=0)
    return (inside / np.maximum(found + true - inside, 1))[true > 0]


def matched(clusters, counts, background):
    """Mean IoU of the classes in an image after Hungarian matching; unmatched clusters are background.

    Args:
      clusters: int [N] of the patches. counts: [N, C], their true pixels. background: its class, None: there is none.
    """
    _, clusters = np.unique(clusters, return_inverse=True)
    table = np.zeros((clusters.max() + 1, counts.shape[-1]))
    np.add.at(table, clusters, counts)
    here = np.flatnonzero(table.sum(axis=0))
    if not len(here):
        return 0.0
    overlap = table[:, here]
    union = overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0) - overlap
    rows, columns = linear_sum_assignment(-overlap / np.maximum(union, 1))
    class_of = np.full(len(table), -1 if background is None else background)
    class_of[rows] = here[columns]
    return float(np.mean(iou(class_of[clusters], counts, counts.shape[-1])))
