"""Faults of the environment, stops and failed evaluations: nothing is lost or replaced.

See faults/test_environment.py for the same with real processes.
"""

import copy
import dataclasses
import errno
import io
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny
from array_record.python import array_record_data_source, array_record_module
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import vit_b
from lmim_jax.data import decode, loader, prefetch, sources, tfds_source
from lmim_jax.data.prepare import tfds_writer
from lmim_jax.distributed import preemption, sharding
from lmim_jax.evaluators import knn
from lmim_jax.evaluators.common import kept_classifier
from lmim_jax.train import checkpoint_manifest, checkpoints, loop
from lmim_jax.train import summary as summaries
from lmim_jax.train.metric_writer import read_metrics
from lmim_jax.utils import descriptors, faults
from lmim_jax.utils.errors import DataLoaderTimeout, UserError

OPTIONS = vit_b.data().to_dict() | dict(
    canvas=40, channels=3, workers=0, threads=2, timeout=60.0, max_bad_fraction=0.2
)


@pytest.fixture(autouse=True)
def quick_and_new(monkeypatch):
    """Short pauses, and no memory of what other tests have reported."""
    monkeypatch.setattr(faults, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(faults, "_reported", {})


class Drawn:
    """A source of 24 images; `fault` is called with the index before each is read."""

    classes = ()
    ignored = ()

    def __init__(self, fault=lambda index: None):
        self.fault = fault

    def __len__(self):
        return 24

    def record(self, index):
        """(encoded bytes, -1) of an image of one color."""
        self.fault(index)
        stream = io.BytesIO()
        Image.new("RGB", (20, 20), (index, 0, 0)).save(stream, "BMP")
        return stream.getvalue(), -1

    def name(self, index):
        """Its number."""
        return f"image {index}"


def batches(source, steps=3, **change):
    return loader.training_batches(
        source,
        ConfigDict({**OPTIONS, **change}),
        seed=0,
        batch_size=8,
        steps=steps,
        start=0,
        mesh=sharding.make_mesh(),
    )


def colors(source, **change):
    """The images of the batches of a source, by their colors."""
    return [np.asarray(batch["image"])[:, 0, 0, 0].tolist() for batch in batches(source, **change)]


def os_error(number):
    return OSError(number, os.strerror(number))


ENVIRONMENT = [
    *(os_error(getattr(errno, name)) for name in ("EMFILE", "ENFILE", "EIO", "ESTALE", "ENOMEM")),
    MemoryError(),
    TimeoutError("the read operation timed out"),
    RuntimeError("open() failed: Too many open files; opening /data/a.array_record-00000-of-00001"),
    RuntimeError("pread() failed: Input/output error; reading /data/a; at byte 3130"),
    OSError("out of memory error when reading image file"),  # Pillow
    ValueError("Insufficient memory (case 4)"),  # simplejpeg
]
CONTENT = [
    os_error(errno.ENOENT),
    os_error(errno.ENOTDIR),
    os_error(errno.EACCES),
    decode.BadImage("truncated"),
    RuntimeError("open() failed: No such file or directory; opening /data/a"),
    RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch"),
    ValueError("Premature end of JPEG file"),
    Image.UnidentifiedImageError("cannot identify image file"),
]


@pytest.mark.parametrize("error", ENVIRONMENT, ids=repr)
def test_a_fault_of_the_environment_is_waited_for_and_replaces_no_image(error, caplog):
    remaining = [error] * 3

    def fault(index):
        if index == 5 and remaining:
            raise remaining.pop()

    expected = colors(Drawn())
    assert colors(Drawn(fault)) == expected
    assert not remaining
    assert caplog.text.count("cannot read image 5") == 1
    assert "bad image" not in caplog.text


@pytest.mark.parametrize("error", CONTENT, ids=repr)
def test_damaged_content_and_missing_files_are_not_waited_for(error):
    assert not faults.is_environment_fault(error)
    wrapped = decode.BadImage("damaged")
    wrapped.__cause__ = error
    assert not faults.is_environment_fault(wrapped)


@pytest.mark.parametrize("library", ["simplejpeg", "pillow"])
def test_a_decoder_without_memory_does_not_blame_the_image(library, monkeypatch):
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, {"simplejpeg": "JPEG", "pillow": "PNG"}[library])

    def fail(*_, **__):
        raise ValueError("Memory allocation failure")

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg_header", fail)
    monkeypatch.setattr(decode.Image, "open", fail)
    with pytest.raises(ValueError, match="Memory allocation failure") as caught:
        decode.decode(stream.getvalue(), 40, 3)
    assert not isinstance(caught.value, decode.BadImage)


