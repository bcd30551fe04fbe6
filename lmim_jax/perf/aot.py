"""The train step of a recipe ahead of time: traced, or compiled for devices that do not exist.

All of it works on shapes and dtypes: no data is read, no devices are needed.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lmim_jax.data.prefetch import PREFETCH_BATCHES
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import classifiers
from lmim_jax.models.layer_stack import with_remat_and_scan
from lmim_jax.perf import accelerators, flops, gpu_targets, hlo, traffic
from lmim_jax.train.build import TrainingParts, build
from lmim_jax.utils import atomic_io, xla_flags
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.platform import tracing_for
from lmim_jax.utils.subprocess import exit_with_parent

INSTALL_GPU = (
    "jax's CUDA plugin compiles for NVIDIA GPUs, and needs none for that: pip install '.[plan-gpu]'"
)
GPU_ENVIRONMENT = {
    # The plugin compiles only; there is no driver and no library of NVIDIA
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    # A program without a device cannot be stored
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # Errors only
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Of LLVM, which turns kernels into machine code: the program stays the same
QUICK_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
INSTALL = "planning for TPUs needs their compiler, which runs without a TPU: pip install libtpu"
LIBTPU_ENVIRONMENT = {
    # Several processes may use the library
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # There is no TPU host and no metadata server to query: describe one
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_HOST_BOUNDS": "1,1,1",
    # Errors only
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_SIZE = r"([\d.]+)([MG])"
OUT_OF_MEMORY_MESSAGES = (  # of libtpu: needed and available size
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)
# Batches on the devices besides that of the step: in the queue, and one that waits for room in it
BATCHES_AHEAD = PREFETCH_BATCHES + 1
UNITS = {"M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class StepAnalysis:
    """What one train step needs per device.

    Attributes:
      mesh: {axis: number of devices}.
      memory: bytes: "needed", and, as far as they are known, "arguments", "temporaries", "limit".
      collectives: the messages between devices.
      compiled_flops_per_image: the compiler's count; None where it is not known.
      compile_seconds: None where nothing was compiled.
      program: of a compiled program, see `traffic.summarize`; None where nothing was compiled.
    """

    mesh: dict[str, int]
    memory: dict[str, float]
    collectives: list[hlo.Collective]
    compiled_flops_per_image: float | None = None
    compile_seconds: float | None = None
    program: dict[str, Any] | None = None


def build_for_images(config: ConfigDict, images: int) -> TrainingParts:
    """The parts of a recipe that trains on `images` images."""
    return build(config, steps_per_epoch=max(images // config.batch_size, 1))


def abstract_step(
    parts: TrainingParts, mesh: Mesh | AbstractMesh
) -> tuple[Any, tuple[Any, dict[str, jax.ShapeDtypeStruct]]]:
    """The train step, jitted as for training, and its arguments as shapes with shardings.

    Returns:
      The jitted function, and its arguments (state, batch).
    """
    shardings = parts.state_sharding(mesh)
    state = jax.tree.map(_with_sharding, parts.abstract_state(), shardings)
    batch = {}
    for name, array in parts.abstract_batch(parts.config.batch_size).items():
        batch[name] = _with_sharding(array, sharding.batch_sharding(mesh))
    return parts.jit_train_step(mesh, shardings), (state, batch)


def _with_sharding(array: Any, placement: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement)


def _abstract_loss(parts: TrainingParts, images: int) -> tuple[Callable[..., Any], Any, tuple]:
    """The loss of a number of images, with the recipe's remat and scan over layers.

    Returns:
      The function (params, *others) -> loss, the abstract params, and the abstract others.
    """
    method = parts.method
    state = parts.abstract_state()
    views = jax.eval_shape(method.sample, jax.random.key(0), flops.abstract_keys(images))
    shape = (images,) + tuple(method.image_size) + (method.channels,)
    pixels = jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(params, target, pixels, views, step):
        return method.loss_fn(params, target, pixels, views, step)[0]

    run = with_remat_and_scan(loss, parts.config.remat, parts.config.scan_layers)
    return run, state.params, (state.target, pixels, views, state.step)


def flops_per_image(parts: TrainingParts) -> dict[str, float]:
    """FLOPs of a train step per image.

    Returns:
      {"method": model FLOPs, "executed": with recomputation, "augmentation"}.
    """
    loss, params, others = _abstract_loss(parts, 1)
    executed = flops.count_by_module(jax.value_and_grad(loss), params, *others)
    augmentation = flops.count_by_module(
        parts.augmentation, flops.abstract_keys(1), parts.abstract_batch(1)
    )
    return {
        "method": flops.count_method(parts.method).total,
        "executed": flops.FlopCount(executed).total,
        "augmentation": flops.FlopCount(augmentation).total,
    }


def activation_bytes(parts: TrainingParts) -> tuple[int, int]:
    """What is kept for the backward pass, without the weights.

    Returns:
      (bytes for one image, bytes for each further image).
    """
    one = _saved_bytes(parts, 1)
    two = _saved_bytes(parts, 2)
    return one, two - one


def _saved_bytes(parts: TrainingParts, images: int) -> int:
    """Bytes of the residuals of the loss of a number of images, without the weights."""
    loss, params, others = _abstract_loss(parts, images)

    def backward(params, *others):
        def loss_of_params(params):
            return loss(params, *others)

        return jax.vjp(loss_of_params, params)[1]

    residuals = jax.eval_shape(backward, params, *others)
    weight_shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    total = 0
    for leaf in jax.tree.leaves(residuals):
        if leaf.shape not in weight_shapes:
            total += leaf.size * leaf.dtype.itemsize
    return total


def state_bytes(parts: TrainingParts) -> dict[str, int]:
    """Bytes of the whole state: {"params", "target", "opt_state"}."""
    state = parts.abstract_state()
    return {
        "params": _tree_bytes(state.params),
        "target": _tree_bytes(state.target),
        "opt_state": _tree_bytes(state.opt_state),
    }


def batch_bytes(parts: TrainingParts, images: int) -> int:
    """Bytes of a batch of a number of images, as the loader delivers it."""
    return _tree_bytes(parts.abstract_batch(images))


def collapse_image_bytes(parts: TrainingParts) -> int:
    """Bytes of the normalized images of the collapse metrics, which stay on the devices."""
    height, width = parts.method.feature_size
    pixels = height * width * parts.config.data.channels
    return parts.config.gauge_images * pixels * np.dtype(np.float32).itemsize


def feature_bytes(parts: TrainingParts, images: int) -> int:
    """Bytes of a feature vector of each of so many images, as evaluators keep it on each host."""
    return images * parts.method.width * np.dtype(np.float32).itemsize


def search_bytes(parts: TrainingParts, images: int, devices: int) -> int:
    """Bytes on a device to compare images with a block of the bank of neighbors."""
    rows = -(-min(images, classifiers.BANK_ROWS) // devices)
    vectors = (rows + classifiers.QUERIES) * parts.method.width
    cosines = classifiers.QUERIES * rows
    return (vectors + 2 * cosines) * np.dtype(np.float32).itemsize


def _tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes, without scalars."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def _device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of one device's part of a tree."""
    return _tree_bytes(jax.tree.map(_device_part, tree, shardings))


