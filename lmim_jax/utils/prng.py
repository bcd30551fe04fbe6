"""Random keys of a training step and of its images.

Letters: B images of a global batch.
"""

import jax
from jaxtyping import Array, Int, Key


def image_keys(
    rng: Key[Array, ""], step: Int[Array, ""] | int, positions: Int[Array, " B"]
) -> tuple[Key[Array, ""], Key[Array, " B"]]:
    """Derive the random keys of a step and of its images.

    All random choices are the same for any number of devices, hosts and micro-batches.

    Args:
      rng: random key of the run.
      step: number of the step.
      positions: places of the images in the global batch.

    Returns:
      (key of the step, keys of the images).
    """
    step_rng = jax.random.fold_in(rng, step)
    keys = jax.vmap(lambda position: jax.random.fold_in(step_rng, position))(positions)
    return step_rng, keys


def augment_keys(
    seed: int, step: Int[Array, ""] | int, positions: Int[Array, " B"]
) -> Key[Array, " B"]:
    """Derive the keys that a run's train step passes to `augment`, see `train.step`.

    Args:
      seed: of the run.
      step: number of the step.
      positions: places of the images in the global batch.
    """
    _, rng = jax.random.split(jax.random.key(seed))
    _, keys = image_keys(rng, step, positions)
    return jax.vmap(jax.random.split)(keys)[:, 0]
