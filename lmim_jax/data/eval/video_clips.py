"""Short clips with masks of objects in every frame: a folder laid out as DAVIS, or the embedded ones."""

import dataclasses
import pathlib

from lmim_jax.data import decode, tfds_source
from lmim_jax.data.eval import segmentation_masks
from lmim_jax.utils.errors import UserError

LAYOUT = "JPEGImages/480p/SEQUENCE/*.jpg and Annotations/480p/SEQUENCE/*.png"
VOID = 255  # in masks: neither an object nor background; counts as background, as in DAVIS's evaluation


@dataclasses.dataclass(frozen=True)
class Clip:
    """A sequence of frames and their masks: encoded bytes, or paths of files."""

    name: str
    frames: tuple
    masks: tuple

    def __len__(self):
        return len(self.frames)

    def frame(self, time, channels):
        """Frame number `time`: uint8 [H, W, C]."""
        return self._read(decode.decode, self.frames[time], 0, channels)

    def mask(self, time):
        """Numbers of the objects in a frame, 0 for none: int32 [H, W]."""
        mask = self._read(segmentation_masks.numbers, self.masks[time])
        return mask * (mask != VOID)

    def _read(self, decoder, source, *args):
        try:
            return decoder(
                source.read_bytes() if isinstance(source, pathlib.Path) else source, *args
            )
        except (decode.BadImage, OSError) as error:
            file = f"{source}: " if isinstance(source, pathlib.Path) else ""
            raise UserError(f"clip {self.name}: {file}{error}") from error


def embedded():
    """The clips of `shapes/clips`, drawn on first use."""
    from tensorflow_datasets.proto import tf_example_pb2

    from lmim_jax.data.synthetic import shapes  # TFDS is slow to import

    builder = shapes.prepare(tfds_source.cache(), "clips")
    records = builder.as_data_source(split="test", file_format="array_record").data_source
    found = []
    for i in range(len(records)):
        example = tf_example_pb2.Example.FromString(records[i]).features.feature
        frames, annotations = (
            tuple(example[name].bytes_list.value) for name in ("frames", "masks")
        )
        found.append(Clip(f"{builder.info.full_name}[{i}]", frames, annotations))
    return found


def folder(path, listed=""):
    """The clips of a folder laid out as DAVIS 2017.

    Args:
      path: holds JPEGImages/480p/SEQUENCE/*.jpg and Annotations/480p/SEQUENCE/*.png, a mask for every frame, with the
        same name. listed: a file below it with the names of sequences, such as ImageSets/2017/val.txt; "": all.

    Raises:
      UserError: a folder, a sequence or a mask is missing.
    """
    root = pathlib.Path(path).expanduser()
    images, annotations = (root / name / "480p" for name in ("JPEGImages", "Annotations"))
    for needed in (images, annotations):
        if not needed.is_dir():
            raise UserError(
                f"path={path!r}: there is no {needed}; a folder of clips holds {LAYOUT}"
            )
    names = sorted(sub.name for sub in images.iterdir() if sub.is_dir())
    if listed:
        try:
            names = (root / listed).read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"listed={listed!r} cannot be read: {error}; it names sequences, one a line"
            ) from error
    if not names:
        raise UserError(f"path={path!r}: no sequences; a folder of clips holds {LAYOUT}")
    return [_sequence(name, images / name, annotations / name) for name in names]


def _sequence(name, images, annotations):
    """The clip in two folders."""
    frames = tuple(
        sorted(file for file in images.glob("*") if file.suffix.lower() in decode.SUFFIXES)
    )
    if len(frames) < 3:
        raise UserError(f"{images}: {len(frames)} frames; a sequence has at least 3, as *.jpg")
    found = tuple(annotations / f"{frame.stem}.png" for frame in frames)
    if missing := [file for file in found if not file.is_file()]:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} masks of {name}); every frame needs one to be scored"
        )
    return Clip(name, frames, found)
