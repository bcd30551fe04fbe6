"""Several processes as one run: found from the environment or told by flags, and checked to be alike."""

import collections
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import socket
import time

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax._src.distributed import (
    global_state,  # its key-value store, for which there is no public way
)
from jax.experimental import multihost_utils

from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

LIBRARIES = "jax", "jaxlib", "flax", "optax", "grain", "numpy"


def detect(environment, dev="/dev"):
    """Which cluster this process was started in as one of several, and what jax needs to be told of it.

    Args:
      environment: such as os.environ. dev: the folder of device files.

    Returns:
      (name, keyword arguments of `jax.distributed.initialize`); None where there are no others.

    Raises:
      UserError: the cluster does not say enough.
    """
    number = lambda name: int(environment.get(name) or 1)
    # Kubernetes tells TPU slices by variables; virtual machines ask Google's metadata server, one host or many
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or number("MEGASCALE_NUM_SLICES") > 1:
        return "Cloud TPU", {}
    chips = [*pathlib.Path(dev).glob("accel[0-9]*"), *pathlib.Path(dev).glob("vfio/[0-9]*")]
    if chips and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environment:
        return "Cloud TPU", {}
    if (
        "SLURM_STEP_NODELIST" in environment and number("SLURM_NTASKS") > 1
    ):  # inside srun, not in the batch script
        return "Slurm", {"cluster_detection_method": "slurm"}
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return "Open MPI", {"cluster_detection_method": "ompi"}
        if importlib.util.find_spec(
            "mpi4py"
        ):  # from version 5 on, mpirun does not say where process 0 is
            return "Open MPI", {"cluster_detection_method": "mpi4py"}
        raise UserError(
            "Open MPI does not say where process 0 is: pip install mpi4py, or give --coordinator"
        )
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes", {"cluster_detection_method": "k8s"}
        raise UserError(
            "this is an indexed Kubernetes job: pip install 'jax[k8s]', or give --coordinator"
        )
    return None


def initialize(coordinator="", num_processes=0, process_id=-1, heartbeat=30):
    """Join the other processes of this run; nothing to do where there are none. Before any other use of jax.

    Args:
      coordinator: "host:port" of process 0; "" finds the processes from the environment, if there are any.
      num_processes, process_id: how many there are, and which one this is; with `coordinator` only.
      heartbeat: seconds without a sign of life after which a process counts as lost, and the run ends.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator needs --num_processes and --process_id, not {num_processes} and {process_id}"
            )
        where = dict(
            coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
        )
    elif found := detect(os.environ):
        where = found[1]
    else:
        return
    jax.config.update(
        "jax_cpu_collectives_implementation", "gloo"
    )  # for runs on CPUs; others ignore it
    timeouts = dict(heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat)
    jax.distributed.initialize(**where, **timeouts)


def check_consistent(**facts):
    """Check that the processes use all accelerators and were started alike; to be called by all of them.

    Args:
      facts: what must be equal, such as config and data: nested dicts of plain values. Versions are added.

    Raises:
      UserError: on every process, naming the first process that differs from process 0 and in what, or the host with
        idle accelerators.
    """
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        counts = ", ".join(
            f"process {process} has {count}" for process, count in sorted(devices.items())
        )
        raise UserError(f"all processes need equally many devices: {counts}")
    facts = flatten_dict({**facts, "version": versions()}, sep=".")
    mine = dict(
        host=socket.gethostname(),
        used=jax.local_device_count(),
        visible=visible_accelerators(),
        facts=facts,
    )
    all_of_them = gather_json(json.loads(json.dumps(mine)))
    _check_used(all_of_them)
    first = all_of_them[0]["facts"]
    for process, other in enumerate(all_of_them):
        keys = sorted(first.keys() | other["facts"].keys())
        pairs = [(key, other["facts"].get(key, "absent"), first.get(key, "absent")) for key in keys]
        same = lambda a, b: json.dumps(a) == json.dumps(b)  # as text: nan does not equal itself
        if differing := [
            f"{key} is {theirs}, not {ours}"
            for key, theirs, ours in pairs
            if not same(theirs, ours)
        ]:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"process {process} (host {other['host']}) differs from process 0 (host {all_of_them[0]['host']}): "
                f"{'; '.join(differing[:3])}{more}. Start all of them with the same command, code and data"
            )


def _check_used(processes):
    """Raise a UserError for a host whose processes use fewer accelerators than one of them sees."""
    used, visible = collections.Counter(), collections.Counter()
    for process in processes:
        used[process["host"]] += process["used"]
        visible[process["host"]] = max(visible[process["host"]], process["visible"])
    for host, count in visible.items():
        if used[host] < count:
            raise UserError(
                f"host {host} has {count} accelerators, of which this run uses {used[host]}: start one process for "
                "each (Slurm: --ntasks-per-node), or hide the others (CUDA_VISIBLE_DEVICES)"
            )


def visible_accelerators(dev="/dev"):
    """How many accelerators this process could use; 0 where jax was told to use the CPU (JAX_PLATFORMS=cpu)."""
    if _told_to_use_the_cpu():
        return 0
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len(
            [
                one
                for one in os.environ["CUDA_VISIBLE_DEVICES"].split(",")
                if one.strip() not in ("", "-1")
            ]
        )
    chips = "accel[0-9]*", "vfio/[0-9]*"  # TPUs
    patterns = ["nvidia[0-9]*", *(chips if importlib.util.find_spec("libtpu") else ())]
    return sum(len([*pathlib.Path(dev).glob(pattern)]) for pattern in patterns)


def _told_to_use_the_cpu():
    return (jax.config.jax_platforms or "").split(",")[0] == "cpu"


def versions():
    """What computes: a checksum of this package's code, and the versions of what it is built on."""
    code, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"code": code.hexdigest()[:16], "python": platform.python_version(), **libraries}


def gather_json(value):
    """A JSON value of every process, in order; to be called by all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(text, (0, max(lengths) - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def barrier(place, failure, timeout):
    """Wait in the background until all processes have come to `place`, a name used once.

    Raises:
      OSError: one of them has called `abort(failure, ...)` instead. TimeoutError: `timeout` seconds have passed.
    """
    store, count = global_state.client, jax.process_count()
    if count == 1:
        return
    store.key_value_set(f"{place}/{jax.process_index()}", "here")
    began = time.monotonic()
    while len(store.key_value_dir_get(f"{place}/")) < count:
        if given_up := store.key_value_dir_get(f"{failure}/"):
            raise OSError(
                "; ".join(f"process {key.rpartition('/')[2]}: {why}" for key, why in given_up)
            )
        if time.monotonic() - began > timeout:
            raise TimeoutError(f"not all processes have come to {place} in {timeout:.0f} s")
        time.sleep(0.02 if time.monotonic() - began < 1 else 0.2)


def abort(failure, why):
    """Tell the processes in `barrier` that this one will not come."""
    if jax.process_count() > 1:
        name = f"{failure}/{jax.process_index()}"
        global_state.client.key_value_set(
            name, f"{socket.gethostname()}: {why}", allow_overwrite=True
        )
