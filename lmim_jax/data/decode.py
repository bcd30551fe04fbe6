"""Encoded bytes -> the pixels of an image that fits a canvas, on the host.

The pixels of images of 8 bits equal Pillow's, whichever library decodes them: JPEGs are decoded by
simplejpeg, which is faster, releases the GIL and detects damage that Pillow overlooks; all other
formats by Pillow. Samples of more bits, and bands other than gray and colors, are read by
data/samples.py and brought to levels 0 .. 255. Unless options say otherwise, EXIF orientation is
ignored, as in torchvision's default loader, and so is transparency: the colors below it count.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import simplejpeg
from jaxtyping import Int32, Shaped, UInt8
from PIL import Image, ImageMode, PngImagePlugin, UnidentifiedImageError

from lmim_jax.data import records, samples
from lmim_jax.data.image_options import BadImage, ImageOptions, Part, Range, to_levels
from lmim_jax.utils import faults

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
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
    ".avif",
    ".jp2",
    ".j2k",
    ".ppm",
    ".pgm",
    ".npy",
)
NPY_SUFFIX = ".npy"
DEFAULTS = ImageOptions()
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


class WrongBands(BadImage):
    """An image that cannot be brought to the number of channels.

    Attributes:
      bands: how many it has.
    """

    def __init__(self, found: str, bands: int, channels: int):
        super().__init__(f"{found}, not the {channels} of config.data.channels")
        self.bands = bands


# Programs store megabytes in texts of PNGs; they are read, but of no use here
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28


def verify(data: bytes, options: ImageOptions = DEFAULTS) -> bool:
    """Check that a file can be decoded, whatever its bands.

    Args:
      data: encoded bytes.
      options: limit the size.

    Returns:
      Whether it is one of 8 bits, in gray or colors.

    Raises:
      BadImage: it cannot be decoded.
    """
    try:
        if samples.read(data, 3, options) is not None:
            return False
    except BadImage:
        raise
    except Exception as error:  # see `decode`
        if faults.is_environment_fault(error):
            raise
        raise BadImage(str(error) or type(error).__name__) from error
    decode(data, 0, 3, options)
    return True


def decode(
    data: bytes, canvas: int, channels: int, options: ImageOptions = DEFAULTS
) -> UInt8[np.ndarray, "h w C"]:
    """Decode an image, of several modalities into channels side by side.

    An image larger than the canvas is shrunk until its long side fits: a JPEG by a power of two
    while it is decoded, as far as it stays larger than the canvas, then by Pillow's antialiased
    bicubic.

    Args:
      data: encoded bytes; of several modalities, see data/records.py.
      canvas: K, the maximal side in pixels; 0: any.
      channels: C; gray, RGB and RGBA (1, 3, 4) are converted into each other, other bands are not.
      options: what is done to the pixels.

    Returns:
      uint8 [height, width, channels].

    Raises:
      BadImage: empty, truncated or damaged, not an image, an unsupported format, too large, of
        other bands, or of modalities that do not fit each other.
      MemoryError, OSError: a fault of the environment, see utils/faults.py.
    """
    files = records.unpack(data)
    parts = options.parts_of(channels)
    if len(files) != len(parts):
        names = ", ".join(part.name for part in options.parts) or "a single one"
        count = "a file of one modality"
        if len(files) > 1:
            count = f"files of {len(files)} modalities"
        raise BadImage(f"{count}, but config.data.modalities has {names}")
    if len(parts) == 1:
        return _decode_file(data, canvas, parts[0].channels, parts[0].options)
    decoded = []
    for part, file in zip(parts, files, strict=True):
        try:
            decoded.append(_decode_file(file, canvas, part.channels, part.options))
        except BadImage as error:
            raise BadImage(f"{part.name}: {error}") from error
    _check_equal_sizes(files, parts, decoded)
    return np.concatenate(decoded, axis=-1)


def _check_equal_sizes(
    files: Sequence[bytes], parts: Sequence[Part], decoded: Sequence[UInt8[np.ndarray, "h w _"]]
) -> None:
    """Raise BadImage unless the modalities of an image have the same height and width."""
    sizes = []
    for file, part, pixels in zip(files, parts, decoded, strict=True):
        height, width = pixels.shape[:2]
        if not part.options.exif_orientation:  # else, the file may lie on its side
            width, height = samples.read_header(file)[:2]  # before it was shrunk to the canvas
        sizes.append(f"{width} x {height}")
    shapes = {pixels.shape[:2] for pixels in decoded}
    if len(set(sizes)) == 1 and len(shapes) == 1:
        return
    named = [f"{part.name} {size}" for part, size in zip(parts, sizes, strict=True)]
    raise BadImage(f"modalities of unequal size: {', '.join(named)}; resize them to one size")


def _decode_file(
    data: bytes, canvas: int, channels: int, options: ImageOptions
) -> UInt8[np.ndarray, "h w C"]:
    """`decode` one file."""
    if not data:
        raise BadImage("empty file")
    options.raise_limit_of_pillow()  # in this process
    try:
        pixels = _decode_as_stored(data, canvas, channels, options)
        if options.exif_orientation:
            return turn_upright(pixels, orientation(data))
        return pixels
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # whose text holds an address
        raise BadImage(f"not an image of a known format ({', '.join(FORMATS)}, NPY)") from error
    except Exception as error:  # decoders raise errors of any type on damaged data
        if faults.is_environment_fault(error):
            raise
        raise BadImage(str(error) or type(error).__name__) from error


def _decode_as_stored(
    data: bytes, canvas: int, channels: int, options: ImageOptions
) -> UInt8[np.ndarray, "h w C"]:
    """`decode` without a change of orientation."""
    if data.startswith(JPEG_MARKER) and channels in MODES:
        pixels = _decode_jpeg(data, canvas, channels, options)
        if pixels is not None:
            return pixels
    found = read_samples(data, channels, options)
    if found is not None:
        return _fit_samples(found, canvas, channels, options)
    return _decode_with_pillow(data, canvas, channels, options)


def read_samples(data: bytes, channels: int, options: ImageOptions) -> samples.Samples | None:
    """The samples of a file, see `samples.read`; None: Pillow reads it without a loss.

    Raises:
      WrongBands: it does not have `channels`, and cannot be converted.
    """
    found = samples.read(data, channels, options)
    if found is None:
        if channels not in MODES:
            mode = samples.read_header(data).mode
            raise WrongBands(f"the colors {mode}", len(ImageMode.getmode(mode).bands), channels)
        return None
    converted = found.colors and channels in MODES
    if not converted and channels not in (found.bands, found.values.shape[-1]):
        raise WrongBands(found.describe(), found.values.shape[-1], channels)
    return found


def _fit_samples(
    found: samples.Samples, canvas: int, channels: int, options: ImageOptions
) -> UInt8[np.ndarray, "h w C"]:
    """Samples as levels, shrunk until they fit a canvas, with the bands that are asked for."""
    height, width = found.values.shape[:2]
    size = _fit_size(canvas, height, width)
    whole = found.values.shape[-1]
    blended = found.colors and found.alpha and options.transparency != "ignore"
    levels = to_levels(found.values[..., : found.bands], options.ranges)
    if found.alpha:
        levels = np.concatenate([levels, to_levels(found.values[..., found.bands :])], axis=-1)
    if channels == whole and not blended:
        return resize(levels, (size[1], size[0]))
    if channels == found.bands and not blended:
        return resize(levels[..., :channels], (size[1], size[0]))
    image = Image.fromarray(levels.squeeze(-1) if whole == 1 else levels)
    return _convert(image, (size[1], size[0]), channels, options)


def resize(
    pixels: UInt8[np.ndarray, "h w C"],
    size: tuple[int, int],
    method: Image.Resampling = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "S T C"]:
    """Resize every band on its own by Pillow's antialiased filters.

    Args:
      pixels: levels.
      size: (width, height).
      method: the filter.
    """
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    if pixels.shape[-1] == 3:  # at once: the same pixels
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, method))
    bands = []
    for band in range(pixels.shape[-1]):
        image = Image.fromarray(np.ascontiguousarray(pixels[..., band]))
        bands.append(np.asarray(image.resize(size, method)))
    return np.stack(bands, axis=-1)


def turn_upright(
    pixels: UInt8[np.ndarray, "h w C"], orientation: int
) -> UInt8[np.ndarray, "_ _ C"]:
    """Pixels as an EXIF orientation, 1 .. 8, asks for."""
    if orientation in (5, 7):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 4):
        pixels = np.flip(pixels, axis=2 - orientation // 2)
    turns = {3: 2, 6: 3, 7: 2, 8: 1}  # counterclockwise, by 90 degrees
    return np.ascontiguousarray(np.rot90(pixels, turns.get(orientation, 0)))


def alpha(data: bytes, options: ImageOptions = DEFAULTS) -> UInt8[np.ndarray, "h w"] | None:
    """The opacity of the pixels of a file of 8 bits, as stored; None where all are opaque.

    Args:
      data: encoded bytes.
      options: limit the size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if not image.has_transparency_data:
                return None
    opacity = decode(data, 0, 4, options)[..., 3]
    return opacity if opacity.min() < 255 else None


