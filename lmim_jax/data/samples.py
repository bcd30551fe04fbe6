"""Files whose samples Pillow cannot give as they are: more than 8 bits, or other bands.

TIFF is read by tifffile, PNG and JPEG 2000 of more than 8 bits by imagecodecs, NPY by numpy.

Letters: h w height and width of an image, B bands.
"""

import io
import itertools
import logging
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from jaxtyping import Shaped
from PIL import Image

from lmim_jax.data.image_options import BadImage, ImageOptions
from lmim_jax.utils import faults

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG = b"\x89PNG\r\n\x1a\n"
JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000: start and size
PNM = (b"P2", b"P5", b"Pf")  # gray
PAGES = 64  # of a TIFF file that are searched for the largest one
COLORS = (1, 3)  # bands of gray and RGB
SHORTEST_PNG = 26  # bytes up to the color type
PNG_ALPHA = (4, 6)  # color types
PNG_PALETTE = 3
ORIENTATION = 274  # a tag of TIFF
MUCH_MEMORY = 1 << 30  # bytes of samples, from which on the header is doubted
MOST_COMPRESSED = 2000  # times that a file is smaller than its samples

# Damage is reported by exceptions
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class Samples(NamedTuple):
    """The samples of an image.

    Attributes:
      values: of any real type.
      alpha: whether the last band is opacity.
      colors: whether the others are gray or RGB, which convert into each other.
      pages: whether the bands are the pages of a file.
    """

    values: Shaped[np.ndarray, "h w B"]
    alpha: bool
    colors: bool
    pages: bool = False

    @property
    def bands(self) -> int:
        """Number of bands without opacity."""
        return self.values.shape[-1] - self.alpha

    def describe(self) -> str:
        """Bands and type, for messages."""
        plural = "" if self.bands == 1 else "s"
        kind = "page" if self.pages else "band"
        return f"{self.bands} {kind}{plural} of {self.values.dtype}"


def read(data: bytes, channels: int, options: ImageOptions) -> Samples | None:
    """The samples of a file; None: Pillow reads it without a loss.

    Args:
      data: encoded bytes.
      channels: of images, which tell the axes of an array apart.
      options: limit the size.

    Raises:
      BadImage: the size, the type or the axes of the samples.
      Exception: of any type, from the decoders, on damaged data.
    """
    if data.startswith(NPY):
        return _read_npy(data, channels, options)
    if data.startswith(TIFF):
        return _read_tiff(data, channels, options)
    if data.startswith(PNG):
        return _read_png(data, options)
    if data.startswith((JP2, CODESTREAM)):
        return _read_jpeg2000(data, options)
    if data.startswith(PNM):
        return _read_pnm(data, options)
    return None


class Header(NamedTuple):
    """What the header of an image says.

    Attributes:
      width: in pixels.
      height: in pixels.
      mode: Pillow's, or bands and type.
      format: Pillow's name, or "NPY".
    """

    width: int
    height: int
    mode: str
    format: str


