"""Classifies a folder of images with a classifier that `lmim evaluate` trained.

    lmim evaluate --workdir=RUN --evaluators=finetune
    lmim predict RUN/evaluations/finetune IMAGES --out=predictions.csv

RUN/evaluations/NAME: where linear_probe, attentive_probe, finetune, logistic_regression and
ridge_regression leave what they trained. IMAGES: a folder with images at any depth, or one image;
of several modalities, one that holds a folder for each, named as in training.

The CSV file has a row for each image: image, prediction, probability; of several 0/1 labels, the
probability of each, and of numbers, each number. A fine-tuned classifier holds its encoder, so that
its folder can be moved; the others need the checkpoint on which they were trained.
"""

import csv
import io
import logging
import sys

import numpy as np
import tqdm
from absl import flags

from lmim_jax.cli import image_files
from lmim_jax.data.folder_source import FolderSource
from lmim_jax.data.label_file import CLASSES
from lmim_jax.data.paired_source import PairedSource
from lmim_jax.train import saved_classifier
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

log = logging.getLogger(__name__)

RECIPES: dict[str, str | None] = {}
SHOWN = 5  # rows that are printed


def table(
    classifier: saved_classifier.SavedClassifier,
    source: FolderSource | PairedSource,
    batch_size: int,
) -> list[list[str]]:
    """The header and a row for each readable image.

    Args:
      classifier: the classifier.
      source: the images.
      batch_size: images at a time.
    """
    header = ["image", *classifier.names]
    if classifier.kind == CLASSES:
        header = ["image", "prediction", "probability"]
    rows = [header]
    with tqdm.tqdm(total=len(source), unit=" images", mininterval=1.0) as bar:
        for part in classifier.predict(source, batch_size):
            for index, outputs in zip(part.indices, part.outputs, strict=True):
                name = source.files[int(index)]
                if classifier.kind == CLASSES:
                    best = int(np.argmax(outputs))
                    rows.append([name, classifier.names[best], f"{outputs[best]:.4f}"])
                else:
                    rows.append([name, *(f"{value:.5g}" for value in outputs)])
            bar.update(len(part.indices))
    return rows


def as_csv(rows: list[list[str]]) -> bytes:
    """Rows as a CSV file; names of files that are no UTF-8 stay as they are."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def main(arguments: list[str]) -> None:
    """Classify the images and write the file."""
    given = flags.FLAGS
    log_to_console()
    if len(arguments) != 2:
        raise UserError("give a classifier and images: lmim predict RUN/evaluations/NAME IMAGES")
    folder, images = arguments
    classifier = saved_classifier.load(folder)
    source, lines = image_files.open_images(images, classifier.run.config.data)
    for line in lines:
        print(line)
    rows = table(classifier, source, given.batch_size)
    if len(rows) == 1:
        raise UserError(f"{images}: not one of {len(source)} images can be read")
    left_out = len(source) + 1 - len(rows)
    if left_out:
        log.warning("%d of %d images cannot be read, and have no row", left_out, len(source))
    if given.out:
        atomic_io.write(given.out, as_csv(rows))
    shown = rows if not given.out else rows[: SHOWN + 1]
    sys.stdout.flush()
    sys.stdout.buffer.write(as_csv(shown))
    sys.stdout.flush()
    if given.out and len(rows) > len(shown):
        print("...")
    if given.out:
        print(f"{given.out}: {len(rows) - 1:,} images; {classifier.kind}: {len(classifier.names)}")


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_string(
        "out", "", 'The CSV file; "": it is printed. Example: --out=predictions.csv'
    )
    flags.DEFINE_integer(
        "batch_size",
        64,
        "How many images are classified at a time. Example: --batch_size=16",
        lower_bound=1,
    )
