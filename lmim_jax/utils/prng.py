"""Random keys of a step and of its images."""

import jax


def image_keys(rng, step, positions):
    """(rng of step `step`, keys [B] of its images); `positions` [B] are places in the global batch.

    So every draw is the same for any number of devices, hosts and micro-batches.
    """
    rng = jax.random.fold_in(rng, step)
    return rng, jax.vmap(lambda position: jax.random.fold_in(rng, position))(positions)


def augment_keys(seed, step, positions):
    """The keys that `draw` gives to `augment` for these positions of a step, in a run of this seed (see state.init)."""
    _, rng = jax.random.split(jax.random.key(seed))
    _, keys = image_keys(rng, step, positions)
    return jax.vmap(jax.random.split)(keys)[:, 0]