def test_a_fault_that_lasts_ends_the_run_by_name():
    def fault(index):
        if index == 5:
            raise os_error(errno.EIO)

    with pytest.raises(faults.ReadFailed, match=r"image 5 could not be read for .*Input/output"):
        colors(Drawn(fault), timeout=3.0)  # the loader itself gives up 0.3 s later


def test_a_vanished_folder_is_not_a_folder_of_missing_images(images, tmp_path):
    source = sources.open_folder(images / "train" / "cat", "train")
    gone = dataclasses.replace(source, root=str(tmp_path / "unmounted"))
    with pytest.raises(OSError, match="is its file system mounted") as caught:
        gone.record(0)
    assert caught.value.errno == errno.ESTALE
    (tmp_path / "unmounted").mkdir()
    with pytest.raises(FileNotFoundError):
        gone.record(0)


def test_permission_denied_to_one_file_is_a_bad_image_and_to_all_of_them_a_fault(
    images, monkeypatch
):
    source = sources.open_folder(images / "train" / "cat", "train")
    denied = {source.name(3)}
    original = pathlib.Path.open

    def refuse(path, *arguments, **options):  # root may read everything
        if str(path) in denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: path.open("rb").read())
    with pytest.raises(PermissionError) as caught:
        source.record(3)
    assert not faults.is_environment_fault(caught.value)
    denied.update(source.name(index) for index in range(len(source)))
    with pytest.raises(OSError, match=r"has a login or a ticket expired.*\.(jpg|png)") as caught:
        source.record(3)
    assert faults.is_environment_fault(caught.value)


