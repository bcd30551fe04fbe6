"""Several real processes: equal to one, consistent, ended together, resumed with others."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest

from lmim_jax.train import checkpoint_manifest, checkpoints

STEPS = 20
FLAGS = (
    f"--config.total_steps={STEPS}",
    "--config.checkpoint_every=1000",
    "--heartbeat=300",
)  # on a busy machine
RESTORE = "tests/faults/restore.py"
NEVER_EVALUATE = (
    "--config.evaluators.knn.every=1000",
    "--config.evaluators.visualization.every=1000",
)
SHARDED = "--config.mesh.fsdp=-1", "--config.mesh.data=1", "--config.mesh.min_size=64"


def run(images, workdir, *flags, **how):
    """A finished run: its losses."""
    for code, output in processes.finish(processes.start(images, workdir, *flags, **how)):
        assert code == 0, output
    return processes.losses(workdir)


def close(one, other, same_rows):
    """Check that losses are equal but for rounding.

    Args:
      one: {step: loss}.
      other: the same of another run.
      same_rows: a device has as many rows in both runs, so that its crops are bitwise equal.
        Otherwise a pixel of a crop is sometimes rounded to another level, which changes the loss.
    """
    assert one.keys() == other.keys()
    off = np.array([abs(one[step] / other[step] - 1) for step in one])
    print(
        f"largest relative difference of a loss {off.max():.1e}, median {np.median(off):.1e}"
    )  # shown by -rP
    assert np.sort(off)[-1 if same_rows else -3] < 1e-5, off
    assert off.max() < 1e-4, off


def last_accuracy(workdir):
    """The last k-NN accuracy of a run."""
    values = [line["knn/nn1"] for line in processes.lines(workdir) if "knn/nn1" in line]
    return values[-1]


@pytest.mark.parametrize("mesh", [SHARDED, ()], ids=["sharded", "replicated"])
def test_two_processes_train_as_one_does(images, tmp_path, mesh, full):
    """[- / state sharded or replicated, with both evaluators at the end]"""
    if not full:
        pytest.skip("a minute; ./launch/test.sh --faults")
    one = run(images, tmp_path / "one", *FLAGS, devices=2)
    two = run(images, tmp_path / "two", *FLAGS, *mesh, processes=2)
    assert len(one) == STEPS
    close(one, two, same_rows=True)
    # Of 16 images, one or two may change side
    assert last_accuracy(tmp_path / "one") == pytest.approx(last_accuracy(tmp_path / "two"), abs=15)


MESHES = """
import sys
import jax
import numpy as np
from lmim_jax.distributed import multihost, sharding
me, hosts = int(sys.argv[2]), int(sys.argv[3])
multihost.initialize(sys.argv[1], hosts, me)
assert len({device.slice_index for device in jax.devices()}) == hosts
rows = np.arange(16)
half = slice(16 // hosts * me, 16 // hosts * (me + 1))
for fsdp in (1, 2, 4, 8):
    mesh = sharding.make_mesh(-1, fsdp)
    copies = [{device.process_index for device in copy} for copy in mesh.devices]
    print("fsdp", fsdp, "hosts of a copy", sorted(len(owners) for owners in copies))
    batch = sharding.to_global({"rows": rows[half]}, mesh)["rows"]
    for shard in batch.addressable_shards:
        positions = sharding.batch_positions(mesh, 16)[shard.index[0]]
        assert (np.asarray(shard.data) == rows[positions]).all()
    total = jax.jit(lambda batch: (batch**2).sum())(batch)
    assert int(total) == (rows**2).sum()
"""
needs_hosts = pytest.mark.skipif(bool(processes.why_one_host()), reason=processes.why_one_host())


@needs_hosts
@pytest.mark.parametrize(("hosts", "devices"), [(2, 4), (4, 2)])
def test_a_mesh_over_hosts_keeps_shards_inside_and_rows_in_place(hosts, devices):
    address = f"localhost:{processes.free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(processes.ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    running = []
    for rank in range(hosts):
        command = [sys.executable, "-c", MESHES, address, str(rank), str(hosts)]
        running.append(processes.Process(processes.on_host(rank, command), env=environment))
    for code, output in processes.finish(running):
        assert code == 0, output
        for fsdp in (1, 2, 4, 8):
            copies = [max(1, fsdp // devices)] * (8 // fsdp)
            assert f"fsdp {fsdp} hosts of a copy {copies}\n" in output


@pytest.fixture(scope="module")
def one_host(images, tmp_path_factory, full):
    """The losses of a run on one host with 8 devices."""
    if not full:
        pytest.skip("seven runs; ./launch/test.sh --faults")
    return run(images, tmp_path_factory.mktemp("one_host"), *FLAGS, *NEVER_EVALUATE, devices=8)


@needs_hosts
@pytest.mark.parametrize("fsdp", [1, 2, 4])
@pytest.mark.parametrize(("hosts", "devices"), [(2, 4), (4, 2)])
def test_hosts_train_as_one_does(hosts, devices, fsdp, one_host, images, tmp_path):
    """[only with --faults] Boot ids of their own."""
    mesh = [f"--config.mesh.fsdp={fsdp}", "--config.mesh.min_size=64"]
    topology = dict(processes=hosts, devices=devices)
    several = run(images, tmp_path, *FLAGS, *NEVER_EVALUATE, *mesh, **topology)
    assert len(several) == STEPS
    close(one_host, several, same_rows=True)


def test_a_process_that_was_started_otherwise_is_named(images, tmp_path):
    other = ["--config.seed=1", "--config.log_every=3"]
    running = processes.start(images, tmp_path, *FLAGS, processes=2, different=[[], other])
    for code, output in processes.finish(running):
        assert code == 2, output
        assert re.search(
            r"error: process 1 \(host .*\) differs from process 0 .*config.log_every is 3, not 1",
            output,
        )
        assert "config.seed is 1, not 0" in output
    assert not (tmp_path / "config.json").exists()


BARRIERS = """
import sys
from lmim_jax.distributed import multihost
from lmim_jax.utils.errors import UserError
me = int(sys.argv[2])
multihost.initialize(sys.argv[1], 2, me, 10)
multihost.barrier("save/1/folder", "failed/1", 60)
if me == 1:
    multihost.abort("failed/1", "disk full")
else:
    try:
        multihost.barrier("save/1/written", "failed/1", 60)
    except OSError as error:
        print("failed:", error)
multihost.barrier("save/2/folder", "failed/2", 60)
if me == 0:
    try:
        multihost.barrier("save/2/written", "failed/2", 1)
    except TimeoutError as error:
        print("failed:", error)
print("all:", multihost.gather_json({"me": me}))
print("decided:", multihost.decide(lambda: {"seen by": me}))
def differs():
    raise UserError(f"the config of process {me}")
try:
    multihost.decide(differs)
except UserError as error:
    print("mistake:", error)
"""


def test_processes_wait_for_each_other_learn_who_failed_and_follow_the_first():
    address = f"localhost:{processes.free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(processes.ROOT), "JAX_PLATFORMS": "cpu"}
    both = []
    for me in (0, 1):
        command = [sys.executable, "-c", BARRIERS, address, str(me)]
        both.append(processes.Process(processes.on_host(me, command), env=environment))
    ended = processes.finish(both)
    assert [code for code, _ in ended] == [0, 0], ended
    assert re.search(
        r"failed: process 1: .*: disk full\nfailed: not all processes reached save/2/written",
        ended[0][1],
    )
    for _, output in ended:
        assert "all: [{'me': 0}, {'me': 1}]\ndecided: {'seen by': 0}" in output
        assert "mistake: the config of process 0" in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_ends_the_run_and_is_named(images, tmp_path, victim):
    """[- / process 1, and process 0, which the others are connected to]"""
    launcher = [str(processes.ROOT / "launch" / "processes.sh"), "2"]
    (launched,) = running = processes.start(
        images, tmp_path, "--config.epochs=1000", "--heartbeat=10", processes=2, launcher=launcher
    )
    processes.wait_for(lambda: processes.step_of(tmp_path) >= 3, running)
    children = subprocess.run(
        ["pgrep", "-P", str(launched.pid), "-f", "main.py"], capture_output=True, text=True
    )
    pids = [int(pid) for pid in children.stdout.split()]
    commands = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
    (pid,) = [pid for pid, command in commands.items() if f"--process_id={victim}" in command]
    began = time.monotonic()
    subprocess.run(["kill", "-9", str(pid)], check=True)
    ((code, output),) = processes.finish(running)
    seconds = time.monotonic() - began
    print(f"process {victim} killed: the run ended after {seconds:.0f} s")  # shown by -rP
    assert code == 137, output
    assert f"process {victim} (pid {pid}) was killed by signal 9 (KILL)" in output
    assert re.search(
        rf"process {1 - victim} \(pid \d+\) (was killed by signal|ended with exit code)", output
    )
    assert seconds < 60


TOPOLOGIES = [  # (processes, devices of each, flags of the mesh)
    (2, 4, ["--config.mesh.fsdp=4", "--config.mesh.min_size=64"]),
    (1, 2, []),
    (2, 1, SHARDED),
]


def test_a_run_resumes_with_other_processes_and_devices(images, tmp_path, full):
    """[only with --faults] 2 x 4 devices, 4 shards; 1 x 2, replicated; 2 x 1, 2 shards.

    All equal a run on 1 x 1.
    """
    if not full:
        pytest.skip("five runs; ./launch/test.sh --faults")
    expected = run(images, tmp_path / "one", *FLAGS)
    workdir, step = tmp_path / "moved", 0
    for number, devices, mesh in TOPOLOGIES:
        topology = dict(processes=number, devices=devices)
        last = (number, devices) == TOPOLOGIES[-1][:2]
        if step:  # loaded on these devices, the state is the saved one, bit by bit
            started = processes.start(images, workdir, *FLAGS, *mesh, **topology, program=RESTORE)
            loaded = processes.finish(started)
            assert [code for code, _ in loaded] == [0] * number, loaded
            assert f"step {step} {processes.digest(workdir, step)}" in loaded[0][1]
        running = processes.start(images, workdir, *FLAGS, *mesh, **topology)
        if not last:
            processes.wait_for(lambda step=step: processes.step_of(workdir) >= step + 3, running)
            running[0].send_signal(signal.SIGTERM)
        ended = processes.finish(running)
        assert {code for code, _ in ended} == {0 if last else 75}, ended
        *_, step = checkpoints.steps(workdir)
    assert step == STEPS
    # The data came in the same order, too
    close(expected, processes.losses(workdir), same_rows=False)


def test_a_save_that_fails_on_one_process_fails_on_all_and_is_tried_again(images, tmp_path, full):
    """[only with --faults] Process 1 cannot write files for a while, and no process hangs."""
    if not full:
        pytest.skip("a minute; ./launch/test.sh --faults")
    flags = (
        "--config.epochs=1000",
        "--config.checkpoint_max_failures=1000",
        "--heartbeat=300",
        *SHARDED,
    )
    running = processes.start(images, tmp_path, *flags, processes=2)
    processes.wait_for(lambda: max(checkpoints.steps(tmp_path), default=0) >= 3, running)

    def limit_file_size(size):
        command = ["prlimit", "--pid", str(running[1].pid), f"--fsize={size}:"]
        subprocess.run(command, check=True)

    limit_file_size(100)
    first = processes.step_of(tmp_path)
    processes.wait_for(lambda: processes.step_of(tmp_path) >= first + 12, running)
    limit_file_size("unlimited")
    recovered = processes.step_of(tmp_path)

    def saved_again():
        for step, path in checkpoints.steps(tmp_path).items():
            if step > recovered + 3 and checkpoint_manifest.verify(path).state == "good":
                return True
        return False

    processes.wait_for(saved_again, running)
    running[0].send_signal(signal.SIGTERM)
    ended = processes.finish(running)
    assert [code for code, _ in ended] == [75, 75], ended
    assert re.search(r"SAVING STEP \d+ FAILED \(1 of 1000 .*: process 1: ", ended[0][1])
    assert "SAVING STEP" in ended[1][1]


def test_two_processes_evaluate_as_one_does(images, tmp_path, full):
    """[only with --faults] Equal metrics; process 0 writes features, and both read them."""
    if not full:
        pytest.skip("four processes; ./launch/test.sh --faults")
    run(images, tmp_path, *FLAGS)
    script = [str(processes.ROOT / "launch" / "processes.sh"), "2"]
    evaluate = [
        sys.executable,
        "-m",
        "lmim_jax.cli",
        "evaluate",
        f"--workdir={tmp_path}",
        "--evaluators=knn,logistic_regression",
        "--config.knn.batch_size=16",
        "--config.logistic_regression.batch_size=16",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    cache = tmp_path / "evaluations" / "cache"
    metrics = []
    for name, launcher in (("two", script), ("again", script), ("one", [])):
        command = [*launcher, *evaluate, f"--out={tmp_path / name}.json"]
        done = subprocess.run(
            command, cwd=processes.ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        metrics.append(json.loads((tmp_path / f"{name}.json").read_text())["figures"])
        assert len(list(cache.iterdir())) == 2
        assert done.stdout.count("knn/nn1") == 1
        # The first time, the second evaluator reads the features of two splits; later, both do
        reads = (done.stderr + done.stdout).count(f"from {cache}")
        assert reads == (2 if name == "two" else 4)
    assert metrics[0] == metrics[1] == metrics[2]
