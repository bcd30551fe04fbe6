"""Mixup, cutmix, random erasing and label smoothing for supervised training, on normalized images.

Letters: B batch, H W height and width, C channels, K classes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# Of erased boxes, as in timm
ERASE_TRIES = 10
ERASE_AREA = (0.02, 1 / 3)  # share of the image
ERASE_ASPECT = 0.3  # least height over width; the largest is its inverse


def smooth_labels(labels: Int[Array, " B"], classes: int, smoothing: float) -> Float[Array, "B K"]:
    """Class labels -> probabilities, of which `smoothing` is spread evenly over all classes."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix_batch(
    key: Array,
    images: Float[Array, "B H W C"],
    targets: Float[Array, "B K"],
    mixup: float,
    cutmix: float,
    switch: float,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B K"]]:
    """Mix each image with its neighbor in the batch, by one draw for the whole batch.

    Mixup takes the weighted mean of both images, cutmix puts a box of the other image into this
    one. Targets are mixed in proportion; in cutmix, by the area of the box after it was clipped at
    the border.

    Args:
      key: random key.
      images: B must be even.
      targets: probabilities.
      mixup: parameter of the Beta distribution of the weight in mixup; 0: off.
      cutmix: the same for cutmix.
      switch: probability of cutmix where both are on.

    Returns:
      (images, targets), mixed.

    Source: timm's `Mixup` in mode "batch" with probability 1, as in DeiT and MAE. It takes the
    image at the opposite end of the batch where this takes the neighbor: in random order, any other
    image.
    """
    if not mixup and not cutmix:
        return images, targets
    which_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 4)
    use_cutmix = jnp.bool_(cutmix > 0)
    if mixup and cutmix:
        use_cutmix = jax.random.bernoulli(which_key, switch)
    share = jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0)
    in_box = _draw_box(cutmix_key, place_key, images.shape[1:3], cutmix or 1.0)
    outside = 1 - in_box.astype(jnp.float32)[None, :, :, None]
    weight = jnp.where(use_cutmix, outside, share)  # of the image itself
    images = images * weight + _swap_neighbors(images) * (1 - weight)
    target_weight = weight.mean()
    targets = targets * target_weight + _swap_neighbors(targets) * (1 - target_weight)
    return images, targets


def _swap_neighbors(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Exchange rows 2i and 2i + 1 of a batch: no device needs rows of another."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, ::-1].reshape(x.shape)


def _draw_box(
    key: Array, place_key: Array, size: tuple[int, int], alpha: float
) -> Bool[Array, "H W"]:
    """The inside of a box with a uniform center and 1 - Beta(alpha, alpha) of the area.

    It is clipped at the border of the image.
    """
    height, width = size
    side = jnp.sqrt(1 - jax.random.beta(key, alpha, alpha))
    place = jax.random.uniform(place_key, (2,))
    rows = _centered_interval(height, side, place[0])
    columns = _centered_interval(width, side, place[1])
    return rows[:, None] & columns[None]


def _centered_interval(
    length: int, side: Float[Array, ""], place: Float[Array, ""]
) -> Bool[Array, " length"]:
    """The inside of an interval; `side` and its center `place` are in units of the length."""
    half = jnp.floor(length * side).astype(jnp.int32) // 2
    center = jnp.floor(place * length).astype(jnp.int32)
    samples = jnp.arange(length)
    return (samples >= center - half) & (samples < center + half)


def random_erase(
    key: Array, image: Float[Array, "H W C"], probability: float
) -> Float[Array, "H W C"]:
    """With some probability, fill a box of one image with normal noise, drawn for each value.

    Ten boxes are drawn, and the first that fits into the image is taken; if none fits, nothing is
    erased.

    Source: timm's `RandomErasing` in mode "pixel" with one box (Zhong et al. 2020), as in DeiT and
    MAE.
    """
    height, width = image.shape[:2]
    area_key, aspect_key, place_key, apply_key, noise_key = jax.random.split(key, 5)
    size = jnp.asarray([height, width], jnp.float32)
    least, most = ERASE_AREA
    area = jax.random.uniform(area_key, (ERASE_TRIES,), minval=least, maxval=most) * size.prod()
    limit = -jnp.log(ERASE_ASPECT)
    log_aspect = jax.random.uniform(aspect_key, (ERASE_TRIES,), minval=-limit, maxval=limit)
    aspect = jnp.exp(log_aspect)
    sides = jnp.round(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=1))
    fits = (sides < size[None]).all(axis=1)
    side = sides[jnp.argmax(fits)]
    first = jnp.floor(jax.random.uniform(place_key, (2,)) * (size - side + 1))
    rows = _interval(height, first[0], side[0])
    columns = _interval(width, first[1], side[1])
    erased = rows[:, None] & columns[None]
    erased = erased & fits.any() & jax.random.bernoulli(apply_key, probability)
    return jnp.where(erased[..., None], jax.random.normal(noise_key, image.shape), image)


def _interval(
    length: int, first: Float[Array, ""], side: Float[Array, ""]
) -> Bool[Array, " length"]:
    """The inside of the interval [first, first + side)."""
    samples = jnp.arange(length)
    return (samples >= first) & (samples < first + side)
