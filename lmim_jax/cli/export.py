"""Exports a trained encoder for other libraries: a folder that they open, with a model card.

    lmim export --workdir=RUN --format=timm --out=DIR
    lmim export --workdir=RUN --format=hf --out=DIR --weights=target --check

--format:
  timm         timm.create_model("local-dir:DIR", pretrained=True)
  hf           transformers.AutoModel.from_pretrained("DIR")
  onnx         onnxruntime.InferenceSession("DIR/model.onnx"): mean, cls and patches of images
  mmseg        mmsegmentation: DIR/config.py, UPerNet on this encoder
  detectron2   detectron2's ViTDet: DIR/config.py, Mask R-CNN on this encoder
  flax         lmim_jax.load("DIR"): all networks, with --weights for the encoder
  safetensors  the whole model, teacher included, under the names of the method's official PyTorch
               code; lmim import-weights reads it back without any change

--check runs the other library on images of the run, or of --images=FOLDER, and prints the largest
difference of features: exit code 1 if it is above 1e-4, 2 if that library is not installed.

--push=USER/NAME uploads the folder to the Hugging Face Hub when it is complete and, with --check,
when features agree (pip install 'lmim_jax[hub]', hf auth login); --private: seen by its owner only.

onnx needs the package onnx (pip install 'lmim_jax[onnx]'); mmseg and detectron2, whose weights are
PyTorch files, need torch.
"""

import functools
import importlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from lmim_jax.cli import app
from lmim_jax.convert import (
    detectron2,
    hf,
    hub,
    mmseg,
    model_card,
    onnx,
    origin,
    parity_check,
    timm,
    torch_encoder,
)
from lmim_jax.convert.official import base as official
from lmim_jax.data import sources
from lmim_jax.train import modality_subset, runs
from lmim_jax.utils import array_io, atomic_io, buckets
from lmim_jax.utils.errors import UserError, did_you_mean
from lmim_jax.utils.logging import log_to_console

RECIPES: dict[str, str | None] = {}
LIBRARIES: dict[str, Any] = {"timm": timm, "hf": hf, "mmseg": mmseg, "detectron2": detectron2}
TORCH_FILES = ("mmseg", "detectron2")  # formats whose weights are a file of PyTorch
TORCH_WEIGHTS_FILE = "backbone.pth"
FORMATS = ("timm", "hf", "onnx", "mmseg", "detectron2", "flax", "safetensors")
PACKAGES = {  # that formats need: (module, how to install it)
    "onnx": ("onnx", "'lmim_jax[onnx]'"),
    "mmseg": ("torch", "torch"),
    "detectron2": ("torch", "torch"),
}
TOLERANCE = 1e-4  # of the largest difference of any feature, float32 on a CPU
CHECKED_IMAGES = 16

Files = dict[str, Callable[[pathlib.Path], None]]  # {name: writes the file at a path}


def export(
    run: runs.Run,
    kind: str,
    which: str,
    folder: buckets.Pathname,
    license_name: str = "",
    base_model: str = "",
    repo: str = "",
) -> None:
    """Write the folder.

    Args:
      run: an opened run or exported folder.
      kind: one of FORMATS.
      which: "online", "target", or "both" for safetensors.
      folder: must be empty or not exist.
      license_name: for the model card, see `model_card.write`.
      base_model: for the model card.
      repo: for the model card.

    Raises:
      UserError: the folder is not empty, or the format cannot hold this encoder.
    """
    folder = buckets.path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder} is not empty; give another folder")
    files = _files(run, kind, which)
    card = model_card.write(run, kind, which, license_name, base_model, repo)
    if isinstance(folder, buckets.BucketPath):
        with buckets.local_folder(folder) as local:
            _write(local, files, card)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        draft = pathlib.Path(temporary)
        _write(draft, files, card)
        for path in draft.iterdir():
            path.rename(folder / path.name)


