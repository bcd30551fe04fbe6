"""Metrics and pictures in Weights & Biases, beside TensorBoard; off unless a project is given.

Nothing that goes wrong there ends or delays the training for long: it is logged once.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from lmim_jax.utils import atomic_io, buckets
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

RUN_FILE = "wandb.json"  # in the workdir: which run of Weights & Biases it is
TIMEOUT = 60.0  # seconds that logging in, starting, and the last upload may take, each


def check(options: ConfigDict) -> None:
    """Raise a UserError if W&B is asked for and its package is missing.

    Args:
      options: `config.wandb`.
    """
    if not options.project:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"config.wandb.project={options.project} needs the package wandb ({error}): "
            "pip install 'lmim_jax[wandb]'"
        ) from error


class WandbWriter:
    """Writes to one run of Weights & Biases, which a resumed training continues."""

    def __init__(self, workdir: buckets.Path, options: ConfigDict) -> None:
        """Start or continue the run; if that fails, nothing is written.

        Args:
          workdir: of the run; the files of W&B are in it, unless it is in a bucket.
          options: `config.wandb`, with a project.
        """
        self._run: Any = None
        self._failed = False
        self._attempt(functools.partial(self._start, workdir, options))

    def _start(self, workdir: buckets.Path, options: ConfigDict) -> None:
        import wandb

        path = workdir / RUN_FILE
        known = json.loads(path.read_text()) if path.is_file() else {}
        local = workdir if isinstance(workdir, pathlib.Path) else None
        run = wandb.init(
            project=known.get("project", options.project),
            entity=known.get("entity", options.entity) or None,
            name=options.name or workdir.name,
            id=known.get("id"),
            resume="allow",
            dir=local,
            settings=wandb.Settings(
                login_timeout=TIMEOUT,
                init_timeout=TIMEOUT,
                finish_timeout=TIMEOUT,
                console="off",
                quiet=True,
            ),
        )
        if not known:
            known = {"id": run.id, "project": run.project, "entity": run.entity or options.entity}
            atomic_io.write(path, json.dumps(known, indent=2) + "\n")
        self._run = run
        place = run.url
        if run.offline:
            place = f"offline; later: wandb sync {pathlib.Path(run.dir).parent}"
        log.info("Weights & Biases: %s", place)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Set the config of the run, of plain values."""
        self._attempt(lambda: self._run.config.update(dict(config), allow_val_change=True))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by tag; those of steps before the last one that W&B has are ignored there.

        A resumed run computes the same values again.
        """
        self._attempt(lambda: self._run.log(dict(values), step=step))

    def write_pictures(self, step: int, pictures: Mapping[str, UInt8[np.ndarray, "H W 3"]]) -> None:
        """Write pictures by tag."""

        def log_pictures() -> None:
            import wandb

            images = {tag: wandb.Image(np.asarray(x)) for tag, x in pictures.items()}
            self._run.log(images, step=step)

        self._attempt(log_pictures)

    def close(self) -> None:
        """End the run, and wait for its upload, but not for long."""
        self._attempt(lambda: self._run.finish())

    def _attempt(self, action: Callable[[], None]) -> None:
        """Call W&B; after the first failure, nothing is written any more."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # of its own, of the network, of its service
            log.error(
                "Weights & Biases has failed, and the training goes on without it: %s",
                " ".join(str(error).split()) or type(error).__name__,
            )
            self._failed = True


def open_writer(workdir: buckets.Path, options: ConfigDict) -> WandbWriter | None:
    """The writer of a run; None if it is off."""
    if not options.project:
        return None
    return WandbWriter(workdir, options)
