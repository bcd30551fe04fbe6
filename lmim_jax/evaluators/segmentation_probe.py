"""Semantic segmentation of datasets with official splits by frozen patch features.

A sample of the training patches is drawn from a stream of all training images, with the label of
most of their pixels. Features are standardized. Two classifiers are fitted to them:
k-NN: a vote of the nearest patches; k and the distance are chosen on held-out training images.
Linear: logistic regression, solved by L-BFGS; the strength of its penalty is chosen likewise.
The scores of the patches of a test image (shares of votes, or logits) are interpolated to the full
resolution of its mask, and IoU and accuracy count its pixels.

Source: the protocol of CAPI (Darcet et al. 2025, arXiv 2502.08769) and its official code,
facebookresearch/capi, eval_segmentation.py: images squashed to 224 x 224, StandardScaler, a tenth
of the training images to choose k, the distance, and C. docs/evaluation.md lists what differs.

Letters: I images, N patches, D width, C classes, K neighbors, q label cells along each side of a
patch, S sampled patches.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int16

from lmim_jax.data import decode
from lmim_jax.data.augment.device import Squash
from lmim_jax.data.eval import segmentation_masks, segmentation_sets
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.data.eval.segmentation_sets import Labels
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import (
    classifiers,
    lbfgs_logistic,
    patch_features,
    pixel_labels,
)
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.evaluators.common.patch_sample import Patches, PatchSample
from lmim_jax.evaluators.common.pixel_labels import Axis, Confusion
from lmim_jax.utils import plotting
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

FITS = ("squash", "crop")
METRICS = ("cosine", "l2")
TIE = 0.5  # votes that the nearest patch has more than the others
TITLE = "Segmentation by frozen patch features"  # of the picture
SHOWN_PIXELS = 512  # long side of the pictures

# Features of the patches of a batch, standardized -> scores of each image
Classifier = Callable[[Float[np.ndarray, "I N D"]], Iterable[Float[Array, "h w C"]]]


class Masked(NamedTuple):
    """An image with its mask and its features.

    Attributes:
      place: in the source.
      tokens: features of its patches.
      mask: class of each pixel that the model sees, -1: ignored.
      rows: axis of the mask.
      columns: the other axis.
    """

    place: int
    tokens: Float[np.ndarray, "N D"]
    mask: Int16[np.ndarray, "H W"]
    rows: Axis
    columns: Axis


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Both classifiers on one feature; the fields are explained in configs/evaluate.py."""

    layout: str
    path: str
    train_split: str
    test_split: str
    train_images: int
    test_images: int
    classes: tuple[int, ...]
    names: tuple[str, ...]
    ignore: tuple[int, ...]
    feature: str
    zoom: int
    fit: str
    upsampling: str
    bank: int
    k: tuple[int, ...]
    metric: tuple[str, ...]
    cells: int
    c: tuple[float, ...]
    iterations: int
    held_out: float
    seed: int
    shown: int
    batch_size: int

    supports_pixel_baselines = True
    takes = "patches"
    cost = 8.0

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Metrics in percent, the picture "segments" and the table "classes".

        The metrics are "knn_miou", "knn_pixels", "linear_miou", "linear_pixels" and
        "majority_pixels"; accuracies are over pixels.
        """
        self._check_options()
        data = self._open(data)
        labels = self._labels(data)
        encode = _Encoder(self, method, params, data, labels)
        sample = PatchSample(self.bank, self.seed)
        for image in encode.images("train"):
            number = len(labels.classes)
            grid = encode.grid
            patches = pixel_labels.patch_labels(image.mask, image.rows, image.columns, grid, number)
            cells = patches.astype(np.int16)[:, None]
            if self.cells > 1:
                cells = pixel_labels.cell_labels(
                    image.mask, image.rows, image.columns, grid, self.cells
                )
            sample.add(image.place, image.tokens, patches, cells)
        bank = sample.finish()
        self._check_bank(bank)
        mean, deviation = lbfgs_logistic.mean_and_deviation(bank.features)
        lbfgs_logistic.standardize(bank.features, mean, deviation)
        fitted = {
            "knn": self._fit_neighbors(bank, len(labels.classes), encode),
            "linear": self._fit_regression(bank, len(labels.classes), encode),
        }
        return self._measure(fitted, labels, encode, mean, deviation)

    def _check_options(self) -> None:
        """Raise a UserError for options without a meaning."""
        for key, value, choices in (
            ("fit", (self.fit,), FITS),
            ("metric", self.metric, METRICS),
            ("upsampling", (self.upsampling,), pixel_labels.UPSAMPLING),
        ):
            unknown = sorted(set(value) - set(choices))
            if unknown or not value:
                raise UserError(f"{key}={unknown or value} must be among: {' | '.join(choices)}")
        for key, least in (("zoom", 1), ("cells", 1), ("bank", 2)):
            value = getattr(self, key)
            if value < least:
                raise UserError(f"{key}={value} must be at least {least}")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out={self.held_out} must be a share in 0 .. 1, such as 0.1")
        if not self.k or min(self.k) < 1 or not self.c or min(self.c) <= 0:
            raise UserError(f"k={self.k} and c={self.c} must have numbers above 0")

    def _open(self, data: EvaluationData) -> EvaluationData:
        """The images with masks, at the size at which they are encoded."""
        augment = patch_features.enlarge(data.augment, self.zoom)
        if self.fit == "squash":
            augment = Squash(**vars(augment))
        if not self.layout:
            most = max(len(source) for source in data.sources.values() if source)
            return segmentation_masks.open_images_with_masks(
                data,
                images="",
                masks="",
                max_train=self.train_images or most,
                max_test=self.test_images or most,
                augment=augment,
            )
        splits = {}
        for name, split, most in (
            ("train", self.train_split, self.train_images),
            ("test", self.test_split, self.test_images),
        ):
            splits[name] = segmentation_sets.open_split(self.layout, self.path, split, most)
        for name, source in splits.items():
            log.info("%s: %d images with masks, such as %s", name, len(source), source.name(0))
        return data.with_sources(splits, augment, as_stored=True)

    def _labels(self, data: EvaluationData) -> Labels:
        """What the numbers in the masks mean."""
        classes = self.classes
        names = self.names
        if not classes:
            found: set[int] = set()
            for source in data.sources.values():
                found |= segmentation_sets.find_classes(
                    source, self.ignore, self.layout, data.config.timeout
                )
            classes = tuple(sorted(found))
        if not names and self.layout == "ade20k":
            names = segmentation_sets.read_ade20k_names(self.path)
        return Labels.from_options(classes, self.ignore, names, self.layout)

    def _check_bank(self, bank: Patches) -> None:
        """Raise a UserError unless there is something to learn, and something to choose it by."""
        if len(np.unique(bank.images)) < 2 or len(np.unique(bank.labels)) < 2:
            raise UserError(
                f"the training patches come from {len(np.unique(bank.images))} image(s) and have "
                f"{len(np.unique(bank.labels))} class(es); at least two of each are needed"
            )

    def _is_held(self, bank: Patches) -> Bool[np.ndarray, " S"]:
        """Which patches belong to the held-out images."""
        images = np.random.default_rng(self.seed).permutation(np.unique(bank.images))
        count = min(max(1, round(self.held_out * len(images))), len(images) - 1)
        return np.isin(bank.images, images[:count])

    def _fit_neighbors(self, bank: Patches, classes: int, encode: "_Encoder") -> Classifier:
        """The classifier by neighbors, with the best k and distance."""
        mesh = encode.data.mesh
        held = self._is_held(bank)
        rest = bank.select(~held)
        ks = sorted({min(k, len(rest.labels)) for k in self.k})
        queries = bank.features[held]
        truth = bank.labels[held]
        scores: dict[tuple[str, int], float] = {}
        for metric in self.metric:
            if len(ks) * len(self.metric) == 1:
                scores[metric, ks[0]] = 0.0  # nothing to choose
                break
            placed = classifiers.PlacedBank(rest.features, metric, mesh)
            nearest = rest.labels[placed.nearest(queries, ks[-1])]
            for k in ks:
                weights = np.ones((len(nearest), k))
                weights[:, 0] += TIE
                found = classifiers.weighted_vote(nearest[:, :k], weights, classes)
                scores[metric, k] = _mean_iou(truth, found, classes)
                log.info("k-NN, %s, k = %d: held-out mIoU %.2f", metric, k, 100 * scores[metric, k])
        metric, k = max(scores, key=scores.__getitem__)
        log.info("k-NN: chosen %s, k = %d, for a bank of %d patches", metric, k, len(bank.labels))
        placed = classifiers.PlacedBank(bank.features, metric, mesh)
        vote = _jit_votes(encode.grid, self.cells, classes)

        def classify(tokens: Float[np.ndarray, "I N D"]) -> Iterator[Float[Array, "h w C"]]:
            images, patches, width = tokens.shape
            nearest = placed.nearest(tokens.reshape(-1, width), k)
            for indices in nearest.reshape(images, patches, k):
                yield vote(bank.cells[indices])

        return classify

    def _fit_regression(self, bank: Patches, classes: int, encode: "_Encoder") -> Classifier:
        """The linear classifier, with the best strength of the penalty; overwrites the features."""
        held = self._is_held(bank)
        rows = np.flatnonzero(held)
        problem = lbfgs_logistic.prepare(bank.features, bank.labels, classes, encode.data.mesh)
        strengths = sorted(self.c)
        best = 0
        if len(strengths) > 1:
            l2 = [1 / (c * (~held).sum()) for c in strengths]
            candidates = problem.solve(l2, self.iterations, ~held)
            scores = []
            for c, found in zip(
                strengths, candidates.classify(problem.coordinates, rows), strict=True
            ):
                scores.append(_mean_iou(bank.labels[held], found, classes))
                log.info("linear, c = %.3g: held-out mIoU %.2f", c, 100 * scores[-1])
            best = int(np.argmax(scores))
            if best in (0, len(strengths) - 1):
                log.info("the best c is the last of the candidates: also try others beyond it")
        final = problem.solve([1 / (strengths[best] * len(bank.labels))], self.iterations)
        log.info(
            "linear: chosen c = %.3g; largest entry of the gradient %.1e",
            strengths[best],
            final.gradient[0],
        )
        weights = final.weights[0]
        biases = final.biases[0]

        def classify(tokens: Float[np.ndarray, "I N D"]) -> Iterator[Float[Array, "h w C"]]:
            for image in tokens:
                yield jnp.asarray((image @ weights + biases).reshape(*encode.grid, classes))

        return classify

    def _measure(
        self,
        fitted: dict[str, Classifier],
        labels: Labels,
        encode: "_Encoder",
        mean: Float[np.ndarray, " D"],
        deviation: Float[np.ndarray, " D"],
    ) -> Results:
        """Classify the pixels of the test images."""
        counts = {name: Confusion(len(labels.classes)) for name in fitted}
        places = np.linspace(0, len(encode.data.sources["test"]) - 1, max(1, self.shown))
        chosen = set(places.astype(int).tolist()[: self.shown])
        shown = []
        for batch in encode.batches("test"):
            tokens = np.stack([(image.tokens - mean) / deviation for image in batch])
            scored = zip(*(classify(tokens) for classify in fitted.values()), strict=True)
            for image, scores in zip(batch, scored, strict=True):
                predicted = {}
                for name, score in zip(fitted, scores, strict=True):
                    predicted[name] = pixel_labels.pixel_classes(
                        score, image.rows, image.columns, encode.grid, self.upsampling
                    )
                    counts[name].add(image.mask, predicted[name])
                if image.place in chosen:
                    shown.append(self._shown(image, predicted, encode.data))
        if not any(count.table.any() for count in counts.values()):
            raise UserError("no pixel of the test masks has a class; check `classes` and `ignore`")
        results: Results = {}
        for name, count in counts.items():
            results[f"{name}_miou"] = 100 * count.mean_iou()
            results[f"{name}_pixels"] = 100 * count.accuracy()
        results["majority_pixels"] = 100 * counts["linear"].majority()
        results["classes"] = pixel_labels.class_table(labels.names, counts)
        if shown:
            results["segments"] = plotting.plot_segmentation(shown, labels.names, TITLE)
        return results

    def _shown(
        self, image: Masked, predicted: dict[str, Int16[np.ndarray, "H W"]], data: EvaluationData
    ) -> plotting.Segmented:
        """An image for the picture: what the model sees of it, and its classes."""
        step = -(-max(image.mask.shape) // SHOWN_PIXELS)
        rows = {"truth": image.mask[::step, ::step]}
        for name, found in predicted.items():
            rows[name] = found[::step, ::step]
        file = data.sources["test"].record(image.place)[0]
        options = ImageOptions.from_config(data.config)
        pixels = decode.decode(file, 0, data.config.channels, options)
        seen = pixels[image.rows.first : image.rows.stop, image.columns.first : image.columns.stop]
        return plotting.Segmented(seen[::step, ::step], rows)


class _Encoder:
    """Images with masks and features, batch by batch.

    Attributes:
      data: the images.
      grid: rows and columns of patches.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        method: EvaluatedMethod,
        params: Params,
        data: EvaluationData,
        labels: Labels,
    ) -> None:
        self.data = data
        self._patch = method.patch_size
        height, width = data.augment.eval_size
        self.grid = (height // self._patch, width // self._patch)
        self._params = params
        self._batch_size = evaluator.batch_size
        self._labels = labels
        self._encode = patch_features.jit_patch_vectors(
            method, data.augment, data.mesh, evaluator.feature
        )
        self._gather = jax.jit(_identity, out_shardings=sharding.replicated(data.mesh))

    def batches(self, split: str) -> Iterator[list[Masked]]:
        """The readable images of each batch."""
        for batch in self.data.batches(split, self._batch_size):
            tokens = np.asarray(jax.device_get(self._encode(self._params, batch["images"])))
            indices = np.asarray(jax.device_get(self._gather(batch["index"])))
            readable = np.flatnonzero(indices >= 0)
            check_finite(tokens[readable], self._params, batch["images"])
            found = []
            for row in readable:
                found.append(self._masked(int(indices[row]), split, tokens[row]))
            if found:
                yield found

    def images(self, split: str) -> Iterator[Masked]:
        """The readable images one by one."""
        for batch in self.batches(split):
            yield from batch

    def _masked(self, index: int, split: str, tokens: Float[np.ndarray, "N D"]) -> Masked:
        mask = self._labels.read(self.data.sources[split], index, self.data.config.timeout)
        height, width = mask.shape
        rows, columns = pixel_labels.axes((height, width), self.data.augment, self._patch)
        return Masked(index, tokens, pixel_labels.crop(mask, rows, columns), rows, columns)


@functools.lru_cache(maxsize=2)
def _jit_votes(
    grid: tuple[int, int], cells: int, classes: int
) -> Callable[[Int16[np.ndarray, "N K c"]], Float[Array, "h w C"]]:
    """Jitted cells of the neighbors of each patch, the nearest first -> votes.

    Votes are counted for each part of a patch; -1 is a vote for no class.
    """

    def vote(labels: Array) -> Array:
        def add(votes: Array, neighbor: tuple[Array, Array]) -> tuple[Array, None]:
            label, weight = neighbor
            return votes + weight * jax.nn.one_hot(label, classes), None

        neighbors = labels.transpose(1, 0, 2)
        weights = jnp.ones(len(neighbors)).at[0].add(TIE)
        votes, _ = jax.lax.scan(
            add, jnp.zeros((*neighbors.shape[1:], classes)), (neighbors, weights)
        )
        votes = votes.reshape(*grid, cells, cells, classes).transpose(0, 2, 1, 3, 4)
        return votes.reshape(grid[0] * cells, grid[1] * cells, classes)

    return jax.jit(vote)


def _mean_iou(
    truth: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> float:
    counts = Confusion(classes)
    counts.add(truth, predicted)
    return counts.mean_iou()


def _identity(x: Array) -> Array:
    return x
