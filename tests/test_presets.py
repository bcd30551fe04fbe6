"""Presets of evaluation against published numbers; what recipes are evaluated by; crops of MAE."""

import dataclasses
import functools
import importlib
import json
import pathlib
import re
import types

import annotated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lmim_jax.cli import evaluate as command
from lmim_jax.configs import evaluate, vit_b
from lmim_jax.data.augment.device import Augment, SingleTry
from lmim_jax.evaluators import base
from lmim_jax.evaluators.common.probe_training import Length
from lmim_jax.train import runs
from lmim_jax.utils.errors import UserError

HERE = pathlib.Path(__file__).parent
PAGE = (HERE.parent / "docs" / "evaluation.md").read_text()
STORED_CONFIG = HERE / "data" / "config_0_1.json"  # of a run of version 0.1
IMAGES = 1_281_167  # of ImageNet-1k, for training
SIZES = "BLH"


def preset(name, size="B"):
    return evaluate.get_config(f"{name},{size}")


def evaluators(section):
    """The settings of a section, each an evaluator with one value in each field."""
    config = ConfigDict({"it": section})
    base.fill_in(config, vit_b.representation())
    (scheduled,) = base.from_config(config, steps_per_epoch=1, has_target=False)
    if hasattr(scheduled.evaluator, "settings"):
        return scheduled.evaluator.settings()
    return [scheduled.evaluator]


def rates(probe, images=IMAGES):
    """(steps, learning rate as a function of the step) on so many training images."""
    steps = probe.total_steps
    per_epoch = steps / probe.epochs
    if not steps:
        per_epoch = images // probe.batch_size
        steps = round(probe.epochs * per_epoch)
    return steps, per_epoch, probe.learning_rate(probe.base_lr, Length(steps, per_epoch))


