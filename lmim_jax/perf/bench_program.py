"""The program of a recipe's train step on a GPU that need not exist: traffic, memory, products."""

from typing import Any

from ml_collections import ConfigDict

from lmim_jax.perf import accelerators, aot, gpu_targets, traffic
from lmim_jax.utils.errors import UserError

IMAGES = 1_281_167  # of ImageNet-1k: only schedules depend on it
ROWS = 25  # of the table of parts


def measure(config: ConfigDict, device: str, text_file: str = "") -> dict[str, Any]:
    """Compile the train step of a recipe for one device, and read its program.

    Args:
      config: the recipe; `batch_size` images are on the device.
      device: key of `gpu_targets.TARGETS`.
      text_file: where to write the program as text; "": nowhere.

    Returns:
      Plain values: {"device", "batch_size", "compile_seconds", "bytes_per_image": traffic, "memory"
      (see `StepAnalysis`), "gflop_per_image": with recomputation and augmentation, "seconds" (see
      `traffic.estimate_seconds`, and their sum as "step"), "images_per_second", "mfu": the share of
      the peak that the method's FLOPs take; the rest: see `traffic.summarize`}.

    Raises:
      UserError: the compiler is not installed, or failed.
    """
    if not aot.compiles_for_gpu(device):
        raise UserError(f"--device={device}: {aot.INSTALL_GPU}")
    analysis = aot.compile_for_gpu(config, IMAGES, f"{device}:1", text_file)
    program = analysis.program
    assert program is not None
    flops = aot.flops_per_image(aot.build_for_images(config, IMAGES))
    chip = accelerators.CHIPS[device]
    executed = flops["executed"] + flops["augmentation"]
    seconds = traffic.estimate_seconds(chip, executed * config.batch_size, program)
    seconds["step"] = sum(seconds.values())
    rate = config.batch_size / seconds["step"]
    return {
        "device": gpu_targets.TARGETS[device].name,
        "batch_size": config.batch_size,
        "compile_seconds": analysis.compile_seconds,
        "bytes_per_image": program["bytes"] / config.batch_size,
        "memory": analysis.memory,
        "gflop_per_image": executed / 1e9,
        "seconds": seconds,
        "images_per_second": rate,
        "mfu": flops["method"] * rate / chip.flops,
        **program,
    }


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
    if not traffic.is_estimable(measured["seconds"]):
        return traffic.NOT_ESTIMABLE
    return (
        f"products {milliseconds['products']:.1f} + traffic {milliseconds['traffic']:.1f} + starts "
        f"of kernels {milliseconds['kernel_starts']:.1f} = {milliseconds['step']:.1f} ms, "
        f"{measured['images_per_second']:,.0f} images/s, {measured['mfu']:.0%} MFU; not measured"
    )