@pytest.fixture
def exhausted():
    """A function that takes all file descriptors and returns how to give them back."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []

    def take():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                return give_back

    def give_back():
        while taken:
            os.close(taken.pop())

    yield take
    give_back()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Instruction:
    """A file of an ArrayRecord dataset, as TFDS describes it."""

    skip = 0
    take = 1
    examples_in_shard = 1

    def __init__(self, filename):
        self.filename = filename


def shards(folder, count):
    """A source of one image per file."""
    instructions = []
    for index in range(count):
        path = str(folder / f"a-{index}")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        data, _ = Drawn().record(index)
        features = tfds_writer.features_of(Drawn())
        writer.write(tfds_writer._serialize_example(data, -1, str(index), features))
        writer.close()
        instructions.append(Instruction(path))
    records = array_record_data_source.ArrayRecordDataSource(instructions)
    return tfds_source.TfdsSource(records, "a", (), "image", None, None)


def test_records_are_read_again_after_too_many_open_files(tmp_path, exhausted):
    source = shards(tmp_path, 3)
    source.record(0)  # imports what it needs
    give_back = exhausted()
    with pytest.raises(OSError, match="Too many open files") as caught:
        source.record(1)
    assert caught.value.errno == errno.EMFILE
    give_back()
    assert source.record(1)[0] == Drawn().record(1)[0]
    (tmp_path / "a-2").write_bytes(b"")
    with pytest.raises(decode.BadImage, match="the record is damaged"):
        source.record(2)
    (tmp_path / "a-0").unlink()
    with pytest.raises(decode.BadImage, match="No such file"):
        dataclasses.replace(source, records=copy.copy(source.records)).record(0)
    fresh = dataclasses.replace(source, records=copy.copy(source.records))
    tmp_path.rename(tmp_path.with_name("unmounted"))
    with pytest.raises(OSError, match="No such file") as caught:
        fresh.record(2)
    assert faults.is_environment_fault(caught.value)


@pytest.mark.parametrize("call", ["open() failed: {}; opening /data/a", "pread() failed: {}"])
def test_records_that_may_not_be_read_any_more_are_no_bad_images(call, tmp_path):
    class Denied:
        def __getitem__(self, index):
            raise RuntimeError(call.format(os.strerror(errno.EACCES)))

    source = dataclasses.replace(shards(tmp_path, 1), records=Denied())
    with pytest.raises(OSError, match="Permission denied") as caught:
        source.record(0)
    assert faults.is_environment_fault(caught.value)


def test_more_files_than_a_process_may_open_are_reported_at_the_start(tmp_path, monkeypatch):
    records = shards(tmp_path, 1).records
    monkeypatch.setattr(descriptors, "raise_limit", lambda: 256)
    tfds_source._check_descriptors(records, 100, "photos")
    with pytest.raises(UserError, match=r"photos has 300 files.* only 256 .*ulimit.*lmim prepare"):
        tfds_source._check_descriptors(records, 300, "photos")


def test_the_limit_of_open_files_is_raised(exhausted):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    expected = min(hard, descriptors.LARGEST)
    assert descriptors.raise_limit() == expected
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, hard)


def test_the_handler_of_a_failed_save_cannot_fail(tmp_path, exhausted):
    config = tiny.get_config()
    tiny.run(config, tmp_path / "first")
    good = checkpoints.Checkpoints(tmp_path / "first", config)
    give_back = exhausted()
    good._handle_failure(1, os_error(errno.EMFILE))
    assert "cannot be listed" in good.describe()
    give_back()
    assert "step 0 is good" in good.describe()


def test_slow_is_not_dead():
    def slow(index):
        time.sleep(0.25)

    # A batch takes 2 s
    assert len(colors(Drawn(slow), steps=2, threads=1, timeout=1.0)) == 2


def test_a_stall_is_reported_with_the_file_and_given_up_later(monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "WARNING_SECONDS", 0.5)
    monkeypatch.setattr(prefetch, "STARTUP_SECONDS", 0.0)
    goes_on = threading.Event()

    def pause(index):
        if index == 5:
            goes_on.wait(20)

    threading.Timer(1.5, goes_on.set).start()
    assert colors(Drawn(pause)) == colors(Drawn())
    assert caplog.text.count("no image decoded for") == 1
    assert "being read: image 5" in caplog.text
    goes_on.clear()
    threading.Timer(4, goes_on.set).start()
    with pytest.raises(DataLoaderTimeout, match=r"no image decoded for 1 s.*, at image 5"):
        colors(Drawn(pause), timeout=1.0)


def recipe(images, evaluate=False, **change):
    """Six steps; the only evaluator, at the start, after step 3 and at the end, if any, is knn."""
    config = tiny.get_config()
    config.data.path = str(images)
    section = {**config.evaluators.knn.to_dict(), "every": 0.5}
    config.evaluators = {"strict": False}
    if evaluate:
        config.evaluators.knn = section
    config.update_from_flattened_dict(
        {"total_steps": 6, "checkpoint_every": 1000, "log_every": 1, **change}
    )
    return config


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """The losses of the run of `recipe`."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    loop.train(recipe(images), workdir)
    return losses(workdir)


def evaluation(monkeypatch, run):
    """Replace the k-NN by a function without arguments."""
    monkeypatch.setattr(knn.Evaluator, "run", lambda *_: run())


