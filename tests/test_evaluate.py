"""lmim evaluate: a run opened, its features cached, one table and one JSON file, and what it says to bad input."""

import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import conftest
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import lmim_jax
from lmim_jax.cli import evaluate
from lmim_jax.configs import evaluate as recipe
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base
from lmim_jax.evaluators.common.feature_cache import FeatureCache
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.report import eval_table
from lmim_jax.train import runs, workdir
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.state import create_state

ROOT = pathlib.Path(conftest.ROOT)
MESH = sharding.make_mesh(devices=jax.devices()[:1])  # compiles faster
KNN = "knn.k=(1,3)", "knn.batch_size=16"


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """A run that has saved step 3, as good as untrained: (folder, its state)."""
    config, folder = tiny.get_config(), tmp_path_factory.mktemp("made")
    config.data.path = str(images)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    optimizer, _ = adamw.from_config(config.optimizer, warmup_steps=1, total_steps=10)
    state, _ = create_state(method, optimizer, config.seed, MESH)
    state = state.replace(params=jax.tree.map(lambda x: 0.9 * x + 0.01, state.params))
    with Checkpoints(folder, config) as checkpoints:
        checkpoints.save(state, 3)
    workdir.claim(folder, config.to_dict(), {})
    return folder, state


def opened(folder, **options):
    """(run, its weights, its images)."""
    run = runs.open_run(folder)
    return (
        run,
        run.weights.placed_on(MESH),
        run.open_images(run.data_config(recipe.get_config("data").to_dict(), {}), MESH, **options),
    )


def changed(weights):
    """Other weights."""
    return dataclasses.replace(weights, params=jax.tree.map(lambda x: 1.5 * x, weights.params))


def test_a_run_opens_as_it_was_saved(made):
    folder, state = made
    run, weights, data = opened(folder)
    jax.tree.map(np.testing.assert_array_equal, weights.params, jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, weights.target, jax.device_get(state.target))
    assert (weights.step, len(weights.checkpoint)) == (3, 64)
    untrained = run.initial_weights(MESH)  # the target of a fresh state is what it began with
    jax.tree.map(
        np.testing.assert_array_equal, untrained.params["encoder"], state.target["encoder"]
    )
    jax.tree.map(np.testing.assert_array_equal, lmim_jax.load(folder).params, weights.params)
    assert data.classes == ("cat", "dog")
    assert run.data_config({"canvas": 1, "new": 7}, {"new": 8}).to_dict() == {
        "canvas": 40,
        "new": 8,
    }


def test_features_come_from_the_cache_bit_by_bit(made, tmp_path, caplog):
    run, weights, data = opened(made[0], cache=FeatureCache(tmp_path / "cache"))
    of = lambda params, feature="cls": image_features.split_features(
        run.method, params, data, "test", feature, 16
    )
    first = of(weights.params)
    (path,) = (tmp_path / "cache").iterdir()
    batches, data.batches = data.batches, None  # so that nothing can be encoded
    again = of(weights.params)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    data.batches = batches
    assert (data.cache.hits, data.cache.misses) == (1, 1)
    for params, feature in ((changed(weights).params, "cls"), (weights.params, "patches")):
        assert not np.array_equal(of(params, feature)[0], first[0])
    of({}, "pixels")
    assert len([*(tmp_path / "cache").iterdir()]) == 3, "pixels are not kept"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, logger="lmim_jax"):
        repaired = of(weights.params)
    assert re.search(rf"{path.name} is damaged .*: computed again", caplog.text)
    np.testing.assert_array_equal(repaired[0], first[0])
    assert of(weights.params)[0].tobytes() == first[0].tobytes()
    assert (data.cache.hits, data.cache.misses) == (2, 4)


