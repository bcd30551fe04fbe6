"""A study: processes over seeds, compared, resumed after an interruption; and its conclusions."""

import ast
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import conftest
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from test_docs import gen_results

from lmim_jax.cli import study
from lmim_jax.configs import latent_mim_plus_vit_b, recipe_search, vit_b
from lmim_jax.methods import base as methods
from lmim_jax.report import comparison, records
from lmim_jax.report.comparison import Variant
from lmim_jax.utils import cores
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def test_a_change_is_called_one_only_where_seeds_do_not_overlap():
    assert comparison.verdict([1.0, 2.0], [2.1, 3.0]) == "rises"
    assert comparison.verdict([2.1, 3.0], [1.0, 2.0]) == "falls"
    assert comparison.verdict([1.0, 2.0], [2.0, 3.0]) == "is within the spread of the seeds"
    assert comparison.verdict([1.0], [9.0]) == "has one seed only"


VARIANTS = [
    Variant("naive", "joint", {"collapse_index": [1.0, 0.99], "knn/knn20": [20.0, 21.0]}),
    Variant("ema", "a copy", {"collapse_index": [0.7, 0.8], "knn/knn20": [20.5, 30.0]}),
    Variant("lost", "not run", {}),
]


def test_a_variant_is_compared_with_its_reference_or_not_at_all():
    lost, naive, ema = VARIANTS[2], VARIANTS[0], VARIANTS[1]
    assert comparison.conclusions([lost, naive, ema], "first") == []
    assert comparison.conclusions([naive, lost, ema], "previous") == []
    (sentence,) = comparison.conclusions([naive, lost, ema], "first")
    assert sentence.startswith("ema (a copy): collapse index falls")


def test_conclusions_say_what_the_numbers_support():
    (sentence,) = comparison.conclusions(VARIANTS, "previous")
    assert sentence.startswith("ema (a copy): collapse index falls (0.99 ± 0.01 to 0.75 ± 0.05)")
    assert sentence.endswith(
        "k-NN 20 % is within the spread of the seeds (20.5 ± 0.5 to 25.2 ± 4.8)"
    )
    (sentence,) = comparison.conclusions(VARIANTS, "none")
    assert sentence == ("k-NN 20: ema (25.2 ± 4.8) cannot be distinguished from naive (20.5 ± 0.5)")


def test_tables_have_mean_and_spread():
    table = comparison.markdown_table(VARIANTS)
    assert "| naive | joint | 0.99 ± 0.01 | 20.5 ± 0.5 |" in table
    assert "| lost | not run |  |  |" in table


