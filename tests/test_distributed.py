"""Clusters are detected from (mock) environments, and processes that differ are named."""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster, k8s_cluster, ompi_cluster, slurm_cluster

from lmim_jax.distributed import multihost
from lmim_jax.train import workdir
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
NOT_IN_SRUN = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "pod-0.set,pod-1.set", "TPU_WORKER_ID": "1"}
ONE_SLICE = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
TPU_PROCESSES = {
    "TPU_PROCESS_ADDRESSES": "localhost:8476,localhost:8477",
    "TPU_VISIBLE_CHIPS": "2,3",
    "CLOUD_TPU_TASK_ID": "1",
}
TPU_PROCESS = {
    "coordinator_address": "localhost:8482",
    "num_processes": 2,
    "process_id": 1,
    "cluster_detection_method": "deactivate",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environment", "packages", "chips", "expected"),
    [
        ({}, (), 0, None),
        (SLURM, (), 0, ("Slurm", {"cluster_detection_method": "slurm"})),
        (SLURM | {"SLURM_NTASKS": "1"}, (), 0, None),
        (NOT_IN_SRUN, (), 0, None),
        (OMPI | ORTE, (), 0, ("Open MPI", {"cluster_detection_method": "ompi"})),
        (OMPI, ("mpi4py",), 0, ("Open MPI", {"cluster_detection_method": "mpi4py"})),
        (SLURM | OMPI | ORTE, (), 0, ("Open MPI", {"cluster_detection_method": "ompi"})),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, (), 0, None),
        (GKE_TPU, (), 0, ("Cloud TPU", {})),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, (), 0, None),
        (
            {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
            (),
            0,
            ("Cloud TPU", {}),
        ),
        ({}, ("libtpu",), 4, ("Cloud TPU", {})),  # a virtual machine: jax asks the metadata server
        ({}, (), 4, None),  # devices handed through to something else
        ({"TPU_SKIP_MDS_QUERY": "1"}, ("libtpu",), 4, None),
        ({"TPU_VISIBLE_CHIPS": "0"}, ("libtpu",), 4, None),  # another run may use the other chips
        (TPU_PROCESSES, ("libtpu",), 4, ("Cloud TPU", TPU_PROCESS)),
        (TPU_PROCESSES | {"MEGASCALE_NUM_SLICES": "2"}, ("libtpu",), 4, ("Cloud TPU", {})),
        (POD, ("kubernetes",), 0, ("Kubernetes", {})),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("kubernetes",), 0, None),  # a single pod
    ],
)
def test_clusters_are_detected(environment, packages, chips, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages or None)
    (tmp_path / "vfio").mkdir()
    for i in range(chips):
        (tmp_path / "vfio" / str(i)).touch()
    assert multihost.detect(environment, tmp_path) == expected


