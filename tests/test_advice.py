"""Errors that say what to do: memory, processes that do not come, shared memory, caches, names."""

import collections
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import tiny

from lmim_jax.cli import train
from lmim_jax.data import loader, prefetch
from lmim_jax.distributed import multihost
from lmim_jax.perf import choices
from lmim_jax.train import build, checkpoints, loop, workdir
from lmim_jax.utils import buckets, recipes
from lmim_jax.utils.errors import UserError

Usage = collections.namedtuple("Usage", "total used free")
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes."


@pytest.mark.parametrize("processes", [1, 2])
def test_memory_that_does_not_suffice_names_what_saves_it(monkeypatch, processes):
    def fail(message, code=2):
        assert code == 2
        raise SystemExit(message)

    monkeypatch.setattr(train, "fail", fail)  # which ends the process a while later
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    config = tiny.get_config()
    config.batch_size = 4 * jax.device_count()
    with pytest.raises(SystemExit) as ended:
        train.fail_with(config, jax.errors.JaxRuntimeError(f"{OUT_OF_MEMORY}\nmore"))
    error = ended.value.code
    assert "\n" not in error
    places = [error.index(f"--config.{key}=") for key in ("micro_batches", "remat", "mesh.fsdp")]
    assert places == sorted(places)
    assert "lmim plan --sweep" in error
    assert OUT_OF_MEMORY in error
    found = re.findall(r"=(\w+) \(now (\w+); ([\d.e-]+) GB needed\)", error)
    assert [option for option, _, _ in found] == ["2", "full", str(jax.device_count())]
    before = float(re.search(r"GB each \(([\d.e-]+) GB needed\)", error)[1])
    assert before > float(found[0][2])  # what the first advice saves


def test_the_memory_of_a_device_is_all_that_it_has():
    """[of which `lmim train DIR` plans with a share]"""
    config = tiny.get_config()
    config.batch_size = jax.device_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    if jax.default_backend() != "cpu":
        memory = jax.local_devices()[0].memory_stats()["bytes_limit"]
    assert f"{memory / 1e9:.1f} GB each" in train.out_of_memory(config, OUT_OF_MEMORY)
    assert choices.memory_limit() < memory


def test_a_recipe_without_an_estimate_still_says_what_saves_memory():
    config = tiny.get_config()
    config.update(batch_size=4 * jax.device_count())
    config.method.loss = "unknown"
    advice = train.out_of_memory(config, OUT_OF_MEMORY)
    assert "--config.micro_batches=2 (now 1; not estimated: config.method.loss=" in advice


def test_memory_that_cannot_be_saved_further_asks_for_less():
    config = tiny.get_config()
    config.update(batch_size=jax.device_count(), remat="full")
    config.mesh.fsdp = jax.device_count()
    advice = train.out_of_memory(config, OUT_OF_MEMORY)
    assert "give a smaller --config.batch_size" in advice


def test_other_errors_of_xla_are_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train.fail_with(tiny.get_config(), jax.errors.JaxRuntimeError("INTERNAL: wrong"))


@pytest.mark.parametrize("workers", [0, 2])
def test_small_shared_memory_is_found_before_workers_start(monkeypatch, tmp_path, workers):
    monkeypatch.setattr(prefetch, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(64 << 20, 4 << 20, 60 << 20))
    prefetch.check_shared_memory(30 << 20, workers)
    if not workers:
        prefetch.check_shared_memory(31 << 20, workers)
        return
    with pytest.raises(
        UserError, match=r"has 64 MiB, of which 60 are .* needs 62 MiB .*--shm-size.*workers=0"
    ):
        prefetch.check_shared_memory(31 << 20, workers)
    prefetch.check_shared_memory(10 << 20, workers, evaluation_bytes=20 << 20)
    with pytest.raises(UserError, match=r"needs 64 MiB .* two batches of training and two of eval"):
        prefetch.check_shared_memory(10 << 20, workers, evaluation_bytes=22 << 20)