def read_header(data: bytes) -> Header:
    """The header of an image.

    Raises:
      Exception: of any type, if the bytes are not an image.
    """
    if data.startswith(NPY):
        shape, dtype = _npy_header(data)
        places = _bands_last(np.broadcast_to(np.zeros((), dtype), shape), 0)
        height, width, bands = places.shape
        return Header(width, height, f"{bands} x {dtype}", "NPY")
    if data.startswith(TIFF):
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = _page(file, _largest(file))
            pages = len(_pages_like(file, page))
            if pages > 1:
                mode = f"{pages} pages of {page.samplesperpixel} x {page.dtype}"
                return Header(page.imagewidth, page.imagelength, mode, "TIFF")
            if not _is_plain(page, 3):
                mode = f"{page.samplesperpixel} x {page.dtype}"
                return Header(page.imagewidth, page.imagelength, mode, "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        return Header(image.width, image.height, image.mode, image.format or "")


def tiff_page(data: bytes) -> int:
    """The number of the largest page: others may be thumbnails. 0 where tifffile finds none."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return _largest(file)
    except Exception as error:  # Pillow may read what tifffile does not
        if faults.is_environment_fault(error):
            raise
        return 0


def tiff_orientation(data: bytes) -> int:
    """The orientation tag of the largest page; 1, upright, where there is none."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return int(_page(file, _largest(file)).tags.valueof(ORIENTATION, default=1))
    except Exception as error:  # damage is reported where the samples are read
        if faults.is_environment_fault(error):
            raise
        return 1


def _page(file: tifffile.TiffFile, index: int) -> Any:
    return file.pages[index]


def _pages(file: tifffile.TiffFile) -> Iterator[Any]:
    return itertools.islice(iter(file.pages), PAGES)


def _largest(file: tifffile.TiffFile) -> int:
    """The number of the page with the most pixels, the first of equals."""
    best = 0
    most = 0
    for number, page in enumerate(_pages(file)):
        if page.imagewidth * page.imagelength > most:
            best = number
            most = page.imagewidth * page.imagelength
    return best


def _pages_like(file: tifffile.TiffFile, page: Any) -> list[Any]:
    """The pages of the size and type of a page, itself included; no masks of others."""
    size = (page.imagelength, page.imagewidth, page.samplesperpixel, page.dtype)
    found = []
    for other in _pages(file):
        others = (other.imagelength, other.imagewidth, other.samplesperpixel, other.dtype)
        if others == size and not other.is_mask:
            found.append(other)
    return found


def _read_tiff(data: bytes, channels: int, options: ImageOptions) -> Samples | None:
    try:
        file = tifffile.TiffFile(io.BytesIO(data))
    except tifffile.TiffFileError:
        return None  # Pillow says what is wrong
    with file:
        number = _largest(file)
        page = _page(file, number)
        bands = page.samplesperpixel
        pages = _pages_like(file, page)
        if len(pages) > 1 and bands > 1:
            raise BadImage(
                f"{len(pages)} pages of {bands} bands: which of them is the image? Split the file"
            )
        if _is_plain(page, channels) and len(pages) == 1:
            return None
        options.check_size(page.imagewidth, page.imagelength)
        if page.dtype is not None:  # else, tifffile says what is wrong
            count = page.imagewidth * page.imagelength * bands * len(pages)
            _check_bytes(count * page.dtype.itemsize, len(data))
        if bands == 1 and channels not in COLORS:
            stack = _stacked_bands(file, channels, options)
            if stack is not None:
                return stack
        if len(pages) > 1:
            values = np.stack([part.asarray() for part in pages], axis=-1)
            return Samples(_checked(values), alpha=False, colors=False, pages=True)
        extras = page.extrasamples
        alpha = len(extras) == 1 and int(extras[0]) in (1, 2) and bands - 1 in COLORS
        values = page.asarray()
        if values.ndim == 3 and int(page.planarconfig) == 2:  # band after band
            values = np.moveaxis(values, 0, -1)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind == "u":
            values = np.iinfo(values.dtype).max - values
    values = _checked(values.reshape(page.imagelength, page.imagewidth, bands))
    return Samples(values, alpha, bands - alpha in COLORS)


def _is_plain(page: Any, channels: int) -> bool:
    """Whether Pillow gives the samples of a page as they are."""
    bits = page.bitspersample
    if isinstance(bits, tuple):
        bits = max(bits)
    if bits > 8 or int(page.sampleformat) != 1 or channels not in (1, 3, 4):
        return False
    bands = page.samplesperpixel
    alphas = [int(extra) in (1, 2) for extra in page.extrasamples]
    kind = page.photometric
    if kind == tifffile.PHOTOMETRIC.RGB and bands == 4:
        return channels != 4 or alphas == [True]
    if kind in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE):
        return bands == 1 or (bands == 2 and alphas == [True])
    return len(alphas) <= 1 and all(alphas)


def _stacked_bands(file: tifffile.TiffFile, channels: int, options: ImageOptions) -> Samples | None:
    """The bands of a file that holds them as pages, or as rows of pages; None: it does not."""
    series = file.series[0]
    if len(series.shape) != 3 or channels not in (series.shape[0], series.shape[-1]):
        return None
    options.check_size(*sorted(series.shape)[1:])
    return Samples(_bands_last(_checked(series.asarray()), channels), False, False)


