"""The working directory of a run: it belongs to one config and one dataset."""

import json
import logging
import os
import pathlib
import re
import socket
import tempfile
import time
from collections.abc import Collection, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lmim_jax.data import image_options, sources
from lmim_jax.distributed import multihost
from lmim_jax.train import gpu_kernels
from lmim_jax.utils import atomic_io, buckets, commands, xla_flags
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

# Keys that may change when a run resumes: they do not affect the training itself
HARMLESS = re.compile(
    r"log_every|gauge_images|checkpoint_\w+|evaluators\..*|max_skipped|mesh\..*|remat|scan_layers"
    # How to compute, not what: results differ by rounding
    r"|method\.attention|deterministic|xla_flags"
    # Of evaluation alone
    r"|augment\.eval_resize|representation\..*"
    # Where images are, and which are for evaluation; IMAGES identifies those of training
    r"|data\.(path|dir|cache|stage|held_out|classes|test_split)|report"
    r"|data\.modalities\.[^.]+\.path"
    r"|data\.(workers|threads|timeout|max_bad_fraction)|wandb\.\w+"
)
# What runs did that were made before these options were
FORMER: dict[str, Any] = {
    "data.cache": "",
    "data.stage": "",
    "data.held_out": 0.0,
    "data.labels": "",
    "data.labels_kind": "auto",
    "data.range": image_options.FULL,
    "data.max_pixels": image_options.MAX_PIXELS,
    "data.exif_orientation": False,
    "data.transparency": "ignore",
    "data.modalities": {},
    "evaluators.strict": False,
    "method.registers": 0,
    "method.target": "ema",
    "method.target_layers": [],
    "method.target_combine": "concat",
    "method.target_norm": "layer",
    "method.masks_per_image": 1,
    "method.position_noise": 0.0,
    "method.context_weight": 0.0,
    "method.context_warmup": 0.15,
    "method.sigreg_weight": 0.0,
    "method.sigreg_directions": 512,
    "method.variance_weight": 0.0,
    "method.regularized": "images",
    "method.negatives": "image",
    "method.duplicate_cosine": 0.0,
    "method.modality_masks": "independent",
    "optimizer.clip_norm": 0.0,
    "optimizer.cosine_share": 1.0,
    "optimizer.lr_rules": [[".*", 1.0]],
    "optimizer.peak_in_warmup": False,
    "optimizer.per_epoch": False,
    "optimizer.steps_ahead": 0,
    "init_from": "",
    "wandb.project": "",
    "wandb.entity": "",
    "wandb.name": "",
    "extensions": [],
}
# Key of config.json: what identifies the training images; absent where weights were imported
# without images
IMAGES = "training_images"
FOLLOWERS = {"optimizer.warmup_epochs"}  # options that follow the epochs unless set
VISIBILITY_TIMEOUT = 90.0  # seconds until a network file system shows a new file to other hosts


def check(
    workdir: buckets.Pathname,
    config: dict[str, Any],
    data: dict[str, Any] | None,
    allowed: Collection[str] = (),
) -> None:
    """Check that `workdir` is not that of a run with another config or data; nothing is written.

    Args:
      workdir: of the run; it need not exist.
      config: a nested dict of plain values.
      data: a flat dict that identifies the training images; None: not known yet.
      allowed: more keys that may differ.

    Raises:
      UserError: listing the keys that differ, and ways to go on; or what is lacking for a bucket.
    """
    check_bucket(workdir)
    path = buckets.path(workdir, "config.json")
    if not path.is_file():
        return
    known = json.loads(path.read_text())
    ours = _as_json(config, data if IMAGES in known else None)
    old = flatten_dict(known, sep=".", keep_empty_nodes=False)
    new = flatten_dict(ours, sep=".", keep_empty_nodes=False)
    differing = {}
    for key in sorted(old.keys() | new.keys()):
        before = old.get(key, FORMER.get(key, "absent"))
        after = new.get(key, FORMER.get(key, "absent"))
        if key == "data.range" and before == image_options.AUTO:  # imported, without images
            continue
        if before != after and key not in allowed and not HARMLESS.fullmatch(key):
            differing[key] = (before, after)
    if differing:
        listed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in differing.items())
        raise UserError(
            f"{workdir} is the run of another config ({listed}); "
            f"{_ways_on(workdir, differing, known)}"
        )


def _ways_on(
    workdir: buckets.Pathname, differing: dict[str, tuple[Any, Any]], known: dict[str, Any]
) -> str:
    """What may be meant by a command with another config, for the error message."""
    others = f"choose another --workdir, and --config.init_from={workdir} to start from its weights"
    keys = set(differing)
    lengths = keys & {"epochs", "total_steps"}
    if len(lengths) != 1 or keys - lengths - FOLLOWERS - {"extensions"}:
        return others
    key = lengths.pop()
    before, after = differing[key]
    if before and after and after > before:
        command = commands.line("extend", workdir, f"--{key}={after}")
        return f"to go on with it for longer: {command}; or {others}"
    if known.get("extensions"):
        return f"it was extended: --config.{key}={before} resumes it; or {others}"
    return others


