"""`lmim train DIR`: what is chosen, what is held out, and that nothing is written into DIR."""

import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import conftest
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from lmim_jax.cli import train
from lmim_jax.configs import own, quickstart, vit_b
from lmim_jax.data import sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import EvaluationData, Subset
from lmim_jax.distributed import preemption, sharding
from lmim_jax.evaluators import neighbors
from lmim_jax.methods import base as methods
from lmim_jax.perf import choices
from lmim_jax.train import loop, metric_logger, workdir
from lmim_jax.utils import progress
from lmim_jax.utils.errors import UserError


def write_images(folder, names, size=(24, 20)):
    rng = np.random.default_rng(len(names))
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 images in two class folders, without splits."""
    names = [f"{kind}/{i:02d}.jpg" for kind in ("cat", "dog") for i in range(15)]
    return write_images(tmp_path_factory.mktemp("photos"), names)


def data_config(path, **changes):
    config = vit_b.get_config().data
    config.update(path=str(path), **changes)
    return config


def names_of(source):
    return {pathlib.Path(source.name(i)).relative_to(source.root) for i in range(len(source))}


# Splits


def test_a_tenth_of_each_class_is_held_out_the_same_one_every_time(photos, tmp_path):
    first = sources.open_splits(data_config(photos, held_out=0.2))
    train, test = first["train"], first["test"]
    assert (len(train), len(test)) == (24, 6)
    assert train.classes == test.classes == ("cat", "dog")
    assert not names_of(train) & names_of(test)
    assert sorted(test.labels.array.tolist()) == [0, 0, 0, 1, 1, 1]
    for split, source in sources.open_splits(data_config(photos, held_out=0.2)).items():
        assert source.identity() == first[split].identity()
    # The choice depends on names alone: in train/ it is the same
    (tmp_path / "train").symlink_to(photos)
    divided = sources.open_splits(data_config(tmp_path, held_out=0.2))
    assert names_of(divided["test"]) == names_of(test)
    few = sources.open_splits(data_config(photos, held_out=0.2, train_per_class=3))
    assert len(few["train"]) == 6
    assert names_of(few["train"]) <= names_of(train)


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (("a.jpg", "b.jpg"), 2, None),  # flat
        (("a.jpg", "x/b.jpg", "y/c.jpg"), 3, None),  # not all in folders
        (("x/a.jpg", "x/b.jpg"), 2, None),  # one folder
        (("x/a.jpg", "y/b.jpg"), 2, None),  # nothing to hold out
        (("train/a.jpg", "train/b.jpg", "val/c.jpg"), 2, None),  # unlabeled
        (("train/x/a.jpg", "train/y/b.jpg", "test/x/c.jpg"), 2, 1),  # there is a test split
        (("x/a.jpg", "x/b.jpg", "y/c.jpg", "y/d.jpg"), 2, 2),
    ],
)
def test_what_is_held_out_of_other_folders(tmp_path, names, train, test):
    write_images(tmp_path, names)
    splits = sources.open_splits(data_config(tmp_path, held_out=0.1))
    assert len(splits["train"]) == train
    assert (splits["test"] and len(splits["test"])) == test


def test_a_share_that_is_none_is_named(photos):
    with pytest.raises(UserError, match=r"config.data.held_out=1.5"):
        sources.open_splits(data_config(photos, held_out=1.5))


def test_a_path_means_a_folder_also_for_the_quickstart(photos, tmp_path):
    data = quickstart.get_config().data
    data.path = str(photos)
    assert sources.kind(data) == "folder"
    assert sources.open_splits(data)["train"].root == str(photos)
    data.path = str(tmp_path)
    with pytest.raises(UserError, match="no images in this folder"):
        sources.open_splits(data)
    assert not list(tmp_path.iterdir())
    # The cache of a run made before version 0.2
    (tmp_path / "shapes/1.0.0").mkdir(parents=True)
    (tmp_path / "shapes/1.0.0/dataset_info.json").touch()
    assert sources.kind(data) == "shapes"


def stored_run(folder, path):
    """A run of the recipe own on images in `path`, as far as its config."""
    config = own.get_config()
    config.data.path = str(path)
    with config.unlocked():
        config.method.frozen = {"name": "mae"}  # as with method.target=frozen:RUN
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json_best_effort())
    return folder


@pytest.mark.parametrize(
    ("argument", "overrides", "path"),
    [
        ("moved", {}, "moved"),  # lmim train moved
        ("", {}, "photos"),  # lmim train --workdir=RUN
        ("flag", {"data.path": "flag"}, "flag"),
    ],
)
def test_a_run_goes_on_with_the_images_that_are_given(
    tmp_path, monkeypatch, argument, overrides, path
):
    run = stored_run(tmp_path / "run", "photos")
    config = own.get_config()
    config.lock()
    config.data.path = argument
    monkeypatch.setattr(train, "flags", types.SimpleNamespace(FLAGS=Given()))
    monkeypatch.setattr(train.config_flags, "get_override_values", lambda _: overrides)
    train.fill_in(config, str(run))
    assert config.data.path == path
    assert "frozen" not in config.method  # it is read from the run of the teacher
    assert config.is_locked


class Given(dict):
    """Flags of which none is given."""

    hours = None

    def __missing__(self, key):
        return None


def test_a_run_inside_its_images_is_refused_before_anything_is_written(photos, monkeypatch):
    config = tiny.get_config()
    config.data.path = str(photos)
    monkeypatch.chdir(photos)
    for folder in (photos / "run", pathlib.Path("runs/x"), photos):
        with pytest.raises(UserError, match="inside the images"):
            loop.train(config, folder)
    assert not (photos / "runs").exists()
    workdir.check_outside_images(photos.parent / "run", config.data)


# Choices


class Unmeasured(choices.Chooser):
    """Chooses for another platform; nothing is traced."""

    def __init__(self, monkeypatch, platform, sides, images, given=(), memory=20e9, **changes):
        config = own.get_config()
        config.data.path = "/images"
        config.update_from_flattened_dict(changes)
        super().__init__(config, given)
        self._platform = platform
        self._on_cpu = platform == "cpu"
        monkeypatch.setattr(choices, "memory_limit", lambda: memory)
        # 10 MB an image of a micro-batch
        monkeypatch.setattr(
            choices,
            "needed_bytes",
            lambda config, *_: 1e7 * config.batch_size / config.micro_batches,
        )
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self._choose_resolution(np.array([sides]))
        self._choose_encoder(images)
        self._choose_batch(images, mesh)
        self._choose_length(images, 100.0)
        self._choose_intervals(images, 100.0)


@pytest.mark.parametrize(
    ("platform", "sides", "images", "expected"),
    [
        ("cpu", (32, 32), 3600, (4, (8, 8), 96, 128, 4, "float32")),
        ("cpu", (375, 500), 125, (8, (8, 8), 96, 16, 1, "float32")),
        ("gpu", (32, 40), 3600, (4, (8, 8), 192, 256, 1, "bfloat16")),
        ("gpu", (375, 500), 100_000, (16, (14, 14), 384, 1024, 1, "bfloat16")),
        ("tpu", (375, 500), 1_200_000, (16, (14, 14), 768, 1024, 1, "bfloat16")),
    ],
)
def test_sizes_follow_images_and_machine(monkeypatch, platform, sides, images, expected):
    config = Unmeasured(monkeypatch, platform, sides, images).config
    method = config.method
    found = (method.patch_size, method.grid, method.width, config.batch_size)
    assert (*found, config.micro_batches, method.dtype) == expected
    assert method.decoder_width % method.decoder_heads == 0
    assert config.log_every <= config.checkpoint_every <= config.epochs * images
    assert config.optimizer.warmup_epochs < config.epochs


def test_a_handful_of_images_is_enough(monkeypatch):
    config = Unmeasured(monkeypatch, "cpu", (375, 500), 6).config
    assert (config.batch_size, config.epochs) == (4, 800)


@pytest.mark.parametrize(
    ("folders", "given", "expected"),
    [
        (("train", "test", "val"), {}, ("train", "test")),
        (("Training", "Val"), {}, ("Training", "Val")),
        (("train",), {}, ("train", "")),
        (("cat", "dog"), {}, ("train", "test")),
        (("train", "val", "mine"), {"test_split": "mine"}, ("train", "mine")),
    ],
)
def test_splits_are_found_by_their_names(tmp_path, folders, given, expected):
    for folder in folders:
        (tmp_path / folder).mkdir()
    config = own.get_config()
    config.data.update(path=str(tmp_path), **given)
    choices.Chooser(config, [f"data.{key}" for key in given])._choose_splits()
    assert (config.data.train_split, config.data.test_split) == expected


def test_a_large_batch_is_divided_until_it_fits(monkeypatch):
    config = Unmeasured(monkeypatch, "gpu", (375, 500), 100_000, memory=3e9).config
    assert (config.batch_size, config.micro_batches) == (1024, 4)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("micro_batches", 1, (128, 1)),
        ("batch_size", 127, (127, 1)),  # its parts would be single images
        ("batch_size", 74, (74, 1)),
        ("batch_size", 120, (120, 4)),
        ("method.negatives", "batch", (128, 1)),  # it is not to be divided
    ],
)
def test_parts_of_a_batch_on_a_cpu_are_neither_too_large_nor_too_small(
    monkeypatch, caplog, option, value, expected
):
    chooser = Unmeasured(monkeypatch, "cpu", (32, 32), 3600, [option], **{option: value})
    assert (chooser.config.batch_size, chooser.config.micro_batches) == expected
    assert "more than there is" not in caplog.text
    assert not any("inf" in choice.reason for choice in chooser.choices)


def test_a_batch_below_the_number_of_devices_is_refused():
    config = own.get_config()
    config.batch_size = 4
    chooser = choices.Chooser(config, ["batch_size"])
    with pytest.raises(UserError, match=r"config\.batch_size=4 is not divisible by 8 device"):
        chooser._choose_batch(100, sharding.make_mesh())


def test_the_length_follows_the_hours_and_ends_at_800_epochs(monkeypatch):
    short = Unmeasured(monkeypatch, "cpu", (32, 32), 3600, hours=0.1).config
    assert short.epochs == 10  # 36,000 images in 6 minutes
    assert Unmeasured(monkeypatch, "cpu", (32, 32), 100, hours=2.0).config.epochs == 800


def test_what_is_given_is_kept_and_flags_change_the_rest(monkeypatch):
    given = ("batch_size", "method.patch_size")
    chooser = Unmeasured(monkeypatch, "cpu", (375, 500), 125, given, batch_size=8)
    assert chooser.config.batch_size == 8
    assert chooser.config.method.patch_size == 8
    lines = choices.table(chooser.choices)
    flags = shlex.split(" ".join(lines[1::2]))
    assert "--config.batch_size=8" in flags
    assert "--config.method.grid=(8, 8)" in flags
    assert "--hours=0.07" in flags


@pytest.mark.slow
def test_the_speed_is_that_of_real_steps(photos, monkeypatch):
    monkeypatch.setattr(choices, "MEASURED_SECONDS", 0.05)
    config = tiny.get_config()
    config.data.path = str(photos)
    source = sources.open_splits(config.data)["train"]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert 1 < choices.measure_images_per_second(config, source, mesh) < 1e6


# Results


@pytest.mark.slow
def test_ctrl_c_saves_then_shows_results_and_the_run_goes_on(images, tmp_path, monkeypatch):
    config = tiny.get_config()
    config.data.path = str(images)
    del config.evaluators.visualization
    config.log_every = 100
    add = metric_logger.MetricLogger.add

    def press(self, step, metrics):
        add(self, step, metrics)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(metric_logger.MetricLogger, "add", press)
    with pytest.raises(preemption.Preempted, match="after step 4 of 12"):
        loop.train(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["knn5"].keys() >= {"untrained", "trained"}
    assert summary["loss"] > 0  # of steps that were not logged yet
    assert (tmp_path / "pictures/curves.png").exists()
    monkeypatch.setattr(metric_logger.MetricLogger, "add", add)
    assert loop.train(config, tmp_path)["steps"] == 12


def test_a_run_of_two_steps_ends_with_figures_gauges_and_curves(images, tmp_path, caplog):
    config = tiny.get_config()
    config.data.path = str(images)
    config.data.source = "shapes"  # as in quickstart
    config.update(total_steps=2, log_every=50)
    config.evaluators.knn.every = 100.0
    del config.evaluators.visualization
    caplog.set_level("INFO")
    summary = loop.train(config, tmp_path)
    assert summary["knn5"].keys() == {"majority", "trained"}
    assert summary["effective_rank"] > 0
    assert (tmp_path / "pictures/curves.png").exists()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["data"]["source"], stored["training_images"]["source"]) == ("folder", "folder")
    lines = [record.getMessage() for record in caplog.records]
    compiled = next(i for i, line in enumerate(lines) if re.match(r"compiled in \d+", line))
    assert "compiling the train step ..." in lines[:compiled]
    assert not any(line.startswith("step 1") for line in lines[:compiled])


def test_a_picture_of_neighbors_needs_no_classes(tmp_path):
    names = [f"{i}.png" for i in range(9)]
    write_images(tmp_path, names)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "damaged.png").write_bytes(b"no image")
    config = tiny.get_config()
    config.data.path = str(tmp_path)
    config.data.max_bad_fraction = 0.5
    method = methods.from_config(config.method, total_steps=1, steps_per_epoch=1)
    augment = Augment.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    splits = sources.open_splits(config.data)
    data = EvaluationData(splits, config.data, augment, mesh)
    evaluator = neighbors.Evaluator(feature="pixels", images=11, count=2, bank=100, batch_size=11)
    (picture,) = evaluator.run(method, {}, data).values()
    assert picture.shape[-1] == 3
    one = EvaluationData(
        {"train": Subset(splits["train"], (0,)), "test": None}, config.data, augment, mesh
    )
    assert evaluator.run(method, {}, one) == {}


def test_long_work_is_not_silent(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "SILENCE", 0.05)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    with progress.working("solving"):
        time.sleep(0.4)
    assert "solving: 0s so far" in caplog.text
    assert 2 <= caplog.text.count("so far") <= 4  # the intervals double
    caplog.clear()
    for _ in progress.show(range(20), "images", 20):
        time.sleep(0.02)
    assert re.search(r"images: \d+ of 20 batches, ETA 0s", caplog.text)


def test_ctrl_c_while_the_page_is_written_does_not_say_that_work_is_lost(
    tmp_path, monkeypatch, caplog
):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.runs, "open_run", press)
    monkeypatch.setattr(train, "exit_now", sys.exit)
    with pytest.raises(SystemExit) as ended:
        train.write_report(str(tmp_path))
    assert ended.value.code == train.ABORTED
    assert "the run is finished, and saved: " in caplog.text
    assert f"report --workdir={tmp_path}" in caplog.text


# The command

COMMANDS = """
import os, sys
from lmim_jax.cli import __main__
import lmim_jax.train.loop, lmim_jax.perf.choices
for call in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"exit code {code} of {call}", file=sys.stderr, flush=True)
        continue
    sys.argv = ["lmim", *call.split()]
    __main__.main()
