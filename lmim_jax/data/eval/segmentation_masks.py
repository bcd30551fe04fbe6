"""Masks that give every pixel of an image the number of a class or an object, and folders of images with such masks."""

import dataclasses
import hashlib
import io
import pathlib

import numpy as np
from PIL import Image

from lmim_jax.data import sources
from lmim_jax.data.decode import BadImage, check_size
from lmim_jax.utils.errors import UserError


def numbers(data):
    """The numbers of a mask file: encoded bytes -> int32 [H, W].

    Those of the palette where there is one, as in VOC and DAVIS, or else the grey levels.

    Raises:
      BadImage: damaged, or colours, which are no numbers.
    """
    try:
        image = Image.open(io.BytesIO(data))
        check_size(*image.size)
        pixels = np.asarray(image)
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise BadImage(str(error) or type(error).__name__) from error
    if pixels.ndim == 3:
        if (pixels[..., :1] != pixels[..., :3]).any():
            raise BadImage(
                "a mask of colours; save it with a palette or in grey levels that number the classes"
            )
        pixels = pixels[..., 0]
    return pixels.astype(np.int32)


def placed(mask, augment):
    """A mask [H, W] as `augment.evaluation` sees its image: resized and cropped, nearest pixels, [*eval_size]."""
    height, width = mask.shape
    index = []
    for side, out in zip(mask.shape, augment.eval_size, strict=True):
        resized = augment.eval_resize * side // min(height, width)
        first = round((resized - out) / 2)
        index.append(
            np.clip(((first + np.arange(out) + 0.5) * side / resized).astype(int), 0, side - 1)
        )
    return mask[np.ix_(*index)]


@dataclasses.dataclass(frozen=True)
class Masked:
    """Images of a folder that have a mask, as a source; see sources.py.

    images: the folder and names of images below it, as a `sources.Folder`. files: full paths of their masks.
    """

    images: sources.Folder
    files: tuple[str, ...]
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __len__(self):
        return len(self.files)

    def record(self, index):
        """(encoded bytes, -1) of image `index`."""
        return self.images.record(index)

    def mask(self, index):
        """The encoded mask of image `index`."""
        return pathlib.Path(self.files[index]).read_bytes()

    def name(self, index):
        """The full path of image `index`."""
        return self.images.name(index)

    def identity(self):
        """What tells these images and masks from others."""
        names = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape")).hexdigest()
        return {**self.images.identity(), "masks": names}


def folder(images, masks):
    """The images of a folder whose names, but for the suffix, are those of masks in another; any depth.

    Raises:
      UserError: a folder is missing, holds no images, or no names agree.
    """
    stems = []
    for key, path in (("images", images), ("masks", masks)):
        root = pathlib.Path(path).expanduser()
        if not path or not root.is_dir():
            raise UserError(
                f"{key}={path!r} is no folder; images and masks are two folders with the same file names"
            )
        found = sources.walk(root)[0]
        if not found:
            raise UserError(
                f"{key}={path!r}: no images in this folder; `masks` are PNG files of class numbers"
            )
        stems.append({name.rpartition(".")[0]: name for name in found})
    both = sorted(stems[0].keys() & stems[1].keys())
    if not both:
        raise UserError(
            f"no mask in {masks} is named like an image in {images} (such as {min(stems[0])}.png for "
            f"{stems[0][min(stems[0])]})"
        )
    root, of_masks = pathlib.Path(images).expanduser(), pathlib.Path(masks).expanduser()
    names = tuple(stems[0][stem] for stem in both)
    pictures = sources.Folder(str(root), names, (-1,) * len(both), (), ())
    return Masked(pictures, tuple(str(of_masks / stems[1][stem]) for stem in both))
