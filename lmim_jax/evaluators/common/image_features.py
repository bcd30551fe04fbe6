"""What stands for an image: a feature of a method, by its name, as one vector; or what needs no encoder.

Letters: B batch, H W image height and width, C channels, D width of a feature.
"""

import difflib

import jax
import jax.numpy as jnp

from lmim_jax.utils.errors import UserError

FIXED = ("pixels", "histogram")  # these need no encoder
POOLS = ("mean", "cls", "both")


def vectors(method, augment, params, images, feature):
    """What `feature` names, side by side: images [B, H, W, C], normalised by `augment` -> float32 [B, D].

    feature: such as "cls" or "cls+patches_prenorm", see `parse` and configs/evaluate.py.

    Raises:
      UserError: the method has no such feature.
    """
    parts = parse(feature)
    known = {
        name: fixed(images, augment.levels(images), name) for name, _ in parts if name in FIXED
    }
    if needs_encoder(feature):
        known |= method.features(params, images)
    return jnp.concatenate([_pool(known, name, pool) for name, pool in parts], axis=-1)


def fixed(images, levels, name):
    """What needs no encoder, one vector per image.

    Args:
      images: [B, H, W, C] as the encoder sees them. levels: the same as levels 0 .. 255.
      name: "pixels": the image itself. "histogram": square root of the share of pixels in each of 6^C colours (so that
        the cosine is Bhattacharyya's coefficient).
    """
    if name == "pixels":
        return images.reshape(len(images), -1)
    channels = images.shape[-1]
    color = jnp.minimum((levels * (6 / 256)).astype(jnp.int32), 5) @ 6 ** jnp.arange(channels)
    count = lambda row: jnp.bincount(row, length=6**channels)
    return jnp.sqrt(jax.vmap(count)(color.reshape(len(images), -1)) / color[0].size)


def parse(feature):
    """[(name, pool)] of what `feature` puts side by side: "cls+block07/tokens:both"; see configs/evaluate.py.

    Raises:
      UserError: no such pool.
    """
    parts = []
    for part in feature.split("+"):
        name, _, pool = part.strip().partition(":")
        if (pool or POOLS[0]) not in POOLS:
            raise UserError(f"feature {feature!r}: {pool!r} is none of: {' | '.join(POOLS)}")
        parts.append((name, pool or POOLS[0]))
    return parts


def needs_encoder(feature):
    """Whether `feature` holds more than what is in FIXED."""
    return any(name not in FIXED for name, _ in parse(feature))


def _pool(features, name, pool):
    """One vector per image of what a method calls `name`: [B, D], with pool "both" [B, 2 D].

    Args:
      features: of a method, see `methods.base`. name: a key of it. pool: one of POOLS; for "blockNN/tokens", whose
        first row is CLS where the method has one; anything else has but one pool, the mean over its rows (or itself).

    Raises:
      UserError: there is no such feature, it is not one of tokens, or it has no such pool.
    """
    if name not in features:
        near = difflib.get_close_matches(name, [*features, *FIXED], n=1)
        usual = ", ".join(
            [*sorted(key for key in features if "/" not in key), "block00/tokens, ...", *FIXED]
        )
        hint = f"; did you mean {near[0]}?" if near else f" (there are: {usual})"
        raise UserError(f"feature {name!r}: the method has none of that name{hint}")
    x = features[name].astype(jnp.float32)
    if x.ndim not in (2, 3):
        raise UserError(f"feature {name!r} has no vectors for images or patches to evaluate")
    with_cls = name.endswith("/tokens") and "cls" in features
    if pool != "mean" and not with_cls:
        raise UserError(
            f"feature {name!r} has no CLS token for :{pool}; join features instead: cls+{name}"
        )
    tokens = {
        "mean": lambda: x[:, int(with_cls) :].mean(axis=1) if x.ndim == 3 else x,
        "cls": lambda: x[:, 0],
    }
    return jnp.concatenate(
        [tokens[one]() for one in (("cls", "mean") if pool == "both" else (pool,))], axis=-1
    )