def _write(folder: pathlib.Path, files: Files, card: str) -> None:
    """Write the files into a folder."""
    for name, write in files.items():
        write(folder / name)
    atomic_io.write(folder / "README.md", card)


def _files(run: runs.Run, kind: str, which: str) -> Files:
    """What an exported folder holds besides the model card."""
    if kind == "safetensors":
        return _weights_and_texts(official.to_official(run.method, run.params, run.target), {})
    params = run.encoder_params(which)
    if kind == "flax":
        config = model_card.public_config(run.config)
        config["exported"] = {"step": run.step, "weights": which, "origin": origin.read(run.folder)}
        return _weights_and_texts(runs.flatten_params(params), {"config.json": config})
    augment = run.config.augment
    preprocessing = {
        "mean": augment.mean,
        "std": augment.std,
        "interpolation": augment.interpolation,
        "resize": augment.eval_resize,
    }
    encoder = torch_encoder.from_method(run.method, params)
    if kind == "onnx":
        return {onnx.FILE: functools.partial(onnx.write, encoder=encoder, images=preprocessing)}
    arrays, texts = LIBRARIES[kind].contents(encoder, preprocessing)
    if kind not in TORCH_FILES:
        return _weights_and_texts(arrays, texts)
    files: Files = {TORCH_WEIGHTS_FILE: functools.partial(array_io.write_torch, arrays=arrays)}
    for name, text in texts.items():
        files[name] = functools.partial(atomic_io.write, content=text)
    return files


def _weights_and_texts(arrays: array_io.Arrays, texts: Mapping[str, Any]) -> Files:
    """Files of a safetensors file and of values that are written as JSON."""
    metadata = {"format": "pt"}
    files: Files = {
        runs.WEIGHTS_FILE: functools.partial(array_io.write, arrays=arrays, metadata=metadata)
    }
    for name, value in texts.items():
        text = json.dumps(value, indent=2) + "\n"
        files[name] = functools.partial(atomic_io.write, content=text)
    return files


def read_some_images(run: runs.Run, folder: str | None) -> list[bytes]:
    """The files of a few images.

    Args:
      run: whose test images, or else training images, are read.
      folder: images to read instead; None: those of the run.

    Raises:
      UserError: there are no images.
    """
    data = run.config.data
    try:
        source: sources.Source | None
        if folder:
            source = sources.open_folder(folder, "train")
        else:
            source = sources.from_config(data, "test")
        if source is None:
            source = sources.from_config(data, "train")
    except UserError as error:
        raise UserError(f"{error}; give images for --check with --images=FOLDER") from error
    assert source is not None
    every = max(1, len(source) // CHECKED_IMAGES)
    indices = range(0, len(source), every)[:CHECKED_IMAGES]
    return [source.record(i)[0] for i in indices]


def main(arguments: list[str]) -> None:
    """Export and check."""
    given = flags.FLAGS
    log_to_console()
    workdir, _ = app.run_and_arguments(arguments)
    _check_flags()
    if given.modalities and given.format == "safetensors":
        raise UserError(
            "--format=safetensors holds the decoder too, which is for all modalities together: "
            "leave out --modalities"
        )
    run = modality_subset.choose(runs.open_run(workdir), given.modalities)
    which = "both"
    if given.format != "safetensors":
        which = run.choose_weights(given.weights)
    images = []
    if given.check:
        images = read_some_images(run, given.images)
    export(run, given.format, which, given.out, given.license, given.base_model, given.push)
    folder = buckets.path(given.out)
    size = sum(buckets.file_sizes(folder).values())
    print(
        f"{given.out}: {which} weights of step {run.step}, {size / 1e6:.1f} MB; "
        f"how to use them: {given.out}/README.md"
    )
    if given.check and not _check(run, which, folder, images):
        sys.exit(1)
    if given.push:
        assert isinstance(folder, pathlib.Path)
        message = (
            f"{run.config.method.name}, {which} weights of step {run.step}, for {given.format}"
        )
        print(f"pushed to {hub.push(folder, given.push, given.private, message)}")


def _check_flags() -> None:
    """Raise a UserError for flags that do not go together."""
    given = flags.FLAGS
    if not given.out or not given.format:
        raise UserError("give a format and a folder, such as --format=timm --out=DIR")
    if given.format not in FORMATS:
        hint = did_you_mean(given.format, FORMATS)
        raise UserError(f"--format={given.format} must be one of: {' | '.join(FORMATS)}{hint}")
    is_bucket = isinstance(buckets.path(given.out), buckets.BucketPath)
    if given.check and is_bucket:
        raise UserError(f"--check opens the exported folder, not in a bucket: --out={given.out}")
    if given.push and is_bucket:
        raise UserError(f"--push uploads a local folder, not one in a bucket: --out={given.out}")
    if given.private and not given.push:
        raise UserError("--private goes with --push=USER/NAME")
    if given.push:
        hub.check(given.push)
    if given.check and given.format == "detectron2":
        raise UserError(
            "--check: detectron2's ViTDet has no CLS token and attends within windows, so that its "
            "features are others by design; --format=timm --check compares the same weights"
        )
    if given.check and given.format not in parity_check.OPENERS:
        raise UserError(
            f"--check compares with another library, which --format={given.format} does not need"
        )
    _check_packages(given.format)
    if given.format == "safetensors" and given.weights:
        raise UserError(
            "--weights: a file of --format=safetensors holds all networks, the teacher too"
        )


def _check_packages(kind: str) -> None:
    """Raise a UserError for a format that needs a package that is not installed."""
    if kind not in PACKAGES:
        return
    module, how = PACKAGES[kind]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--format={kind} needs a package that is not installed ({error}): pip install {how}"
        ) from error


