"""Every file of methods/ keeps the contract; the switches of Latent MIM do what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmim_jax.methods import base
from lmim_jax.models.layers import patchify

NAMES = base.names()
SWITCHES = [  # each value of each switch at least once
    {"target": "joint", "loss": "mse"},
    {"target": "stop_gradient", "loss": "l1"},
    {"target": "random", "loss": "smooth_l1"},
    {"target": "random_projection", "loss": "norm_l2"},
    {"target_patches": "all", "decoder": "self"},
    {"decoder": "self", "visual_cues": False, "gap": 0},
    {"visual_cues": False, "standardize": False, "projector_depth": 0},
    {"grid": (2, 5), "num_visible": 3, "channels": 5},
    {"dtype": "bfloat16"},
    {"name": "mae", "norm_pix": False, "sampler": "checkerboard", "mask_ratio": 0.5},
    {
        "name": "pilamim",
        "align_targets": False,
        "qkv_bias": True,
        "sampler": "checkerboard2",
        "mask_ratio": 0.5,
    },
    {"name": "ijepa", "biased_masks": False, "loss": "mse"},
    {"name": "ijepa", "dtype": "bfloat16", "loss": "l1"},
]


def build(name="latent_mim", **change):
    return base.from_config({**tiny.method(name), **change}, total_steps=10, steps_per_epoch=5)


def inputs(method, batch=3):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, *method.image_size, method.channels)).astype(np.float32)
    params = jax.jit(method.init)(jax.random.key(0))
    return (
        params,
        method.target_of(params),
        images,
        method.sample(jax.random.key(1), jax.random.split(jax.random.key(2), batch)),
    )


@functools.cache
def one_step(method):
    params, target, images, views = inputs(method)
    value = jax.jit(jax.value_and_grad(method.loss_fn, argnums=(0, 1), has_aux=True))
    (loss, metrics), (grads, target_grads) = value(params, target, images, views, 3)
    return params, loss, metrics, grads, target_grads


def size(tree):
    return sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    method = build(name)
    params, loss, metrics, grads, target_grads = one_step(method)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    assert metrics["loss"] == loss
    assert all(value.shape == () and jnp.isfinite(value) for value in metrics.values())
    assert size(grads) > 0
    assert size(target_grads) == 0, "gradient reaches the target"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert 0 <= method.ema_rate(0) <= 1
    assert hash(method) == hash(dataclasses.replace(method))


@pytest.mark.parametrize("name", NAMES)
def test_views_are_drawn_per_image(name):
    method, keys = build(name), jax.random.split(jax.random.key(2), 6)
    whole, part = (
        method.sample(jax.random.key(1), keys),
        method.sample(jax.random.key(1), keys[2:4]),
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:4], b), whole, part)
    assert any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_every_switch_trains(change):
    _, loss, metrics, grads, target_grads = one_step(build(**change))
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(value) for value in metrics.values())
    assert size(grads["encoder"]) > 0
    assert size(target_grads) == 0


def test_targets_get_gradient_in_joint_training_only():
    # A prediction that does not depend on the encoder isolates the gradient through the targets.
    for target, reaches in (("joint", True), ("stop_gradient", False), ("ema", False)):
        method = build(target=target, loss="mse", similarity_weight=0.0)
        params, teacher, images, views = inputs(method)

        def of_targets(
            encoder, method=method, params=params, teacher=teacher, images=images, views=views
        ):
            return (
                method.forward({**params, "encoder": encoder}, teacher, images, views)[
                    "targets"
                ].sum()
                ** 2
            )

        assert (size(jax.jit(jax.grad(of_targets))(params["encoder"])) > 0) == reaches


def test_masked_pixels_do_not_reach_the_online_tokens_nor_visible_ones_the_target():
    method = build(target="joint")  # the one kind of target that a gradient can be asked of
    params, target, images, views = inputs(method)

    def influence(name):
        """How much each patch [B, N] moves the tokens of that name."""
        weigh = lambda tokens: (tokens * np.random.default_rng(0).normal(size=tokens.shape)).sum()
        pixels = jax.jit(jax.grad(lambda x: weigh(method.forward(params, target, x, views)[name])))(
            images
        )
        return patchify(
            np.abs(pixels), method.grid, method.patch_size, method.gap, views["offsets"]
        ).sum(-1)

    for name, seen, hidden in (("visible", "visible", "masked"), ("targets", "masked", "visible")):
        pixels = influence(name)
        assert (np.take_along_axis(np.asarray(pixels), views[seen], 1) > 0).all()
        assert (np.take_along_axis(np.asarray(pixels), views[hidden], 1) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_encoder_does_not_see_does_not_reach_predictions(name):
    method = build(name)
    params, target, images, views = inputs(method)

    def weighed(images):
        forward = method.forward(params, target, images, views)
        told = [forward[key] for key in ("pixels", "latents", "predictions") if key in forward]
        return sum((x * np.random.default_rng(0).normal(size=x.shape)).sum() for x in told)

    gradient = jax.jit(jax.grad(weighed))(images)
    gap = getattr(method, "gap", 0)
    moved = (
        patchify(np.abs(gradient), method.grid, method.patch_size, gap, views.get("offsets")).sum(
            -1
        )
        > 0
    )
    seen = np.zeros(moved.shape, bool)
    for row, visible, counts in zip(
        seen, views["visible"], views.get("visible_mask", views["visible"] >= 0), strict=True
    ):
        row[visible[counts]] = True
    np.testing.assert_array_equal(moved, seen)


def test_standardisation_matters_to_infonce_alone():
    losses = {
        loss: [one_step(build(loss=loss, standardize=on))[1] for on in (True, False)]
        for loss in ("patch_infonce", "mse")
    }
    assert losses["patch_infonce"][0] != losses["patch_infonce"][1]
    assert losses["mse"][0] == losses["mse"][1]


def test_ema_rate_follows_the_published_schedule():
    method = build()
    rates = [float(method.ema_rate(step)) for step in range(10)]
    expected = [1 - (1 - 0.01 * (1 + np.cos(np.pi * (step + 1) / 10)) / 2) for step in range(10)]
    np.testing.assert_allclose(rates, expected, atol=1e-7)
    assert float(method.ema_rate(jnp.asarray(9, jnp.int32))) < 1e-9
    assert build(target="random").ema_rate(3) == 0


def test_random_projection_never_moves():
    method = build(target="random_projection")
    params, _, _, grads, _ = one_step(method)
    assert params["target_embed"]["kernel"].shape == (48, 16)
    assert size(grads["target_embed"]) == 0


def test_features_of_any_image_size():
    method = build(depth=2)
    params, *_ = inputs(method)
    out = method.features(params, np.zeros((2, 8, 20, 3), np.float32))
    assert out["patches"].shape == out["patches_prenorm"].shape == (2, 10, 16)
    assert out["cls"].shape == (2, 16)
    assert out["block01/tokens"].shape == (2, 11, 16)
    np.testing.assert_allclose(out["block01/attention"].sum(-1), 1, rtol=1e-5)
    assert out["block01/attention"].shape == (2, 2, 11, 11)
    np.testing.assert_array_equal(out["block01/tokens"][:, 1:], out["patches_prenorm"])