"""
SMALL = tiny.CHOSEN | {
    "report": False,
    "evaluators.logistic_regression.l2": "(0.001,)",
    "evaluators.logistic_regression.iterations": 10,
    "evaluators.logistic_regression.baselines": False,
    "evaluators.knn.baselines": False,
    "evaluators.visualization.every": 0.0,
}


def checksums(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        contents = path.read_bytes() if path.is_file() else b""
        stat = path.stat()
        found[str(path)] = (hashlib.sha256(contents).hexdigest(), stat.st_mtime_ns, stat.st_mode)
    return found


@pytest.mark.slow
def test_no_command_writes_into_the_images(photos, tmp_path):
    before = checksums(photos)
    options = " ".join(f"--config.{key}={value}" for key, value in SMALL.items())
    train = f"train {photos} --workdir={tmp_path}/run {options}"
    calls = (
        train,
        train,  # the settings of the run, which is finished
        f"evaluate --workdir={tmp_path}/run --evaluators=knn --config.knn.batch_size=8",
        f"features --workdir={tmp_path}/run {photos} --out={tmp_path}/f.npz --batch_size=8",
        f"prepare --folder={photos} --out={tmp_path}/tfds --name=photos --processes=1",
        f"train {photos} --workdir={photos}/run",
    )
    flags = f"{conftest.FAST} --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(conftest.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *calls],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    for number, call in enumerate(calls):
        code = 2 if number == len(calls) - 1 else 0
        assert f"exit code {code} of {call}" in done.stderr, done.stderr
    assert checksums(photos) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz", "run", "tfds"]
    assert not list(tmp_path.rglob("incomplete*"))
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["data"]["path"] == str(photos)
    assert config["training_images"]["images"] == 26
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["linear"].keys() >= {"untrained", "trained"}
    assert (tmp_path / "run/pictures/curves.png").exists()
    assert list((tmp_path / "run/pictures").glob("neighbors_*.png"))
    assert "settings: those that were chosen" in done.stderr
    assert "this run is finished" in done.stderr
