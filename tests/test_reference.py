"""Tokens, losses, gradients and EMA equal those of the official code in tests/reference/*.npz.

A file's prefix names the method, and tests/reference_<method>.py reads its cases. Tolerances are
those that the numbers were published with: outputs rtol 2e-4, atol 2e-5; gradients rtol 2e-3, atol
2e-5.
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

OUTPUT = dict(rtol=2e-4, atol=2e-5)
GRADIENT = dict(rtol=2e-3, atol=2e-5)
CASES = sorted((pathlib.Path(__file__).parent / "reference").glob("*.npz"))
each_case = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


def group(case, prefix):
    """The arrays of a case below a prefix, without it."""
    return {name.removeprefix(prefix): case[name] for name in case if name.startswith(prefix)}


@functools.cache
def run(path):
    """Run a case once: (its arrays, its reader, inputs and results of our method)."""
    with np.load(path, allow_pickle=False) as file:
        case = dict(file)
    name = next(name for name in base.names() if path.stem.startswith(name))
    reader = importlib.import_module(f"reference_{name}")
    method, params, target, images, views = reader.load(case, json.loads(str(case["config_json"])))
    forward = jax.jit(method.forward)(params, target, images, views)
    value = jax.jit(jax.value_and_grad(method.loss_fn, has_aux=True))
    (loss, metrics), grads = value(params, target, images, views, 0)
    ours = types.SimpleNamespace(
        method=method,
        params=params,
        target=target,
        images=images,
        views=views,
        forward=forward,
        loss=loss,
        metrics=metrics,
        grads=grads,
    )
    return case, reader, ours


def flatten(tree):
    """{path: leaf} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def compare(actual, expected, tolerance):
    """Assert that two trees agree in names and values."""
    actual = flatten(actual)
    expected = flatten(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, **tolerance, err_msg=name)


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
