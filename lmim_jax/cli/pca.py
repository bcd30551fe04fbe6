"""Shows what an encoder sees in a folder of images, as one HTML page.

    lmim pca IMAGES --workdir=RUN
    lmim pca IMAGES --workdir=RUN --out=photos.html --images=12

RUN: the --workdir of a run, or a folder made by `lmim export --format=flax`. IMAGES: a folder with
images at any depth, of a run on several modalities one that holds a folder for each; nothing is
written into it.

The page shows the principal components of patch features as colors, attention maps, the similarity
of any patch that one chooses with all others, and for some images those of the folder that are
nearest. Images are chosen at random, the same ones every time. It is one file that needs no
network.
"""

import dataclasses
import logging
import pathlib
import time

from absl import flags

from lmim_jax.cli import app, image_files
from lmim_jax.configs import vit_b
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.report import elements, image_sections, patch_sections, run_features
from lmim_jax.report.script import SCRIPT
from lmim_jax.train import modality_subset, runs
from lmim_jax.utils import atomic_io, buckets, html
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console

RECIPES: dict[str, str | None] = {}
NEIGHBORS = 5  # of each image

log = logging.getLogger(__name__)


def with_images(run: runs.Run, folder: str) -> runs.Run:
    """A run with other images, all of them unlabeled.

    Args:
      run: an opened run or exported folder.
      folder: of the images.

    Raises:
      UserError: there are no such images.
    """
    path = buckets.local_path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder")
    source, lines = image_files.open_images(path, run.config.data)
    for line in lines:
        log.info(line)
    # Images that cannot be read are left out
    config = run.data_config(vit_b.data().to_dict(), {"max_bad_fraction": 1.0})
    # As large as the pictures of the page, so that they are sharp
    config.canvas = max(config.canvas, 2 * run_features.FINE * run.method.patch_size)
    data = EvaluationData({"train": source, "test": None}, config, run.augmentation, run.mesh)
    return dataclasses.replace(run, opened=data)


def page(run: runs.Run, which: str, title: str, images: int, bank: int) -> str:
    """The page, as HTML.

    Args:
      run: see `with_images`.
      which: its weights, "online" or "target".
      title: of the page.
      images: how many images are shown.
      bank: how many images are searched for neighbors.

    Raises:
      UserError: no image can be read.
    """
    log.info("encoding images ...")
    encoded = run_features.encode_images(run, which, images)
    log.info("searching for neighbors ...")
    sections = [
        image_sections.features_section(encoded),
        patch_sections.attention_section(encoded, images),
        patch_sections.similarity_section(encoded, images),
    ]
    if len(run.data.sources["train"]) > 1:
        queries, searched = run_features.nearest_neighbors(run, which, images, NEIGHBORS, bank)
        sections.append(image_sections.neighbors_section(queries, searched, held_out=False))
    method = run.config.method
    facts = (
        f"{len(run.data.sources['train']):,} images, as seen by {method.name}: Vision Transformer "
        f"of width {method.width} and depth {method.depth}, patches of {method.patch_size} pixels, "
        f"{run.step:,} steps of training"
    )
    header = html.join(html.tag("h1", title), elements.paragraph([facts], class_="soft"))
    return html.document(title, header, sections, SCRIPT)


def main(arguments: list[str]) -> None:
    """Write the page."""
    start = time.perf_counter()
    log_to_console()
    given = flags.FLAGS
    workdir, (folder,) = app.run_and_arguments(arguments, "IMAGES")
    out = buckets.path(given.out)
    if isinstance(out, pathlib.Path):
        if out.resolve().is_relative_to(buckets.local_path(folder).resolve()):
            raise UserError(f"--out={out} is in the folder of the images; give another folder")
        if not out.parent.is_dir():
            raise UserError(f"--out={out}: no folder {out.parent}")
    run = modality_subset.choose(runs.open_run(workdir), given.modalities)
    which = run.choose_weights(given.weights)
    run = with_images(run, folder)
    name = buckets.local_path(folder).resolve().name
    text = page(run, which, f"Features of {name}", given.images, given.bank)
    atomic_io.write(out, text)
    seconds = duration(time.perf_counter() - start)
    log.info("%s: %.1f MB, %s weights, in %s", out, len(text.encode()) / 1e6, which, seconds)


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir(
        "The folder of a run, or an exported folder; may be given without --workdir."
    )
    flags.DEFINE_list(
        "modalities",
        [],
        "Of a run on several modalities: those that the images have; by default all. "
        "Example: --modalities=thermal",
    )
    flags.DEFINE_string("out", "pca.html", "The file to write. Example: --out=photos.html")
    flags.DEFINE_integer(
        "images", 8, "How many images are shown. Example: --images=12", lower_bound=1
    )
    flags.DEFINE_enum(
        "weights",
        None,
        ["online", "target"],
        "The encoder's weights; by default the choice of its recipe. Example: --weights=target",
    )
    flags.DEFINE_integer(
        "bank",
        8192,
        "How many images are searched for nearest neighbors. Example: --bank=1000",
        lower_bound=1,
    )
