"""What a recipe needs on a TPU slice or on GPUs, without having any.

    lmim plan --config=configs/vit_b.py --topology=v5e:4x4 [--sweep] [--json=FILE]

TPUs (v5e, v5p, v6e): the train step is compiled for the real topology by libtpu, which needs no TPU; memory, FLOPs and
messages are the compiler's. It takes minutes. GPUs (h200:8, h100:8x4 = GPUs of a node x nodes, a100, b200): from the
traced program alone. Times are floors from the figures in lmim_jax/perf/accelerators.py, and what a utilisation would make of
them; none is measured.
"""

import dataclasses
import json
import logging
import pathlib
import time

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from lmim_jax.perf import accelerators, aot
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console

log = logging.getLogger("lmim_jax.cli.plan")

HOST_LINK = (
    8e9  # bytes a second from a host to each of its chips (half of PCIe 3 x 16): an assumption
)
CHOICES = (  # of --sweep: changes to the config
    {},
    {"micro_batches": 2},
    {"micro_batches": 4},
    {"remat": "dots"},
    {"remat": "full"},
    {"mesh.fsdp": 4, "mesh.data": -1},
)

RECIPES: dict[str, str | None] = {"config": "vit_b"}


def plan(config, topology, settings):
    """The plan of one config, a dict of plain values; `feasible` says whether it fits.

    Args:
      topology: "v5e:4x4", "h200:8". settings: images, utilization, decode_rate, resize_rate; see the flags.
    """
    kind, chip, count, hosts = accelerators.topology(topology)
    recipe = aot.Recipe.of(config, settings["images"])
    tpu = kind in accelerators.TPUS
    found = aot.compile_for_tpu(recipe, topology) if tpu else aot.analyse(recipe, count)
    memory = {"limit": chip.memory, **found["memory"]}
    moved, work = found.get("collectives", []), recipe.flops()
    state, (_, further), images = (
        recipe.state_bytes(),
        recipe.saved_bytes(),
        config.batch_size / count,
    )
    # The state is read and written once, with the gradients; what is kept for the backward pass is written and read
    touched = (
        2 * sum(state.values()) / found["mesh"]["fsdp"] + 2 * state["params"] + 2 * images * further
    )
    seconds = {
        "compute": (work["executed"] + work["augmentation"]) * images / chip.flops,
        "memory": touched / chip.bandwidth,
        "network": accelerators.network_seconds(chip, count, sum(one.wire_bytes for one in moved)),
    }
    at_utilization = work["executed"] * images / chip.flops / settings["utilization"]
    seconds["step"] = max(at_utilization, *seconds.values())
    rate, total = config.batch_size / seconds["step"], (config.total_steps or 0) * config.batch_size
    hours = (total or config.epochs * settings["images"]) / rate / 3600
    return {
        "topology": topology,
        "chips": count,
        "hosts": hosts,
        "from": "compiler" if tpu else "trace",
        "mesh": found["mesh"],
        "batch_size": config.batch_size,
        "images_per_chip": images,
        **{name: config[name] for name in ("micro_batches", "remat", "scan_layers")},
        "feasible": memory["needed"] <= memory["limit"],
        "memory": memory,
        "flops_per_image": work | {"compiled": found.get("compiled_flops_per_image")},
        "collectives": [dataclasses.asdict(one) | {"wire_bytes": one.wire_bytes} for one in moved],
        "seconds": seconds,
        "utilization": settings["utilization"],
        "images_per_second": rate,
        "hours": hours,
        "chip_hours": hours * count,
        "input": inputs(recipe, rate / hosts, chip, settings),
        "compile_seconds": found.get("compile_seconds"),
    }


def inputs(recipe, rate, chip, settings):
    """What a host must deliver at so many images a second, with images resized on the device or on the host."""
    canvas = recipe.config.data.canvas, recipe.config.data.canvas
    sides = {
        "device": (canvas, settings["decode_rate"]),
        "host": (recipe.method.image_size, settings["resize_rate"]),
    }
    found = {
        where: {
            "decode_cores": rate / per_core,
            "gigabytes_per_second": rate * size[0] * size[1] * recipe.config.data.channels / 1e9,
        }
        for where, (size, per_core) in sides.items()
    }
    cores = chip.cores / 2 or float("inf")  # two virtual cores share a real one
    fits = {
        where: need["decode_cores"] <= cores
        and need["gigabytes_per_second"] * 1e9 <= HOST_LINK * chip.host
        for where, need in found.items()
    }
    best = (
        "device" if fits["device"] else "host" if fits["host"] else "neither: the host is too slow"
    )
    host = {
        "host_cores": chip.cores // 2 or None,
        "host_gigabytes_per_second": HOST_LINK * chip.host / 1e9,
    }
    return {"images_per_second": rate, **found, "resize_on": best, **host}


