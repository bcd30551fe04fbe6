"""Every evaluator on tiny features; k-NN and logistic regression against scikit-learn; what a feature may be."""

import dataclasses
import functools

import annotated
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from sklearn import linear_model, neighbors

from lmim_jax.data import sources, tfds_source
from lmim_jax.data.augment import device
from lmim_jax.data.eval.eval_data import Evaluation, Selected
from lmim_jax.data.synthetic import shapes
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base, fewshot, knn, logistic_regression, visualization
from lmim_jax.evaluators.common import classifiers, clustering, image_features, lbfgs_logistic
from lmim_jax.methods import base as methods
from lmim_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
MESH = sharding.make_mesh()


class Data:
    """An in-memory `evaluation.Evaluation`: features are the images' channels, batches are padded."""

    classes = ("a", "b", "c")
    augment = cache = None
    mesh = MESH

    def __init__(self, train, test, padding=0):
        self.sources = {"train": train, "test": test}
        self.padding = padding

    def batches(self, split, batch_size):
        x, y = self.sources[split]
        count = -(-len(x) // batch_size) * batch_size + self.padding * batch_size
        index = np.where(np.arange(count) < len(x), np.arange(count), -1)
        for i in range(0, count, batch_size):
            rows = index[i : i + batch_size]
            yield {
                "images": np.where(rows[:, None] < 0, 9e9, x[rows]),
                "label": y[rows],
                "index": rows,
            }


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
    return [
        ((centers[y] + spread * RNG.normal(size=(len(y), 8))).astype(np.float32), y) for y in labels
    ]


def tiny_evaluators(name="knn", **change):
    config = ConfigDict({"it": {**tiny.evaluator(name), **change}})
    return base.from_config(config, steps_per_epoch=6, has_target=False)


@pytest.fixture(scope="module")
def run(images):
    """A method, its fresh parameters and the data of the tiny recipe."""
    config = tiny.get_config()
    config.data.path = str(images)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    augmentation = device.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    data = Evaluation(source, config.data, augmentation, sharding.make_mesh())
    return method, jax.jit(method.init)(jax.random.key(0)), data


@pytest.fixture(scope="module")
def small(images, tmp_path_factory):
    """What the evaluators that bring their own data need to be small, by name."""
    masks = tmp_path_factory.mktemp("masks")
    for path in sorted((images / "train").rglob("*.*")):
        with Image.open(path) as image:
            red = np.asarray(image)[..., 0] > 100
        annotated.save(masks / path.relative_to(images / "train").with_suffix(".png"), red)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_source, "cache", lambda: masks / "cache")
        patch.setattr(shapes, "SEVERAL", {"train": 16, "test": 8})
        patch.setattr(shapes, "CLIPS", {"test": 2})
        folders = dict(images=str(images / "train"), masks=str(masks))
        yield {
            "segmentation": dict(**folders, batch_size=16, iterations=5),
            "clevr": dict(iterations=5),
        }


@pytest.mark.parametrize("name", base.names())
def test_contract(name, run, small):
    found = tiny_evaluators(name, **small.get(name, {}))[0].evaluator.run(*run)
    assert found
    for value in found.values():
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.ndim, value.shape[2]) == (np.uint8, 3, 3)
            assert len(np.unique(value)) > 2, "a blank picture"
        else:
            assert np.isfinite(value)


@pytest.mark.parametrize("name", ["knn", "logistic_regression", "fewshot"])
def test_padding_changes_no_figure(name):
    train, test = blobs(0.8)
    figures = []
    for batch_size, padding in (
        (16, 0),
        (16, 2),
        (31, 0),
        (60, 1),
    ):  # 60 and 31 images: divided by them or not
        evaluator = tiny_evaluators(name, batch_size=batch_size)[0].evaluator
        figures.append(evaluator.run(Method, PARAMS, Data(train, test, padding)))
    assert figures[0]
    assert all(found == figures[0] for found in figures)


