"""Collapse metrics on features whose values are known; padding changes nothing; the warning."""

import gc
import logging

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lmim_jax.configs import ijepa_vit_b, mae_vit_b, quickstart, vit_b
from lmim_jax.distributed import sharding
from lmim_jax.train import collapse_metrics

RNG = np.random.default_rng(0)
METRICS = (
    collapse_metrics.collapse_index,
    collapse_metrics.effective_rank,
    collapse_metrics.feature_std,
    collapse_metrics.sigreg_gauge,
)


def measure(x):
    """All metrics of features [B, D]."""
    features = np.float32(x)
    weight = np.ones(len(x), np.float32)
    return [float(metric(features, weight)) for metric in METRICS]


def test_known_values():
    identical = np.ones((6, 4))
    assert measure(identical) == pytest.approx([1, 1, 0, 0.402048 - 1.05246 / 6], abs=1e-3)
    parallel = np.arange(1, 7)[:, None] * np.ones((6, 4))
    assert measure(parallel)[:3] == pytest.approx([1, 1, 0], abs=1e-3)
    orthogonal = np.eye(5)
    expected_std = 5**0.5 * (0.2 * 0.8) ** 0.5
    assert measure(orthogonal)[:3] == pytest.approx([0, 5, expected_std], abs=1e-3)
    index, rank, std, gauge = measure(RNG.normal(size=(500, 16)))
    assert index == pytest.approx(0, abs=0.01)
    assert 15 < rank <= 16
    assert std == pytest.approx(1, abs=0.02)
    assert gauge == pytest.approx(0, abs=3e-3)


def test_the_gauge_of_sigreg_tells_directions_and_not_units():
    x = RNG.normal(size=(400, 16))
    flat = x * np.float64([1] + [0.01] * 15)
    assert measure(flat)[3] > 0.02
    assert measure(100 * flat + 7)[3] == pytest.approx(measure(flat)[3], rel=1e-3)


def test_collapse_index_is_the_mean_over_pairs():
    x = RNG.normal(size=(7, 5)) + 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(7) for j in range(7) if i != j]
    assert measure(x)[0] == pytest.approx(np.mean(pairs), rel=1e-5)


class Images:
    """A sample of images, as `EvaluationData` gives it: with the canvases."""

    held_out = "test"
    mesh = sharding.make_mesh()

    def sample(self, split, count):
        batch = {
            "image": jax.numpy.zeros((count, 123, 123, 3), np.uint8),
            "images": jax.numpy.ones((count, 4, 4, 3)),
            "index": np.arange(count),
        }
        return batch, tuple(range(count))


class Pixels:
    """A method whose features are pixels."""

    @staticmethod
    def features(params, images):
        tokens = images.reshape(len(images), 16, 3) * params["scale"][None, None]
        return {"patches": tokens, "patches_prenorm": tokens}


def test_no_canvases_stay_on_the_devices():
    measure_collapse = collapse_metrics.make_collapse_metrics(Pixels(), Images(), 8)
    found = measure_collapse({"scale": np.ones(3, np.float32)}, {})
    assert float(found["collapse_index"]) == pytest.approx(1, abs=1e-3)
    gc.collect()
    assert not [array for array in jax.live_arrays() if array.shape[1:] == (123, 123, 3)]


@pytest.mark.parametrize("metric", METRICS)
def test_padding_changes_nothing(metric):
    x = RNG.normal(size=(9, 6)).astype(np.float32) + 1
    padded = np.concatenate([x, 1e3 * np.ones((3, 6), np.float32)])
    weight = np.repeat(np.float32([1, 0]), [9, 3])
    assert float(metric(padded, weight)) == pytest.approx(float(metric(x, weight[:9])), rel=1e-5)
    assert np.isfinite(jax.jit(metric)(padded, weight))


@pytest.mark.parametrize(
    ("indices", "warned_at"),
    [
        ([0.5, 0.96, 0.97, 0.99], [3]),  # above the limit twice, warned once
        ([0.5, 0.96, 0.94, 0.96, 0.94], []),  # never twice in a row
        ([0.99, 0.97, 0.955, 0.9, 0.6], []),  # a new network that improves
        ([0.999, 0.999, 0.999], [2]),
    ],
)
def test_a_collapse_is_warned_about_once_and_not_while_the_index_falls(indices, warned_at, caplog):
    monitor = collapse_metrics.CollapseMonitor(ConfigDict({"target": "joint"}))
    with caplog.at_level(logging.WARNING, logger="lmim_jax"):
        for step, index in enumerate(indices, 1):
            values = {"collapse_index": index, "effective_rank": 1.5, "feature_std": 0.1}
            monitor.update(step, values)
    assert [record.args[0] for record in caplog.records] == warned_at
    if warned_at:
        assert "config.method.target=ema" in caplog.text


def test_a_warning_proposes_what_the_run_has_not_set():
    def proposed(recipe, **changes):
        recipe.method.update(changes)
        return collapse_metrics.remedies(recipe.method)

    lower_rate = "a lower config.optimizer.base_lr"
    goals = "config.method.similarity_start=0.5 with similarity_end=0.0"
    assert proposed(vit_b.get_config()) == [goals, lower_rate]
    assert proposed(quickstart.get_config()) == [lower_rate]
    assert proposed(mae_vit_b.get_config()) == [lower_rate]
    assert proposed(ijepa_vit_b.get_config()) == [lower_rate]
    naive = {"target": "joint", "loss": "mse", "similarity_weight": 0.0}
    assert proposed(vit_b.get_config(), **naive) == [
        "config.method.target=ema",
        "config.method.loss=patch_infonce",
        "config.method.similarity_weight=0.1",
        lower_rate,
    ]
