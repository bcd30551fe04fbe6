"""Number and distance of objects: the evaluator, embedded images, CLEVR as TFDS prepares it."""

import io

import annotated
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lmim_jax.data import tfds_source
from lmim_jax.data.eval import clevr as clevr_data
from lmim_jax.data.synthetic import shapes
from lmim_jax.evaluators import base
from lmim_jax.evaluators.common.image_features import Labeled
from lmim_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
DISTANCES = (7.0, 8.0, 8.2, 8.7, 9.2, 9.7, 10.0, 12.0)
BINS = (0, 0, 1, 2, 3, 4, 4, 5)  # VTAB's: (0, 8], (8, 8.5], ... (10, 100]


class Clevr(tfds.core.GeneratorBasedBuilder):
    """Like tfds/clevr, with the features that are read here, and images that show the labels."""

    name = "clevr"
    VERSION = tfds.core.Version("3.1.0")

    def _info(self):
        objects = {"3d_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32)}
        objects |= {"pixel_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32)}
        features = {"image": tfds.features.Image(), "objects": tfds.features.Sequence(objects)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples(120, 0),
            "validation": self._generate_examples(40, 1),
        }

    def _generate_examples(self, length, seed):
        rng = np.random.default_rng(seed)
        for i in range(length):
            count = 3 + i % 4
            which = rng.integers(len(DISTANCES))
            coordinates = np.full((count, 3), 15.0, np.float32)
            coordinates[rng.integers(count), 2] = DISTANCES[which]
            pixels = np.zeros((20, 30, 3), np.uint8)  # wider than high: squashed, not cut
            pixels[:, 2 * count :] = 255
            pixels[BINS[which] * 3 :, 15:] = 99
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, format="PNG")
            stream.seek(0)
            objects = [{"3d_coords": row, "pixel_coords": row} for row in coordinates]
            yield i, {"image": stream, "objects": objects}


@pytest.fixture(scope="module")
def clevr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clevr")
    Clevr(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


class Knows:
    """Features are the labels, one-hot, found by the pixels: a row of counts and distances."""

    grid = (8, 8)
    patch_size = 4

    @staticmethod
    def features(params, images):
        return {"patches": images.reshape(len(images), 1, -1)}


def run(clevr, data=None, **change):
    change = {"name": "clevr", "dir": clevr, "test_split": "validation", "batch_size": 32, **change}
    change = {"l2": (1e-5, 1e-3), "iterations": 60, **change}
    evaluator = annotated.evaluator("clevr", **change)
    return evaluator.run(Knows, {}, data or annotated.evaluation())


def test_labels_of_clevr_are_those_of_vtab(clevr):
    source = clevr_data.open_split("clevr", clevr, "train")
    labels = np.array([source.record(i)[1] for i in range(len(source))])
    counts, distances = np.divmod(labels, clevr_data.DISTANCE_BINS)
    assert np.bincount(counts).tolist() == [0, 0, 0, 30, 30, 30, 30]
    assert set(distances) == set(BINS)
    nearest = [
        source.images.feature_values(i, "objects/pixel_coords")[2::3].min()
        for i in range(len(source))
    ]
    expected = [BINS[int(np.argmin(np.abs(np.array(DISTANCES) - x)))] for x in nearest]
    assert distances.tolist() == expected


@pytest.mark.slow
def test_informative_features_score_100_and_shuffled_ones_chance(clevr, monkeypatch):
    found = run(clevr)
    assert found["count"] == found["distance"] == 100
    assert found["count_chance"] == 25
    assert run(clevr, batch_size=16) == found  # other padding

    def random_features(method, params, data, split, feature, batch_size):
        source = data.sources[split]
        labels = np.array([source.record(i)[1] for i in range(len(source))])
        return Labeled(RNG.normal(size=(len(source), 4)).astype(np.float32), labels)

    monkeypatch.setattr("lmim_jax.evaluators.clevr.split_features", random_features)
    assert run(clevr)["count"] < 50


def test_the_whole_image_is_seen(clevr):
    """Also of one that is wider than high: its columns are shrunk, none are cut off."""
    data = clevr_data.open_data(
        annotated.evaluation(),
        name="clevr",
        folder=clevr,
        train_split="train",
        test_split="validation",
    )
    batch = next(data.batches("train", 8))
    label = np.asarray(batch["label"])[0]
    row = np.asarray(batch["images"])[0, 0, :, 0]
    assert row.shape == (32,)
    assert (row[:15] > 0.5).sum() == pytest.approx(
        15 - 2 * (label // clevr_data.DISTANCE_BINS) * 32 / 30, abs=1
    )


def test_the_embedded_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(shapes, "SEVERAL", {"train": 24, "test": 16})
    found = run("", name="", dir="", test_split="test")
    assert found.keys() == {"count", "distance", "count_chance", "distance_chance"}
    source = clevr_data.open_split("", "", "train")
    assert source.name(3) == "shapes/several/2.0.0/train[3]"
    assert source.identity() == {"source": "shapes/several/2.0.0/train", "images": 24}
    counts, distances = np.divmod(
        [source.record(i)[1] for i in range(24)], clevr_data.DISTANCE_BINS
    )
    assert set(counts) <= set(range(2, 6))
    assert set(distances) <= set(range(6))
    assert (
        tfds_source.open_tfds("shapes/several", str(tmp_path), "train").feature_values(0, "count")
        is not None
    )


def test_bad_input_is_named(clevr, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no prepared dataset of that name"):
        run(clevr, name="clever")
    with pytest.raises(UserError, match=r"has no split 'test'; available: .*validation"):
        run(clevr, test_split="test")
    monkeypatch.setattr(shapes, "SPLITS", {"train": 4, "test": 2})
    shapes.prepare(tmp_path)
    with pytest.raises(UserError, match="has no number of objects and no distances"):
        run(str(tmp_path), name="shapes")


def test_sections_are_whole():
    for name in ("segmentation", "video_segmentation", "clevr"):
        assert name in base.names()
        annotated.evaluator(name)
