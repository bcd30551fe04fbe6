"""Launchers: the commands they run, and what they do if one fails. TPUs: test_tpu_pod.py."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = "import sys, time; a = sys.argv; i = int(a[-1].split('=')[1]); print('hello', a[1:-1]); "


def launch(program, count="3"):
    """Run a Python program as several processes."""
    command = [
        str(ROOT / "launch" / "processes.sh"),
        count,
        sys.executable,
        "-c",
        PROGRAM + program,
        "--x=1 2",
    ]
    environment = {**os.environ, "PORT": "1234", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_local_processes_get_their_numbers():
    done = launch("")
    assert done.returncode == 0, done.stderr
    flags = ["--x=1 2", "--coordinator=localhost:1234", "--num_processes=3"]
    assert sorted(done.stdout.splitlines()) == [f"[{i}] hello {flags}" for i in range(3)]


def test_the_process_that_dies_first_is_named_and_gives_the_exit_code():
    done = launch(
        "i == 1 and __import__('os').kill(__import__('os').getpid(), 9); time.sleep(1); sys.exit(6)"
    )
    assert done.returncode == 137
    assert re.search(r"process 1 \(pid \d+\) was killed by signal 9 \(KILL\)\n", done.stderr)
    assert len(re.findall(r"process [02] \(pid \d+\) ended with exit code 6", done.stderr)) == 2
    assert launch("", count="none").returncode == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3,2"}, ["3", "2"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["", ""]),  # they are hidden
    ],
)
def test_local_processes_share_the_gpus_that_are_visible(variables, expected, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PORT": "1234", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        environment.pop(name, None)
    show = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    command = [ROOT / "launch" / "processes.sh", "2", *show]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(
        f"[{number}] {gpus}" for number, gpus in enumerate(expected)
    )


def slurm(folder, program=sys.executable, end="", **environment):
    """Run slurm.sbatch with an srun that shows its arguments: (its process, the arguments).

    Args:
      folder: for the programs.
      program: the interpreter.
      end: a shell command at the end of srun.
    """
    told = 'printf "%s\\n" "$@" "gpu: ${SLURM_CPUS_PER_GPU:-}" >"$0.told"'
    programs = {"srun": f"{told}\n{end}", "scontrol": 'echo "$@"'}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch" / "restart.py", folder / "launch")
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    variables = {**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": program}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "--x=1 2"]
    done = subprocess.run(
        command, cwd=folder, env={**variables, **environment}, capture_output=True, text=True
    )
    return done, (folder / "srun.told").read_text().splitlines()


@pytest.mark.parametrize(
    ("environment", "cpus"),
    [
        ({}, 1),  # one task with one CPU
        ({"SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_CPUS_PER_NODE": "96"}, 12),  # as asked for
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2)", "SLURM_TASKS_PER_NODE": "8(x2)"}, 12),  # exclusive
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2)", "SLURM_TASKS_PER_NODE": "1(x2)"}, 96),
        ({"SLURM_JOB_CPUS_PER_NODE": "96,40(x3)", "SLURM_TASKS_PER_NODE": "4(x4)"}, 10),
        ({"SLURM_JOB_CPUS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "8"}, 1),
        (
            {
                "SLURM_JOB_CPUS_PER_NODE": "32",
                "SLURM_TASKS_PER_NODE": "4",
                "SLURM_CPUS_PER_GPU": "8",
            },
            8,
        ),
    ],
)
def test_the_cpus_of_a_slurm_job_are_shared_by_its_tasks(tmp_path, environment, cpus):
    done, told = slurm(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert f"--cpus-per-task={cpus}" in told
    assert "gpu: " in told  # srun refuses --cpus-per-gpu beside it
    assert ("warning: 1 CPU per task" in done.stderr) == (cpus == 1)


def test_slurm_starts_again_after_an_error(tmp_path):
    for code, starts in ((1, 3), (75, 1), (2, 1)):  # 75: the job is requeued
        end = 'echo "$LMIM_RESTART of $LMIM_RESTARTS" >>started\n'
        end += f'[ "$LMIM_RESTART" = 2 ] || exit {code}'
        (tmp_path / "started").unlink(missing_ok=True)
        variables = {"RESTARTS": "4", "RESTART_PAUSE": "0"}
        done, _ = slurm(tmp_path, end=end, program=sys.executable, **variables)
        started = (tmp_path / "started").read_text().splitlines()
        assert started == ["0 of 4", "1 of 4", "2 of 4"][:starts], done.stderr
        assert ("requeue 1" in done.stdout) == (code == 75)
        assert done.returncode == {1: 0, 75: 0, 2: 2}[code]


def test_slurm_tasks_in_containers(tmp_path):
    _, told = slurm(tmp_path)
    assert told[-4:-1] == [sys.executable, "main.py", "--x=1 2"]
    flags = {"SRUN_FLAGS": "--container-image=a.sqsh --container-mounts=/shared"}
    done, told = slurm(tmp_path, program="", **flags)  # the python of the container
    assert done.returncode == 0, done.stderr
    assert told[2:-1] == ["--label", *flags["SRUN_FLAGS"].split(), "python", "main.py", "--x=1 2"]
    container = ["apptainer", "exec", "--nv", "a.sif"]
    done, told = slurm(tmp_path, program="", CONTAINER=" ".join(container))
    assert told[2:-1] == ["--label", *container, "python", "main.py", "--x=1 2"]


def job_set(name):
    """A JobSet with its variables filled in."""
    values = {"IMAGE": "image", "BUCKET": "bkt", "RECIPE": "vit_b", "RUN": "b"}
    values |= {"HOSTS": "4", "SLICES": "2"}
    text = (ROOT / "launch" / name).read_text()
    described = re.search(r"envsubst '(.*?)' <launch/" + name, text).group(1)
    for key in described.split():  # the command of its first lines fills in all of them
        text = text.replace("${" + key[1:] + "}", values[key[1:]])
    assert "${" not in text.split("apiVersion", 1)[1]
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_the_job_sets_are_complete(name):
    one = job_set(name)
    assert one.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (one["apiVersion"], one["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = one["spec"]["failurePolicy"]
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (replicated,) = one["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    environment = {variable.pop("name"): variable for variable in container["env"]}
    attempt = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
    assert environment["LMIM_RESTART"] == {"valueFrom": {"fieldRef": {"fieldPath": attempt}}}
    assert int(environment["LMIM_RESTARTS"]["value"]) > 0
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/stage", "/dev/shm"}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    flags = " ".join(container["args"]).split()
    places = {"--workdir=gs://bkt/runs/b", "--config.data.path=gs://bkt/data"}
    assert places | {"--config=vit_b", "--config.data.stage=/stage"} <= set(flags)


def test_slices_of_tpus_have_a_node_pool_each():
    one = job_set("gke_jobset.yaml")
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert one["metadata"]["annotations"] == {annotation: "cloud.google.com/gke-nodepool"}
    assert one["spec"]["replicatedJobs"][0]["replicas"] == 2


def test_pods_with_gpus_find_their_driver_and_the_first_of_them():
    one = job_set("gke_jobset_gpu.yaml")
    name, (job,) = one["metadata"]["name"], one["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    # Pod 0 of the job is reached as JOBSET-JOB-0-0.JOBSET
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:8482 " in container["args"][0]
    libraries = {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}
    assert libraries in container["env"]
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in (ROOT / "launch" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_kubernetes_would_accept_the_jobs(name):
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for replicated in job_set(name)["spec"]["replicatedJobs"]:
        kind = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
        schemas.validate({**kind, **replicated["template"]}, "1.33", strict=True)


def test_an_image_holds_what_training_needs_and_nothing_else(tmp_path):
    ignored, *kept = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored == "*"
    assert kept.pop() == "**/__pycache__"
    for pattern in kept:
        source = ROOT / pattern.removeprefix("!")
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tmp_path / source.name, ignore=skip)
        else:
            shutil.copy(source, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 3e6
    command = [sys.executable, "main.py", "--config=vit_b", "--workdir=w", "--config.none=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2  # a mistake that is found after the imports
    assert "none" in done.stderr
    copied = re.findall(r"^COPY (\S+) ", (ROOT / "launch" / "Dockerfile").read_text(), re.M)
    assert copied == ["requirements.txt", "."]


def sky():
    """The task of launch/skypilot.yaml."""
    return yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())


PLACES = {  # (variable, value): the flags that come of it
    ("NFS", "10.0.0.2:/share"): ["--config.data.path=/mnt/nfs/images", "--workdir=/mnt/nfs/runs/b"],
    ("BUCKET", "bkt"): [
        "--config.data.path=gs://bkt/data",
        "--config.data.stage=/home/me/stage",
        "--workdir=gs://bkt/runs/b",
    ],
}


@pytest.mark.parametrize("place", PLACES)
def test_skypilot_starts_one_process_per_node(place, tmp_path):
    task = sky()
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("sudo", "mountpoint", ".venv/bin/python"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    nodes = {"NODE_IPS": "10.0.0.5\n10.0.0.6", "NUM_NODES": "2", "NODE_RANK": "1"}
    environment = {f"SKYPILOT_{key}": value for key, value in nodes.items()}
    environment |= {**task["envs"], "FLAGS": "--config.mesh.fsdp=2 --a=b", "HOME": "/home/me"}
    environment |= {place[0]: place[1], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-c", task["run"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert ("/mnt/nfs" in told) == (place[0] == "NFS")
    assert told[told.index("main.py") :] == [
        "main.py",
        "--config=vit_b",
        *PLACES[place],
        "--coordinator=10.0.0.5:8482",
        "--num_processes=2",
        "--process_id=1",
        "--config.mesh.fsdp=2",
        "--a=b",
    ]


def test_skypilot_sets_up_for_a_bucket_or_a_file_server(tmp_path):
    for name in ("sudo", "mount.nfs", "python3"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    for places, code in (({}, 2), ({"BUCKET": "b", "NFS": "n"}, 2), ({"BUCKET": "b"}, 0)):
        environment = {**sky()["envs"], **places, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", "-c", sky()["setup"]]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert ("--env BUCKET" in done.stderr) == (code == 2)
        assert "apt-get" not in done.stdout  # there is no file server to mount


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_shell_scripts_parse_and_document_their_call(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.name in path.read_text().split("\n\n")[0] or path.name == "venv.sh"
