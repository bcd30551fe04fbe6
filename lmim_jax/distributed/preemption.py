"""Preemption: on a signal a run saves a checkpoint and exits with code 75.

The signals are SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone). Ctrl-C after a
first signal aborts at once.
"""

import logging
import os
import signal
import threading
import time
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from lmim_jax.utils.subprocess import STOP_SIGNALS

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL: running the same command later resumes
SAME_PRESS = 0.1  # seconds within which a second SIGINT is the first, passed on by a parent process


class Preempted(RuntimeError):
    """A run was asked to stop and has saved its state; the message names the step."""


class Interrupted(RuntimeError):
    """A signal arrived during an evaluation or a wait, which is cut short for the run to save."""


class PreemptionHandler:
    """Listens for the signals, as a context manager.

    A single process sets a flag. Of several, whichever receives SIGTERM notifies jax's coordination
    service, which chooses a moment that all processes can still reach: they count how often they
    have asked. Other signals are passed on as SIGTERM, whose handler is that of the service.

    Until `begin` is called there is nothing to save, and a single process stops at once.
    """

    def __init__(self) -> None:
        """Create a handler that does not listen yet."""
        self._received_at: float | None = None
        self._from_keyboard = False
        self._begun = False
        self._ignored = False
        self._agreed = False  # with the other processes, to stop
        self._questions = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Start listening, if this is the main thread: Python delivers signals to no other.

        A signal that is ignored stays so: nohup ignores SIGHUP.
        """
        if threading.current_thread() is not threading.main_thread():
            return self  # in a notebook or a test
        for number in STOP_SIGNALS:
            if number == signal.SIGTERM and jax.process_count() > 1:
                continue
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on, there is a state to be saved."""
        self._begun = True

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        if not self._begun and jax.process_count() == 1:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Preempted(f"{signal.Signals(number).name} received before training began")
        now = time.monotonic()
        if self._received_at is not None:
            pressed_again = number == signal.SIGINT and now - self._received_at > SAME_PRESS
            if pressed_again or self._ignored:
                raise KeyboardInterrupt
            return
        self._received_at = now
        self._from_keyboard = number == signal.SIGINT
        hint = ""
        if number == signal.SIGINT:
            hint = "; once more aborts at once"
        name = signal.Signals(number).name
        log.warning("%s received: saving, then stopping with exit code %d%s", name, EXIT_CODE, hint)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def from_keyboard(self) -> bool:
        """Whether the user of a single process has pressed Ctrl-C: there is time for results."""
        return self._from_keyboard and jax.process_count() == 1

    def ignore_signals(self) -> None:
        """Ignore the signal that was received; another one raises KeyboardInterrupt."""
        self._ignored = True

    def should_stop(self) -> bool:
        """Whether to stop; every process must ask at the same points of the program."""
        if self._ignored:
            return False
        if jax.process_count() == 1:
            return self._received_at is not None
        if not self._agreed:
            self._questions += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._questions)
        return self._agreed

    def check(self) -> None:
        """Cut an evaluation short when a signal has arrived; asks as `should_stop` does.

        Raises:
          Interrupted: the processes stop here.
        """
        if self.should_stop():
            raise Interrupted

    def check_alone(self) -> None:
        """The same while this process waits for something on its own; nothing if there are several.

        Several must first agree.

        Raises:
          Interrupted: a signal has arrived.
        """
        if jax.process_count() == 1:
            self.check()
