"""A page about a run: curves, what is given and seen, segments, attention, neighbours, figures, config, commands.

    python -m lmim_jax.tools.report RUN [--out=FILE.html] [--path=IMAGES]

RUN is the --workdir of a run with a checkpoint. The page is one HTML file that needs no network, RUN/report.html unless
`--out` says otherwise. --path: where the images are now, if they were moved.
"""

import logging
import pathlib
import time

from absl import flags

from lmim_jax import command, files, metrics, page
from lmim_jax.errors import UserError
from lmim_jax.runs import open_with_images
from lmim_jax.tools import report_features, report_patches, report_pictures, report_record
from lmim_jax.tools.report_script import SCRIPT

log = logging.getLogger("lmim_jax.tools.report")

IMAGES, SEGMENTED, QUERIES, NEAREST = 6, 4, 6, 5  # how many are shown


def report(run, bank):
    """The page of a run, as text.

    Args:
      run: a `runs.Opened`. bank: training images among which neighbours are searched.
    """
    told = report_record.lines(run.folder)
    wholes, crops, windows, rebuilt = report_features.given(run, IMAGES)
    seen = report_features.look(run, IMAGES)
    found, searched = report_features.neighbours(run, QUERIES, NEAREST, bank)
    sections = [
        report_pictures.given(wholes, crops, windows, rebuilt),
        report_pictures.reconstructions(crops, windows, rebuilt) if rebuilt is not None else None,
        report_pictures.features(seen),
        report_patches.segmentations(seen, SEGMENTED),
        report_patches.attention(seen, IMAGES),
        report_patches.similarities(seen, IMAGES),
        report_pictures.neighbours(found, searched),
        report_record.curves(told),
        report_record.evaluations(run.folder, told),
        report_record.provenance(run, run.folder),
    ]
    title = f"Run {run.folder.resolve().name}"
    return page.document(title, report_record.head(run, told), [part for part in sections if part], SCRIPT)


def main(argv):
    """As the flags say."""
    began = time.perf_counter()
    if len(argv) != 2:
        raise UserError("give one folder: python -m lmim_jax.tools.report RUN [--out=FILE.html] [--path=IMAGES]")
    metrics.log_to_console()
    flag = flags.FLAGS
    run = open_with_images(argv[1], flag.path)
    out = pathlib.Path(flag.out or run.folder / "report.html")
    text = report(run, flag.bank)
    try:
        files.write(out, text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    log.info("%s: %.1f MB, in %s", out, len(text.encode()) / 1e6, metrics.duration(time.perf_counter() - began))


def define_flags():
    """Here, and not at import: tools are imported side by side by tests."""
    flags.DEFINE_string("out", "", "The page; default: RUN/report.html.")
    flags.DEFINE_string("path", "", "Where the images are now, if they were moved (config.data.path).")
    flags.DEFINE_integer("bank", 8192, "Nearest neighbours are searched among so many training images.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    command.run(main)
