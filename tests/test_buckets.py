"""Runs in buckets, on an emulator of Google Cloud Storage of this machine."""

import builtins
import concurrent.futures
import errno
import io
import json
import logging
import os
import pathlib
import random
import threading

import gcs_emulator
import jax
import numpy as np
import processes
import pytest
import tiny

from lmim_jax.cli import checkpoints as checkpoints_tool
from lmim_jax.cli import export, image_files, pca
from lmim_jax.configs import vit_b
from lmim_jax.data import sources
from lmim_jax.data.eval import segmentation_masks, video_clips
from lmim_jax.distributed import sharding
from lmim_jax.report import log_sections
from lmim_jax.train import checkpoint_manifest, lock, loop, metric_storage, runs, workdir
from lmim_jax.train.metric_writer import MetricWriter, read_metrics
from lmim_jax.utils import array_io, buckets
from lmim_jax.utils.errors import UserError

pytest.importorskip("gcsfs", reason="buckets need gcsfs: pip install 'lmim_jax[gcs]'")


@pytest.mark.parametrize(
    ("text", "kind"),
    [("gs://bkt/run", buckets.BucketPath), ("runs/vit_b", pathlib.Path), ("a:b", pathlib.Path)],
)
def test_a_string_becomes_a_path(text, kind):
    path = buckets.path(text)
    assert isinstance(path, kind)
    assert str(path) == text
    assert str(path / "a" / "b.c") == f"{text}/a/b.c"
    assert (path / "a" / "b.c").relative_to(path).as_posix() == "a/b.c"
    named = buckets.path(path, "a/b.c")
    assert (named.name, named.stem, named.suffix, named.parent.name) == ("b.c", "b", ".c", "a")


@pytest.mark.parametrize(
    "text", ["s3://bkt/run", "gs:/bkt/run", "file:///run", "gs://", "az://a/b"]
)
def test_what_is_not_supported_is_one_line_and_writes_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        buckets.path,
        lock.Lock,
        runs.open_run,
        lambda folder: workdir.check_outside_images(folder, tiny.get_config().data),
        lambda folder: checkpoints_tool.table(folder, verify=False),
        lambda folder: export.export(None, "flax", "online", folder),
    ):
        with pytest.raises(UserError, match=r"gs://BUCKET/FOLDER"):
            use(text)
    assert not list(tmp_path.iterdir())


ONLY_LOCAL = {
    "lmim features RUN IMAGES": lambda path: image_files.open_images(path, vit_b.data()),
    "lmim pca RUN IMAGES": lambda path: pca.with_images(None, path),
    "lmim import-weights FILE": array_io.read,
    "config.data.cache": lambda path: sources.open_shapes(path, "train"),
    "segmentation.images": lambda path: segmentation_masks.open_folders(path, path),
    "video.path": video_clips.open_folder,
}


@pytest.mark.parametrize("what", ONLY_LOCAL)
@pytest.mark.parametrize("text", ["gs://bkt/some", "s3://bkt/some"])
def test_what_must_be_local_is_one_line_and_writes_nothing(what, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{text} (is in a bucket.*storage cp|cannot be used)"):
        ONLY_LOCAL[what](text)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(gcs_emulator, "PAGE", 50)
    folder = buckets.path("gs://bkt/run")
    assert not folder.exists()
    (folder / "a" / "b").write_text("some")
    (folder / "c").write_bytes(b"")
    for i in range(2 * gcs_emulator.PAGE):
        (folder / "many" / str(i)).write_text("x")
    assert folder.is_dir() and (folder / "a").is_dir() and (folder / "c").is_file()
    assert not folder.is_file() and not (folder / "c").is_dir() and not (folder / "ru").exists()
    assert [path.name for path in folder.iterdir()] == ["a", "c", "many"]
    sizes = buckets.file_sizes(folder)
    assert sizes["a/b"] == 4 and sizes["c"] == 0 and len(sizes) == 102
    assert b"".join((folder / "a" / "b").read_chunks(4, 3)) == b"some"
    buckets.remove_tree(folder / "many")
    (folder / "c").unlink()
    (folder / "c").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "c").unlink()
    assert bucket.names("bkt") == ["run/a/b"]


def test_a_write_on_condition(bucket):
    path = buckets.path("gs://bkt/lock")
    _, missing = path.read_version()
    first = path.write_version(b"1", missing)
    assert first and path.write_version(b"2", missing) is None
    assert path.write_version(b"3", first)
    assert path.write_version(None, first) is None
    assert path.read_bytes() == b"3"