@pytest.mark.parametrize(
    "name",
    [
        *("study", "study:cifar10", "compare", "compare:cifar10", "compare:hit_uav"),
        *("benchmark", "benchmark:small", "benchmark:micro,rates"),
        pytest.param("recipe_search", marks=pytest.mark.slow),
        pytest.param("recipe_search:switches", marks=pytest.mark.slow),
        pytest.param("recipe_search:combinations", marks=pytest.mark.slow),
        *("recipe_search:final", "recipe_search:final,shapes", "recipe_search:final,cifar10"),
    ],
)
def test_every_run_of_a_study_is_a_valid_recipe(name, tmp_path):
    groups, runs = study.plan(get_config(name), [], (), tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    names = {run.name for run in runs}
    for group in groups:
        assert names.issuperset(group.names)
    for run in runs:
        recipe = get_config(run.recipe.removeprefix("configs/").replace(".py", ""))
        for change in run.changes:
            key, value = change.split("=", 1)
            *path, last = key.split(".")
            section = functools.reduce(ConfigDict.__getitem__, path, recipe)
            assert last in section, change
            section[last] = parse_value(value, like=section[last])
        assert recipe.optimizer.base_lr > 0
        methods.from_config(recipe.method, total_steps=1, steps_per_epoch=1)


def get_config(name):
    """The config of a recipe, "NAME" or "NAME:ARGUMENT"."""
    module, _, argument = name.partition(":")
    make_config = importlib.import_module(f"lmim_jax.configs.{module}").get_config
    if argument:
        return make_config(argument)
    return make_config()


def parse_value(text, like):
    """A value of the type of `like`, from its text in a flag."""
    return text if isinstance(like, str) else ast.literal_eval(text)


@pytest.mark.slow
def test_a_search_gives_every_candidate_the_same_compute():
    recipe = recipe_search.published("configs/quickstart.py")
    config = recipe_search.get_config("screen,shapes")
    (_, _, _, (first,)), *others = config.runs
    spent = int(first.removeprefix("total_steps=")) * recipe_search.step_gigaflops(recipe)
    for candidate, (name, _, _, changes) in zip(recipe_search.CANDIDATES, others, strict=True):
        own = recipe_search.changed(recipe, recipe_search.changes_of(candidate, recipe))
        options = dict(change.split("=", 1) for change in changes)
        steps = int(options["total_steps"])
        assert steps * recipe_search.step_gigaflops(own) == pytest.approx(spent, rel=0.01), name


def test_the_recipe_that_was_found_has_its_changes_and_costs_what_the_published_one_does():
    published = vit_b.get_config()
    plus = latent_mim_plus_vit_b.get_config()
    changes = recipe_search.changes_of(recipe_search.plus_candidate(), published)
    before, after = flatten_dict(published.to_dict()), flatten_dict(plus.to_dict())
    changed = {".".join(key) for key, value in after.items() if value != before[key]}
    followers = {"optimizer.lr", "optimizer.warmup_epochs"}
    assert changed == ({*changes, "epochs"} | followers) - {"micro_batches"}
    for path, value in changes.items():
        assert functools.reduce(getattr, path.split("."), plus) == pytest.approx(value), path
    cost, own_cost = (
        recipe.epochs * recipe_search.step_gigaflops(recipe) / recipe.batch_size
        for recipe in (published, plus)
    )
    assert own_cost == pytest.approx(cost, rel=0.001)


def test_the_ladder_changes_one_switch_a_rung():
    ladder = []
    for name, _, _, changes in get_config("study").runs:
        if "=" not in name:
            ladder.append(dict(change.split("=") for change in changes))
    assert len(ladder) == 10
    for before, after in itertools.pairwise(ladder):
        assert sum(before[key] != after[key] for key in before) == 1


def test_an_unknown_group_is_named(tmp_path):
    message = "--only=lader: no such group; did you mean ladder?"
    with pytest.raises(UserError, match=re.escape(message)):
        study.plan(get_config("study"), ["lader"], (), tmp_path)


def test_later_seeds_measure_no_baselines_again(tmp_path):
    config = get_config("benchmark")
    _, runs = study.plan(config, [], ("epochs=1",), tmp_path)
    off = "evaluators.knn.baselines=False"
    first, *others = runs
    assert off not in first.changes
    for run in others:
        assert run.changes.count(off) == 1
        assert run.changes[-1] == "epochs=1"  # the user's come last


CONFIG = """
'One thread or two.'
from ml_collections import ConfigDict

NAMES = ("one", "two")

def get_config():
    config = ConfigDict()
    config.seeds = (0,)
    config.runs = tuple(run(i, name) for i, name in enumerate(NAMES))
    config.groups = (("threads", "first", NAMES),)
    config.cost = False
    return config

def run(i, name):
    return name, "words", "tests/tiny.py", (f"data.threads={i + 1}",)
"""


def study_command(config, out, images, *options):
    return [
        sys.executable,
        "-m",
        "lmim_jax.cli",
        "study",
        f"--config={config}",
        f"--out={out}",
        f"--parallel={min(2, len(os.sched_getaffinity(0)))}",
        f"--set=data.path={images}",
        "--set=evaluators.knn.every=0.0",
        "--set=evaluators.visualization.every=0.0",
        *options,
    ]


def run_study(config, out, images):
    """Run a study as a command; the finished process."""
    command = study_command(config, out, images, "--set=total_steps=4")
    environment = {**os.environ, "XLA_FLAGS": conftest.FAST}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def read_results(out):
    return json.loads((out / "results.json").read_text())["groups"]["threads"]


@pytest.mark.slow
def test_a_study_runs_resumes_and_reports(tmp_path, images):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    out = tmp_path / "out"
    first = run_study(config, out, images)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("seed 0 (") == 2
    results = read_results(out)
    assert results["one"]["seeds"] == results["two"]["seeds"] == [0]
    assert results["one"] == results["two"]  # the same training
    assert 0 < results["one"]["collapse_index"][0] <= 1
    page = (out / "index.html").read_text()
    assert "://" not in page
    assert page.count("<img ") == 2  # the patch features of both
    assert "<h1>One thread or two</h1>" in page
    assert page.count("<svg ") == page.count('aria-label="curve: ') > 3
    assert page.count("patch features of two") == 1

    (out / "two/seed0/summary.json").unlink()  # as if it had been killed before its end
    second = run_study(config, out, images)
    assert second.returncode == 0, second.stderr
    assert "2 runs, 1 of them finished" in second.stderr
    assert second.stderr.count("seed 0 (") == 1
    assert read_results(out) == results


def finished_run(folder, run, knn):
    """The folder of a run that has ended, with the names of folders in its files."""
    folder.mkdir(parents=True)
    lines = []
    for step, value in ((0, 5.0), (8, knn)):
        values = {"step": step, "knn/knn20": value}
        if not run.seed and not step:
            values |= {"knn/pixels_knn20": 3.0, "knn/histogram_knn20": 4.0}
        lines.append(json.dumps(values))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"steps": 8}))
    (folder / "log.txt").write_text(f"images in {ROOT}/images\nresults in {folder.absolute()}\n")
    (folder / "command.txt").write_text("\n".join(["python", "main.py", *run.config_flags]) + "\n")


