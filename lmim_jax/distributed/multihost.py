"""Several processes as one run: cluster detection, start-up, consistency checks, messages.

Which GPUs a process uses is decided here and given to jax, which by itself takes the GPU with the
number of the process on its host, even where only one GPU is visible.
"""

import collections
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax._src.clusters import ClusterEnv  # whose numbers jax.distributed.initialize gives
from jax._src.distributed import global_state  # its key-value store has no public interface
from jax.experimental import multihost_utils

from lmim_jax.utils.errors import UserError, exit_now

COORDINATOR_PORT = 8482  # as jax chooses it on Cloud TPUs
START_TIMEOUT = 300.0  # seconds in which all processes must have started
DECISION_TIMEOUT = 3600  # seconds; process 0 may have to verify a large checkpoint
_decision_numbers = itertools.count()
_exchange_numbers = itertools.count()
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")


def detect(
    environment: Mapping[str, str], dev: str | os.PathLike[str] = "/dev"
) -> tuple[str, dict[str, Any]] | None:
    """Detect the cluster in which this process was started as one of several.

    Args:
      environment: such as os.environ.
      dev: the folder of device files.

    Returns:
      (name of the cluster, keyword arguments of `jax.distributed.initialize`); None: there is only
      this process.

    Raises:
      UserError: the environment does not say enough, and a package is missing that would help.
    """
    if "," in environment.get("TPU_PROCESS_ADDRESSES", ""):
        return "Cloud TPU", _tpu_processes(environment)
    if _is_cloud_tpu(environment, pathlib.Path(dev)):
        return "Cloud TPU", {}
    # Before Slurm, by which mpirun may start its daemons.
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI", {"cluster_detection_method": _open_mpi_method(environment)}
    # SLURM_STEP_NODELIST is set inside srun, and not in the batch script.
    if "SLURM_STEP_NODELIST" in environment and _number(environment, "SLURM_NTASKS") > 1:
        return "Slurm", {"cluster_detection_method": "slurm"}
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if not importlib.util.find_spec("kubernetes"):
            raise UserError(
                "this is an indexed Kubernetes job: pip install 'jax[k8s]', or give --coordinator"
            )
        return "Kubernetes", {}  # jax has no name for it
    return None


def process_number(coordinator: str = "", process_id: int = -1) -> int:
    """The number of this process, as jax will give it, before the processes have found each other.

    Args:
      coordinator: "host:port" of process 0; "": the environment says who there is.
      process_id: which process this is; only with `coordinator`.

    Raises:
      UserError: see `detect`.
    """
    if coordinator:
        return process_id
    detected = detect(os.environ)
    if detected is None:
        return 0
    _, cluster = detected
    if "process_id" in cluster:
        return cluster["process_id"]
    method = cluster.get("cluster_detection_method")
    for kind in ClusterEnv._cluster_types:
        if method is not None:
            chosen = kind.name == method
        else:
            chosen = not kind.opt_in_only_method and kind.is_env_present()
        if chosen:
            return kind.get_process_id()
    return 0


def _number(environment: Mapping[str, str], name: str) -> int:
    """An integer variable; 1 where it is missing or empty."""
    return int(environment.get(name) or 1)