@pytest.mark.parametrize(
    ("workers", "platform", "cores", "free", "expected"),
    [
        (3, "cpu", 2, 0, 3),
        (-1, "cpu", 16, 60, 0),
        (-1, "gpu", 16, 60, 8),
        (-1, "gpu", 96, 60, 16),
        (-1, "tpu", 7, 60, 0),
        (-1, "gpu", 16, 59, 0),
    ],
)
def test_number_of_workers(monkeypatch, tmp_path, workers, platform, cores, free, expected, caplog):
    monkeypatch.setattr(prefetch, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(64 << 20, 4 << 20, free << 20))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(prefetch.cores, "available", lambda: list(range(cores)))
    config = tiny.get_config().data
    config.workers = workers
    assert prefetch.num_workers(config, 20 << 20, 10 << 20) == expected
    assert ("59 MiB free, these need 60" in caplog.text) == (free == 59)
    config.threads = 0
    assert prefetch.num_threads(config, expected) == max(1, cores // max(1, expected))


def test_shared_memory_holds_the_batches_of_evaluations_too(images, monkeypatch, tmp_path):
    monkeypatch.setattr(prefetch, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1 << 20, 0, 1 << 20))
    config = tiny.get_config()
    config.data.update(path=str(images), workers=1)
    config.batch_size = 8  # canvases of 40 x 40 x 3 bytes: 2 x 37 KiB
    config.evaluators.knn.batch_size = 128  # 2 x 600 KiB
    with pytest.raises(UserError, match=r"needs 2 MiB .* two of evaluations"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "task 0 of 2, waiting for 1 more; to run alone: SLURM_NTASKS=1",
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
            "task 3 of 8, waiting for 7 more; to run alone: SLURM_NTASKS=1",
        ),
    ],
)
def test_tasks_of_slurm_say_for_whom_they_wait(environment, expected):
    cluster = {"cluster_detection_method": "slurm"}
    assert multihost._describe_wait(cluster, environment).startswith(expected)


@pytest.mark.slow
def test_a_lone_task_ends_in_one_line(tmp_path):
    code = (
        "from lmim_jax.distributed import multihost; multihost.START_TIMEOUT = 4.0; "
        "multihost.initialize()"
    )
    slurm = {"JOB_ID": "77", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": "0"}
    slurm |= {"LOCALID": "0", "NODEID": "0", "STEP_TASKS_PER_NODE": "2"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment = {**os.environ, **environment, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    first, *_, last = ended.stderr.strip().splitlines()
    assert first.startswith("task 0 of 2, waiting for 1 more; to run alone: SLURM_NTASKS=1")
    assert last.startswith("error: task 0 of 2, waiting for 1 more")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_compilation_cache_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").touch()
    folder = str(tmp_path / name)
    with pytest.raises(UserError, match=r"JAX_COMPILATION_CACHE_DIR=.* cannot be written"):
        workdir.check_compilation_cache({"JAX_COMPILATION_CACHE_DIR": folder})
    with pytest.raises(UserError, match=r"s3://bucket/cache cannot be used.*gs://BUCKET"):
        workdir.check_compilation_cache({"JAX_COMPILATION_CACHE_DIR": "s3://bucket/cache"})
    for good in ("", "gs://bucket/cache", str(tmp_path / "new")):
        workdir.check_compilation_cache({"JAX_COMPILATION_CACHE_DIR": good})


@pytest.mark.parametrize("metric", ["kn/knn5", "linear/accuracy"])
def test_the_best_checkpoint_by_a_metric_of_no_evaluator(metric):
    config = tiny.get_config()
    config.checkpoint_best = metric
    with pytest.raises(UserError, match=r"checkpoint_best=.*config\.evaluators has no"):
        build.build(config, 6)
    config.checkpoint_best = "knn/knn5"
    build.build(config, 6)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("knn/knn7", r"it has knn/knn5, knn/loo1, knn/majority, knn/nn1; did you mean knn/knn5"),
        pytest.param(
            "efective_rank",
            r"it has collapse_index, .*loss.*; did you mean effective_rank",
            marks=[pytest.mark.slow],
        ),
    ],
)
def test_the_best_checkpoint_by_no_metric_of_its_evaluator(images, tmp_path, metric, message):
    config = tiny.get_config()
    config.data.path = str(images)
    config.checkpoint_best = metric
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert checkpoints.newest_step(tmp_path / "run") == 0


@pytest.mark.parametrize(("images", "advice"), [(100, "=96"), (9, "=8"), (5, "multiples of 8")])
def test_few_images_propose_a_batch_that_fits(images, advice):
    with pytest.raises(UserError, match=rf"more than the {images} training images; .*{advice}"):
        loader.steps_per_epoch(range(images), 256, 8)


def test_the_home_folder_is_found_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").touch()
    assert recipes.locate("~/mine.py:x") == f"{tmp_path}/mine.py:x"
    assert buckets.path("~/runs/a") == tmp_path / "runs" / "a"
