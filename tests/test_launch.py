"""Launchers: the commands they run, and what they do if one fails. gcloud is a mock."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
GCLOUD = """#!{python}
# Records its arguments; answers `describe` with the next of STATES; fails if FAIL is in them.
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if "describe" in sys.argv:
    states = (folder / "states").read_text().split()
    (folder / "states").write_text(" ".join(states[1:] or states))
    if states[0] == "NONE":
        sys.exit(1)
    print(states[0])
if os.environ.get("FAIL") and os.environ["FAIL"] in " ".join(sys.argv):
    sys.exit(7)
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs tpu_pod.sh with a sequence of states of the slice: (process, calls of gcloud)."""
    (tmp_path / "gcloud").write_text(GCLOUD.format(python=sys.executable, folder=str(tmp_path)))
    (tmp_path / "gcloud").chmod(0o755)

    def run(*arguments, states, **environment):
        (tmp_path / "states").write_text(states)
        (tmp_path / "calls").write_text("")
        settings = {
            "TPU_NAME": "pod",
            "ZONE": "us-west4-a",
            "TYPE": "v5litepod-16",
            "RUNTIME": "v2-alpha-tpuv5-lite",
        }
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL": "0"}
        command = [str(ROOT / "launch" / "tpu_pod.sh"), *arguments]
        environment = {**os.environ, **settings, **path, **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def tpus(*words):
    """The arguments of gcloud for a command on TPUs."""
    return ["compute", "tpus", *words, "--zone=us-west4-a"]


DESCRIBE = tpus("queued-resources", "describe", "pod", "--format=value(state.state)")


def test_a_new_slice_is_requested_and_started(cloud):
    flags = (
        "--config=configs/vit_b.py",
        "--workdir=/mnt/nfs/it's mine",
        "--config.data.path=$HOME/a b",
    )
    done, calls = cloud(
        "train",
        *flags,
        states="NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
        SPOT="1",
        PROJECT="p",
    )
    assert done.returncode == 0, done.stderr

    def project(call):
        return [*call, "--project=p"]

    create = tpus(
        "queued-resources", "create", "pod", "--node-id=pod", "--accelerator-type=v5litepod-16"
    )
    create[-1:] = ["--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a"]
    assert calls[:2] == [project(DESCRIBE), project(create)]
    assert calls[2:5] == [project(DESCRIBE)] * 3
    copy, install, start = calls[5:]
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert copy[4].endswith("/lmim_jax.tar.gz")
    assert copy[5:] == ["pod:lmim_jax.tar.gz", "--worker=all", "--zone=us-west4-a", "--project=p"]
    for call in (install, start):
        assert call[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"]
    assert '"jax[tpu]" -r requirements.txt' in install[6]
    # The worker's shell sees the flags as they were given here
    (line,) = [line for line in start[6].splitlines() if "main.py" in line]
    words = shlex.split(line)
    assert words[words.index("main.py") + 1 :][:3] == list(flags)


def test_the_copied_archive_holds_the_program_and_nothing_hidden(cloud, tmp_path):
    (tmp_path / "keep").mkdir()
    script = (tmp_path / "gcloud").read_text()
    keep = f"""
if "scp" in sys.argv:
    import shutil
    shutil.copy(sys.argv[5], {str(tmp_path / "keep")!r})
