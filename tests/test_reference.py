"""The official implementations' numbers: tokens, losses, gradients and EMA of tests/reference/*.npz.

A file's prefix names the method, tests/reference_<method>.py reads its cases. Tolerances are those the numbers were
published with: outputs rtol 2e-4, atol 2e-5; gradients rtol 2e-3, atol 2e-5.
"""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import reference_latent_mim
import reference_mae

from lmim_jax import step
from lmim_jax.methods import base
from lmim_jax.models.layers import patchify, sincos_positions

FOLDER = pathlib.Path(__file__).parent / "reference"
LATENT_MIM, MAE = (sorted(FOLDER.glob(f"{name}*.npz")) for name in ("latent_mim", "mae"))
OUTPUT, GRADIENT = dict(rtol=2e-4, atol=2e-5), dict(rtol=2e-3, atol=2e-5)


def read(path):
    """(arrays of a case, its config)."""
    with np.load(path, allow_pickle=False) as file:
        case = dict(file)
    return case, json.loads(str(case["config_json"]))


def group(case, prefix):
    """The arrays of a case below a prefix, without it."""
    return {name.removeprefix(prefix): case[name] for name in case if name.startswith(prefix)}


@functools.cache
def latent_mim(path):
    """Run a case once: (case, config, EMA'd target, forward, loss, metrics, gradients, patches)."""
    case, config = read(path)
    method, params, target, images, views = reference_latent_mim.load(case, config)
    target = step.update_target(target, method.target_of(params), method.ema_rate(0))
    forward = jax.jit(method.forward)(params, target, images, views)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(params, target, images, views, 0)
    patches = patchify(images, method.grid, method.patch_size, method.gap, views.get("offsets"))
    return case, config, target, forward, loss, metrics, grads, patches


def compare(actual, expected, tolerance):
    """Assert that two trees agree in names and values."""
    actual, expected = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (actual, expected))
    name = jax.tree_util.keystr
    assert {name(path) for path in actual} == {name(path) for path in expected}
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, **tolerance, err_msg=name(path))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_every_case_has_a_reader(path):
    method = next((name for name in base.names() if path.stem.startswith(name)), None)
    if method is None:
        pytest.skip(f"no method in lmim_jax/methods/ that {path.name} is a case of")
    assert importlib.util.find_spec(f"reference_{method}"), "write one beside reference_latent_mim.py"


@pytest.mark.parametrize("path", LATENT_MIM, ids=lambda path: path.stem)
class TestLatentMIM:
    def test_inputs(self, path):
        case, config, *_, patches = latent_mim(path)
        np.testing.assert_array_equal(patches, case["mid/patches"])
        table = case["state/encoder.pos_embed.pos_embeds"]
        positions = sincos_positions((config["grid"],) * 2, config["dim"])
        np.testing.assert_allclose(positions, table[-len(positions) :], atol=1e-5)

    def test_tokens(self, path):
        case, _, _, forward, *_ = latent_mim(path)
        np.testing.assert_allclose(forward["visible"], case["out/encoder_tokens"], **OUTPUT)
        np.testing.assert_allclose(forward["targets"], case["out/target_tokens"], **OUTPUT)
        np.testing.assert_allclose(forward["predictions"], case["out/decoder_tokens"], **OUTPUT)

    def test_loss(self, path):
        case, _, _, _, loss, metrics, *_ = latent_mim(path)
        np.testing.assert_allclose(loss, case["out/loss"], **OUTPUT)
        for ours, theirs in (("predictions", "pred"), ("visible", "vis"), ("targets", "trg")):
            np.testing.assert_allclose(metrics[f"similarity_{ours}"], case[f"out/avg_sim_{theirs}"], **OUTPUT)

    def test_gradients(self, path):
        case, _, _, _, _, _, grads, _ = latent_mim(path)
        expected = group(case, "grad/")
        expected = reference_latent_mim.tree(expected)
        compare(grads, expected, GRADIENT)

    def test_ema(self, path):
        case, _, target, *_ = latent_mim(path)
        ema = {f"encoder.{name}": value for name, value in group(case, "ema/").items()}
        compare(target, reference_latent_mim.tree(ema), OUTPUT)


@pytest.mark.parametrize("path", MAE, ids=lambda path: path.stem)
def test_mae(path):
    case, config = read(path)
    method, params, images, views = reference_mae.load(case, config)
    pixels = jax.jit(method.forward)(params, {}, images, views)["pixels"]
    order = np.concatenate([views["visible"], views["masked"]], axis=1)
    np.testing.assert_allclose(pixels, np.take_along_axis(case["out/pred"], order[..., None], 1), **OUTPUT)
    assert (np.take_along_axis(case["out/mask"], views["masked"], 1) == 1).all()
    (loss, _), grads = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(params, {}, images, views, 0)
    np.testing.assert_allclose(loss, case["out/loss"], **OUTPUT)
    compare(grads, reference_mae.tree(group(case, "grad/")), GRADIENT)
