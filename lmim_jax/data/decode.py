"""Encoded bytes -> the pixels of an image that fits a canvas, on the host.

The pixels equal Pillow's, whichever library decodes them: JPEGs are decoded by simplejpeg, which is
faster, releases the GIL and detects damage that Pillow overlooks; all other formats by Pillow. EXIF
orientation is ignored, as in torchvision's default loader, and so is transparency: the colors below
it count.
"""

import io
import warnings

import numpy as np
import simplejpeg
from jaxtyping import Int32, UInt8
from PIL import Image

from lmim_jax.utils import faults

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)
MAX_PIXELS = 50_000_000  # against decompression bombs; read from the header, before decoding
MAX_SIDE = 65_535  # that of JPEG: resizing a line of millions of pixels takes seconds
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by number of channels
JPEG_SCALES = (8, 4, 2)  # by which a JPEG can be shrunk while it is decoded
JPEG_MARKER = b"\xff\xd8"  # the first bytes of every JPEG
EXIF_ORIENTATION = 0x0112

# EXIF orientation -> the transform that undoes Pillow's rotation to upright
UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class BadImage(ValueError):
    """The bytes are not a usable image; the message says why."""


def decode(data: bytes, canvas: int, channels: int) -> UInt8[np.ndarray, "h w C"]:
    """Decode an image.

    An image larger than the canvas is shrunk until its long side fits: a JPEG by a power of two
    while it is decoded, as far as it stays larger than the canvas, then by Pillow's antialiased
    bicubic.

    Args:
      data: encoded bytes.
      canvas: K, the maximal side in pixels; 0: any.
      channels: 1, 3 or 4.

    Returns:
      uint8 [height, width, channels].

    Raises:
      BadImage: empty, truncated or damaged, not an image, an unsupported format, or over 50
        megapixels.
      MemoryError, OSError: a fault of the environment, see utils/faults.py.
    """
    if not data:
        raise BadImage("empty file")
    try:
        if data.startswith(JPEG_MARKER):
            pixels = _decode_jpeg(data, canvas, channels)
            if pixels is not None:
                return pixels
        return _decode_with_pillow(data, canvas, channels)
    except BadImage:
        raise
    except Exception as error:  # decoders raise errors of any type on damaged data
        if faults.is_environment_fault(error):
            raise
        raise BadImage(str(error) or type(error).__name__) from error


def place_on_canvas(
    pixels: UInt8[np.ndarray, "h w C"], canvas: UInt8[np.ndarray, "K K C"]
) -> tuple[int, int]:
    """Copy an image to the top left of a canvas and set the rest to 0; returns (height, width)."""
    height, width = pixels.shape[:2]
    canvas[:height, :width] = pixels
    canvas[:height, width:] = 0
    canvas[height:] = 0
    return height, width


def decode_to_canvas(
    data: bytes, canvas: int, channels: int
) -> tuple[UInt8[np.ndarray, "K K C"], Int32[np.ndarray, "2"]]:
    """Decode into the top left of a canvas, see `decode`.

    Returns:
      (canvas uint8 [K, K, C], size int32 [2] = (height, width)).
    """
    out = np.empty((canvas, canvas, channels), np.uint8)
    size = place_on_canvas(decode(data, canvas, channels), out)
    return out, np.array(size, np.int32)


def check_size(width: int, height: int) -> None:
    """Raise BadImage if an image has more than MAX_PIXELS pixels, or a side above MAX_SIDE."""
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels, a side of more than {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")


def _fit_size(canvas: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) shrunk until both fit the canvas."""
    long_side = max(height, width)
    if not canvas or long_side <= canvas:
        return height, width
    return (
        max(1, round(height * canvas / long_side)),
        max(1, round(width * canvas / long_side)),
    )


def _jpeg_scale(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The largest of JPEG_SCALES that keeps (height, width) at least at the target, or 1."""
    limit = min(size[0] // target[0], size[1] // target[1])
    for scale in JPEG_SCALES:
        if scale <= limit:
            return scale
    return 1


def _decode_jpeg(data: bytes, canvas: int, channels: int) -> UInt8[np.ndarray, "h w C"] | None:
    """`decode` a JPEG by simplejpeg; None: Pillow must decide."""
    decoded = _read_jpeg(data, canvas)
    if decoded is None:
        return None
    pixels, target = decoded
    height, width = target
    if pixels.shape == (height, width, channels):
        return pixels
    return _convert(Image.fromarray(pixels), (width, height), channels)


def _read_jpeg(
    data: bytes, canvas: int
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]] | None:
    """Decode by simplejpeg to a size near that of the canvas.

    Returns:
      (RGB pixels, (height, width) to shrink them to); None: Pillow must decide.

    Raises:
      BadImage: truncated or damaged.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)
        if colors in ("CMYK", "YCCK"):
            # Only to detect damage: the colors are Pillow's
            simplejpeg.decode_jpeg(data, "CMYK")
            return None
        target = _fit_size(canvas, height, width)
        scale = _jpeg_scale((height, width), target)
        if scale == 1:
            return simplejpeg.decode_jpeg(data), target
        pixels = simplejpeg.decode_jpeg(
            data, min_height=-(-height // scale), min_width=-(-width // scale)
        )
        return pixels, target
    except BadImage:
        raise
    except ValueError as error:
        if faults.is_environment_fault(error):
            raise
        message = str(error)
        truncated = "remature end" in message
        corrupt = "Corrupt" in message and "extraneous bytes" not in message
        if truncated or corrupt:
            raise BadImage(message) from error
        return None  # harmless, such as bytes between markers


def _decode_with_pillow(data: bytes, canvas: int, channels: int) -> UInt8[np.ndarray, "h w C"]:
    """`decode` by Pillow alone."""
    with warnings.catch_warnings():
        # MAX_PIXELS is below Pillow's own limit, and oddities of the metadata are harmless
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(image.width, image.height)
        if image.format == "TIFF":  # the only format that Pillow rotates to upright
            orientation = image.tag_v2.get(EXIF_ORIENTATION)  # type: ignore[attr-defined]
            if orientation in UNDO_ORIENTATION:
                image = image.transpose(UNDO_ORIENTATION[orientation])
        # Shrinks a JPEG while it is decoded, by the same power of two as `_jpeg_scale`
        height, width = _fit_size(canvas, image.height, image.width)
        image.draft(None, (width, height))
        return _convert(image, (width, height), channels)


def fit_to_canvas(image: Image.Image, canvas: int, channels: int) -> UInt8[np.ndarray, "h w C"]:
    """The pixels of a Pillow image, shrunk until it fits a canvas; the rest is as in `decode`.

    Raises:
      BadImage: it has 32 bits per pixel and channel, or over 50 megapixels.
    """
    check_size(image.width, image.height)
    height, width = _fit_size(canvas, image.height, image.width)
    return _convert(image, (width, height), channels)


def _convert(
    image: Image.Image, size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "h w C"]:
    """A Pillow image as an array of this size (width, height) and with these channels."""
    mode = MODES[channels]
    if image.mode.startswith("I;16"):
        # The high byte: Pillow's conversion would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f"pixels of 32 bits (mode {image.mode})")
    if image.mode != mode:  # converting would copy
        image = image.convert(mode)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    width, height = size
    return np.asarray(image).reshape(height, width, -1)