def _check(run: runs.Run, which: str, folder: buckets.Path, images: list[bytes]) -> bool:
    """Compare with the other library; whether features agree."""
    kind = flags.FLAGS.format
    assert isinstance(folder, pathlib.Path)
    found = parity_check.compare(kind, folder, run, run.encoder_params(which), images)
    text = (
        f"{kind} on {len(images)} images: features differ by at most {found['features']:.1e} "
        f"(the largest is {found['size']:.1f})"
    )
    if "pixels" in found:
        text += f"; its preprocessing differs by {found['pixels']:.1f} levels of 255 on average"
    print(text)
    return found["features"] <= TOLERANCE


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir(
        "The folder of a run, or an exported folder; may be given without --workdir."
    )
    flags.DEFINE_list(
        "modalities",
        [],
        "Of a run on several modalities: those that the exported encoder takes; by default all. "
        "Example: --modalities=thermal",
    )
    flags.DEFINE_string(
        "format",
        None,
        f"The library to export for: {' | '.join(FORMATS)}. Example: --format=timm",
    )
    flags.DEFINE_string("out", None, "The folder to write. Example: --out=exported")
    flags.DEFINE_enum(
        "weights",
        None,
        ["online", "target"],
        "The encoder's weights; by default the choice of its recipe. Example: --weights=target",
    )
    flags.DEFINE_string(
        "license",
        "",
        "The license of the weights, for the model card, as the Hugging Face Hub names it. "
        "Example: --license=cc-by-nc-4.0",
    )
    flags.DEFINE_string(
        "base_model",
        "",
        "The model on the Hub that training began with, for the model card. "
        "Example: --base_model=facebook/vit-mae-base",
    )
    flags.DEFINE_bool(
        "check",
        False,
        "Open the folder in the other library and compare features. Example: --check",
    )
    flags.DEFINE_string(
        "push",
        "",
        "USER/NAME on the Hugging Face Hub, where the folder is uploaded when it is complete. "
        "Example: --push=me/latent-mim-vit-b",
    )
    flags.DEFINE_bool(
        "private",
        False,
        "With --push: only its owner sees the repository. Example: --private",
    )
    flags.DEFINE_string(
        "images",
        None,
        "With --check: a folder of images; by default those of the run. Example: --images=photos",
    )
