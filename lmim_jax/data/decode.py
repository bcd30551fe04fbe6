"""Encoded bytes -> a fixed uint8 canvas and the image's true size, on the host."""

import io
import warnings

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 50_000_000  # decompression bombs; read from the header, before anything is decoded
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadImage(ValueError):
    """The bytes are no image that can be used; the message says why."""


def decode(data, canvas, channels):
    """Decode an image into the top left of a canvas.

    An image larger than the canvas is shrunk until its long side fits: by the JPEG decoder in powers of two as far as
    that stays above the canvas, then by Pillow's antialiased bicubic. EXIF orientation is ignored, as in torchvision's
    default loader.

    Args:
      data: encoded bytes. canvas: K, side in pixels. channels: 1, 3 or 4.

    Returns:
      (image uint8 [K, K, C], zero outside the picture; size int32 [2], (height, width) of the picture).

    Raises:
      BadImage: empty, truncated, no image, an unlisted format, or over 50 megapixels.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own pixel cap is below Pillow's warning; metadata quirks are harmless
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")
            if max(width, height) > canvas:
                scale = canvas / max(width, height)
                width, height = max(1, round(width * scale)), max(1, round(height * scale))
                image.draft(None, (width, height))
            image = image.convert(MODES[channels])
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            pixels = np.asarray(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like on damaged data
        raise BadImage(str(error) or type(error).__name__) from error
    out = np.zeros((canvas, canvas, channels), np.uint8)
    out[:height, :width] = pixels.reshape(height, width, channels)
    return out, np.array((height, width), np.int32)
