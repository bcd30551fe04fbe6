"""Estimates what a recipe needs on a TPU slice or on GPUs that are not at hand.

    lmim plan --config=vit_b --topology=h200:8
    lmim plan --config=vit_b --topology=v5e:4x4 --sweep --json=plan.json

The train step is compiled for the real topology, by compilers that need none of the devices; this
takes minutes. TPUs (v5e, v5p, v6e; 2xv5e:4x4 is two slices with the data center network between
them): by libtpu. GPUs (h200:8, a100, h100:8x4: GPUs per node x nodes): by jax's CUDA plugin (pip
install '.[plan-gpu]'); without it, with --nocompile, and for b200, memory and messages are
estimated from the traced program.

Times are lower bounds from the chips' specifications (lmim_jax/perf/accelerators.py), and an
estimate: of a program compiled for GPUs from its products, memory traffic and number of kernels
(lmim_jax/perf/traffic.py), of others at an assumed utilization. None is measured.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from lmim_jax.cli import app
from lmim_jax.perf import accelerators, aot, gpu_targets, traffic
from lmim_jax.perf.flops import masks_per_image, share_of_masks
from lmim_jax.train.build import TrainingParts
from lmim_jax.utils import atomic_io, buckets, progress
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console

RECIPES: dict[str, str | None] = {"config": "vit_b"}
IMAGENET_IMAGES = 1_281_167
# Bytes per second from a host to each of its chips: an assumption, half of PCIe 3 x 16
HOST_BANDWIDTH = 8e9
CHOICES: tuple[dict[str, Any], ...] = (  # of --sweep: changes to the config
    {},
    {"micro_batches": 2},
    {"micro_batches": 4},
    {"remat": "dots"},
    {"remat": "full"},
    {"mesh.fsdp": 4, "mesh.data": -1},
)
HOST_TOO_SLOW = "neither: the host is too slow"
GPU_MEMORY_SHARE = 0.75  # of a GPU, that jax takes by default
GPU_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Steps of less work than that are bound by what is not estimated: starting kernels, the host
SHORTEST_STEP = 1e-3  # seconds

Settings = dict[str, Any]  # values of the flags compile, images, utilization, decode_rate, ...
Plan = dict[str, Any]  # plain values, as in the JSON file

log = logging.getLogger(__name__)


class Sweep(NamedTuple):
    """Several plans, and the recommended one: the fastest of those that fit, or None."""

    plans: list[Plan]
    best: Plan | None


def plan(config: ConfigDict, topology: str, settings: Settings) -> Plan:
    """The plan of one config.

    Args:
      config: the recipe.
      topology: such as "v5e:4x4" or "h200:8".
      settings: see the flags.

    Returns:
      Plain values; "feasible" says whether the memory suffices.
    """
    parsed = accelerators.parse_topology(topology)
    chip, chips, hosts = parsed.chip, parsed.chips, parsed.hosts
    parts = aot.build_for_images(config, settings["images"])
    source = "compiler"
    compiles = settings["compile"] and aot.compiles_for_gpu(parsed.kind)
    with progress.working(f"the train step for {topology}"):
        if parsed.kind in accelerators.TPUS:
            analysis = aot.compile_for_tpu(parts, topology)
        elif compiles:
            analysis = aot.compile_for_gpu(config, settings["images"], topology)
        else:
            source = "trace"
            analysis = aot.analyze(parts, chips)
    memory = _memory(parts, analysis, parsed, settings["images"])
    flops = aot.flops_per_image(parts)
    seconds = _step_seconds(parts, analysis, parsed, flops, settings["utilization"])
    utilization = flops["method"] * config.batch_size / chips / chip.flops / seconds["step"]
    images_per_second = config.batch_size / seconds["step"]
    total_images = (config.total_steps or 0) * config.batch_size
    if not total_images:
        total_images = config.epochs * settings["images"]
    hours = total_images / images_per_second / 3600
    collectives = []
    for collective in analysis.collectives:
        fields = dataclasses.asdict(collective)
        fields["wire_bytes"] = collective.wire_bytes
        collectives.append(fields)
    return {
        "topology": topology,
        "chips": chips,
        "hosts": hosts,
        "from": source,
        "mesh": analysis.mesh,
        "batch_size": config.batch_size,
        "images_per_chip": config.batch_size / chips,
        "micro_batches": config.micro_batches,
        "remat": config.remat,
        "scan_layers": config.scan_layers,
        "feasible": memory["needed"] <= memory["limit"],
        "memory": memory,
        "flops_per_image": {**flops, "compiled": analysis.compiled_flops_per_image},
        "masks_per_image": masks_per_image(parts.method),
        "collectives": collectives,
        "seconds": seconds,
        "utilization": utilization,
        "estimable": _is_estimable(seconds),
        "images_per_second": images_per_second,
        "hours": hours,
        "chip_hours": hours * chips,
        "input": plan_input(parts, images_per_second / hosts, chip, settings),
        "compile_seconds": analysis.compile_seconds,
        "gauge_images": config.gauge_images,
    }


def _memory(
    parts: TrainingParts,
    analysis: aot.StepAnalysis,
    topology: accelerators.Topology,
    training_images: int,
) -> dict[str, float]:
    """Bytes of a device: those of the step, what stays beside it, "needed" by all, and "limit".

    Beside the step stay "batches_ahead" and "collapse_images". An evaluation with neighbors takes
    "search", in place of the temporaries of the step, and "features" on each host. The limit
    is what jax leaves to a program: all of a TPU, a share of a GPU ("device").
    """
    memory = {"limit": topology.chip.memory, **analysis.memory}
    if topology.kind not in accelerators.TPUS:
        memory["device"] = topology.chip.memory
        memory["limit"] = _gpu_memory_share() * topology.chip.memory
    images = parts.config.batch_size // topology.chips
    memory["batches_ahead"] = aot.BATCHES_AHEAD * aot.batch_bytes(parts, images)
    memory["collapse_images"] = aot.collapse_image_bytes(parts) / topology.chips
    memory["needed"] += memory["batches_ahead"] + memory["collapse_images"]
    memory["search"] = aot.search_bytes(parts, training_images, topology.chips)
    memory["features"] = aot.feature_bytes(parts, training_images)
    return memory


def _gpu_memory_share() -> float:
    """The share of a GPU's memory that jax takes.

    Raises:
      UserError: the environment has a value that is not a number.
    """
    for name in GPU_MEMORY_VARIABLES:
        value = os.environ.get(name)
        if value:
            try:
                return float(value)
            except ValueError:
                raise UserError(f"{name}={value} must be a number, such as {name}=0.9") from None
    return GPU_MEMORY_SHARE


def _step_seconds(
    parts: TrainingParts,
    analysis: aot.StepAnalysis,
    topology: accelerators.Topology,
    flops: dict[str, float],
    utilization: float,
) -> dict[str, float]:
    """Lower bounds on the time of a step, "compute", "memory" and "network", and its estimate.

    The estimate, "step", of a program for GPUs is the sum of "products", "traffic" and
    "kernel_starts" (see `traffic.estimate_seconds`) and "network": gradients are averaged at the
    end of a step, when there is little else to do. Of others, it is the time at `utilization`.
    """
    chip = topology.chip
    images = parts.config.batch_size / topology.chips
    state = aot.state_bytes(parts)
    _, activations = aot.activation_bytes(parts)
    # The state is read and written once, with the gradients; activations are written and read
    state_traffic = 2 * sum(state.values()) / analysis.mesh["fsdp"] + 2 * state["params"]
    wire_bytes = sum(collective.wire_bytes for collective in analysis.collectives)
    seconds = {
        "compute": (flops["executed"] + flops["augmentation"]) * images / chip.flops,
        "memory": (state_traffic + 2 * images * activations) / chip.bandwidth,
        "network": accelerators.network_seconds(topology, wire_bytes),
    }
    if analysis.program is not None:
        seconds["memory"] = analysis.program["bytes"] / chip.bandwidth
    if analysis.program is not None and topology.kind not in accelerators.TPUS:
        step_flops = (flops["executed"] + flops["augmentation"]) * images
        estimated = traffic.estimate_seconds(chip, step_flops, analysis.program)
        return {
            **seconds,
            **estimated,
            "step": sum(estimated.values()) + seconds["network"],
        }
    at_utilization = flops["executed"] * images / chip.flops / utilization
    seconds["step"] = max(at_utilization, max(seconds.values()))
    return seconds


def _is_estimable(seconds: dict[str, float]) -> bool:
    """Whether the estimate of the time of a step means something; see SHORTEST_STEP."""
    if "kernel_starts" in seconds and not traffic.is_estimable(seconds):
        return False
    return max(seconds["compute"], seconds["memory"]) >= SHORTEST_STEP


def plan_input(
    parts: TrainingParts, images_per_second: float, chip: accelerators.Chip, settings: Settings
) -> dict[str, Any]:
    """What a host must deliver, with images resized on the device or on the host.

    Args:
      parts: of the recipe.
      images_per_second: that each host must deliver.
      chip: the specification of its chips.
      settings: see the flags.

    Returns:
      {"images_per_second", "device": needs, "host": needs, "resize_on": the recommendation,
      "host_cores", "host_gigabytes_per_second"}.
    """
    data = parts.config.data
    available_cores = chip.host_cores / 2 or float("inf")  # two virtual cores share a real one
    available_bandwidth = HOST_BANDWIDTH * chip.chips_per_host
    height, width = parts.method.image_size
    pixels = {"device": data.canvas * data.canvas, "host": height * width}
    images_per_core = {"device": settings["decode_rate"], "host": settings["resize_rate"]}
    needs = {}
    resize_on = HOST_TOO_SLOW
    for where in ("host", "device"):  # resizing on the device is preferred
        cores = images_per_second / images_per_core[where]
        gigabytes = images_per_second * pixels[where] * data.channels / 1e9
        needs[where] = {"decode_cores": cores, "gigabytes_per_second": gigabytes}
        if cores <= available_cores and gigabytes * 1e9 <= available_bandwidth:
            resize_on = where
    return {
        "images_per_second": images_per_second,
        "device": needs["device"],
        "host": needs["host"],
        "resize_on": resize_on,
        "host_cores": chip.host_cores // 2 or None,
        "host_gigabytes_per_second": available_bandwidth / 1e9,
    }


def table(planned: Plan) -> list[str]:
    """A plan as lines of text."""
    seconds = planned["seconds"]
    bounds = []
    for name in ("compute", "memory", "network"):
        bounds.append(f"{name} {1e3 * seconds[name]:.3g} ms")
    lines = [
        _device_line(planned),
        *_memory_lines(planned),
        _flops_line(planned["flops_per_image"], planned["masks_per_image"]),
        *_collective_lines(planned["collectives"]),
        f"bounds      {', '.join(bounds)} a step",
    ]
    if not planned["estimable"]:
        return [
            *lines,
            "expected    not estimated: there is so little work in a step that starting kernels "
            "and the host take most of its time",
        ]
    return [
        *lines,
        f"expected    {planned['images_per_second']:,.0f} images/s, {_basis(planned)}: "
        f"{planned['hours']:.1f} hours, {planned['chip_hours']:,.0f} chip-hours",
        *_input_lines(planned["input"]),
    ]


def _basis(planned: Plan) -> str:
    """What the estimate of the time of a step is based on."""
    share = f"{planned['utilization']:.0%} of the peak"
    if "traffic" not in planned["seconds"]:
        return f"{share} (an assumption)"
    names = {
        "products": "products",
        "traffic": "traffic",
        "kernel_starts": "starts of kernels",
        "network": "network",
    }
    times = []
    for name, words in names.items():
        times.append(f"{words} {1e3 * planned['seconds'][name]:.1f}")
    total = 1e3 * planned["seconds"]["step"]
    return f"{share} ({' + '.join(times)} = {total:.1f} ms, a model)"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _device_line(planned: Plan) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in planned["mesh"].items())
    return (
        f"{planned['topology']}: {planned['chips']} chips on {planned['hosts']} host(s), "
        f"mesh {mesh}, {planned['images_per_chip']:g} images per chip in "
        f"{planned['micro_batches']} micro-batch(es), remat {planned['remat']}, "
        f"scan_layers {planned['scan_layers']}"
    )


def _memory_lines(planned: Plan) -> list[str]:
    memory = planned["memory"]
    known = []
    for name in ("arguments", "temporaries"):
        if name in memory:
            known.append(f"{name} {_gigabytes(memory[name])}")
    known.append(f"{aot.BATCHES_AHEAD} batches ahead {_gigabytes(memory['batches_ahead'])}")
    known.append(
        f"{planned['gauge_images']} images of the collapse metrics "
        f"{_gigabytes(memory['collapse_images'])}"
    )
    spare = memory["limit"] - memory["needed"]
    result = f"fits, {_gigabytes(spare)} left"
    if not planned["feasible"]:
        result = f"DOES NOT FIT, {_gigabytes(-spare)} too much"
    limit = _gigabytes(memory["limit"])
    if "device" in memory:
        share = memory["limit"] / memory["device"]
        limit += f" (the {share:.0%} of {_gigabytes(memory['device'])} that jax takes)"
        if memory["limit"] < memory["needed"] < 0.95 * memory["device"]:
            result += "; it fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    needed = _gigabytes(memory["needed"])
    lines = [
        f"memory      {needed} of {limit} ({', '.join(known)}): {result}",
        f"            between steps, in place of the temporaries: collapse metrics of "
        f"{planned['gauge_images']} images, and evaluation; of that, the search of neighbors "
        f"{_gigabytes(memory['search'])}",
        f"            on each host, while neighbors are searched: features of the training images "
        f"{_gigabytes(memory['features'])}",
    ]
    if planned["from"] == "trace":
        lines.append(
            f"            from the traced program, not compiled; {_how_to_compile(planned)}"
        )
    return lines


def _how_to_compile(planned: Plan) -> str:
    kind = accelerators.parse_topology(planned["topology"]).kind
    if kind not in gpu_targets.TARGETS:
        return f"{kind} is not described in lmim_jax/perf/gpu_targets.py"
    if aot.compiles_for_gpu(kind):
        return "leave out --nocompile for that"
    return aot.INSTALL_GPU


def _flops_line(flops: dict[str, float | None], masks: int) -> str:
    giga = {name: (count or 0) / 1e9 for name, count in flops.items()}
    text = f"GFLOP/image {giga['method']:.1f} of the method{share_of_masks(giga['method'], masks)}"
    if flops["executed"] != flops["method"]:
        text += f", {giga['executed']:.1f} with recomputation"
    text += f"; augmentation {giga['augmentation']:.2f}"
    if flops["compiled"]:
        text += f"; the compiler counts {giga['compiled']:.1f} in all"
    return text


def _collective_lines(collectives: Sequence[dict[str, Any]]) -> list[str]:
    """A line for all collectives of a kind, sorted."""
    groups: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for collective in collectives:
        scalar = all(shape.endswith("[]") for shape in collective["shapes"])
        groups.setdefault((collective["kind"], collective["group"], scalar), []).append(collective)
    lines = []
    for (kind, group, scalar), alike in sorted(groups.items()):
        times = sum(collective["times"] for collective in alike)
        size = sum(collective["times"] * collective["size"] for collective in alike)
        what = "scalars"
        if not scalar:
            what = f"{sum(len(collective['shapes']) for collective in alike)} arrays"
        lines.append(
            f"messages    {times} x {kind} among {group}: {what}, {size / 1e6:.3f} MB a step"
        )
    return lines


def _input_lines(needed: dict[str, Any]) -> list[str]:
    lines = []
    for where in ("device", "host"):
        text = (
            f"input       resize on {where}: {needed['images_per_second']:,.0f} images/s and host, "
            f"{needed[where]['decode_cores']:.0f} cores, "
            f"{needed[where]['gigabytes_per_second']:.2f} GB/s to its devices"
        )
        if needed["resize_on"] == where:
            text += "   <- recommended"
        lines.append(text)
    if needed["resize_on"] == HOST_TOO_SLOW:
        lines.append(
            f"input       {HOST_TOO_SLOW} ({needed['host_cores']} cores, "
            f"{needed['host_gigabytes_per_second']:.0f} GB/s)"
        )
    return lines


def sweep(config: ConfigDict, topology: str, settings: Settings) -> Sweep:
    """Plan all CHOICES; of those that fit, the fastest and then the simplest is recommended."""
    plans = []
    seen = []
    for number, change in enumerate(CHOICES, 1):
        changed = ConfigDict(config)
        changed.update_from_flattened_dict(change)
        choice = (changed.micro_batches, changed.remat, changed.mesh.to_dict())
        if choice in seen:
            continue
        seen.append(choice)
        log.info("%d of %d: %s ...", number, len(CHOICES), _describe(change))
        start = time.perf_counter()
        try:
            planned = plan(changed, topology, settings)
        except UserError as error:
            log.info("   not possible: %s", error)
            continue
        planned["change"] = change
        spare = planned["memory"]["limit"] - planned["memory"]["needed"]
        fits = f"{_gigabytes(spare)} left"
        if spare < 0:
            fits = f"{_gigabytes(-spare)} too much"
        speed = "?"
        if planned["estimable"]:
            speed = f"{planned['images_per_second']:,.0f}"
        seconds = time.perf_counter() - start
        log.info("   %s, %s images/s, planned in %s", fits, speed, duration(seconds))
        plans.append(planned)
    fitting = [planned for planned in plans if planned["feasible"]]
    best = max(fitting, key=_rounded_speed, default=None)
    return Sweep(plans, best)


def _rounded_speed(planned: Plan) -> int:
    """Images per second; of plans that are equally fast, `max` takes the first, the simplest."""
    return round(planned["images_per_second"])


def _describe(change: dict[str, Any]) -> str:
    """Changes to the config as they are given on the command line."""
    if not change:
        return "the unchanged recipe"
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


def main(arguments: list[str]) -> None:
    """Plan, print the plan and write the file."""
    app.no_arguments(arguments, "--topology=h200:8")
    jax.config.update("jax_platforms", "cpu")
    log_to_console()
    given = flags.FLAGS
    out = buckets.path(given.json)
    settings = {
        "compile": given.compile,
        "images": given.images,
        "utilization": given.utilization,
        "decode_rate": given.decode_rate,
        "resize_rate": given.resize_rate,
    }
    accelerators.parse_topology(given.topology)
    result: dict[str, Any]
    if given.sweep:
        plans, best = sweep(given.config, given.topology, settings)
        result = {"plans": plans, "recommended": None}
        if best is None:
            print("\nnone of these fits: use a larger slice or a smaller config.batch_size")
        else:
            result["recommended"] = best["change"]
            print(f"\nrecommended: {_describe(best['change'])}")
            print("\n".join(table(best)))
    else:
        result = plan(given.config, given.topology, settings)
        print("\n".join(table(result)))
    if given.json:
        atomic_io.write(out, json.dumps(result, indent=2) + "\n")


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_recipe(
        "config",
        "The recipe: a name or a file. Examples: --config=vit_l, --config.batch_size=2048",
    )
    flags.DEFINE_string(
        "topology",
        "v5e:4x4",
        "Chips: v5e:4x4, v5p:2x2x4, v6e:8x8, ... for TPUs, 2xv5e:4x4 for two slices, h200:8, ... "
        "for the GPUs of a node, h100:8x4 for those of 4 nodes. Example: --topology=h200:8",
    )
    flags.DEFINE_bool(
        "sweep",
        False,
        "Try several choices of micro-batches, remat and mesh, and recommend one. Example: --sweep",
    )
    flags.DEFINE_bool(
        "compile",
        True,
        "GPUs: compile the step where the compiler is installed, which takes minutes, instead of "
        "estimating from the traced program, which takes seconds. Example: --nocompile",
    )
    flags.DEFINE_string("json", "", "Also write the plan to this file. Example: --json=plan.json")
    flags.DEFINE_integer(
        "images",
        IMAGENET_IMAGES,
        "Number of training images; the default is ImageNet-1k. Example: --images=100000",
    )
    flags.DEFINE_float(
        "utilization",
        0.45,
        "Share of the peak FLOP/s that the step reaches, where it is not compiled for GPUs: an "
        "assumption. Example: --utilization=0.3",
    )
    flags.DEFINE_float(
        "decode_rate",
        900.0,
        "Images that one core decodes per second. Example: --decode_rate=700",
    )
    flags.DEFINE_float(
        "resize_rate",
        500.0,
        "Images that one core decodes, crops and resizes per second. Example: --resize_rate=400",
    )