def test_other_images_of_the_same_names_are_not_taken_for_them(made, images, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    run, identities = runs.open_run(made[0]), []
    for change in (False, True):
        if change:
            shutil.copy(copy / "test/dog/00.png", copy / "test/cat/00.png")
        data = run.open_images(
            run.data_config(recipe.get_config("data").to_dict(), {"path": str(copy)}), MESH
        )
        identities.append(FeatureCache(tmp_path)._identity(data, "test"))
    before, after = identities
    assert before["names"] == after["names"]
    assert before["sample"] != after["sample"]


def test_every_column_is_measured_by_the_same_evaluator(made, images):
    run, weights, data = opened(made[0])
    section = recipe.get_config().knn.to_dict() | {"k": (3,), "batch_size": 16}
    (scheduled,) = evaluate.build_evaluators(run, ConfigDict({"near": section}), "", "cls")
    assert scheduled.evaluator.feature == "cls"
    columns = {"pixels": weights, "untrained": changed(weights), "trained": weights}
    *_, (figures, pictures) = evaluate.measure(run, [scheduled], data, columns)
    assert not pictures
    assert figures.keys() == {"near/nn1", "near/knn3", "near/loo1"}
    assert all(of_one.keys() == columns.keys() for of_one in figures.values())
    of = {
        column: {name.partition("/")[2]: value[column] for name, value in figures.items()}
        for column in columns
    }
    assert scheduled.evaluator.run(run.method, weights.params, data) == of["trained"]
    pixels = image_features.split_features(run.method, {}, data, "test", "pixels", 16)
    assert pixels[0].shape == (16, 16 * 16 * 3)
    assert scheduled.evaluator._accuracies(run.method, {}, data, "pixels") == of["pixels"]


def test_the_table_is_for_people():
    what = {
        "run": "RUN",
        "step": 3,
        "checkpoint": 64 * "a",
        "weights": {"a": "online"},
        "classes": 4,
    }
    what["images"] = {"train": 4096, "test": 16}
    figures = {
        "a/knn20": {"trained": 50.0, "pixels": 40.04},
        "a/shots4": {"trained": 9.0},
        "a/l2": {"trained": 0.001},
    }
    figures |= {"a/shots4_std": {"trained": 1.25}, "a/own": {"trained": 1.0}}
    lines = eval_table.table(what, figures).splitlines()
    assert lines[1].split(":") == ["RUN", " step 3, online weights, checkpoint aaaaaaaaaaaa"]
    assert "4,096 train and 16 test images, 4 classes: guessing gives 25 %." in lines[2]
    assert [re.split(r"\s\s+", line.strip()) for line in lines[4:]] == [
        ["raw pixels", "trained encoder"],
        ["a/knn20", "40.0", "50.0", "vote of the 20 nearest training images"],
        ["a/shots4", "9.0 ± 1.2", "4 labelled images of each class"],
        ["a/l2", "0.001", "strength of l2 chosen by these"],
        ["a/own", "1.0"],
    ]


FORKED = """
import os, sys
from lmim_jax.cli import app
from lmim_jax.cli import evaluate
import lmim_jax.data.augment.device, lmim_jax.evaluators.logistic_regression
for call in sys.argv[1:]:
    sys.stdout.flush()
    if child := os.fork():
        print(f"exit code {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", file=sys.stderr, flush=True)
        continue
    sys.argv = ["lmim", "evaluate", *call.split()]
    app.run(evaluate, sys.argv[1:])
"""


def call(folder, *calls, devices=1):
    """What the command says when it is called so many times, each as a process of its own; imported once."""
    fake = f"{conftest.FAST} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": fake, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    given = [words if "--workdir" in words else f"--workdir={folder} {words}" for words in calls]
    command = [sys.executable, "-c", FORKED, *given]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_prints_a_table_and_writes_json(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made[0], folder)
    words = " ".join(["--evaluators=knn", *(f"--config.{change}" for change in KNN)])
    told = call(folder, f"{words} --baselines", f"{words} --out={tmp_path}/again.json", devices=2)
    assert told.stderr.count("exit code 0") == 2, told.stderr
    assert (
        told.stderr.count(f"from {folder}/evaluations/cache") == 2
    )  # the second time, both splits
    first, again = told.stdout.split("Metrics: ")[:2]
    assert "raw pixels  colour histogram  untrained encoder  trained encoder" in first
    assert re.search(r"knn/knn3 +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d  vote of the 3 nearest", first)
    assert re.search(r"knn/knn3 +\d+\.\d  vote of the 3 nearest", again)
    (path,) = (folder / "evaluations").glob("3-knn-*.json")
    found = json.loads(path.read_text())
    assert found["figures"]["knn/nn1"].keys() == {"pixels", "histogram", "untrained", "trained"}
    of_trained = json.loads((tmp_path / "again.json").read_text())["figures"]
    assert of_trained == {
        name: {"trained": value["trained"]} for name, value in found["figures"].items()
    }
    assert found["evaluated"]["step"] == 3
    assert found["evaluated"]["data"]["test"]["images"] == 16
    assert found["config"]["knn"]["k"] == [1, 3]


def test_bad_input_is_one_line_and_exit_code_2(made, images, tmp_path):
    texts, flat = tmp_path / "texts", tmp_path / "flat"
    for name in ("train/a", "test/a"):
        (texts / name).mkdir(parents=True)
        (texts / name / "1.txt").write_text("no image")
    shutil.copytree(images / "train/cat", flat)
    unsaved = tmp_path / "unsaved"
    unsaved.mkdir()
    shutil.copy(made[0] / "config.json", unsaved)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    bad = {
        f"--workdir={tmp_path}/none": "none is no run: it has no config.json",
        f"--workdir={unsaved}": "unsaved: no checkpoints here",
        f"--workdir={broken}": "broken/config.json cannot be read",
        "--evaluators=kn": "--evaluators=kn: no such evaluator; did you mean knn?",
        "--evaluators=zzzz": "--evaluators=zzzz: no such evaluator .choices: .*knn, .*logistic_regression",
        "--config.knn.kk=3": "unknown config key config.knn.kk",
        "--config.linear.l2=(1.0,)": "config.linear.l2.*evaluator is called logistic_regression",
        "--data.pth=x": "unknown config key data.pth",
        f"--data.path={texts}": "texts/train: no images in this folder",
        f"--data.path={flat} --evaluators=fewshot": "--evaluators=fewshot: the images have no classes",
        "--data.test_split=none --evaluators=knn": "--evaluators=knn: the images have no test split",
    }
    told = call(made[0], *bad)
    answers = re.split(r"exit code (\d+)\n", told.stderr)
    assert answers[1::2] == ["2"] * len(bad), told.stderr
    assert "Traceback" not in told.stderr
    for words, answer in zip(bad.values(), answers[::2], strict=False):
        assert re.search(rf"^error: .*{words}", answer.splitlines()[-1]), answer
    assert not told.stdout
    assert not list((made[0] / "evaluations").glob("*.json"))
