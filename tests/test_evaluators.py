"""Every evaluator on tiny features; k-NN against a plain computation."""

import functools

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from lmim_jax import sharding
from lmim_jax.data import augment, sources
from lmim_jax.data.evaluation import Evaluation
from lmim_jax.errors import UserError
from lmim_jax.evaluators import base, knn, pictures
from lmim_jax.methods import base as methods

RNG = np.random.default_rng(0)


class Data:
    """An in-memory `evaluation.Evaluation`: features are the images' channels, batches are padded."""

    classes = ("a", "b", "c")
    augment = None
    mesh = sharding.make_mesh()

    def __init__(self, train, test, padding=0):
        self.sources = {"train": train, "test": test}
        self.padding = padding

    def batches(self, split, batch_size):
        x, y = self.sources[split]
        count = -(-len(x) // batch_size) * batch_size + self.padding * batch_size
        index = np.where(np.arange(count) < len(x), np.arange(count), -1)
        for i in range(0, count, batch_size):
            rows = index[i : i + batch_size]
            yield {"images": np.where(rows[:, None] < 0, 9e9, x[rows]), "label": y[rows], "index": rows}


class Method:
    """A method whose features are its images."""

    @staticmethod
    def features(params, images):
        return {"patches_prenorm": images[:, None] * params["scale"]}


PARAMS = {"scale": np.ones((1, 1, 1), np.float32)}


@functools.cache
def blobs(spread):
    centers = RNG.normal(size=(3, 8))
    labels = [RNG.integers(0, 3, n).astype(np.int32) for n in (60, 31)]
    return [((centers[y] + spread * RNG.normal(size=(len(y), 8))).astype(np.float32), y) for y in labels]


def tiny_evaluators(name="knn", **change):
    config = ConfigDict({"it": {**tiny.get_config().evaluators[name].to_dict(), **change}})
    return base.from_config(config, steps_per_epoch=6, has_target=False)


@pytest.fixture(scope="module")
def run(images):
    """A method, its fresh parameters and the data of the tiny recipe."""
    config = tiny.get_config()
    config.data.path = str(images)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    augmentation = augment.from_config(config.augment, image_size=method.image_size, eval_size=method.feature_size)
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    data = Evaluation(source, config.data, augmentation, sharding.make_mesh())
    return method, jax.jit(method.init)(jax.random.key(0)), data


@pytest.mark.parametrize("name", base.names())
def test_contract(name, run):
    found = tiny_evaluators(name)[0].evaluator.run(*run)
    assert found
    for value in found.values():
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.ndim, value.shape[2]) == (np.uint8, 3, 3)
            assert len(np.unique(value)) > 2, "a blank picture"
        else:
            assert np.isfinite(value)


def test_padding_changes_no_figure():
    evaluator = tiny_evaluators()[0].evaluator
    train, test = blobs(0.8)
    assert evaluator.run(Method, PARAMS, Data(train, test)) == evaluator.run(Method, PARAMS, Data(train, test, 2))


def test_baselines_need_no_encoder_and_are_computed_once(run):
    evaluator = tiny_evaluators(baselines=True)[0].evaluator
    found = evaluator.run(*run)
    assert {"pixels_knn5", "histogram_knn5", "pixels_nn1", "histogram_nn1"} <= found.keys()
    assert found["histogram_knn5"] == 100  # the two classes of these images differ in colour
    method, _, data = run
    data.batches = None
    try:
        assert knn._baseline(evaluator, method, data, "pixels")["knn5"] == found["pixels_knn5"]
    finally:
        del data.batches


def test_a_histogram_is_the_share_of_pixels_in_each_color():
    levels = np.zeros((1, 2, 2, 3), np.float32)
    levels[0, 0] = 255
    histogram = np.asarray(base.fixed_features(levels, levels, "histogram"))
    assert histogram.shape == (1, 216)
    assert histogram[0, 0] == histogram[0, 215] == np.float32(0.5**0.5)
    assert np.count_nonzero(histogram) == 2


def test_pictures_show_each_cluster_and_each_window(run):
    method, *_ = run
    tokens = np.repeat(np.eye(4)[[0, 1, 1, 2, 2, 2, 3, 3, 3, 3]], 1, axis=0)
    assert pictures.cluster(tokens, 4).tolist() == [3, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert pictures.pca_rgb(RNG.normal(size=(2, 9, 5))).shape == (2, 9, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    views = jax.device_get(method.sample(keys[0], keys))
    windows = pictures.windows_of(method, views, 1)
    assert [i for i, window in enumerate(windows) if window[3]] == sorted(views["visible"][1])
    assert windows[6][:3] == (5 + views["offsets"][1, 1, 2, 0], 10 + views["offsets"][1, 1, 2, 1], 4)


def test_knn_equals_a_plain_computation():
    (x, y), (q, t) = blobs(0.9)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    cosine = unit(q) @ unit(x).T
    votes = np.zeros((len(q), 3))
    for i, row in enumerate(cosine):
        for j in np.argsort(-row)[:7]:
            votes[i, y[j]] += np.exp(row[j] / 0.07)
    others = unit(q) @ unit(q).T - 9 * np.eye(len(q))
    expected = {
        "nn1": 100 * np.mean(y[cosine.argmax(1)] == t),
        "knn7": 100 * np.mean(votes.argmax(1) == t),
        "loo1": 100 * np.mean(t[others.argmax(1)] == t),
    }
    assert knn.accuracies((x, y), (q, t), 7, 0.07, 3) == pytest.approx(expected)


def test_perfect_features_score_100_and_shuffled_ones_chance():
    train, test = blobs(0.01)
    assert set(knn.accuracies(train, test, 5, 0.07, 3).values()) == {100.0}
    shuffled = RNG.normal(size=(3000, 8)).astype(np.float32), RNG.integers(0, 3, 3000)
    for value in knn.accuracies(shuffled, shuffled[:1] + (RNG.integers(0, 3, 3000),), 5, 0.07, 3).values():
        assert value == pytest.approx(33.3, abs=4)


def test_leave_one_out_never_takes_the_image_itself():
    same = np.ones((4, 3), np.float32)
    assert knn.accuracies((same, np.zeros(4, int)), (same, np.arange(4)), 2, 0.07, 4)["loo1"] == 0


def test_unlabelled_data_has_no_knn():
    data = Data(*blobs(0.5))
    data.classes = ()
    assert tiny_evaluators()[0].evaluator.run(Method, PARAMS, data) == {}


def test_schedule():
    every, at_end = tiny_evaluators(every=0.5)[0], tiny_evaluators(every=0)[0]
    assert [step for step in range(11) if every.due(step, 10)] == [0, 3, 6, 9, 10]
    assert [step for step in range(11) if at_end.due(step, 10)] == [10]
    assert not any(every.due(step, 2) for step in range(3))  # a run shorter than the interval


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "kn"}, "did you mean knn"),
        ({"kk": 3}, "unknown or missing keys kk"),
        ({"params": "target"}, "no target"),
    ],
)
def test_a_bad_section_is_named(change, message):
    with pytest.raises(UserError, match=rf"config.evaluators.it.*{message}"):
        tiny_evaluators(**change)
