"""Descriptions of NVIDIA GPUs for XLA's compiler, which needs none of them to compile for them.

Memory and its bandwidth are those of `accelerators.CHIPS`. The rest is from public documents:
NVIDIA's data sheets and architecture white papers of the A100 (80 GB, SXM), H100 (SXM) and H200,
and the table of compute capabilities in the CUDA C++ Programming Guide.
"""

import dataclasses

from lmim_jax.perf import accelerators

CUDNN_VERSION = (9, 10)  # that programs are compiled for
CUDA_VERSION = (13, 0)


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of GPU.

    Attributes:
      name: as the driver reports it.
      compute_capability: (major, minor).
      cores: streaming multiprocessors.
      units_per_core: float32 units of each.
      clock: highest, GHz.
      cache: level 2, bytes.
      shared_memory: bytes of a core; a block can use 1 KiB less.
    """

    name: str
    compute_capability: tuple[int, int]
    cores: int
    units_per_core: int
    clock: float
    cache: int
    shared_memory: int


TARGETS = {
    "a100": Target(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        cores=108,
        units_per_core=64,
        clock=1.41,
        cache=40 << 20,
        shared_memory=164 << 10,
    ),
    "h100": Target(
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        cores=132,
        units_per_core=128,
        clock=1.98,
        cache=50 << 20,
        shared_memory=228 << 10,
    ),
    "h200": Target(
        name="NVIDIA H200",
        compute_capability=(9, 0),
        cores=132,
        units_per_core=128,
        clock=1.98,
        cache=50 << 20,
        shared_memory=228 << 10,
    ),
}


def description(kind: str) -> str:
    """What XLA calls a target config, as text.

    Args:
      kind: key of TARGETS.
    """
    target = TARGETS[kind]
    chip = accelerators.CHIPS[kind]
    major, minor = target.compute_capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: {48 << 10}
          shared_memory_per_core: {target.shared_memory}
          shared_memory_per_block_optin: {target.shared_memory - (1 << 10)}
          threads_per_core_limit: 2048
          core_count: {target.cores}
          fpus_per_core: {target.units_per_core}
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
          memory_bandwidth: {chip.bandwidth:.0f}
          l2_cache_size: {target.cache}
          clock_rate_ghz: {target.clock}
          device_memory_size: {chip.memory:.0f}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: {1 << 16}
          registers_per_block_limit: {1 << 16}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {CUDNN_VERSION[0]} minor: {CUDNN_VERSION[1]} }}
        runtime_version {{ major: {CUDA_VERSION[0]} minor: {CUDA_VERSION[1]} patch: 0 }}
        device_description_str: "{target.name}"
    """
