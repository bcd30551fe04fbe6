"""A working directory belongs to one config, one dataset, and one writer at a time."""

import json
import logging
import os
import pathlib
import re
import shutil
import socket
import time

import jax
from flax.traverse_util import flatten_dict

from lmim_jax.distributed import multihost
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they change no number of the training.
HARMLESS = re.compile(
    r"log_every|gauge_images|checkpoint_\w+|evaluators\..*|max_skipped|mesh\..*|remat|scan_layers"
    r"|data\.(path|dir|classes|test_split|workers|threads|timeout|max_bad_fraction)"
)
IMAGES = "training_images"  # key of config.json: what identifies them; absent in a run made of imported weights alone
UNSEEN = 90.0  # seconds that a network file system may take to show a new file to other hosts


def check(workdir, config, data):
    """Raise a UserError if `workdir` is that of a run with another config or other data; nothing is written.

    Args:
      config: plain nested dict. data: flat dict that identifies the training images; None: not known yet.

    The error lists the keys that differ.
    """
    path = pathlib.Path(workdir, "config.json")
    if not path.exists():
        return
    known = json.loads(path.read_text())
    ours = _as_read(config, data if IMAGES in known else None)
    flat = [flatten_dict(x, sep=".", keep_empty_nodes=False) for x in (known, ours)]
    keys = sorted(key for key in flat[0].keys() | flat[1].keys() if not HARMLESS.fullmatch(key))
    old, new = ([side.get(key, "absent") for key in keys] for side in flat)
    differing = [f"{key} {a} -> {b}" for key, a, b in zip(keys, old, new, strict=True) if a != b]
    if differing:
        raise UserError(
            f"{workdir} is the run of another config ({', '.join(differing)}); choose another --workdir"
        )


def claim(workdir, config, data):
    """Make `workdir` the directory of a run with this config and these data, unless it is already; see `check`.

    Raises:
      UserError: naming processes that do not see the same folder.
    """
    path = pathlib.Path(workdir, "config.json")
    if jax.process_index() == 0 and (
        not path.exists() or (data and IMAGES not in json.loads(path.read_text()))
    ):
        log.info(
            "new run in %s" if not path.exists() else "the images are new to the run in %s", workdir
        )
        atomic_io.write(path, json.dumps(_as_read(config, data), indent=2) + "\n")
    multihost.gather_json("written")
    deadline = time.monotonic() + UNSEEN
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    seen = multihost.gather_json([socket.gethostname(), path.exists()])
    if blind := [f"process {i} (host {host})" for i, (host, found) in enumerate(seen) if not found]:
        raise UserError(
            f"{workdir} is not the same folder on all hosts: {', '.join(blind)} finds no {path.name} there"
        )


def _as_read(config, data):
    """The content of config.json, as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps({**config, **({IMAGES: data} if data else {})}))


def pin_kernels(workdir, deterministic):
    """On NVIDIA GPUs, keep XLA's choice of kernels with the run, so that a restart computes the same program.

    XLA times several kernels for an operation when it compiles, and may choose another one next time, whose sums are
    rounded otherwise. To be called before jax looks for devices; works through the environment variable XLA_FLAGS.

    Args:
      deterministic: also leave out kernels whose sums depend on timing.
    """
    if not shutil.which("nvidia-smi"):
        return
    rank = os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    path = pathlib.Path(workdir).absolute() / f"gpu_kernels_{rank}.textproto"
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [
        f"--xla_gpu_{'load_autotune_results_from' if path.exists() else 'dump_autotune_results_to'}={path}"
    ]
    flags += ["--xla_gpu_exclude_nondeterministic_ops=true"] if deterministic else []
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
