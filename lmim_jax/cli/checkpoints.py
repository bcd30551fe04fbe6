"""The checkpoints of a run: which there are, how large, and whether they are good.

    lmim checkpoints WORKDIR            by names and sizes of files
    lmim checkpoints WORKDIR --verify   by their contents: every checksum

Exit code 1 where a step is damaged or partial.
"""

import datetime
import pathlib
import sys

from absl import flags

from lmim_jax.train import checkpoint_manifest
from lmim_jax.utils.errors import UserError

RECIPES: dict[str, str | None] = {}


def table(workdir, verify):
    """Lines for people, and whether all steps are good.

    Raises:
      UserError: there is nothing to list.
    """
    root = pathlib.Path(workdir, checkpoint_manifest.FOLDER)
    steps = checkpoint_manifest.steps(workdir)
    aside = sorted((root / checkpoint_manifest.QUARANTINE).glob("*")) if root.is_dir() else []
    if not steps and not aside:
        raise UserError(f"{workdir}: no checkpoints here; give the --workdir of a run")
    lines, all_good = [f"{'step':>10}  {'state':<8}  {'size':>9}  saved"], True
    for step, path in steps.items():
        verdict = checkpoint_manifest.verify(path, contents=verify)
        all_good &= verdict.state == "good"
        when = "-"
        if verdict.state == "good":
            when = datetime.datetime.fromtimestamp(
                checkpoint_manifest.read(path)["time"]
            ).isoformat(" ", "minutes")
        lines.append(f"{step:>10}  {verdict.state:<8}  {verdict.size / 1e6:>6.1f} MB  {when}")
        lines += [f"{'':>12}{problem}" for problem in verdict.problems[:5]]
    lines += [f"set aside: {path}" for path in aside]
    return lines, all_good


def main(arguments):
    """Run the command."""
    if len(arguments) != 1:
        raise UserError("give one folder: lmim checkpoints WORKDIR [--verify]")
    lines, all_good = table(arguments[0], flags.FLAGS.verify)
    print("\n".join(lines))
    sys.exit(not all_good)


def define_flags():
    """Define the flags of the command."""
    flags.DEFINE_bool("verify", False, "Read every file and compare its checksum.")
