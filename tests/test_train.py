"""Whole runs: in this process, and as the command that users type, killed and resumed."""

import json
import logging
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from lmim_jax import checkpoint, metrics, train
from lmim_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def recipe(images, **change):
    config = tiny.get_config()
    config.data.path = str(images)
    config.update_from_flattened_dict(change)
    return config


def lines(workdir):
    """The complete metric lines of a run, which may be going on."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def final_state(workdir):
    """{path: array} of the newest checkpoint, read by Orbax alone."""
    *_, newest = checkpoint.steps(workdir).values()
    state = ocp.PyTreeCheckpointer().restore(newest.absolute() / "state")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run in this process: (config, workdir, summary)."""
    workdir = tmp_path_factory.mktemp("finished")
    config = recipe(images)
    return config, workdir, train.train(config, workdir)


def test_a_run_tells_what_it_did(finished):
    _, workdir, summary = finished
    told = lines(workdir)
    training = [line for line in told if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    keys = {"grad_norm", "reconstruction", "patch_accuracy", "similarity_predictions", "learning_rate", "epoch"}
    assert keys <= training[0].keys()
    assert [line["step"] for line in told if "knn/knn5" in line] == [0, 6, 12]
    gauges = {"collapse_index", "effective_rank", "feature_std", "patch_chance", "similarity_targets"}
    assert all(gauges <= line.keys() for line in training)
    assert {"knn/nn1", "knn/knn5", "knn/loo1", "images_per_second", "wall_seconds", "collapse_index"} <= summary.keys()
    assert summary["knn5"] == {"untrained": told[0]["knn/knn5"], "trained": summary["knn/knn5"]}
    names = {f"{name}_{step:07d}.png" for name in ("given", "seen") for step in (0, 12)} | {"curves.png"}
    assert {path.name for path in (workdir / "pictures").iterdir()} == names
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert any((workdir / "tensorboard").iterdir())
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [6, 9, 12]  # keep 3


def test_a_finished_run_says_so_and_does_nothing(finished, caplog):
    config, workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO, logger="lmim_jax"):
        assert train.train(config, workdir) == summary
    assert "this run is finished: 12 of 12 steps" in caplog.text
    assert "trained encoder" in caplog.text
    assert "What next" in caplog.text
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_summary_is_evaluated_again(finished):
    config, workdir, summary = finished
    (workdir / "summary.json").unlink()
    again = train.train(config, workdir)
    assert {name: again[name] for name in again if "knn/" in name} == {n: summary[n] for n in summary if "knn/" in n}
    (workdir / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    "change",
    [{"method.tau": 0.3}, {"seed": 1}, {"batch_size": 16}, {"optimizer.b2": 0.99}, {"data.canvas": 64}],
    ids=str,
)
def test_another_config_in_its_workdir_is_refused_by_key(finished, images, change):
    _, workdir, _ = finished
    ((key, value),) = change.items()
    with pytest.raises(UserError, match=rf"{key} .* -> {value}.*choose another --workdir"):
        train.train(recipe(images, **change), workdir)


def test_harmless_keys_may_change(finished, images):
    _, workdir, summary = finished
    change = {"log_every": 5, "checkpoint_keep": 9, "data.threads": 3, "evaluators.knn.k": 3}
    assert train.train(recipe(images, **change), workdir) == summary


@pytest.mark.parametrize("key", ["optimizer.base_lr", "optimizer.eps"])
def test_nan_stops_the_run_naming_step_and_quantity(images, tmp_path, key):
    value = {"optimizer.base_lr": 1e30, "optimizer.eps": math.nan}[key]
    with pytest.raises(metrics.NonFinite, match=r"step \d+: .*(loss|_norm) = (nan|inf)") as caught:
        train.train(recipe(images, **{key: value, "checkpoint_every": 1, "evaluators": {}}), tmp_path)
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    kept = list(checkpoint.steps(tmp_path))
    assert kept == list(range(1, step))[-3:]  # every finite state, and nothing after it
    assert all(math.isfinite(value) for line in lines(tmp_path) for value in line.values())


