"""Where numbers and pictures go: metrics.jsonl, TensorBoard, PNG files. A full disk delays them, and stops nothing."""

import json
import logging
import math
import pathlib
import time

import jax
import numpy as np
from PIL import Image

from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)


class Writer:
    """Writes below a run's working directory, on the first process only."""

    def __init__(self, workdir, start):
        """Open the writers; lines of steps after `start` (of a run that was killed) are dropped."""
        self._workdir, self._pending, self._board, self._failing = (
            pathlib.Path(workdir),
            b"",
            None,
            False,
        )
        self._first, self._purge = jax.process_index() == 0, start + 1
        self.wall_seconds = 0.0  # that the run had taken before this start
        self._path = self._workdir / "metrics.jsonl"
        self._titles = set()
        if self._path.exists():
            lines = [
                line for line in self._path.read_text().splitlines() if _step_of(line) <= start
            ]
            if self._first:
                atomic_io.write(self._path, "".join(line + "\n" for line in lines))
            for line in map(json.loads, lines):
                self.wall_seconds = max(self.wall_seconds, line.get("wall_seconds", 0.0))
                if line["step"] == start:
                    self._titles |= {name.split("/")[0] for name in line if "/" in name}

    def has(self, title):
        """Whether the evaluation of that title is already there for the step this writer started from."""
        return title in self._titles

    def write(self, step, values):
        """One line: {"step": ..., name: value, ...}; nothing where there are no values."""
        if not self._first or not values:
            return
        from tensorboardX.summary import scalar

        self._pending += json.dumps({"step": step, **values}).encode() + b"\n"
        self._try(
            (self._append,),
            (self._record, step, [scalar(name, value) for name, value in values.items()]),
        )

    def draw(self, step, pictures):
        """Pictures {name: uint8 [H, W, 3]} as workdir/pictures/NAME_STEP.png and in TensorBoard."""
        if not self._first or not pictures:
            return
        from tensorboardX.summary import image

        titles = {name: f"{name.rpartition('/')[2]}_{step:07d}" for name in pictures}
        summaries = [image(name, picture, dataformats="HWC") for name, picture in pictures.items()]
        drawn = [
            (write_picture, self._workdir, titles[name], picture)
            for name, picture in pictures.items()
        ]
        self._try(*drawn, (self._record, step, summaries))

    def close(self):
        """Write what is still pending, and close.

        Raises:
          UserError: there is still no room for it.
        """
        if self._pending:
            self._try((self._append,))
            if self._pending:
                raise UserError(
                    f"{self._path}: its last lines cannot be written; make room, and run the command again"
                )
        if self._board:
            self._try((self._board.close,))

    def _try(self, *acts):
        """Do each (function, arguments ...); failures in a row are told once, and numbers wait in memory."""
        failed = False
        for act, *args in acts:
            try:
                act(*args)
            except OSError as error:
                self._board, failed = None, True
                if not self._failing:
                    log.error(
                        "cannot write to %s (%s): metrics wait in memory, to be tried again",
                        self._workdir,
                        error,
                    )
                self._failing = True
        self._failing = failed

    def _append(self):
        """Append the pending lines, or none of them."""
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, 2)
            try:
                atomic_io.write_all(file, self._pending)
            except OSError:
                file.truncate(end)
                raise
        self._pending = b""

    def _record(self, step, summaries):
        """TensorBoard, without tensorboardX's thread, which would hang when the disk is full."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if not self._board:
            folder = self._workdir / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            self._board = EventsWriter(str(folder / "events"))
            # tell TensorBoard to forget what it knows of later steps
            restart = SessionLog(status=SessionLog.START)
            self._board.write_event(
                Event(wall_time=time.time(), step=self._purge, session_log=restart)
            )
        for summary in summaries:
            self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._board.flush()


def history(workdir):
    """All lines of a run's metrics.jsonl, a list of dicts."""
    path = pathlib.Path(workdir, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_picture(workdir, name, picture):
    """Write uint8 [H, W, 3] to workdir/pictures/name.png."""
    folder = pathlib.Path(workdir, "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(picture)).save(folder / f"{name}.png", optimize=True)


def _step_of(line):
    """The step of a metrics line; infinite for a line cut off by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
