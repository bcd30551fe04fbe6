"""Scenes of several objects of `shapes`: still images and clips of moving objects.

Still image or clip i of a split is a function of (version, split, i) alone, as in shapes.py.

Letters: T frames of a clip.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lmim_jax.data.synthetic import drawing
from lmim_jax.data.synthetic.drawing import CLASSES, DRAWN, SIZE, Pose

STILL_SEED = 3
CLIP_SEED = 4
CLIP_COLOR_SEED = 5

COUNTS = range(2, 6)  # objects in a still image
NEAREST = (8.0, 26.0)  # distance of the two nearest centers of a still image, in pixels
MARGIN = 7  # least distance of centers from the border, in pixels
FRAMES = 10  # of a clip
TRIES = 200  # positions tried for a center before all are drawn again


def draw_still(
    split: str, index: int
) -> tuple[UInt8[np.ndarray, "64 64 3"], UInt8[np.ndarray, "64 64"], int, float]:
    """One still image.

    Returns:
      (image, mask, number of objects, distance between the two nearest centers in pixels). The mask
      is 0 where there is no object and 1 + class where there is one; where two overlap, it shows
      the upper one. The number and the distance are independent of each other.
    """
    rng = np.random.default_rng([STILL_SEED, split == "train", index])
    count = int(rng.integers(COUNTS.start, COUNTS.stop))
    nearest = rng.uniform(*NEAREST)
    picture = drawing.draw_background(rng)
    mask = _empty_mask()
    for center in rng.permutation(_draw_centers(rng, count, nearest)):
        label = int(rng.integers(len(CLASSES)))
        pose = Pose(
            scale=_draw_scale(rng),
            center=center * DRAWN / SIZE,
            angle=rng.uniform(-0.6, 0.6),
            mirror=rng.choice([-1, 1]),
        )
        drawing.draw_object(rng, label, pose, picture, mask, 1 + label)
    return drawing.render(rng, picture), _shrink_mask(mask), count, nearest


def draw_clip(
    split: str, index: int
) -> tuple[UInt8[np.ndarray, "T 64 64 3"], UInt8[np.ndarray, "T 64 64"]]:
    """A clip of one to three objects that move and turn.

    Objects bounce off the border. The background stays the same; the noise changes.

    Returns:
      (frames, masks). Masks are 0 where there is no object and the number of the object, from 1,
      where there is one; the first frame shows all of them.
    """
    rng = np.random.default_rng([CLIP_SEED, split == "train", index])
    count = int(rng.integers(1, 4))
    labels = rng.choice(len(CLASSES), count, replace=False)
    background = drawing.draw_background(rng)
    drawing.draw_distractors(rng, background)
    scale = 1.4 * np.array([_draw_scale(rng) for _ in labels])
    center = _draw_centers(rng, count, rng.uniform(26, 30))
    speed = rng.uniform(1.5, 3.5, count)
    direction = rng.uniform(0, 2 * np.pi, count)
    velocity = speed[:, None] * np.stack([np.cos(direction), np.sin(direction)], 1)
    angle = rng.uniform(-0.6, 0.6, count)
    rotation = rng.uniform(-0.12, 0.12, count)
    mirror = rng.choice([-1, 1], count)
    frames = []
    masks = []
    for time in range(FRAMES):
        picture = background.copy()
        mask = _empty_mask()
        for i, label in enumerate(labels):
            pose = Pose(
                scale=scale[i],
                center=_bounce(center[i] + time * velocity[i]) * DRAWN / SIZE,
                angle=angle[i] + time * rotation[i],
                mirror=mirror[i],
            )
            # The colors of an object are the same in every frame
            colors = np.random.default_rng([CLIP_COLOR_SEED, split == "train", index, i])
            drawing.draw_object(colors, label, pose, picture, mask, i + 1)
        frames.append(drawing.render(rng, picture))
        masks.append(_shrink_mask(mask))
    return np.stack(frames), np.stack(masks)


def _draw_scale(rng: np.random.Generator) -> float:
    """The size of an object among others, in pixels of the drawing."""
    return rng.uniform(0.17, 0.24) * SIZE


def _draw_centers(
    rng: np.random.Generator, count: int, nearest: float
) -> Float[np.ndarray, "count 2"]:
    """Positions in the image: the first two are `nearest` pixels apart, no others are closer."""
    while True:
        centers = [_draw_position(rng)]
        for _ in range(TRIES):
            if len(centers) == count:
                return np.stack(centers)
            if len(centers) == 1:
                angle = rng.uniform(0, 2 * np.pi)
                position = centers[0] + nearest * np.array([np.cos(angle), np.sin(angle)])
                accepted = (position >= MARGIN).all() and (position <= SIZE - MARGIN).all()
            else:
                position = _draw_position(rng)
                distances = np.linalg.norm(np.stack(centers) - position, axis=1)
                accepted = distances.min() > nearest
            if accepted:
                centers.append(position)


def _draw_position(rng: np.random.Generator) -> Float[np.ndarray, "2"]:
    """A position in the image, away from the border."""
    return rng.uniform(MARGIN, SIZE - MARGIN, 2)


def _bounce(position: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    """Mirror a position outside the range of centers at the sides of that range."""
    width = SIZE - 2 * MARGIN
    along = (position - MARGIN) % (2 * width)
    return MARGIN + np.minimum(along, 2 * width - along)


def _empty_mask() -> Image.Image:
    """A mask of the size of the drawing, 0 everywhere."""
    return Image.new("L", (DRAWN, DRAWN))


def _shrink_mask(mask: Image.Image) -> UInt8[np.ndarray, "64 64"]:
    """A drawn mask of numbers at the size of the image."""
    return np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST))
