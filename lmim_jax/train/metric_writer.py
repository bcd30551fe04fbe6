"""Writes metrics and pictures: metrics.jsonl, TensorBoard, PNG files, and Weights & Biases.

A full disk delays them and does not stop training.
"""

import importlib.util
import io
import json
import logging
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.data.folder_listing import ENCODING
from lmim_jax.distributed import multihost
from lmim_jax.train import metric_storage, wandb_writer
from lmim_jax.utils import buckets, commands
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

# TensorBoard shows the tags of one prefix together; the first pattern for a whole name decides
PREFIXES = (
    (r".*/.*", "eval"),
    (r"collapse_index|effective_rank|feature_std|similarity_.*", "collapse"),
    (r"sigreg|sigreg_gauge|variance_hinge", "collapse"),
    (r"images_per_second|seconds_per_step|wall_seconds", "speed"),
    (r".*", "train"),
)


def board_tag(name: str) -> str:
    """TensorBoard's tag for a metric or a picture: its name in metrics.jsonl, with a prefix."""
    for pattern, prefix in PREFIXES:
        if re.fullmatch(pattern, name):
            return f"{prefix}/{name}"
    raise AssertionError(name)


class MetricWriter:
    """Writes to a run's working directory, on the first process only.

    Attributes:
      wall_seconds: how long the run had taken before this start.
    """

    wall_seconds: float

    def __init__(
        self, workdir: buckets.Pathname, start: int, wandb_options: ConfigDict | None = None
    ) -> None:
        """Open the writers.

        Args:
          workdir: of the run.
          start: the step to continue from; lines of later steps (of a killed run) are dropped.
          wandb_options: `config.wandb`; None: without Weights & Biases.
        """
        self._workdir = buckets.path(workdir)
        self._storage = metric_storage.open_storage(workdir)
        self._start = start
        self._is_first_process = jax.process_index() == 0
        self._pending = b""  # lines that are not written yet
        self._board: Any = None  # TensorBoard's writer
        self._wandb: wandb_writer.WandbWriter | None = None
        if self._is_first_process and wandb_options:
            self._wandb = wandb_writer.open_writer(self._workdir, wandb_options)
        self._failing = False
        self._evaluated: set[str] = set()
        self.names: set[str] = set()  # of all metrics up to the start, and written since
        self.wall_seconds = 0.0
        for values in multihost.decide(self._keep_lines_until_start):
            self.wall_seconds = max(self.wall_seconds, values.get("wall_seconds", 0.0))
            self.names |= values.keys()
            if values["step"] == self._start:
                self._evaluated |= {name.split("/")[0] for name in values if "/" in name}

    def _keep_lines_until_start(self) -> list[dict[str, Any]]:
        """Drop lines of steps after the start; return the others."""
        return [json.loads(line) for line in self._storage.keep_lines(self._start)]

    @property
    def board_command(self) -> str:
        """The command that shows the curves in TensorBoard, which may have to be installed."""
        program = commands.called(pathlib.Path(sys.executable).with_name("tensorboard"))
        folder = self._workdir / metric_storage.BOARD_FOLDER
        command = shlex.join([program, f"--logdir={folder}"])
        if importlib.util.find_spec("tensorboard"):
            return command
        return f"{shlex.quote(commands.python())} -m pip install tensorboard && {command}"

    def has_evaluation(self, title: str) -> bool:
        """Whether the evaluation of that title was written at the step this writer starts from."""
        return title in self._evaluated

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line {"step": ..., name: value, ...}; nothing where there are no values."""
        self.names |= values.keys()
        if not self._is_first_process or not values:
            return
        from tensorboardX.summary import scalar

        self._pending += json.dumps({"step": step, **values}).encode() + b"\n"
        summaries = [scalar(board_tag(name), value) for name, value in values.items()]
        self._attempt([self._append, lambda: self._write_events(step, summaries)])
        if self._wandb:
            self._wandb.write(step, {board_tag(name): value for name, value in values.items()})

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Show a config as a text in TensorBoard, and as that of the run in Weights & Biases.

        Args:
          config: plain values.
        """
        if not self._is_first_process:
            return
        from tensorboardX.summary import text

        lines = json.dumps(config, indent=2).splitlines()
        code = "\n".join(f"    {line}" for line in lines)  # Markdown for a block of code
        self._attempt([lambda: self._write_events(self._start, [text("config", code)])])
        if self._wandb:
            self._wandb.write_config(config)

    def write_failure(self, step: int, title: str, reason: str) -> None:
        """Write a line {"step": ..., "failed": {title: reason}} about an evaluation."""
        if not self._is_first_process:
            return
        self._pending += json.dumps({"step": step, "failed": {title: reason}}).encode() + b"\n"
        self._attempt([self._append])

    def write_pictures(
        self, step: int, pictures: Mapping[str, UInt8[np.ndarray, "H W 3"] | str]
    ) -> None:
        """Write pictures and tables, see `write_picture`, and the pictures to TensorBoard."""
        if not self._is_first_process or not pictures:
            return
        from tensorboardX.summary import image

        def write_files(name: str) -> None:
            write_picture(self._workdir, f"{name}_{step:07d}", pictures[name])

        summaries = []
        for name, picture in pictures.items():
            if not isinstance(picture, str):
                summaries.append(image(board_tag(name), picture, dataformats="HWC"))
        actions = [lambda name=name: write_files(name) for name in pictures]
        self._attempt([*actions, lambda: self._write_events(step, summaries)])
        if self._wandb:
            tagged = {}
            for name, picture in pictures.items():
                if not isinstance(picture, str):
                    tagged[board_tag(name)] = picture
            self._wandb.write_pictures(step, tagged)

    def close(self) -> None:
        """Write what is still pending, and close.

        Raises:
          UserError: it still cannot be written.
        """
        try:
            if self._pending:
                self._append()
            if self._board:
                self._attempt([self._board.close])
            self._storage.close()
            if self._wandb:
                self._wandb.close()
        except OSError as error:
            raise UserError(
                f"{self._workdir / metric_storage.NAME}: its last lines cannot be written "
                f"({error}); mend that, and run the command again"
            ) from error

    def flush(self) -> None:
        """Write what was kept back so far, before the state is saved."""
        if self._is_first_process:
            rest = [self._append] if self._pending else []
            self._attempt([*rest, self._storage.flush])

    def _attempt(self, actions: Iterable[Callable[[], None]]) -> None:
        """Run each action; the first of several failures in a row is logged."""
        failed = False
        for action in actions:
            try:
                action()
            except OSError as error:
                self._board = None
                failed = True
                if not self._failing:
                    log.error(
                        "cannot write to %s (%s): metrics are kept in memory, and written later",
                        self._workdir,
                        error,
                    )
                self._failing = True
        self._failing = failed

    def _append(self) -> None:
        """Append all pending lines, or none of them."""
        self._storage.append(self._pending)
        self._pending = b""

    def _write_events(self, step: int, summaries: Iterable[Any]) -> None:
        """Write to TensorBoard, without tensorboardX's thread, which would hang on a full disk."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if not self._board:
            folder = self._storage.board_folder
            folder.mkdir(parents=True, exist_ok=True)
            self._board = EventsWriter(str(folder / "events"))
            # Makes TensorBoard discard what it has read of later steps
            restart = SessionLog(status=SessionLog.START)
            event = Event(wall_time=time.time(), step=self._start + 1, session_log=restart)
            self._board.write_event(event)
        for summary in summaries:
            self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._board.flush()


def read_metrics(workdir: buckets.Pathname) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = buckets.path(workdir, metric_storage.NAME)
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_picture(
    workdir: buckets.Pathname, name: str, picture: UInt8[np.ndarray, "H W 3"] | str
) -> None:
    """Write a picture to workdir/pictures/NAME.png, or a table to workdir/tables/NAME.csv.

    Each "/" of the name becomes "_".
    """
    name = name.replace("/", "_")
    if isinstance(picture, str):
        folder = buckets.path(workdir, "tables")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.csv").write_bytes(picture.encode(*ENCODING))
        return
    folder = buckets.path(workdir, "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(file, "png", optimize=True)
    (folder / f"{name}.png").write_bytes(file.getvalue())
