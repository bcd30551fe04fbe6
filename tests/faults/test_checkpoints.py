"""Damage, full disks and missing folders. In brackets: by default / with --faults."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lmim_jax.cli import checkpoints as tool
from lmim_jax.distributed import sharding
from lmim_jax.train import checkpoint_manifest, lock, metric_writer
from lmim_jax.train import checkpoints as checkpoint
from lmim_jax.train.state import TrainState
from lmim_jax.utils import buckets, faults
from lmim_jax.utils.errors import UserError

MESH = sharding.make_mesh()


def state(seed, size=40):
    """A state of a few small tensors (size^2 numbers each)."""
    key = jax.random.key(seed)
    encoder = {}
    for i in range(3):
        tensor = jax.random.normal(jax.random.fold_in(key, i), (size, size))
        encoder[f"block{i:02d}"] = {"kernel": tensor, "bias": tensor[0]}
    return TrainState(
        step=jnp.int32(seed),
        params={"encoder": encoder},
        target={"encoder": encoder["block00"]},
        opt_state=(jnp.int32(3),),
        rng=key,
    )


def shardings(tree):
    """Replicated, a tree like the given one."""
    return jax.tree.map(lambda _: sharding.replicated(MESH), tree)


def as_numpy(state):
    """A state as numpy arrays, with the key as plain numbers."""
    return jax.tree.map(np.asarray, state.replace(rng=jax.random.key_data(state.rng)))


def same(a, b):
    """Whether two states are bitwise equal."""
    return jax.tree.all(jax.tree.map(np.array_equal, as_numpy(a), as_numpy(b)))


def save(workdir, *steps, size=40, **change):
    config = tiny.get_config()
    config.update(change)
    with checkpoint.Checkpoints(workdir, config) as checkpoints:
        for step in steps:
            checkpoints.save(state(step, size), step)
    return checkpoints


def restore(workdir, size=40):
    fresh = state(0, size)
    with checkpoint.Checkpoints(workdir, tiny.get_config()) as checkpoints:
        return checkpoints.restore(fresh, shardings(fresh))


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    """A folder for runs: of the file system, or in a bucket."""
    if request.param == "local":
        return tmp_path
    request.getfixturevalue("bucket")
    return buckets.path("gs://bkt/runs")


def in_bucket(path):
    """Whether a path is in a bucket."""
    return isinstance(path, buckets.BucketPath)


def copy(source, target):
    """Copy a run."""
    for name in buckets.file_sizes(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((source / name).read_bytes())


def files(folder):
    """All files of a step that hold anything."""
    return [folder / name for name, size in buckets.file_sizes(folder).items() if size]


def flip(path, rng):
    """Flip one random bit of a file."""
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_is_saved_is_restored(root):
    save(root, 1, 2)
    assert same(restore(root), state(2))
    assert restore(root / "nothing") is None


def test_a_run_is_copied_to_a_bucket_and_back(tmp_path, bucket):
    run = buckets.path("gs://bkt/run")
    save(tmp_path, 1)
    copy(tmp_path, run)
    assert same(restore(run), state(1))
    save(run, 2)
    copy(run, tmp_path)
    assert same(restore(tmp_path), state(2))


def test_every_flipped_bit_is_detected_and_its_file_named(root, full):
    """[100 / 1,000 bits, over all files of a step, evenly; 20 / 1,000 in a bucket]"""
    save(root, 1)
    step = root / "checkpoints" / "1"
    rng = random.Random(0)
    paths = files(step)
    bits = 20 if in_bucket(root) else 100
    for i in range(1000 if full else bits):
        path = paths[i % len(paths)]
        good = path.read_bytes()
        flip(path, rng)
        status = checkpoint_manifest.verify(step)
        assert status.state == "damaged", path
        assert path.name in status.problems[0]
        if path.parent.name.startswith("params."):
            assert f"(tensor {path.parent.name.replace('.', '/')})" in status.problems[0]
        path.write_bytes(good)
    assert checkpoint_manifest.verify(step).state == "good"


def damage(path, kind, rng):
    """Flip a bit, cut a file to a share of its size, or delete it."""
    if kind == "flip":
        flip(path, rng)
    elif kind == "delete":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(kind * len(content))])


def test_a_damaged_step_is_set_aside_and_the_one_before_restored(root, caplog, full):
    """[8 / 50 flips; truncation to 0, 50 and 99.9 %; deletion of every fifth / every file]

    In a bucket, every sixth of these / all.
    """
    save(root / "good", 1, 2)
    paths = files(root / "good" / "checkpoints" / "2")
    rng = random.Random(1)
    cases = [(rng.choice(paths), "flip") for _ in range(50 if full else 8)]
    cases += [(rng.choice(paths), share) for share in (0, 0.5, 0.999)]
    cases += [(path, "delete") for path in paths[:: 1 if full else 5]]
    manifest = paths[0].parent / checkpoint_manifest.NAME
    if manifest.parent.name == "2":
        cases.append((manifest, "delete"))
    if in_bucket(root) and not full:
        cases = cases[::6]
    for i, (path, kind) in enumerate(cases):
        run = root / f"run{i}"
        copy(root / "good", run)
        damage(run / path.relative_to(root / "good"), kind, rng)
        caplog.clear()
        assert same(restore(run), state(1)), (path, kind)
        (warning,) = [
            record.getMessage()
            for record in caplog.records
            if record.levelname == "WARNING" and record.name.startswith("lmim_jax")
        ]
        assert "RESTORING AN OLDER CHECKPOINT, step 1: step 2 is" in warning
        assert path.name in warning
        is_partial = path.name == checkpoint_manifest.NAME and kind == "delete"
        if in_bucket(root):  # only the manifest is moved
            assert checkpoint_manifest.verify(run / "checkpoints" / "2").state == "partial"
        else:
            assert list(checkpoint.steps(run)) == [1]
        if not (in_bucket(root) and is_partial):
            (quarantined,) = (run / "checkpoints" / "aside").iterdir()
            assert quarantined.name.split("-")[0] == "2"
        buckets.remove_tree(run)


def test_without_any_good_step_the_error_says_so(root):
    save(root, 1, 2)
    for step in (1, 2):
        flip(files(root / "checkpoints" / str(step) / "state")[3], random.Random(0))
    with pytest.raises(
        UserError, match=r"no good checkpoint: step 2 is damaged: state/.*; step 1 is damaged"
    ):
        restore(root)
    for path in checkpoint.steps(root).values():
        buckets.remove_tree(path)
    buckets.remove_tree(root / "checkpoints" / "aside")
    with pytest.raises(UserError, match="no good checkpoint: all of them have been deleted"):
        restore(root)


def test_a_first_save_cut_short_is_no_damage(root, caplog):
    save(root, 1)
    (root / "checkpoints" / "1" / checkpoint_manifest.NAME).unlink()
    (root / "checkpoints" / checkpoint_manifest.COMMITTED).unlink()
    assert restore(root) is None
    assert "no save was ever completed: step 1 is partial: manifest.json is missing" in caplog.text


def test_a_checkpoint_of_another_model_is_refused_by_tensor(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"holds another model: params/encoder/.*float32\[40\] -> float32\[41\]"
    ):
        restore(tmp_path, size=41)
    other = state(0).replace(step=jnp.float32(0))
    with (
        checkpoint.Checkpoints(tmp_path, tiny.get_config()) as checkpoints,
        pytest.raises(UserError, match=r"step: int32\[\] -> float32\[\]"),
    ):
        checkpoints.restore(other, shardings(other))


def test_retention_keeps_the_newest_every_mth_and_the_best(root):
    lines = [
        {"step": step, "knn/knn5": value}
        for step, value in ((1, 5.0), (3, 9.0), (5, 7.0), (9, 8.0))
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"checkpoint_keep": 2, "checkpoint_keep_every": 4, "checkpoint_best": "knn/knn5"}
    save(root, *range(1, 10), **change)
    assert list(checkpoint.steps(root)) == [3, 4, 8, 9]
    for path in checkpoint.steps(root).values():
        assert checkpoint_manifest.verify(path).state == "good"


def test_the_best_is_never_one_that_is_not_a_number(root):
    values = {1: float("nan"), 2: 50.0, 3: 60.0}
    lines = [{"step": step, "knn/knn5": value} for step, value in values.items()]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(root, 1, 2, 3, 4, checkpoint_keep=1, checkpoint_best="knn/knn5")
    assert list(checkpoint.steps(root)) == [3, 4]


def test_a_line_of_metrics_that_is_being_written_deletes_nothing(root, caplog):
    (root / "metrics.jsonl").write_text('{"step": 1, "knn/knn5": 3.0}\n{"step": 2, "kn')
    save(root, 1, 2, checkpoint_keep=1, checkpoint_best="knn/knn5")
    assert "old checkpoints could not be deleted" in caplog.text
    assert same(restore(root), state(2))


def test_folders_that_cannot_be_listed_for_a_moment_are_not_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    failures = [errno.EIO, errno.EIO]
    scandir = os.scandir

    def flaky(path):
        if failures and str(path).endswith("2/state"):
            raise OSError(failures.pop(), "input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", flaky)
    monkeypatch.setattr(faults, "FIRST_PAUSE", 0.01)
    assert same(restore(tmp_path), state(2))
    assert not failures
    assert not (tmp_path / "checkpoints" / "aside").exists()
    failures = [errno.EIO]
    with pytest.raises(OSError, match="input/output error"):  # or it would not list all files
        checkpoint_manifest.write(tmp_path / "checkpoints" / "2", {}, lambda: None)


def test_only_the_last_partial_step_is_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        (tmp_path / "checkpoints" / str(step) / checkpoint_manifest.NAME).unlink()
        (tmp_path / "checkpoints" / checkpoint_manifest.COMMITTED).unlink()
        assert restore(tmp_path) is None
    aside = tmp_path / "checkpoints" / "aside"
    assert [path.name for path in aside.iterdir()] == ["3-partial"]


def test_a_step_stays_though_old_ones_cannot_be_deleted(tmp_path, caplog):
    save(tmp_path, 1, checkpoint_best="knn/knn5")  # there is no metrics.jsonl to find the best in
    assert "old checkpoints could not be deleted" in caplog.text
    assert same(restore(tmp_path), state(1))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def used(path):
    return shutil.disk_usage(path).used


def test_a_full_disk_is_logged_at_once_leaks_nothing_and_is_tried_again(small_disk, caplog):
    size = 1000  # 4 MB a tensor, 16 MB a state
    save(small_disk, 1, size=size)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(15 << 20))
    before = used(small_disk)
    config = tiny.get_config()
    with checkpoint.Checkpoints(small_disk, config) as checkpoints:
        checkpoints.save(state(2, size), 2)
        checkpoints.wait()
        assert checkpoints.failing
        assert "SAVING STEP 2 FAILED" in caplog.text
        assert "the checkpoint of step 1 is good" in caplog.text
        assert used(small_disk) == before
        assert checkpoint_manifest.verify(checkpoint.steps(small_disk)[1]).state == "good"
        filler.unlink()
        checkpoints.save(state(3, size), 3)
    assert not checkpoints.failing
    assert same(restore(small_disk, size), state(3, size))


def test_a_bucket_that_refuses_a_save_is_like_a_full_disk(bucket, caplog):
    run = buckets.path("gs://bkt/run")
    save(run, 1)
    before = bucket.names("bkt")
    with checkpoint.Checkpoints(run, tiny.get_config()) as checkpoints:
        bucket.forbidden = {"POST"}
        checkpoints.save(state(2), 2)
        checkpoints.wait()
        assert checkpoints.failing
        assert "SAVING STEP 2 FAILED" in caplog.text
        assert "the checkpoint of step 1 is good" in caplog.text
        bucket.forbidden = set()
        assert bucket.names("bkt") == before
        checkpoints.save(state(3), 3)
    assert not checkpoints.failing
    assert same(restore(run), state(3))


@pytest.mark.slow
def test_a_busy_bucket_and_cut_uploads_cost_only_time(bucket):
    """[- / 3 saves: every fiftieth request is refused, every tenth upload cut]"""
    bucket.busy = 0.02
    bucket.cut = 0.1
    save(buckets.path("gs://bkt/run"), 1, 2, 3)
    assert same(restore(buckets.path("gs://bkt/run")), state(3))
    bucket.busy = bucket.cut = 0.0
    for path in checkpoint.steps("gs://bkt/run").values():
        assert checkpoint_manifest.verify(path).state == "good"


def test_a_writer_that_lost_its_lock_saves_nothing(root):
    save(root, 1)
    with lock.Lock(root) as held:
        (root / "lock").write_text(json.dumps(dict.fromkeys(("host", "pid", "start", "since"))))
        before = buckets.file_sizes(root)
        with (
            pytest.raises(checkpoint.SaveFailed, match="was taken over by another run"),
            checkpoint.Checkpoints(root, tiny.get_config(), held) as checkpoints,
        ):
            checkpoints.save(state(1), 1)
            checkpoints.save(state(2), 2)
        assert buckets.file_sizes(root) == before
    assert same(restore(root), state(1))


def test_after_so_many_failures_the_run_stops_with_the_reason(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    config = tiny.get_config()
    config.checkpoint_max_failures = 3
    with (
        pytest.raises(
            checkpoint.SaveFailed,
            match=r"3 saves in a row failed: .*; no checkpoint had been saved",
        ),
        checkpoint.Checkpoints(tmp_path, config) as checkpoints,
    ):
        for step in range(1, 9):
            checkpoints.save(state(step), step)
    assert step == 3


def test_a_folder_that_vanishes_costs_one_save_at_most(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "run", tiny.get_config()) as checkpoints:
        checkpoints.save(state(1), 1)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        checkpoints.save(state(2), 2)
    assert same(restore(tmp_path / "run"), state(2))


READ_ONLY = """
import os, pathlib, sys
sys.path[:0] = ["tests", "tests/faults", "."]
import test_checkpoints as t
warm, run = (pathlib.Path(path) for path in sys.argv[1:])
t.save(warm, 1)  # imports everything, while it may
if os.geteuid() == 0:  # permissions do not stop root
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
with t.checkpoint.Checkpoints(run, t.tiny.get_config()) as checkpoints:
    checkpoints.save(t.state(1), 1)
    checkpoints.wait()
    print("failing", checkpoints.failing)
    run.chmod(0o700)
    checkpoints.save(t.state(2), 2)