def test_an_evaluation_that_fails_is_skipped_and_the_summary_says_so(
    images, tmp_path, monkeypatch, caplog
):
    seen = []

    def run():
        seen.append([int(path.name) for path in tmp_path.glob("checkpoints/[0-9]*")])
        raise MemoryError("RESOURCE_EXHAUSTED: out of memory allocating the bank")

    evaluation(monkeypatch, run)
    summary = loop.train(recipe(images, evaluate=True), tmp_path)
    failed = summary["failed_evaluations"]
    assert [(one["evaluator"], one["step"]) for one in failed] == [
        ("knn", 0),
        ("knn", 3),
        ("knn", 6),
    ]
    assert "the bank" in failed[0]["reason"]
    assert seen[1:] == [[3], [3, 6]]  # the save starts first
    assert "IS SKIPPED" in caplog.text
    assert "evaluators.strict=True" in caplog.text


@pytest.mark.slow
def test_a_strict_evaluation_stops_the_run_with_its_state_saved(images, tmp_path, monkeypatch):
    def run():
        raise UserError("no such folder of masks")

    evaluation(monkeypatch, run)
    config = recipe(images, evaluate=True)
    config.evaluators.strict = True
    config.evaluators.knn.every = 0.0
    with pytest.raises(UserError, match="no such folder of masks"):
        loop.train(config, tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [6]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "error",
    [
        DataLoaderTimeout("no image"),
        pytest.param(faults.ReadFailed("image"), marks=SLOW),
        pytest.param(MemoryError(), marks=SLOW),
        pytest.param(UserError("bad images"), marks=SLOW),
    ],
    ids=repr,
)
def test_whatever_ends_the_run_the_state_is_saved_first(
    error, images, tmp_path, monkeypatch, request
):
    original = loader.training_batches

    def two_batches(*arguments, **options):
        for count, batch in enumerate(original(*arguments, **options)):
            if count == 2:
                raise error
            yield batch

    monkeypatch.setattr(loader, "training_batches", two_batches)
    with pytest.raises(type(error)):
        loop.train(recipe(images), tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [2]
    assert checkpoint_manifest.verify(checkpoints.steps(tmp_path)[2]).state == "good"
    monkeypatch.undo()
    if isinstance(error, MemoryError):  # one of them is resumed
        loop.train(recipe(images), tmp_path)
        assert losses(tmp_path) == request.getfixturevalue("undisturbed")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=SLOW),
        pytest.param(signal.SIGHUP, marks=SLOW),
        pytest.param(signal.SIGUSR1, marks=SLOW),
    ],
)
def test_a_signal_in_an_evaluation_saves_and_stops(number, images, tmp_path, monkeypatch):
    steps = []

    def run():
        steps.append(len(steps))
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return {}

    evaluation(monkeypatch, run)
    with pytest.raises(preemption.Preempted, match="stopped after step 3 of 6"):
        loop.train(recipe(images, evaluate=True), tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [3]
    assert signal.getsignal(number) is signal.SIG_DFL or number == signal.SIGINT


def test_a_second_interrupt_aborts_without_saving(images, tmp_path, monkeypatch):
    def run():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2 * preemption.SAME_PRESS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    evaluation(monkeypatch, run)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe(images, evaluate=True), tmp_path)
    assert not list(checkpoints.steps(tmp_path))


LEAK = """
import os
from multiprocessing import shared_memory
from lmim_jax.utils import subprocess
subprocess.start_resource_tracker()
memory = shared_memory.SharedMemory(create=True, size=8)
print(memory.name, flush=True)
os._exit(75)
"""


def test_nothing_follows_the_last_words_of_a_run_that_stops():
    done = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")
    assert not pathlib.Path("/dev/shm", done.stdout.strip()).exists()


