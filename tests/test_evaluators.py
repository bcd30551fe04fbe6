"""Every evaluator on tiny features; k-NN and logistic regression against scikit-learn; names."""

import dataclasses
import functools
import json
import pathlib
import types

import annotated
import jax
import numpy as np
import pytest
import test_detection
import tiny
from ml_collections import ConfigDict
from PIL import Image
from sklearn import linear_model, neighbors

from lmim_jax.cli import evaluate as command
from lmim_jax.configs import evaluate as recipe
from lmim_jax.data import sources, tfds_source
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import EvaluationData, Subset
from lmim_jax.data.synthetic import shapes
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base, fewshot, knn, logistic_regression, visualization
from lmim_jax.evaluators.common import classifiers, clustering, image_features, lbfgs_logistic
from lmim_jax.evaluators.common.image_features import Labeled
from lmim_jax.methods import base as methods
from lmim_jax.utils import array_memory
from lmim_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
MESH = sharding.make_mesh()
STORED_CONFIG = pathlib.Path(__file__).parent / "data" / "config_0_1.json"


class Images(Labeled):
    """Features and labels as a source, as far as its length is asked for."""

    def __len__(self):
        return len(self.labels)


class Data:
    """An in-memory `EvaluationData`: features are the images' channels, batches are padded."""

    classes = ("a", "b", "c")
    targets = None
    accepted = types.MappingProxyType({})
    keep = None
    augment = None
    cache = None
    mesh = MESH

    def __init__(self, train, test, padding=0):
        self.sources = {"train": Images(*train), "test": Images(*test)}
        self.padding = padding

    def batches(self, split, batch_size):
        x, y, _ = self.sources[split]
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