@pytest.fixture
def recorded(tmp_path):
    """Two finished runs of a study, and where their records are; the runs are gone."""
    config = get_config("benchmark")
    config.runs = config.runs[:1]
    config.groups = (("benchmark", "none", (config.runs[0][0],)),)
    change = f"data.path={ROOT}/images"
    _, runs = study.plan(config, [], (change,), tmp_path / "out", tmp_path / "records")
    for run in runs:
        assert run.results is None
        finished_run(run.folder, run, 20.0 + run.seed)
        run.keep_records()
    (tmp_path / "out").rename(tmp_path / "gone")
    return config, tmp_path


def run_of(folder, *changes):
    return study.Run("it", 0, "quickstart", changes, folder / "out", folder / "records")


def test_a_run_that_was_stopped_is_not_finished(tmp_path):
    run = run_of(tmp_path)
    finished_run(run.folder, run, 20.0)
    assert run.finished
    summary = {"steps": 8, "total_steps": 16}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    run.keep_records()
    assert not run.finished and not run.records.exists()
    run.check_folder()  # it can be resumed
    (run.folder / "summary.json").write_text(json.dumps({**summary, "steps": 16}))
    assert run.finished


def test_results_of_other_options_are_not_those_of_a_run(tmp_path):
    run = run_of(tmp_path)
    finished_run(run.folder, run, 20.0)
    run.check_folder()
    other = run_of(tmp_path, "epochs=8")
    with pytest.raises(UserError, match=r"out has the results of other options.*another --out"):
        other.check_folder()
    assert run.finished  # nothing has changed


def test_records_are_found_whose_options_name_folders(tmp_path, monkeypatch):
    change = f"data.labels={pathlib.Path.home()}/labels.csv"
    run = run_of(tmp_path, change)
    finished_run(run.folder, run, 20.0)
    run.keep_records()
    assert str(pathlib.Path.home()) not in (run.records / "command.txt").read_text()
    shutil.rmtree(run.folder)
    assert run.results == run.records
    assert run_of(tmp_path, "data.labels=labels.csv").results is None


def test_records_are_found_whose_options_lie_in_the_folder_of_the_images(tmp_path):
    def of_images(path, labels="labels.csv"):
        return run_of(tmp_path, f"data.path={path}", f"data.labels={path}/{labels}")

    run = of_images("/here/images")
    finished_run(run.folder, run, 20.0)
    run.keep_records()
    shutil.rmtree(run.folder)
    assert run.finished
    assert of_images("/there/photos").finished
    assert not of_images("/here/images", "others.csv").finished


