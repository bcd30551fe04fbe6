"""How encoded images become levels 0 .. 255: the options of `config.data` that decide it."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.utils.errors import UserError

MAX_PIXELS = 50_000_000  # against decompression bombs; read from the header, before decoding
MAX_SIDE = 65_535  # that of JPEG: resizing a line of millions of pixels takes seconds
AUTO = "auto"
FULL = "full"
SEVERAL = ";"  # between the ranges of several bands
TRANSPARENCY = ("ignore", "white", "black")

Range = tuple[float, float]


class BadImage(ValueError):
    """The bytes are not a usable image; the message says why."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One modality of an image: a file of each record.

    Attributes:
      name: of the modality; "": there is no other one.
      channels: of its pixels.
      options: what is done to them.
    """

    name: str
    channels: int
    options: "ImageOptions"


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What is done to the pixels of a file; the defaults leave images of 8 bits as they are.

    Attributes:
      ranges: (lowest, highest) value of samples that are not of 8 bits, which become the levels 0
        and 255; one for all bands, or one for each band; (): the full range of their type.
      max_pixels: larger images are bad.
      exif_orientation: turn images upright by their EXIF orientation.
      transparency: one of TRANSPARENCY: the colors below transparent pixels count, or those of a
        background.
      parts: the modalities, in the order of their channels; (): one, without a name.
    """

    ranges: tuple[Range, ...] = ()
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = False
    transparency: str = "ignore"
    parts: tuple[Part, ...] = ()

    def parts_of(self, channels: int) -> tuple[Part, ...]:
        """The modalities of images of so many channels; an image of one is a part of itself."""
        return self.parts or (Part("", channels, self),)

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ImageOptions":
        """The options of `config.data`; a range that is not known yet is the full range.

        Raises:
          UserError: an option has no meaning.
        """
        if config.transparency not in TRANSPARENCY:
            raise UserError(
                f"config.data.transparency={config.transparency!r} must be one of: "
                f"{' | '.join(TRANSPARENCY)}"
            )
        if config.max_pixels < 1:
            raise UserError(f"config.data.max_pixels={config.max_pixels} must be at least 1")
        whole = cls(
            ranges=_known_ranges(config.range, config.channels),
            max_pixels=config.max_pixels,
            exif_orientation=config.exif_orientation,
            transparency=config.transparency,
        )
        parts = []
        for name, part in config.modalities.items():
            ranges = _known_ranges(part.range, part.channels)
            parts.append(Part(name, part.channels, dataclasses.replace(whole, ranges=ranges)))
        whole.raise_limit_of_pillow()
        return dataclasses.replace(whole, parts=tuple(parts))

    def raise_limit_of_pillow(self) -> None:
        """Let Pillow open images of `max_pixels`; it refuses those above a limit of its own."""
        if Image.MAX_IMAGE_PIXELS and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = self.max_pixels

    def check_size(self, width: int, height: int) -> None:
        """Raise BadImage if an image has too many pixels, or a side above MAX_SIDE."""
        if max(width, height) > MAX_SIDE:
            raise BadImage(f"{width} x {height} pixels, a side of more than {MAX_SIDE}")
        if width * height > self.max_pixels:
            raise BadImage(
                f"{width} x {height} pixels, more than {self.max_pixels} (config.data.max_pixels)"
            )


def _known_ranges(text: str, channels: int) -> tuple[Range, ...]:
    """The numbers of a range; (): the full range, or one that is not measured yet."""
    if text in (AUTO, FULL) or percentiles(text) is not None:
        return ()
    return parse_ranges(text, channels)


def percentiles(text: str) -> Range | None:
    """The numbers of "1%,99%"; None: it is something else.

    Raises:
      UserError: they are not percentiles in ascending order.
    """
    if "%" not in text:
        return None
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().endswith("%") for part in parts):
        low, high = _numbers(text.replace("%", ""))
        if 0 <= low < high <= 100:
            return low, high
    raise UserError(f"config.data.range={text!r}: percentiles are given as in 1%,99%")


def parse_ranges(text: str, channels: int) -> tuple[Range, ...]:
    """The pairs of "0,4095", or of "0,4095;0,1000" with a pair for each channel.

    Raises:
      UserError: the text is something else, or there is another number of pairs than channels.
    """
    ranges = tuple(_numbers(part) for part in text.split(SEVERAL))
    if len(ranges) not in (1, channels):
        raise UserError(
            f"config.data.range={text!r} has {len(ranges)} ranges; give one, or one for each of "
            f"the config.data.channels={channels}"
        )
    return ranges


def format_ranges(ranges: tuple[Range, ...]) -> str:
    """The text that `parse_ranges` reads."""
    return SEVERAL.join(f"{low:.9g},{high:.9g}" for low, high in ranges)


def _numbers(text: str) -> Range:
    """Two finite numbers, the second above the first."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = np.inf, np.inf
    if not (np.isfinite([low, high]).all() and low < high):
        raise UserError(
            f"config.data.range={text!r} must be {AUTO}, {FULL}, two numbers as in 0,4095 (of each "
            f"band: 0,4095{SEVERAL}0,1000) or percentiles as in 1%,99%"
        )
    return low, high


def to_levels(
    values: Shaped[np.ndarray, "h w C"], ranges: tuple[Range, ...] = ()
) -> UInt8[np.ndarray, "h w C"]:
    """Samples of any type as levels 0 .. 255: rounded, values outside of the range clipped.

    Samples of 8 bits stay as they are; NaN becomes 0.

    Args:
      values: integers, floating point numbers or bools.
      ranges: see `ImageOptions`.

    Raises:
      BadImage: without a range, which numbers other than integers of 8 or 16 bits and those in
        0 .. 1 need.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if not ranges and not _is_in_full_range(values):
        raise BadImage(
            f"{values.dtype} samples from {np.nanmin(values):g} to {np.nanmax(values):g}: "
            "config.data.range must say which are black and white"
        )
    levels = np.empty(values.shape, np.uint8)
    for band in range(values.shape[-1]):
        low, high = full_range(values.dtype)
        if ranges:
            low, high = ranges[band % len(ranges)]
        scaled = (values[..., band].astype(np.float64) - low) * (255 / (high - low))
        levels[..., band] = np.rint(np.clip(np.nan_to_num(scaled), 0, 255))
    return levels


def _is_in_full_range(values: Shaped[np.ndarray, "h w C"]) -> bool:
    """Whether the full range of the type says what is black and white."""
    if values.dtype.kind == "f":
        return not np.any((values < 0) | (values > 1))
    return values.dtype.itemsize <= 2


def full_range(dtype: Any) -> Range:
    """The lowest and highest value of a type; of floating point numbers, 0 and 1."""
    if np.issubdtype(dtype, np.floating):
        return 0.0, 1.0
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)


def as_read(config: dict[str, Any], data: ConfigDict) -> dict[str, Any]:
    """The config of a run with the options by which its images are read taken from others.

    Args:
      config: of the run, plain values; it is changed and returned.
      data: `config.data` of other images of the same kind.
    """
    for key in ("canvas", "range", "max_pixels", "exif_orientation", "transparency"):
        config["data"][key] = data[key]
    for name, options in data.modalities.items():
        config["data"]["modalities"][name]["range"] = options.range
    return config
