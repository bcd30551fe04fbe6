"""Scalar schedules. `progress` is training progress in [0, 1]; arrays or Python numbers alike."""

import jax.numpy as jnp


def cosine(start, end, progress):
    """From start to end along half a cosine.

    Written as end + (start - end) cos^2(pi x / 2), which does not cancel where start - end is small beside end.
    """
    return end + (start - end) * jnp.cos(0.5 * jnp.pi * progress) ** 2


def linear(start, end, progress):
    """From start to end along a line."""
    return end + (start - end) * (1 - progress)


def warmup_cosine(start, peak, floor, warmup_steps, total_steps, rebased=True):
    """Learning rate: linear from start to peak over the warm-up, then half a cosine to the floor.

    Args:
      rebased: the cosine begins at the peak, after the warm-up; False: with the run, and the smaller of the two counts
        (PiLaMIM).

    Returns:
      A function of the step (0-based). Latent MIM's warm-up starts at its floor, 25 % of the peak (official
      `adjust_learning_rate`), MAE's at 0.
    """

    def rate(step):
        warmup = linear(start, peak, step / max(warmup_steps, 1))
        begin = warmup_steps if rebased else 0
        decay = cosine(peak, floor, (step - begin) / max(total_steps - begin, 1))
        return jnp.where(
            step < warmup_steps, warmup if rebased else jnp.minimum(warmup, decay), decay
        )

    return rate
