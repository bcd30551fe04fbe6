"""Lists the checkpoints of a run with their sizes, and verifies them.

    lmim checkpoints --workdir=RUN             compares names and sizes of files
    lmim checkpoints --workdir=RUN --verify    reads the files and compares checksums

Exit code 1 if a step is damaged or incomplete.
"""

import datetime
import sys

from absl import flags

from lmim_jax.cli import app
from lmim_jax.train import checkpoint_manifest
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError

RECIPES: dict[str, str | None] = {}
MAX_PROBLEMS = 5  # printed for each step


def table(workdir: buckets.Pathname, verify: bool) -> tuple[list[str], bool]:
    """The table of checkpoints.

    Args:
      workdir: the run.
      verify: compare checksums, not only names and sizes of files.

    Returns:
      (lines, whether all steps are good).

    Raises:
      UserError: there are no checkpoints.
    """
    steps = checkpoint_manifest.steps(workdir)
    root = buckets.path(workdir, checkpoint_manifest.FOLDER)
    folder = root / checkpoint_manifest.QUARANTINE
    quarantined = buckets.matching(folder, "*")
    if not steps and not quarantined:
        problem = buckets.problem(root)
        raise UserError(problem or f"{workdir}: no checkpoints here; give the --workdir of a run")
    lines = [f"{'step':>10}  {'state':<8}  {'size':>9}  saved"]
    all_good = True
    for step, path in steps.items():
        status = checkpoint_manifest.verify(path, contents=verify)
        saved = "-"
        if status.state == "good":
            saved = _format_time(checkpoint_manifest.read(path)["time"])
        else:
            all_good = False
        lines.append(f"{step:>10}  {status.state:<8}  {status.size / 1e6:>6.1f} MB  {saved}")
        for problem in status.problems[:MAX_PROBLEMS]:
            lines.append(f"{'':>12}{problem}")
    for path in quarantined:
        lines.append(f"quarantined: {path}")
    return lines, all_good


def _format_time(seconds: float) -> str:
    """A Unix time as "2025-01-31 12:00"."""
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def main(arguments: list[str]) -> None:
    """Print the table."""
    workdir, _ = app.run_and_arguments(arguments)
    lines, all_good = table(workdir, flags.FLAGS.verify)
    print("\n".join(lines))
    sys.exit(not all_good)


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir("The folder of the run; may be given without the name of the flag.")
    flags.DEFINE_bool("verify", False, "Read every file and compare checksums. Example: --verify")
