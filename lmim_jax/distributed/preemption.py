"""Preemption: on SIGTERM or SIGUSR1 a run saves a checkpoint and exits with code 75."""

import logging
import os
import signal
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL: running the same command later resumes
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(RuntimeError):
    """A run was asked to stop and has saved its state; the message names the step."""


class EvaluationInterrupted(RuntimeError):
    """A signal arrived during an evaluation, which is cut short for the run to save and stop."""


class PreemptionHandler:
    """Listens for the signals, as a context manager.

    A single process sets a flag. Of several, whichever receives SIGTERM notifies jax's coordination
    service, which chooses a step that all processes can still reach. SIGUSR1 is passed on as
    SIGTERM, whose handler is that of the service.
    """

    def __init__(self) -> None:
        """Create a handler that does not listen yet."""
        self._signal_name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Start listening, if this is the main thread: Python delivers signals to no other."""
        if threading.current_thread() is not threading.main_thread():
            return self  # in a notebook or a test
        if jax.process_count() == 1:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        else:
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, _forward_as_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self._signal_name = signal.Signals(number).name
        log.warning(
            "%s received: saving, then stopping with exit code %d", self._signal_name, EXIT_CODE
        )

    def should_stop(self, step: int) -> bool:
        """Whether to stop after `step`; every process must call this after every step."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def received(self) -> bool:
        """Whether this process itself has received a signal."""
        return self._signal_name is not None

    def raise_if_received(self) -> None:
        """Cut an evaluation short when a signal has arrived.

        This is for a single process: several must first agree on a step, see `should_stop`.

        Raises:
          EvaluationInterrupted: a signal has arrived.
        """
        if self._signal_name:
            raise EvaluationInterrupted(self._signal_name)


def _forward_as_sigterm(number: int, frame: Any) -> None:
    del number, frame
    os.kill(os.getpid(), signal.SIGTERM)
