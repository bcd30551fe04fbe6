"""A page about a run: curves, what is given and seen, segments, attention, neighbours, figures, config, commands.

    lmim report RUN [--out=FILE.html] [--path=IMAGES]

RUN is the --workdir of a run with a checkpoint. The page is one HTML file that needs no network, RUN/report.html unless
`--out` says otherwise. --path: where the images are now, if they were moved.
"""

import logging
import pathlib
import time

from absl import flags

from lmim_jax.report import image_sections, log_sections, patch_sections, run_features
from lmim_jax.report.script import SCRIPT
from lmim_jax.train.runs import open_run
from lmim_jax.utils import atomic_io, html
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console

log = logging.getLogger("lmim_jax.cli.report")

IMAGES, SEGMENTED, QUERIES, NEAREST = 6, 4, 6, 5  # how many are shown

RECIPES: dict[str, str | None] = {}


def report(run, bank):
    """The page of a run, as text.

    Args:
      run: a `runs.Run`. bank: training images among which neighbours are searched.
    """
    log = log_sections.read_metric_log(run.folder)
    views = run_features.training_views(run, IMAGES)
    encoded = run_features.encode_images(run, IMAGES)
    queries, searched = run_features.nearest_neighbors(run, QUERIES, NEAREST, bank)
    sections = [
        image_sections.input_section(views),
        image_sections.reconstructions_section(views),
        image_sections.features_section(encoded),
        patch_sections.segmentation_section(encoded, SEGMENTED),
        patch_sections.attention_section(encoded, IMAGES),
        patch_sections.similarity_section(encoded, IMAGES),
        image_sections.neighbors_section(queries, searched),
        log_sections.curves_section(log),
        log_sections.evaluations_section(run.folder, log),
        log_sections.provenance_section(run),
    ]
    title = f"Run {run.folder.resolve().name}"
    header = log_sections.page_header(run, log)
    present = [section for section in sections if section is not None]
    return html.document(title, header, present, SCRIPT)


def main(arguments):
    """Run the command."""
    began = time.perf_counter()
    if len(arguments) != 1:
        raise UserError("give one folder: lmim report RUN [--out=FILE.html] [--path=IMAGES]")
    log_to_console()
    flag = flags.FLAGS
    run = open_run(arguments[0], flag.path)
    out = pathlib.Path(flag.out or run.folder / "report.html")
    text = report(run, flag.bank)
    try:
        atomic_io.write(out, text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    log.info(
        "%s: %.1f MB, in %s", out, len(text.encode()) / 1e6, duration(time.perf_counter() - began)
    )


def define_flags():
    """Define the flags of the command."""
    flags.DEFINE_string("out", "", "The page; default: RUN/report.html.")
    flags.DEFINE_string(
        "path", "", "Where the images are now, if they were moved (config.data.path)."
    )
    flags.DEFINE_integer(
        "bank",
        8192,
        "Nearest neighbours are searched among so many training images.",
        lower_bound=1,
    )
