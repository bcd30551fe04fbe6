"""Targets: their sources and layers, the same for Latent MIM, I-JEPA and PiLaMIM."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmim_jax.methods import base
from lmim_jax.methods.common import targets
from lmim_jax.models.layers import patchify
from lmim_jax.train import loop, runs
from lmim_jax.train.checkpoints import read_weights
from lmim_jax.utils.errors import UserError

METHODS = ("latent_mim", "ijepa", "pilamim")


def method(name, **change):
    """A tiny method; Latent MIM without projector, which some targets do not have."""
    options = {**tiny.method(name), "depth": 2}
    if "projector_depth" in options:
        options["projector_depth"] = 0
    return base.from_config({**options, **change}, total_steps=10, steps_per_epoch=5)


def batch(found):
    """Two noise images, and the views of them."""
    keys = jax.random.split(jax.random.key(1), 2)
    images = jax.random.normal(jax.random.key(2), (2, *found.image_size, 3))
    return images, found.sample(jax.random.key(3), keys)


@pytest.mark.parametrize("source", targets.SOURCES[:-1])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_every_source(name, source):
    change = {"target": source}
    if name == "pilamim" and source == "random_projection":
        change["cls_weight"] = 0.0  # there is no CLS
    found = method(name, **change)

    def loss():
        params = found.init(jax.random.key(0))
        images, views = batch(found)
        return found.loss_fn(params, found.target_of(params), images, views, 0)[0]

    assert jax.eval_shape(loss).shape == ()
    assert (found.ema_rate(0) == 0) == (source != "ema")
    params = jax.eval_shape(found.init, jax.random.key(0))
    wanted = {"ema": True, "random": True}
    assert ("encoder" in found.target_of(params)) == wanted.get(source, False)
    assert ("target_embed" in params) == (source == "random_projection")


@pytest.mark.parametrize("source", ["joint", "stop_gradient"])
def test_only_joint_targets_have_a_gradient(source):
    found = method("ijepa", target=source)
    params = found.init(jax.random.key(0))

    def of_targets(params):
        teacher = found.teacher(params, found.target_of(params))
        images, _ = batch(found)
        patches = patchify(images, found.grid, found.patch_size)
        return (found.encode_targets(teacher, patches) ** 3).sum()

    gradient = jax.jit(jax.grad(of_targets))(params)
    norm = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient))
    assert (norm > 0) == (source == "joint")


def standardize(tokens, axis):
    """To mean 0 and variance 1 along an axis, in numpy."""
    tokens = np.asarray(tokens, np.float64)
    centered = tokens - tokens.mean(axis, keepdims=True)
    if axis == 1:  # over patches: an unbiased deviation, as elsewhere in Latent MIM
        return centered / (tokens.std(axis, ddof=1, keepdims=True) + 1e-4)
    return centered / np.sqrt(tokens.var(axis, keepdims=True) + 1e-5)


@pytest.mark.parametrize(("norm", "axis"), [("layer", 2), ("instance", 1), ("none", None)])
def test_layers_are_standardized_and_joined(norm, axis):
    layers = (0, 1)
    joined = {}
    for combine in ("concat", "mean"):
        found = method("ijepa", target_layers=layers, target_norm=norm, target_combine=combine)
        params = found.init(jax.random.key(0))
        images, _ = batch(found)
        patches = patchify(images, found.grid, found.patch_size)
        joined[combine] = jax.jit(found.encode_targets)(params, patches)
        assert joined[combine].shape == (2, found.num_patches, found.target_width)
    features = jax.jit(found.features)(params, images)
    expected = []
    for layer in layers:
        tokens = features[f"block{layer:02d}/tokens"]
        expected.append(tokens if axis is None else standardize(tokens, axis))
    np.testing.assert_allclose(joined["concat"], np.concatenate(expected, -1), atol=1e-4)
    np.testing.assert_allclose(joined["mean"], np.mean(expected, 0), atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_predictions_are_as_wide_as_targets(name):
    found = method(name, target_layers=(0, 1), dtype="float32")
    assert found.target_width == 2 * found.width

    def forward():
        params = found.init(jax.random.key(0))
        images, views = batch(found)
        return found.forward(params, found.target_of(params), images, views)

    tokens = jax.eval_shape(forward)
    predicted = tokens["latents" if name == "pilamim" else "predictions"]
    assert predicted.shape[-1] == tokens["targets"].shape[-1] == found.target_width


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ijepa", {"target": "teacher"}, "target='teacher' must be one of"),
        ("ijepa", {"target": "frozen"}, "needs a run: give frozen:RUN"),
        ("ijepa", {"target_layers": (0, 2)}, "target_layers=2 is out of range: it must be 0 .. 1"),
        ("ijepa", {"target_norm": "batch"}, "target_norm='batch' must be one of"),
        (
            "ijepa",
            {"target": "random_projection", "target_layers": (0,)},
            "random_projection has no layers",
        ),
        ("pilamim", {"target": "random_projection"}, "cls_weight=1: these targets have no CLS"),
        ("latent_mim", {"target_layers": (0,), "projector_depth": 1}, "give 0"),
    ],
)
def test_what_does_not_fit_is_named(name, change, message):
    with pytest.raises(UserError, match=message):
        method(name, **change)


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """A run of MAE with its first checkpoint; its encoder has other sizes than the student's."""
    config = recipe(images, "mae")
    config.method.update(width=24, depth=3)
    return tiny.run(config, tmp_path_factory.mktemp("teacher"))


def recipe(images, name, **change):
    """Two steps without evaluations."""
    config = tiny.get_config()
    config.method = tiny.method(name)
    config.data.path = str(images)
    config.evaluators = {}
    config.update(total_steps=2, log_every=1)
    config.update_from_flattened_dict(change)
    return config


def frozen(tree):
    """The weights of the frozen teacher, flat."""
    return runs.flatten_params(tree["frozen"])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_a_frozen_teacher_is_the_encoder_of_another_run(images, teacher, tmp_path, layers):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    change = {"method.target": f"frozen:{folder}", "method.target_layers": layers}
    change["method.projector_depth"] = 0
    make = functools.partial(recipe, images, "latent_mim", **change)
    loop.train(make(), tmp_path / "run")
    source = runs.open_run(folder)
    expected = runs.flatten_params(source.params["encoder"])
    shutil.rmtree(folder)
    student = runs.open_run(tmp_path / "run")  # without the other run
    assert student.method.frozen == source.method
    assert not student.has_target  # its encoder is not one to evaluate
    _, target = read_weights(tmp_path / "run", student.method, 2)
    found = frozen(target)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["method"]["frozen"]["name"] == "mae"
    with pytest.raises(UserError, match=r"config\.method\.target=frozen:.*is not a run"):
        loop.train(make(), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method.patch_size": 2}, r"that run has patch_size=4, this one 2"),
        ({"augment.mean": (0.5, 0.5, 0.5)}, r"has augment\.mean=\(0\.4.*give --config\.augment"),
    ],
)
def test_a_frozen_teacher_takes_the_same_images(images, teacher, tmp_path, change, message):
    change = {"method.target": f"frozen:{teacher}", "method.projector_depth": 0, **change}
    with pytest.raises(UserError, match=message):
        loop.train(recipe(images, "latent_mim", **change), tmp_path / "run")
