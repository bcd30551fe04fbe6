"""Restarts: what launch/restart.py does with a command, and when a run gives up."""

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import pytest

from lmim_jax.train import checkpoint_manifest, restarts
from lmim_jax.utils.errors import UserError

RESTART = pathlib.Path(__file__).parent.parent / "launch" / "restart.py"
# Ends with the next of the codes; "-N" is signal N, "mark" is 1 after a mark for restart.py. Tells
# its number and why it was started
COMMAND = """
echo "$LMIM_RESTART of $LMIM_RESTARTS: $LMIM_RESTART_REASON"
code="$(head -n 1 codes)"
sed -i 1d codes
case "$code" in
  -*) kill "$code" $$ ;;
  mark) touch "$LMIM_RESTART_MARK" && exit 1 ;;
esac
exit "$code"
"""


def launch(folder, codes, limit="9"):
    """The exit code of restart.py and the lines of the command."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    command = [sys.executable, RESTART, limit, "bash", "-c", COMMAND]
    environment = {**os.environ, "RESTART_PAUSE": "0"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("last", [0, 2, 75, 130])
def test_errors_and_crashes_are_followed_by_a_restart(tmp_path, last):
    code, lines, log = launch(tmp_path, [1, -9, 134, last, 1])
    assert code == last
    assert lines == [
        "0 of 9: ",
        "1 of 9: ended with exit code 1",
        "2 of 9: was killed by signal 9 (SIGKILL)",
        "3 of 9: was killed by signal 6 (SIGABRT)",
    ]
    assert "the run ended with exit code 1; restart 1 in 0 s" in log


def test_starts_that_end_before_the_run_counts_them_are_counted(tmp_path):
    code, lines, log = launch(tmp_path, [1] * 5, limit="3")
    assert (code, len(lines)) == (1, 4)
    assert "given up: 4 starts in a row never trained" in log
    # "mark": the run came to count this start
    code, lines, log = launch(tmp_path, [1, 1, 1, "mark", 1, 1, 1, 0], limit="3")
    assert (code, len(lines)) == (0, 8), log


def test_a_run_tells_its_launcher_that_it_counts(tmp_path):
    mark = tmp_path / "mark"
    assert restarts.check(tmp_path / "run", {restarts.MARK: str(mark)}, 0) == ""
    assert mark.exists()
    restarts.check(tmp_path / "run", {restarts.MARK: str(tmp_path / "none" / "mark")}, 0)


def test_no_restarts_and_mistakes(tmp_path):
    assert launch(tmp_path, [1, 0], limit="0")[:2] == (1, ["0 of 0: "])
    assert launch(tmp_path, [-9, 0], limit="0")[0] == 137
    assert launch(tmp_path, [1], limit="many")[0] == 2
    done = subprocess.run([sys.executable, RESTART, "3", "/nothing/here"], capture_output=True)
    assert done.returncode == 127


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_signal_is_passed_on_and_ends_the_restarts(tmp_path, number, waiting):
    """While the command runs, which ends with code 1 then; and in the pause before a restart."""
    program = "trap 'exit 1' INT TERM HUP USR1; echo started; while true; do sleep 0.05; done"
    if waiting:
        program = "echo started; exit 1"
    command = [sys.executable, RESTART, "9", "bash", "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    if waiting:
        assert "restart 1 in 10 s" in process.stderr.readline()
    else:
        time.sleep(0.2)  # for the trap
    process.send_signal(number)
    rest, _ = process.communicate(timeout=9)
    waited = 130 if number == signal.SIGINT else 75
    assert process.returncode == (waited if waiting else 1)
    assert rest == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_is_stopped_before_it_listens_was_asked_to_stop(number):
    command = [sys.executable, RESTART, "9", "bash", "-c", "echo started; exec sleep 30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.wait(timeout=9) == 75


def test_a_signal_while_a_start_is_made_reaches_it(monkeypatch):
    restart = runpy.run_path(str(RESTART))
    restarter = restart["Restarter"](9, ["sleep", "30"])
    make = subprocess.Popen

    def interrupted(*arguments, **options):
        child = make(*arguments, **options)
        restarter.receive(signal.SIGTERM, None)
        return child

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    assert restarter.run() == 75


def save(workdir, step):
    """What a run leaves of a step."""
    folder = workdir / checkpoint_manifest.FOLDER / str(step)
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    checkpoint_manifest.write(folder, {}, lambda: None)


def start(workdir, number, limit=2, process=0):
    environment = {"LMIM_RESTART": str(number), "LMIM_RESTARTS": str(limit)}
    return restarts.check(workdir, environment, process)


def test_a_run_gives_up_after_restarts_without_progress(tmp_path):
    assert start(tmp_path, 0) == ""
    assert not list(tmp_path.iterdir())  # nothing is recorded of starts by the user
    assert "restart 1 by the launcher at step 0, 1 of 2" in start(tmp_path, 1)
    save(tmp_path, 10)
    (tmp_path / checkpoint_manifest.FOLDER / "20").mkdir()  # partial: no progress
    assert "at step 10, 1 of 2" in start(tmp_path, 2)
    assert "at step 10, 2 of 2" in start(tmp_path, 3)
    assert start(tmp_path, 3, process=1) == start(tmp_path, 3, process=2)  # as process 0
    with pytest.raises(UserError, match=r"no checkpoint after step 10, after 2 .*the log says"):
        start(tmp_path, 4)
    with pytest.raises(UserError, match="after 2 restart"):
        start(tmp_path, 4, process=1)
    assert [record["step"] for record in restarts.read(tmp_path)] == [0, 10, 10]
    # The user starts it again
    assert "1 of 2" in start(tmp_path, 1)
    assert "2 of 2" in start(tmp_path, 2)
    with pytest.raises(UserError, match="after 2 restart"):
        start(tmp_path, 3)
    save(tmp_path, 30)
    assert "1 of 2" in start(tmp_path, 3)
    assert "restart 9 by the launcher at step 30" in start(tmp_path, 9, limit=0)


def test_restarts_that_could_not_be_recorded_count(tmp_path):
    assert "1 of 2" in start(tmp_path / "run", 1, process=1)
    assert "2 of 2" in start(tmp_path / "run", 2, process=1)
    with pytest.raises(UserError, match="after 2 restart"):
        start(tmp_path / "run", 3, process=1)
    assert not (tmp_path / "run").exists()


def test_a_record_that_was_cut_off_is_left_out(tmp_path, caplog):
    start(tmp_path, 1)
    with (tmp_path / restarts.NAME).open("a") as file:
        file.write('{"restart": 2')
    assert "2 of 2" in start(tmp_path, 2)
    assert "a line cannot be read" in caplog.text
    assert [record["restart"] for record in restarts.read(tmp_path)] == [1, 2]
    with pytest.raises(UserError, match="LMIM_RESTART=x must be a number"):
        start(tmp_path, "x")


def test_restarts_of_a_run_in_a_bucket(bucket):
    del bucket
    workdir = "gs://bkt/run"
    assert "at step 0, 1 of 1" in start(workdir, 1, limit=1)
    with pytest.raises(UserError, match="gs://bkt/run has no checkpoint after step 0, after 1"):
        start(workdir, 2, limit=1)
