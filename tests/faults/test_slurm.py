"""launch/slurm.sbatch under a real Slurm of this machine: signal, queue, resume (--faults only)."""

import re
import subprocess
import sys
import time

import cluster
import processes
import pytest

TASKS, STEPS = 2, 40
# Options of sbatch: (CPUs of each task, CUDA_VISIBLE_DEVICES of each task); 16 CPUs and 2 GPUs
BINDINGS = {
    "--ntasks-per-node=2": ("1", ["", ""]),
    "--ntasks-per-node=2 --cpus-per-task=3": ("3", ["", ""]),
    "--ntasks-per-node=2 --gpus-per-node=2 --exclusive": ("8", ["0,1", "0,1"]),
    "--ntasks-per-node=2 --gpus-per-node=2 --cpus-per-gpu=4": ("4", ["0,1", "0,1"]),
    "--ntasks-per-node=2 --gpus-per-task=1 --exclusive": ("8", ["0", "1"]),
    "--ntasks-per-node=2 --gpus-per-task=1 --cpus-per-gpu=4": ("4", ["0", "1"]),
    "--ntasks-per-node=1 --gpus-per-node=2 --exclusive": ("16", ["0,1"]),
}
LIVING = "PENDING", "RUNNING", "COMPLETING", "COMPLETED"


@pytest.mark.skipif(bool(cluster.WHY_NOT), reason=cluster.WHY_NOT or "-")
def test_a_job_of_two_tasks_saves_on_its_signal_goes_back_into_the_queue_and_finishes(
    tmp_path, full
):
    if not full:
        pytest.skip("some minutes; ./launch/test.sh --faults")
    workdir, log = tmp_path / "run", tmp_path / "job.log"
    flags = [
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        f"--config.total_steps={STEPS}",
    ]
    flags += ["--heartbeat=300", "--config.log_every=1", "--config.evaluators.knn.baselines=False"]
    flags += [f"--config.evaluators.{name}.every=0" for name in ("knn", "visualization")]
    options = ["--parsable", "--time=60", f"--ntasks-per-node={TASKS}", f"--output={log}"]
    with cluster.Cluster(tmp_path / "slurm") as slurm:
        environment = {**slurm.environment, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
        command = ["sbatch", *options, "launch/slurm.sbatch", *flags]
        sent = subprocess.run(
            command, cwd=processes.ROOT, env=environment, capture_output=True, text=True, check=True
        )
        job = sent.stdout.strip()

        def wait_for(condition):
            deadline = time.monotonic() + 2 * processes.LIMIT
            while not condition():
                assert slurm.field(job, "JobState") in (
                    "PENDING",
                    "RUNNING",
                    "COMPLETING",
                    "COMPLETED",
                ), log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)

        wait_for(lambda: processes.step_of(workdir) >= 10)
        slurm.ask("scancel", "--signal=USR1", job)  # as the time limit does, by #SBATCH --signal
        wait_for(
            lambda: (
                slurm.field(job, "Restarts") == "1" and slurm.field(job, "JobState") == "PENDING"
            )
        )
        slurm.ask(
            "scontrol", "update", f"JobId={job}", "StartTime=now"
        )  # Slurm would wait two minutes
        wait_for(lambda: slurm.field(job, "JobState") == "COMPLETED")
    told = log.read_text()
    (step,) = {int(found) for found in re.findall(r"stopped after step (\d+)", told)}
    assert 10 <= step < STEPS
    assert "tasks ended with exit code 75" in told
    assert "stopped; requeued" in told
    assert f"resuming after step {step} of {STEPS}" in told
    assert "tasks ended with exit code 0" in told
    assert f"{TASKS} process(es)" in told
    assert sorted(processes.losses(workdir)) == list(range(1, STEPS + 1))
    assert (workdir / "summary.json").exists()


@pytest.mark.skipif(bool(cluster.WHY_NOT), reason=cluster.WHY_NOT or "-")
def test_every_task_gets_its_share_of_the_cpus_and_its_gpus(tmp_path, full):
    if not full:
        pytest.skip("half a minute; ./launch/test.sh --faults")
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = main.py ] || exec {sys.executable} "$@"\n'  # launch/restart.py
        'echo "task $SLURM_LOCALID: $SLURM_CPUS_PER_TASK $CUDA_VISIBLE_DEVICES."\n'
    )
    program.chmod(0o755)
    with cluster.Cluster(tmp_path / "slurm") as slurm:
        environment = {**slurm.environment, "PYTHON": str(program)}
        for number, (options, (cpus, gpus)) in enumerate(BINDINGS.items()):
            log = tmp_path / f"{number}.log"
            command = [
                "sbatch",
                "--wait",
                f"--output={log}",
                *options.split(),
                "launch/slurm.sbatch",
            ]
            subprocess.run(command, cwd=processes.ROOT, env=environment, check=True, timeout=60)
            told = re.findall(r"task (\d): (\d+) (.*)\.", log.read_text())
            wanted = [(str(task), cpus, visible) for task, visible in enumerate(gpus)]
            assert sorted(told) == wanted, options
            assert f"{cpus} CPU(s) each" in log.read_text()
