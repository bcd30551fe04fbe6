"""Prepared datasets in buckets: read in place, and copied to a local disk."""

import contextlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import gcs_emulator
import pytest

from lmim_jax.cli import prepare_data
from lmim_jax.configs import vit_b
from lmim_jax.data import sources, staging, tfds_source
from lmim_jax.data.prepare import tfds_writer
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

CHUNK = 1 << 13
STAGE = """
import sys
from lmim_jax.data import staging
from lmim_jax.utils import buckets
staging.CHUNK = 1 << 13
staging.stage(buckets.path(sys.argv[1]), sys.argv[3:], sys.argv[2])
"""


@pytest.fixture(scope="module")
def dataset(images, tmp_path_factory):
    """A prepared dataset of several shards: the folder that holds it."""
    root = tmp_path_factory.mktemp("prepared")
    target = root / "tiny" / "1.0.0"
    (target / tfds_writer.UNFINISHED).mkdir(parents=True)
    tasks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_writer, "SHARD_BYTES", 30_000)
        for split in ("train", "test"):
            source = sources.open_folder(images, split)
            tasks += tfds_writer.plan_shards(target, "tiny", split, source, 0)
    for task in tasks:
        tfds_writer.write_shard(task)
    tfds_writer.finish_dataset(target, ("cat", "dog"), tasks)
    return root


@pytest.fixture
def uploaded(dataset, bucket, monkeypatch):
    """The emulator with the dataset in gs://bkt/data."""
    for name in buckets.file_sizes(dataset):
        bucket.write("bkt", f"data/{name}", (dataset / name).read_bytes())
    monkeypatch.setattr(staging, "CHUNK", CHUNK)
    tfds_source._report_cost.cache_clear()
    return bucket


@pytest.fixture
def shards(dataset):
    """{name: bytes} of the files with records."""
    sizes = buckets.file_sizes(dataset / "tiny" / "1.0.0")
    found = {name: size for name, size in sizes.items() if staging.SHARD.search(name)}
    assert len(found) > 4
    return found


def config_of(path, stage="", name=""):
    config = vit_b.data()
    config.update(path=path, stage=str(stage), name=name)
    return config


def records_of(splits):
    """All records of both splits."""
    records = {}
    for split, source in splits.items():
        records[split] = [source.record(index) for index in range(len(source))]
    return records


def local_records(dataset):
    splits = ("train", "test")
    return records_of({name: tfds_source.open_tfds("tiny", dataset, name) for name in splits})


def fetches(bucket, name):
    """How many times bytes of an object were asked for."""
    quoted = name.replace("/", "%2F")
    asked = [path for _, path in bucket.requests if name in path or quoted in path]
    return len([path for path in asked if "alt=media" in path])


@pytest.mark.parametrize("path", ["gs://bkt/data", "gs://bkt/data/tiny/1.0.0"])
def test_records_in_a_bucket_are_those_of_a_local_folder(uploaded, dataset, path, caplog):
    splits = sources.open_splits(config_of(path))
    assert records_of(splits) == local_records(dataset)
    assert splits["train"].classes == ("cat", "dog")
    assert caplog.text.count("--config.data.stage=DIR") == 1
    copy = pickle.loads(pickle.dumps(splits["train"]))  # as worker processes get it
    assert copy.record(3) == splits["train"].record(3)


def test_a_dataset_in_a_bucket_by_name(uploaded, dataset):
    config = config_of("")
    config.update(source="tfds", dir="gs://bkt/data", name="tiny", test_split="")
    config.train_split = "train[25%:50%]"
    whole = tfds_source.open_tfds("tiny", dataset, "train")
    source = sources.open_splits(config)["train"]
    assert [source.record(i) for i in range(len(source))] == [
        whole.record(i) for i in range(12, 24)
    ]


