"""launch/tpu_pod.sh on a mock gcloud (mock_gcloud.py) whose workers are folders of this machine."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {
    "TPU_NAME": "pod",
    "ZONE": "us-west4-a",
    "TYPE": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "POLL": "0",
}
# uv makes the interpreter of the virtual environment, which stands for the training run: it ends
# with the next exit code of the file `runs`; "run": only after SIGTERM, "preempted": with the slice
PYTHON3 = """#!/bin/bash
[ "$3" = venv ] || exit 0
mkdir -p .venv/bin
cat >.venv/bin/python <<'END'
#!/bin/bash
printf '%s\\n' "$@" >"$HOME/flags"
echo "$LMIM_RESTART of $LMIM_RESTARTS $LMIM_RESTART_REASON" >>"$HOME/restarts"
run="$(head -n 1 "$MOCK/runs")"
sed -i 1d "$MOCK/runs"
trap 'exit 75' TERM
case "$run" in
  run) while true; do sleep 0.05; done ;;
  preempted) touch "$MOCK/preempted"; exit 75 ;;
  *) exit "${run:-0}" ;;
esac
END
chmod +x .venv/bin/python
"""
# Records what would be done as root. apt fails twice, as if another process held its lock
SUDO = """#!/bin/bash
echo "$*" >>"$HOME/sudo"
case "$*" in
  *"install"*) [ "$(grep -c install "$HOME/sudo")" -lt 3 ] && exit 100
    echo exit >"$MOCK/remote/mount.nfs"; chmod +x "$MOCK/remote/mount.nfs" ;;
esac
exit 0
"""


# sda holds the system
LSBLK = """#!/bin/bash
case "$*" in *PKNAME*) echo sda ;; *) printf '%s disk\\n' zram0 sda sdb ;; esac
"""


class Cloud:
    """The mock gcloud in a folder, and the script on it."""

    def __init__(self, folder):
        self.folder = folder
        gcloud = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/mock_gcloud.py "$@"\n'
        self.program("bin/gcloud", gcloud)
        self.program("remote/python3", PYTHON3)
        self.program("remote/sudo", SUDO)
        self.program("remote/lsblk", LSBLK)
        self.program("remote/mountpoint", "#!/bin/sh\nexit 1\n")
        self.slices("pod")
        self.runs()

    def program(self, name, text):
        """Write an executable file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def slices(self, *names):
        """Give every slice two workers."""
        for name in names:
            for number in range(2):
                (self.folder / "workers" / f"{name}.{number}").mkdir(parents=True)

    def runs(self, *ends):
        """How the runs on the workers will end, in the order of their starts."""
        (self.folder / "runs").write_text("".join(f"{end}\n" for end in ends))

    def launch(self, *arguments, states, **environment):
        """Run the script with a sequence of states: (process, calls of gcloud)."""
        (self.folder / "states").write_text(states)
        (self.folder / "calls").write_text("")
        command = [str(ROOT / "launch" / "tpu_pod.sh"), *arguments]
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        variables = {
            **os.environ,
            **SETTINGS,
            "MOCK": str(self.folder),
            "PATH": path,
            **environment,
        }
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        return done, self.calls()

    def calls(self):
        """The arguments of all calls of gcloud since the last launch."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def files(self, name, where="pod.*"):
        """The texts of a file of every worker that has it."""
        return [
            path.read_text() for path in sorted((self.folder / "workers").glob(f"{where}/{name}"))
        ]

    def end(self):
        """End the runs that still go on."""
        for pid in self.files("lmim_jax/train.pid", "*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    """A mock of Google's cloud with one slice of two workers."""
    mock = Cloud(tmp_path)
    yield mock
    mock.end()


def verbs(calls):
    """The verbs of calls."""
    return [call[call.index("tpus") + 2] for call in calls]


def tpus(*words):
    """The arguments of gcloud for a command on TPUs."""
    return ["compute", "tpus", *words, "--zone=us-west4-a"]


def test_a_new_slice_is_requested_and_started(cloud):
    cloud.runs("run", "run")
    flags = ["--config=vit_b", "--workdir=/mnt/nfs/it's mine", "--config.data.path=$HOME/a b"]
    states = "NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    done, calls = cloud.launch("train", *flags, states=states, SPOT="1", PROJECT="p")
    assert done.returncode == 0, done.stderr
    wanted = ["describe", "create", "describe", "describe", "describe", "ssh", "scp", "ssh", "ssh"]
    assert verbs(calls) == wanted
    create = ["queued-resources", "create", "pod", "--node-id=pod"]
    create += ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert calls[1] == [*tpus(*create), "--project=p"]
    assert '"jax[tpu]" -r requirements.txt' in calls[7][6]
    # The workers see the flags as they were given here, and one run is alive on each
    assert cloud.files("flags") == ["\n".join(["main.py", *flags]) + "\n"] * 2
    done, _ = cloud.launch("status", states="ACTIVE")
    assert done.stdout.count(": running\n") == 2