def orientation(data: bytes) -> int:
    """The EXIF orientation of a file; 1, upright, where there is none."""
    if data.startswith(samples.NPY):
        return 1
    if data.startswith(samples.TIFF):
        return samples.tiff_orientation(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return int(image.getexif().get(EXIF_ORIENTATION, 1))


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
    data: bytes, canvas: int, channels: int, options: ImageOptions = DEFAULTS
) -> tuple[UInt8[np.ndarray, "K K C"], Int32[np.ndarray, "2"]]:
    """Decode into the top left of a canvas, see `decode`.

    Returns:
      (canvas uint8 [K, K, C], size int32 [2] = (height, width)).
    """
    out = np.empty((canvas, canvas, channels), np.uint8)
    size = place_on_canvas(decode(data, canvas, channels, options), out)
    return out, np.array(size, np.int32)


def check_size(width: int, height: int) -> None:
    """Raise BadImage if an image is larger than images are by default."""
    DEFAULTS.check_size(width, height)


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


def _decode_jpeg(
    data: bytes, canvas: int, channels: int, options: ImageOptions
) -> UInt8[np.ndarray, "h w C"] | None:
    """`decode` a JPEG by simplejpeg; None: Pillow must decide."""
    decoded = _read_jpeg(data, canvas, options)
    if decoded is None:
        return None
    pixels, target = decoded
    height, width = target
    if pixels.shape == (height, width, channels):
        return pixels
    return _convert(Image.fromarray(pixels), (width, height), channels)


