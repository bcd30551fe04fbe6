"""Training from a recipe follows the released training loops, step by step.

tests/reference/loops/METHOD.npz holds what the official PyTorch loop did to a tiny model in its 12
optimizer steps (float32): weights before and after, batches and masks of each step, and the losses,
learning rates, weight decays and momentums on the way. Here the recipe of the method, with only
sizes and lengths changed, is built and stepped as in training; batches and masks are those of the
file.
"""

import functools
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_reference import group

from lmim_jax.convert.official import base as official
from lmim_jax.distributed import sharding
from lmim_jax.optim import adamw
from lmim_jax.train import step as train_step
from lmim_jax.train.build import build

LOOPS = sorted((pathlib.Path(__file__).parent / "reference" / "loops").glob("*.npz"))
SLOW = ("bootmae", "mae", "pilamim", "pilamim_aligned")  # their programs take seconds to compile
# Softmax does not see the bias of keys: its gradient is rounding noise, which Adam enlarges
KEY_BIASES = {"/qkv/bias": (1, 3), "/kv/bias": (0, 2)}  # (part, parts) of the array
LOSS = 1e-5  # relative
ALL_WEIGHTS = 5e-4  # |ours - theirs| / |theirs - before|, all arrays together
ONE_ARRAY = 1e-2


def each(paths):
    """Parametrize a test by loops, of which some are slow to run."""
    cases = []
    for path in paths:
        marks = [pytest.mark.slow] if path.stem in SLOW else []
        cases.append(pytest.param(path, id=path.stem, marks=marks))
    return pytest.mark.parametrize("path", cases)


each_description = pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
each_run = each(LOOPS)
each_run_with_teacher = each([path for path in LOOPS if path.stem != "mae"])


@functools.cache
def load(path):
    """(arrays, config_json) of a loop."""
    with np.load(path, allow_pickle=False) as file:
        case = dict(file)
    return case, json.loads(str(case.pop("config_json")))


def recipe(c):
    """The recipe of a loop's method, with its sizes and lengths."""
    names = {"latent_mim": "vit_b"}
    name = names.get(c["method"], f"{c['method']}_vit_b")
    config = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
    grid = c.get("grid") or c["image"] // c["patch"]
    config.update(batch_size=c["bs"], micro_batches=c["accumulation"], epochs=c["epochs"])
    config.method.update(grid=(grid, grid), patch_size=c["patch"], dtype="float32")
    config.method.update(width=c["dim"], depth=c["depth"], heads=c["heads"])
    config.method.update(SIZES[c["method"]](c))
    config.optimizer.update(lr=c["lr"], warmup_epochs=float(c["warmup_epochs"]))
    if c["method"] == "pilamim":
        config.optimizer.warmup_start = 1 / c["warmup_epochs"]
    return config