def test_the_copied_archive_holds_the_program_and_nothing_hidden(cloud):
    done, _ = cloud.launch("train", states="ACTIVE")
    assert done.returncode == 0, done.stderr
    worker = cloud.folder / "workers" / "pod.0" / "lmim_jax"
    for name in ("main.py", "requirements.txt", "lmim_jax/cli/train.py", "configs/vit_b.py"):
        assert (worker / name).is_file()
    assert [path.name for path in worker.glob(".*")] == [".venv"]  # made there


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RESERVED": "1"}, ["--reserved"]),
        ({"FLEX": "10h"}, ["--provisioning-model=flex-start", "--max-run-duration=10h"]),
        ({"DISK": "projects/p/d"}, ["--data-disk=source=projects/p/d,mode=read-only"]),
        ({"CREATE_FLAGS": "--internal-ips --network=n"}, ["--internal-ips", "--network=n"]),
        ({"SLICES": "2"}, ["--node-count=2", "--node-prefix=pod"]),
    ],
)
def test_the_kinds_of_requests(cloud, environment, words):
    done, calls = cloud.launch("train", states="NONE FAILED", **environment)
    assert done.returncode == 1
    assert "the slice is FAILED" in done.stderr
    assert "'wait for the slice' failed" in done.stderr
    create = calls[1]
    assert set(words) <= set(create)
    assert ("--node-id=pod" in create) == ("SLICES" not in environment)
    assert (create[0] == "alpha") == ("FLEX" in environment)


def test_two_slices_are_one_run(cloud):
    cloud.slices("pod-0", "pod-1")
    cloud.runs("run", "run", "run", "run")
    done, calls = cloud.launch("train", states="ACTIVE", SLICES="2")
    assert done.returncode == 0, done.stderr
    assert sorted(verbs(calls)) == [*["describe"] * 3, "scp", "scp", *["ssh"] * 6]
    assert len(cloud.files("flags", "pod-?.?")) == 4
    done, _ = cloud.launch("status", states="ACTIVE", SLICES="2")
    assert done.stdout.count(": running\n") == 4
    # A command that fails on one slice has failed
    done, _ = cloud.launch("stop", states="ACTIVE", SLICES="2", FAIL="ssh pod-0")
    assert done.returncode == 7


def test_train_again_after_preemption_replaces_the_slice(cloud):
    states = "SUSPENDING SUSPENDED ACTIVE"
    done, calls = cloud.launch("train", states=states, NFS="10.0.0.2:/share", DISK="projects/p/d")
    assert done.returncode == 0, done.stderr
    first = ["describe", "describe", "delete", "create", "describe", "ssh", "scp"]
    assert verbs(calls) == [*first, *["ssh"] * 4]
    assert calls[2] == tpus("queued-resources", "delete", "pod", "--force", "--quiet")
    told = cloud.files("sudo")
    assert told[0].count("install -y -q nfs-common") == 3  # the lock of apt was held twice
    for done_as_root in told:
        assert "mount -t nfs 10.0.0.2:/share /mnt/nfs\n" in done_as_root
        assert "mount -o ro,noload /dev/sdb /mnt/disk\n" in done_as_root


def test_a_preempted_slice_whose_request_is_still_active_is_replaced(cloud):
    (cloud.folder / "preempted").touch()
    done, calls = cloud.launch("train", states="ACTIVE")
    assert done.returncode == 0, done.stderr
    first = ["describe", "describe", "delete", "create", "describe", "ssh", "scp"]
    assert verbs(calls) == [*first, "ssh", "ssh"]


def test_a_slice_that_trains_is_left_alone(cloud):
    cloud.runs("run", "run")
    cloud.launch("train", states="ACTIVE")
    done, calls = cloud.launch("train", states="ACTIVE")
    assert done.returncode == 0, done.stderr
    assert "already running; nothing was changed" in done.stderr
    assert verbs(calls) == ["describe", "describe", "ssh"]
    pid = int(cloud.files("lmim_jax/train.pid", "pod.1")[0])
    os.kill(pid, signal.SIGTERM)
    while pathlib.Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    done, calls = cloud.launch("train", states="ACTIVE")
    assert done.returncode == 1
    assert "on some workers only" in done.stderr
    assert verbs(calls) == ["describe", "describe", "ssh"]


def test_an_error_of_gcloud_is_not_an_absent_slice(cloud):
    done, calls = cloud.launch("train", states="ERROR")
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert verbs(calls) == ["describe"] * 3
    done, calls = cloud.launch("train", states="ERROR ACTIVE")
    assert done.returncode == 0, done.stderr
    assert "create" not in verbs(calls)


