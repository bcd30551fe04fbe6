"""The exported folder in the library it is for, beside the method itself: the largest difference of features."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lmim_jax.data import decode
from lmim_jax.data.augment import device
from lmim_jax.utils.errors import UserError

PACKAGES = {"timm": "torch timm", "hf": "torch transformers torchvision"}


def compare(kind, folder, model, params, images):
    """Run both on the same images.

    Args:
      kind: "timm" or "hf". folder: the exported one. model: the `saved.Model`; params: the weights that were exported.
      images: encoded bytes of some images, at least one.

    Returns:
      {"features": largest difference of any token, "size": largest feature, "pixels": mean difference, in levels of
      0 .. 255, between how the folder's own preprocessing and this project's evaluation prepare the images}.

    Raises:
      UserError: the other library is not installed.
    """
    try:
        import torch

        open_folder = OPEN[kind]
        with contextlib.redirect_stdout(io.StringIO()):
            tokens, prepare = open_folder(folder)
    except ImportError as error:
        raise UserError(
            f"--check needs what is not installed here ({error}): pip install {PACKAGES[kind]}"
        ) from error
    config, channels = model.config, model.method.channels
    sizes = dict(image_size=model.method.image_size, eval_size=model.method.feature_size)
    transform = device.from_config(config.augment, **sizes)
    # As large a canvas as the largest image needs: the other libraries resize whole images, too.
    pixels = [decode.decode(data, 0, channels) for data in images]
    side = max(max(x.shape[:2]) for x in pixels)
    canvases, places = np.empty((len(pixels), side, side, channels), np.uint8), []
    for x, canvas in zip(pixels, canvases, strict=True):
        places.append(decode.place_on_canvas(x, canvas))
    ours = jax.jit(transform.evaluation)({"image": canvases, "size": np.array(places, np.int32)})

    method = dataclasses.replace(model.method, dtype="float32", attention="xla")
    with jax.default_matmul_precision("float32"):
        expected = np.asarray(
            jax.jit(lambda params, images: tokens_of(method.features(params, images)))(params, ours)
        )
    ours = np.asarray(ours).transpose(0, 3, 1, 2)
    with torch.no_grad():
        theirs = tokens(torch.from_numpy(ours.copy())).numpy()
    mode = decode.MODES[channels]
    prepared = np.stack(
        [prepare(Image.fromarray(x.squeeze(-1) if mode == "L" else x, mode)) for x in pixels]
    )
    deviation = np.asarray(config.augment.std, np.float32).reshape(-1, 1, 1)
    return {
        "features": float(np.abs(theirs - expected).max()),
        "size": float(np.abs(expected).max()),
        "pixels": float(np.abs((prepared - ours) * deviation * 255).mean()),
    }


def tokens_of(features):
    """[B, 1 + N, D], CLS first where there is one."""
    patches = features["patches"]
    return (
        jnp.concatenate([features["cls"][:, None], patches], axis=1)
        if "cls" in features
        else patches
    )


def open_timm(folder):
    """(function from images [B, C, H, W] to tokens, function from a Pillow image to [C, H, W])."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model.forward_features, lambda image: prepare(image).numpy()


def open_hf(folder):
    """The same of transformers."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    prepare = lambda image: processor(image, return_tensors="np")["pixel_values"][0]
    return lambda images: model(images).last_hidden_state, prepare


OPEN = {"timm": open_timm, "hf": open_hf}
