"""Compares an exported folder, opened by the library it is for, with the method itself.

Letters: B batch, H W image height and width, C channels, N patches, D width.
"""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from lmim_jax.convert import onnx
from lmim_jax.convert.trained_model import TrainedModel
from lmim_jax.data import decode
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.image_options import ImageOptions
from lmim_jax.methods.base import Features, Params
from lmim_jax.utils.errors import UserError

PACKAGES = {
    "timm": "torch timm",
    "hf": "torch transformers torchvision",
    "onnx": "onnxruntime",
    "mmseg": "torch mmengine mmcv mmsegmentation",
}

Pixels = UInt8[np.ndarray, "h w C"]


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """An exported folder, opened by another library.

    Attributes:
      encode: images [B, C, H, W] -> tokens [B, 1 + N, D], or [B, N, D] without CLS; numpy arrays.
      preprocess: Pillow image -> numpy array [C, H, W]; None: the library leaves that to its user.
    """

    encode: Callable[[np.ndarray], np.ndarray]
    preprocess: Callable[[Image.Image], np.ndarray] | None = None


def compare(
    kind: str,
    folder: str | pathlib.Path,
    model: TrainedModel,
    params: Params,
    images: Sequence[bytes],
) -> dict[str, float]:
    """Run both encoders and both kinds of preprocessing on the same images.

    Args:
      kind: one of OPENERS.
      folder: the exported folder.
      model: what was exported.
      params: the exported weights.
      images: encoded bytes of one image or more.

    Returns:
      "features": the largest difference of any feature, on images as this project prepares them.
      "size": the largest absolute feature.
      "pixels": mean difference between the images as the library and as this project prepare them,
        in levels of 0 .. 255; absent where the library does not prepare images, or not such ones:
        bands that are neither gray nor colors.

    Raises:
      UserError: the other library is not installed.
    """
    foreign = _open_folder(kind, folder)
    options = ImageOptions.from_config(model.config.data)
    pixels = [decode.decode(data, 0, model.method.channels, options) for data in images]
    prepared = _preprocess(model, pixels)
    features = _encode(model, params, prepared)
    channels_first = prepared.transpose(0, 3, 1, 2)
    foreign_features = foreign.encode(np.ascontiguousarray(channels_first))
    features = features[:, -foreign_features.shape[1] :]  # without CLS where it does not give it
    found = {
        "features": float(np.abs(foreign_features - features).max()),
        "size": float(np.abs(features).max()),
    }
    if foreign.preprocess is None or model.method.channels not in decode.MODES:
        return found
    foreign_pixels = np.stack([foreign.preprocess(_to_pillow(image)) for image in pixels])
    stddev = np.asarray(model.config.augment.std, np.float32).reshape(-1, 1, 1)
    found["pixels"] = float(np.abs((foreign_pixels - channels_first) * stddev * 255).mean())
    return found


def _open_folder(kind: str, folder: str | pathlib.Path) -> ForeignModel:
    """Open an exported folder without the library's printed messages."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return OPENERS[kind](folder)
    except ImportError as error:
        raise UserError(
            f"--check needs packages that are not installed ({error}): pip install {PACKAGES[kind]}"
        ) from error


def _preprocess(model: TrainedModel, pixels: Sequence[Pixels]) -> Float[np.ndarray, "B H W C"]:
    """Prepare decoded images as this project's evaluation does."""
    augment = Augment.from_config(
        model.config.augment,
        image_size=model.method.image_size,
        eval_size=model.method.feature_size,
    )
    # The other libraries resize whole images, so the canvas is as large as the largest image.
    side = max(max(image.shape[:2]) for image in pixels)
    canvases = np.empty((len(pixels), side, side, model.method.channels), np.uint8)
    sizes = np.empty((len(pixels), 2), np.int32)
    for i, image in enumerate(pixels):
        sizes[i] = decode.place_on_canvas(image, canvases[i])
    return np.asarray(jax.jit(augment.evaluation)({"image": canvases, "size": sizes}))


def _encode(
    model: TrainedModel, params: Params, images: Float[np.ndarray, "B H W C"]
) -> Float[np.ndarray, "B 1+N D"]:
    """Compute the tokens of the method itself, in full float32 precision."""
    method: Any = model.method
    method = dataclasses.replace(method, dtype="float32", attention="xla")

    @jax.jit
    def encode(params: Params, images: Array) -> Array:
        return concatenate_tokens(method.features(params, images))

    with jax.default_matmul_precision("float32"):
        return np.asarray(encode(params, images))


def _to_pillow(pixels: Pixels) -> Image.Image:
    mode = decode.MODES[pixels.shape[-1]]
    if mode == "L":
        pixels = pixels.squeeze(-1)
    return Image.fromarray(pixels, mode)


def concatenate_tokens(features: Features) -> Float[Array, "B 1+N D"]:
    """Put the CLS token, if there is one, in front of the patch tokens."""
    if "cls" not in features:
        return features["patches"]
    return jnp.concatenate([features["cls"][:, None], features["patches"]], axis=1)


def open_timm(folder: str | pathlib.Path) -> ForeignModel:
    """Open a folder of --format=timm; it needs the packages torch and timm."""
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    def preprocess(image: Image.Image) -> np.ndarray:
        return transform(image).numpy()

    return ForeignModel(_without_gradients(model.forward_features), preprocess)


def open_hf(folder: str | pathlib.Path) -> ForeignModel:
    """Open a folder of --format=hf; it needs the packages torch, torchvision and transformers."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def encode(images: Any) -> Any:
        return model(images).last_hidden_state

    def preprocess(image: Image.Image) -> np.ndarray:
        return processor(image, return_tensors="np")["pixel_values"][0]

    return ForeignModel(_without_gradients(encode), preprocess)


def open_onnx(folder: str | pathlib.Path) -> ForeignModel:
    """Open a folder of --format=onnx; it needs the package onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        pathlib.Path(folder, onnx.FILE), providers=["CPUExecutionProvider"]
    )
    outputs = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> np.ndarray:
        found = dict(zip(outputs, session.run(None, {"images": images}), strict=True))
        if onnx.CLS not in found:
            return found[onnx.PATCHES]
        return np.concatenate([found[onnx.CLS][:, None], found[onnx.PATCHES]], axis=1)

    def encode(images: np.ndarray) -> np.ndarray:
        """The first image alone, then the others together: the batch must be free."""
        parts = [run(part) for part in (images[:1], images[1:]) if len(part)]
        return np.concatenate(parts)

    return ForeignModel(encode)


def open_mmseg(folder: str | pathlib.Path) -> ForeignModel:
    """Open a folder of --format=mmseg; it needs torch, mmengine, mmcv and mmsegmentation."""
    import mmseg.models  # noqa: F401  (registers the backbone)
    from mmengine.config import Config
    from mmseg.registry import MODELS

    config = Config.fromfile(pathlib.Path(folder, "config.py"))
    model = MODELS.build(config.model.backbone)
    model.init_weights()
    model.eval()

    def encode(images: Any) -> Any:
        return model(images)[-1].flatten(2).transpose(1, 2)

    return ForeignModel(_without_gradients(encode))


def _without_gradients(encode: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of numpy arrays that calls a function of torch tensors."""

    def call(images: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return encode(torch.from_numpy(images)).numpy()

    return call


OPENERS: dict[str, Callable[[str | pathlib.Path], ForeignModel]] = {
    "timm": open_timm,
    "hf": open_hf,
    "onnx": open_onnx,
    "mmseg": open_mmseg,
}