def _device_part(leaf: Any, placement: Any) -> Any:
    """The shape of one device's part of an array."""
    if not leaf.ndim:
        return leaf
    return jax.ShapeDtypeStruct(placement.shard_shape(leaf.shape), leaf.dtype)


def compile_for_tpu(parts: TrainingParts, topology: str, text_file: str = "") -> StepAnalysis:
    """Compile the train step with libtpu for a topology such as "v5e:4x4" or "2xv5e:4x4".

    Args:
      parts: of the recipe.
      topology: need not exist.
      text_file: where to write the compiled program as text; "": nowhere.

    Returns:
      The analysis; where the memory does not suffice, it has only "needed" and "limit", and no
      collectives.

    Raises:
      UserError: libtpu is missing or does not know the topology, or the batch cannot be split.
    """
    config = parts.config
    devices = _tpu_devices(topology)
    began = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    function, arguments = abstract_step(parts, mesh)
    try:
        compiled, text = _compile(function.lower(*arguments))
    except jax.errors.JaxRuntimeError as error:
        memory = parse_out_of_memory(str(error))
        if memory is None:
            raise
        seconds = time.perf_counter() - began
        return StepAnalysis(dict(mesh.shape), memory, [], compile_seconds=seconds)
    if text_file:
        atomic_io.write(text_file, text)
    return StepAnalysis(
        mesh=dict(mesh.shape),
        memory=_compiled_memory(compiled),
        collectives=hlo.collectives(text),
        compiled_flops_per_image=_compiled_flops(compiled, config, mesh.size),
        compile_seconds=time.perf_counter() - began,
        program=traffic.summarize(text),
    )


