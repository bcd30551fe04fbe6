"""Segmentation masks, which give every pixel the number of a class or an object, and their images.

Letters: H W height and width of an image, S S' height and width of evaluation images.
"""

import dataclasses
import io
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int, Int32
from PIL import Image

from lmim_jax.data import folder_listing, sources
from lmim_jax.data.augment.device import Augment
from lmim_jax.data.decode import BadImage, check_size
from lmim_jax.data.eval.eval_data import EvaluationData, Subset, random_indices
from lmim_jax.utils import buckets, faults
from lmim_jax.utils.checksum import names_checksum
from lmim_jax.utils.errors import UserError


def decode_mask(data: bytes) -> Int32[np.ndarray, "H W"]:
    """Decode the class numbers of a mask file: the palette indices (VOC, DAVIS) or gray levels.

    Args:
      data: the encoded bytes of an image file.

    Raises:
      BadImage: the file is damaged, or it has colors, which are not numbers.
    """
    try:
        image = Image.open(io.BytesIO(data))
        check_size(*image.size)
        pixels = np.asarray(image)
    except BadImage:
        raise
    except Exception as error:  # decoders raise exceptions of any type on damaged data
        if faults.is_environment_fault(error):
            raise
        raise BadImage(str(error) or type(error).__name__) from error
    if pixels.ndim == 3:
        if (pixels[..., :1] != pixels[..., :3]).any():
            raise BadImage(
                "a mask in colors; save it with a palette or in gray levels that number the classes"
            )
        pixels = pixels[..., 0]
    return pixels.astype(np.int32)


def resize_and_crop(mask: Int[np.ndarray, "H W"], augment: Augment) -> Int[np.ndarray, "S S'"]:
    """Resize (nearest pixel) and crop a mask exactly as `augment.evaluation` does its image."""
    height, width = augment.resized(np.array(mask.shape), xp=np).tolist()
    index = []
    for side, resized, out in zip(mask.shape, (height, width), augment.eval_size, strict=True):
        first = round((resized - out) / 2)
        nearest = ((first + np.arange(out) + 0.5) * side / resized).astype(int)
        index.append(np.clip(nearest, 0, side - 1))
    return mask[np.ix_(*index)]


@dataclasses.dataclass(frozen=True)
class ImagesWithMasks:
    """Images of a folder that have a segmentation mask, as a source (see data/sources.py).

    Attributes:
      images: the folder and the names of the images below it.
      files: full paths of the masks, one per image.
      classes: names of the classes of whole images; always empty.
    """

    images: sources.FolderSource
    files: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def record(self, index: int) -> tuple[bytes, int]:
        """Encoded bytes of an image, and -1 for its class."""
        return self.images.record(index)

    def mask(self, index: int) -> bytes:
        """The encoded mask of an image."""
        return pathlib.Path(self.files[index]).read_bytes()

    def name(self, index: int) -> str:
        """The full path of an image."""
        return self.images.name(index)

    def identity(self) -> dict[str, Any]:
        """What distinguishes these images and masks from others, as JSON values."""
        names = names_checksum(self.files)
        return {**self.images.identity(), "masks": names}


def open_folders(images: str, masks: str) -> ImagesWithMasks:
    """The images of a folder that have a mask with the same name, up to the suffix, in another.

    Args:
      images: the folder of images, at any depth.
      masks: the folder of masks, at the same depth.

    Raises:
      UserError: a folder is missing or has no images, or no names match.
    """
    image_files = _files_by_stem("images", images)
    mask_files = _files_by_stem("masks", masks)
    stems = sorted(image_files.keys() & mask_files.keys())
    if not stems:
        example = min(image_files)
        raise UserError(
            f"no mask in {masks} is named like an image in {images} (for example {example}.png "
            f"for {image_files[example]})"
        )
    names = folder_listing.share_names(image_files[stem] for stem in stems)
    mask_root = buckets.local_path(masks)
    folder = sources.FolderSource(
        root=str(buckets.local_path(images)),
        files=names,
        labels=None,
        classes=(),
    )
    return ImagesWithMasks(folder, tuple(str(mask_root / mask_files[stem]) for stem in stems))


def _files_by_stem(key: str, path: str) -> dict[str, str]:
    """{name without suffix: name} of the image files below the folder that option `key` names."""
    root = buckets.local_path(path)
    if not path or not root.is_dir():
        raise UserError(
            f"{key}={path!r} is not a folder; images and masks are two folders with the same file "
            "names"
        )
    files = folder_listing.list_folder(root).images
    if not files:
        raise UserError(
            f"{key}={path!r}: no images in this folder; `masks` are PNG files of class numbers"
        )
    return {name.rpartition(".")[0]: name for name in files}


def open_images_with_masks(
    data: EvaluationData,
    *,
    images: str,
    masks: str,
    max_train: int,
    max_test: int,
    augment: Augment,
) -> EvaluationData:
    """Images that have masks: from two folders, or from the dataset of the run.

    Args:
      data: the images of the run. In the masks of its dataset, 255 is the object.
      images: folder of images; "" together with `masks`: the images of the run.
      masks: folder of their masks.
      max_train: the largest number of training images.
      max_test: the largest number of test images. Images are drawn at random from the two splits,
        or from two halves of the images where there is one split.
      augment: gives the size of the evaluation images.

    Raises:
      UserError: there are no masks, or too few images; see `open_folders`.
    """
    if images or masks:
        train: Any = open_folders(images, masks)
        test = None
    else:
        train = data.sources["train"]
        test = data.sources["test"]
    if train.mask(0) is None:
        raise UserError(
            "the images of this run have no masks to compare segments with; set `images` and "
            "`masks` of the evaluator to two folders with the same file names"
        )
    train_order = random_indices(train, len(train))
    if test is None:
        test = train
        half = len(train) // 2
        test_order = train_order[:half]
        train_order = train_order[half:]
    else:
        test_order = random_indices(test, len(test))
    chosen = {
        "train": Subset(train, train_order[:max_train]),
        "test": Subset(test, test_order[:max_test]),
    }
    if not all(len(subset) for subset in chosen.values()):
        raise UserError(
            f"{len(train)} image(s) with masks are too few: probes are trained on some of them and "
            "tested on others"
        )
    return data.with_sources(chosen, augment, as_stored=True)


def _read_mask(source: Any, index: int, retry_seconds: float) -> Int32[np.ndarray, "h w"]:
    return faults.retry(
        lambda: decode_mask(source.mask(index)), lambda: source.name(index), retry_seconds
    )


def read_masks(
    data: EvaluationData, split: str, indices: Iterable[int]
) -> Int32[np.ndarray, "I S S'"]:
    """The masks of some images of a split, resized and cropped like the images of `data.batches`.

    Args:
      data: as `open_images_with_masks` returns it.
      split: "train" or "test".
      indices: places of the images in the split.

    Raises:
      UserError: a mask cannot be read.
    """
    source = data.sources[split]
    found = []
    for index in indices:
        try:
            mask = _read_mask(source, index, data.config.timeout)
        except (BadImage, OSError) as error:
            raise UserError(f"the mask of {source.name(index)} cannot be used: {error}") from error
        found.append(resize_and_crop(mask, data.augment))
    return np.stack(found)
