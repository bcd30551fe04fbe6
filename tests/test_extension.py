"""Runs that change their mind: from the weights of another run, or for longer than they were to."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny

from lmim_jax.cli.extend import read_recipe
from lmim_jax.configs import vit_b
from lmim_jax.distributed import sharding
from lmim_jax.train import extension, loop, runs
from lmim_jax.train.build import build
from lmim_jax.train.checkpoints import Checkpoints, read_weights
from lmim_jax.train.metric_writer import read_metrics
from lmim_jax.utils import commands
from lmim_jax.utils.errors import UserError


def recipe(images, **change):
    """A recipe without evaluations, which compiles faster."""
    config = tiny.get_config()
    config.data.path = str(images)
    config.evaluators = {}
    config.update(epochs=1, log_every=1)
    config.update_from_flattened_dict(change)
    return config


def rates(workdir):
    """{step: learning rate} of the lines of a run."""
    found = {}
    for line in read_metrics(workdir):
        if "learning_rate" in line:
            found[line["step"]] = line["learning_rate"]
    return found


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of one epoch, 6 steps."""
    workdir = tmp_path_factory.mktemp("finished")
    loop.train(recipe(images), workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_longer_run_is_refused_naming_both_ways(images, run):
    with pytest.raises(UserError, match=r"epochs 1 -> 2") as refused:
        loop.train(recipe(images, epochs=2), run)
    assert f"extend {run} --epochs=2" in str(refused.value)
    assert f"choose another --workdir, and --config.init_from={run}" in str(refused.value)


@pytest.mark.slow
def test_an_extended_run_goes_on_with_its_optimizer(images, run):
    config = recipe(images, epochs=3)
    before = rates(run)
    loop.train(config, run, extension.CONTINUE)
    found = rates(run)
    assert before.items() <= found.items()
    assert list(found) == list(range(1, 19))
    whole = build(recipe(images, epochs=3), 6)
    for step in range(7, 19):
        assert found[step] == pytest.approx(float(whole.learning_rate(step - 1)), rel=1e-5)
    stored = json.loads((run / "config.json").read_text())
    assert stored["epochs"] == 3
    assert stored["extensions"] == [[6, "continue", 6, 1]]
    state, shardings = whole.create_state(sharding.make_mesh())
    with Checkpoints(run, config) as checkpoints:
        restored = checkpoints.restore(state, shardings)
    assert int(restored.step) == 18
    assert int(restored.opt_state[0].count) == 18


def test_the_learning_rate_of_a_restart():
    config = tiny.get_config()
    config.update(epochs=3, extensions=((6, "restart", 6, 1),))
    parts = build(config, 6)
    # Over 12 steps in place of 6, the warm-up takes 6 in place of 3
    for step, share in {6: 0.25, 9: 0.625, 12: 1.0, 15: 0.625, 18: 0.25}.items():
        assert float(parts.learning_rate(step)) == pytest.approx(share * config.optimizer.lr)
    assert parts.method.total_steps == 12


@pytest.mark.slow
def test_an_extension_that_restarts_is_made_once_and_resumes(images, run):
    config = recipe(images, epochs=3)
    summary = loop.train(config, run, extension.RESTART)
    found = rates(run)
    # Over 12 steps in place of 6, the warm-up takes 6 in place of 3
    shares = {7: 0.25, 10: 0.625, 13: 1.0, 16: 0.625, 18: 0.3002}
    for step, share in shares.items():
        assert found[step] == pytest.approx(share * config.optimizer.lr, rel=1e-3)
    shutil.rmtree(run / "checkpoints" / "18")  # as if killed before it was saved
    (run / "summary.json").unlink()
    for extend in (extension.RESTART, ""):
        assert loop.train(recipe(images, epochs=3), run, extend)["loss"] == summary["loss"]
        assert rates(run) == found
    assert extension.read(run) == [[6, "restart", 6, 1]]
    with pytest.raises(UserError, match=r"it was extended: --config\.epochs=3 resumes it"):
        loop.train(recipe(images), run)
    with pytest.raises(UserError, match="can only be extended to more"):
        loop.train(recipe(images), run, extension.CONTINUE)


def test_what_cannot_be_extended_says_so(images, run, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        loop.train(recipe(images, epochs=2), tmp_path / "none", extension.CONTINUE)
    with pytest.raises(UserError, match=r"length of .* is that of config\.epochs"):
        loop.train(recipe(images, total_steps=20), run, extension.CONTINUE)
    with pytest.raises(UserError, match=r"another config \(seed 0 -> 1\)"):
        loop.train(recipe(images, epochs=2, seed=1), run, extension.CONTINUE)
    with pytest.raises(UserError, match=r"config\.extensions is not to be set"):
        loop.train(recipe(images, extensions=((1, "restart", 2, 3),)), tmp_path / "none")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has not saved a checkpoint"):
        loop.train(recipe(images, epochs=2), run, extension.CONTINUE)
    assert extension.read(run) == []


def test_an_exported_model_is_extended_by_a_command_that_runs(tmp_path, monkeypatch):
    folder = str(tmp_path / "my model")
    monkeypatch.setattr(runs, "read_config", lambda folder: {"exported": "online"})
    with pytest.raises(UserError) as refused:
        read_recipe(folder)
    command = commands.line("train", f"--config.init_from={folder}")
    assert f"is an exported model; {command} starts a run" in str(refused.value)


def test_schedules_of_extended_runs():
    config = vit_b.get_config()
    config.update(epochs=100, extensions=((1000, "continue", 1000, 100),))
    config.epochs = 200
    config.optimizer.warmup_epochs = 5.0
    span = extension.span(config, 2000)
    assert span == extension.Span(start=0, steps=2000, warmup_steps=50, steps_per_epoch=10)
    config.extensions = (*config.extensions, (1500, "restart", 2000, 200))
    span = extension.span(config, 3500)
    assert span == extension.Span(start=1500, steps=2000, warmup_steps=100, steps_per_epoch=10)
    config.extensions = (*config.extensions, (3500, "continue", 3500, 350))
    span = extension.span(config, 5500)
    assert span == extension.Span(start=1500, steps=4000, warmup_steps=100, steps_per_epoch=10)


@pytest.mark.parametrize("length", [{"epochs": 0}, {"epochs": -1}, {"total_steps": -5}])
def test_a_length_without_a_step_is_refused(images, length):
    with pytest.raises(UserError, match=r"no length of a run: give one above 0"):
        build(recipe(images, **length), 6)


@pytest.mark.parametrize("epochs", [800, 20, 1])
def test_the_warmup_follows_the_length_unless_set(epochs):
    config = vit_b.get_config()
    config.epochs = epochs
    assert config.optimizer.warmup_epochs == epochs / 20
    config.optimizer.warmup_epochs = 1.5 * epochs
    with pytest.raises(UserError, match=rf"is longer than config\.epochs={epochs}"):
        extension.span(config, 100)


@pytest.mark.slow
def test_weights_of_another_run_with_another_grid(images, finished, run, tmp_path, caplog):
    change = {"method.grid": (3, 3), "method.num_visible": 3, "method.projector_depth": 2}
    change |= {"augment.eval_resize": 12, "seed": 1, "init_from": str(run)}
    config = recipe(images, **change)
    new = tmp_path / "new"
    with caplog.at_level("INFO"):
        loop.train(config, new)
    assert re.search(r"  encoder: (\d+) of \1 arrays copied\n", caplog.text)
    assert re.search(r"  projector: \d+ of \d+ arrays copied, \d+ fresh \(projector/", caplog.text)
    assert "positions: computed, for 3x3 patches (there: 4x4)" in caplog.text
    source = runs.open_run(run)
    method = runs.open_run(new).method
    params, target = read_weights(new, method, 0)
    for tree, other in ((params, source.params), (target, source.target)):
        jax.tree.map(np.testing.assert_array_equal, tree["encoder"], other["encoder"])
    record = json.loads((new / "init_from.json").read_text())
    assert record["step"] == 6
    assert record["fresh"]
    assert all(name.startswith("projector/") for name in record["fresh"])
    # It goes on without the other run
    shutil.rmtree(run)
    (new / "summary.json").unlink()
    shutil.rmtree(new / "checkpoints" / "6")
    loop.train(config, new)
    assert (new / "checkpoints" / "6").is_dir()


def test_weights_that_do_not_fit_or_exist_are_refused(images, finished, tmp_path):
    with pytest.raises(UserError, match=r"config\.init_from: .*is not a run"):
        loop.train(recipe(images, init_from=str(tmp_path)), tmp_path / "new")
    change = {"init_from": str(finished), "method.width": 8}
    with pytest.raises(UserError, match="no array of its encoder fits"):
        loop.train(recipe(images, **change), tmp_path / "new")
    assert not (tmp_path / "new").exists()
