"""`lmim evaluate`: opening a run, the cache of features, the table, the JSON file and bad input."""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

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
from lmim_jax.evaluators import base as evaluators
from lmim_jax.evaluators.common import feature_cache, image_features
from lmim_jax.evaluators.common.feature_cache import FeatureCache
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.report import eval_table
from lmim_jax.train import runs, workdir
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.state import jit_init
from lmim_jax.utils import commands

ROOT = pathlib.Path(conftest.ROOT)
MESH = sharding.make_mesh(devices=jax.devices()[:1])  # compiles faster
SMALL_KNN = ("--config.knn.k=(1,3)", "--config.knn.batch_size=16")


@pytest.fixture(scope="module")
def saved(images, tmp_path_factory):
    """A run that has saved step 3, with almost initial weights: (folder, its state)."""
    folder = tmp_path_factory.mktemp("saved")
    config = tiny.get_config()
    config.data.path = str(images)
    method = methods.from_config(config.method, total_steps=10, steps_per_epoch=5)
    optimizer, _ = adamw.from_config(
        config.optimizer, warmup_steps=1, total_steps=10, steps_per_epoch=1
    )
    state = jit_init(method, optimizer, config.seed, MESH)[0]()
    state = state.replace(params=jax.tree.map(lambda x: 0.9 * x + 0.01, state.params))
    with Checkpoints(folder, config) as checkpoints:
        checkpoints.save(state, 3)
    workdir.claim(folder, config.to_dict(), {})
    return folder, state


def opened(folder, **options):
    """(run, its weights, its images)."""
    run = runs.open_run(folder)
    data_config = run.data_config(recipe.get_config("data").to_dict(), {})
    data = run.open_images(data_config, MESH, **options)
    return run, run.weights.placed_on(MESH), data


def changed(weights):
    """Other weights."""
    return dataclasses.replace(weights, params=jax.tree.map(lambda x: 1.5 * x, weights.params))


def test_a_run_opens_as_it_was_saved(saved):
    folder, state = saved
    run, weights, data = opened(folder)
    jax.tree.map(np.testing.assert_array_equal, weights.params, jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, weights.target, jax.device_get(state.target))
    assert weights.step == 3
    assert len(weights.checkpoint) == 64
    untrained = run.initial_weights(MESH)  # the target of a fresh state is its initial encoder
    jax.tree.map(
        np.testing.assert_array_equal, untrained.params["encoder"], state.target["encoder"]
    )
    jax.tree.map(np.testing.assert_array_equal, lmim_jax.load(folder).params, weights.params)
    assert data.classes == ("cat", "dog")
    options = run.data_config({"canvas": 1, "new": 7}, {"new": 8})
    assert options.to_dict() == {"canvas": 40, "new": 8}


def test_features_come_from_the_cache_bit_by_bit(saved, tmp_path, caplog):
    run, weights, data = opened(saved[0], cache=FeatureCache(tmp_path / "cache"))

    def features(params, feature="cls"):
        return image_features.split_features(run.method, params, data, "test", feature, 16)

    first = features(weights.params)
    (path,) = (tmp_path / "cache").iterdir()
    batches = data.batches
    data.batches = None  # so that nothing can be encoded
    again = features(weights.params)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    data.batches = batches
    assert (data.cache.hits, data.cache.misses) == (1, 1)
    for params, feature in ((changed(weights).params, "cls"), (weights.params, "patches")):
        assert not np.array_equal(features(params, feature)[0], first[0])
    features({}, "pixels")
    assert len(list((tmp_path / "cache").iterdir())) == 3, "pixels are not kept"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, logger="lmim_jax"):
        repaired = features(weights.params)
    assert re.search(rf"{path.name} is damaged .*: computed again", caplog.text)
    np.testing.assert_array_equal(repaired[0], first[0])
    assert features(weights.params)[0].tobytes() == first[0].tobytes()
    assert (data.cache.hits, data.cache.misses) == (2, 4)


def test_evaluators_of_a_step_compute_a_feature_once(saved, tmp_path):
    run, _, data = opened(saved[0])
    state = saved[1].replace(target=jax.tree.map(lambda x: x**2, saved[1].target))
    sections = {
        "online": tiny.evaluator("knn"),
        "linear": tiny.evaluator("logistic_regression"),
        "target": tiny.evaluator("knn") | {"params": "target"},
    }
    due = evaluators.from_config(sections, steps_per_epoch=1, has_target=True)
    read = collections.Counter()
    batches = data.batches

    def counted(split, batch_size):
        read[split] += 1
        return batches(split, batch_size)

    data.batches = counted

    def results():
        return [one.run(run.method, state, data) for one in due]

    anew = results()
    assert read == {"train": 3, "test": 3}
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "of a process that was killed").touch()
    with feature_cache.compute_once(data, due, folder):
        assert results() == anew
        assert len(list(folder.iterdir())) == 4  # of two splits and encoders
        assert results() == anew
    assert read == {"train": 5, "test": 5}
    assert anew[0] != anew[2]
    assert not folder.exists()
    assert data.cache is None
    for alone in (due[:1], due[1:], [due[0], due[2]]):
        with feature_cache.compute_once(data, alone, folder):
            assert data.cache is None, "nothing is needed twice"


