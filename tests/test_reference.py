"""The official implementations' numbers: tokens, losses, gradients and EMA of tests/reference/*.npz.

A file's prefix names the method, and tests/reference_<method>.py reads its cases. Tolerances are those the numbers were
published with: outputs rtol 2e-4, atol 2e-5; gradients rtol 2e-3, atol 2e-5.
"""

import functools
import importlib
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from lmim_jax.methods import base

OUTPUT, GRADIENT = dict(rtol=2e-4, atol=2e-5), dict(rtol=2e-3, atol=2e-5)
CASES = sorted((pathlib.Path(__file__).parent / "reference").glob("*.npz"))
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


def group(case, prefix):
    """The arrays of a case below a prefix, without it."""
    return {name.removeprefix(prefix): case[name] for name in case if name.startswith(prefix)}


@functools.cache
def run(path):
    """Run a case once: (its arrays, its reader, everything that came out of it)."""
    with np.load(path, allow_pickle=False) as file:
        case = dict(file)
    name = next(name for name in base.names() if path.stem.startswith(name))
    reader = importlib.import_module(f"reference_{name}")
    method, params, target, images, views = reader.load(case, json.loads(str(case["config_json"])))
    forward = jax.jit(method.forward)(params, target, images, views)
    value = jax.jit(jax.value_and_grad(method.loss_fn, has_aux=True))
    (loss, metrics), grads = value(params, target, images, views, 0)
    inputs = dict(method=method, params=params, target=target, images=images, views=views)
    return (
        case,
        reader,
        types.SimpleNamespace(**inputs, forward=forward, loss=loss, metrics=metrics, grads=grads),
    )


def compare(actual, expected, tolerance):
    """Assert that two trees agree in names and values."""
    actual, expected = (
        dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (actual, expected)
    )
    name = jax.tree_util.keystr
    assert {name(path) for path in actual} == {name(path) for path in expected}
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, **tolerance, err_msg=name(path))


@each_case
def test_tokens_and_losses(path):
    case, reader, ours = run(path)
    pairs = list(reader.outputs(case, ours))
    assert len(pairs) >= 3
    for actual, expected in pairs:
        assert np.shape(actual) == np.shape(expected)
        np.testing.assert_allclose(actual, expected, **OUTPUT)


@each_case
def test_gradients(path):
    case, reader, ours = run(path)
    compare(ours.grads, reader.gradients(case, ours.method), GRADIENT)


@each_case
def test_ema(path):
    case, reader, ours = run(path)
    compare(*reader.ema(case, ours), OUTPUT)
