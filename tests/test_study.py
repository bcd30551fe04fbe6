"""A study: real processes over seeds, put side by side, gone on with where it stopped; and what may be said of it."""

import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

import conftest
import pytest

from lmim_jax.cli import study
from lmim_jax.methods import base as methods
from lmim_jax.report import comparison
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def test_a_change_is_called_one_only_where_seeds_do_not_overlap():
    assert comparison.verdict([1.0, 2.0], [2.1, 3.0]) == "rises"
    assert comparison.verdict([2.1, 3.0], [1.0, 2.0]) == "falls"
    assert comparison.verdict([1.0, 2.0], [2.0, 3.0]) == "is within the spread of the seeds"
    assert comparison.verdict([1.0], [9.0]) == "has one seed only"


def test_conclusions_say_what_the_numbers_support():
    rows = [
        ("naive", "joint", {"collapse_index": [1.0, 0.99], "knn/knn20": [20.0, 21.0]}),
        ("ema", "a copy", {"collapse_index": [0.7, 0.8], "knn/knn20": [20.5, 30.0]}),
        ("lost", "not run", {}),
    ]
    (sentence,) = comparison.conclusions(rows, "previous")
    assert sentence.startswith("ema (a copy): collapse index falls (0.99 ± 0.01 to 0.75 ± 0.05)")
    assert sentence.endswith(
        "k-NN 20 % is within the spread of the seeds (20.5 ± 0.5 to 25.2 ± 4.8)"
    )
    (sentence,) = comparison.conclusions(rows, "none")
    assert sentence == "k-NN 20: ema (25.2 ± 4.8) cannot be told from naive (20.5 ± 0.5)"
    table = comparison.table(rows)
    assert "| naive | joint | 0.99 ± 0.01 | 20.5 ± 0.5 |" in table
    assert "| lost | not run |  |  |" in table


@pytest.mark.parametrize("name", ["study", "study:cifar10", "compare", "compare:cifar10"])
def test_every_run_of_a_study_is_a_valid_recipe(name, tmp_path):
    module, *dataset = name.split(":")
    config = importlib.import_module(f"lmim_jax.configs.{module}").get_config(*dataset)
    groups, runs = study.plan(config, [], (), tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    assert {name for *_, names in groups for name in names} <= {run.name for run in runs}
    for run in runs:
        recipe, which = run.recipe.split(":")
        section = (
            importlib.import_module(recipe.removesuffix(".py").replace("/", "."))
            .get_config(which)
            .method
        )
        for change in run.changes:
            key, value = change.removeprefix("method.").split("=")
            assert key in section, change
            section[key] = type(section[key])({"True": 1, "False": 0}.get(value, value))
        methods.from_config(section, total_steps=1, steps_per_epoch=1)


def test_the_ladder_changes_one_switch_a_rung():
    runs = importlib.import_module("lmim_jax.configs.study").get_config().runs
    ladder = [
        dict(change.split("=") for change in changes)
        for name, *_, changes in runs
        if "=" not in name
    ]
    assert len(ladder) == 10
    for before, after in itertools.pairwise(ladder):
        assert sum(before[key] != after[key] for key in before) == 1


def test_an_unknown_group_is_named(tmp_path):
    config = importlib.import_module("lmim_jax.configs.study").get_config()
    with pytest.raises(
        UserError, match="--only=lader: no such group; there are: ladder, ablations"
    ):
        study.plan(config, ["lader"], (), tmp_path)


CONFIG = """
from ml_collections import ConfigDict

NAMES = "one", "two"

def get_config():
    config = ConfigDict()
    config.seeds = (0,)
    config.runs = tuple((name, "words", "tests/tiny.py", (f"data.threads={i + 1}",)) for i, name in enumerate(NAMES))
    config.groups = (("threads", "first", NAMES),)
    config.cost = False
    return config
"""


def test_a_study_runs_goes_on_and_reports(tmp_path, images):
    (tmp_path / "config.py").write_text(CONFIG)
    out = tmp_path / "out"
    settings = [
        f"data.path={images}",
        "total_steps=4",
        "evaluators.knn.every=0.0",
        "evaluators.visualization.every=0.0",
    ]
    command = [
        sys.executable,
        "-m",
        "lmim_jax.cli",
        "study",
        f"--config={tmp_path}/config.py",
        f"--out={out}",
    ]
    command += [
        f"--parallel={min(2, len(os.sched_getaffinity(0)))}",
        *(f"--set={setting}" for setting in settings),
    ]
    environment = {**os.environ, "XLA_FLAGS": conftest.FAST}
    execute = lambda: subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    first = execute()
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("seed 0 (") == 2
    results = json.loads((out / "results.json").read_text())["groups"]["threads"]
    assert results["one"]["seeds"] == results["two"]["seeds"] == [0]
    assert results["one"] == results["two"]  # the same training
    assert 0 < results["one"]["collapse_index"][0] <= 1
    page = (out / "index.html").read_text()
    assert "://" not in page
    assert page.count("<img ") == 1
    (out / "two/seed0/summary.json").unlink()  # as if it had been killed before its end
    again = execute()
    assert again.returncode == 0, again.stderr
    assert "2 runs, 1 of them finished" in again.stderr
    assert again.stderr.count("seed 0 (") == 1
    assert json.loads((out / "results.json").read_text())["groups"]["threads"] == results
