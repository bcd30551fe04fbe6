"""How `shapes` is drawn: the ten objects, backgrounds, and an object in a pose. See shapes.py and scenes.py."""

import colorsys
import dataclasses

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
DRAWN = 2 * SIZE  # drawn at twice the size, then shrunk: smooth edges
CLASSES = tuple(f"object{i}" for i in range(10))


def _classes():
    """The ten objects: a body and parts, as fixed random numbers. Lengths in units of the object's size."""
    rng = np.random.default_rng(7)
    part = lambda: dict(
        kind=int(rng.integers(3)),
        center=rng.uniform(-0.75, 0.75, 2),
        half=rng.uniform(0.15, 0.3, 2),
        hsv=(rng.uniform(0, 1), rng.uniform(0.3, 1.0), rng.uniform(0.35, 1.0)),
    )
    objects = []
    for _ in CLASSES:
        parts = [part() for _ in range(rng.integers(4, 6))]
        aspect = rng.uniform(0.6, 1.5) ** 0.5
        body = dict(part(), center=np.zeros(2), half=0.8 * np.array([aspect, 1 / aspect]))
        objects.append([body, *parts])
    return objects


OBJECTS = _classes()


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where and how an object lies: lengths in pixels of the drawing, (x, y); angle in radians; mirror 1 or -1."""

    scale: float
    center: np.ndarray
    angle: float
    mirror: int


def background(rng):
    """A picture of soft colour noise at three scales, [DRAWN, DRAWN], without objects."""
    out = np.zeros((SIZE, SIZE, 3), np.float32) + rng.uniform(30, 225, 3).astype(np.float32)
    for cells in (3, 6, 12):
        noise = rng.normal(0, rng.uniform(8, 24), (cells, cells, 3)).astype(np.float32)
        planes = [
            Image.fromarray(noise[..., c]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        out += np.stack([np.asarray(plane) for plane in planes], -1)
    texture = Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))
    return texture.resize((DRAWN, DRAWN), Image.Resampling.BILINEAR)


def distractors(rng, picture):
    """Paint up to four small shapes that belong to no object."""
    paint = ImageDraw.Draw(picture)
    for _ in range(rng.integers(5)):
        points = _outline(int(rng.integers(3))) * rng.uniform(6, 16, 2) + rng.uniform(0, DRAWN, 2)
        paint.polygon(
            [tuple(point) for point in points], fill=tuple(int(c) for c in rng.integers(0, 255, 3))
        )


def paint(rng, label, pose, picture, mask, value):
    """Paint an object into the picture, and `value` into the mask where it is; its colours are drawn from `rng`."""
    hue, saturation, brightness = (
        rng.uniform(-0.15, 0.15),
        rng.uniform(0.5, 1.3),
        rng.uniform(0.6, 1.2),
    )
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    for part in OBJECTS[label]:
        h, s, v = part["hsv"]
        s, v = s * saturation * rng.uniform(0.8, 1.2), v * brightness
        color = colorsys.hsv_to_rgb((h + hue + rng.normal(0, 0.03)) % 1, min(1, s), min(1, v))
        points = (
            (_outline(part["kind"]) * part["half"] + part["center"]) * pose.scale * [pose.mirror, 1]
        )
        polygon = [tuple(point) for point in points @ turn + pose.center]
        ImageDraw.Draw(picture).polygon(polygon, fill=tuple(int(255 * c) for c in color))
        ImageDraw.Draw(mask).polygon(polygon, fill=value)


def photograph(rng, picture):
    """The drawing as an image, shrunk and with noise: uint8 [SIZE, SIZE, 3]."""
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) + rng.normal(
        0, 5, (SIZE, SIZE, 3)
    )
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _outline(kind):
    """A unit shape [points, 2]: ellipse, rectangle or triangle."""
    if kind == 0:
        angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.array(
        [[-1, -1], [1, -1], [1, 1], [-1, 1]] if kind == 1 else [[0, -1], [1, 1], [-1, 1]], float
    )
