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

from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.optim import adamw
from lmim_jax.train import step as train_step
from lmim_jax.train.state import TrainState

OUTPUT = dict(rtol=2e-4, atol=2e-5)
GRADIENT = dict(rtol=2e-3, atol=2e-5)
CASES = sorted((pathlib.Path(__file__).parent / "reference").glob("*.npz"))
STEP = 2e-5  # relative and absolute, of losses and weights in the steps of training
MOVEMENT = 1e-4  # |ours - theirs| / |theirs - before|, all weights together
CASES_WITH_STEPS = [path for path in CASES if path.stem.startswith(("capi", "data2vec2"))]
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


def given_draws(method, augment, rng, keys, batch):
    """In place of `step.draw`: images and views are in the batch."""
    del method, augment, rng, keys
    return batch["image"], {name: batch[name] for name in batch if name != "image"}


def deviation(ours, theirs, before):
    """|ours - theirs| / |theirs - before| of all arrays of trees together."""
    theirs = flatten(theirs)
    ours = flatten(ours)
    before = flatten(before)
    assert ours.keys() == theirs.keys() == before.keys()
    error = sum(np.square(ours[name] - theirs[name]).sum() for name in theirs)
    moved = sum(np.square(theirs[name] - before[name]).sum() for name in theirs)
    return np.sqrt(error / moved)


@pytest.mark.parametrize("path", CASES_WITH_STEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_optimizer_steps(path, devices, monkeypatch):
    """Losses and weights of a few steps of training, on one device and on several."""
    case, reader, ours = run(path)
    config = json.loads(str(case["config_json"]))
    optimizer, _ = adamw.from_config(
        reader.optimizer(config), warmup_steps=0, total_steps=config["steps"], steps_per_epoch=1
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    monkeypatch.setattr(train_step, "draw", given_draws)
    step = jax.jit(train_step.make_train_step(ours.method, None, optimizer, mesh))
    state = TrainState(
        np.int32(0), ours.params, ours.target, optimizer.init(ours.params), jax.random.key(0)
    )
    state = jax.device_put(state, sharding.replicated(mesh))  # or else the step compiles twice
    for i in range(config["steps"]):
        state, metrics = step(state, reader.batch(case, i))
        for name, expected in reader.step_losses(case, i).items():
            np.testing.assert_allclose(metrics[name], expected, rtol=STEP, err_msg=f"{name} {i}")
    pairs = zip(
        (state.params, state.target),
        reader.after(case, ours.method),
        (ours.params, ours.target),
        strict=True,
    )
    for trees in pairs:
        if hasattr(reader, "without_gradient"):
            trees = [reader.without_gradient(tree) for tree in trees]
        found, expected, before = trees
        compare(found, expected, dict(rtol=STEP, atol=STEP))
        assert deviation(found, expected, before) < MOVEMENT
