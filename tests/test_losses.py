"""Losses equal their definitions; samplers have the documented properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_jax.methods.common import losses, masking

RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(3, 7, 5)).astype(np.float32) for _ in range(2))


def test_similarity_is_the_mean_cosine_over_all_pairs():
    unit = X / np.linalg.norm(X, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        losses.similarity(X), np.einsum("bid,bjd->bij", unit, unit).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(losses.similarity(np.ones((2, 4, 3))), 1.0, rtol=1e-6)


def test_infonce_of_indistinguishable_patches_is_chance():
    logits = losses.discrimination_logits(np.ones((2, 176, 8)), np.ones((2, 176, 8)), 0.2)
    np.testing.assert_allclose(losses.patch_infonce(logits, 0.2), 0.4 * np.log(176), rtol=1e-5)


def test_infonce_of_perfect_predictions_is_nearly_zero_and_all_right():
    targets = np.eye(6, dtype=np.float32)[None] * 3
    logits = losses.discrimination_logits(targets, targets, 0.05)
    assert losses.patch_infonce(logits, 0.05) < 1e-3
    assert losses.patch_accuracy(logits) == 1
    assert (
        losses.patch_accuracy(losses.discrimination_logits(np.roll(targets, 1, 1), targets, 0.05))
        == 0
    )


def test_standardized_predictions_have_mean_0_and_deviation_1_per_channel():
    z = losses.standardize_over_patches(X * 9 + 4)
    np.testing.assert_allclose(z.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(z, axis=1, ddof=1), 1, atol=1e-3)


def test_regressions():
    np.testing.assert_allclose(losses.mse(X, Y), ((X - Y) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(losses.l1(X, Y), np.abs(X - Y).mean(), rtol=1e-5)
    error = np.abs(X - Y)
    expected = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    np.testing.assert_allclose(losses.smooth_l1(X, Y), expected, rtol=1e-5)
    target = (Y - Y.mean(-1, keepdims=True)) / np.sqrt(Y.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(losses.norm_l2(X, Y), ((X - target) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        losses.similarity,
        lambda x: losses.patch_infonce(losses.discrimination_logits(x, Y, 0.2), 0.2),
    ],
)
def test_gradients_are_finite_at_zero(loss):
    assert jnp.isfinite(jax.grad(loss)(jnp.zeros_like(X))).all()


def test_losses_are_float32_whatever_comes_in():
    x = jnp.asarray(X, jnp.bfloat16)
    y = jnp.asarray(Y, jnp.bfloat16)
    assert all(loss(x, y).dtype == jnp.float32 for loss in losses.REGRESSION_LOSSES.values())
    assert (
        losses.discrimination_logits(x, y, 0.2).dtype == losses.similarity(x).dtype == jnp.float32
    )


@settings(max_examples=25, deadline=None)
@given(patches=st.integers(3, 300), share=st.floats(0.01, 0.95), seed=st.integers(0, 2**31 - 1))
def test_visible_and_masked_partition_the_grid(patches, share, seed):
    visible, masked = masking.random_split(
        jax.random.key(seed), patches, max(1, int(share * patches))
    )
    assert sorted([*visible.tolist(), *masked.tolist()]) == list(range(patches))


def test_every_patch_is_visible_equally_often_and_images_differ():
    draw = jax.vmap(lambda key: masking.random_split(key, 16, 4)[0])
    visible = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    counts = np.bincount(visible.ravel(), minlength=16)
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.75)
    assert len({tuple(sorted(row)) for row in visible[:50].tolist()}) > 40


def test_window_offsets_are_uniform_below_the_gap():
    offsets = np.asarray(masking.window_offsets(jax.random.key(0), (60, 60), 4))
    counts = np.bincount(offsets.ravel())
    assert len(counts) == 4  # never 4: the official bound is exclusive
    assert abs(counts - 1800).max() < 200


def test_take_gathers_rows_of_each_image():
    index = np.array([[2, 0], [1, 1], [6, 3]])
    np.testing.assert_array_equal(
        masking.take(X, index), np.stack([X[b, index[b]] for b in range(3)])
    )
    np.testing.assert_array_equal(masking.take(X[:1], index), X[0][index])