print("steps", list(t.checkpoint.steps(run)))
"""


def test_a_read_only_folder_fails_and_works_again(tmp_path):
    run = tmp_path / "run"
    run.mkdir(mode=0o500)
    if os.geteuid() == 0:
        os.chown(run, 65534, 65534)
        for path in (tmp_path, *tmp_path.parents[:-2]):
            path.chmod(0o755)
    command = [sys.executable, "-c", READ_ONLY, str(tmp_path / "warm"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "failing True\nsteps [2]\n", done.stderr
    assert "Permission denied" in done.stderr


def test_metrics_wait_for_space_and_are_all_there_in_the_end(small_disk, caplog):
    writer = metric_writer.MetricWriter(small_disk, 0)
    writer.write(1, {"loss": 1.0})
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    for step in range(2, 400):  # more than the pages at hand
        writer.write(step, {"loss": float(step), "padding" * 20: 1.0})
        if step == 5:
            writer.write_pictures(step, {"given": np.zeros((300, 300, 3), np.uint8)})
    # A little space becomes free now and then
    assert 1 <= caplog.text.count("cannot write to") < 10
    filler.unlink()
    writer.write(400, {"loss": 400.0})
    writer.close()
    assert [line["step"] for line in metric_writer.read_metrics(small_disk)] == list(range(1, 401))


def listed_states(lines):
    """The states in the lines of the steps."""
    return [line.split()[1] for line in lines if line.split()[0].isdigit()]


def test_the_tool_lists_every_step_and_finds_the_damage(root):
    save(root, 1, 2, 3)
    _, all_good = tool.table(root, verify=True)
    assert all_good
    (root / "checkpoints" / "2" / checkpoint_manifest.NAME).unlink()
    path = files(root / "checkpoints" / "3" / "state")[-1]
    flip(path, random.Random(0))
    by_size, _ = tool.table(root, verify=False)
    assert listed_states(by_size) == ["good", "partial", "good"]
    by_content, all_good = tool.table(root, verify=True)
    assert listed_states(by_content) == ["good", "partial", "damaged"]
    assert any(path.name in line and "wrong checksum" in line for line in by_content)
    assert not all_good
    with pytest.raises(UserError, match="no checkpoints here"):
        tool.table(root / "nowhere", verify=False)
