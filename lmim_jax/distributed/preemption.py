"""SIGTERM and SIGUSR1: the machine is about to be taken away. Save, and end with exit code 75."""

import logging
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(RuntimeError):
    """The run was asked to stop, and has saved its state; the message names the step."""


class EvaluationInterrupted(RuntimeError):
    """An evaluation was cut short by a signal; the run saves and stops."""


class PreemptionHandler:
    """Listens for the signals, in a `with` block.

    One process: a flag. Several: whichever hears SIGTERM tells jax's coordination service, which chooses a step that
    all processes can still reach; SIGUSR1 is passed on as SIGTERM, whose handler is the service's own.
    """

    def __init__(self):
        self._name, self._old = None, {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # a notebook's or a test's thread: Python hands signals to the main thread only
        if jax.process_count() == 1:
            self._old = {number: signal.signal(number, self._hear) for number in SIGNALS}
        else:
            pass_on = lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)
            self._old = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, pass_on)}
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _hear(self, number, frame):
        del frame
        self._name = signal.Signals(number).name
        log.warning("%s received: saving, then stopping with exit code %d", self._name, EXIT_CODE)

    def should_stop(self, step):
        """Whether to stop after `step`; to be asked after every step, by every process."""
        if jax.process_count() == 1:
            return self._name is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def received(self):
        """Whether this process itself has received a signal."""
        return self._name is not None

    def raise_if_received(self):
        """Raise EvaluationInterrupted during an evaluation (one process; several must first agree, at the next step)."""
        if self._name:
            raise EvaluationInterrupted(self._name)
