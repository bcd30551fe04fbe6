"""What `lmim train DIR` chooses by the images and the machine: resolution, encoder, batch, length.

Choices are values of the config of configs/own.py; those that the user gave are kept. Each has a
reason, and the option that changes it.
"""

import dataclasses
import functools
import logging
import math
import os
import pathlib
import shlex
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmim_jax.configs import own
from lmim_jax.data import loader, pixel_range, sources, tfds_source
from lmim_jax.data.prefetch import PREFETCH_BATCHES
from lmim_jax.data.samples import read_header
from lmim_jax.distributed import multihost, sharding
from lmim_jax.methods import base as methods
from lmim_jax.perf import aot
from lmim_jax.utils import faults, progress
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration

SAMPLED = 64  # images whose size is read
# Names of folders with test images, by preference
TEST_NAMES = ("test", "val", "valid", "validation", "testing")
# (short side of the images in pixels up to which, side of a patch, patches along a side), on CPUs
# and on accelerators
CPU_GRIDS = ((47, 4, 8), (math.inf, 8, 8))
ACCELERATOR_GRIDS = ((47, 4, 8), (95, 8, 8), (159, 8, 14), (math.inf, 16, 14))
CROP_SHARE = 1.25  # a training crop is so much larger than the grid: the gaps between patches
VISIBLE_SHARE = 10 / 64  # of the patches
# (images up to which, size of own.sizes()), on accelerators; on CPUs the smallest
SIZES = ((20_000, "ti"), (500_000, "s"), (math.inf, "b"))
MOST_IMAGES = {"cpu": 128}  # of a batch, by platform
MOST_IMAGES_ELSEWHERE = 1024
FEWEST_IMAGES = 16
STEPS_PER_EPOCH = 8  # at least, unless the batch would have fewer than FEWEST_IMAGES
# Images of a micro-batch on CPUs, from and to: fewer are slow, and more do not fit the cache
CPU_MICRO_BATCH = (8, 32)
CPU_MEMORY_SHARE = 0.5  # of the memory of the machine
GPU_MEMORY_SHARE = 0.9  # of what jax takes, as the estimate knows nothing of what the compiler adds
CPU_HOURS = 0.07
ACCELERATOR_HOURS = 1.0
MOST_EPOCHS = 800  # the paper's
WARMUP_SHARE = 0.1
EVALUATIONS = 2  # in the run, besides that at its start
LINE_SECONDS = 10.0  # between lines of metrics
CHECKPOINT_SECONDS = 120.0
LINES = 20  # of metrics, and SAVES checkpoints, where the speed is not known
SAVES = 4
MEASURED_SECONDS = 5.0
FILLED = PREFETCH_BATCHES + 2  # steps whose batches were decoded while the step was compiled

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A line of the list of choices.

    Attributes:
      what: is chosen.
      value: in words.
      reason: why.
      options: which change it, as typed, with their values.
    """

    what: str
    value: str
    reason: str
    options: str


class Chooser:
    """Fills in the config of a run.

    Attributes:
      config: it is changed in place.
      choices: what was chosen so far.
    """

    def __init__(self, config: ConfigDict, given: Collection[str]) -> None:
        """Start.

        Args:
          config: that of configs/own.py, with the options of the command line.
          given: dotted names of the options of the command line, which are kept.
        """
        self.config = config
        self.choices: list[Choice] = []
        self._given = given
        self._platform = jax.default_backend()
        self._on_cpu = self._platform == "cpu"

    def set(self, values: Mapping[str, Any]) -> bool:
        """Set options by their dotted names, except for those that were given; whether any was."""
        kept = {key: value for key, value in values.items() if key not in self._given}
        self.config.update_from_flattened_dict(kept)
        return bool(kept)

    def choose(self) -> None:
        """Choose everything.

        Raises:
          UserError: there are no images, or a given option does not fit them.
        """
        self._choose_splits()
        splits = sources.open_splits(self.config.data)
        images = len(splits["train"])
        pixel_range.resolve(self.config.data, splits["train"])
        sides = image_sides(splits["train"])
        self._choose_resolution(sides)
        self._choose_encoder(images)
        mesh = sharding.make_mesh(self.config.mesh.data, self.config.mesh.fsdp)
        self._choose_batch(images, mesh)
        if "epochs" in self._given or "total_steps" in self._given:
            self._choose_intervals(images, 0.0)
            return
        speed = measure_images_per_second(self.config, splits["train"], mesh)
        speed = multihost.gather_json(speed)[0]  # the same for all processes
        self._choose_length(images, speed)
        self._choose_intervals(images, speed)

    def _add(self, what: str, value: str, reason: str, *options: str) -> None:
        """Note a choice; `options` are dotted names."""
        values = self.config.to_dict()
        flags = []
        for option in options:
            chosen = values
            for key in option.split("."):
                chosen = chosen[key]
            name = "hours" if option == "hours" else f"config.{option}"
            flags.append(shlex.quote(f"--{name}={chosen}"))
        self.choices.append(Choice(what, value, reason, " ".join(flags)))

    def _choose_splits(self) -> None:
        root = pathlib.Path(self.config.data.path).expanduser()
        if not self.config.data.path or not root.is_dir():
            return  # another source, or an error when it is opened
        folders: dict[str, str] = {}
        dataset = tfds_source.find_version(root)
        if dataset is not None:
            folders = {name.lower(): name for name in tfds_source.split_names(dataset)}
        else:
            for path in sorted(root.iterdir()):
                if path.is_dir():
                    folders.setdefault(path.name.lower(), path.name)
        train = folders.get("train") or folders.get("training")
        if train is None:
            return
        tests = [folders[name] for name in TEST_NAMES if name in folders]
        test = tests[0] if tests else ""
        if not self.set({"data.train_split": train, "data.test_split": test}):
            return
        if not test:
            return
        reason = "test images"
        if len(tests) > 1:
            reason = f"test images; {', '.join(tests[1:])}/ found and not used"
        self._add("splits", f"{train}/ and {test}/", reason, "data.test_split")

    def _choose_resolution(self, sides: np.ndarray) -> None:
        short = float(np.median(sides.min(axis=1)))
        grids = CPU_GRIDS if self._on_cpu else ACCELERATOR_GRIDS
        patch, cells = next((patch, cells) for limit, patch, cells in grids if short <= limit)
        side = patch * cells
        crop = round(CROP_SHARE * side)
        canvas = min(2 * crop, round(float(np.percentile(sides.max(axis=1), 90))))
        chosen = self.set(
            {
                "method.patch_size": patch,
                "method.grid": (cells, cells),
                "method.gap": (crop - side) // cells,
                "method.num_visible": round(VISIBLE_SHARE * cells * cells),
                "augment.eval_resize": side if short <= side else round(side * 256 / 224),
                "data.canvas": max(canvas, side),
                "method.dtype": "float32" if self._on_cpu else "bfloat16",
            }
        )
        if chosen:
            self._add(
                "resolution",
                f"{side} pixels: {cells} x {cells} patches of {patch}",
                f"the short side of the images is {short:.0f} (median), on {self._platform}",
                "method.grid",
                "method.patch_size",
            )
            self._add("precision", self.config.method.dtype, f"on {self._platform}", "method.dtype")

    def _choose_encoder(self, images: int) -> None:
        name = "mini"
        if not self._on_cpu:
            name = next(name for limit, name in SIZES if images <= limit)
        size = own.sizes()[name]
        options = {f"method.{key}": value for key, value in size["method"].items()}
        if self.set({**options, "optimizer.base_lr": size["base_lr"]}):
            method = self.config.method
            self._add(
                "encoder",
                f"{name}: {method.width} wide, {method.depth} deep",
                f"{images:,} training images on {self._platform}",
                "method.width",
                "method.depth",
                "method.heads",
            )

    def _choose_batch(self, images: int, mesh: Mesh) -> None:
        """The largest batch that gives enough steps, in as many parts as the memory requires."""
        wanted = max(images // STEPS_PER_EPOCH, min(FEWEST_IMAGES, images))
        most = MOST_IMAGES.get(self._platform, MOST_IMAGES_ELSEWHERE)
        of_device = max(min(wanted, most) // mesh.size, 1)
        self.set({"batch_size": mesh.size * 2 ** int(math.log2(of_device))})
        batch = self.config.batch_size
        if batch > images:
            raise UserError(
                f"config.batch_size={batch} is more than the {images} training images; give "
                f"at most --config.batch_size={images}"
            )
        limit = memory_limit()
        for parts in self._parts_to_try(max(1, batch // mesh.size)):
            self.set({"micro_batches": parts})
            needed = needed_bytes(self.config, images, mesh.size)
            if needed <= limit:
                break
        if needed > limit:
            log.warning(
                "the planner's estimate of memory, %.1f GB, is more than there is, %.1f GB",
                needed / 1e9,
                limit / 1e9,
            )
        value = f"{batch} images a step"
        if self.config.micro_batches > 1:
            value += f", in {self.config.micro_batches} parts"
        reason = f"{images:,} images; {needed / 1e9:.1f} of {limit / 1e9:.0f} GB (estimate)"
        self._add("batch", value, reason, "batch_size", "micro_batches")

    def _parts_to_try(self, rows: int) -> list[int]:
        """Numbers of micro-batches of `rows` images, small to large; on CPUs those of a cache."""
        if "micro_batches" in self._given:
            return [self.config.micro_batches]
        method = self.config.method
        if methods.method_class(method.name).needs_whole_batch(method):
            return [1]
        parts = _divisors(rows)
        smallest, largest = CPU_MICRO_BATCH
        cached = [number for number in parts if smallest <= rows // number <= largest]
        if self._on_cpu and cached:
            return parts[parts.index(cached[0]) :]
        return parts

    def _choose_length(self, images: int, images_per_second: float) -> None:
        config = self.config
        hours = config.hours or (CPU_HOURS if self._on_cpu else ACCELERATOR_HOURS)
        steps = images // config.batch_size  # of an epoch
        affordable = 3600 * hours * images_per_second / (steps * config.batch_size)
        self.set({"hours": hours, "epochs": max(1, min(MOST_EPOCHS, int(affordable)))})
        total = config.epochs * steps
        seconds = duration(total * config.batch_size / images_per_second)
        reason = f"{seconds} at {images_per_second:.0f} images/s (measured)"
        if config.epochs == MOST_EPOCHS:
            reason += f"; never more than {MOST_EPOCHS} epochs"
        self._add("length", f"{config.epochs} epochs, {total:,} steps", reason, "hours", "epochs")

    def _choose_intervals(self, images: int, images_per_second: float) -> None:
        """How often to log, save and evaluate; without a known speed, by the number of steps."""
        config = self.config
        steps = images // config.batch_size  # of an epoch
        total = config.total_steps or config.epochs * steps
        line = total / LINES
        save = total / SAVES
        if images_per_second:
            line = LINE_SECONDS * images_per_second / config.batch_size
            save = CHECKPOINT_SECONDS * images_per_second / config.batch_size
        values = {
            "optimizer.warmup_epochs": WARMUP_SHARE * config.epochs,
            "log_every": max(1, min(total, round(line))),
            "checkpoint_every": max(1, min(total, round(save))),
        }
        for title, section in config.evaluators.items():
            if isinstance(section, ConfigDict) and section.every:
                values[f"evaluators.{title}.every"] = total / steps / EVALUATIONS
        self.set(values)


def image_sides(source: sources.Source) -> np.ndarray:
    """Height and width of some images, int [K, 2], from their headers.

    Raises:
      UserError: none of them can be read.
    """
    sides = []
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        read = functools.partial(source.record, int(index))
        name = functools.partial(source.name, int(index))
        try:
            header = read_header(faults.retry(read, name, faults.RETRY_SECONDS)[0])
        except faults.ReadFailed:
            raise
        except Exception:  # of any type, on damaged data; reported when it is decoded
            continue
        sides.append((header.height, header.width))
    if not sides:
        raise UserError(f"none of {SAMPLED} sampled images can be read: {source.name(0)}, ...")
    return np.array(sides)


def device_memory() -> float:
    """Bytes of a device: a part of the machine's, or what jax takes of it; inf: not known."""
    if jax.default_backend() == "cpu":
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole / jax.local_device_count()
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def memory_limit() -> float:
    """Bytes that a run may use on a device."""
    share = CPU_MEMORY_SHARE if jax.default_backend() == "cpu" else GPU_MEMORY_SHARE
    return share * device_memory()


