"""The features of a folder of images, into one file.

    lmim features RUN IMAGES --out=F.npz [--features=cls,mean,patches] [--weights=online|target]

RUN: the --workdir of a run, or a folder that lmim export --format=flax made. IMAGES: a folder, with images at any
depth, or one image. --out: .npz, .safetensors or .parquet.

An image is resized, whole, to a short side of --size pixels (default: what the encoder was trained on) and a long side
that is the nearest multiple of the patch size, so its shape is kept within half a patch; positions are resampled.
Colours are normalised as in the run. EXIF orientation and transparency are ignored, as in training.

The file holds, in order of the names:
  name     of the file below IMAGES (in .safetensors: a JSON list in the metadata)
  grid     rows and columns of its patches, int32 [n, 2] (in .parquet: `rows` and `columns`)
  cls      float32 [n, D]; not there for encoders without CLS
  mean     of its patches, float32 [n, D]
  patches  float32 [all patches of all images, D], image after image: those of image i begin at row first[i], and
           patches[first[i]:first[i + 1]].reshape(*grid[i], D) is its map (in .parquet: a list per row)
After the final norm, as in timm and transformers; --nonorm: before it, as the k-NN of Latent MIM takes them.

Files that cannot be read are left out and listed. Everything is held in memory until the end: of very large folders,
take parts, or --features=mean.
"""

import os
import pathlib

import tqdm
from absl import flags

from lmim_jax.data import sources
from lmim_jax.data.augment import device
from lmim_jax.evaluators.common import feature_io
from lmim_jax.evaluators.common.feature_extraction import KINDS, Extractor, extract
from lmim_jax.train import saved
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {}


def files_of(path):
    """(root, names of images, names of other files) of a folder or of one file.

    Raises:
      UserError: there are no images.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return path.parent, [path.name], []
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    names, others = sources.list_files(path)
    if not names:
        raise UserError(f"{path}: no images in this folder, only {len(others)} other files")
    return path, names, others


def check_memory(count, extractor):
    """Raise a UserError where the features of so many images do not fit into this machine's memory."""
    numbers = {"cls": 1, "mean": 1, "patches": (extractor.size // extractor.method.patch_size) ** 2}
    needed = 4 * extractor.method.width * count * sum(numbers[kind] for kind in extractor.kinds)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * there:
        raise UserError(
            f"features of {count:,} images take at least {needed / 1e9:.0f} GB, this machine has {there / 1e9:.0f} GB; "
            "ask for --features=cls,mean, or for parts of the folder"
        )


def main(arguments):
    """Run the command."""
    given = flags.FLAGS
    log_to_console()
    if len(arguments) != 2 or not given.out:
        raise UserError("give a run, images and a file: RUN IMAGES --out=F.npz")
    if not given.features or set(given.features) - set(KINDS):
        raise UserError(f"--features={','.join(given.features)} must be some of: {','.join(KINDS)}")
    write = feature_io.writer(given.out)
    root, names, others = files_of(arguments[1])
    model = saved.open_model(arguments[0])
    which = model.choose(given.weights)
    method, size = model.method, given.size or min(model.method.feature_size)
    if size < method.patch_size:
        raise UserError(f"--size={size} is less than one patch of {method.patch_size} pixels")
    if given.features == ["cls"] and "cls_token" not in model.params["encoder"]:
        raise UserError("--features=cls: this encoder has no CLS token; take mean, patches")
    sizes = dict(image_size=method.image_size, eval_size=method.feature_size)
    transform = device.from_config(model.config.augment, **sizes)
    options = dict(
        size=size, kinds=tuple(given.features), norm=given.norm, batch_size=given.batch_size
    )
    extractor = Extractor(method, model.weights(which), transform, **options)
    check_memory(len(names), extractor)
    with tqdm.tqdm(total=len(names), unit=" images", mininterval=1.0) as bar:
        names, grids, features, bad = extract(extractor, root, names, bar.update)
    for name, problem in bad:
        print(f"left out: {name}: {problem}")
    if others:
        some = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        print(f"left out: {len(others)} files that are no images: {some}")
    if not names:
        raise UserError(f"{arguments[1]}: not one of {len(bad)} images can be read")
    write(names, grids, features)
    told = f"{which} weights of step {model.step}, {'after' if given.norm else 'before'} the final norm"
    print(
        f"{given.out}: {', '.join(features)} of {len(names)} images, {method.width} numbers each; {told}"
    )


def define_flags():
    """Define the flags of the command."""
    flags.DEFINE_string("out", None, "The file to write: .npz, .safetensors or .parquet.")
    flags.DEFINE_list("features", list(KINDS), "What to keep: cls, mean, patches.")
    flags.DEFINE_enum(
        "weights", None, ["online", "target"], "Default: those that the run's evaluators measured."
    )
    flags.DEFINE_integer(
        "size", 0, "Short side in pixels; 0: what the encoder was trained on.", lower_bound=0
    )
    flags.DEFINE_bool("norm", True, "Features after the final norm; or before it.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