@pytest.mark.parametrize(("size", "epochs"), [("B", 90), ("L", 50), ("H", 50)])
def test_linear_probe_of_mae(size, epochs):
    """Paper (arXiv 2111.06377), table 10; main_linprobe.py and FINETUNE.md of the repository."""
    (probe,) = evaluators(preset("imagenet", size).linear_probe)
    assert (probe.batch_size, probe.epochs, probe.warmup_epochs) == (16384, epochs, 10)
    assert (probe.base_lr, probe.min_lr, probe.weight_decay, probe.momentum) == (0.1, 0, 0, 0.9)
    assert (probe.scale, probe.ratio, probe.flip) == ((0.08, 1), (3 / 4, 4 / 3), True)
    assert (probe.crop_tries, probe.interpolation, probe.normalize) == (1, "bicubic", True)
    assert probe.trust_coefficient == 1e-3
    steps, per_epoch, rate = rates(probe)
    assert per_epoch == 78
    middle = (780 + steps) // 2
    found = [float(rate(step)) for step in (0, 390, 780, middle, steps)]
    assert found == pytest.approx([0, 3.2, 6.4, 3.2, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("size", "epochs", "base_lr", "layer_decay", "drop_path"),
    [("B", 100, 5e-4, 0.65, 0.1), ("L", 50, 1e-3, 0.75, 0.2), ("H", 50, 1e-3, 0.75, 0.3)],
)
def test_finetuning_of_mae(size, epochs, base_lr, layer_decay, drop_path):
    """FINETUNE.md and main_finetune.py of the repository."""
    (probe,) = evaluators(preset("imagenet", size).finetune)
    assert (probe.batch_size, probe.epochs, probe.warmup_epochs) == (1024, epochs, 5)
    assert (probe.base_lr, probe.min_lr) == (base_lr, 1e-6)
    assert (probe.layer_decay, probe.drop_path) == (layer_decay, drop_path)
    assert (probe.weight_decay, probe.b1, probe.b2) == (0.05, 0.9, 0.999)
    assert (probe.mixup, probe.cutmix, probe.switch, probe.erasing) == (0.8, 1, 0.5, 0.25)
    assert (probe.randaugment, probe.label_smoothing) == ((2, 9, 0.5), 0.1)
    assert (probe.scale, probe.flip, probe.interpolation) == ((0.08, 1), True, "bicubic")
    steps, per_epoch, rate = rates(probe)
    assert per_epoch == 1251
    found = [float(rate(step)) for step in (0, 5 * 1251, steps)]
    assert found == pytest.approx([0, 4 * base_lr, 1e-6], rel=1e-5)


def test_attentive_probe_of_capi():
    """Paper (arXiv 2502.08769) and the classification probe of the repository."""
    settings = evaluators(preset("imagenet").attentive_probe)
    grid = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    assert len(settings) == 30
    assert {one.base_lr for one in settings} == set(grid)
    assert {one.weight_decay for one in settings} == {5e-4, 1e-3, 5e-2}
    probe = settings[0]
    assert (probe.b1, probe.b2, probe.held_out, probe.batch_size) == (0.9, 0.95, 0.1, 1024)
    assert (probe.scale, probe.flip, probe.interpolation) == ((0.08, 1), True, "bicubic")
    for images in (IMAGES, 5000):
        steps, _, rate = rates(probe, images)
        found = [float(rate(step)) for step in (0, 1250, steps)]
        assert steps == 12_500
        assert found == pytest.approx([0, 4e-5, 0], rel=1e-5, abs=1e-11)


@pytest.mark.parametrize(("size", "last"), [("B", 11), ("L", 23), ("H", 31)])
def test_linear_probe_of_ijepa(size, last):
    """Paper (arXiv 2301.08243), appendix A.2."""
    settings = evaluators(preset("ijepa", size).linear_probe)
    assert len(settings) == 24
    assert {one.base_lr for one in settings} == {0.01, 0.05, 0.001}
    assert {one.weight_decay for one in settings} == {5e-4, 0}
    assert {one.normalize for one in settings} == {True, False}
    four = "+".join(f"block{block:02d}/normed" for block in range(last - 3, last)) + "+patches"
    assert {one.feature for one in settings} == {"patches", four}
    probe = settings[0]
    assert (probe.batch_size, probe.epochs, probe.warmup_epochs) == (16384, 50, 0)
    steps, per_epoch, rate = rates(probe)
    peak = probe.base_lr * 64
    found = [float(rate(per_epoch * epoch)) for epoch in (0, 14.9, 15, 30, 45)]
    assert found == pytest.approx([peak, peak, peak / 10, peak / 100, peak / 1000])
    assert steps == 50 * 78


def test_the_last_four_layers_are_normed_tokens_of_the_encoder():
    recipe = importlib.import_module("lmim_jax.configs.ijepa_vit_b").get_config()
    blocks = preset("ijepa").linear_probe.feature.split(" | ")[1].split("+")
    assert int(blocks[-2][5:7]) == recipe.method.depth - 2
    assert recipe.representation.weights == "target"


def shown(value):
    """A value as the tables of the page have it."""
    if isinstance(value, tuple | list):
        return ", ".join(shown(one) for one in value)
    if isinstance(value, bool | str):
        return str(value)
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}" if value < 1e5 else str(value)


