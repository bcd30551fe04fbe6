"""Several 0/1 labels and numbers: metrics and solutions are scikit-learn's; what is refused."""

import numpy as np
import pytest
from sklearn import linear_model, metrics
from test_evaluators import MESH, PARAMS, Data, Method, make
from test_probes import PARAMS as PROBE_PARAMS
from test_probes import WIDTH
from test_probes import Data as ProbeData
from test_probes import Method as ProbeMethod
from test_probes import make as make_probe

from lmim_jax.data.label_file import Targets
from lmim_jax.data.shared_array import share
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.common import classifiers, lbfgs_logistic, outcome, target_metrics
from lmim_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
NAMES = ("a", "b", "c")


def labels_of(kind, x):
    """Labels that are a noisy linear function of the features."""
    mixing = np.random.default_rng(1).normal(size=(x.shape[1], 3))
    numbers = x @ mixing + 0.5 * RNG.normal(size=(len(x), 3))
    if kind == "multilabel":
        return (numbers > 0.3).astype(np.float32)
    return (7 * numbers + 40).astype(np.float32)


def targets(kind, values):
    return Targets(kind, NAMES, share(np.ascontiguousarray(values).reshape(-1)))


def with_targets(data, kind, train, test):
    """Give the sources of test data such labels."""
    for split, values in (("train", train), ("test", test)):
        data.sources[split] = _Labeled(data.sources[split], targets(kind, values))
    data.targets = data.sources["train"].targets
    data.classes = ()
    return data


class _Labeled:
    """A source of test data with targets."""

    classes = ()

    def __init__(self, source, targets):
        self.source = source
        self.targets = targets

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        return iter(self.source)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_those_of_scikit_learn(ties):
    scores = RNG.normal(size=(60, 3))
    if ties:
        scores = scores.round()
    truth = (scores + RNG.normal(size=scores.shape) > 0.5).astype(np.float32)
    found = target_metrics.average_precisions(scores, truth)
    expected = metrics.average_precision_score(truth, scores, average=None)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    summary = target_metrics.summarize("multilabel", scores, truth)
    assert summary["map"] == pytest.approx(100 * expected.mean())
    numbers = (5 * scores + RNG.normal(size=scores.shape)).astype(np.float32)
    summary = target_metrics.summarize("regression", scores, numbers)
    assert summary["r2"] == pytest.approx(metrics.r2_score(numbers, scores))
    assert summary["mae"] == pytest.approx(metrics.mean_absolute_error(numbers, scores))
    rows = target_metrics.each("regression", NAMES, scores, numbers)
    by_label = metrics.r2_score(numbers, scores, multioutput="raw_values")
    np.testing.assert_allclose([row["r2"] for row in rows], by_label, rtol=1e-5)


def test_a_label_without_meaning_does_not_count():
    truth = np.array([[1, 0], [0, 0], [1, 0]], np.float32)
    scores = RNG.normal(size=(3, 2))
    rows = target_metrics.each("multilabel", NAMES[:2], scores, truth)
    assert np.isnan(rows[1]["ap"])
    summary = target_metrics.summarize("multilabel", scores, truth)
    assert summary["map"] == rows[0]["ap"]
    found = target_metrics.baselines("multilabel", truth, truth)
    assert found["prevalence_map"] == pytest.approx(200 / 3)
    assert np.isnan(target_metrics.determination(scores, truth)[1])


# Fewer and more images than numbers of a feature
@pytest.mark.parametrize(("kind", "images"), [("multilabel", 12), ("regression", 80)])
def test_solutions_are_those_of_scikit_learn(kind, images):
    x = RNG.normal(size=(images, 24)).astype(np.float32)
    y = labels_of(kind, x)
    if kind == "regression":
        y = (y - y.mean(0)) / y.std(0)
    loss = {"multilabel": lbfgs_logistic.SIGMOID, "regression": lbfgs_logistic.SQUARED}[kind]
    l2 = 0.05
    model = classifiers.fit_regression(
        x, y, num_classes=3, l2=(l2,), iterations=300, mesh=MESH, loss=loss
    )
    standard = (x - x.mean(0)) / x.std(0)
    queries = RNG.normal(size=(5, 24)).astype(np.float32)
    standard_queries = (queries - x.mean(0)) / x.std(0)
    expected = []
    for label in range(3):
        reference = linear_model.Ridge(alpha=l2 * images)
        if kind == "multilabel":
            reference = linear_model.LogisticRegression(C=1 / (l2 * images), tol=1e-8)
        reference.fit(standard, y[:, label])
        predict = getattr(reference, "decision_function", reference.predict)
        expected.append(predict(standard_queries))
    np.testing.assert_allclose(model.outputs(queries), np.stack(expected, axis=1), atol=3e-3)


@pytest.mark.parametrize(
    ("kind", "name"), [("multilabel", "logistic_regression"), ("regression", "ridge_regression")]
)
def test_features_that_tell_labels_score_high(kind, name):
    x = RNG.normal(size=(150, 8)).astype(np.float32)
    y = labels_of(kind, x)
    unused = np.full(150, -1, np.int32)
    data = Data((x[:100], unused[:100]), (x[100:], unused[100:]), padding=1)
    data = with_targets(data, kind, y[:100], y[100:])
    kept = []
    data.keep = kept.append
    evaluator = make(name, batch_size=16, l2=(1e-3, 1e-1))
    found = evaluator.run(Method, PARAMS, data)
    neighbors = make("knn", batch_size=16, k=(5,)).run(Method, PARAMS, data)
    if kind == "multilabel":
        assert found["map"] > neighbors["knn5_map"] > found["prevalence_map"] + 15
    else:
        assert found["r2"] > 0.9 > neighbors["knn5_r2"] > 0.3
        assert found["mae"] < neighbors["knn5_mae"] < found["mean_mae"]
        assert found["mean_mae"] == pytest.approx(
            np.abs(y[100:] - y[:100].mean(0)).mean(), rel=1e-5
        )
    answers = kept[0].answers
    np.testing.assert_array_equal(answers.truth, y[100:])
    assert target_metrics.summarize(kind, answers.predicted, answers.truth).items() <= found.items()
    again = evaluator.outputs(  # by the weights that are kept
        _task(kind), PARAMS, kept[0].weights, x[100:]
    )
    np.testing.assert_allclose(again, answers.predicted, rtol=1e-3, atol=1e-3)


