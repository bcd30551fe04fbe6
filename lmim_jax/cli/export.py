"""A trained encoder for other libraries: a folder that they open, with a model card.

    lmim export RUN --format=timm --out=DIR [--weights=online|target] [--check]

--format:
  timm         timm.create_model("local-dir:DIR", pretrained=True)
  hf           transformers.AutoModel.from_pretrained("DIR")
  flax         lmim_jax.load("DIR"): all networks, with `--weights` for the encoder
  safetensors  the whole model, teacher included, under the names of the method's official PyTorch code;
               lmim import-weights reads it back, to the bit

--weights: default, those that the run's own evaluators measured. --check runs the other library on images of the run,
or of --images=FOLDER, and prints the largest difference of features: exit code 1 where it is above 1e-4, 2 where that
library is not installed.
"""

import json
import pathlib
import shutil
import sys

from absl import flags

from lmim_jax.convert import hf, model_card, parity_check, timm, torch_encoder
from lmim_jax.convert.official import base as official
from lmim_jax.data import sources
from lmim_jax.train import saved
from lmim_jax.utils import array_io, atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import log_to_console

LIBRARIES = {"timm": timm, "hf": hf}
FORMATS = (*LIBRARIES, "flax", "safetensors")
LIMIT = 1e-4  # of the largest difference of any feature, float32 on a CPU
CHECKED = 16  # images

RECIPES: dict[str, str | None] = {}


def export(model, kind, which, folder):
    """Write the folder.

    Args:
      model: a `saved.Model`. kind: one of FORMATS. which: "online", "target", or "both" for safetensors.

    Raises:
      UserError: the folder holds something, or the format cannot hold this encoder.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder} holds something already; give another folder")
    if kind in LIBRARIES:
        knobs = model.config.augment
        images = dict(
            mean=knobs.mean,
            std=knobs.std,
            interpolation=knobs.interpolation,
            resize=knobs.eval_resize,
        )
        arrays, texts = LIBRARIES[kind].contents(
            torch_encoder.of(model.method, model.weights(which)), images
        )
    elif kind == "flax":
        arrays = saved.flat(model.weights(which))
        texts = {
            "config.json": {
                **model_card.public(model.config),
                "exported": {"step": model.step, "weights": which},
            }
        }
    else:
        arrays, texts = official.to_official(model.method, model.params, model.target), {}
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, content in texts.items():
        atomic_io.write(draft / name, json.dumps(content, indent=2) + "\n")
    array_io.write(draft / saved.WEIGHTS, arrays, {"format": "pt"})
    atomic_io.write(draft / "README.md", model_card.write(model, kind, which, folder))
    if folder.exists():
        folder.rmdir()
    draft.rename(folder)


def some_images(model, folder):
    """The bytes of a few images: of `folder`, or of the run.

    Raises:
      UserError: they are not there.
    """
    data = model.config.data
    try:
        source = (
            sources.open_folder(folder, "train") if folder else sources.from_config(data, "test")
        )
        source = source or sources.from_config(data, "train")
    except UserError as error:
        raise UserError(f"{error}; images for --check: --images=FOLDER") from error
    return [source.record(i)[0] for i in range(0, len(source), max(1, len(source) // CHECKED))][
        :CHECKED
    ]


def main(arguments):
    """Run the command."""
    given = flags.FLAGS
    log_to_console()
    if len(arguments) != 1 or not given.out:
        raise UserError("give a run, a format and a folder: RUN --format=timm --out=DIR")
    if given.format not in FORMATS:
        raise UserError(f"--format={given.format} is none of: {' | '.join(FORMATS)}")
    if given.check and given.format not in LIBRARIES:
        raise UserError(
            f"--check compares with another library, and --format={given.format} is for none"
        )
    if given.format == "safetensors" and given.weights:
        raise UserError(
            "--weights: a file of --format=safetensors holds all networks, the teacher too"
        )
    model = saved.open_model(arguments[0])
    which = "both" if given.format == "safetensors" else model.choose(given.weights)
    images = some_images(model, given.images) if given.check else []
    export(model, given.format, which, given.out)
    size = sum(path.stat().st_size for path in pathlib.Path(given.out).expanduser().iterdir())
    told = f"{which} weights of step {model.step}, {size / 1e6:.1f} MB"
    print(f"{given.out}: {told}; how to use them: {given.out}/README.md")
    if given.check:
        folder = pathlib.Path(given.out).expanduser()
        found = parity_check.compare(given.format, folder, model, model.weights(which), images)
        print(
            f"{given.format} on {len(images)} images: features differ by at most {found['features']:.1e} "
            f"(the largest is {found['size']:.1f}); its preprocessing by {found['pixels']:.1f} levels of 255 on average"
        )
        sys.exit(found["features"] > LIMIT)


def define_flags():
    """Define the flags of the command."""
    flags.DEFINE_string("format", None, f"Whom the folder is for: {' | '.join(FORMATS)}.")
    flags.DEFINE_string("out", None, "The folder to make.")
    flags.DEFINE_enum(
        "weights", None, ["online", "target"], "Default: those that the run's evaluators measured."
    )
    flags.DEFINE_bool("check", False, "Open the folder in the other library, and compare.")
    flags.DEFINE_string("images", None, "check: a folder of images; default: those of the run.")
