"""Short video clips with object masks in every frame: a folder in the layout of DAVIS, or embedded.

Letters: H W height and width, C channels.
"""

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Int32, UInt8

from lmim_jax.data import decode, tfds_source
from lmim_jax.data.eval import segmentation_masks
from lmim_jax.utils import buckets, faults
from lmim_jax.utils.errors import UserError

LAYOUT = "JPEGImages/480p/SEQUENCE/*.jpg and Annotations/480p/SEQUENCE/*.png"
VOID = 255  # in masks: neither object nor background; background in the official DAVIS evaluation
MIN_FRAMES = 3


@dataclasses.dataclass(frozen=True)
class Clip:
    """A sequence of frames and their masks.

    Attributes:
      name: name of the sequence.
      frames: the frames, as encoded bytes or as paths of files.
      masks: the masks of these frames, likewise.
    """

    name: str
    frames: tuple[bytes, ...] | tuple[pathlib.Path, ...]
    masks: tuple[bytes, ...] | tuple[pathlib.Path, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, time: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
        """A frame.

        Raises:
          UserError: it cannot be read.
        """
        encoded = self.frames[time]
        try:
            return decode.decode(_read(encoded), 0, channels)
        except (decode.BadImage, OSError) as error:
            raise self._unreadable(encoded, error) from error

    def mask(self, time: int) -> Int32[np.ndarray, "H W"]:
        """The numbers of the objects in a frame, 0 for the background.

        Raises:
          UserError: it cannot be read.
        """
        encoded = self.masks[time]
        try:
            mask = segmentation_masks.decode_mask(_read(encoded))
        except (decode.BadImage, OSError) as error:
            raise self._unreadable(encoded, error) from error
        return mask * (mask != VOID)

    def _unreadable(self, encoded: bytes | pathlib.Path, error: Exception) -> UserError:
        """The error that names the clip and, where there is one, the file."""
        if isinstance(encoded, pathlib.Path):
            return UserError(f"clip {self.name}: {encoded}: {error}")
        return UserError(f"clip {self.name}: {error}")


def _read(encoded: bytes | pathlib.Path) -> bytes:
    if isinstance(encoded, pathlib.Path):
        return faults.retry(encoded.read_bytes, lambda: str(encoded), faults.RETRY_SECONDS)
    return encoded


def open_clips(path: str, listed: str) -> list[Clip]:
    """The clips of a folder, or with path "" the embedded ones.

    Args:
      path: see `open_folder`.
      listed: see `open_folder`.

    Raises:
      UserError: see `open_folder`.
    """
    if path:
        return open_folder(path, listed)
    return embedded()


def embedded() -> list[Clip]:
    """The clips of `shapes/clips`, which are drawn on first use."""
    from tensorflow_datasets.proto import tf_example_pb2

    from lmim_jax.data.synthetic import shapes  # TFDS is slow to import

    builder = shapes.prepare(tfds_source.cache_folder(), "clips")
    records = builder.as_data_source(split="test", file_format="array_record").data_source
    clips = []
    for i in range(len(records)):
        example = tf_example_pb2.Example.FromString(records[i]).features.feature
        frames = tuple(example["frames"].bytes_list.value)
        masks = tuple(example["masks"].bytes_list.value)
        clips.append(Clip(f"{builder.info.full_name}[{i}]", frames, masks))
    return clips


def open_folder(path: str | pathlib.Path, listed: str = "") -> list[Clip]:
    """The clips of a folder in the layout of DAVIS 2017.

    Args:
      path: a folder with JPEGImages/480p/SEQUENCE/*.jpg and Annotations/480p/SEQUENCE/*.png: one
        mask per frame, with the same name.
      listed: a file below `path` with the names of sequences, such as ImageSets/2017/val.txt;
        "": all sequences.

    Raises:
      UserError: a folder, a sequence or a mask is missing.
    """
    root = buckets.local_path(path)
    images = root / "JPEGImages" / "480p"
    annotations = root / "Annotations" / "480p"
    for needed in (images, annotations):
        if not needed.is_dir():
            raise UserError(
                f"path={path!r}: there is no {needed}; a folder of clips contains {LAYOUT}"
            )
    if listed:
        names = _listed_names(root, listed)
    else:
        names = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    if not names:
        raise UserError(f"path={path!r}: no sequences; a folder of clips contains {LAYOUT}")
    return [_sequence(name, images / name, annotations / name) for name in names]


def _listed_names(root: pathlib.Path, listed: str) -> list[str]:
    """The names of sequences in a text file."""
    try:
        return (root / listed).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"listed={listed!r} cannot be read: {error}; it contains one sequence name per line"
        ) from error


def _sequence(name: str, images: pathlib.Path, annotations: pathlib.Path) -> Clip:
    """The clip whose frames and masks are in two folders."""
    files = [file for file in images.glob("*") if file.suffix.lower() in decode.SUFFIXES]
    if len(files) < MIN_FRAMES:
        raise UserError(
            f"{images}: {len(files)} frames; a sequence has at least {MIN_FRAMES}, as *.jpg"
        )
    frames = tuple(sorted(files))
    masks = tuple(annotations / f"{frame.stem}.png" for frame in frames)
    missing = [file for file in masks if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} masks of {name}); every frame needs a mask"
        )
    return Clip(name, frames, masks)