def test_other_images_of_the_same_names_have_another_identity(saved, images, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    run = runs.open_run(saved[0])
    data_config = run.data_config(recipe.get_config("data").to_dict(), {"path": str(copy)})

    def identity():
        data = run.open_images(data_config, MESH)
        return FeatureCache(tmp_path)._identity(data, "test")

    (copy / "train" / "dog").rename(copy / "train" / "caf\udce9")  # a name that is not UTF-8
    before = identity()
    shutil.copy(copy / "test/dog/00.png", copy / "test/cat/00.png")
    after = identity()
    assert before["names"] == after["names"]
    assert before["sample"] != after["sample"]


def test_every_column_is_measured_by_the_same_evaluator(saved, images):
    run, weights, data = opened(saved[0])
    section = recipe.get_config().knn.to_dict() | {"k": (3,), "batch_size": 16}
    (scheduled,) = evaluate.build_evaluators(run, ConfigDict({"near": section}), "", "cls")
    knn = scheduled.evaluator
    assert knn.feature == "cls"
    columns = {"pixels": weights, "untrained": changed(weights), "trained": weights}
    *_, measured = evaluate.measure(run, [scheduled], data, columns)
    assert not measured.pictures
    assert measured.metrics.keys() == {"near/nn1", "near/knn3", "near/loo1", "near/majority"}
    by_column = {column: {} for column in columns}
    for name, values in measured.metrics.items():
        assert values.keys() == columns.keys()
        for column, value in values.items():
            by_column[column][name.removeprefix("near/")] = value
    assert knn.run(run.method, weights.params, data) == by_column["trained"]
    pixels = image_features.split_features(run.method, {}, data, "test", "pixels", 16)
    assert pixels.features.shape == (16, 16 * 16 * 3)
    assert knn.evaluate_feature(run.method, {}, data, "pixels") == by_column["pixels"]


def test_the_command_that_uses_a_classifier_runs_as_printed(tmp_path, capsys):
    folder = tmp_path / "my run" / "finetune"
    measured = evaluate.Measured({"a/knn20": {"trained": 50.0}}, {})
    evaluate._show(measured, tiny.EVALUATED, tmp_path / "a.json", [folder])
    printed = capsys.readouterr().out
    assert f"to use it: {commands.line('predict', folder, 'IMAGES')}\n" in printed


def test_the_table_is_for_people():
    metrics = {
        "a/knn20": {"trained": 50.0, "pixels": 40.04},
        "a/shots4": {"trained": 9.0},
        "a/l2": {"trained": 0.001},
        "a/shots4_std": {"trained": 1.25},
        "a/own": {"trained": 1.0},
    }
    lines = eval_table.table(tiny.EVALUATED, metrics).splitlines()
    assert lines[1].split(":") == ["RUN", " step 3, online weights, checkpoint aaaaaaaaaaaa"]
    assert "4,096 train and 16 test images, 4 classes: guessing gives 25 %." in lines[2]
    assert [re.split(r"\s\s+", line.strip()) for line in lines[4:]] == [
        ["raw pixels", "trained encoder"],
        ["a/knn20", "40.0", "50.0", "vote of the 20 nearest training images"],
        ["a/shots4", "9.0 ± 1.2", "4 labeled images per class"],
        ["a/l2", "0.001", "l2 regularization chosen on held-out images"],
        ["a/own", "1.0"],
    ]


def test_all_goes_from_cheap_to_dear_and_trains_nothing_unless_asked():
    config = recipe.get_config()
    titles = list(evaluate.choose_sections(["all"], config))
    assert titles[:3] == ["knn", "fewshot", "logistic_regression"]
    trained = {"linear_probe", "attentive_probe", "finetune", "segmentation_finetune", "detection"}
    assert set(titles) == set(config) - trained
    with_one = list(evaluate.choose_sections(["all", "finetune"], config))
    assert with_one == [*titles, "finetune"]
    assert list(evaluate.choose_sections(["finetune", "all"], config)) == with_one


FORKED = """
import os, sys
from lmim_jax.cli import app
from lmim_jax.cli import evaluate
import lmim_jax.data.augment.device, lmim_jax.evaluators.logistic_regression
for call in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"exit code {code}", file=sys.stderr, flush=True)
        continue
    sys.argv = ["lmim", "evaluate", *call.split()]
    app.run(evaluate, sys.argv[1:])
"""


def call(folder, *calls, devices=1):
    """Runs the command several times, each in its own process; modules are imported once."""
    fake = f"{conftest.FAST} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": fake, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKED]
    for words in calls:
        if "--workdir" not in words:
            words = f"--workdir={folder} {words}"
        command.append(words)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_prints_a_table_and_writes_json(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    words = " ".join(("--evaluators=knn", *SMALL_KNN))
    done = call(folder, f"{words} --baselines", f"{words} --out={tmp_path}/again.json", devices=2)
    assert done.stderr.count("exit code 0") == 2, done.stderr
    # Both splits, the second time
    assert done.stderr.count(f"from {folder}/evaluations/cache") == 2
    first, again = done.stdout.split("Metrics: ")[:2]
    assert "raw pixels  color histogram  untrained encoder  trained encoder" in first
    assert re.search(r"knn/knn3 +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d  vote of the 3 nearest", first)
    assert re.search(r"knn/knn3 +\d+\.\d  vote of the 3 nearest", again)
    (path,) = (folder / "evaluations").glob("3-knn-*.json")
    found = json.loads(path.read_text())
    assert found["figures"]["knn/nn1"].keys() == {"pixels", "histogram", "untrained", "trained"}
    trained_only = {}
    for name, values in found["figures"].items():
        trained_only[name] = {"trained": values["trained"]}
    assert json.loads((tmp_path / "again.json").read_text())["figures"] == trained_only
    assert found["evaluated"]["step"] == 3
    assert found["evaluated"]["data"]["test"]["images"] == 16
    assert found["config"]["knn"]["k"] == [1, 3]


def test_bad_input_is_one_line_and_exit_code_2(saved, images, tmp_path):
    texts = tmp_path / "texts"
    flat = tmp_path / "flat"
    for name in ("train/a", "test/a"):
        (texts / name).mkdir(parents=True)
        (texts / name / "1.txt").write_text("no image")
    shutil.copytree(images / "train/cat", flat)
    unsaved = tmp_path / "unsaved"
    unsaved.mkdir()
    shutil.copy(saved[0] / "config.json", unsaved)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    bad = {
        f"--workdir={tmp_path}/none": "none is not a run: it has no config.json",
        f"--workdir={unsaved}": "unsaved: no checkpoints here",
        f"--workdir={broken}": "broken/config.json cannot be read",
        "--evaluators=kn": "--evaluators=kn: no such evaluator; did you mean knn?",
        "--evaluators=zzzz": "=zzzz: no such evaluator .choices: .*knn, .*logistic_regression",
        "--config.knn.kk=3": "unknown config key config.knn.kk",
        "--config.linear.l2=(1.0,)": "config.linear.l2.*evaluator is called logistic_regression",
        "--data.pth=x": "unknown config key data.pth",
        f"--data.path={texts}": "texts/train: no images in this folder",
        f"--data.path={flat} --evaluators=fewshot": "=fewshot: the images have no classes",
        "--data.test_split=none --evaluators=knn": "=knn: there are no test images",
    }
    done = call(saved[0], *bad)
    answers = re.split(r"exit code (\d+)\n", done.stderr)
    assert answers[1::2] == ["2"] * len(bad), done.stderr
    assert "Traceback" not in done.stderr
    for words, answer in zip(bad.values(), answers[::2], strict=False):
        assert re.search(rf"^error: .*{words}", answer.splitlines()[-1]), answer
    assert not done.stdout
    assert not list((saved[0] / "evaluations").glob("*.json"))


@pytest.mark.parametrize("name", evaluate.CHANGING)
def test_the_file_of_an_evaluation_is_named_by_all_that_changes_it(name, monkeypatch):
    given = {flag: types.SimpleNamespace(value=None) for flag in evaluate.CHANGING}
    recipes = ["/package/configs/evaluate.py"]
    monkeypatch.setattr(evaluate.config_flags, "get_config_filename", lambda _: recipes[-1])
    monkeypatch.setattr(evaluate.config_flags, "get_override_values", lambda _: {})
    monkeypatch.setattr(
        evaluate, "flags", types.SimpleNamespace(FLAGS={**given, "config": None, "data": None})
    )
    plain = evaluate.file_name(8, ["knn"])
    assert plain == "8-knn.json"
    names = {plain}
    for value in (["rgb"], ["thermal"]):
        given[name].value = value
        names.add(evaluate.file_name(8, ["knn"]))
    for recipe_name in ("evaluate.py:imagenet", "evaluate.py:imagenet,L", "mine.py"):
        recipes.append(f"/package/configs/{recipe_name}")
        names.add(evaluate.file_name(8, ["knn"]))
    assert len(names) == 6
