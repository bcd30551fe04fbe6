"""Scalar schedules. `progress` is training progress in [0, 1]; arrays or Python numbers alike."""

import jax.numpy as jnp


def cosine(start, end, progress):
    """From start to end along half a cosine.

    Written as end + (start - end) cos^2(pi x / 2), which does not cancel where start - end is small beside end.
    """
    return end + (start - end) * jnp.cos(0.5 * jnp.pi * progress) ** 2


def warmup_cosine(peak, floor, warmup_steps, total_steps):
    """Learning rate: linear from floor to peak over the warm-up, then half a cosine back to the floor.

    The warm-up starts at the floor, not at 0 (official `adjust_learning_rate`; 25 % of the peak in its recipe).

    Returns:
      A function of the step (0-based).
    """

    def rate(step):
        warmup = floor + (peak - floor) * step / max(warmup_steps, 1)
        decay = cosine(peak, floor, (step - warmup_steps) / max(total_steps - warmup_steps, 1))
        return jnp.where(step < warmup_steps, warmup, decay)

    return rate
