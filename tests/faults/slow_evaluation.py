"""main.py with evaluations after the first one that take 2 s a batch, and say that they run."""

import pathlib
import sys
import time

from absl import flags

from lmim_jax.cli import __main__ as command
from lmim_jax.data.eval import eval_data
from lmim_jax.train import loop

original_batches = eval_data.EvaluationData.batches
original_run = loop.TrainingLoop._run_evaluator
evaluations = []


def run_evaluator(self, evaluator, step):
    """As in the loop, and noted."""
    evaluations.append(step)
    original_run(self, evaluator, step)


def batches(self, *arguments):
    """As in EvaluationData, but slow."""
    for batch in original_batches(self, *arguments):
        if len(evaluations) > 1:
            pathlib.Path(flags.FLAGS.workdir, "evaluating").touch()
            time.sleep(2)
        yield batch


if __name__ == "__main__":
    eval_data.EvaluationData.batches = batches
    loop.TrainingLoop._run_evaluator = run_evaluator
    command.main(["train", *sys.argv[1:]])
