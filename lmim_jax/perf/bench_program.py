"""The program of a recipe's train step on a device that need not exist: traffic, memory, products.

The device is a GPU or a TPU.
"""

from typing import Any

from ml_collections import ConfigDict

from lmim_jax.perf import accelerators, aot, gpu_targets, traffic
from lmim_jax.train.build import TrainingParts
from lmim_jax.utils.errors import UserError

IMAGES = 1_281_167  # of ImageNet-1k: only schedules depend on it
ROWS = 25  # of the table of parts
ONE_TPU = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}  # topologies of one chip
DEVICES = sorted([*gpu_targets.TARGETS, *ONE_TPU])


def measure(config: ConfigDict, device: str, text_file: str = "") -> dict[str, Any]:
    """Compile the train step of a recipe for one device, and read its program.

    Args:
      config: the recipe; `batch_size` images are on the device.
      device: one of DEVICES.
      text_file: where to write the program as text; "": nowhere.

    Returns:
      Plain values: {"device", "batch_size", "compile_seconds", "bytes_per_image": traffic, "memory"
      (see `StepAnalysis`), "gflop_per_image": with recomputation and augmentation; the rest: see
      `traffic.summarize`}. For GPUs also: "seconds" (see `traffic.estimate_seconds`, and their sum
      as "step"), "images_per_second", "mfu": the share of the peak that the method's FLOPs take.
      For TPUs, "seconds" are those of the data sheet: "products" at the peak, and "traffic".

    Raises:
      UserError: the compiler is not installed, or failed, or the device's memory is too small.
    """
    parts = aot.build_for_images(config, IMAGES)
    analysis = _compile(config, parts, device, text_file)
    program = analysis.program
    if program is None:
        raise UserError(
            f"--device={device}: the step needs {analysis.memory['needed'] / 1e9:.1f} GB and has "
            f"{analysis.memory['limit'] / 1e9:.1f} GB; a smaller --config.batch_size needs less, "
            "and --config.remat=full"
        )
    flops = aot.flops_per_image(parts)
    executed = flops["executed"] + flops["augmentation"]
    return {
        "device": device if device in ONE_TPU else gpu_targets.TARGETS[device].name,
        "batch_size": config.batch_size,
        "compile_seconds": analysis.compile_seconds,
        "bytes_per_image": program["bytes"] / config.batch_size,
        "memory": analysis.memory,
        "gflop_per_image": executed / 1e9,
        **_time(device, config.batch_size, executed, flops["method"], program),
        **program,
    }


def _compile(
    config: ConfigDict, parts: TrainingParts, device: str, text_file: str
) -> aot.StepAnalysis:
    if device in ONE_TPU:
        return aot.compile_for_tpu(parts, ONE_TPU[device], text_file)
    if not aot.compiles_for_gpu(device):
        raise UserError(f"--device={device}: {aot.INSTALL_GPU}")
    return aot.compile_for_gpu(config, IMAGES, f"{device}:1", text_file)


def _time(
    device: str, batch_size: int, executed: float, method: float, program: dict[str, Any]
) -> dict[str, Any]:
    """What `measure` returns about time.

    Args:
      device: one of DEVICES.
      batch_size: images of a step.
      executed: FLOPs of an image that the step executes.
      method: FLOPs of an image that the method needs.
      program: see `traffic.summarize`.
    """
    chip = accelerators.CHIPS[device]
    flops = executed * batch_size
    if device in ONE_TPU:
        traffic_seconds = program["bytes"] / chip.bandwidth
        return {"seconds": {"products": flops / chip.flops, "traffic": traffic_seconds}}
    seconds = traffic.estimate_seconds(chip, flops, program)
    seconds["step"] = sum(seconds.values())
    rate = batch_size / seconds["step"]
    return {"seconds": seconds, "images_per_second": rate, "mfu": method * rate / chip.flops}


def table(measured: dict[str, Any]) -> list[str]:
    """The result of `measure` as lines of text."""
    memory = []
    for name, size in measured["memory"].items():
        memory.append(f"{name} {size / 1e9:.2f} GB")
    lines = [
        f"device        {measured['device']}, batch {measured['batch_size']}: compiled in "
        f"{measured['compile_seconds']:.0f} s",
        f"kernels       {measured['kernels']:,}",
        f"traffic       {measured['bytes'] / 1e9:.1f} GB a step, "
        f"{measured['bytes_per_image'] / 1e6:.1f} MB an image; "
        f"{measured['product_bytes'] / 1e9:.1f} GB of it by products",
        f"memory        {', '.join(memory)}",
        f"products      {_counts(measured['products'])}",
        f"in float32    {_counts(measured['float32_products'])}",
        f"estimate      {_estimate(measured)}",
        "",
        f"{'MB an image':>12}{'share':>8}{'kernels':>9}  part",
    ]
    for part in measured["parts"][:ROWS]:
        size = part["bytes"] / measured["batch_size"] / 1e6
        share = part["bytes"] / measured["bytes"]
        where = part["where"] or "(without a name)"
        lines.append(f"{size:>12.1f}{share:>8.1%}{part['kernels']:>9}  {where}")
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _estimate(measured: dict[str, Any]) -> str:
    milliseconds = {name: 1e3 * value for name, value in measured["seconds"].items()}
    if "step" not in measured["seconds"]:
        return (
            f"at the data sheet's rates products {milliseconds['products']:.1f} ms, traffic "
            f"{milliseconds['traffic']:.1f} ms; a step takes longer"
        )
    if not traffic.is_estimable(measured["seconds"]):
        return traffic.NOT_ESTIMABLE
    return (
        f"products {milliseconds['products']:.1f} + traffic {milliseconds['traffic']:.1f} + starts "
        f"of kernels {milliseconds['kernel_starts']:.1f} = {milliseconds['step']:.1f} ms, "
        f"{measured['images_per_second']:,.0f} images/s, {measured['mfu']:.0%} MFU; not measured"
    )