def test_records_keep_a_log_that_is_not_utf_8(tmp_path):
    run = run_of(tmp_path)
    finished_run(run.folder, run, 20.0)
    (run.folder / "log.txt").write_bytes(b"bad image 1: caf\xe9.png\n")
    run.keep_records()
    assert (run.records / "log.txt").read_text() == "bad image 1: caf\ufffd.png\n"


def test_costs_are_those_of_the_options_wherever_the_images_are(tmp_path, monkeypatch):
    found = {"device": "cpu", "gflop_per_image": 2.0, "images_per_second": 3.0}
    done = types.SimpleNamespace(returncode=0, stdout=json.dumps(found))
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: done)
    changes = ("data.path=/here/images", "data.labels=/here/images/labels.csv")
    path = tmp_path / "cost.json"
    study.measure_costs([run_of(tmp_path, *changes)], path)
    assert "/here" not in path.read_text()
    elsewhere = run_of(tmp_path, *(change.replace("/here", "/there") for change in changes))
    assert study.known_costs([elsewhere], path)["it"]["gflop_per_image"] == [2.0]


def test_records_name_neither_home_nor_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"env PYTHONPATH={ROOT} lmim train {pathlib.Path.home()}/photos --workdir={tmp_path}/a"
    assert records.hide_folders(text, ()) == "env PYTHONPATH=. lmim train ~/photos --workdir=./a"


def test_costs_are_measured_anew_for_other_options(tmp_path, monkeypatch):
    measured = []

    def bench(command, **_):
        measured.append(command[-2:])
        found = {"device": "cpu", "gflop_per_image": 2.0, "images_per_second": len(measured)}
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(found))

    monkeypatch.setattr(study.subprocess, "run", bench)
    first, second = run_of(tmp_path), run_of(tmp_path, "batch_size=8")
    for run, speed in ((first, 1), (first, 1), (second, 2), (second, 2), (first, 3)):
        study.measure_costs([run, run], tmp_path / "cost.json")
        costs = study.known_costs([first, second], tmp_path / "cost.json")
        assert costs == {"it": {"gflop_per_image": [2.0], "step_images_per_second": [speed]}}
    assert measured[1] == ["--config.batch_size=8", "--config.seed=0"]


def test_a_benchmark_that_is_killed_is_named(tmp_path, monkeypatch):
    killed = types.SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(UserError, match="the cost of it failed: exit code -9"):
        study.measure_costs([run_of(tmp_path)], tmp_path / "cost.json")