def unit(x):
    """Rows scaled to length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@functools.cache
def blobs(spread):
    """Normally distributed features around a center for each of three classes, of both splits."""
    centers = RNG.normal(size=(3, 8))
    labels = [RNG.integers(0, 3, count).astype(np.int32) for count in (60, 31)]
    found = []
    for y in labels:
        x = centers[y] + spread * RNG.normal(size=(len(y), 8))
        found.append(Labeled(x.astype(np.float32), y))
    return found


def scheduled(name="knn", **change):
    """An evaluator as a run has it."""
    config = ConfigDict({"it": {**tiny.evaluator(name), **change}})
    (found,) = base.from_config(config, steps_per_epoch=6, has_target=False)
    return found


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.01, 1), (0.5, 3), (2.0, 12)])
def test_evaluations_more_frequent_than_steps_are_at_each_step(epochs, steps):
    assert scheduled(every=epochs).every == steps


def make(name="knn", **change):
    """An evaluator."""
    return scheduled(name, **change).evaluator


def knn_accuracies(train, test, ks, num_classes=3):
    return knn.accuracies(train, test, ks=ks, temperature=0.07, num_classes=num_classes, mesh=MESH)


@pytest.fixture(scope="module")
def run(images):
    """A method, its fresh parameters and the data of the tiny recipe."""
    config = tiny.get_config()
    config.data.path = str(images)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    augmentation = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    data = EvaluationData(source, config.data, augmentation, sharding.make_mesh())
    return method, jax.jit(method.init)(jax.random.key(0)), data


@pytest.fixture(scope="module")
def small(images, tmp_path_factory):
    """By evaluator, the options that make the data small that it opens itself."""
    masks = tmp_path_factory.mktemp("masks")
    for path in sorted((images / "train").rglob("*.*")):
        with Image.open(path) as image:
            red = np.asarray(image)[..., 0] > 100
        annotated.save(masks / path.relative_to(images / "train").with_suffix(".png"), red)
        halves = np.arange(red.shape[1]) * 2 // red.shape[1] + 0 * red
        for split in ("train", "test"):
            annotated.save(masks / "probe" / split / "images" / f"{path.stem}.png", halves, 255)
            annotated.save(masks / "probe" / split / "masks" / f"{path.stem}.png", halves)
    test_detection.write(masks / "boxes", train=8, test=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_source, "cache_folder", lambda: masks / "cache")
        patch.setattr(shapes, "SEVERAL", {"train": 16, "test": 8})
        patch.setattr(shapes, "CLIPS", {"test": 2})
        folders = dict(images=str(images / "train"), masks=str(masks))
        yield {
            "segmentation": dict(**folders, batch_size=16, iterations=5),
            "segmentation_probe": dict(
                layout="folder", path=str(masks / "probe"), batch_size=16, c=(1.0,), iterations=5
            ),
            "clevr": dict(iterations=5),
            "segmentation_finetune": dict(
                path=str(masks / "probe"), batch_size=8, total_steps=1, head="linear"
            ),
            "detection": dict(
                path=str(masks / "boxes"), batch_size=8, total_steps=1, features=8, depth=1
            ),
        }


def contract_cases():
    """All evaluators; the convolutions of a detector take half a minute to compile."""
    for name in base.names():
        marks = [pytest.mark.slow] if name == "detection" else []
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", contract_cases())
def test_contract(name, run, small):
    method, params, data = run
    evaluator = make(name, **small.get(name, {}))
    found = evaluator.run(method, params, data)
    assert bool(found) == ("classes" in evaluator.label_kinds)  # these images have classes
    for value in found.values():
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.ndim, value.shape[2]) == (np.uint8, 3, 3)
            assert len(np.unique(value)) > 2, "a blank picture"
        else:
            assert isinstance(value, str) or np.isfinite(value)


@pytest.mark.parametrize("name", ["knn", "logistic_regression", "fewshot"])
def test_padding_changes_no_metric(name):
    train, test = blobs(0.8)
    metrics = []
    # 60 and 31 images, which are or are not multiples of the batch size
    for batch_size, padding in ((16, 0), (16, 2), (31, 0), (60, 1)):
        evaluator = make(name, batch_size=batch_size)
        metrics.append(evaluator.run(Method, PARAMS, Data(train, test, padding)))
    assert metrics[0]
    assert all(found == metrics[0] for found in metrics)


def test_padding_changes_no_feature_by_a_bit(run):
    method, params, data = run
    # 11 of the 16 images, and 5 rows of padding
    few = {**data.sources, "test": Subset(data.sources["test"], tuple(range(11)))}
    padded = EvaluationData(few, data.config, data.augment, data.mesh)
    found = []
    for images in (padded, data):
        found.append(
            image_features.split_features(method, params, images, "test", "cls+patches_prenorm", 16)
        )
    with_padding, without = found
    np.testing.assert_array_equal(with_padding.features, without.features[:11])
    np.testing.assert_array_equal(with_padding.labels, without.labels[:11])


def test_baselines_need_no_encoder(run):
    method, params, data = run
    found = make(baselines=True).run(method, params, data)
    assert {"pixels_knn5", "histogram_knn5", "pixels_nn1", "histogram_nn1"} <= found.keys()
    assert found["histogram_knn5"] == 100  # the two classes of these images differ in color


def test_baselines_that_a_run_has_are_not_computed_again():
    scheduled = base.Scheduled("near", 1, "online", make(baselines=True))
    for known in (set(), {"loss", "near/knn5"}, {"nearer/pixels_knn5"}):
        assert scheduled.without_known_baselines(known) is scheduled
    found = scheduled.without_known_baselines({"near/knn5", "near/histogram_knn5"})
    assert found == dataclasses.replace(scheduled, evaluator=make(baselines=False))
    other = dataclasses.replace(scheduled, evaluator=make("fewshot"))
    assert other.without_known_baselines({"near/pixels_knn5"}) is other


def test_baselines_of_logistic_regression_stand_beside_its_accuracy(run):
    method, params, data = run
    evaluator = make("logistic_regression", baselines=True)
    found = evaluator.run(method, params, data)
    assert {"accuracy", "pixels_accuracy", "histogram_accuracy"} <= found.keys()
    for feature in ("pixels", "histogram"):
        replaced = dataclasses.replace(evaluator, feature=feature, baselines=False)
        alone = replaced.run(method, params, data)
        assert found[f"{feature}_accuracy"] == alone["accuracy"]
    assert found["histogram_accuracy"] == 100  # the two classes of these images differ in color


def test_of_many_bands_each_has_a_histogram_of_its_own():
    levels = np.random.default_rng(0).uniform(0, 256, (2, 4, 4, 13)).astype(np.float32)
    found = np.asarray(image_features.encoder_free_feature(levels, levels, "histogram"))
    assert found.shape == (2, 13 * 6)
    np.testing.assert_allclose((found**2).sum(-1), 1, rtol=1e-6)
    for band in range(13):
        counts, _ = np.histogram(levels[1, ..., band], bins=6, range=(0, 256))
        np.testing.assert_allclose(found[1, 6 * band :][:6] ** 2, counts / 16 / 13, atol=1e-6)


def test_a_histogram_is_the_share_of_pixels_in_each_color():
    levels = np.zeros((1, 2, 2, 3), np.float32)
    levels[0, 0] = 255
    histogram = np.asarray(image_features.encoder_free_feature(levels, levels, "histogram"))
    assert histogram.shape == (1, 216)
    assert histogram[0, 0] == histogram[0, 215] == np.float32(0.5**0.5)
    assert np.count_nonzero(histogram) == 2


def test_pictures_show_each_cluster_and_each_window(run):
    method, _, _ = run
    tokens = np.repeat(np.eye(4)[[0, 1, 1, 2, 2, 2, 3, 3, 3, 3]], 1, axis=0)
    clusters = clustering.nested_clusters(tokens, (4,))[4]
    assert clusters.tolist() == [3, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    assert visualization.pca_rgb(RNG.normal(size=(2, 9, 5))).shape == (2, 9, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    views = jax.device_get(method.sample(keys[0], keys))
    windows = visualization.training_windows(method, views, 1)
    assert [i for i, window in enumerate(windows) if window[3]] == sorted(views["visible"][1])
    top, left = views["offsets"][1, 1, 2]
    assert windows[6][:3] == (5 + top, 10 + left, 4)


def test_knn_equals_a_plain_computation():
    (x, y, _), (q, t, _) = blobs(0.9)
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
    train, test = blobs(0.9)
    assert knn_accuracies(train, test, (7, 1)) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.0114, 0.01, 1e-3])
def test_low_temperatures_of_knn_do_not_overflow(temperature):
    train, test = blobs(0.9)
    cosine = (unit(test[0]) @ unit(train[0]).T).astype(np.float64)
    votes = np.zeros((len(test[0]), 3))
    for i, row in enumerate(cosine):
        for j in np.argsort(-row)[:20]:
            votes[i, train[1][j]] += np.exp((row[j] - row.max()) / temperature)
    found = knn.accuracies(train, test, ks=(20,), temperature=temperature, num_classes=3, mesh=MESH)
    assert found["knn20"] == pytest.approx(100 * np.mean(votes.argmax(1) == test[1]))


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"k": (0, 5)}, {"k": ()}])
def test_bad_options_of_knn_are_named(change):
    with pytest.raises(UserError, match="must be above 0, and each of k="):
        make(**change)


def test_knn_predicts_as_scikit_learn_does():
    def votes(distances):
        return np.exp((1 - distances) / 0.07)

    (x, y, _), (q, _, _) = blobs(0.9)
    scores, index = classifiers.nearest_neighbors(q, x, 20, MESH)
    for k in (1, 5, 20):
        theirs = neighbors.KNeighborsClassifier(k, weights=votes, metric="cosine").fit(x, y)
        ours = classifiers.weighted_vote(y[index[:, :k]], np.exp(scores[:, :k] / 0.07), 3)
        np.testing.assert_array_equal(ours, theirs.predict(q))


def largest_cosines(queries, bank, k):
    """The plain way: all cosines at once; of equal ones, the first."""
    unit_bank = classifiers.l2_normalize_rows(bank)
    cosines = classifiers.l2_normalize_rows(queries) @ unit_bank.T
    index = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, index, axis=1), index


@pytest.mark.parametrize("count", [1, 7, 64, 201], ids=str)
@pytest.mark.parametrize("k", [1, 20], ids=str)
def test_a_bank_in_blocks_has_the_same_neighbors(count, k, monkeypatch):
    monkeypatch.setattr(classifiers, "BANK_ROWS", 64)
    monkeypatch.setattr(classifiers, "QUERIES", 16)
    # Small integers and many duplicates: cosines are exact, and equal ones are frequent
    rng = np.random.default_rng(0)
    bank = np.eye(4, dtype=np.float32)[rng.integers(0, 4, count)] * rng.choice([1, 2], (count, 1))
    queries = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 37)]
    k = min(k, count)
    scores, index = classifiers.nearest_neighbors(queries, bank.astype(np.float32), k, MESH)
    expected_scores, expected_index = largest_cosines(queries, bank, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(index, expected_index)


@pytest.fixture
def compiled_as_in_runs(monkeypatch):
    """The solver adds float32 less exactly when it is compiled quickly, see conftest.FAST."""
    options = {"xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
    lbfgs_logistic._jit_solve.cache_clear()
    yield
    lbfgs_logistic._jit_solve.cache_clear()


@pytest.mark.parametrize("more", [0, 200], ids=["more images than dimensions", "more dimensions"])
def test_logistic_regression_is_that_of_scikit_learn(more, compiled_as_in_runs):
    (x, y, _), (q, t, _) = blobs(0.9)
    noise = np.random.default_rng(1)
    x = np.hstack([x, noise.normal(size=(len(x), more)).astype(np.float32)])
    q = np.hstack([q, noise.normal(size=(len(q), more)).astype(np.float32)])
    mean, deviation = lbfgs_logistic.mean_and_deviation(x)
    x = (x - mean) / deviation
    q = (q - mean) / deviation
    strengths = (1e-3, 1e-1)
    for mesh in (MESH, None):
        ours = lbfgs_logistic.fit(x, y, 3, strengths, 300, mesh)
        assert ours.gradient.max() < 1e-4  # in units in which the curvature is 1
        for i, l2 in enumerate(strengths):
            theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=1000)
            theirs.fit(x, y)
            np.testing.assert_allclose(
                ours.weights[i], theirs.coef_.T, atol=2e-3 * np.abs(theirs.coef_).max()
            )
            # If classes can be separated, the loss hardly depends on the biases, so that they are
            # less exact in float32
            np.testing.assert_allclose(
                ours.biases[i], theirs.intercept_, atol=1e-2 if more else 2e-3
            )
            assert np.mean(ours.predict(q)[i] == t) == theirs.score(q, t)


def test_features_too_wide_to_be_rotated_converge_as_well(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 120)).astype(np.float32)
    y = (x[:, :3] + rng.normal(size=(300, 3))).argmax(axis=1)
    monkeypatch.setattr(lbfgs_logistic, "PADDED_SIZES", (64,))
    assert lbfgs_logistic.fit(x, y, 3, (1e-5,), 80, MESH).gradient.max() < 1e-4


def test_chunks_do_not_change_the_solution(monkeypatch, compiled_as_in_runs):
    (x, y, _), (q, _, _) = blobs(0.9)
    whole = lbfgs_logistic.fit(x, y, 3, (1e-3, 1e-1), 300, MESH)
    monkeypatch.setattr(lbfgs_logistic, "CHUNK", 4)  # 32 images on 8 devices, and the other 28
    monkeypatch.setattr(lbfgs_logistic, "MAX_LOGITS", 3)  # one strength at a time
    parts = lbfgs_logistic.fit(x, y, 3, (1e-3, 1e-1), 300, MESH)
    np.testing.assert_allclose(
        parts.weights, whole.weights, atol=1e-3 * np.abs(whole.weights).max()
    )
    np.testing.assert_array_equal(parts.predict(q), whole.predict(q))


def test_features_are_neither_copied_nor_normalized_as_a_whole(monkeypatch):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    x = array_memory.copy(np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32))
    monkeypatch.setattr(lbfgs_logistic, "CHUNK", 16)
    problem = lbfgs_logistic.prepare(x, np.zeros(64), 3, one)
    assert np.shares_memory(problem.coordinates, x)
    (part,) = problem.parts
    assert part.x.shape == (4, 16, 8)
    assert part.x.addressable_data(0).unsafe_buffer_pointer() == x.ctypes.data
    normalized = []

    def normalize(rows, original=classifiers.l2_normalize_rows):
        normalized.append(len(rows))
        return original(rows)

    monkeypatch.setattr(classifiers, "l2_normalize_rows", normalize)
    monkeypatch.setattr(classifiers, "BANK_ROWS", 16)
    classifiers.nearest_neighbors(x[:5], x, 3, one)
    assert normalized == [5, 16, 16, 16, 16]


def test_only_chosen_images_count():
    (x, y, _), _ = blobs(0.9)
    chosen = np.arange(len(x)) % 3 > 0
    problem = lbfgs_logistic.prepare(x.copy(), y, 3, MESH)
    found = problem.solve((1e-2,), 300, chosen)
    expected = lbfgs_logistic.fit(x[chosen], y[chosen], 3, (1e-2,), 300)
    np.testing.assert_allclose(found.weights, expected.weights, atol=2e-3)
    rows = np.flatnonzero(~chosen)
    np.testing.assert_array_equal(found.classify(problem.coordinates, rows), found.predict(x[rows]))


def test_regression_leaves_its_features_alone_unless_they_may_be_overwritten():
    train, test = blobs(0.9)
    before = train.features.copy()
    make("logistic_regression").accuracies(train, test, 3, MESH)
    np.testing.assert_array_equal(train.features, before)


def all_accuracies(train, test):
    """The accuracies of three evaluators, by name."""
    metrics = knn_accuracies(train, test, (5, 10))
    regression = make("logistic_regression").accuracies(train, test, 3, MESH)
    for name, value in regression.items():
        if name != "l2":
            metrics[f"linear {name}"] = value
    few = make("fewshot").accuracies(train, test, 3)
    for name, value in few.items():
        if "_std" not in name:
            metrics[f"few {name}"] = value
    return metrics


def test_perfect_features_score_100_and_shuffled_ones_chance():
    train, test = blobs(0.01)
    assert set(all_accuracies(train, test).values()) == {100.0}
    x = RNG.normal(size=(3000, 8)).astype(np.float32)
    train = Labeled(x, RNG.integers(0, 3, 3000))
    test = Labeled(x, RNG.integers(0, 3, 3000))
    for name, value in all_accuracies(train, test).items():
        tolerance = 8 if name == "linear held_out" else 4  # held_out: of 300 images
        assert value == pytest.approx(33.3, abs=tolerance), name


def test_the_strength_is_chosen_on_training_images_alone():
    evaluator = dataclasses.replace(make("logistic_regression"), l2=(1e-3, 1e-1, 10.0))
    train, test = blobs(0.9)
    wrong = Labeled(test.features, (test.labels + 1) % 3)
    ours = evaluator.accuracies(train, test, 3, MESH)
    other = evaluator.accuracies(train, wrong, 3, MESH)
    assert ours["l2"] == other["l2"]
    assert ours["held_out"] == other["held_out"]
    assert ours["accuracy"] > 50 > other["accuracy"]


def test_few_shots_are_so_many_of_each_class(monkeypatch):
    rows = []
    fit = lbfgs_logistic.fit

    def count_and_fit(x, labels, *more):
        rows.append(np.bincount(labels, minlength=3).tolist())
        return fit(x, labels, *more)

    train, test = blobs(0.9)
    evaluator = make("fewshot")
    with monkeypatch.context() as patch:
        patch.setattr(lbfgs_logistic, "fit", count_and_fit)
        found = evaluator.accuracies(train, test, 3)
    halves = [max(1, round(count / 2)) for count in np.bincount(train.labels)]
    assert rows == 2 * [[1, 1, 1]] + 2 * [[4, 4, 4]] + 2 * [halves]
    names = ("shots1", "shots4", "labels50pct")
    assert found.keys() == {*names, *(f"{name}_std" for name in names)}
    assert found["shots1_std"] > 0
    too_many = dataclasses.replace(evaluator, shots=(1, 500), percent=())
    assert too_many.accuracies(train, test, 3).keys() == {"shots1", "shots1_std"}


def test_leave_one_out_never_takes_the_image_itself():
    same = np.ones((4, 3), np.float32)
    assert (knn._nearest_other(unit(same), MESH) != np.arange(4)).all()
    train = Labeled(same, np.zeros(4, int))
    with_pair = Labeled(same, np.array([0, 1, 2, 2]))
    assert knn_accuracies(train, with_pair, (2,), num_classes=4)["loo1"] <= 50
    alone = Labeled(same, np.arange(4))  # no other image of any class
    assert "loo1" not in knn_accuracies(train, alone, (2,), num_classes=4)


def test_a_feature_is_what_its_name_says(run):
    method, params, data = run
    assert image_features.parse_feature("cls + block00/tokens:both") == [
        ("cls", "mean"),
        ("block00/tokens", "both"),
    ]
    (images,) = [batch["images"] for batch in data.batches("test", 16)]
    known = jax.device_get(method.features(params, images))
    tokens = known["block00/tokens"]
    mean_token = tokens[:, 1:].mean(1)
    expected = {
        "patches": known["patches"].mean(1),
        "cls_prenorm": known["cls_prenorm"],
        "block00/tokens": mean_token,
        "block00/tokens:cls": tokens[:, 0],
        "block00/tokens:both": np.concatenate([tokens[:, 0], mean_token], 1),
        "pixels": np.asarray(images).reshape(16, -1),
    }
    x, labels, _ = image_features.split_features(
        method, params, data, "test", "+".join(expected), 16
    )
    np.testing.assert_allclose(x, np.concatenate(list(expected.values()), 1), atol=1e-5)
    assert labels.tolist() == 8 * [0] + 8 * [1]


def test_registers_are_no_patches_and_mlps_have_a_row_for_cls():
    features = {
        "cls": np.float32([[9, 9]]),
        "registers": np.float32([[[1, 2], [3, 4]]]),
        "block00/mlp": np.float32([[[90, 90], [1, 2], [3, 4], [70, 70]]]),
    }
    exists = np.array([[True, True, False]])  # the last patch is padding
    for name in ("registers", "block00/mlp"):
        found = image_features._pool(features, (name, "mean"), exists)
        np.testing.assert_array_equal(found, [[2, 3]])


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("patchs", "'patchs': the method has no feature of that name; did you mean patches"),
        ("block09/tokens", "did you mean block0"),
        (
            "zzz",
            "choices: .*cls, cls_prenorm, histogram, latents, patches, patches_prenorm, pixels",
        ),
        ("cls:max", "'max' must be one of: mean | cls | both"),
        ("patches:cls", "no CLS token for :cls; concatenate features instead: cls\\+patches"),
        ("block00/attention", "no vectors"),
    ],
)
def test_a_wrong_feature_is_named(feature, message, run):
    method, params, data = run
    with pytest.raises(UserError, match=message):
        image_features.split_features(method, params, data, "test", feature, 16)


@pytest.mark.parametrize("evaluator", [knn, logistic_regression, fewshot])
def test_unlabeled_data_have_no_accuracy(evaluator):
    train, test = blobs(0.5)
    data = Data(train, test)
    data.classes = ()
    name = evaluator.__name__.rpartition(".")[2]
    assert evaluator.Evaluator.needs_labels
    assert make(name).run(Method, PARAMS, data) == {}


def test_schedule():
    regularly = scheduled(every=0.5)
    at_end = scheduled(every=0)
    assert [step for step in range(11) if regularly.due(step, 10)] == [0, 3, 6, 9, 10]
    assert [step for step in range(11) if at_end.due(step, 10)] == [10]
    # A run shorter than the interval
    assert [step for step in range(3) if regularly.due(step, 2)] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "kn"}, "did you mean knn"),
        ({"kk": 3}, "unknown or missing keys kk"),
        ({"params": "target"}, "no target .*config.representation.weights .* to online"),
        ({"params": "both"}, r"must be one of: online \| target"),
    ],
)
def test_a_bad_section_is_named(change, message):
    with pytest.raises(UserError, match=rf"config.evaluators.it.*{message}"):
        make(**change)


def test_evaluators_of_a_run_before_version_0_2_build():
    """Its config.json has lists instead of tuples, and an evaluator type of that time."""
    sections = json.loads(STORED_CONFIG.read_text())["evaluators"]
    assert sections["pictures"]["type"] == "pictures"
    first, second = base.from_config(sections, steps_per_epoch=64, has_target=True)
    assert (first.title, first.every, first.evaluator) == (
        "knn",
        256,
        knn.Evaluator(
            feature="patches_prenorm", k=(20,), temperature=0.07, batch_size=64, baselines=True
        ),
    )
    assert (second.title, second.evaluator) == (
        "pictures",
        visualization.Evaluator(feature="patches_prenorm", images=6, zoom=2, clusters=4),
    )
    hash(first.evaluator)


@pytest.mark.parametrize(("former", "name"), base.FORMER_NAMES.items())
def test_former_names_of_evaluators_are_known(former, name):
    section = tiny.evaluator(name)
    current = base.from_config({"it": section}, steps_per_epoch=1, has_target=False)
    renamed = {**section, "type": former}
    assert base.from_config({"it": renamed}, steps_per_epoch=1, has_target=False) == current
    assert former not in base.names()


def test_former_titles_are_accepted_on_the_command_line():
    config = recipe.get_config()
    titles = ["linear", "attentive", "video", "attributes"]
    assert list(command.choose_sections(titles, config)) == [
        "logistic_regression",
        "attentive_probe",
        "video_segmentation",
        "clevr",
    ]