@pytest.mark.parametrize(("environment", "package"), [(OMPI, "mpi4py"), (POD, "jax.k8s.")])
def test_a_missing_package_for_detection_is_named(environment, package, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install '?{package}.*--coordinator"):
        multihost.detect(environment, tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        (SLURM | {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, 5),
        (OMPI | ORTE, 3),
        (TPU_PROCESSES, 1),
        (GKE_TPU, 1),
        (GKE_TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, 3),
        (POD, 2),
    ],
)
def test_a_process_knows_its_number_before_it_meets_the_others(environment, expected, monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM", "OMPI", "TPU", "MEGASCALE", "KUBERNETES", "JOB_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Not the metadata server
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", environment.get)
    for kind in (k8s_cluster.K8sCluster, cloud_tpu_cluster.GkeTpuCluster):
        monkeypatch.setattr(kind, "is_env_present", lambda kind=kind: _is_for(kind, environment))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kubernetes" or None)
    assert multihost.process_number() == expected
    assert multihost.process_number("host:1", 7) == 7  # of processes.sh


def _is_for(kind, environment):
    name = {"K8sCluster": "KUBERNETES_SERVICE_HOST", "GkeTpuCluster": "TPU_WORKER_HOSTNAMES"}
    return name[kind.__name__] in environment


def test_processes_that_share_tpu_chips_need_numbers(tmp_path):
    with pytest.raises(UserError, match="set CLOUD_TPU_TASK_ID"):
        multihost.detect({"TPU_PROCESS_ADDRESSES": "localhost:8476,localhost:8477"}, tmp_path)


def slurm(node_tasks, node=0, local=0, gpus=None, **others):
    """The environment of a task of srun; gpus: of its node."""
    place = {"SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
    if gpus is not None:
        place["SLURM_GPUS_ON_NODE"] = str(gpus)
    return SLURM | place | {"SLURM_STEP_TASKS_PER_NODE": node_tasks} | others


def open_mpi(processes, local):
    """The environment of a process of mpirun."""
    sizes = {"OMPI_COMM_WORLD_LOCAL_SIZE": str(processes)}
    return OMPI | ORTE | sizes | {"OMPI_COMM_WORLD_LOCAL_RANK": str(local)}


@pytest.mark.parametrize(
    ("environment", "visible", "expected"),
    [
        # --ntasks-per-node=8 --gpus-per-node=8: every task sees all GPUs
        (slurm("8(x2)", node=1, local=3, gpus=8), "0,1,2,3,4,5,6,7", [3]),
        (slurm("8(x2)", node=1, local=3), None, [3]),  # no variable: eight files
        # --gpus-per-task=1, or --gpu-bind=single:1: every task sees its own
        (slurm("8(x2)", node=1, local=3, gpus=8), "3", [0]),
        (slurm("4", local=3), "3", [0]),
        # --gpus-per-task=2, and with --gpu-bind=none
        (slurm("2(x2)", local=1, gpus=4), "2,3", [0, 1]),
        (slurm("2(x2)", local=1, gpus=4), "0,1,2,3", [2, 3]),
        (slurm("2(x2)", local=1, gpus=4), None, [2, 3]),
        # --ntasks-per-node=1 --gpus-per-node=8: one task with all GPUs of its node
        (slurm("1(x2)", node=1, gpus=8), "0,1,2,3,4,5,6,7", [0, 1, 2, 3, 4, 5, 6, 7]),
        (slurm("2,1", node=1), "4,6", [0, 1]),
        # --ntasks-per-node=2 --gpus-per-node=8: half of them
        (slurm("2(x2)", local=1), "0,1,2,3,4,5,6,7", [4, 5, 6, 7]),
        (slurm("2"), "", None),  # no GPU
        (slurm("2", local=1, JAX_LOCAL_DEVICE_IDS="0"), "0,1", None),  # jax reads it
        (open_mpi(2, 1), "0,1", [1]),
        (open_mpi(2, 1), "1", [0]),
        (open_mpi(1, 0), "0,1", [0, 1]),
        (SLURM | open_mpi(2, 0), "0,1", [0]),
        ({}, "0,1", None),
        (NOT_IN_SRUN | {"SLURM_STEP_TASKS_PER_NODE": ""}, "0,1", None),
    ],
)
def test_every_process_gets_its_gpus(environment, visible, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(multihost, "_is_configured_for_cpu", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for number in range(8):
        (tmp_path / f"nvidia{number}").touch()
    count = multihost.visible_accelerators(tmp_path)
    assert multihost.local_device_ids(environment, count) == expected


@pytest.mark.parametrize(
    ("environment", "visible"),
    [(slurm("4", local=1), 2), (slurm("2", local=1, gpus=1), 1), (slurm("8", gpus=8), 4)],
)
def test_more_processes_than_gpus_are_refused(environment, visible):
    with pytest.raises(UserError, match=rf"processes of host .* share {visible} GPU"):
        multihost.local_device_ids(environment, visible)


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, [], "0"),  # jax by itself: 1, which is not there
        (slurm("1(x2)", node=1) | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, [], "0,1,2"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [], "1"),
        (OMPI | ORTE | {"CUDA_VISIBLE_DEVICES": "4,5"}, [], "1"),
        # Flags: all visible GPUs, or the given ones
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["host:1", 2, 1, 30], "all"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["host:1", 2, 1, 30, [1]], "1"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, ["host:1", 2, 1, 30], "0"),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, [], "5"),
    ],
)
def test_jax_is_told_the_gpus_of_the_process(environment, flags, expected):
    """In a process without GPUs, up to where jax would connect to the others."""
    program = f"""
from jax._src import xla_bridge
from jax._src.lib import _jax
from lmim_jax.distributed import multihost

class Connected(Exception):
    pass

def connect(*_, **__):
    raise Connected

_jax.get_distributed_runtime_service = _jax.get_distributed_runtime_client = connect
try:
    multihost.initialize(*{flags!r})
except Connected:
    print("visible:", xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
    inherited = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert f"visible: {expected}\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("cluster", "environment", "address", "count", "index", "local"),
    [
        (slurm_cluster.SlurmCluster, SLURM, "gpu07:62055", 16, 9, 1),
        (ompi_cluster.OmpiCluster, OMPI | ORTE, "10.96.0.1:", 4, 3, 1),
        (cloud_tpu_cluster.GkeTpuCluster, GKE_TPU | ONE_SLICE, "", 2, 1, 0),
    ],
)
def test_jax_reads_the_same_variables(
    cluster, environment, address, count, index, local, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (cluster.get_process_count(), cluster.get_process_id()) == (count, index)
    if address:
        assert cluster.get_coordinator_address(1, None).startswith(address)
        assert cluster.get_local_process_id() == local  # one GPU per process


def test_it_joins_given_or_detected_processes_with_a_heartbeat_and_otherwise_none(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: calls.append(how))
    monkeypatch.setattr(multihost, "detect", lambda environment: None)
    multihost.initialize()
    assert not calls
    timeouts = {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7}
    timeouts["initialization_timeout"] = int(multihost.START_TIMEOUT) + 60
    multihost.initialize("host:1", 4, 3, heartbeat=7)
    monkeypatch.setattr(
        multihost, "detect", lambda environment: ("Slurm", {"cluster_detection_method": "slurm"})
    )
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    multihost.initialize(heartbeat=7)
    where = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    where["cluster_detection_method"] = "deactivate"  # the flags say everything
    assert calls == [where | timeouts, {"cluster_detection_method": "slurm"} | timeouts]
    with pytest.raises(UserError, match="needs --num_processes and --process_id, not 2 and 2"):
        multihost.initialize("host:1", 2, 2)


def process(host="a", used=1, visible=1, **facts):
    return dict(host=host, used=used, visible=visible, facts=facts)


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ([process(x=1), process(x=1)], None),
        ([process("a", 8, 8), process("b", 8, 8)], None),
        ([process("a", 1, 2), process("a", 1, 2)], None),  # each uses its own of two
        (
            [process("a", 1, 8), process("b", 1, 8)],
            r"host a has 8 accelerators, of which this run uses 1: .*ntasks",
        ),
        ([process("a", 8, 8), process("b", 1, 8)], r"host b has 8"),
        ([process("a", 0, 1)], r"host a has 1 accelerators that jax does not see: install"),
        ([process("a", 0, 0)], None),
        (
            [process(x=1, y=2), process("b", x=2)],
            r"process 1 \(host b\) .* 0 \(host a\): x is 2, not 1; y is abs",
        ),
    ],
)
def test_differing_processes_are_named(processes, message, monkeypatch):
    monkeypatch.setattr(multihost, "gather_json", lambda mine: processes)
    if message is None:
        multihost.check_consistent(x=1)
    else:
        with pytest.raises(UserError, match=message):
            multihost.check_consistent(x=1)


def test_processes_with_unequal_numbers_of_devices_are_named(monkeypatch):
    devices = [types.SimpleNamespace(process_index=i) for i in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert collections.Counter(device.process_index for device in jax.devices()) == {0: 2, 1: 1}
    with pytest.raises(UserError, match="equally many devices: process 0 has 2, process 1 has 1"):
        multihost.check_consistent()


def test_config_code_and_data_are_what_is_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(multihost, "gather_json", lambda mine: seen.append(mine) or [mine])
    multihost.check_consistent(config={"mesh": {"rules": ((".*", "largest"),)}}, data={"images": 3})
    facts = seen[0]["facts"]
    assert facts["config.mesh.rules"] == [[".*", "largest"]]
    assert facts["data.images"] == 3
    assert {"version.code", "version.jax", "version.python"} <= facts.keys()


@pytest.mark.parametrize(
    ("variable", "count"),
    [({"TPU_VISIBLE_CHIPS": "0,1"}, 2), ({"TPU_VISIBLE_DEVICES": "3"}, 1), ({}, 4)],
)
def test_chips_of_a_tpu_host_are_counted(variable, count, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(multihost, "_is_configured_for_cpu", lambda: False)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    for number in range(4):
        (tmp_path / f"accel{number}").touch()
    assert multihost.visible_accelerators(tmp_path) == count


@pytest.mark.parametrize(
    ("cuda", "files", "count"),
    [
        (None, (), 0),
        (None, ("nvidia0", "nvidia1", "nvidiactl"), 2),
        ("0,3", ("nvidia0", "nvidia1"), 2),
        ("", ("nvidia0",), 0),
        ("-1", ("nvidia0",), 0),
        (None, ("accel0", "accel1", "vfio/vfio"), 2),
    ],
)
def test_accelerators_are_counted(cuda, files, count, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(multihost, "_is_configured_for_cpu", lambda: False)
    if cuda is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cuda)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert multihost.visible_accelerators(tmp_path) == count


def test_a_folder_that_is_not_shared_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(workdir, "VISIBILITY_TIMEOUT", 0)
    monkeypatch.setattr(multihost, "gather_json", lambda mine: [["a", True], ["b", False]])
    with pytest.raises(
        UserError, match=r"is not the same folder on all hosts: process 1 \(host b\)"
    ):
        workdir.claim(tmp_path, {}, {})
