"""Drawing the images of `shapes`: the ten objects, backgrounds, and an object in a pose.

Images are drawn at twice their size, then shrunk, so that edges are smooth.
"""

import colorsys
import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

SIZE = 64  # side of an image, in pixels
DRAWN = 2 * SIZE  # side of the drawing
CLASSES = tuple(f"object{i}" for i in range(10))
OBJECT_SEED = 7

# Kinds of outlines
ELLIPSE = 0
RECTANGLE = 1
TRIANGLE = 2
OUTLINES = {
    RECTANGLE: [[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]],
    TRIANGLE: [[0.0, -1.0], [1.0, 1.0], [-1.0, 1.0]],
}
ELLIPSE_POINTS = 28

Color = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an object, in units of the object's size.

    Attributes:
      kind: ELLIPSE, RECTANGLE or TRIANGLE.
      center: (x, y).
      half: half of the width and height.
      hsv: hue, saturation and value, each in 0 .. 1.
    """

    kind: int
    center: Float[np.ndarray, "2"]
    half: Float[np.ndarray, "2"]
    hsv: Color


@dataclasses.dataclass(frozen=True)
class Pose:
    """Position and orientation of an object.

    Attributes:
      scale: size of the object, in pixels of the drawing.
      center: (x, y), in pixels of the drawing.
      angle: in radians.
      mirror: 1, or -1 for mirrored.
    """

    scale: float
    center: Float[np.ndarray, "2"]
    angle: float
    mirror: int


def _draw_part(rng: np.random.Generator) -> Part:
    kind = int(rng.integers(3))
    center = rng.uniform(-0.75, 0.75, 2)
    half = rng.uniform(0.15, 0.3, 2)
    hsv = (rng.uniform(0, 1), rng.uniform(0.3, 1.0), rng.uniform(0.35, 1.0))
    return Part(kind, center, half, hsv)


def _draw_objects() -> list[list[Part]]:
    """The ten objects: each a body, and four or five parts on it; always the same."""
    rng = np.random.default_rng(OBJECT_SEED)
    objects = []
    for _ in CLASSES:
        parts = []
        for _ in range(rng.integers(4, 6)):
            parts.append(_draw_part(rng))
        aspect = rng.uniform(0.6, 1.5) ** 0.5
        body = dataclasses.replace(
            _draw_part(rng), center=np.zeros(2), half=0.8 * np.array([aspect, 1 / aspect])
        )
        objects.append([body, *parts])
    return objects


OBJECTS = _draw_objects()


def draw_background(rng: np.random.Generator) -> Image.Image:
    """A drawing of soft color noise at three scales, without objects."""
    out = np.zeros((SIZE, SIZE, 3), np.float32) + rng.uniform(30, 225, 3).astype(np.float32)
    for cells in (3, 6, 12):
        noise = rng.normal(0, rng.uniform(8, 24), (cells, cells, 3)).astype(np.float32)
        planes = []
        for channel in range(3):
            plane = Image.fromarray(noise[..., channel])
            planes.append(np.asarray(plane.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
        out += np.stack(planes, -1)
    texture = Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))
    return texture.resize((DRAWN, DRAWN), Image.Resampling.BILINEAR)


def draw_distractors(rng: np.random.Generator, picture: Image.Image) -> None:
    """Draw up to four small shapes that belong to no object."""
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(5)):
        outline = _outline(int(rng.integers(3)))
        points = outline * rng.uniform(6, 16, 2) + rng.uniform(0, DRAWN, 2)
        red, green, blue = rng.integers(0, 255, 3).tolist()
        draw.polygon(_polygon(points), fill=(red, green, blue))


def draw_object(
    rng: np.random.Generator,
    label: int,
    pose: Pose,
    picture: Image.Image,
    mask: Image.Image,
    value: int,
) -> None:
    """Draw an object into a drawing and its mask.

    Args:
      rng: for its colors.
      label: its class.
      pose: where to draw it.
      picture: the drawing.
      mask: of the size of the drawing.
      value: written into the mask where the object is.
    """
    hue = rng.uniform(-0.15, 0.15)
    saturation = rng.uniform(0.5, 1.3)
    brightness = rng.uniform(0.6, 1.2)
    cos = np.cos(pose.angle)
    sin = np.sin(pose.angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    for part in OBJECTS[label]:
        h, s, v = part.hsv
        s = s * saturation * rng.uniform(0.8, 1.2)
        v = v * brightness
        h = (h + hue + rng.normal(0, 0.03)) % 1
        red, green, blue = colorsys.hsv_to_rgb(h, min(1, s), min(1, v))
        points = _outline(part.kind) * part.half + part.center
        points = points * pose.scale * [pose.mirror, 1]
        polygon = _polygon(points @ rotation + pose.center)
        fill = (int(255 * red), int(255 * green), int(255 * blue))
        ImageDraw.Draw(picture).polygon(polygon, fill=fill)
        ImageDraw.Draw(mask).polygon(polygon, fill=value)


def render(rng: np.random.Generator, picture: Image.Image) -> UInt8[np.ndarray, "64 64 3"]:
    """The drawing as an image: shrunk, with noise."""
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    noisy = pixels + rng.normal(0, 5, (SIZE, SIZE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _outline(kind: int) -> Float[np.ndarray, "points 2"]:
    """The corners of a shape in -1 .. 1."""
    if kind == ELLIPSE:
        angle = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.array(OUTLINES[kind])


def _polygon(points: Float[np.ndarray, "points 2"]) -> list[tuple[float, float]]:
    """Points as Pillow takes them."""
    return [(x, y) for x, y in points]
