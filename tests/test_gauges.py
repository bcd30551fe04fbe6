"""Gauges of collapse on features whose figures are known; padding changes nothing; the alarm."""

import logging

import jax
import numpy as np
import pytest

from lmim_jax.train import collapse_metrics

RNG = np.random.default_rng(0)
GAUGES = (
    collapse_metrics.collapse_index,
    collapse_metrics.effective_rank,
    collapse_metrics.feature_std,
)


def read(x):
    return [float(gauge(np.float32(x), np.ones(len(x), np.float32))) for gauge in GAUGES]


def test_known_figures():
    assert read(np.ones((6, 4))) == pytest.approx(
        [1, 1, 0], abs=1e-3
    )  # all alike, whatever their length
    assert read(np.arange(1, 7)[:, None] * np.ones((6, 4))) == pytest.approx([1, 1, 0], abs=1e-3)
    assert read(np.eye(5)) == pytest.approx(
        [0, 5, 5**0.5 * (0.2 * 0.8) ** 0.5], abs=1e-3
    )  # all orthogonal
    index, rank, std = read(RNG.normal(size=(500, 16)))
    assert index == pytest.approx(0, abs=0.01)
    assert 15 < rank <= 16
    assert std == pytest.approx(1, abs=0.02)


def test_collapse_index_is_the_mean_over_pairs():
    x = RNG.normal(size=(7, 5)) + 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(7) for j in range(7) if i != j]
    assert read(x)[0] == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize("gauge", GAUGES)
def test_padding_changes_nothing(gauge):
    x = RNG.normal(size=(9, 6)).astype(np.float32) + 1
    padded = np.concatenate([x, 1e3 * np.ones((3, 6), np.float32)])
    weight = np.repeat(np.float32([1, 0]), [9, 3])
    assert float(gauge(padded, weight)) == pytest.approx(float(gauge(x, weight[:9])), rel=1e-5)
    assert np.isfinite(jax.jit(gauge)(padded, weight))


@pytest.mark.parametrize(
    ("indices", "warned_at"),
    [
        ([0.5, 0.96, 0.97, 0.99], [3]),  # twice above, once told
        ([0.5, 0.96, 0.94, 0.96, 0.94], []),  # never twice in a row
        ([0.99, 0.97, 0.955, 0.9, 0.6], []),  # a fresh network that is getting better
        ([0.999, 0.999, 0.999], [2]),
    ],
)
def test_the_alarm_is_given_once_and_not_while_the_index_falls(indices, warned_at, caplog):
    alarm = collapse_metrics.Alarm()
    with caplog.at_level(logging.WARNING, logger="lmim_jax"):
        for step, index in enumerate(indices, 1):
            alarm.see(step, {"collapse_index": index, "effective_rank": 1.5, "feature_std": 0.1})
    assert [record.args[0] for record in caplog.records] == warned_at
    if warned_at:
        assert "config.method.target=ema" in caplog.text