SIZES = {
    "latent_mim": lambda c: dict(
        gap=c["gap"],
        decoder_width=c["ddim"],
        decoder_depth=c["ddepth"],
        decoder_heads=c["dheads"],
        projector_depth=c["nproj"],
        projector_width=c["mlp"],
        num_visible=c["numvis"],
        momentum_start=c["target_mom"],
    ),
    "mae": lambda c: dict(
        decoder_width=c["decoder_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_heads"],
    ),
    "pilamim": lambda c: dict(
        decoder_width=c["decoder_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_heads"],
        latent_decoder_width=c["latent_decoder_dim"],
        align_targets=c["aligned"],
        momentum_start=c["momentum_start"],
    ),
    "bootmae": lambda c: dict(
        decoder_width=c["decoder_dim"],
        decoder_depth=c["decoder_depth"],
        num_visible=(c["image"] // c["patch"]) ** 2 - c["mask_num"],
        block_total=c["blocks_total"],
        block_smallest=c["block_smallest"],
        block_largest=c["block_largest"],
        momentum=(c["model_ema_decay"], 0.9999, 0.99999),
    ),
    "ijepa": lambda c: dict(
        decoder_width=c["predictor_dim"],
        decoder_depth=c["predictor_depth"],
        decoder_heads=c["predictor_heads"],
        blocks=c["blocks"],
        context_capacity=(c["image"] // c["patch"]) ** 2,
        min_context=c["min_keep"],
        momentum_start=c["momentum_start"],
    ),
}


def views(method, case, step):
    """The masks of a step, as `method.sample` would draw them."""
    row = {name: array[step] for name, array in group(case, "in/").items()}
    if "context_idx" in row:
        return {
            "visible": np.maximum(row["context_idx"], 0),
            "visible_mask": row["context_idx"] >= 0,
            "targets": np.maximum(row["target_idx"], 0),
            "target_mask": row["target_idx"] >= 0,
        }
    if "visible_idx" in row:
        offsets = np.stack([row["gap_offset_y"], row["gap_offset_x"]], axis=-1)
        return {"visible": row["visible_idx"], "masked": row["masked_idx"], "offsets": offsets}
    order = row["shuffle_idx"]
    visible = getattr(method, "num_visible", 0) or int(method.num_patches * (1 - method.mask_ratio))
    found = {"visible": order[:, :visible], "masked": order[:, visible:]}
    if "target_shuffle_idx" in row and not method.align_targets:
        found["order"] = row["target_shuffle_idx"]
    return found


def given_draws(method, augment, rng, keys, batch):
    """In place of `step.draw`: images and views are in the batch."""
    del method, augment, rng, keys
    return batch["image"], {name: batch[name] for name in batch if name != "image"}


@functools.cache
def run(path):
    """Train: (parts, losses, params, teacher, teacher before the last step)."""
    case, c = load(path)
    parts = build(recipe(c), c["steps_per_epoch"])
    tree = official.from_official(parts.method, group(case, "state/"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    abstract = parts.abstract_state()
    shardings = sharding.state_sharding(abstract, mesh)
    state = abstract.replace(
        step=np.int32(0),
        params=tree["params"],
        target=tree.get("target", {}),
        opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.opt_state),
        rng=jax.random.key(0),
    )
    state = jax.device_put(state, shardings)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "draw", given_draws)
        step = parts.jit_train_step(mesh, shardings)
        for s in range(c["steps"]):
            teacher = jax.device_get(state.target)
            batch = views(parts.method, case, s)
            batch["image"] = case["in/images_nchw"][s].transpose(0, 2, 3, 1)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return parts, losses, jax.device_get(state.params), jax.device_get(state.target), teacher


@each_run
def test_losses_are_those_of_the_released_loop(path):
    case, _ = load(path)
    np.testing.assert_allclose(run(path)[1], case["out/loss"], rtol=LOSS)


@each_description
def test_schedules_are_those_of_the_released_loop(path):
    case, c = load(path)
    parts = build(recipe(c), c["steps_per_epoch"])
    optimizer = parts.config.optimizer
    assert {name: optimizer[name] for name in ("b1", "b2", "eps")} == {
        name: c["optimizer"][name] for name in ("b1", "b2", "eps")
    }
    steps = np.arange(c["steps"])
    learning_rate, weight_decay = adamw.make_schedules(
        optimizer,
        warmup_steps=c["warmup_epochs"] * c["steps_per_epoch"],
        total_steps=parts.total_steps,
        steps_per_epoch=c["steps_per_epoch"],
    )
    for schedule in (learning_rate, parts.learning_rate):
        np.testing.assert_allclose(
            [schedule(step) for step in steps], case["out/lr"], rtol=2e-6, atol=1e-12
        )
    decays = [weight_decay(step) for step in steps]
    np.testing.assert_allclose(decays, case["out/weight_decay"], rtol=2e-6)
    if "out/momentum" in case:
        # Latent MIM's teacher is updated before a step, and ours after the step before it
        ahead = 1 if c["method"] == "latent_mim" else 0
        momentum = [1 - parts.method.ema_rate(step) for step in steps[: len(steps) - ahead]]
        np.testing.assert_allclose(momentum, case["out/momentum"][ahead:], rtol=1e-6)


@each_description
def test_names_shapes_and_positions_are_those_of_the_released_code(path):
    case, c = load(path)
    official.check(build(recipe(c), c["steps_per_epoch"]).method, group(case, "state/"))


@each_description
def test_the_same_parameters_are_decayed(path):
    _, c = load(path)
    parts = build(recipe(c), c["steps_per_epoch"])
    params = jax.eval_shape(parts.method.init, jax.random.key(0))
    rules = parts.config.optimizer.decay_rules
    decayed = flatten_dict({"params": adamw.match_rules(rules, params, "")}, sep="/")
    found = []
    for name, entry in official.entries(parts.method).items():
        if decayed.get(entry.path):
            found.append(name)
    assert sorted(found) == sorted(c["decayed"])


def without_key_bias(path, array):
    """An array of the tree, without its part that is the bias of keys."""
    for ending, (part, parts) in KEY_BIASES.items():
        if path.endswith(ending):
            return np.delete(np.split(array, parts), part, axis=0)
    return array


def deviations(ours, theirs, before, has_key_biases):
    """{path: (|ours - theirs|^2, |theirs - before|^2)}, without the biases of keys."""
    ours = flatten_dict(ours, sep="/")
    before = flatten_dict(before, sep="/")
    theirs = flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    found = {}
    for path, expected in theirs.items():
        error = ours[path] - expected
        moved = expected - before[path]
        if has_key_biases:
            error = without_key_bias(path, error)
            moved = without_key_bias(path, moved)
        found[path] = (np.square(error).sum(), np.square(moved).sum())
    return found


def check_weights(ours, theirs, before, c):
    found = deviations(ours, theirs, before, has_key_biases=c["method"] != "bootmae")
    error, moved = np.sum(list(found.values()), axis=0)
    assert np.sqrt(error / moved) < ALL_WEIGHTS
    for path, (error, moved) in found.items():
        assert np.sqrt(error) <= ONE_ARRAY * np.sqrt(moved), path


@each_run
def test_weights_end_where_the_released_loop_ends(path):
    case, c = load(path)
    parts, _, params, _, _ = run(path)
    before = official.from_official(parts.method, group(case, "state/"))["params"]
    after = official.from_official(parts.method, group(case, "after/"))["params"]
    check_weights(params, after, before, c)


@each_run_with_teacher
def test_the_teacher_ends_where_that_of_the_released_loop_ends(path):
    case, c = load(path)
    parts, _, _, target, earlier = run(path)
    if c["method"] == "latent_mim":  # its file has the teacher that made the last step's targets
        target = earlier
    prefix = "ema." if c["method"] == "bootmae" else "target_encoder."
    named = {f"{prefix}{name}": array for name, array in group(case, "ema/").items()}
    before = official.from_official(parts.method, group(case, "state/"))["target"]
    after = official.from_official(parts.method, named)["target"]
    check_weights(target, after, before, c)
