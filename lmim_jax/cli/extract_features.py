"""Writes the features of a folder of images to one file.

    lmim features --workdir=RUN IMAGES --out=F.npz
    lmim features --workdir=RUN IMAGES --out=F.npz --features=cls,mean --weights=target

RUN: the --workdir of a run, or a folder made by `lmim export --format=flax`. IMAGES: a folder with
images at any depth, or one image. --out: a .npz, .safetensors or .parquet file.

The whole image is resized to a short side of --size pixels (default: the size at which the encoder
was trained) and a long side that is the nearest multiple of the patch size, so its aspect ratio is
kept within half a patch; positions are resampled. Colors are normalized as in the run. EXIF
orientation and transparency are ignored, as in training.

The file holds, in order of the names:
  name     of the file below IMAGES (in .safetensors: a JSON list in the metadata)
  grid     rows and columns of its patches, int32 [n, 2] (in .parquet: `rows` and `columns`)
  cls      float32 [n, D]; absent for encoders without CLS
  mean     over its patches, float32 [n, D]
  patches  float32 [patches of all images, D], image after image: those of image i begin at row
           first[i], and patches[first[i]:first[i + 1]].reshape(*grid[i], D) is its feature map
           (in .parquet: a list per row)
Features are taken after the final norm, as in timm and transformers; --nonorm takes them before it,
as the k-NN evaluation of Latent MIM does.

Files that cannot be read are left out and listed. All features are held in memory until the end:
split very large folders, or use --features=mean.
"""

import os
import pathlib

import tqdm
from absl import flags

from lmim_jax.cli import app
from lmim_jax.data import folder_listing
from lmim_jax.data.augment.device import Augment
from lmim_jax.evaluators.common import feature_io
from lmim_jax.evaluators.common.feature_extraction import KINDS, Extractor, extract_from_files
from lmim_jax.train import runs
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {}
MEMORY_SHARE = 0.8  # of the machine's memory that features may take
LISTED = 5  # names of other files that are printed


def list_images(path: str | pathlib.Path) -> tuple[pathlib.Path, list[str], list[str]]:
    """The images in a folder, or one image.

    Args:
      path: of the folder or the image.

    Returns:
      (root, names of images, names of other files), names relative to the root.

    Raises:
      UserError: there are no images.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return path.parent, [path.name], []
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    found = folder_listing.list_folder(path)
    if not found.images:
        raise UserError(f"{path}: no images in this folder, only {len(found.others)} other files")
    return path, list(found.images), list(found.others)


def check_memory(count: int, extractor: Extractor) -> None:
    """Check that the features of `count` images fit into this machine's memory.

    Raises:
      UserError: they do not.
    """
    vectors = {
        "cls": 1,
        "mean": 1,
        "patches": (extractor.size // extractor.method.patch_size) ** 2,
    }
    per_image = sum(vectors[kind] for kind in extractor.kinds)
    needed = 4 * extractor.method.width * count * per_image
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MEMORY_SHARE * available:
        raise UserError(
            f"features of {count:,} images take at least {needed / 1e9:.0f} GB, this machine has "
            f"{available / 1e9:.0f} GB; use --features=cls,mean, or a part of the folder"
        )


def make_extractor(run: runs.Run, which: str) -> Extractor:
    """The encoder of a run with the options of the flags.

    Args:
      run: an opened run or exported folder.
      which: its "online" or "target" weights.

    Raises:
      UserError: --size is less than a patch, or the encoder lacks the feature of --features.
    """
    given = flags.FLAGS
    method = run.method
    size = given.size or min(method.feature_size)
    if size < method.patch_size:
        raise UserError(f"--size={size} is less than one patch of {method.patch_size} pixels")
    if given.features == ["cls"] and "cls_token" not in run.params["encoder"]:
        raise UserError("--features=cls: this encoder has no CLS token; use mean or patches")
    transform = Augment.from_config(
        run.config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    return Extractor(
        method,
        run.encoder_params(which),
        transform,
        size=size,
        kinds=tuple(given.features),
        norm=given.norm,
        batch_size=given.batch_size,
    )


def main(arguments: list[str]) -> None:
    """Extract the features and write the file."""
    given = flags.FLAGS
    log_to_console()
    workdir, (path,) = app.run_and_arguments(arguments, "IMAGES")
    if not given.out:
        raise UserError("give the file to write, such as --out=features.npz")
    if not given.features or set(given.features) - set(KINDS):
        raise UserError(f"--features={','.join(given.features)} must be some of: {','.join(KINDS)}")
    write = feature_io.make_writer(given.out)
    root, names, others = list_images(path)
    run = runs.open_run(workdir)
    which = run.choose_weights(given.weights)
    extractor = make_extractor(run, which)
    check_memory(len(names), extractor)
    with tqdm.tqdm(total=len(names), unit=" images", mininterval=1.0) as bar:
        names, grids, features, bad = extract_from_files(extractor, root, names, bar.update)
    _report_left_out(bad, others)
    if not names:
        raise UserError(f"{path}: not one of {len(bad)} images can be read")
    write(names, grids, features)
    place = "before"
    if given.norm:
        place = "after"
    print(
        f"{given.out}: {', '.join(features)} of {len(names)} images, {run.method.width} numbers "
        f"each; {which} weights of step {run.step}, {place} the final norm"
    )


def _report_left_out(bad: list[tuple[str, str]], others: list[str]) -> None:
    """Print which files were left out: images that cannot be read, and files of other kinds."""
    for name, problem in bad:
        print(f"left out: {name}: {problem}")
    if others:
        listed = ", ".join(others[:LISTED])
        if len(others) > LISTED:
            listed += " ..."
        print(f"left out: {len(others)} files that are not images: {listed}")


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir(
        "The folder of a run, or an exported folder; may be given without --workdir."
    )
    flags.DEFINE_string(
        "out",
        None,
        "The file to write: .npz, .safetensors or .parquet. Example: --out=features.npz",
    )
    flags.DEFINE_list(
        "features",
        list(KINDS),
        "Which features to write: cls, mean, patches. Example: --features=cls,mean",
    )
    flags.DEFINE_enum(
        "weights",
        None,
        ["online", "target"],
        "The encoder's weights; by default those that the run's evaluators measured. "
        "Example: --weights=target",
    )
    flags.DEFINE_integer(
        "size",
        0,
        "Short side of the resized images in pixels; 0: as in training. Example: --size=448",
        lower_bound=0,
    )
    flags.DEFINE_bool(
        "norm", True, "Take features after the final norm, not before it. Example: --nonorm"
    )
    flags.DEFINE_integer(
        "batch_size",
        64,
        "How many images are encoded at a time. Example: --batch_size=16",
        lower_bound=1,
    )
