"""Every file of methods/ fulfills the interface; all options have the documented effect."""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lmim_jax.methods
from lmim_jax.methods import base
from lmim_jax.models.layers import patchify

NAMES = base.names()
OPTIONS = [  # each value of each option at least once
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
    {"name": "capi", "rope": "capi", "drop_path": 0.5, "sampler": "block", "positionwise": False},
    {"name": "capi", "dtype": "bfloat16", "sampler": "random", "roll": False, "registers": 0},
    {"name": "data2vec2", "dtype": "bfloat16", "registers": 2, "masks_per_image": 1},
    pytest.param(
        {
            "name": "data2vec2",
            "target": "random_projection",
            "cls_weight": 0.0,
            "decoder_kernel": 2,
        },
        marks=pytest.mark.slow,
    ),
    {"name": "symmim", "dtype": "bfloat16", "registers": 2, "cell": 2, "momentum_cell": 1},
    {"name": "interactive_mim", "predict": "latents", "modality_masks": "joint"},
    pytest.param(
        {"name": "symmim", "contrast_weight": 0.0, "decoder_depth": 2, "predictor_depth": 1},
        marks=pytest.mark.slow,
    ),
]


def build(name="latent_mim", **change):
    return base.from_config({**tiny.method(name), **change}, total_steps=10, steps_per_epoch=5)


def inputs(method, batch=3):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, *method.image_size, method.channels)).astype(np.float32)
    params = jax.jit(method.init)(jax.random.key(0))
    views = jax.jit(method.sample)(jax.random.key(1), jax.random.split(jax.random.key(2), batch))
    return params, method.target_of(params), images, views


@functools.cache
def one_step(method):
    params, target, images, views = inputs(method)
    value = jax.jit(jax.value_and_grad(method.loss_fn, argnums=(0, 1), has_aux=True))
    (loss, metrics), (grads, target_grads) = value(params, target, images, views, 3)
    return params, loss, metrics, grads, target_grads


def size(tree):
    return sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(jax.device_get(tree)))


def test_files_are_registered_and_sub_packages_are_shared(tmp_path, monkeypatch):
    folder = pathlib.Path(base.__file__).parent
    files = {path.stem for path in folder.glob("*.py")}
    assert set(NAMES) == files - {"__init__", "base"}
    assert (folder / "common" / "__init__.py").is_file()

    (tmp_path / "new_method.py").write_text("from lmim_jax.methods.mae import Method\n")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").write_text("")
    monkeypatch.setattr(lmim_jax.methods, "__path__", [*lmim_jax.methods.__path__, str(tmp_path)])
    assert set(base.names()) == {*NAMES, "new_method"}
    config = {**tiny.method("mae"), "name": "new_method"}
    method = base.from_config(config, total_steps=1, steps_per_epoch=1)
    assert method == build("mae")


@pytest.mark.parametrize("name", NAMES)
def test_methods_have_all_of_the_protocol_and_no_default_values(name):
    method_class = importlib.import_module(f"lmim_jax.methods.{name}").Method
    fields = {field.name: field for field in dataclasses.fields(method_class)}
    for member in vars(base.Method):
        if not member.startswith("_"):
            assert member in fields or hasattr(method_class, member), member
    for field in fields.values():
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name


def test_only_methods_with_schedules_take_the_length_of_the_run():
    lengths = {
        "bootmae": (10, 5),
        "capi": (10, 0),
        "data2vec2": (10, 0),
        "ijepa": (10, 0),
        "interactive_mim": (10, 0),
        "latent_mim": (10, 0),
        "mae": (0, 0),
        "pilamim": (10, 0),
        "symmim": (10, 0),
    }
    for name, expected in lengths.items():
        method = build(name)
        found = (getattr(method, "total_steps", 0), getattr(method, "steps_per_epoch", 0))
        assert found == expected, name


@pytest.mark.parametrize("name", NAMES)
def test_interface(name):
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
    method = build(name)
    keys = jax.random.split(jax.random.key(2), 6)
    whole = method.sample(jax.random.key(1), keys)
    part = method.sample(jax.random.key(1), keys[2:4])
    rows = getattr(method, "masks_per_image", 1)  # of an image
    first = 2 * rows
    last = 4 * rows
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[first:last], b), whole, part)
    differ = any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(whole))
    assert differ == (name != "symmim")  # whose masks are fixed


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_every_option_trains(change):
    _, loss, metrics, grads, target_grads = one_step(build(**change))
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(value) for value in metrics.values())
    assert size(grads["encoder"]) > 0
    assert size(target_grads) == 0


def squared_sum_of_targets(method, params, teacher, images, views, encoder):
    forward = method.forward({**params, "encoder": encoder}, teacher, images, views)
    return forward["targets"].sum() ** 2


def test_targets_get_gradient_in_joint_training_only():
    # A prediction that does not depend on the encoder isolates the gradient through the targets.
    for target, reaches in (("joint", True), ("stop_gradient", False), ("ema", False)):
        method = build(target=target, loss="mse", similarity_weight=0.0)
        params, teacher, images, views = inputs(method)

        squared_sum = functools.partial(
            squared_sum_of_targets, method, params, teacher, images, views
        )
        gradient = jax.jit(jax.grad(squared_sum))(params["encoder"])
        assert (size(gradient) > 0) == reaches


def test_online_tokens_depend_on_visible_pixels_and_targets_on_masked_ones():
    method = build(target="joint")  # the only kind of target with a gradient
    params, target, images, views = inputs(method)

    def influence(name):
        """How much each patch [B, N] moves the tokens of that name."""

        def weighted_sum(images):
            tokens = method.forward(params, target, images, views)[name]
            return (tokens * np.random.default_rng(0).normal(size=tokens.shape)).sum()

        pixels = np.abs(jax.jit(jax.grad(weighted_sum))(images))
        patches = patchify(pixels, method.grid, method.patch_size, method.gap, views["offsets"])
        return patches.sum(-1)

    for name, seen, hidden in (("visible", "visible", "masked"), ("targets", "masked", "visible")):
        pixels = influence(name)
        assert (np.take_along_axis(np.asarray(pixels), views[seen], 1) > 0).all()
        assert (np.take_along_axis(np.asarray(pixels), views[hidden], 1) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_predictions_depend_on_visible_patches_only(name):
    method = build(name)
    if not hasattr(method, "forward"):
        pytest.skip("without `forward`, predictions are not seen")
    params, target, images, views = inputs(method)

    def weighted_sum(images):
        forward = method.forward(params, target, images, views)
        total = 0.0
        for key in ("pixels", "latents", "predictions"):
            if key in forward:
                weights = np.random.default_rng(0).normal(size=forward[key].shape)
                total += (forward[key] * weights).sum()
        return total

    gradient = np.abs(jax.jit(jax.grad(weighted_sum))(images))
    gap = getattr(method, "gap", 0)
    patches = patchify(gradient, method.grid, method.patch_size, gap, views.get("offsets"))
    influential = patches.sum(-1) > 0
    expected = np.zeros(influential.shape, bool)
    masks = views.get("visible_mask", views["visible"] >= 0)
    rows = np.arange(len(masks)) * len(images) // len(masks)  # of images, for each mask
    for row, visible, mask in zip(rows, views["visible"], masks, strict=True):
        expected[row, visible[mask]] = True
    np.testing.assert_array_equal(influential, expected)


def test_standardization_changes_infonce_only():
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


def test_random_projection_never_changes():
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