def _tpu_devices(topology: str) -> Any:
    """The devices of a topology, as libtpu describes them; none need to exist."""
    from jax.experimental import topologies

    if not importlib.util.find_spec("libtpu"):
        raise UserError(INSTALL)
    os.environ.update(LIBTPU_ENVIRONMENT)
    slices = accelerators.parse_topology(topology).slices
    name = topology.removeprefix(f"{slices}x")
    try:
        return topologies.get_topology_desc(name, "tpu", num_slices=slices).devices
    except Exception as error:
        raise UserError(f"libtpu does not know the topology {topology}: {error}") from error


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and its text.

    The text is written by libtpu: jaxlib cannot read all of its operations.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (written,) = pathlib.Path(folder).glob("*train_step*.after_optimizations.txt")
        return compiled, written.read_text()


def compiles_for_gpu(kind: str) -> bool:
    """Whether the compiler for a kind of GPU, a key of CHIPS, is installed."""
    if kind not in gpu_targets.TARGETS or not importlib.util.find_spec("jax_plugins"):
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


def compile_for_gpu(
    config: ConfigDict, images: int, topology: str, text_file: str = ""
) -> StepAnalysis:
    """Compile the train step for GPUs such as "h100:8", which need not exist.

    It is done in a new process, as the compiler's settings are read when jax starts, with the flags
    of XLA that a run has. Without a device, XLA cannot choose among kernels by their speed.

    Args:
      config: the recipe.
      images: number of training images.
      topology: its kind of GPU is one for which `compiles_for_gpu`.
      text_file: where to write the compiled program as text; "": nowhere.

    Raises:
      UserError: the batch cannot be split over the devices, or the compiler failed.
    """
    parsed = accelerators.parse_topology(topology)
    environment = dict(os.environ)
    try:
        os.environ.update(GPU_ENVIRONMENT)
        xla_flags.set_for_run(
            config.xla_flags, parsed.chip.chips_per_host, tpu=False, several=parsed.hosts > 1
        )
        xla_flags.add("XLA_FLAGS", QUICK_FLAGS)
        if config.deterministic:
            xla_flags.add("XLA_FLAGS", [f"--{xla_flags.DETERMINISTIC}=true"])
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), exit_with_parent
        ) as process:
            job = process.submit(_compile_for_gpu, config, images, topology, text_file)
            return job.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(f"--topology={topology}: XLA's compiler ended without a result") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _compile_for_gpu(
    config: ConfigDict, images: int, topology: str, text_file: str
) -> StepAnalysis:
    """`compile_for_gpu`, in the new process."""
    began = time.perf_counter()
    parts = build_for_images(config, images)
    parsed = accelerators.parse_topology(topology)
    devices = gpu_devices(parsed)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    with tracing_for("gpu"), cudnn_for(parsed.kind):
        function, arguments = abstract_step(parts, mesh)
        lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        if "PTX" in message or "libdevice" in message:
            message = f"NVIDIA's assembler (ptxas) and libdevice are missing. {INSTALL_GPU}"
        raise UserError(f"--topology={topology}: {message}") from error
    text = compiled.as_text()
    if text_file:
        atomic_io.write(text_file, text)
    return StepAnalysis(
        mesh=dict(mesh.shape),
        memory=_compiled_memory(compiled),
        collectives=hlo.collectives(text),
        compile_seconds=time.perf_counter() - began,
        program=traffic.summarize(text),
    )


def gpu_devices(topology: accelerators.Topology) -> Sequence[jax.Device]:
    """Describe the GPUs of a topology, which need not exist, for XLA's compiler.

    The environment must have been that of GPU_ENVIRONMENT when jax started.

    Args:
      topology: of GPUs of a kind in `gpu_targets.TARGETS`.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu_targets.description(topology.kind),
        topology=f"{topology.slices}x1x{topology.chip.chips_per_host}",
    ).devices


@contextlib.contextmanager
def cudnn_for(kind: str) -> Iterator[None]:
    """Answer what jax asks about cuDNN and the GPU for a kind of GPU, not for the devices here.

    Args:
      kind: key of `gpu_targets.TARGETS`.
    """
    capability = gpu_targets.TARGETS[kind].compute_capability

    def parse(version: str) -> tuple[int, ...]:
        return tuple(int(number) for number in version.split("."))

    def cudnn_version() -> int:
        major, minor = gpu_targets.CUDNN_VERSION
        return 10_000 * major + 100 * minor

    def is_at_least(version: str) -> bool:
        return capability >= parse(version)

    def is_equal(version: str) -> bool:
        return capability == parse(version)

    answers = {
        "check_cudnn_version": cudnn_version,
        "check_compute_capability": is_at_least,
        "is_cuda_compute_capability_equal": is_equal,
    }
    real = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused_attention_stablehlo, name, answer)
        yield
    finally:
        for name, function in real.items():
            setattr(fused_attention_stablehlo, name, function)


def _compiled_memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Bytes that a compiled program uses on one device; outputs can take the place of arguments."""
    sizes: Any = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes
    temporaries = sizes.temp_size_in_bytes
    new_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "needed": arguments + temporaries + new_outputs,
    }


