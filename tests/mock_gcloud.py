"""What launch/tpu_pod.sh needs of gcloud, with folders as workers: run as `gcloud` by its tests.

The folder MOCK holds: calls (the arguments of all calls so far, as JSON), states (the answers to
come; the last stays), workers/SLICE.NUMBER (the homes of the workers, in which commands really
run), remote (programs of the workers), preempted (if it exists, no worker can be reached). A call
whose arguments contain FAIL ends with exit code FAIL_CODE, or 7.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["MOCK"])
ERRORS = {
    "NONE": "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/pod' was not found.",
    "ERROR": "PERMISSION_DENIED: Permission 'tpu.queuedResources.get' denied.",
}


def workers(name):
    """The homes of the workers of a slice."""
    return sorted((FOLDER / "workers").glob(f"{name}.*"))


def describe():
    """The next state, or the next error."""
    states = (FOLDER / "states").read_text().split()
    (FOLDER / "states").write_text(" ".join(states[1:] or states))
    if states[0] in ERRORS:
        sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources.describe) {ERRORS[states[0]]}")
    print(states[0])


def create():
    """New machines: nothing is left of the files of the old ones."""
    for worker in workers("*"):
        shutil.rmtree(worker)
        worker.mkdir()
    (FOLDER / "preempted").unlink(missing_ok=True)


def ssh(name, command):
    """Run a command in the homes of all workers of a slice; the highest exit code."""
    code = 0
    for worker in workers(name):
        path = f"{FOLDER / 'remote'}:/usr/bin:/bin"
        environment = {**os.environ, "HOME": str(worker), "PATH": path}
        done = subprocess.run(["bash", "-c", command], cwd=worker, env=environment)
        code = max(code, done.returncode)
    return code


def main(arguments):
    """Answer a call."""
    with (FOLDER / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if os.environ.get("FAIL") and os.environ["FAIL"] in " ".join(arguments):
        sys.exit(int(os.environ.get("FAIL_CODE", "7")))
    group, verb, *rest = arguments[arguments.index("tpus") + 1 :]
    if verb == "describe" and group == "queued-resources":
        describe()
    elif verb == "describe":
        print("PREEMPTED" if (FOLDER / "preempted").exists() else "READY")
    elif verb == "create":
        create()
    elif verb in ("ssh", "scp") and (FOLDER / "preempted").exists():
        sys.exit(255)
    elif verb == "scp":
        name, _, path = rest[1].partition(":")
        for worker in workers(name):
            shutil.copy(rest[0], worker / path)
    elif verb == "ssh":
        (command,) = [word for word in rest if word.startswith("--command=")]
        sys.exit(ssh(rest[0], command.partition("=")[2]))


main(sys.argv[1:])
