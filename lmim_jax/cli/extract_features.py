"""Writes the features of a folder of images to one file.

    lmim features --workdir=RUN IMAGES --out=F.npz
    lmim features --workdir=RUN IMAGES --out=F.npz --features=image,mean --weights=target

RUN: the --workdir of a run, or a folder made by `lmim export --format=flax`. IMAGES: a folder with
images at any depth, or one image; of a run on several modalities, one that holds a folder for each,
named as in training (--modalities=NAME: images of that one). --out: a .npz, .safetensors or
.parquet file.

The whole image is resized to a short side of --size pixels (default: the size at which the encoder
was trained) and a long side that is the nearest multiple of the patch size, so its aspect ratio is
kept within half a patch; positions are resampled. With --crop, it is the square from the middle
of the image that evaluators see. Colors are normalized as in the run. EXIF orientation and
transparency are ignored, as in training. Images of all aspect ratios are encoded together: few
programs have to be compiled.

--features takes image, cls, mean, patches, and every other name that `lmim evaluate --feature`
takes, such as block01/tokens or cls+latents: one vector for each image.

The file holds, in order of the names:
  name     of the file below IMAGES (in .safetensors: a JSON list in the metadata)
  grid     rows and columns of its patches, int32 [n, 2] (in .parquet: `rows` and `columns`)
  image    the representation of an image that the recipe chose, float32 [n, D]
  cls      float32 [n, D]; absent for encoders without CLS
  mean     over its patches, float32 [n, D]
  patches  float32 [patches of all images, D], image after image: those of image i begin at row
           first[i], and patches[first[i]:first[i + 1]].reshape(*grid[i], D) is its feature map
           (in .parquet: a list per row)
  others   a vector for each image, float32 [n, ...], under the given name
cls, mean and patches are taken after the final norm, as in timm and transformers; --nonorm takes
them before it. image is config.representation.image of the run, which evaluators use as well.

Files that cannot be read are left out and listed. All features are held in memory until the end:
split very large folders, or use --features=image.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm
from absl import flags

from lmim_jax.cli import app, image_files
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.evaluators.common import feature_io, image_features
from lmim_jax.evaluators.common.feature_extraction import (
    KINDS,
    Extractor,
    extract_from_files,
    feature_shapes,
)
from lmim_jax.train import modality_subset, runs
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {}
MEMORY_SHARE = 0.8  # of the machine's memory that features may take


def check_memory(count: int, shapes: Mapping[str, tuple[int, ...]], scale: float) -> None:
    """Check that the features of `count` images fit into this machine's memory.

    Args:
      count: number of images.
      shapes: of each feature of an image, at the size of training.
      scale: the size of the images, in sizes of training.

    Raises:
      UserError: they do not.
    """
    per_image = 0.0
    for kind, shape in shapes.items():
        patches = scale**2 if kind == "patches" else 1
        per_image += math.prod(shape) * patches
    needed = 4 * count * per_image
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MEMORY_SHARE * available:
        raise UserError(
            f"features of {count:,} images take at least {needed / 1e9:.0f} GB, this machine has "
            f"{available / 1e9:.0f} GB; use --features=image, or a part of the folder"
        )


def check_features(method: Any, kinds: Sequence[str], image: str) -> dict[str, tuple[int, ...]]:
    """The shape of each feature of an image; needs no weights.

    Args:
      method: of the run.
      kinds: of --features.
      image: the feature that "image" stands for.

    Raises:
      UserError: no feature was given, or the method lacks one.
    """
    if not kinds:
        raise UserError(f"--features is empty; give some of {','.join(KINDS)}")
    try:
        for kind in kinds:
            if not image_features.needs_encoder(kind):
                raise UserError(f"{kind} needs no encoder: it is a baseline of `lmim evaluate`")
        shapes = feature_shapes(method, kinds, image)
    except UserError as error:
        raise UserError(f"--features={','.join(kinds)}: {error}") from error
    if not shapes:
        raise UserError("--features=cls: this encoder has no CLS token; use mean or patches")
    return shapes


def main(arguments: list[str]) -> None:
    """Extract the features and write the file."""
    given = flags.FLAGS
    log_to_console()
    workdir, (path,) = app.run_and_arguments(arguments, "IMAGES")
    if not given.out:
        raise UserError("give the file to write, such as --out=features.npz")
    write = feature_io.make_writer(given.out)
    # Its config: weights are read when they are needed
    run = modality_subset.choose(runs.open_run(workdir), given.modalities)
    method = run.method
    size = given.size or min(method.feature_size)
    if size < method.patch_size:
        raise UserError(f"--size={size} is less than one patch of {method.patch_size} pixels")
    image = run.config.representation.image
    shapes = check_features(method, given.features, image)
    which = run.choose_weights(given.weights)
    if which == "target" and not run.exported and not run.has_target:
        raise UserError(f"--weights=target: {run.config.method.name} has no target encoder")
    source, lines = image_files.open_images(path, run.config.data)
    for line in lines:
        print(line)
    check_memory(len(source), shapes, size / min(method.feature_size))
    extractor = Extractor(
        method,
        run.encoder_params(which),
        run.augmentation,
        size=size,
        kinds=tuple(given.features),
        norm=given.norm,
        image=image,
        batch_size=given.batch_size,
        canvas=run.config.data.canvas if given.crop else None,
        options=ImageOptions.from_config(run.config.data),
    )
    with tqdm.tqdm(total=len(source), unit=" images", mininterval=1.0) as bar:
        names, grids, features, bad = extract_from_files(extractor, source, bar.update)
    if names:
        write(names, grids, features)
    for name, problem in bad:
        print(f"left out: {name}: {problem}")
    if not names:
        raise UserError(f"{path}: not one of {len(bad)} images can be read")
    place = "before"
    if given.norm:
        place = "after"
    widths = [f"{kind} ({features[kind][0].shape[-1]})" for kind in shapes]
    print(
        f"{given.out}: {', '.join(widths)} of {len(names)} images; {which} weights of step "
        f"{run.step}, {place} the final norm (image: {image})"
    )


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
    flags.DEFINE_string(
        "out",
        None,
        "The file to write: .npz, .safetensors or .parquet. Example: --out=features.npz",
    )
    flags.DEFINE_list(
        "features",
        list(KINDS),
        "Which features to write: image (the choice of the recipe), cls, mean, patches, or names "
        "that `lmim evaluate --feature` takes. Example: --features=image,block01/tokens",
    )
    flags.DEFINE_enum(
        "weights",
        None,
        ["online", "target"],
        "The encoder's weights; by default the choice of its recipe. Example: --weights=target",
    )
    flags.DEFINE_integer(
        "size",
        0,
        "Short side of the resized images in pixels; 0: as in training. Example: --size=448",
        lower_bound=0,
    )
    flags.DEFINE_bool(
        "crop", False, "Encode the middle square of each image, as evaluators do. Example: --crop"
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