def test_staged_records_are_the_same_and_are_fetched_once(uploaded, dataset, shards, tmp_path):
    config = config_of("gs://bkt/data", tmp_path)
    for _ in range(2):
        splits = sources.open_splits(config)
        assert records_of(splits) == local_records(dataset)
    for name, size in shards.items():
        assert fetches(uploaded, name) == -(-size // CHUNK)
        copied = tmp_path / "bkt" / "data" / "tiny" / "1.0.0" / name
        assert copied.read_bytes() == (dataset / "tiny" / "1.0.0" / name).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_only_the_needed_shards_are_staged(uploaded, dataset, tmp_path):
    config = config_of("gs://bkt/data", tmp_path)
    config.update(train_split="train[:10%]", test_split="")
    source = sources.open_splits(config)["train"]
    whole = tfds_source.open_tfds("tiny", dataset, "train")
    assert source.record(4) == whole.record(4)
    assert len(list(tmp_path.rglob("*.array_record-*"))) == 1


def stage(tmp_path, shards):
    return staging.stage(buckets.path("gs://bkt/data/tiny/1.0.0"), shards, tmp_path)


def start(tmp_path, shards):
    """A process that stages."""
    arguments = ["gs://bkt/data/tiny/1.0.0", str(tmp_path), *shards]
    return subprocess.Popen([sys.executable, "-c", STAGE, *arguments])


def slow_down(monkeypatch, seconds):
    """Let the emulator wait before it sends a part of an object."""
    send = gcs_emulator._Handler._send

    def send_late(self, reply):
        if reply.status == 206:
            time.sleep(seconds)
        send(self, reply)

    monkeypatch.setattr(gcs_emulator._Handler, "_send", send_late)


def _partial_bytes(folder):
    """Bytes in files whose copy has begun; a file may get its final name in between."""
    total = 0
    for path in folder.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_killed_in_the_middle_it_goes_on_where_it_was(
    uploaded, dataset, shards, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        slow_down(patch, 0.1)
        process = start(tmp_path, shards)
        while _partial_bytes(tmp_path) < 10 * CHUNK:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    there = sum(path.stat().st_size for path in tmp_path.rglob("*.*-of-*"))
    assert 10 * CHUNK <= there < sum(shards.values())
    uploaded.requests.clear()
    folder = stage(tmp_path, shards)
    for name in shards:
        assert (folder / name).read_bytes() == (dataset / "tiny" / "1.0.0" / name).read_bytes()
    again = sum(fetches(uploaded, name) for name in shards)
    assert again <= (sum(shards.values()) - there) // CHUNK + len(shards)


def test_two_processes_of_a_host_stage_once(uploaded, shards, tmp_path, monkeypatch):
    slow_down(monkeypatch, 0.05)
    processes = [start(tmp_path, shards) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    for name, size in shards.items():
        assert fetches(uploaded, name) == -(-size // CHUNK)


def test_wrong_bytes_on_the_disk_are_found(uploaded, dataset, shards, tmp_path, caplog):
    folder = stage(tmp_path, shards)
    damaged = folder / sorted(shards)[1]
    content = bytearray(damaged.read_bytes())
    times = damaged.stat()
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    uploaded.requests.clear()
    stage(tmp_path, shards)
    assert f"{damaged} does not have the bytes of the object" in caplog.text
    assert damaged.read_bytes() == (dataset / "tiny" / "1.0.0" / damaged.name).read_bytes()
    assert [name for name in shards if fetches(uploaded, name)] == [damaged.name]


@pytest.mark.parametrize("times", [1, 2])
def test_wrong_bytes_that_arrive_are_found(uploaded, shards, tmp_path, monkeypatch, caplog, times):
    name = min(shards)
    read = buckets.BucketPath.read_range
    flips = iter(range(times))

    def read_wrong(self, start, stop):
        data = bytearray(read(self, start, stop))
        if self.name == name and start == 0 and next(flips, None) is not None:
            data[7] ^= 1
        return bytes(data)

    monkeypatch.setattr(buckets.BucketPath, "read_range", read_wrong)
    if times == 1:
        assert (stage(tmp_path, shards) / name).exists()
    else:
        with pytest.raises(UserError, match=f"{name}: twice in a row.*crc32c"):
            stage(tmp_path, shards)
        assert not list(tmp_path.rglob(name))
    assert caplog.text.count(f"{name}: wrong bytes arrived") == times


def test_a_replaced_object_is_copied_again(uploaded, shards, tmp_path):
    folder = stage(tmp_path, shards)
    name = min(shards)
    uploaded.write("bkt", f"data/tiny/1.0.0/{name}", b"new")
    stage(tmp_path, shards)
    assert (folder / name).read_bytes() == b"new"


def test_progress_is_logged(uploaded, shards, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(staging, "REPORT_SECONDS", 0.02)
    slow_down(monkeypatch, 0.01)
    stage(tmp_path, shards)
    assert "kB (" in caplog.text and "/s, ETA " in caplog.text


def test_space_is_checked_before_anything_is_copied(uploaded, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"config.data.stage: gs://bkt.* 20 kB are free"):
        sources.open_splits(config_of("gs://bkt/data", tmp_path))
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"config.data.stage=.*file: "):
        stage(file, [])
    with pytest.raises(UserError, match="must be a folder on a local disk"):
        stage("gs://bkt/stage", [])


def test_what_cannot_be_read_from_a_bucket_is_one_line(uploaded, dataset):
    info = (dataset / "tiny" / "1.0.0" / "dataset_info.json").read_text()
    uploaded.write("bkt", "several/a/1.0.0/dataset_info.json", info.encode())
    uploaded.write("bkt", "several/b/1.0.0/dataset_info.json", info.encode())
    uploaded.write("bkt", "images/train/cat/1.png", b"")
    records = info.replace("array_record", "tfrecord").encode()
    features = (dataset / "tiny" / "1.0.0" / "features.json").read_bytes()
    uploaded.write("bkt", "records/dataset_info.json", records)
    uploaded.write("bkt", "records/features.json", features)
    for path, name, message in (
        ("gs://bkt/images", "", "images holds no prepared dataset.* prepare --folder=IMAGES"),
        ("gs://bkt/several", "", "several datasets.*config.data.name: a/1.0.0, b/1.0.0"),
        ("gs://bkt/data", "other", "no prepared dataset 'other' in gs://bkt/data"),
        ("gs://none/data", "", "bucket none: the bucket does not exist"),
        ("gs://none/data", "tiny", "bucket none: the bucket does not exist"),
        ("gs://bkt/records", "", "prepared as tfrecord.*local copy.*prepare --tfrecord=DIR"),
        ("s3://bkt/data", "", "what is supported: .*gs://"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_splits(config_of(path, name=name))
    with pytest.raises(UserError, match="has no split 'other'"):
        tfds_source.open_tfds("", "gs://bkt/data", "other")


def test_a_refused_read_is_no_damaged_image(uploaded):
    source = tfds_source.open_tfds("tiny", "gs://bkt/data", "train")
    uploaded.forbidden = {"GET"}
    with pytest.raises(OSError, match="last message of"):
        source.record(0)
    uploaded.forbidden = set()
    assert source.record(0)[1] == 0


@pytest.mark.parametrize("flag", ["folder", "tfrecord", "out"])
def test_prepare_works_on_local_folders(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"--{flag}=gs://bkt/x: lmim prepare works on local"):
        prepare_data.check_local(flag, "gs://bkt/x")
    assert not list(tmp_path.iterdir())
