"""Encoded bytes -> the pixels of an image that fits a canvas, on the host.

The pixels are those of Pillow, whatever decodes them: JPEGs go through simplejpeg, which is faster, lets other threads
run meanwhile and tells damage that Pillow overlooks; the rest goes through Pillow itself. EXIF orientation is ignored,
as in torchvision's default loader, and so is transparency: the colours below it count.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 50_000_000  # decompression bombs; read from the header, before anything is decoded
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SCALES = (8, 4, 2)  # by which a JPEG can be shrunk while it is decoded
FLIP = Image.Transpose
TURNED = {
    2: FLIP.FLIP_LEFT_RIGHT,
    3: FLIP.ROTATE_180,
    4: FLIP.FLIP_TOP_BOTTOM,
    5: FLIP.TRANSPOSE,
    6: FLIP.ROTATE_90,
}
TURNED |= {
    7: FLIP.TRANSVERSE,
    8: FLIP.ROTATE_270,
}  # EXIF orientation -> what turns the upright image back


class BadImage(ValueError):
    """The bytes are no image that can be used; the message says why."""


def decode(data, canvas, channels):
    """Decode an image.

    One that is larger than the canvas is shrunk until its long side fits: a JPEG by a power of two while it is
    decoded, as far as that stays above the canvas, then by Pillow's antialiased bicubic.

    Args:
      data: encoded bytes. canvas: K, the longest side there may be, in pixels; 0: any. channels: 1, 3 or 4.

    Returns:
      uint8 [height, width, channels].

    Raises:
      BadImage: empty, truncated or damaged, no image, an unlisted format, or over 50 megapixels.
    """
    if not data:
        raise BadImage("empty file")
    try:
        jpeg = _jpeg(data, canvas) if data[:2] == b"\xff\xd8" else None
        if jpeg is None:
            return _pillow(data, canvas, channels)
        pixels, (height, width) = jpeg
        if pixels.shape != (height, width, channels):
            pixels = _fitted(Image.fromarray(pixels), (width, height), MODES[channels])
        return pixels
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise BadImage(str(error) or type(error).__name__) from error


def place(pixels, canvas):
    """Copy [h, w, C] into the top left of `canvas` [K, K, C] and make the rest of it 0; returns (h, w)."""
    height, width = pixels.shape[:2]
    canvas[:height, :width] = pixels
    canvas[:height, width:] = 0
    canvas[height:] = 0
    return height, width


def on_canvas(data, canvas, channels):
    """Decode into the top left of a canvas: (uint8 [K, K, C], size int32 [2] = (height, width)). See `decode`."""
    out = np.empty((canvas, canvas, channels), np.uint8)
    return out, np.array(place(decode(data, canvas, channels), out), np.int32)


def check_size(width, height):
    """Raise BadImage where an image has more pixels than anyone needs."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")


def _size_in(canvas, height, width):
    """(height, width) shrunk until both fit the canvas."""
    long = max(height, width)
    if not canvas or long <= canvas:
        return height, width
    return max(1, round(height * canvas / long)), max(1, round(width * canvas / long))


def _scale(size, target):
    """The largest of SCALES that keeps (height, width) at least at the target; 1: none."""
    room = min(size[0] // target[0], size[1] // target[1])
    return next((scale for scale in SCALES if scale <= room), 1)


def _jpeg(data, canvas):
    """(RGB pixels of a JPEG, not much above the canvas; (height, width) to shrink them to); None: Pillow must decide.

    Raises:
      BadImage: truncated or damaged.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height)
        if colors in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(data, "CMYK")  # is it whole? The colours are Pillow's
            return None
        target = _size_in(canvas, height, width)
        scale = _scale((height, width), target)
        least = (
            {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            if scale > 1
            else {}
        )
        return simplejpeg.decode_jpeg(data, **least), target
    except BadImage:
        raise
    except ValueError as error:
        message = str(error)
        if "remature end" in message or (
            "Corrupt" in message and "extraneous bytes" not in message
        ):
            raise BadImage(message) from error
        return None  # such as bytes between markers, which harm nothing


def _pillow(data, canvas, channels):
    """`decode` by Pillow alone."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # our own pixel cap is below Pillow's warning; metadata quirks are harmless
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(*image.size)
        if image.format == "TIFF" and (turned := image.tag_v2.get(0x0112)) in TURNED:
            image = image.transpose(TURNED[turned])  # Pillow turns TIFFs upright, and only them
        height, width = _size_in(canvas, *image.size[::-1])
        image.draft(
            None, (width, height)
        )  # a JPEG's shrinking transform: the same power of two as `_scale`
        if image.mode.startswith("I;16"):
            image = Image.fromarray(
                (np.asarray(image) >> 8).astype(np.uint8)
            )  # Pillow would clip; the high byte
        elif image.mode in ("I", "F"):
            raise BadImage(f"pixels of 32 bits (mode {image.mode})")
        return _fitted(image, (width, height), MODES[channels])


def _fitted(image, size, mode):
    """A Pillow image as an array of this size (width, height) and mode: uint8 [height, width, C]."""
    if image.mode != mode:  # converting would copy
        image = image.convert(mode)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size[1], size[0], -1)