@pytest.mark.parametrize("name", ["imagenet", "ijepa"])
def test_the_table_of_the_documentation_has_the_numbers_of_the_presets(name):
    (table,) = re.findall(rf"`--config=evaluate:{name}`[^|]*((?:^\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
    keys = []
    for key, ours, *_ in rows[2:]:
        found = {}
        for size in SIZES:
            value = preset(name, size)
            for part in key.strip("`").split("."):
                value = value[part]
            found[size] = shown(value)
        values = [found["B"]] if len(set(found.values())) == 1 else [found[size] for size in SIZES]
        assert ours == " / ".join(values).replace("|", "or"), key
        keys.append(key.strip("`"))
    changed = set()
    for section in ("linear_probe", "attentive_probe", "finetune"):
        before = evaluate.get_config("evaluators" if name == "imagenet" else "imagenet")[section]
        for key, value in preset(name)[section].items():
            if value != before[key]:
                changed.add(f"{section}.{key}")
    assert changed <= set(keys)


@pytest.mark.parametrize(
    ("which", "message"),
    [("imagnet", "did you mean imagenet"), ("imagenet,XL", "'XL' must be one of: B | L | H")],
)
def test_unknown_presets_are_named(which, message):
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate.get_config(which)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_b", ("online", "patches_prenorm", "patches_prenorm")),
        ("mae_vit_b", ("online", "cls", "patches_prenorm")),
        ("ijepa_vit_b", ("target", "patches", "patches")),
        ("pilamim_vit_b", ("online", "cls", "patches_prenorm")),
        ("bootmae_vit_b", ("online", "block09/tokens", "patches_prenorm")),
        ("symmim_vit_b", ("online", "patches", "patches")),
    ],
)
def test_every_tool_takes_what_the_recipe_is_evaluated_by(name, expected):
    recipe = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
    weights, image, patches = expected
    assert recipe.representation.to_dict() == {
        "weights": weights,
        "image": image,
        "patches": patches,
    }
    run = types.SimpleNamespace(config=recipe, exported=None, has_target=True)
    titles = ["knn", "linear_probe", "attentive_probe", "finetune", "segmentation"]
    config = evaluate.get_config()
    sections = {title: config[title] for title in titles}
    scheduled = command.build_evaluators(run, sections, None, None)
    assert {one.weights for one in scheduled} == {weights}
    features = [getattr(one.evaluator, "feature", None) for one in scheduled]
    assert features == [image, image, patches, None, patches]
    assert sections["knn"].feature == image  # as it is stored
    config = evaluate.get_config()
    sections = {title: config[title] for title in titles}
    scheduled = command.build_evaluators(run, sections, "online", "cls+patches")
    assert {one.weights for one in scheduled} == {"online"}
    features = [getattr(one.evaluator, "feature", None) for one in scheduled]
    assert features == ["cls+patches", "cls+patches", patches, None, "cls+patches"]
    opened = runs.Run(pathlib.Path("run"), recipe, None)
    assert opened.choose_weights(None) == weights
    assert opened.choose_weights("online") == "online"


def test_an_older_run_is_evaluated_by_what_its_evaluators_measured(tmp_path):
    content = json.loads(STORED_CONFIG.read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert runs.read_config(tmp_path)["representation"] == vit_b.representation().to_dict()
    for section in content["evaluators"].values():
        section.update(params="target", feature="patches")
    path.write_text(json.dumps(content))
    assert runs.read_config(tmp_path)["representation"] == {
        "weights": "target",
        "image": "patches",
        "patches": "patches",
    }


def augmentation(**change):
    options = {**vit_b.get_config().augment, "eval_resize": 8, **change}
    return Augment.from_config(options, image_size=(8, 8), eval_size=(8, 8))


def test_crops_of_one_try_are_cut_to_the_image():
    """MAE's util/crop.py: one shape, min(side, side of the image), then a uniform position."""
    plain = augmentation(scale=(0.5, 1.0), ratio=(1.0, 4.0))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    single = SingleTry(**fields)
    size = np.array([20, 40])
    draws = jax.vmap(single.draw)(jax.random.split(jax.random.key(0), 200))
    box = functools.partial(single.crop_box, size=jnp.asarray(size), longest=64)
    boxes = np.asarray(jax.vmap(box)(draws))
    expected = np.minimum(np.rint(np.asarray(draws["sides"])[..., 0] * np.sqrt(20 * 40)), size)
    np.testing.assert_array_equal(boxes[:, 2:], expected)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()
    assert 20 < (boxes[:, 2] == 20).sum() < 200  # cut off
    free = boxes[boxes[:, 2] < 20]
    assert len(set(free[:, 0].tolist())) > 3


def test_test_images_are_resampled_as_the_probe_says():
    data = annotated.evaluation(grid=(2, 2))
    canvas = {
        "image": np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8),
        "size": np.array([[16, 12]], np.int32),
    }
    before = data._transform(canvas)
    other = data.with_augment(dataclasses.replace(data.augment, interpolation="bicubic"))
    np.testing.assert_array_equal(other._transform(canvas), other.augment.evaluation(canvas))
    assert np.abs(other._transform(canvas) - before).max() > 0
    np.testing.assert_array_equal(data._transform(canvas), before)