def test_padding_changes_no_feature_by_a_bit(run):
    method, params, data = run
    few = {
        **data.sources,
        "test": Selected(data.sources["test"], tuple(range(11))),
    }  # 11 of the 16, and 5 rows of padding
    padded = Evaluation(few, data.config, data.augment, data.mesh)
    for ours, whole in zip(
        *(
            base.split_features(method, params, of, "test", "cls+patches_prenorm", 16)
            for of in (padded, data)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, whole[:11])


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
    histogram = np.asarray(image_features.fixed(levels, levels, "histogram"))
    assert histogram.shape == (1, 216)
    assert histogram[0, 0] == histogram[0, 215] == np.float32(0.5**0.5)
    assert np.count_nonzero(histogram) == 2


def test_pictures_show_each_cluster_and_each_window(run):
    method, *_ = run
    tokens = np.repeat(np.eye(4)[[0, 1, 1, 2, 2, 2, 3, 3, 3, 3]], 1, axis=0)
    assert clustering.nested(tokens, (4,))[4].tolist() == [3, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert visualization.pca_rgb(RNG.normal(size=(2, 9, 5))).shape == (2, 9, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    views = jax.device_get(method.sample(keys[0], keys))
    windows = visualization.windows_of(method, views, 1)
    assert [i for i, window in enumerate(windows) if window[3]] == sorted(views["visible"][1])
    assert windows[6][:3] == (
        5 + views["offsets"][1, 1, 2, 0],
        10 + views["offsets"][1, 1, 2, 1],
        4,
    )


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
        "knn1": 100 * np.mean(y[cosine.argmax(1)] == t),
        "knn7": 100 * np.mean(votes.argmax(1) == t),
        "loo1": 100 * np.mean(t[others.argmax(1)] == t),
    }
    assert knn.accuracies((x, y), (q, t), (7, 1), 0.07, 3, MESH) == pytest.approx(expected)


def test_knn_predicts_as_scikit_learn_does():
    (x, y), (q, _) = blobs(0.9)
    scores, index = classifiers.nearest(classifiers.unit(q), classifiers.unit(x), 20, MESH)
    votes = lambda distances: np.exp((1 - distances) / 0.07)
    for k in (1, 5, 20):
        theirs = neighbors.KNeighborsClassifier(k, weights=votes, metric="cosine").fit(x, y)
        ours = classifiers.vote(y[index[:, :k]], np.exp(scores[:, :k] / 0.07), 3)
        np.testing.assert_array_equal(ours, theirs.predict(q))


@pytest.mark.parametrize("more", [0, 200], ids=["more images than dimensions", "more dimensions"])
def test_logistic_regression_is_that_of_scikit_learn(more):
    (x, y), (q, t) = blobs(0.9)
    noise = np.random.default_rng(1)
    x, q = (np.hstack([a, noise.normal(size=(len(a), more)).astype(np.float32)]) for a in (x, q))
    mean, deviation = lbfgs_logistic.statistics(x)
    x, q = (x - mean) / deviation, (q - mean) / deviation
    strengths = (1e-3, 1e-1)
    for mesh in (MESH, None):
        ours = lbfgs_logistic.fit(x, y, 3, strengths, 300, mesh)
        assert ours.gradient.max() < 1e-4  # in units in which the curvature is 1
        for i, l2 in enumerate(strengths):
            theirs = linear_model.LogisticRegression(
                C=1 / (l2 * len(x)), tol=1e-8, max_iter=1000
            ).fit(x, y)
            np.testing.assert_allclose(
                ours.weights[i], theirs.coef_.T, atol=2e-3 * np.abs(theirs.coef_).max()
            )
            # where classes can be separated, the loss hardly depends on biases: float32 knows them less exactly
            np.testing.assert_allclose(
                ours.biases[i], theirs.intercept_, atol=1e-2 if more else 2e-3
            )
            assert np.mean(ours.predict(q)[i] == t) == theirs.score(q, t)


def test_perfect_features_score_100_and_shuffled_ones_chance():
    train, test = blobs(0.01)
    solved, few = (
        tiny_evaluators(name)[0].evaluator for name in ("logistic_regression", "fewshot")
    )
    figures = lambda train, test: {
        **knn.accuracies(train, test, (5, 10), 0.07, 3, MESH),
        **{
            f"linear {name}": value
            for name, value in solved.accuracies(train, test, 3, MESH).items()
            if name != "l2"
        },
        **{
            f"few {name}": value
            for name, value in few.accuracies(train, test, 3).items()
            if "_std" not in name
        },
    }
    assert set(figures(train, test).values()) == {100.0}
    shuffled = RNG.normal(size=(3000, 8)).astype(np.float32), RNG.integers(0, 3, 3000)
    for name, value in figures(shuffled, shuffled[:1] + (RNG.integers(0, 3, 3000),)).items():
        assert value == pytest.approx(33.3, abs=4 if name != "linear held_out" else 8), (
            name
        )  # of 300 images


def test_the_strength_is_chosen_on_training_images_alone():
    evaluator = dataclasses.replace(
        tiny_evaluators("logistic_regression")[0].evaluator, l2=(1e-3, 1e-1, 10.0)
    )
    train, (x, y) = blobs(0.9)
    ours, other = (evaluator.accuracies(train, (x, labels), 3, MESH) for labels in (y, (y + 1) % 3))
    assert {ours[name] == other[name] for name in ("l2", "held_out")} == {True}
    assert ours["accuracy"] > 50 > other["accuracy"]


def test_few_shots_are_so_many_of_each_class():
    rows = []
    train, test = blobs(0.9)
    evaluator, fit = tiny_evaluators("fewshot")[0].evaluator, lbfgs_logistic.fit
    try:
        lbfgs_logistic.fit = lambda x, y, *more: (
            rows.append(np.bincount(y, minlength=3).tolist()) or fit(x, y, *more)
        )
        found = evaluator.accuracies(train, test, 3)
    finally:
        lbfgs_logistic.fit = fit
    halves = [max(1, round(n / 2)) for n in np.bincount(train[1])]
    assert rows == 2 * [[1, 1, 1]] + 2 * [[4, 4, 4]] + 2 * [halves]
    assert found.keys() == {
        f"{name}{end}" for name in ("shots1", "shots4", "labels50pct") for end in ("", "_std")
    }
    assert found["shots1_std"] > 0
    assert dataclasses.replace(evaluator, shots=(1, 500), percent=()).accuracies(
        train, test, 3
    ).keys() == {
        "shots1",
        "shots1_std",
    }


def test_leave_one_out_never_takes_the_image_itself():
    same = np.ones((4, 3), np.float32)
    assert (
        knn.accuracies((same, np.zeros(4, int)), (same, np.arange(4)), (2,), 0.07, 4, MESH)["loo1"]
        == 0
    )


def test_a_feature_is_what_its_name_says(run):
    method, params, data = run
    assert image_features.parse("cls + block00/tokens:both") == [
        ("cls", "mean"),
        ("block00/tokens", "both"),
    ]
    (images,) = [batch["images"] for batch in data.batches("test", 16)]
    known = jax.device_get(method.features(params, images))
    tokens = known["block00/tokens"]
    expected = {
        "patches": known["patches"].mean(1),
        "cls_prenorm": known["cls_prenorm"],
        "block00/tokens": tokens[:, 1:].mean(1),
        "block00/tokens:cls": tokens[:, 0],
        "block00/tokens:both": np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], 1),
        "pixels": np.asarray(images).reshape(16, -1),
    }
    x, labels = base.split_features(method, params, data, "test", "+".join(expected), 16)
    np.testing.assert_allclose(x, np.concatenate(list(expected.values()), 1), atol=1e-5)
    assert labels.tolist() == 8 * [0] + 8 * [1]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("patchs", "'patchs': the method has none of that name; did you mean patches"),
        ("block09/tokens", "did you mean block0"),
        ("zzz", "there are: cls, cls_prenorm, latents, patches"),
        ("cls:max", "'max' is none of: mean | cls | both"),
        ("patches:cls", "no CLS token for :cls; join features instead: cls\\+patches"),
        ("block00/attention", "no vectors"),
    ],
)
def test_a_wrong_feature_is_named(feature, message, run):
    with pytest.raises(UserError, match=message):
        base.split_features(*run, "test", feature, 16)


@pytest.mark.parametrize("evaluator", [knn, logistic_regression, fewshot])
def test_unlabelled_data_have_no_accuracy(evaluator):
    data = Data(*blobs(0.5))
    data.classes = ()
    name = evaluator.__name__.rpartition(".")[2]
    assert evaluator.Evaluator.labelled
    assert tiny_evaluators(name)[0].evaluator.run(Method, PARAMS, data) == {}


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
