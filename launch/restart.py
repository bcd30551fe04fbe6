"""Runs a command, and again after an error or a crash: launch/restart.py N COMMAND [ARGUMENTS]

N: how many restarts in a row may find the run at the same step; 0: no restarts. The run counts them
itself, by its checkpoints (lmim_jax/train/restarts.py), and ends with exit code 2 when it gives up.
Starts that end within half an hour and before that, as where a library cannot be imported, are
counted here: a start that has come to count makes the file of LMIM_RESTART_MARK.
Not restarted: exit codes 0 (finished), 2 (a mistake of the user), 75 (it was asked to stop, and has
saved), 126 and 127 (no such program), 130 (Ctrl-C), and whatever follows a signal to this process,
which is passed on. The exit code is that of the last start, 128 + N after signal N; and 75 where a
request to stop found no start, or one that could not answer yet.

RESTART_PAUSE: seconds before a restart (10); they double up to 5 minutes while starts end within
half an hour. Needs nothing but Python.
"""

import contextlib
import datetime
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

FINAL = (0, 2, 75, 126, 127, 130)  # exit codes
STOPPED = 75
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LONGEST_PAUSE = 300.0  # seconds
SHORT = (
    1800.0  # seconds; a start that lasts longer resets the pause, and counts as one that trained
)


class Restarter:
    """Runs a command until it is done; signals are passed on, and end the restarts."""

    def __init__(self, limit, command):
        self._limit = limit
        self._command = command
        self._child = None
        self._signal = None  # the last one that was received
        self._stopped = threading.Event()

    def receive(self, number, _):
        """Pass a signal on to the command."""
        self._signal = number
        self._stopped.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def run(self):
        """Run the command; the exit code of its last start."""
        with tempfile.TemporaryDirectory(prefix="lmim_restart_") as folder:
            return self._run(pathlib.Path(folder, "mark"))

    def _run(self, mark):
        first_pause = float(os.environ.get("RESTART_PAUSE", "10"))
        pause = first_pause
        environment = dict(os.environ, LMIM_RESTARTS=str(self._limit), LMIM_RESTART="0")
        environment["LMIM_RESTART_MARK"] = str(mark)
        number = 0
        uncounted = 0
        while True:
            began = time.monotonic()
            code = self._start(environment)
            if code in FINAL or self._stopped.is_set() or not self._limit:
                return code
            uncounted += 1
            if mark.exists():
                uncounted = 0
                mark.unlink()
            if time.monotonic() - began > SHORT:
                pause = first_pause
                uncounted = 0
            reason = describe(code)
            if uncounted > self._limit:
                say(f"the run {reason}; given up: {uncounted} starts in a row never trained")
                return code
            number += 1
            say(f"the run {reason}; restart {number} in {pause:.0f} s")
            if self._stopped.wait(pause):
                return 130 if self._signal == signal.SIGINT else STOPPED
            pause = min(2 * pause, LONGEST_PAUSE)
            environment["LMIM_RESTART"] = str(number)
            environment["LMIM_RESTART_REASON"] = reason

    def _start(self, environment):
        try:
            self._child = subprocess.Popen(self._command, env=environment)
        except OSError as error:
            say(f"error: {error.filename}: {error.strerror}")
            return 127
        if self._stopped.is_set():  # a signal came while the child was made
            self._child.send_signal(self._signal)
        code = self._child.wait()
        if self._stopped.is_set() and code == -self._signal and code != -signal.SIGINT:
            return STOPPED  # it was not listening yet
        return code if code >= 0 else 128 - code


def describe(code):
    """How a start has ended."""
    if code > 128:
        with contextlib.suppress(ValueError):  # no such signal
            return f"was killed by signal {code - 128} ({signal.Signals(code - 128).name})"
    return f"ended with exit code {code}"


def say(text):
    """A line of the log, which may be gone."""
    with contextlib.suppress(OSError):
        print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def main(arguments):
    """Run the command of the arguments; its exit code."""
    if len(arguments) < 2 or not arguments[0].isdecimal():
        say("error: give the number of restarts and a command: launch/restart.py 5 COMMAND")
        return 2
    restarter = Restarter(int(arguments[0]), arguments[1:])
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, restarter.receive)
    return restarter.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