def _tpu_processes(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` where TPU_PROCESS_ADDRESSES lists the processes.

    It does so where processes share the chips of a host. libtpu is told the number of this one as
    CLOUD_TPU_TASK_ID; jax reads only TPU_WORKER_ID.
    """
    number = environment.get("CLOUD_TPU_TASK_ID") or environment.get("TPU_WORKER_ID")
    if number is None:
        raise UserError("TPU_PROCESS_ADDRESSES lists several processes: set CLOUD_TPU_TASK_ID, too")
    if _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return {}
    addresses = environment["TPU_PROCESS_ADDRESSES"].split(",")
    host = addresses[0].split(":")[0]
    return {
        "coordinator_address": f"{host}:{COORDINATOR_PORT}",
        "num_processes": len(addresses),
        "process_id": int(number),
        "cluster_detection_method": "deactivate",
    }


def _tpu_chips(environment: Mapping[str, str]) -> str | None:
    """The TPU chips of its host that this process may use, such as "0,1"; None: all of them."""
    return environment.get("TPU_VISIBLE_CHIPS") or environment.get("TPU_VISIBLE_DEVICES")


def _is_cloud_tpu(environment: Mapping[str, str], dev: pathlib.Path) -> bool:
    # Kubernetes describes TPU slices in variables.
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    if _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return True
    # Some chips of a host, and no address of another process: other runs use the other chips.
    if _tpu_chips(environment) is not None:
        return False
    # On virtual machines, jax asks Google's metadata server, for one host or many.
    if "TPU_SKIP_MDS_QUERY" in environment or not importlib.util.find_spec("libtpu"):
        return False
    return any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))


def _open_mpi_method(environment: Mapping[str, str]) -> str:
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return "ompi"
    # From version 5 on, mpirun does not say where process 0 is.
    if importlib.util.find_spec("mpi4py"):
        return "mpi4py"
    raise UserError(
        "Open MPI does not say where process 0 is: pip install mpi4py, or give --coordinator"
    )


def local_device_ids(environment: Mapping[str, str], visible: int) -> list[int] | None:
    """Choose the GPUs of this process: all visible ones, or its share of those of its host.

    Slurm and Open MPI say how many processes the host has, and Slurm how many GPUs. A process that
    sees only GPUs of its own (Slurm: --gpus-per-task) uses all of them. jax numbers visible GPUs
    from 0.

    Args:
      environment: such as os.environ.
      visible: the number of visible GPUs. Without CUDA_VISIBLE_DEVICES, it may include GPUs of the
        host that are not allotted to the job.

    Returns:
      Numbers of visible GPUs; None: jax decides, by JAX_LOCAL_DEVICE_IDS or taking all.

    Raises:
      UserError: there are more processes than GPUs.
    """
    position = _position_on_host(environment)
    if not visible or position is None or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    index, processes = position
    on_host = int(environment.get("SLURM_GPUS_ON_NODE") or max(visible, processes))
    visible = min(visible, on_host)
    if processes == 1 or visible * processes == on_host:
        return list(range(visible))
    share = visible // processes
    if not share:
        raise UserError(
            f"{processes} processes of host {socket.gethostname()} share {visible} GPU(s): "
            "start one process for each GPU (Slurm: --ntasks-per-node equal to --gpus-per-node), "
            "or one for the host"
        )
    return list(range(index * share, (index + 1) * share))


def _position_on_host(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(number of this process on its host, number of processes there); None: not known."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        rank = int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
        return rank, int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    # Such as "4(x2),3": by node of the step
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if not tasks:
        return None
    counts = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeats or 1)
    return int(environment["SLURM_LOCALID"]), counts[int(environment["SLURM_NODEID"])]


def initialize(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    heartbeat: int = 30,
    device_ids: Sequence[int] = (),
) -> None:
    """Join the other processes of this run, if there are any. Call it before any other use of jax.

    Args:
      coordinator: "host:port" of process 0; "": detect the processes from the environment.
      num_processes: how many there are; only with `coordinator`.
      process_id: which one this is; only with `coordinator`.
      heartbeat: seconds without a sign of life after which a process counts as lost and the run
        ends.
      device_ids: the visible GPUs that this process uses, counted from 0; (): chosen as by
        `local_device_ids`.

    Raises:
      UserError: a coordinator without the other two, or see `detect` and `local_device_ids`.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise UserError(
                "--coordinator needs --num_processes and --process_id, not "
                f"{num_processes} and {process_id}"
            )
        cluster: dict[str, Any] = dict(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    else:
        detected = detect(os.environ)
        if detected is None:
            return
        _, cluster = detected
    chosen = list(device_ids) or local_device_ids(os.environ, visible_gpus())
    if chosen is not None:
        cluster["local_device_ids"] = chosen
    # The collectives of CPUs; other devices ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    waiting = _describe_wait(cluster, os.environ)
    print(f"{waiting} (at most {START_TIMEOUT:.0f} s)", file=sys.stderr, flush=True)

    def give_up() -> None:
        print(f"error: {waiting}: given up", file=sys.stderr, flush=True)
        exit_now(1)

    # Before jax's own limit, at which the process is aborted with a trace of C++ functions
    limit = threading.Timer(START_TIMEOUT, give_up)
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=int(START_TIMEOUT) + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
            **cluster,
        )
    finally:
        limit.cancel()


def _describe_wait(cluster: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """For whom this process waits as it starts, and how it would run alone."""
    method = cluster.get("cluster_detection_method")
    if method == "slurm":
        number = int(environment["SLURM_PROCID"])
        count = int(environment["SLURM_NTASKS"])
        alone = "; to run alone: SLURM_NTASKS=1 before the command, or srun --ntasks=1"
        return f"task {number} of {count}, waiting for {count - 1} more{alone}"
    if "num_processes" in cluster:
        count = cluster["num_processes"]
        return f"process {cluster['process_id']} of {count}, waiting for {count - 1} more"
    if "OMPI_COMM_WORLD_SIZE" in environment:
        count = int(environment["OMPI_COMM_WORLD_SIZE"])
        number = int(environment["OMPI_COMM_WORLD_RANK"])
        return f"process {number} of {count}, waiting for {count - 1} more"
    return "waiting for the other processes"


def check_consistent(**facts: Any) -> None:
    """Check that all processes were started alike and use all accelerators. All must call it.

    Args:
      **facts: what must be equal, such as config and data: nested dicts of plain values. The
        versions of code and libraries are added.

    Raises:
      UserError: on every process; it names the first process that differs from process 0 and in
        what, or the host with idle accelerators.
    """
    _check_device_counts()
    flat = flatten_dict({**facts, "version": versions()}, sep=".")
    own = dict(
        host=socket.gethostname(),
        used=sum(device.platform != "cpu" for device in jax.local_devices()),
        visible=visible_accelerators(),
        facts=json.loads(json.dumps(flat)),
    )
    processes = gather_json(own)
    _check_used(processes)
    first = processes[0]
    for index, process in enumerate(processes):
        differences = _differences(process["facts"], first["facts"])
        if differences:
            listed = "; ".join(differences[:3])
            if len(differences) > 3:
                listed += f" and {len(differences) - 3} more"
            raise UserError(
                f"process {index} (host {process['host']}) differs from process 0 "
                f"(host {first['host']}): {listed}. Start all of them with the same command, code "
                "and data"
            )


def _check_device_counts() -> None:
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ", ".join(
            f"process {index} has {count}" for index, count in sorted(counts.items())
        )
        raise UserError(f"all processes need equally many devices: {listed}")


def _check_used(processes: Sequence[Mapping[str, Any]]) -> None:
    """Raise a UserError for a host whose processes use fewer accelerators than one of them sees."""
    used: collections.Counter[str] = collections.Counter()
    visible: collections.Counter[str] = collections.Counter()
    for process in processes:
        host = process["host"]
        used[host] += process["used"]
        visible[host] = max(visible[host], process["visible"])
    for host, count in visible.items():
        if count and not used[host]:
            raise UserError(
                f"host {host} has {count} accelerators that jax does not see: install it for them "
                "(docs/install.md), or set JAX_PLATFORMS=cpu to train on CPU cores"
            )
        if used[host] < count:
            raise UserError(
                f"host {host} has {count} accelerators, of which this run uses {used[host]}: start "
                "one process for the host (Slurm: --ntasks-per-node=1) or one for each "
                "accelerator, or hide the others (CUDA_VISIBLE_DEVICES)"
            )


def _differences(facts: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describe every fact that is not as expected."""
    described = []
    for key in sorted(facts.keys() | expected.keys()):
        value = facts.get(key, "absent")
        wanted = expected.get(key, "absent")
        if json.dumps(value) != json.dumps(wanted):  # as text, because NaN does not equal itself
            described.append(f"{key} is {value}, not {wanted}")
    return described


def visible_accelerators(dev: str | os.PathLike[str] = "/dev") -> int:
    """Count the accelerators that this process could use; 0 where jax is configured for the CPU.

    Args:
      dev: the folder of device files.
    """
    return visible_gpus(dev) + visible_tpu_chips(dev)


def visible_tpu_chips(dev: str | os.PathLike[str] = "/dev") -> int:
    """Count the TPU chips that this process could use; 0 where jax is configured for others.

    Args:
      dev: the folder of device files.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ or _is_configured_for_cpu():
        return 0
    if not importlib.util.find_spec("libtpu"):
        return 0
    chips = _tpu_chips(os.environ)
    if chips is not None:
        return len(chips.split(","))
    return _count_files(dev, "accel[0-9]*") + _count_files(dev, "vfio/[0-9]*")


def visible_gpus(dev: str | os.PathLike[str] = "/dev") -> int:
    """Count NVIDIA's GPUs that this process could use; 0 where jax is configured for the CPU.

    Args:
      dev: the folder of device files.
    """
    if _is_configured_for_cpu():
        return 0
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return sum(device.strip() not in ("", "-1") for device in devices)
    return _count_files(dev, "nvidia[0-9]*")


def _count_files(folder: str | os.PathLike[str], pattern: str) -> int:
    return len(list(pathlib.Path(folder).glob(pattern)))


def _is_configured_for_cpu() -> bool:
    return (jax.config.jax_platforms or "").split(",")[0] == "cpu"


def versions() -> dict[str, str]:
    """A checksum of this package's code, and the versions of Python and the main libraries."""
    root = pathlib.Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    found = {"code": code.hexdigest()[:16], "python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = importlib.metadata.version(name)
    return found


def gather_json(value: Any) -> list[Any]:
    """Gather a JSON value of every process, in the order of processes. All must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    padded = np.pad(text, (0, max(lengths) - len(text)))
    rows = multihost_utils.process_allgather(padded)
    values = []
    for row, length in zip(rows, lengths, strict=True):
        values.append(json.loads(row[:length].tobytes()))
    return values


def decide(find: Callable[[], Any]) -> Any:
    """Let process 0 find a JSON value, and return it on all processes.

    What decides whether a collective operation follows must be decided once: two processes may see
    a shared folder differently. All must call it, in the same order.

    Args:
      find: called on process 0 only.

    Raises:
      UserError: the one that `find` raised, on all processes.
    """
    if jax.process_count() == 1:
        return find()
    store = global_state.client
    key = f"decision/{next(_decision_numbers)}"
    if jax.process_index() != 0:
        decided = json.loads(store.blocking_key_value_get(key, DECISION_TIMEOUT * 1000))
        if "mistake" in decided:
            raise UserError(decided["mistake"])
        return decided["value"]
    try:
        value = find()
    except UserError as error:
        store.key_value_set(key, json.dumps({"mistake": str(error)}))
        raise
    store.key_value_set(key, json.dumps({"value": value}))
    return value


def exchange(value: str, timeout: float) -> list[str]:
    """The values of all processes, in their order; works while devices do not. All must call it.

    Args:
      value: of this process.
      timeout: seconds to wait for the others.

    Raises:
      JaxRuntimeError: not all processes gave a value in time.
    """
    if jax.process_count() == 1:
        return [value]
    store = global_state.client
    place = f"exchange/{next(_exchange_numbers)}"
    store.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))
    values = []
    for index in range(jax.process_count()):
        found = store.blocking_key_value_get(f"{place}/{index}", int(timeout * 1000))
        values.append(json.loads(found))
    return values


def barrier(name: str, abort_key: str, timeout: float) -> None:
    """Wait, in a background thread, until all processes have reached the barrier.

    Args:
      name: of the barrier; each is used once.
      abort_key: the key under which a process may `abort` instead.
      timeout: seconds to wait.

    Raises:
      OSError: a process has aborted; the message gives its reason.
      TimeoutError: not all processes arrived in time.
    """
    store = global_state.client
    count = jax.process_count()
    if count == 1:
        return
    store.key_value_set(f"{name}/{jax.process_index()}", "here")
    start = time.monotonic()
    while len(store.key_value_dir_get(f"{name}/")) < count:
        aborted = store.key_value_dir_get(f"{abort_key}/")
        if aborted:
            reasons = [f"process {key.rpartition('/')[2]}: {reason}" for key, reason in aborted]
            raise OSError("; ".join(reasons))
        waited = time.monotonic() - start
        if waited > timeout:
            raise TimeoutError(f"not all processes reached {name} within {timeout:.0f} s")
        time.sleep(0.02 if waited < 1 else 0.2)


def abort(abort_key: str, reason: Any) -> None:
    """Make every `barrier` with this key fail: this process will not reach it.

    Args:
      abort_key: as in `barrier`.
      reason: for the message of the others' error.
    """
    if jax.process_count() == 1:
        return
    global_state.client.key_value_set(
        f"{abort_key}/{jax.process_index()}",
        f"{socket.gethostname()}: {reason}",
        allow_overwrite=True,
    )
