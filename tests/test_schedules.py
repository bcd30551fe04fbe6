"""Schedules have the values of the official code."""

import numpy as np
import pytest

from lmim_jax.optim import schedules

# Latent MIM on ImageNet-1k: 800 epochs with 40 of warm-up.
EPOCHS = 800


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 6e-4), (20, 1.5e-3), (40, 2.4e-3), (420, 1.5e-3), (800, 6e-4)]
)
def test_the_learning_rate_has_the_official_values(epoch, expected):
    learning_rate = schedules.warmup_cosine(6e-4, 2.4e-3, 6e-4, 40, EPOCHS)
    np.testing.assert_allclose(learning_rate(epoch), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "momentum", "similarity"),
    [(0, 0.99, 0.75), (200, 0.99146, 0.677), (420, 0.99539, 0.480), (800, 1, 0.25)],
)
def test_momentum_and_similarity_have_the_official_values(epoch, momentum, similarity):
    found_momentum = 1 - schedules.cosine(0.01, 0.0, epoch / EPOCHS)
    np.testing.assert_allclose(found_momentum, momentum, atol=6e-6)
    found_similarity = schedules.cosine(0.75, 0.25, epoch / EPOCHS)
    np.testing.assert_allclose(found_similarity, similarity, atol=6e-4)


def test_a_cosine_from_step_0_is_capped_by_the_warmup():
    learning_rate = schedules.warmup_cosine(0.0, 1.0, 0.0, 10, 100, rebased=False)
    np.testing.assert_allclose(learning_rate(5), 0.5, rtol=1e-6)  # the warm-up is smaller
    np.testing.assert_allclose(learning_rate(50), 0.5, rtol=1e-6)  # halfway along the cosine
    assert learning_rate(10) < 1
