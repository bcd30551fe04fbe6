"""Whole runs: in this process, and as the command that users type, killed and resumed."""

import json
import logging
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import conftest
import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
import tiny

import lmim_jax
from lmim_jax.train import checkpoint_manifest, checkpoints, loop, metric_logger
from lmim_jax.train.build import build
from lmim_jax.train.metric_writer import read_metrics
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import LINE_WIDTH, fill_lines

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {"evaluators": {}}  # compiles faster


def recipe(images, **change):
    config = tiny.get_config()
    config.data.path = str(images)
    config.update_from_flattened_dict(change)
    return config


def lines(workdir):
    """The metric lines of a run."""
    return read_metrics(workdir) if pathlib.Path(workdir, "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run in this process: (config, workdir, summary)."""
    workdir = tmp_path_factory.mktemp("finished")
    config = recipe(images, **{"evaluators.knn.baselines": True})
    return config, workdir, loop.train(config, workdir)


def test_a_run_logs_what_it_did(finished):
    _, workdir, summary = finished
    logged = lines(workdir)
    training = [line for line in logged if "loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12]
    keys = {
        "grad_norm",
        "reconstruction",
        "patch_accuracy",
        "similarity_predictions",
        "learning_rate",
        "epoch",
    }
    assert keys <= training[0].keys()
    assert [line["step"] for line in logged if "knn/knn5" in line] == [0, 6, 12]
    collapse_metrics = {
        "collapse_index",
        "effective_rank",
        "feature_std",
        "sigreg_gauge",
        "patch_chance",
        "similarity_targets",
    }
    assert all(collapse_metrics <= line.keys() for line in training)
    assert {
        "knn/nn1",
        "knn/knn5",
        "knn/loo1",
        "images_per_second",
        "wall_seconds",
        "collapse_index",
    } <= summary.keys()
    assert [line["step"] for line in logged if "knn/pixels_knn5" in line] == [0]
    assert summary["knn5"] == {
        "majority": 50.0,
        "pixels": logged[0]["knn/pixels_knn5"],
        "histogram": logged[0]["knn/histogram_knn5"],
        "untrained": logged[0]["knn/knn5"],
        "trained": summary["knn/knn5"],
    }
    names = {
        "visualization_given_0000000.png",
        "visualization_seen_0000000.png",
        "visualization_given_0000012.png",
        "visualization_seen_0000012.png",
        "curves.png",
    }
    assert {path.name for path in (workdir / "pictures").iterdir()} == names
    assert json.loads((workdir / "summary.json").read_text()) == summary
    tags = {tag for event in board_events(workdir) for tag in event}
    assert {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "collapse/effective_rank",
        "collapse/similarity_targets",
        "eval/knn/knn5",
        "eval/visualization/seen",
        "speed/images_per_second",
        "config/text_summary",
    } <= tags
    assert {tag.partition("/")[0] for tag in tags} == {
        "train",
        "collapse",
        "eval",
        "speed",
        "config",
    }
    assert list(checkpoints.steps(workdir)) == [6, 9, 12]  # keep 3


def board_events(workdir):
    """{tag: value} of each event that TensorBoard would read."""
    from tensorboardX.proto.event_pb2 import Event

    for path in (workdir / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            yield {value.tag: value for value in event.summary.value}


def test_tensorboard_shows_the_config_as_text(finished):
    _, workdir, _ = finished
    texts = [
        event["config/text_summary"]
        for event in board_events(workdir)
        if "config/text_summary" in event
    ]
    lines = texts[0].tensor.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)  # a block of code in Markdown
    stored = json.loads((workdir / "config.json").read_text())
    del stored["training_images"]
    assert json.loads("\n".join(lines)) == stored


def test_lines_of_metrics_fit_on_the_console():
    parts = [f"metric_{i} {i / 7:.3g}" for i in range(40)]
    lines = fill_lines(parts, "step 5")
    assert "  ".join(line.strip() for line in lines) == "step 5  " + "  ".join(parts)
    assert len(lines) > 3
    assert all(len(f"00:00:00 {line}") <= LINE_WIDTH for line in lines)
    assert len(f"00:00:00 {lines[0]}  {parts[0]}") > LINE_WIDTH - len(parts[0])
    assert fill_lines([]) == []


def test_a_finished_run_says_so_and_does_nothing(finished, caplog):
    config, workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO, logger="lmim_jax"):
        assert loop.train(config, workdir) == summary
    assert "this run is finished: 12 of 12 steps" in caplog.text
    assert "trained encoder" in caplog.text
    assert "Next steps" in caplog.text
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_with_a_damaged_last_checkpoint_is_mended(finished, tmp_path, caplog):
    config, workdir, summary = finished
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    last = copy / "checkpoints" / "12"
    path = max((path for path in last.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = loop.train(config, copy)
    assert "this run was finished, but its last checkpoint is damaged" in caplog.text
    assert checkpoint_manifest.verify(last).state == "good"
    assert processes.digest(copy, 12) == processes.digest(workdir, 12)
    assert again["loss"] == summary["loss"]
    assert (copy / "checkpoints" / "aside" / "12-damaged").is_dir()
    shutil.rmtree(copy / "checkpoints")  # to save space
    assert loop.train(config, copy) == again


def test_a_run_killed_before_its_summary_is_evaluated_again(finished):
    config, workdir, summary = finished
    (workdir / "summary.json").unlink()
    path = workdir / "metrics.jsonl"
    before = path.read_text().splitlines()
    assert before[-1].startswith('{"step": 12, "knn/')
    path.write_text("\n".join(before[:-1]) + "\n")
    again = loop.train(config, workdir)
    assert path.read_text().splitlines() == before  # without the baselines again
    accuracies = {name: value for name, value in summary.items() if "knn" in name}
    assert {name: value for name, value in again.items() if "knn" in name} == accuracies
    (workdir / "summary.json").write_text(json.dumps(summary))


def test_the_parts_of_a_recipe_need_no_data():
    parts = build(tiny.get_config(), steps_per_epoch=6)
    assert (parts.total_steps, parts.steps_per_epoch) == (12, 6)
    state = parts.abstract_state()
    assert state.params["encoder"]["cls_token"].shape == (1, 1, 16)
    shapes = {name: array.shape for name, array in parts.abstract_batch(8).items()}
    assert shapes == {"image": (8, 40, 40, 3), "size": (8, 2), "label": (8,)}
    assert [(one.title, one.every) for one in parts.schedule_evaluators()] == [
        ("knn", 6),
        ("visualization", 12),
    ]
    assert float(parts.learning_rate(3)) > float(parts.learning_rate(0))


def test_weights_load_alone_in_a_notebook(finished, tmp_path):
    _, workdir, _ = finished
    model = lmim_jax.load(workdir)
    online = model.params
    target = lmim_jax.load(workdir, weights="target").params
    *_, newest = checkpoints.steps(workdir).values()
    saved = ocp.PyTreeCheckpointer().restore(newest.absolute() / "state")
    for params, name in ((online, "params"), (target, "target")):
        jax.tree.map(np.testing.assert_array_equal, params["encoder"], saved[name]["encoder"])
    features = model.method.features(online, np.zeros((1, 16, 16, 3), np.float32))
    assert features["patches"].shape == (1, 16, 16)
    with pytest.raises(UserError, match=r"is not a run: it has no config.json"):
        lmim_jax.load(tmp_path)
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(UserError, match=r"no checkpoints here"):
        lmim_jax.load(tmp_path)


HARMFUL = [
    {"seed": 1},
    {"batch_size": 16},
    {"micro_batches": 2, "batch_size": 16},
    {"epochs": 3},
    {"total_steps": 13},
    {"on_nonfinite": "skip"},
    {"data.canvas": 64},
    {"data.train_per_class": 20},
    {"augment.flip": False},
    {"augment.interpolation": "bilinear"},
    {"augment.scale": (0.5, 1.0)},
    {"method.tau": 0.3},
    {"method.target": "stop_gradient"},
    {"method.loss": "mse"},
    {"method.dtype": "bfloat16"},
    {"method.depth": 2},
    {"method.num_visible": 5},
    {"method.similarity_weight": 0.0},
    {"optimizer.b2": 0.99},
    {"optimizer.base_lr": 0.01},
    {"optimizer.weight_decay": 0.1},
    {"optimizer.warmup_epochs": 0.25},
]


@pytest.mark.parametrize("change", HARMFUL, ids=str)
def test_another_config_in_its_workdir_is_refused_by_key(finished, images, change):
    _, workdir, _ = finished
    with pytest.raises(
        UserError, match=r"the run of another config.*choose another --workdir"
    ) as refused:
        loop.train(recipe(images, **change), workdir)
    for key, value in change.items():
        shown = list(value) if isinstance(value, tuple) else value
        pattern = rf"{key} [^,]+(, [^,]+\])? -> {re.escape(str(shown))}"
        assert re.search(pattern, str(refused.value)), refused.value


def test_other_images_in_its_workdir_are_refused(finished, images, tmp_path):
    _, workdir, _ = finished
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    loop.train(recipe(tmp_path), workdir)  # the same images elsewhere: fine
    (tmp_path / "train" / "cat" / "00.png").rename(tmp_path / "train" / "cat" / "new.png")
    with pytest.raises(UserError, match=r"training_images\.names"):
        loop.train(recipe(tmp_path), workdir)


def test_harmless_keys_may_change(finished, images):
    _, workdir, summary = finished
    change = {"log_every": 5, "checkpoint_keep": 9, "data.threads": 3, "evaluators.knn.k": (3,)}
    change |= {"deterministic": True, "xla_flags": "none"}
    assert loop.train(recipe(images, **change), workdir) == summary


NAN = {  # key to set -> (value, the quantity named first)
    "optimizer.base_lr": (1e30, "(loss|grad_norm|param_norm|target_norm)"),
    "augment.std": ((1e-45, 1e-45, 1e-45), "input_mean"),
    "method.momentum_start": (math.nan, "target_norm"),
}


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.base_lr",
        pytest.param("augment.std", marks=pytest.mark.slow),
        pytest.param("method.momentum_start", marks=pytest.mark.slow),
    ],
)
def test_nan_stops_the_run_naming_step_and_quantity(images, tmp_path, key):
    value, quantity = NAN[key]
    with pytest.raises(
        metric_logger.NonFinite, match=rf"step \d+: {quantity} = (nan|-?inf)"
    ) as caught:
        loop.train(recipe(images, **{key: value, "checkpoint_every": 1, **SMALL}), tmp_path)
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    kept = list(checkpoints.steps(tmp_path))
    assert kept == list(range(1, step))[-3:]  # every finite state, and nothing after it
    assert all(math.isfinite(value) for line in lines(tmp_path) for value in line.values())


def test_training_lowers_the_loss_below_chance(images, tmp_path):
    change = {"total_steps": 60, "optimizer.base_lr": 0.1, "method.similarity_weight": 0.0, **SMALL}
    change |= {"checkpoint_every": 1000, "log_every": 5}
    loop.train(recipe(images, **change), tmp_path)
    losses = [line["reconstruction"] for line in lines(tmp_path)]
    chance = 2 * 0.2 * math.log(12)  # 12 masked patches
    assert np.mean(losses[-5:]) < min(0.95 * chance, np.mean(losses[:3]) - 0.05)


def test_total_steps_replaces_epochs(images, tmp_path):
    loop.train(recipe(images, total_steps=2, **SMALL), tmp_path)
    assert lines(tmp_path)[-1]["step"] == 2


def test_images_without_classes_train_without_knn(images, tmp_path):
    config = recipe(images / "train" / "cat", total_steps=2)
    summary = loop.train(config, tmp_path)
    assert not any(name.startswith("knn") for name in summary)


def command(images, workdir, *flags):
    """main.py as users call it, on one device."""
    environment = {**os.environ, "XLA_FLAGS": conftest.FAST, "PYTHONPATH": str(ROOT)}
    flags = [
        "--config=tests/tiny.py",
        f"--config.data.path={images}",
        f"--workdir={workdir}",
        *flags,
    ]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "main.py", *flags], cwd=ROOT, env=environment, **pipe)


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ([], "quickstart"),
        (["--config", "configs/vit_b.py"], "vit_b"),
        (["--config=configs/vit_s.py"], "vit_s"),
        (["--config=vit_l"], "vit_l"),
    ],
)
def test_the_recipe_is_chosen_by_flag(flags, recipe):
    script = (
        "import sys; from lmim_jax.cli import app, train; train.define_flags();"
        "app.parse_flags(train.RECIPES, sys.argv);"
        "print(train.flags.FLAGS['config'].config_filename)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / done.stdout.strip()).samefile(ROOT / "configs" / f"{recipe}.py")


def test_skipping_stops_after_too_many_in_a_row(images, tmp_path, caplog):
    change = {"augment.std": 3 * (1e-45,), "on_nonfinite": "skip", "max_skipped": 3, **SMALL}
    with pytest.raises(metric_logger.NonFinite, match=r"step 4: input_mean = "):
        loop.train(recipe(images, **change), tmp_path)
    skipped = [record.args[:2] for record in caplog.records if "skipped" in record.msg]
    assert skipped == [(1, 1), (2, 2), (3, 3)]


TOOLS = {
    "supervised-baseline --config.methd.tau=1": "unknown config key config.methd.tau",
    "supervised-baseline --config=configs/none.py": "configs/none.py: no such file",
    "bench": "--what",
    "checkpoints": "give --workdir=RUN",
    "checkpoints /nowhere --verify": "no checkpoints here",
}


@pytest.mark.parametrize("call", TOOLS)
def test_a_tool_called_wrongly_says_so_in_one_line(call):
    command = [sys.executable, "-m", "lmim_jax.cli", *call.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(TOOLS[call], done.stderr.splitlines()[-1]), done.stderr


BAD = {
    "--config.method.taau=1": "unknown config key config.method.taau.*tau",
    "--config.methd.tau=1": "unknown config key config.methd.tau.*method",
    "--confg=x": "Unknown command line flag 'confg'",
    "--config.batch_size=lots": "config.batch_size=lots",
    "--config=configs/none.py": "configs/none.py: no such file",
    "--config.data.path=/nowhere": "config.data.path='/nowhere' is not a folder",
    "--config.batch_size=7 --config.micro_batches=2": "config.batch_size=7 is not divisible",
    "--config.batch_size=4096": "more than the 48 training images",
    "--config.method.num_visible=16": "config.method.num_visible=16",
    "--config.data.source=foldr": "did you mean folder",
    "--config.data.resize_on=devise": "config.data.resize_on='devise'",
    "--config.on_nonfinite=skp": "config.on_nonfinite='skp' must be one of: stop | skip",
}


def test_bad_input_is_one_line_and_exit_code_2(images, tmp_path):
    running = {flags: command(images, tmp_path, *flags.split()) for flags in BAD}
    for flags, process in running.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2, output
        assert "Traceback" not in output
        assert output.splitlines()[-1].startswith("error: ")
        assert re.search(BAD[flags], output.splitlines()[-1]), output
    assert not any(tmp_path.iterdir())