def test_training_lowers_the_loss_below_chance(images, tmp_path):
    change = {"total_steps": 60, "optimizer.base_lr": 0.1, "method.similarity_weight": 0.0, "evaluators": {}}
    train.train(recipe(images, **change), tmp_path)
    losses = [line["reconstruction"] for line in lines(tmp_path)]
    chance = 2 * 0.2 * math.log(12)  # 12 masked patches
    assert np.mean(losses[-5:]) < min(0.95 * chance, np.mean(losses[:3]) - 0.05)


def test_total_steps_replaces_epochs(images, tmp_path):
    train.train(recipe(images, total_steps=2, **{"evaluators": {}}), tmp_path)
    assert lines(tmp_path)[-1]["step"] == 2


def test_images_without_classes_train_without_knn(images, tmp_path):
    config = recipe(images / "train" / "cat", total_steps=2)
    summary = train.train(config, tmp_path)
    assert not any(name.startswith("knn") for name in summary)


def command(images, workdir, *flags):
    """main.py as users call it, on one device."""
    environment = {**os.environ, "XLA_FLAGS": conftest.FAST, "PYTHONPATH": str(ROOT)}
    flags = ["--config=tests/tiny.py", f"--config.data.path={images}", f"--workdir={workdir}", *flags]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "main.py", *flags], cwd=ROOT, env=environment, **pipe)


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(images, tmp_path):
    # 120 steps, each with a line of its own: a line after a restart is the mean of fewer steps
    flags = "--config.epochs=20", "--config.evaluators.knn.every=0", "--config.log_every=1"
    whole, killed = (command(images, tmp_path / run, *flags) for run in ("whole", "killed"))
    moment, deadline = random.randrange(4, 100), time.monotonic() + 300
    told = tmp_path / "killed" / "metrics.jsonl"
    while not (told.exists() and max([line["step"] for line in lines(told.parent)], default=0) >= moment):
        assert killed.poll() is None, killed.stdout.read()
        assert time.monotonic() < deadline
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed = command(images, tmp_path / "killed", *flags, "--config.data.workers=1")
    for process in (whole, resumed):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert "finished 120 steps" in output
    a, b = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert a.keys() == b.keys()
    assert all(any(part in name for name in a) for part in ("params", "target", "opt_state", "rng"))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name}, killed at step {moment}")
    losses = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("whole", "killed")]
    assert len(losses[0]) == 120
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [([], "quickstart"), (["--config", "configs/vit_b.py"], "vit_b"), (["--config=configs/vit_s.py"], "vit_s")],
)
def test_the_recipe_is_chosen_by_flag(flags, recipe):
    script = "import main, sys; main.parse_flags(sys.argv); print(main.flags.FLAGS['config'].config_filename)"
    told = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == f"configs/{recipe}.py"


BAD = {
    "--config.method.taau=1": "unknown config key config.method.taau.*tau",
    "--config.methd.tau=1": "unknown config key config.methd.tau.*method",
    "--confg=x": "Unknown command line flag 'confg'",
    "--config.batch_size=lots": "config.batch_size=lots",
    "--config=configs/none.py": "configs/none.py: no such file",
    "--config.data.path=/nowhere": "config.data.path='/nowhere' is no folder",
    "--config.batch_size=7 --config.micro_batches=2": "config.batch_size=7 is not divisible",
    "--config.batch_size=4096": "more than the 48 training images",
    "--config.method.num_visible=16": "config.method.num_visible=16",
    "--config.data.source=foldr": "did you mean folder",
}


def test_bad_input_is_one_line_and_exit_code_2(images, tmp_path):
    running = {flags: command(images, tmp_path, *flags.split()) for flags in BAD}
    for flags, process in running.items():
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 2, told
        assert "Traceback" not in told
        assert told.splitlines()[-1].startswith("error: ")
        assert re.search(BAD[flags], told.splitlines()[-1]), told
    assert not any(tmp_path.iterdir())
