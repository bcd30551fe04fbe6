"""Several processes as one run: found from the environment, or told by flags."""

import logging
import os

import jax

from lmim_jax.errors import UserError

log = logging.getLogger(__name__)

# What shows that this process is one of several: Slurm's srun, Open MPI, Cloud TPU pods, Kubernetes job sets.
SIGNS = {
    "SLURM_STEP_NODELIST": lambda env: int(env.get("SLURM_NTASKS", "1")) > 1,
    "OMPI_MCA_orte_hnp_uri": lambda env: int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1,
    "TPU_WORKER_HOSTNAMES": lambda env: "," in env["TPU_WORKER_HOSTNAMES"],
    "JOBSET_NAME": lambda env: True,
}


def initialize(coordinator="", num_processes=0, process_id=-1):
    """Join the other processes of this run; nothing to do where there are none. Before any other use of jax.

    Args:
      coordinator: "host:port" of process 0; "" finds the processes from the environment, if there are any.
      num_processes, process_id: how many there are, and which one this is; with `coordinator` only.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator needs --num_processes and --process_id, not {num_processes} and {process_id}"
            )
        where = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    elif any(sign in os.environ and is_one(os.environ) for sign, is_one in SIGNS.items()):
        where = {}
    else:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for runs on CPUs; others ignore it
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=30)
