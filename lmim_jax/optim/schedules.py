"""Scalar schedules.

`progress` is training progress in [0, 1]. Progress and steps may be arrays or Python numbers.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = Float[Array, ""] | float
Step = Int[Array, ""] | int
Schedule = Callable[[Step], Scalar]


def since(step: Step, start: int) -> Step:
    """The step of a schedule that begins at step `start`; 0 before it."""
    if not start:
        return step
    return jnp.maximum(step - start, 0)


def cosine(start: float, end: float, progress: Scalar) -> Float[Array, ""]:
    """Interpolate from start to end along half a cosine.

    It is computed as end + (start - end) cos^2(pi x / 2), which keeps its precision where
    start - end is small beside end.
    """
    return end + (start - end) * jnp.cos(0.5 * jnp.pi * progress) ** 2


def linear(start: float, end: float, progress: Scalar) -> Scalar:
    """Interpolate from start to end along a line."""
    return end + (start - end) * (1 - progress)


def warmup_cosine(
    start: float,
    peak: float,
    floor: float,
    warmup_steps: float,
    total_steps: float,
    rebased: bool = True,
    peak_in_warmup: bool = False,
    cosine_share: float = 1.0,
) -> Schedule:
    """Build a learning rate: linear warm-up from start to peak, then half a cosine to the floor.

    Latent MIM's warm-up starts at its floor, 25 % of the peak (official `adjust_learning_rate`),
    MAE's at 0.

    Args:
      start: value at step 0.
      peak: value at the end of the warm-up.
      floor: value after `total_steps`.
      warmup_steps: length of the warm-up in optimizer steps.
      total_steps: length of the run in optimizer steps, warm-up included.
      rebased: the cosine begins at the peak, after the warm-up. False: it begins at step 0, and the
        smaller of warm-up and cosine counts (PiLaMIM).
      peak_in_warmup: the last step of the warm-up already has the peak, as in numpy's linspace
        (BootMAE, PiLaMIM). False: the first step after it has.
      cosine_share: the run ends after this share of the half cosine, above the floor (CAPI: 0.8).

    Returns:
      A function of the step, counted from 0.
    """
    decay_start = warmup_steps if rebased else 0
    last_of_warmup = max(round(warmup_steps) - 1, 1)

    def learning_rate(step: Step) -> Float[Array, ""]:
        rise = step / max(warmup_steps, 1)
        if peak_in_warmup:
            rise = jnp.minimum(step / last_of_warmup, 1)
        warmup = linear(start, peak, rise)
        progress = (step - decay_start) / max(total_steps - decay_start, 1)
        decay = cosine(peak, floor, cosine_share * progress)
        if not rebased:
            warmup = jnp.minimum(warmup, decay)
        return jnp.where(step < warmup_steps, warmup, decay)

    return learning_rate


def warmup_staircase(
    peak: Scalar, warmup_steps: float, every: float, factor: float = 0.1
) -> Schedule:
    """Build a learning rate: linear warm-up from 0 to the peak, which is then cut again and again.

    Args:
      peak: value at the end of the warm-up.
      warmup_steps: length of the warm-up in optimizer steps.
      every: steps, counted from step 0, after which the value is multiplied by `factor`.
      factor: of each cut.

    Returns:
      A function of the step, counted from 0.
    """

    def learning_rate(step: Step) -> Float[Array, ""]:
        rise = jnp.where(step < warmup_steps, step / max(warmup_steps, 1), 1.0)
        return peak * rise * factor ** jnp.floor(step / every)

    return learning_rate