def _read_jpeg(
    data: bytes, canvas: int, options: ImageOptions
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]] | None:
    """Decode by simplejpeg to a size near that of the canvas.

    Returns:
      (RGB pixels, (height, width) to shrink them to); None: Pillow must decide.

    Raises:
      BadImage: truncated or damaged.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        options.check_size(width, height)
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


def _decode_with_pillow(
    data: bytes, canvas: int, channels: int, options: ImageOptions = DEFAULTS
) -> UInt8[np.ndarray, "h w C"]:
    """`decode` by Pillow alone."""
    with warnings.catch_warnings():
        # Oddities of the metadata are harmless
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "TIFF":
            image.seek(samples.tiff_page(data))
        options.check_size(image.width, image.height)
        if image.format == "TIFF":  # the only format that Pillow rotates to upright
            orientation = image.tag_v2.get(EXIF_ORIENTATION)  # type: ignore[attr-defined]
            if orientation in UNDO_ORIENTATION:
                image = image.transpose(UNDO_ORIENTATION[orientation])
        # Shrinks a JPEG while it is decoded, by the same power of two as `_jpeg_scale`
        height, width = _fit_size(canvas, image.height, image.width)
        image.draft(None, (width, height))
        return _convert(image, (width, height), channels, options)


def fit_to_canvas(
    image: Image.Image, canvas: int, channels: int, options: ImageOptions = DEFAULTS
) -> UInt8[np.ndarray, "h w C"]:
    """The pixels of a Pillow image, shrunk until it fits a canvas; the rest is as in `decode`.

    Raises:
      BadImage: it is too large, or has other bands.
    """
    options.check_size(image.width, image.height)
    if channels not in MODES:
        raise WrongBands(f"the colors {image.mode}", len(image.getbands()), channels)
    image.load()  # a TIFF file is upright then
    stored = image.getexif().get(EXIF_ORIENTATION, 1) if options.exif_orientation else 1
    height, width = _fit_size(canvas, image.height, image.width)
    return turn_upright(_convert(image, (width, height), channels, options), stored)


def fit_array(
    values: Shaped[np.ndarray, "h w C"], canvas: int, ranges: tuple[Range, ...]
) -> UInt8[np.ndarray, "_ _ C"]:
    """An array as levels, shrunk until it fits a canvas; see `ImageOptions` for `ranges`."""
    height, width = _fit_size(canvas, *values.shape[:2])
    return resize(to_levels(values, ranges), (width, height))


def _convert(
    image: Image.Image, size: tuple[int, int], channels: int, options: ImageOptions = DEFAULTS
) -> UInt8[np.ndarray, "h w C"]:
    """A Pillow image as an array of this size (width, height) and with these channels."""
    mode = MODES[channels]
    if image.mode.startswith("I") or image.mode == "F":  # given as such; Pillow would clip
        levels = to_levels(np.asarray(image)[..., None], options.ranges)
        image = Image.fromarray(levels.squeeze(-1))
    if options.transparency != "ignore" and image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, options.transparency)
        image = Image.alpha_composite(background, image)
    if image.mode != mode:  # converting would copy
        image = image.convert(mode)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    width, height = size
    return np.asarray(image).reshape(height, width, -1)
