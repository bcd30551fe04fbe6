"""A picture of nearest neighbors: some held-out images, and the training images most like them.

Similarity is the cosine of image features. No labels are needed.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from lmim_jax.data.eval.eval_data import EvaluationData, Subset, random_indices
from lmim_jax.evaluators import base
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results
from lmim_jax.evaluators.common import classifiers, image_features
from lmim_jax.models.modalities import split_channels
from lmim_jax.utils import plotting


@dataclasses.dataclass(frozen=True)
class Evaluator(base.Evaluator):
    """Neighbors by one feature; the fields are explained in configs/vit_b.py."""

    feature: str
    images: int
    count: int
    bank: int
    batch_size: int

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """{"neighbors": picture}; {} where there is no other image to compare with."""
        asked = random_indices(data.sources[data.held_out], self.images)
        searched = random_indices(data.sources["train"], self.bank)
        queries = self._encode(method, params, _only(data, data.held_out, asked))
        bank = self._encode(method, params, _only(data, "train", searched))
        cosines = queries.vectors @ bank.vectors.T
        if data.held_out == "train":  # an image is not its own neighbor
            asked_ids = np.asarray(asked)[queries.rows]
            searched_ids = np.asarray(searched)[bank.rows]
            cosines[asked_ids[:, None] == searched_ids] = -np.inf
        count = min(self.count, int(np.isfinite(cosines).sum(axis=1).min(initial=self.count)))
        if not count or not len(cosines):
            return {}
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        shown = bank.rows[nearest]
        places = np.asarray(searched)[shown].T
        pictures = [_look(data, data.held_out, np.asarray(asked)[queries.rows])]
        for rank in range(count):
            pictures.append(_look(data, "train", places[rank]))
        shown_images = [[_beside(method, image) for image in row] for row in pictures]
        similarity = np.take_along_axis(cosines, nearest, axis=1).T
        return {"neighbors": plotting.plot_neighbors(shown_images, similarity)}

    def _encode(
        self, method: EvaluatedMethod, params: Params, data: EvaluationData
    ) -> "_EncodedRows":
        """Features of the readable images of the training split."""
        encode = image_features.jit_image_vectors(method, data.augment, data.mesh, self.feature)
        vectors = []
        rows = []
        size = min(self.batch_size, len(data.sources["train"]))
        for batch in data.batches("train", size):
            found = jax.device_get(encode(params, batch))
            readable = found["index"] >= 0
            vectors.append(found["features"][readable])
            rows.append(found["index"][readable])
        return _EncodedRows(
            classifiers.l2_normalize_rows(np.concatenate(vectors)), np.concatenate(rows)
        )


@dataclasses.dataclass(frozen=True)
class _EncodedRows:
    """Features of length 1, and the rows of the images that they belong to."""

    vectors: Float[np.ndarray, "N D"]
    rows: Int[np.ndarray, " N"]


def _only(data: EvaluationData, split: str, indices: tuple[int, ...]) -> EvaluationData:
    """Some images of a split, as a training split that is read in the same way."""
    chosen = Subset(data.sources[split], indices)
    return EvaluationData(
        {"train": chosen, "test": None}, data.config, data.augment, data.mesh, check=data.check
    )


def _beside(
    method: EvaluatedMethod, image: UInt8[np.ndarray, "H W C"]
) -> UInt8[np.ndarray, "H _ 3"]:
    """The modalities of an image side by side."""
    parts = split_channels(image, method.inputs)
    return np.concatenate([plotting.as_rgb(part) for part in parts], axis=1)


def _look(
    data: EvaluationData, split: str, indices: Int[np.ndarray, " K"]
) -> list[UInt8[np.ndarray, "H W C"]]:
    """Images of a split as the encoder sees them."""
    different = tuple(int(index) for index in np.unique(indices))
    batch, order = _only(data, split, different).sample("train", len(different))
    levels = np.asarray(data.augment.denormalize(batch["images"]))
    images = {}
    for row, place in enumerate(order):
        images[different[place]] = np.clip(levels[row], 0, 255).astype(np.uint8)
    return [images[int(index)] for index in indices]
