"""Writes an HTML report of a run.

    lmim report --workdir=RUN
    lmim report --workdir=RUN --out=FILE.html --path=IMAGES

The report shows the curves, the evaluations, the input of the model, features, segmentations,
attention, nearest neighbors, the configuration and the commands. It is one file that needs no
network.
"""

import logging
import time

from absl import flags

from lmim_jax.cli import app
from lmim_jax.report import (
    classifier_section,
    image_sections,
    log_sections,
    patch_sections,
    run_features,
    segmentation_section,
)
from lmim_jax.report.script import SCRIPT
from lmim_jax.train.runs import Run, open_run
from lmim_jax.utils import atomic_io, buckets, html, progress
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console

RECIPES: dict[str, str | None] = {}
FLAGS_OF_OPTIONS = {"data.path": "--path"}
# How many are shown
IMAGES = 6
SEGMENTED = 4
QUERIES = 6
NEIGHBORS = 5  # of each query

log = logging.getLogger(__name__)


def report(run: Run, bank: int) -> str:
    """The report of a run, as HTML.

    Args:
      run: an opened run.
      bank: how many training images are searched for neighbors.
    """
    which = run.choose_weights(None)
    metric_log = log_sections.read_metric_log(run.folder)
    with progress.working("images and features"):
        views = run_features.training_views(run, IMAGES)
        encoded = run_features.encode_images(run, which, IMAGES)
    with progress.working("nearest neighbors"):
        queries, searched = run_features.nearest_neighbors(run, which, QUERIES, NEIGHBORS, bank)
    with progress.working("pictures"):
        sections = [
            log_sections.curves_section(metric_log),
            log_sections.evaluations_section(run.folder, metric_log),
            classifier_section.section(run.folder),
            segmentation_section.section(run.folder),
            image_sections.input_section(views),
            image_sections.reconstructions_section(views),
            image_sections.translations_section(views),
            image_sections.features_section(encoded),
            patch_sections.segmentation_section(encoded, SEGMENTED),
            patch_sections.attention_section(encoded, IMAGES),
            patch_sections.similarity_section(encoded, IMAGES),
            image_sections.neighbors_section(queries, searched, run.data.held_out == "test"),
            log_sections.provenance_section(run),
        ]
    title = f"Run {run.folder.resolve().name}"
    header = log_sections.page_header(run, metric_log)
    present = [section for section in sections if section is not None]
    return html.document(title, header, present, SCRIPT)


def main(arguments: list[str]) -> None:
    """Write the report."""
    start = time.perf_counter()
    log_to_console()
    given = flags.FLAGS
    workdir, _ = app.run_and_arguments(arguments)
    out = buckets.path(given.out or buckets.path(workdir, "report.html"))
    run = open_run(workdir, given.path)
    text = report(run, given.bank)
    try:
        atomic_io.write(out, text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    seconds = time.perf_counter() - start
    log.info("%s: %.1f MB, in %s", out, len(text.encode()) / 1e6, duration(seconds))


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir("The folder of a run with a checkpoint; may be given without --workdir.")
    flags.DEFINE_string(
        "out", "", "The file to write; by default RUN/report.html. Example: --out=report.html"
    )
    flags.DEFINE_string(
        "path",
        "",
        "Where the images are now, if they were moved (config.data.path). Example: --path=photos",
    )
    flags.DEFINE_integer(
        "bank",
        8192,
        "How many training images are searched for nearest neighbors. Example: --bank=1000",
        lower_bound=1,
    )
