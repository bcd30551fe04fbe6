"""No figure without meaning: sizes follow the grid, features are finite, labels say something."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import bootmae_vit_b, ijepa_vit_b, vit_b, vit_h
from lmim_jax.data import sources
from lmim_jax.data.augment.device import Augment, published_resize
from lmim_jax.data.eval import segmentation_masks
from lmim_jax.data.eval.eval_data import EvaluationData, only_labeled
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.common import image_features, patch_features
from lmim_jax.methods import base as methods
from lmim_jax.report import eval_table
from lmim_jax.train import loop, runs, workdir
from lmim_jax.train.build import build
from lmim_jax.train.collapse_metrics import make_collapse_metrics
from lmim_jax.utils.errors import UserError

MESH = sharding.make_mesh(devices=jax.devices()[:1])


def augmentation(eval_size, eval_resize=None, **change):
    """The augmentation of vit_b for images of a size."""
    config = ConfigDict({**vit_b.get_config().augment, "eval_resize": eval_resize, **change})
    return Augment.from_config(config, image_size=eval_size, eval_size=eval_size)


def completed(recipe, **change):
    """A recipe with other options of its method, as it is stored with a run."""
    config = recipe.get_config()
    config.method.update(change)
    return build(config, steps_per_epoch=1).config


@pytest.mark.parametrize(
    ("change", "resize", "visible"),
    [
        ({}, 256, 20),
        ({"grid": (24, 24)}, 439, 59),
        ({"grid": (32, 32)}, 585, 104),
        ({"grid": (14, 28)}, 256, 40),
        ({"patch_size": 20}, 320, 20),
        ({"grid": (7, 7), "num_visible": 3}, 128, 3),
    ],
)
def test_sizes_follow_the_grid(change, resize, visible):
    config = completed(vit_b, **change)
    assert config.augment.eval_resize == resize
    assert config.method.num_visible == visible


def test_masks_of_other_methods_follow_the_grid():
    assert completed(vit_h).method.num_visible == 26
    keys = ("num_visible", "block_total", "block_smallest", "block_largest")
    published = completed(bootmae_vit_b).method
    assert [published[key] for key in keys] == [49, 120, 16, 60]
    larger = completed(bootmae_vit_b, grid=(28, 28)).method
    assert [larger[key] for key in keys] == [196, 480, 64, 240]
    assert completed(ijepa_vit_b).method.context_capacity == 72
    assert completed(ijepa_vit_b, grid=(28, 28)).method.context_capacity == 288


@pytest.mark.parametrize("eval_size", [(24, 24), (24, 48), (48, 24), (20, 30), (21, 14)])
def test_every_evaluation_pixel_comes_from_the_image(eval_size):
    """Of images of any aspect ratio: constant images stay constant, to the border."""
    augment = augmentation(eval_size)
    sizes = np.array([(40, 40), (40, 13), (13, 40), (1, 40), (40, 39), (7, 7)], np.int32)
    canvases = np.zeros((len(sizes), 40, 40, 3), np.uint8)
    for canvas, (height, width) in zip(canvases, sizes, strict=True):
        canvas[:height, :width] = 200
    batch = {"image": canvases, "size": sizes}
    levels = augment.denormalize(jax.jit(augment.evaluation)(batch))
    assert levels.shape[1:3] == eval_size
    np.testing.assert_array_equal(levels, 200)
    for size in sizes:
        resized = augment.resized(size, xp=np)
        np.testing.assert_array_equal(resized, augment.resized(size))
        assert (resized >= eval_size).all()
        assert (resized * min(eval_size) <= augment.eval_resize * np.array(eval_size)).any()
        mask = np.arange(size.prod()).reshape(size)
        assert segmentation_masks.resize_and_crop(mask, augment).shape == eval_size


def test_a_square_crop_is_resized_as_torchvision_does():
    augment = augmentation((24, 24), 27)
    for height, width in ((40, 31), (31, 40), (333, 500)):
        short = min(height, width)
        expected = [27 * height // short, 27 * width // short]
        assert augment.resized(np.array((height, width)), xp=np).tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eval_size=(64, 64), eval_resize=32), "eval_resize=32 is less than the 64 pixels"),
        (dict(eval_size=(384, 384), eval_resize=256), r"set it to 439, for example"),
        (dict(eval_size=(32, 64), eval_resize=31), "eval_resize=31 is less than the 32 pixels"),
        (dict(eval_size=(8, 8), std=(0.0, 1.0, 1.0)), "each std must be above 0"),
        (dict(eval_size=(8, 8), mean=(0.5,)), "a number for each channel"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        augmentation(**change)


@pytest.mark.parametrize("channels", [1, 4])
def test_every_channel_needs_a_mean(channels):
    config = tiny.get_config()
    config.data.channels = channels
    message = f"mean and std have 3 numbers; with config.data.channels={channels} they need"
    with pytest.raises(UserError, match=message):
        build(config, steps_per_epoch=1)
    config.augment.update(mean=channels * (0.5,), std=channels * (0.2,))
    assert build(config, steps_per_epoch=1).method.channels == channels


def test_nothing_is_written_before_sizes_are_checked(images, tmp_path):
    config = tiny.get_config()
    config.data.path = str(images)
    config.method.grid = (8, 8)
    with pytest.raises(UserError, match=r"eval_resize=16 is less than the 32 pixels"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_impossible_sizes_is_evaluated_at_sizes_that_follow(images, tmp_path, caplog):
    config = tiny.get_config()
    config.data.path = str(images)
    stored = build(config, steps_per_epoch=1).config.to_dict()
    stored["augment"]["eval_resize"] = 9  # older versions took it
    (tmp_path / "config.json").write_text(json.dumps(stored))
    run = runs.open_run(tmp_path)
    assert run.config.augment.eval_resize == published_resize((16, 16)) == 18
    assert "9, less than its images of 16 pixels: 18 is used instead" in caplog.text
    workdir.check(tmp_path, build(config, steps_per_epoch=1).config.to_dict(), None)


@pytest.fixture(scope="module")
def opened(images):
    """(method, parameters, images) of the tiny recipe."""
    config = tiny.get_config()
    config.data.path = str(images)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    augment = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    data = EvaluationData(sources.open_splits(config.data), config.data, augment, MESH)
    return method, jax.jit(method.init)(jax.random.key(0)), data


def evaluate(name, method, params, data, **change):
    """The results of an evaluator."""
    section = ConfigDict({"it": {**tiny.evaluator(name), **change}})
    (one,) = base.from_config(section, steps_per_epoch=1, has_target=False)
    return one.evaluator.run(method, params, data)


@pytest.mark.parametrize(
    ("broken", "message"),
    [("weights", "the run has diverged"), ("images", "the normalized images are not")],
)
def test_features_that_are_not_finite_are_an_error_that_names_the_cause(opened, broken, message):
    method, params, data = opened
    if broken == "weights":
        params = jax.tree.map(lambda x: x * np.float32(np.nan), params)
    else:
        tiny_std = dataclasses.replace(data.augment, std=(1e-45, 1.0, 1.0))
        data = EvaluationData(data.sources, data.config, tiny_std, MESH)
    with pytest.raises(UserError, match=f"features are not finite.*{message}"):
        evaluate("knn", method, params, data)


def test_patches_that_are_not_finite_are_an_error(opened):
    method, params, data = opened
    broken = jax.tree.map(lambda x: x * np.float32(np.inf), params)
    with pytest.raises(UserError, match="features are not finite"):
        patch_features.split_patch_features(method, broken, data, "test", "patches", 16)


@pytest.mark.slow
def test_a_probe_that_diverges_measures_nothing(opened):
    method, params, data = opened
    with pytest.raises(UserError, match="linear_probe: its outputs are not finite"):
        evaluate("linear_probe", method, params, data, base_lr=1e38)


def other_images(data, root):
    """The same evaluation of a folder."""
    config = ConfigDict({**data.config, "path": str(root)})
    return EvaluationData(sources.open_splits(config), config, data.augment, MESH)


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def test_images_without_a_class_count_in_no_accuracy(opened, tmp_path):
    """Stray images are neither neighbors nor test images, whatever they are."""
    method, params, data = opened
    for split, counts in (("train", (12, 6)), ("test", (3, 1))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            for i in range(count):
                draw(
                    tmp_path / split / name / f"{i}.png",
                    i + 100 * len(split) + 50 * (name == "dog"),
                )
    found = evaluate("knn", method, params, other_images(data, tmp_path), batch_size=8)
    assert found["majority"] == 75.0
    for split in ("train", "test"):
        for i in range(3):
            draw(tmp_path / split / f"m{i}.png", i)
    stray = other_images(data, tmp_path)
    assert len(stray.sources["train"]) == 21
    assert evaluate("knn", method, params, stray, batch_size=8) == found
    chosen = only_labeled(stray).sources["train"]  # what probes train on
    assert [chosen.record(i)[1] for i in range(len(chosen))] == 12 * [0] + 6 * [1]
    assert only_labeled(data) is data
    features = image_features.labeled_features(method, params, stray, "test", "pixels", 8)
    assert features.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("name", ["knn", "logistic_regression", "fewshot", "finetune"])
@pytest.mark.parametrize("case", ["flat test", "one class", "no test"])
def test_labels_without_meaning_measure_nothing(opened, tmp_path, name, case):
    method, params, data = opened
    classes = ("cat", "dog")
    if case == "one class":
        classes = ("cat",)
    for label in classes:
        draw(tmp_path / "train" / label / "0.png", 0)
        draw(tmp_path / "train" / label / "1.png", 1)
    if case != "no test":
        draw(tmp_path / "test" / "0.png", 0)
    assert evaluate(name, method, params, other_images(data, tmp_path)) == {}


def test_one_image_per_class(opened, tmp_path):
    """Nothing is measured by an image that is compared with itself, or by more labels than said."""
    method, params, data = opened
    for split in ("train", "test"):
        for number, label in enumerate(("a", "b", "c")):
            draw(tmp_path / split / label / "0.png", number)
    few = other_images(data, tmp_path)
    assert evaluate("knn", method, params, few, k=(1, 20)).keys() == {
        "nn1",
        "knn1",
        "knn3",
        "majority",
    }
    shots = evaluate("fewshot", method, params, few, shots=(1, 2), percent=(1, 100))
    assert shots.keys() == {
        "shots1",
        "shots1_std",
        "labels100pct",
        "labels100pct_std",
        "majority",
    }


def test_one_image_has_no_collapse(opened, tmp_path):
    method, params, data = opened
    draw(tmp_path / "train" / "0.png", 0)
    alone = other_images(data, tmp_path)
    assert make_collapse_metrics(method, alone, 16)(params, {}) == {}
    assert make_collapse_metrics(method, data, 0)(params, {}) == {}
    assert np.isfinite(evaluate("visualization", method, params, alone)["seen"]).all()


def test_the_table_says_what_guessing_gives_beside_the_accuracies():
    evaluated = {**tiny.EVALUATED, "classes": 1, "images": {"train": 4, "test": 1}}
    metrics = {"a/nn1": {"trained": 80.0}, "a/majority": {"trained": 75.0}}
    table = eval_table.table(evaluated, metrics)
    assert "guessing" not in table
    assert "75.0  always the most frequent class of the test images" in table
