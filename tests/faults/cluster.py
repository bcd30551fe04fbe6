"""A Slurm cluster of this one machine, for as long as a `with` block.

Debian's slurm-wlm, without a database. The node claims 16 CPUs and two GPUs, which are copies of
/dev/null.
"""

import os
import pathlib
import shutil
import socket
import stat
import subprocess
import time

MISSING = [
    program
    for program in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    if not shutil.which(program)
]
WHY_NOT = (
    f"{', '.join(MISSING)} not found: apt-get install slurm-wlm"
    if MISSING
    else ""
    if os.geteuid() == 0
    else "Slurm's daemons need root"
)

CPUS = 16  # that the node claims to have

CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Started on entry, with its files in `folder`; `environment` finds it."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons = []

    def __enter__(self):
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        sockets = [socket.socket() for _ in range(2)]
        for one in sockets:
            one.bind(("", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(folder=self.folder, host=host, ports=ports, cpus=CPUS)
        (self.folder / "slurm.conf").write_text(text)
        for number in range(2):
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gpus = f"Name=gpu Flags=nvidia_gpu_env File={self.folder}/gpu[0-1]\n"
        (self.folder / "gres.conf").write_text(gpus)
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
            )
        deadline = time.monotonic() + 60
        while "idle" not in self.ask("sinfo", "--noheader", "--format=%T"):
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(0.5)
        return self

    def __exit__(self, *_):
        self.ask("scancel", "--user=root", "--signal=KILL")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=30)

    def ask(self, *command, **how):
        """The output of a Slurm command."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, **how
        ).stdout

    def field(self, job, name):
        """A field of `scontrol show job`."""
        words = self.ask("scontrol", "show", "job", str(job)).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")
