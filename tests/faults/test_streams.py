"""The stream in several processes, with any number of workers, which may differ."""

import hashlib
import os
import pathlib
import socket
import subprocess
import sys

import conftest
import numpy as np
import processes
import pytest
import stream_process
import test_stream
from ml_collections import ConfigDict

from lmim_jax.cli import prepare_data
from lmim_jax.data import loader, sources


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_2000_images_are_the_same_for_more_numbers_of_workers(workers, full):
    if not full:
        pytest.skip("with --faults only: every worker takes seconds to start")
    assert test_stream.digest(test_stream.stream(workers=workers)) == test_stream.digest(
        test_stream.undisturbed()
    )


def start_process(images, coordinator, rank, workers, start):
    """Start one of two processes that read the stream from `start`."""
    script = pathlib.Path(stream_process.__file__)
    command = [
        sys.executable,
        script,
        coordinator,
        "2",
        str(rank),
        images,
        str(workers),
        str(start),
    ]
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(conftest.ROOT),
    }
    command = processes.on_host(rank, [*map(str, command)])
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_the_batches_of_one(images):
    """Process 0 decodes in threads, process 1 in two workers, both from step 3."""
    options = ConfigDict({**stream_process.OPTIONS, "workers": 0})
    decoded = loader.BatchDecoder(
        sources.open_folder(images, "train"), options.canvas, options.channels, 1, replace=True
    )
    order = loader.TrainingOrder(
        decoded, 0, stream_process.BATCH, stream_process.STEPS, 0, stream_process.BATCH
    )
    whole = [np.asarray(order[step]["image"]) for step in range(stream_process.STEPS)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    running = [
        start_process(images, coordinator, rank, workers, 3) for rank, workers in ((0, 0), (1, 2))
    ]
    for rank, process in enumerate(running):
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0
        half = slice(4 * rank, 4 * rank + 4)
        expected = [
            f"rows {hashlib.sha256(batch[half].tobytes()).hexdigest()}" for batch in whole[3:]
        ]
        assert [line for line in output.splitlines() if line.startswith("rows")] == expected


@pytest.mark.parametrize("resize_on", ["device", "host"])
def test_a_folder_and_the_dataset_made_of_it_train_alike(resize_on, images, tmp_path, full):
    if not full:
        pytest.skip("with --faults only: two whole runs")
    prepare_data.convert(prepare_data.open_splits(images), tmp_path, "pets", 0, 1)
    dataset = (
        "--config.data.source=tfds",
        "--config.data.name=pets",
        f"--config.data.dir={tmp_path}",
    )
    losses = []
    for name, flags in (("folder", ()), ("tfds", dataset)):
        common = "--config.epochs=1", f"--config.data.resize_on={resize_on}"
        ((code, output),) = processes.finish(
            processes.start(images, tmp_path / name, *common, *flags)
        )
        assert code == 0, output
        losses.append(processes.losses(tmp_path / name))
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