def _task(kind):
    from lmim_jax.evaluators.common.probe_training import Task

    return Task(Method, None, 3, kind)


class Probed(ProbeData):
    """Images of probes, with numbers or 0/1 labels instead of classes."""

    def training(self, batch_size, steps, seed):
        rng = np.random.default_rng(seed)
        x, y = self._images("train")
        targets = self.sources["train"].targets.values
        for _ in range(steps):
            rows = rng.permutation(len(x))[:batch_size]
            batch = {"image": x[rows], "label": y[rows], "target": targets[rows]}
            yield sharding.to_global(batch, self.mesh)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("multilabel", "linear_probe"),
        pytest.param("multilabel", "attentive_probe", marks=pytest.mark.slow),
        pytest.param("regression", "attentive_probe", marks=pytest.mark.slow),
        pytest.param("multilabel", "finetune", marks=pytest.mark.slow),
        pytest.param("regression", "finetune", marks=pytest.mark.slow),
    ],
)
def test_probes_learn_labels_that_are_no_classes(kind, name):
    noise = RNG.normal(size=(218, WIDTH))
    y = labels_of(kind, noise)
    x = np.repeat(noise[:, None, None], 2, axis=1).astype(np.float32)
    unused = np.full(218, -1, np.int32)
    data = Probed((x[:128], unused[:128]), (x[128:], unused[128:]))
    data = with_targets(data, kind, y[:128], y[128:])
    kept = []
    data.keep = kept.append
    change = {"finetune": {"mixup": 0.0, "cutmix": 0.0, "base_lr": 0.1}}.get(name, {})
    found = make_probe(name, **change).run(ProbeMethod, PROBE_PARAMS, data)
    if kind == "multilabel":
        assert found["map"] > found["prevalence_map"] + 25
    else:
        assert found["r2"] > 0.5
        assert found["mae"] < 0.7 * found["mean_mae"]
    assert kept[0].kind == kind
    assert kept[0].answers.predicted.shape == (90, 3)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_probes_choose_on_held_out_images_whatever_the_labels(kind):
    """A head that does not learn is not chosen; the labels are those of the held-out images."""
    noise = RNG.normal(size=(128, WIDTH))
    y = labels_of(kind, noise)
    x = np.repeat(noise[:, None, None], 2, axis=1).astype(np.float32)
    unused = np.full(128, -1, np.int32)
    data = with_targets(Probed((x, unused), (x, unused)), kind, y, y)
    name = {"multilabel": "linear_probe", "regression": "attentive_probe"}[kind]
    rate = {"multilabel": 80.0, "regression": 0.1}[kind]
    probe = make_probe(name, base_lr=(1e-9, rate), held_out=0.25, batch_size=32)
    found = probe.run(ProbeMethod, PROBE_PARAMS, data)
    assert found["base_lr"] == rate
    scores = [float(line.rpartition(",")[2]) for line in found["grid"].splitlines()[1:]]
    assert scores[1] == pytest.approx(found["held_out"], abs=1e-3)
    assert found["held_out"] > scores[0] + 25
    constant = with_targets(Probed((x, unused), (x, unused)), kind, np.zeros_like(y), y)
    with pytest.raises(UserError, match="no label has two values"):
        probe.run(ProbeMethod, PROBE_PARAMS, constant)


def test_evaluators_say_what_they_do_not_measure():
    x = RNG.normal(size=(20, 8)).astype(np.float32)
    y = labels_of("regression", x)
    unused = np.full(20, -1, np.int32)
    data = with_targets(Data((x, unused), (x, unused)), "regression", y, y)
    for name in ("fewshot", "logistic_regression"):
        assert make(name).run(Method, PARAMS, data) == {}
        problem = base.problem(make(name), (), data.sources)
        assert problem.startswith("the labels are regression, not classes")
    problem = base.problem(make_probe("linear_probe"), (), data.sources)
    assert problem == "the labels are regression, not classes or multilabel"
    constant = with_targets(Data((x, unused), (x, unused)), "regression", y, np.ones((20, 3)))
    assert "same numbers" in base.problem(make("ridge_regression"), (), constant.sources)
    nothing = with_targets(Data((x, unused), (x, unused)), "multilabel", y > 0, np.zeros((20, 3)))
    assert "all labels of the test images are 0" in base.problem(make("knn"), (), nothing.sources)
    data.sources["test"] = None
    assert "no test images" in base.problem(make("knn"), (), data.sources)


def test_numbers_are_standardized_and_back():
    values = np.array([[1, 5], [3, 5], [5, 5]], np.float32)
    mean, deviation = outcome.standardization("regression", values)
    assert mean == (3, 5)
    assert deviation == pytest.approx((np.sqrt(8 / 3), 1))
    assert outcome.standardization("multilabel", values) == ((), ())