def table(planned):
    """A plan as lines of text."""
    giga = lambda number: f"{number / 1e9:.2f} GB"
    mesh = " x ".join(f"{name} {size}" for name, size in planned["mesh"].items())
    memory, work, seconds = planned["memory"], planned["flops_per_image"], planned["seconds"]
    spare = memory["limit"] - memory["needed"]
    detail = ", ".join(
        f"{name} {giga(memory[name])}" for name in ("arguments", "temporaries") if name in memory
    )
    detail = f" ({detail})" if detail else ""
    verdict = (
        f"fits, {giga(spare)} left"
        if planned["feasible"]
        else f"DOES NOT FIT, {giga(-spare)} too much"
    )
    lines = [
        f"{planned['topology']}: {planned['chips']} chips on {planned['hosts']} host(s), mesh {mesh}, "
        f"{planned['images_per_chip']:g} images per chip in {planned['micro_batches']} micro-batch(es), "
        f"remat {planned['remat']}, scan_layers {planned['scan_layers']}",
        f"memory      {giga(memory['needed'])} of {giga(memory['limit'])}{detail}: {verdict}",
        f"GFLOP/image {work['method'] / 1e9:.1f} of the method"
        + (
            f", {work['executed'] / 1e9:.1f} with what is computed again"
            if work["executed"] != work["method"]
            else ""
        )
        + f"; augmentation {work['augmentation'] / 1e9:.2f}"
        + (
            f"; the compiler counts {work['compiled'] / 1e9:.1f} in all" if work["compiled"] else ""
        ),
    ]
    for kind, group, scalar in sorted(
        {(c["kind"], c["group"], _scalar(c)) for c in planned["collectives"]}
    ):
        equal = [
            c
            for c in planned["collectives"]
            if (c["kind"], c["group"], _scalar(c)) == (kind, group, scalar)
        ]
        times, size = sum(c["times"] for c in equal), sum(c["times"] * c["size"] for c in equal)
        what = "scalars" if scalar else f"{sum(len(c['shapes']) for c in equal)} arrays"
        lines.append(
            f"messages    {times} x {kind} among {group}: {what}, {size / 1e6:.3f} MB a step"
        )
    floors = ", ".join(
        f"{name} {1e3 * seconds[name]:.1f} ms" for name in ("compute", "memory", "network")
    )
    lines += [
        f"floors      {floors} a step",
        f"expected    {planned['images_per_second']:,.0f} images/s at {planned['utilization']:.0%} of the peak: "
        f"{planned['hours']:.1f} hours, {planned['chip_hours']:,.0f} chip-hours",
    ]
    need = planned["input"]
    for where in ("device", "host"):
        lines.append(
            f"input       resize on {where}: {need['images_per_second']:,.0f} images/s and host, "
            f"{need[where]['decode_cores']:.0f} cores, {need[where]['gigabytes_per_second']:.2f} GB/s to its devices"
            + ("   <- recommended" if need["resize_on"] == where else "")
        )
    if need["resize_on"] not in ("device", "host"):
        has = f"{need['host_cores']} cores, {need['host_gigabytes_per_second']:.0f} GB/s"
        lines.append(f"input       {need['resize_on']} ({has})")
    return lines


def _scalar(collective):
    return all(shape.endswith("[]") for shape in collective["shapes"])


def sweep(config, topology, settings):
    """Plans of CHOICES, as they come, and the one to recommend: of those that fit, the fastest, then the simplest."""
    plans, seen = [], set()
    for number, change in enumerate(CHOICES, 1):
        changed = ConfigDict(config)
        changed.update_from_flattened_dict(change)
        key = json.dumps([changed.micro_batches, changed.remat, *changed.mesh.to_dict().values()])
        if key in seen:
            continue
        seen.add(key)
        told = (
            ", ".join(f"config.{name}={value}" for name, value in change.items())
            or "the recipe as it is"
        )
        log.info("%d of %d: %s ...", number, len(CHOICES), told)
        began = time.perf_counter()
        try:
            planned = plan(changed, topology, settings) | {"change": change}
        except UserError as error:
            log.info("   not possible: %s", error)
            continue
        spare = (planned["memory"]["limit"] - planned["memory"]["needed"]) / 1e9
        fits = f"{spare:.2f} GB left" if spare >= 0 else f"{-spare:.2f} GB too much"
        took = duration(time.perf_counter() - began)
        log.info(
            "   %s, %s images/s, planned in %s", fits, f"{planned['images_per_second']:,.0f}", took
        )
        plans.append(planned)
    fitting = [planned for planned in plans if planned["feasible"]]
    best = max(fitting, key=lambda planned: round(planned["images_per_second"]), default=None)
    return plans, best


def main(arguments):
    """Run the command."""
    jax.config.update("jax_platforms", "cpu")
    log_to_console()
    given = flags.FLAGS
    settings = {
        name: given[name].value for name in ("images", "utilization", "decode_rate", "resize_rate")
    }
    config, topology = given.config, given.topology
    accelerators.topology(topology)
    if given.sweep:
        plans, best = sweep(config, topology, settings)
        result = {"plans": plans, "recommended": best["change"] if best else None}
        if best:
            change = " ".join(f"--config.{name}={value}" for name, value in best["change"].items())
            print("\n".join(["", f"recommended: {change or 'the recipe as it is'}", *table(best)]))
        else:
            print("\nnone of these fits: take a larger slice, or a smaller config.batch_size")
    else:
        result = plan(config, topology, settings)
        print("\n".join(table(result)))
    if given.json:
        pathlib.Path(given.json).write_text(json.dumps(result, indent=2) + "\n")


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe; default: configs/vit_b.py.", lock_config=True
    )
    flags.DEFINE_string(
        "topology", "v5e:4x4", "v5e:4x4, v5p:2x2x4, v6e:8x8, ... or h200:8, h100:8x4, ..."
    )
    flags.DEFINE_bool(
        "sweep", False, "Try several choices of micro-batches, remat and mesh, and recommend one."
    )
    flags.DEFINE_string("json", "", "Also write the plan to this file.")
    flags.DEFINE_integer("images", 1_281_167, "Training images; default: ImageNet-1k.")
    flags.DEFINE_float(
        "utilization", 0.45, "Share of the peak FLOPs that the step reaches: an assumption."
    )
    flags.DEFINE_float("decode_rate", 900.0, "Images a second that one core decodes into a canvas.")
    flags.DEFINE_float("resize_rate", 500.0, "The same with crop and resize on the host.")