def _compiled_flops(
    compiled: jax.stages.Compiled, config: ConfigDict, devices: int
) -> float | None:
    """XLA's count of FLOPs per image; None with loops, of which it counts one iteration."""
    if config.micro_batches > 1 or config.scan_layers:
        return None
    costs: Any = compiled.cost_analysis()
    return costs["flops"] / (config.batch_size // devices)


def parse_out_of_memory(message: str) -> dict[str, float] | None:
    """Read the error message of libtpu that says that the memory does not suffice.

    Returns:
      {"needed": at least, "limit"} in bytes; None for any other message.
    """
    for pattern in OUT_OF_MEMORY_MESSAGES:
        match = re.search(pattern, message)
        if match:
            needed, needed_unit, limit, limit_unit = match.groups()
            return {
                "needed": float(needed) * UNITS[needed_unit],
                "limit": float(limit) * UNITS[limit_unit],
            }
    return None


def analyze(parts: TrainingParts, devices: int) -> StepAnalysis:
    """Estimate from the traced program what the train step needs on a number of devices.

    What a compiler adds or saves is not included.

    Raises:
      UserError: the batch cannot be split over the devices.
    """
    config = parts.config
    sizes = sharding.mesh_sizes(config.mesh.data, config.mesh.fsdp, devices)
    mesh = AbstractMesh(sizes, sharding.AXES)
    sharding.check_batch(config.batch_size, config.micro_batches, devices)
    images = config.batch_size // devices
    state = parts.abstract_state()
    shardings = parts.state_sharding(mesh)
    params_bytes = _tree_bytes(state.params)
    gathered_bytes = 0
    if mesh.shape["fsdp"] > 1:
        gathered_bytes = params_bytes + _tree_bytes(state.target)
    arguments = _device_bytes(state, shardings) + batch_bytes(parts, images)
    temporaries = gathered_bytes + _gradient_and_activation_bytes(parts, images, params_bytes)
    return StepAnalysis(
        mesh=dict(mesh.shape),
        memory={
            "arguments": arguments,
            "temporaries": temporaries,
            "needed": arguments + temporaries,
        },
        collectives=_expected_collectives(
            mesh,
            gathered_bytes=gathered_bytes,
            gradient_bytes=params_bytes,
            device_gradient_bytes=_device_bytes(state.params, shardings.params),
        ),
    )


def _gradient_and_activation_bytes(parts: TrainingParts, images: int, gradient_bytes: int) -> int:
    """Bytes of gradients and activations on a device with `images` images per step.

    With micro-batches there are two copies of the gradients: the sum, and those of one micro-batch.
    """
    micro_batches = parts.config.micro_batches
    copies = min(micro_batches, 2)
    first, further = activation_bytes(parts)
    return copies * gradient_bytes + first + further * (images // micro_batches - 1)


def _expected_collectives(
    mesh: AbstractMesh, gathered_bytes: int, gradient_bytes: int, device_gradient_bytes: int
) -> list[hlo.Collective]:
    """The collectives of a train step, without scalars.

    Args:
      mesh: the devices.
      gathered_bytes: of parameters and target, which FSDP gathers.
      gradient_bytes: of all gradients.
      device_gradient_bytes: of one device's part of the gradients after FSDP's reduce-scatter.
    """
    fsdp = mesh.shape["fsdp"]
    data = mesh.shape["data"]
    collectives = [
        hlo.Collective("all-gather", fsdp, ("parameters and target",), gathered_bytes, 1),
        hlo.Collective("reduce-scatter", fsdp, ("gradients",), gradient_bytes, 1),
        hlo.Collective("all-reduce", data, ("gradients",), device_gradient_bytes, 1),
    ]
    return [collective for collective in collectives if collective.group > 1]
