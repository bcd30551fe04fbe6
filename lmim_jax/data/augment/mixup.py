"""Mixup, cutmix, random erasing and smooth labels for supervised training, on normalised images.

Letters: B batch, H W height and width, C channels, K classes.
"""

import jax
import jax.numpy as jnp


def smooth(labels, classes, smoothing):
    """Classes [B] -> probabilities [B, K]: smoothing is spread over all classes, the true one gets the rest."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def _neighbours(x):
    """The rows of a batch with those at 2i and 2i + 1 exchanged: no device needs rows of another."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def mix(key, images, targets, mixup, cutmix, switch):
    """Mix each image with its neighbour in the batch, by one draw for the whole batch.

    mixup: the weighted mean of both images. cutmix: a box of the other image in this one. Targets are mixed in
    proportion; in cutmix by the area that the box has in the end, cut off at the border.

    Args:
      images: [B, H, W, C], B even. targets: [B, K] probabilities. mixup, cutmix: parameter of the Beta distribution
        of the weight; 0: off. switch: probability of cutmix where both are on.

    Source: timm's `Mixup` in mode "batch" with probability 1, as in DeiT and MAE; it takes the image at the other end
    of the batch where this takes the neighbour: in random order, any other.
    """
    if not mixup and not cutmix:
        return images, targets
    which_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 4)
    cut = jax.random.bernoulli(which_key, switch) if mixup and cutmix else jnp.bool_(cutmix > 0)
    share = jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0)
    inside = _box(cutmix_key, place_key, images.shape[1:3], cutmix or 1.0)
    weight = jnp.where(
        cut, 1 - inside.astype(jnp.float32)[None, :, :, None], share
    )  # of the image itself
    images = images * weight + _neighbours(images) * (1 - weight)
    own = weight.mean()
    return images, targets * own + _neighbours(targets) * (1 - own)


def _box(key, place_key, size, alpha):
    """A box with a centre anywhere and 1 - Beta(alpha, alpha) of the area, cut off at the border: bool [H, W]."""
    side = jnp.sqrt(1 - jax.random.beta(key, alpha, alpha))
    along = []
    for length, place in zip(size, jax.random.uniform(place_key, (2,)), strict=True):
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        centre = jnp.floor(place * length).astype(jnp.int32)
        along.append((jnp.arange(length) >= centre - half) & (jnp.arange(length) < centre + half))
    return along[0][:, None] & along[1][None]


AREA, ASPECT = (
    (0.02, 1 / 3),
    0.3,
)  # of erased boxes: share of the image; height over width, down from its inverse


def erase(key, image, probability):
    """With this probability, fill a box of one image [H, W, C] with normal noise, drawn for each value.

    Ten tries at a box; the first that fits into the image is taken, none where none does.
    Source: timm's `RandomErasing` in mode "pixel" with one box (Zhong et al. 2020), as in DeiT and MAE.
    """
    keys = jax.random.split(key, 5)
    size = jnp.asarray(image.shape[:2], jnp.float32)
    area = jax.random.uniform(keys[0], (10,), minval=AREA[0], maxval=AREA[1]) * size.prod()
    limit = -jnp.log(ASPECT)
    aspect = jnp.exp(jax.random.uniform(keys[1], (10,), minval=-limit, maxval=limit))
    sides = jnp.round(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=1))
    fits = (sides < size[None]).all(axis=1)
    side = sides[jnp.argmax(fits)]
    first = jnp.floor(jax.random.uniform(keys[2], (2,)) * (size - side + 1))
    rows, columns = (
        (jnp.arange(image.shape[axis]) >= first[axis])
        & (jnp.arange(image.shape[axis]) < first[axis] + side[axis])
        for axis in (0, 1)
    )
    box = rows[:, None] & columns[None] & fits.any() & jax.random.bernoulli(keys[3], probability)
    return jnp.where(box[..., None], jax.random.normal(keys[4], image.shape), image)