"""
    (tmp_path / "gcloud").write_text(script + keep)
    assert cloud("train", states="ACTIVE")[0].returncode == 0
    names = subprocess.run(
        ["tar", "tzf", tmp_path / "keep" / "lmim_jax.tar.gz"], capture_output=True, text=True
    )
    names = names.stdout.splitlines()
    needed = {"./main.py", "./requirements.txt", "./lmim_jax/cli/train.py", "./configs/vit_b.py"}
    assert needed <= set(names)
    assert not [name for name in names if name.startswith("./.") and name != "./"]


def test_train_again_after_preemption_replaces_the_slice_and_resumes(cloud):
    done, calls = cloud(
        "train", "--workdir=/mnt/nfs/b", states="SUSPENDED ACTIVE", NFS="10.0.0.2:/share"
    )
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls] == [
        "describe",
        "delete",
        "create",
        "describe",
        "scp",
        "ssh",
        "ssh",
        "ssh",
    ]
    assert calls[1] == tpus("queued-resources", "delete", "pod", "--force", "--quiet")
    assert "sudo mount -t nfs 10.0.0.2:/share /mnt/nfs" in calls[6][6]
    assert "already running" in calls[7][6]


def test_train_again_on_a_living_slice_keeps_it(cloud):
    done, calls = cloud("train", states="ACTIVE")
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in calls] == ["describe", "describe", "scp", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("fail", "name", "states", "count"),
    [
        ("create", "request a slice", "NONE", 2),
        (" scp ", "copy the code", "ACTIVE", 3),
        ("requirements.txt", "install", "ACTIVE", 4),
        ("main.py", "start on all workers", "ACTIVE", 5),
    ],
)
def test_a_command_that_fails_stops_the_rest_and_is_named(cloud, fail, name, states, count):
    done, calls = cloud("train", states=states, FAIL=fail)
    assert done.returncode == 7
    assert (
        f"error: '{name}' failed with exit code 7. Nothing was deleted; run the same command again"
        in done.stderr
    )
    assert len(calls) == count  # nothing after it
    assert not [call for call in calls if "delete" in call]


def test_a_request_that_fails_while_waiting_is_reported(cloud):
    done, calls = cloud("train", states="NONE PROVISIONING FAILED")
    assert done.returncode == 1
    assert "the slice is FAILED" in done.stderr
    assert "'wait for the slice' failed" in done.stderr
    assert [call[3] for call in calls] == ["describe", "create", "describe", "describe"]


def test_the_other_commands(cloud):
    _, calls = cloud("logs", states="ACTIVE")
    assert calls == [
        tpus("tpu-vm", "ssh", "pod", "--worker=0", "--command=tail -n 100 -F lmim_jax/train.log")
    ]
    _, calls = cloud("stop", states="ACTIVE")
    assert calls == [
        tpus(
            "tpu-vm",
            "ssh",
            "pod",
            "--worker=all",
            '--command=cd lmim_jax && kill -TERM "$(cat train.pid)"',
        )
    ]
    done, calls = cloud("status", states="ACTIVE")
    assert "slice: ACTIVE" in done.stdout
    _, calls = cloud("delete", states="ACTIVE")
    assert calls == [tpus("queued-resources", "delete", "pod", "--force", "--quiet")]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["trian"], {}, "no command trian: train | status"),
        ([], {}, "no command given"),
        (["status"], {"ZONE": ""}, "set TPU_NAME and ZONE"),
        (["train"], {"TYPE": ""}, "set TYPE and RUNTIME"),
    ],
)
def test_mistakes_are_one_line(cloud, arguments, environment, message):
    done, _ = cloud(*arguments, states="NONE", **environment)
    assert done.returncode == 2
    assert message in done.stderr


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


def test_the_job_sets_are_complete():
    values = dict(IMAGE="image", CLAIM="claim", RECIPE="configs/vit_b.py", RUN="b", HOSTS="4")
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    for name, value in values.items():
        text = text.replace("${" + name + "}", value)
    assert "${" not in text
    sets = {one["metadata"]["labels"]["hardware"]: one for one in yaml.safe_load_all(text)}
    assert sets.keys() == {"tpu", "gpu"}
    for one in sets.values():
        (replicated,) = one["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        assert job["parallelism"] == job["completions"] == 4
        (container,) = job["template"]["spec"]["containers"]
        (rule,) = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"] == {
            "containerName": container["name"],
            "operator": "In",
            "values": [2],
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in job["template"]["spec"]["volumes"]
        }
    # Pod 0 of the job is reached as JOBSET-JOB-0-0.JOBSET
    name, (job,) = sets["gpu"]["metadata"]["name"], sets["gpu"]["spec"]["replicatedJobs"]
    (command,) = job["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:8482 " in command


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_shell_scripts_parse_and_document_their_call(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.name in path.read_text().split("\n\n")[0] or path.name == "venv.sh"