@pytest.mark.parametrize(
    ("fail", "name", "states", "count"),
    [
        ("create", "request a slice", "NONE", 2),
        ("worker $(hostname)", "ask the workers", "ACTIVE", 3),
        (" scp ", "copy the code", "ACTIVE", 4),
        ("requirements.txt", "install", "ACTIVE", 5),
        ("nohup", "start on all workers", "ACTIVE", 6),
    ],
)
def test_a_command_that_fails_stops_the_rest_and_is_named(cloud, fail, name, states, count):
    done, calls = cloud.launch("train", states=states, FAIL=fail)
    assert done.returncode == 7
    assert (
        f"error: '{name}' failed with exit code 7. Nothing was deleted; run the same command again"
        in done.stderr
    )
    assert len(calls) == count  # nothing after it
    assert "delete" not in verbs(calls)


def test_watch_replaces_a_preempted_slice_restarts_a_run_and_deletes_at_the_end(cloud):
    cloud.runs("preempted", "preempted", 1, 75, 0, 0)
    states = "NONE ACTIVE SUSPENDING SUSPENDED SUSPENDED ACTIVE"
    done, calls = cloud.launch("watch", "--config=vit_b", states=states, DELETE="1")
    assert done.returncode == 0, done.stderr
    changes = [verb for verb in verbs(calls) if verb in ("create", "delete", "scp")]
    assert changes == ["create", "scp", "delete", "create", "scp", "scp", "delete"]
    for how in ("gone", "ended", "finished"):
        assert f"the run: {how}\n" in done.stderr


def test_watch_ends_on_a_mistake_of_the_user(cloud):
    cloud.runs(2, 2)
    done, calls = cloud.launch("watch", states="ACTIVE", DELETE="1")
    assert done.returncode == 2, done.stderr
    assert verbs(calls).count("scp") == 1
    assert "delete" not in verbs(calls)


def test_watch_numbers_its_restarts_and_ends_when_the_run_gives_up(cloud):
    cloud.runs(1, 1, 139, 139, 2, 2)
    done, calls = cloud.launch("watch", states="ACTIVE", RESTARTS="2")
    assert done.returncode == 2
    assert verbs(calls).count("scp") == 3
    assert cloud.files("restarts") == ["0 of 2 \n1 of 2 ended\n2 of 2 ended\n"] * 2
    cloud.runs(127, 127)
    done, calls = cloud.launch("watch", states="ACTIVE")
    assert done.returncode == 2
    assert verbs(calls).count("scp") == 1


@pytest.mark.parametrize("code", ["7", "2"])  # 2: of `uv pip install` without a network
def test_watch_ends_after_many_failures(cloud, code):
    environment = {"FAIL": " scp ", "FAIL_CODE": code, "FAILURES": "3"}
    done, calls = cloud.launch("watch", states="ACTIVE", **environment)
    assert done.returncode == 1
    assert verbs(calls).count("scp") == 3


def test_watch_ends_when_the_run_is_stopped_by_hand(cloud):
    cloud.runs("run", "run")
    cloud.launch("train", states="ACTIVE")
    ended = []
    watch = threading.Thread(target=lambda: ended.append(cloud.launch("watch", states="ACTIVE")))
    watch.start()

    def follows():
        seen = verbs(cloud.calls())
        return "scp" not in seen and seen.count("ssh") >= 2

    while watch.is_alive() and not follows():  # until it has found the run
        time.sleep(0.02)
    stop = 'cd "$1" && touch train.stopped && kill -TERM "$(cat train.pid)"'  # as the command
    for worker in cloud.folder.glob("workers/*/lmim_jax"):
        subprocess.run(["bash", "-c", stop, "stop", worker], check=True)
    watch.join()
    ((done, calls),) = ended
    assert done.returncode == 0, done.stderr
    assert "the run: stopped" in done.stderr
    assert "scp" not in verbs(calls)


def test_the_other_commands(cloud):
    _, calls = cloud.launch("logs", states="ACTIVE", FAIL="tail")
    log = "--command=tail -n 100 -F lmim_jax/train.log"
    assert calls == [tpus("tpu-vm", "ssh", "pod", "--worker=0", log)]
    _, calls = cloud.launch("delete", states="ACTIVE")
    assert calls == [tpus("queued-resources", "delete", "pod", "--force", "--quiet")]
    cloud.runs("run", "run")
    cloud.launch("train", states="ACTIVE")
    done, _ = cloud.launch("stop", states="ACTIVE")
    assert done.returncode == 0, done.stderr
    done, calls = cloud.launch("status", states="SUSPENDED")
    assert done.stdout == "slice: SUSPENDED\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["trian"], {}, "no command trian: train | watch | status"),
        ([], {}, "no command given"),
        (["status"], {"ZONE": ""}, "set TPU_NAME and ZONE"),
        (["train"], {"TYPE": ""}, "set TYPE"),
        (["watch"], {"RUNTIME": ""}, "set RUNTIME"),
        (["train"], {"SLICES": "two"}, "SLICES=two is not a number"),
        (["train"], {"SPOT": "1", "FLEX": "10h"}, "give one of SPOT, RESERVED and FLEX"),
    ],
)
def test_mistakes_are_one_line(cloud, arguments, environment, message):
    done, calls = cloud.launch(*arguments, states="NONE", **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "create" not in verbs(calls)