@pytest.mark.parametrize(
    ("forbidden", "number", "text"),
    [
        ({"GET"}, errno.EACCES, "bucket bkt: this account lacks a permission"),
        ({"POST"}, errno.EACCES, "bucket bkt: this account lacks a permission"),
        (None, errno.ENOENT, "bucket none: the bucket does not exist"),
    ],
)
def test_what_is_lacking_is_named(bucket, forbidden, number, text):
    folder = buckets.path("gs://bkt/run" if forbidden else "gs://none/run")
    bucket.forbidden = forbidden or set()
    actions = [folder.files, lambda: (folder / "x").write_text("")]
    if forbidden:
        actions = [actions["POST" in forbidden]]
    for act in actions:
        with pytest.raises(OSError, match=text) as caught:
            act()
        assert caught.value.errno == number
    with pytest.raises(UserError, match=text):
        lock.Lock(folder)


def test_a_lock_that_cannot_be_rewritten_is_found_at_the_start(bucket, monkeypatch):
    """Writing an object anew takes one more permission than writing it for the first time."""
    store = gcs_emulator._Handler._store

    def refuse(handler, objects, name_of_bucket, name, content, query):
        if name in objects:
            raise gcs_emulator._error(403, "needs storage.objects.delete")
        return store(handler, objects, name_of_bucket, name, content, query)

    monkeypatch.setattr(gcs_emulator._Handler, "_store", refuse)
    with pytest.raises(UserError, match="lacks a permission"):
        lock.Lock("gs://bkt/run")


@pytest.fixture
def hurry(monkeypatch):
    """Looks and heartbeats in quick succession."""
    monkeypatch.setattr(lock, "LOOK", 0.02)
    monkeypatch.setattr(lock, "LOOKS", 20)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)


DEAD = {"host": "gone", "machine": "x", "pid": 1, "start": 1, "since": "then", "token": "0"}
DEAD_LOCK = (json.dumps(DEAD) + "\n1\n").encode()


def test_of_ten_racing_takers_of_a_bucket_one_wins(bucket, hurry):
    bucket.write("bkt", "run/lock", DEAD_LOCK)
    together = threading.Barrier(10)

    def take(_):
        together.wait()
        try:
            return lock.Lock("gs://bkt/run")
        except UserError:
            return None

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        (winner,) = filter(None, pool.map(take, range(10)))
    winner.confirm()
    winner.release()
    assert bucket.names("bkt") == []


def test_a_stolen_lock_in_a_bucket_stops_the_loser(bucket, hurry):
    with lock.Lock("gs://bkt/run") as loser:
        loser.confirm()
        bucket.write("bkt", "run/lock", DEAD_LOCK)
        with pytest.raises(lock.LockLost, match="was taken over by another run"):
            loser.confirm()
    assert bucket.read("bkt", "run/lock") == DEAD_LOCK