def check_bucket(workdir: buckets.Pathname) -> None:
    """Check that a workdir in a bucket can be listed.

    Raises:
      UserError: what is lacking.
      BucketUnreachable: there is no network.
    """
    problem = buckets.problem(buckets.path(workdir))
    if problem:
        raise UserError(problem)


def stored_ranges(workdir: buckets.Pathname) -> dict[str, str] | None:
    """The range of the pixel values of a run, of each modality; None: there is no run.

    See data/pixel_range.py. A single modality has the name "".
    """
    path = buckets.path(workdir, "config.json")
    if buckets.problem(path.parent) or not path.is_file():
        return None
    stored = json.loads(path.read_text()).get("data", {})
    modalities = stored.get("modalities")
    if modalities:
        return {name: options["range"] for name, options in modalities.items()}
    return {"": stored.get("range", FORMER["data.range"])}


def check_outside_images(workdir: buckets.Pathname, data: ConfigDict) -> None:
    """Check that a run can be written there, and not into the folder of its images.

    Args:
      workdir: of the run.
      data: `config.data`.

    Raises:
      UserError: it would be; or it is neither a local folder nor one in a supported bucket.
    """
    folder = buckets.path(workdir)
    if isinstance(folder, buckets.BucketPath):
        return
    if not data.path or sources.kind(data) != "folder":
        return
    images = pathlib.Path(data.path).expanduser().resolve()
    if folder.resolve().is_relative_to(images):
        raise UserError(
            f"the run would be in {workdir}, inside the images in {data.path}; give --workdir=RUN "
            "elsewhere"
        )


def check_compilation_cache(environment: Mapping[str, str]) -> None:
    """Check that programs can be written where JAX_COMPILATION_CACHE_DIR says.

    Args:
      environment: such as os.environ.

    Raises:
      UserError: they cannot.
    """
    folder = environment.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder or isinstance(buckets.path(folder), buckets.BucketPath):
        return
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"JAX_COMPILATION_CACHE_DIR={folder} cannot be written: {error.strerror}; name another "
            "folder, or unset it"
        ) from error


def claim(workdir: buckets.Pathname, config: dict[str, Any], data: dict[str, Any] | None) -> None:
    """Check again, and write config.json, unless it exists. The arguments are those of `check`.

    Raises:
      UserError: see `check`; or naming processes that do not see the same folder.
    """
    path = buckets.path(workdir, "config.json")

    def check_and_write() -> None:
        check(workdir, config, data)
        _write_config(path, config, data)
        if isinstance(path, pathlib.Path):
            atomic_io.remove_leftovers(path.parent)

    multihost.decide(check_and_write)
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    seen = multihost.gather_json([socket.gethostname(), path.exists()])
    blind = [f"process {i} (host {host})" for i, (host, found) in enumerate(seen) if not found]
    if blind:
        raise UserError(
            f"{workdir} is not the same folder on all hosts: {', '.join(blind)} finds no "
            f"{path.name} there"
        )


def _write_config(path: buckets.Path, config: dict[str, Any], data: dict[str, Any] | None) -> None:
    """Write config.json, unless it exists; add what identifies the images, if it is missing."""
    if not path.exists():
        log.info("new run in %s", path.parent)
    elif data and IMAGES not in json.loads(path.read_text()):
        log.info("training images are added to the run in %s", path.parent)
    else:
        return
    atomic_io.write(path, json.dumps(_as_json(config, data), indent=2) + "\n")


def _as_json(config: dict[str, Any], data: dict[str, Any] | None) -> dict[str, Any]:
    """The content of config.json as JSON returns it: tuples become lists."""
    content = dict(config)
    if data:
        content[IMAGES] = data
    return json.loads(json.dumps(content))


def set_xla_flags(
    config: ConfigDict, workdir: buckets.Pathname, coordinator: str = "", process: int = 0
) -> list[str]:
    """Set XLA's flags as a recipe asks for. Call it before jax looks for devices.

    Args:
      config: the recipe.
      workdir: of the run, which keeps XLA's choice of kernels.
      coordinator: host and port of the first of several processes; "": found by `multihost.detect`.
      process: the number of this process; 0 keeps XLA's choice of kernels.

    Returns:
      Lines for the log.

    Raises:
      UserError: an unknown value of `xla_flags`, or see `multihost.detect`.
    """
    lines = gpu_kernels.pin(workdir, process)
    if config.deterministic and multihost.visible_gpus():
        xla_flags.add("XLA_FLAGS", [f"--{xla_flags.DETERMINISTIC}=true"])
    several = bool(coordinator) or multihost.detect(os.environ) is not None
    lines += xla_flags.set_for_run(
        config.xla_flags,
        gpus=multihost.visible_gpus(),
        tpu=multihost.visible_tpu_chips() > 0,
        several=several,
    )
    return lines
