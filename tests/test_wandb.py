"""Weights & Biases, offline: what is written, resumed runs, and failures that end nothing."""

import json
import logging
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from lmim_jax.train import metric_writer, wandb_writer
from lmim_jax.train.metric_writer import MetricWriter
from lmim_jax.utils.errors import UserError

OPTIONS = ConfigDict({"project": "test", "entity": "", "name": ""})


class Fake:
    """Stands in for the module `wandb`."""

    Settings = dict
    offline = False

    def __init__(self, failing=""):
        self.failing = failing
        self.started = []
        self.logged = []
        self.config = self
        self.id, self.project, self.entity, self.url, self.dir = "abc", "test", "me", "", "dir"

    def fail(self, name):
        if name == self.failing:
            raise RuntimeError(f"{name}: no\nnetwork")

    def init(self, **options):
        self.fail("init")
        self.started.append(options)
        return self

    def update(self, config, allow_val_change):
        assert allow_val_change
        self.fail("update")
        self.logged.append(config)

    def log(self, values, step):
        self.fail("log")
        self.logged.append((step, values))

    def finish(self):
        self.fail("finish")
        self.logged.append("finished")

    def Image(self, pixels):
        return pixels.shape


def write_all(workdir, start=0):
    """What a run of two steps writes."""
    writer = MetricWriter(workdir, start, OPTIONS)
    writer.write_config({"seed": 0})
    writer.write(1, {"loss": 0.5, "collapse_index": 0.25})
    writer.write_pictures(2, {"visualization/pca": np.zeros((4, 6, 3), np.uint8)})
    writer.close()


def test_a_run_gets_the_tags_of_tensorboard_and_is_continued(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_all(tmp_path)
    assert fake.logged == [
        {"seed": 0},
        (1, {"train/loss": 0.5, "collapse/collapse_index": 0.25}),
        (2, {"eval/visualization/pca": (4, 6, 3)}),
        "finished",
    ]
    known = json.loads((tmp_path / wandb_writer.RUN_FILE).read_text())
    assert known == {"id": "abc", "project": "test", "entity": "me"}
    write_all(tmp_path, start=1)
    first, second = fake.started
    assert first["id"] is None and first["name"] == tmp_path.name
    assert second["id"] == "abc" and second["entity"] == "me" and second["resume"] == "allow"


@pytest.mark.parametrize("failing", ["init", "update", "log", "finish"])
def test_a_failure_is_logged_once_and_ends_nothing(tmp_path, monkeypatch, caplog, failing):
    monkeypatch.setitem(sys.modules, "wandb", Fake(failing))
    with caplog.at_level(logging.ERROR):
        write_all(tmp_path)
    (record,) = caplog.records
    assert f"goes on without it: {failing}: no network" in record.getMessage()
    (line,) = metric_writer.read_metrics(tmp_path)
    assert line["loss"] == 0.5


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metric_writer.jax, "process_index", lambda: 1)
    write_all(tmp_path)
    assert not fake.started and not fake.logged


def test_it_is_off_without_a_project_and_needs_its_package_with_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    off = ConfigDict({"project": "", "entity": "", "name": ""})
    wandb_writer.check(off)
    assert wandb_writer.open_writer(tmp_path, off) is None
    with pytest.raises(UserError, match=r"project=test needs .*pip install 'lmim_jax\[wandb\]'"):
        wandb_writer.check(OPTIONS)


@pytest.mark.interop
def test_the_real_library_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="pip install 'lmim_jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with caplog.at_level(logging.ERROR):
        write_all(tmp_path)
        known = json.loads((tmp_path / wandb_writer.RUN_FILE).read_text())
        write_all(tmp_path, start=1)
    assert not [record for record in caplog.records if record.name.startswith("lmim_jax")]
    assert json.loads((tmp_path / wandb_writer.RUN_FILE).read_text()) == known
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{known['id']}"))
    assert len(folders) == 2
    (binary,) = folders[0].glob("*.wandb")
    content = binary.read_bytes()
    assert b"train/loss" in content and b"eval/visualization/pca" in content