def test_metrics_in_a_bucket_are_there_at_each_save_and_after_a_restart(bucket, monkeypatch):
    monkeypatch.setattr(metric_storage, "PAUSE", 1000.0)
    writer = MetricWriter("gs://bkt/run", 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    assert bucket.names("bkt") == []
    writer.flush()
    assert [line["step"] for line in read_metrics("gs://bkt/run")] == [1, 2, 3]
    assert len(bucket.names("bkt", "run/tensorboard/")) == 1
    writer.write(4, {"loss": 0.0})  # lost, like all after the last save of a killed run
    resumed = MetricWriter("gs://bkt/run", 2)
    resumed.write(3, {"loss": 0.5})
    resumed.write_pictures(3, {"given": np.zeros((4, 4, 3), np.uint8)})
    resumed.close()
    assert [line["step"] for line in read_metrics("gs://bkt/run")] == [1, 2, 3]
    assert bucket.read("bkt", "run/pictures/given_0000003.png").startswith(b"\x89PNG")
    with pytest.raises(UserError, match="was changed by another run"):
        writer.close()


def test_metrics_wait_for_a_bucket_that_refuses_them(bucket, monkeypatch, caplog):
    monkeypatch.setattr(metric_storage, "PAUSE", 0.02)
    writer = MetricWriter("gs://bkt/run", 0)
    bucket.forbidden = {"POST"}
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
        writer.flush()
    bucket.forbidden = set()
    writer.close()
    assert "lacks a permission" in caplog.text
    assert [line["step"] for line in read_metrics("gs://bkt/run")] == [1, 2, 3]


def upload(folder, bucket, prefix):
    """Copy a local folder into a bucket."""
    for name in buckets.file_sizes(folder):
        bucket.write("bkt", f"{prefix}/{name}", (folder / name).read_bytes())


def config_of(images):
    """Of a run of 12 steps, of which 3 are saved."""
    config = tiny.get_config()
    config.data.path = str(images)
    config.evaluators = {}
    config.checkpoint_every = 4
    return config


class Cut(Exception):
    """Ends a run as a kill would."""


@pytest.fixture
def taken_for_local(tmp_path, monkeypatch):
    """Paths in buckets that were given to the file system; the working directory is empty."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    found = []

    def watch(module, name):
        original = getattr(module, name)

        def call(path, *arguments, **options):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("gs:"):
                found.append(f"{name} {path}")
            return original(path, *arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("open", "mkdir", "stat", "scandir", "listdir", "replace", "unlink"):
        watch(os, name)
    watch(builtins, "open")
    watch(io, "open")
    return found


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_of_a_local_folder(
    images, tmp_path, bucket, monkeypatch, caplog, taken_for_local
):
    """It begins in a local folder, is copied to the bucket, cut short, damaged, and ends there."""
    one = sharding.make_mesh(devices=jax.devices()[:1])  # quicker than eight
    monkeypatch.setattr(loop, "_make_mesh", lambda config: one)
    config = config_of(images)
    whole = tmp_path / "whole"
    loop.train(config, whole)

    monkeypatch.setattr(loop.TrainingLoop, "_rescue_state", lambda self, error: None)
    local = tmp_path / "local"
    train_until(5, config, local, monkeypatch)
    assert list(checkpoint_manifest.steps(local)) == [4]
    upload(local, bucket, "run")
    train_until(9, config, "gs://bkt/run", monkeypatch)
    assert list(checkpoint_manifest.steps("gs://bkt/run")) == [4, 8]
    rng = random.Random(0)
    damaged = rng.choice(bucket.names("bkt", "run/checkpoints/8/state/params."))
    content = bytearray(bucket.read("bkt", damaged))
    content[rng.randrange(len(content))] ^= 1
    bucket.write("bkt", damaged, content)
    caplog.clear()
    caplog.set_level(logging.INFO)
    loop.train(config, "gs://bkt/run")
    assert "RESTORING AN OLDER CHECKPOINT, step 4: step 8 is damaged: state/params." in caplog.text
    assert "wrong checksum, manifest.json moved to gs://bkt/run/checkpoints/aside" in caplog.text
    assert "resuming after step 4 of 12" in caplog.text
    assert [line["step"] for line in read_metrics("gs://bkt/run")] == list(range(2, 13, 2))
    assert losses("gs://bkt/run") == losses(whole)
    copy = tmp_path / "copy"
    for name in bucket.names("bkt", "run/"):
        path = copy / name.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.read("bkt", name))
    assert processes.digest(copy, 12) == processes.digest(whole, 12)
    check_tools(tmp_path)
    assert not taken_for_local
    assert not list((tmp_path / "here").iterdir())


def train_until(step, config, folder, monkeypatch):
    """Train until a step, where the run ends as if it were killed."""
    add = loop.MetricLogger.add

    def add_until(self, number, metrics):
        if number >= step:
            raise Cut
        add(self, number, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricLogger, "add", add_until)
        with pytest.raises(Cut):
            loop.train(config, folder)


def losses(folder):
    """{step: loss} of a run."""
    return {line["step"]: line["loss"] for line in read_metrics(folder)}


def check_tools(tmp_path):
    """The tools read a finished run in the bucket."""
    lines, all_good = checkpoints_tool.table("gs://bkt/run", verify=True)
    assert all_good and any("quarantined: gs://bkt/run" in line for line in lines)
    run = runs.open_run("gs://bkt/run")
    assert run.step == 12
    assert log_sections.read_metric_log(run.folder)
    export.export(run, "flax", "online", "gs://bkt/exported")
    with pytest.raises(UserError, match="is not empty"):
        export.export(run, "flax", "online", "gs://bkt/exported")
    exported = runs.open_run("gs://bkt/exported")
    jax.tree.map(np.testing.assert_array_equal, exported.params, run.params)
    with pytest.raises(UserError, match="gs://bkt/nothing is not a run"):
        runs.open_run("gs://bkt/nothing")
    with pytest.raises(UserError, match="bucket none: the bucket does not exist"):
        runs.open_run("gs://none/run")


def test_without_a_network_it_is_said_at_once(images, monkeypatch):
    """Libraries would try for minutes, and print tracebacks."""
    for name in gcs_emulator.VARIABLES:
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # refuses connections
    monkeypatch.setattr(buckets, "CONNECTION_PAUSE", 0.0)
    config = tiny.get_config()
    config.data.path = str(images)
    message = r"^gs://unreachable: 127\.0\.0\.1 cannot be reached \(.*refused"
    with pytest.raises(buckets.BucketUnreachable, match=message):
        loop.train(config, "gs://unreachable/run")
    with pytest.raises(buckets.BucketUnreachable, match=message):
        runs.open_run("gs://unreachable/run")