def needed_bytes(config: ConfigDict, images: int, devices: int) -> float:
    """The planner's estimate of what a run needs on a device, in bytes."""
    parts = aot.build_for_images(config, images)
    ahead = aot.BATCHES_AHEAD * aot.batch_bytes(parts, config.batch_size // devices)
    return aot.analyze(parts, devices).memory["needed"] + ahead


def measure_images_per_second(config: ConfigDict, source: sources.Source, mesh: Mesh) -> float:
    """Train a few steps on the images, as a run does, and forget them."""
    parts = aot.build_for_images(config, len(source))
    state, shardings = parts.create_state(mesh)
    step = parts.jit_train_step(mesh, shardings)
    batches = loader.training_batches(
        source,
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=10**9,
        start=0,
        mesh=mesh,
        crop=parts.host_crop,
    )
    start = 0.0
    done = 0
    log.info("measuring the speed with some steps ...")
    with progress.working("compiling the train step, to measure its speed"):
        for number, batch in enumerate(batches, 1):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            if number == FILLED:
                start = time.perf_counter()
            elif number > FILLED:
                done = number - FILLED
                if time.perf_counter() - start > MEASURED_SECONDS:
                    break
    return done * config.batch_size / (time.perf_counter() - start)


def _divisors(number: int) -> list[int]:
    """The divisors of a number, small to large."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def table(choices: list[Choice]) -> list[str]:
    """The choices as lines of text, each followed by the options that change it."""
    lines = []
    for choice in choices:
        lines.append(f"  {choice.what:<11} {choice.value}; {choice.reason}")
        lines.append(f"  {'':<11} {choice.options}")
    return lines
