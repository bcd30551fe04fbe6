"""The range of the pixel values of a run: measured on some training images, kept with the run."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import UnidentifiedImageError

from lmim_jax.data import decode, records
from lmim_jax.data.image_options import (
    AUTO,
    FULL,
    BadImage,
    ImageOptions,
    Range,
    format_ranges,
    full_range,
    parse_ranges,
    percentiles,
)
from lmim_jax.data.samples import COLORS, Samples, read_header
from lmim_jax.data.sources import Source
from lmim_jax.utils import faults
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

SAMPLED = 64  # images that are read
VALUES = 1 << 14  # values of each band of an image, at most
LEAST_USE = 16  # a warning, if values take less than this part of the range


@dataclasses.dataclass(frozen=True)
class OneModality:
    """The files of one modality of the images of a source.

    Attributes:
      source: the images.
      place: of the modality among those of a record.
    """

    source: Source
    place: int

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> tuple[bytes, int]:
        """(encoded bytes, class) of an image in this modality."""
        data, label = self.source.record(index)
        return records.unpack(data)[self.place], label

    def name(self, index: int) -> str:
        """The name of an image, for messages."""
        return self.source.name(index)


def modalities_of(config: ConfigDict, source: Any) -> list[tuple[str, ConfigDict, Any]]:
    """(name, `config.data` of this modality alone, its images) of every modality of images.

    Args:
      config: `config.data`; of one modality, it is returned itself, with the name "".
      source: the images.
    """
    if not config.modalities:
        return [("", config, source)]
    found = []
    for place, (name, options) in enumerate(config.modalities.items()):
        part = config.copy_and_resolve_references()
        part.update(range=options.range, channels=options.channels)
        part.modalities = ConfigDict()
        found.append((name, part, OneModality(source, place)))
    return found


def resolve_all(
    config: ConfigDict, source: Any, stored: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """`resolve` for every modality, each with a range of its own.

    Args:
      config: `config.data`; it is not changed, see `set_ranges`.
      source: the training images.
      stored: {modality: range} of the run that is resumed; None: a new run.

    Returns:
      ({modality, "" of a single one: range}, lines on the values that were found).

    Raises:
      UserError: see `resolve`.
    """
    ranges = {}
    lines = []
    for name, part, images in modalities_of(config, source):
        part = part.copy_and_resolve_references()
        found = resolve(part, images, stored.get(name) if stored else None)
        if name and found:
            lines.append(f"{name}:")
        lines += found
        ranges[name] = part.range
    return ranges, lines


def set_ranges(config: ConfigDict, ranges: Mapping[str, str]) -> None:
    """Put the ranges that `resolve_all` found into `config.data`."""
    for name, text in ranges.items():
        section = config.modalities[name] if name else config
        section.range = text


def resolve(config: ConfigDict, source: Source, stored: str | None = None) -> list[str]:
    """Replace `config.range` by numbers where it is to be measured, or check those given.

    Args:
      config: `config.data`, of one modality; it is changed in place.
      source: the training images.
      stored: the range of the run that is resumed; None: a new run.

    Returns:
      Lines on the values that were found; none for images of 8 bits.

    Raises:
      UserError: the option has no meaning, or no image has `config.channels`.
    """
    options = ImageOptions.from_config(config)
    found = _read_sample(source, config.channels, options)
    if stored not in (None, AUTO) and config.range == AUTO:
        config.range = stored
    if not found:
        if config.range == AUTO or percentiles(config.range):
            config.range = FULL
        return []
    types = sorted({str(samples.values.dtype) for samples in found})
    values = _values_of_bands(found)
    limits = percentiles(config.range)
    if config.range == AUTO:
        limits = (0.0, 100.0)
    if limits:
        config.range = format_ranges(_measure(values, limits))
    _warn_of_low_use(config, values, types)
    lines = [f"pixel values: {' and '.join(types)}, {_extent(values)} in {len(found)} images"]
    lines.append(f"  levels 0 .. 255 are --config.data.range={config.range}, kept with the run")
    return lines


def _read_sample(source: Source, channels: int, options: ImageOptions) -> list[Samples]:
    """The samples of some images that are not of 8 bits.

    Raises:
      UserError: all images that can be read have other bands, or all are damaged.
      ReadFailed: the storage was at fault for minutes.
    """
    found = []
    wrong = []
    names = []
    damaged = []
    read = 0
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        name = functools.partial(source.name, int(index))
        read_one = functools.partial(_read_samples, source, int(index), channels, options)
        try:
            samples = faults.retry(read_one, name, faults.RETRY_SECONDS)
        except faults.ReadFailed:  # a range that is measured without it would stay with the run
            raise
        except decode.WrongBands as error:
            wrong.append(error)
            names.append(name())
            continue
        except UnidentifiedImageError:  # whose text holds an address
            damaged.append(f"{name()} (not an image)")
            continue
        except Exception as error:  # of any type, on damaged data; reported when it is decoded
            damaged.append(f"{name()} ({faults.first_line(error)})")
            continue
        read += 1
        if samples is not None and samples.values.dtype not in (np.uint8, np.bool_):
            found.append(_thinned(samples))
    if wrong and not read:
        raise UserError(
            f"{names[0]} has {wrong[0]}, as have all {len(wrong)} images that were read: set "
            f"--config.data.channels={wrong[0].bands}, and the options that lmim prepare "
            f"--folder=IMAGES --statistics --channels={wrong[0].bands} prints"
        )
    if len(damaged) > 1 and not read and not wrong:
        raise UserError(
            f"none of {len(damaged)} images can be read, such as {damaged[0]}; are these images?"
        )
    return found


def _read_samples(
    source: Source, index: int, channels: int, options: ImageOptions
) -> Samples | None:
    """The samples of an image; None: it is one that Pillow reads."""
    data, _ = source.record(index)
    samples = decode.read_samples(data, channels, options)
    if samples is None:
        read_header(data)
    return samples


def _thinned(samples: Samples) -> Samples:
    """Every n-th row and column, so that an image does not take much memory."""
    height, width = samples.values.shape[:2]
    stride = max(1, int(np.sqrt(height * width / VALUES)))
    return samples._replace(values=samples.values[::stride, ::stride].copy())


def _values_of_bands(found: Sequence[Samples]) -> list[Float[np.ndarray, " n"]]:
    """The finite values of each band, without opacity; of gray and colors, of all together."""
    bands = found[0].bands
    if any(samples.bands != bands for samples in found) or bands in COLORS:
        groups = [[samples.values[..., : samples.bands] for samples in found]]
    else:
        groups = []
        for band in range(bands):
            groups.append([samples.values[..., band] for samples in found])
    values = []
    for group in groups:
        flat = np.concatenate([part.ravel().astype(np.float64) for part in group])
        values.append(flat[np.isfinite(flat)])
    return values


def _measure(values: Sequence[Float[np.ndarray, " n"]], limits: Range) -> tuple[Range, ...]:
    """The percentiles `limits` of each band; a band that is constant gets a range of 1."""
    ranges = []
    for band in values:
        low, high = 0.0, 1.0
        if len(band):
            low, high = map(float, np.percentile(band, limits))
        if not low < high:
            high = low + 1
        ranges.append((low, high))
    return tuple(ranges)


def _extent(values: Sequence[Float[np.ndarray, " n"]]) -> str:
    """The lowest and highest value of all bands, and where the middle of the values is."""
    together = np.concatenate(values)
    if not len(together):
        return "none of them finite,"
    low, inner_low, inner_high, high = np.percentile(together, (0, 1, 99, 100))
    return f"{low:g} .. {high:g} (98 % of them {inner_low:g} .. {inner_high:g})"


def _warn_of_low_use(
    config: ConfigDict, values: Sequence[Float[np.ndarray, " n"]], types: Sequence[str]
) -> None:
    """Log a warning if the values take little of the range, so that few levels are left."""
    ranges: tuple[Any, ...] = (full_range(np.dtype(types[-1])),)
    if config.range != FULL:
        ranges = parse_ranges(config.range, config.channels)
    for number, band in enumerate(values):
        low, high = ranges[number % len(ranges)]
        if len(band) and not np.ptp(band):
            log.warning("all pixel values are %g: are these the images?", band[0])
            return
        if len(band) and np.ptp(band) < (high - low) / LEAST_USE:
            log.warning(
                "pixel values %g .. %g take less than 1/%d of config.data.range=%s, so that few of "
                "the 256 levels are left; %s measures the range",
                band.min(),
                band.max(),
                LEAST_USE,
                config.range,
                AUTO,
            )
            return


def statistics(
    source: Source, config: ConfigDict, count: int
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"], int]:
    """Mean and standard deviation of each channel, of levels divided by 255.

    Every image weighs the same, however large it is.

    Args:
      source: the images.
      config: `config.data`, with a range that is known.
      count: how many images are read, at most.

    Returns:
      (means, standard deviations, number of images that could be read).

    Raises:
      UserError: no image can be read.
      ReadFailed: the storage was at fault for minutes.
    """
    options = ImageOptions.from_config(config)
    means = []
    squares = []
    last = "there are no images"
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        name = functools.partial(source.name, int(index))
        read = functools.partial(_read_levels, source, int(index), config, options)
        try:
            pixels = faults.retry(read, name, faults.RETRY_SECONDS) / 255
        except (BadImage, OSError) as error:
            last = f"{name()}: {error}"
            continue
        means.append(pixels.mean((0, 1)))
        squares.append((pixels**2).mean((0, 1)))
    if not means:
        raise UserError(f"no image can be read; {last}")
    mean = np.mean(means, axis=0)
    variance = np.mean(squares, axis=0) - mean**2
    return mean, np.sqrt(np.maximum(variance, 0)), len(means)


def _read_levels(
    source: Source, index: int, config: ConfigDict, options: ImageOptions
) -> UInt8[np.ndarray, "h w C"]:
    data, _ = source.record(index)
    return decode.decode(data, config.canvas, config.channels, options)