def test_cores_where_the_system_cannot_bind_processes(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert cores.available() == list(range(os.cpu_count()))
    with cores.bound_to([0]):
        pass


@pytest.mark.slow
def test_ctrl_c_stops_a_study_whose_runs_go_on_later(tmp_path, images):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    out = tmp_path / "out"
    options = ("--set=epochs=100000", "--set=log_every=1", "--set=checkpoint_every=1000000")
    process = subprocess.Popen(
        study_command(config, out, images, *options),
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": conftest.FAST},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = out / "one" / "seed0" / "log.txt"
    while not log.exists() or " step 3/" not in log.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of its processes
    _, said = process.communicate(timeout=120)
    assert process.returncode == study.EXIT_STOPPED, said
    assert "re-run the command to resume" in said
    assert "evaluating it" not in log.read_text()  # what Ctrl-C means to a run of its own
    assert not (out / "one" / "seed0" / "summary.json").exists()
    assert list((out / "one" / "seed0" / "checkpoints").iterdir())


def test_records_replace_runs_and_name_no_folder(recorded):
    config, folder = recorded
    _, runs = study.plan(config, [], ("data.path=elsewhere",), folder / "out", folder / "records")
    assert [run.results for run in runs] == [run.records for run in runs]
    for path in (folder / "records").rglob("*.*"):
        assert str(ROOT) not in path.read_text()
        assert str(folder) not in path.read_text()
    log = (runs[0].records / "log.txt").read_text()
    assert log == "images in DATA\nresults in RUN\n"
    _, others = study.plan(config, [], ("epochs=3",), folder / "out", folder / "records")
    assert [run.results for run in others] == [None, None]  # another command


def test_pages_are_made_from_records_beside_baselines(recorded):
    config, folder = recorded
    groups, runs = study.plan(config, [], (), folder / "out", folder / "records")
    name = runs[0].name
    publisher = study._Publisher(
        folder / "out",
        "Title",
        "command",
        groups,
        runs,
        {name: "what"},
        config.baselines,
        folder / "cost.json",
    )
    publisher.publish()
    table = (folder / "out" / "table.md").read_text()
    assert "GFLOP" not in table
    cost = {"gflop_per_image": 2.5, "step_images_per_second": 3.0}
    cost["command"] = runs[0].recorded_command.splitlines()
    (folder / "cost.json").write_text(json.dumps({name: cost}))
    publisher.publish()  # as after each run, and when it is interrupted
    assert "GFLOP" in (folder / "out" / "table.md").read_text()
    assert f"| {name} | what | 20.5 ± 0.5 |" in table
    assert "| raw pixels | no encoder | 3.0 |" in table
    assert "| color histograms | no encoder | 4.0 |" in table
    assert f"| {name}, untrained | at step 0 | 5.0 ± 0.0 |" in table
    assert (
        f"{name}: +15.5 k-NN 20 % over {name}, untrained; +17.5 k-NN 20 % over raw pixels." in table
    )


def test_pages_have_the_tables_of_the_records(recorded, monkeypatch):
    config, folder = recorded
    monkeypatch.setattr(gen_results, "_config", lambda name: config)
    name = config.runs[0][0]
    page = "before\n<!-- study: benchmark records{} -->\nold\n<!-- end of study -->\nafter\n"
    whole = gen_results.with_tables(page.format(""), folder)
    assert f"| {name} | " in whole and "old" not in whole
    assert f"- {name}: +15.5 k-NN 20 % over {name}, untrained" in whole
    assert gen_results.with_tables(whole, folder) == whole
    short = gen_results.with_tables(page.format(" knn/knn20"), folder)
    assert "| run | description | k-NN 20 % |" in short and "+15.5" not in short
    pairs = gen_results.with_tables(page.format(" accuracies"), folder)
    assert f"| {name} | {config.runs[0][1]} | 5.0 ± 0.0 | 20.5 ± 0.5 |  |  |" in pairs
    assert "| raw pixels | no encoder |  | 3.0 |  |  |" in pairs and "step 0" not in pairs
    assert short.startswith("before\n") and short.endswith("-->\nafter\n")


def test_a_study_stops_in_time(tmp_path):
    _, runs = study.plan(get_config("benchmark"), [], (), tmp_path)
    with pytest.raises(KeyboardInterrupt, match="after --hours=1e-12"):
        study.execute(runs, 1, 1e-12, print)
    assert list(tmp_path.iterdir()) == []  # none was started


def test_an_interrupt_while_costs_are_measured_is_one_line(recorded, monkeypatch):
    config, folder = recorded
    given = types.SimpleNamespace(
        config=config, only=[], set=(), out=str(folder / "out"), parallel=1, hours=0.0
    )
    given.records = str(folder / "records")

    def interrupted(runs, path):
        raise KeyboardInterrupt

    def failed(message, code):  # the real one ends the process, sooner or later
        raise SystemExit(code)

    monkeypatch.setattr(study.flags, "FLAGS", given)
    monkeypatch.setattr(study, "measure_costs", interrupted)
    monkeypatch.setattr(study, "fail", failed)
    for name in ("_title", "_command_line"):
        monkeypatch.setattr(study, name, lambda given: "text")
    config.cost = True
    with pytest.raises(SystemExit) as stopped:
        study.main([])
    assert stopped.value.code == study.EXIT_STOPPED
    assert (folder / "out" / "table.md").exists()