def _bands_last(values: Shaped[np.ndarray, "..."], channels: int) -> Shaped[np.ndarray, "h w B"]:
    """An array with its bands as the last axis: that as long as `channels`, else the shortest.

    Raises:
      BadImage: it has fewer than 2 or more than 3 axes, or is empty.
    """
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not values.size:
        raise BadImage(
            f"an array of the shape {values.shape}; it must be [height, width], "
            "[height, width, channels] or [channels, height, width]"
        )
    first = values.shape[0]
    last = values.shape[-1]
    if last != channels and (first == channels or first < last):
        return np.moveaxis(values, 0, -1)
    return values


def _read_npy(data: bytes, channels: int, options: ImageOptions) -> Samples:
    shape, dtype = _npy_header(data)
    if dtype.hasobject:
        raise BadImage("an array of Python objects")
    if len(shape) in (2, 3) and min(shape):
        width, height = sorted(shape)[-2:]
        options.check_size(width, height)
    if math.prod(shape) * dtype.itemsize > len(data):
        raise BadImage(f"truncated: an array of the shape {shape} in {len(data)} bytes")
    values = np.load(io.BytesIO(data), allow_pickle=False)
    values = _bands_last(_checked(values), channels)
    return Samples(values, False, values.shape[-1] in COLORS)


def _npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and type of an array."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype


def _read_pnm(data: bytes, options: ImageOptions) -> Samples | None:
    """The samples of a gray PGM of more than 8 bits or a PFM; None: Pillow gives them."""
    image = Image.open(io.BytesIO(data), formats=("PPM",))
    if image.mode not in ("I", "F"):
        return None
    options.check_size(image.width, image.height)
    values = np.asarray(image)[..., None]
    if image.mode == "I":  # as Pillow scales them
        values = values.astype(np.uint16)
    return Samples(values, False, True)


def _read_png(data: bytes, options: ImageOptions) -> Samples | None:
    """The samples of a PNG of 16 bits; None: it has fewer."""
    if len(data) < SHORTEST_PNG:
        return None
    width, height, bits, color = struct.unpack(">IIBB", data[16:26])
    if bits != 16 or color == PNG_PALETTE:
        return None
    options.check_size(width, height)
    values = imagecodecs.png_decode(data)
    values = values.reshape(height, width, -1)
    return Samples(values, color in PNG_ALPHA or values.shape[-1] in (2, 4), True)


def _read_jpeg2000(data: bytes, options: ImageOptions) -> Samples | None:
    """The samples of a JPEG 2000 file; None: Pillow reads its 8 bits and 1, 3 or 4 bands."""
    start = data.find(CODESTREAM)
    header = data[start + 8 : start + 8 + 36]
    if start < 0 or len(header) < 36:
        return None
    right, bottom, left, top = struct.unpack(">4I", header[:16])
    (bands,) = struct.unpack(">H", header[32:34])
    bits = (header[34] & 0x7F) + 1
    if bits <= 8 and bands in (1, 3, 4):
        return None
    options.check_size(right - left, bottom - top)
    values = imagecodecs.jpeg2k_decode(data)
    values = _checked(values.reshape(bottom - top, right - left, bands))
    return Samples(values, False, bands in COLORS)


def _check_bytes(needed: int, stored: int) -> None:
    """Raise BadImage if samples need more memory than any file of this size can fill.

    Args:
      needed: bytes of the samples.
      stored: bytes of the file.
    """
    if needed > MUCH_MEMORY and needed > MOST_COMPRESSED * stored:
        raise BadImage(f"damaged: {needed >> 30} GiB of samples by its header, in {stored} bytes")


def _checked(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The same array in the machine's byte order.

    Raises:
      BadImage: its values are not real numbers.
    """
    if values.dtype.kind not in "buif":
        raise BadImage(f"samples of the type {values.dtype}; only real numbers are supported")
    return values.astype(values.dtype.newbyteorder("="), copy=False)