def test_a_signal_ignored_at_the_start_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with preemption.PreemptionHandler() as handler:
            handler.begin()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not handler.should_stop()
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGUSR1, preemption.Preempted), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_while_the_images_are_listed_ends_the_run_at_once(
    number, error, images, tmp_path, monkeypatch
):
    def list_images(*_):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    monkeypatch.setattr(loop, "_open_sources", list_images)
    with pytest.raises(error):
        loop.train(recipe(images), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_whose_end_is_damaged_is_not_finished_until_it_is_repaired(
    images, tmp_path, monkeypatch
):
    config = recipe(images, checkpoint_every=3)
    loop.train(config, tmp_path)
    undisturbed = losses(tmp_path)
    damage(tmp_path, 6)

    def stop(*_, **__):
        raise DataLoaderTimeout("no image")

    with monkeypatch.context() as context:
        context.setattr(loader, "training_batches", stop)
        with pytest.raises(DataLoaderTimeout):
            loop.train(config, tmp_path)
    assert loop.train(config, tmp_path)["steps"] == 6
    assert list(checkpoints.steps(tmp_path)) == [3, 6]
    assert losses(tmp_path) == undisturbed


def damage(workdir, step):
    """Flip a bit of the largest file of a checkpoint."""
    files = [path for path in checkpoints.steps(workdir)[step].rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)


def test_a_last_evaluation_that_its_user_leaves_out_is_made_by_the_next_start(
    images, tmp_path, monkeypatch, caplog
):
    """The disk is full then, which costs what a classifier has learned, but no metrics."""

    config = recipe(images, evaluate=True)
    config.evaluators.knn.every = 0.0

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        raise preemption.Interrupted

    evaluation(monkeypatch, interrupt)  # twice: the second one leaves the results out
    with pytest.raises(preemption.Preempted, match="stopped after step 6 of 6"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()

    def run(self, method, params, data):
        data.keep(None)
        return {"nn1": 50.0}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(knn.Evaluator, "run", run)
    monkeypatch.setattr(kept_classifier, "write", full)
    summary = loop.train(config, tmp_path)
    assert summary["knn/nn1"] == 50.0
    assert "failed_evaluations" not in summary
    assert (tmp_path / "summary.json").exists()
    assert "what knn has learned is not kept: [Errno 28]" in caplog.text


@pytest.mark.slow
def test_checkpoints_are_also_saved_by_the_clock(images, tmp_path, undisturbed):
    loop.train(recipe(images, checkpoint_minutes=1e-9, checkpoint_keep=0), tmp_path)
    assert list(checkpoints.steps(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path) == undisturbed


def test_a_failed_evaluation_says_so_on_the_console():
    lines = [
        {"step": 3, "failed": {"knn": "no memory"}},
        {"step": 6, "failed": {"knn": "no memory"}},
        {"step": 6, "knn/nn1": 50.0, "loss": 1.0},  # made after a restart
    ]
    summary = summaries.summarize(lines, steps=6, total_steps=6, seconds=1.0)
    assert summary["failed_evaluations"] == [{"step": 3, "evaluator": "knn", "reason": "no memory"}]
    assert "FAILED: knn at step 3: no memory" in summaries.format_summary(summary, "run")


@pytest.mark.parametrize(("size", "count"), [(1 << 20, 1), ((1 << 30) + 1, 2), (5 << 30, 5)])
def test_prepared_files_have_half_a_gigabyte_to_one(size, count, images, tmp_path, monkeypatch):
    source = sources.open_folder(images, "train")
    total = sum(len(source.record(index)[0]) for index in range(len(source)))
    monkeypatch.setattr(tfds_writer, "SHARD_BYTES", total * (1 << 30) // size)
    tasks = list(tfds_writer.plan_shards(tmp_path, "a", "train", source, 0))
    assert len(tasks) == count
    shrunk = list(tfds_writer.plan_shards(tmp_path, "a", "train", source, 10))
    assert len(shrunk) <= len(tasks)


def test_preparing_leaves_out_no_image_for_a_fault_of_the_environment(
    images, tmp_path, monkeypatch
):
    source = sources.open_folder(images, "train")
    remaining = [os_error(errno.EMFILE)] * 2
    read = sources.FolderSource.record

    def record(self, index):
        if index == 3 and remaining:
            raise remaining.pop()
        return read(self, index)

    monkeypatch.setattr(sources.FolderSource, "record", record)
    (task,) = tfds_writer.plan_shards(tmp_path, "a", "train", source, 0)
    (tmp_path / tfds_writer.UNFINISHED).mkdir()
    tfds_writer.write_shard(task)
    assert '"records": 48, "bad": []' in task.note_path.read_text()
    assert not remaining
