"""Scenes of several objects of `shapes`: stills with their number and nearest distance, and clips of moving ones.

Image or clip i of a split is a function of (version, split, i) alone, as in shapes.py.
"""

import numpy as np
from PIL import Image

from lmim_jax.data.synthetic import drawing
from lmim_jax.data.synthetic.drawing import CLASSES, DRAWN, SIZE, Pose

COUNTS = range(2, 6)  # objects in a still
NEAREST = (8.0, 26.0)  # distance of the two nearest centres of a still, pixels of the image
MARGIN = 7  # of centres from the border, pixels of the image
FRAMES = 10  # of a clip
TRIES = 200  # places tried for a centre before all are drawn again


def still(split, index):
    """One image: (picture uint8 [64, 64, 3], mask uint8 [64, 64], count, nearest distance).

    The mask is 0 where there is no object and 1 + class where there is one; where two overlap, it is the upper one.
    The count and the nearest distance between two centres (float, in pixels) are independent of each other.
    """
    rng = np.random.default_rng([3, split == "train", index])
    count, nearest = int(rng.integers(COUNTS.start, COUNTS.stop)), rng.uniform(*NEAREST)
    picture, mask = drawing.background(rng), Image.new("L", (DRAWN, DRAWN))
    for center in rng.permutation(_centers(rng, count, nearest)):
        label = int(rng.integers(len(CLASSES)))
        pose = Pose(_scale(rng), center * DRAWN / SIZE, rng.uniform(-0.6, 0.6), rng.choice([-1, 1]))
        drawing.paint(rng, label, pose, picture, mask, 1 + label)
    return drawing.photograph(rng, picture), _shrunk(mask), count, nearest


def clip(split, index):
    """One to three objects that move and turn: (frames uint8 [T, 64, 64, 3], masks uint8 [T, 64, 64]).

    Masks are 0 where there is no object and the number of the object, from 1, where there is one; the first frame shows
    all of them. Objects bounce off the border; the background stays, the noise does not.
    """
    rng = np.random.default_rng([4, split == "train", index])
    count = int(rng.integers(1, 4))
    labels = rng.choice(len(CLASSES), count, replace=False)
    picture = drawing.background(rng)
    drawing.distractors(rng, picture)
    scale, center = (
        1.4 * np.array([_scale(rng) for _ in labels]),
        _centers(rng, count, rng.uniform(26, 30)),
    )
    speed, way = rng.uniform(1.5, 3.5, count), rng.uniform(0, 2 * np.pi, count)
    velocity = speed[:, None] * np.stack([np.cos(way), np.sin(way)], 1)
    angle, spin = rng.uniform(-0.6, 0.6, count), rng.uniform(-0.12, 0.12, count)
    mirror = rng.choice([-1, 1], count)
    frames, masks = [], []
    for time in range(FRAMES):
        shown, mask = picture.copy(), Image.new("L", (DRAWN, DRAWN))
        for i, label in enumerate(labels):
            place = _bounced(center[i] + time * velocity[i]) * DRAWN / SIZE
            pose = Pose(scale[i], place, angle[i] + time * spin[i], mirror[i])
            colors = np.random.default_rng(
                [5, split == "train", index, i]
            )  # the same in every frame
            drawing.paint(colors, label, pose, shown, mask, i + 1)
        frames.append(drawing.photograph(rng, shown))
        masks.append(_shrunk(mask))
    return np.stack(frames), np.stack(masks)


def _scale(rng):
    """The size of an object among others, in pixels of the drawing."""
    return rng.uniform(0.17, 0.24) * SIZE


def _centers(rng, count, nearest):
    """Places [count, 2] in the image: the first two are `nearest` pixels apart, no others are nearer."""
    while True:
        centers = [rng.uniform(MARGIN, SIZE - MARGIN, 2)]
        for _ in range(TRIES):
            if len(centers) == count:
                return np.stack(centers)
            if len(centers) == 1:
                angle = rng.uniform(0, 2 * np.pi)
                new = centers[0] + nearest * np.array([np.cos(angle), np.sin(angle)])
                far = (new >= MARGIN).all() and (new <= SIZE - MARGIN).all()
            else:
                new = rng.uniform(MARGIN, SIZE - MARGIN, 2)
                far = np.linalg.norm(np.stack(centers) - new, axis=1).min() > nearest
            if far:
                centers.append(new)


def _bounced(place):
    """A place that left the box of centres, mirrored at its sides."""
    room = SIZE - 2 * MARGIN
    along = (place - MARGIN) % (2 * room)
    return MARGIN + np.minimum(along, 2 * room - along)


def _shrunk(mask):
    """A drawn mask of numbers at the size of the image, uint8 [SIZE, SIZE]."""
    return np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST))
