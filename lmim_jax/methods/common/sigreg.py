"""SIGReg, which pulls features towards an isotropic Gaussian, and a hinge on their variance.

SIGReg projects features onto random directions and compares the characteristic function of each
projection with that of N(0, 1) (Epps-Pulley). Constant features, and features that vary in a few
directions only, are far from that. But where all features are 0, its gradient is exactly 0, and
close to that it fades with the spread of the features; the gradient of the hinge does not.

Samples are those of the whole batch on all devices, inside a `shard_map` too.

Letters: n samples, D width, K directions, J knots.

Sources: LeJEPA (Balestriero and LeCun, arXiv 2511.08544), from the formulas alone; VICReg (Bardes
et al., arXiv 2105.04906) for the hinge.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.common.losses import Scalar, sum_over_devices

KNOTS = np.linspace(0, 3, 17)  # where characteristic functions are compared
GAUSSIAN = np.exp(-(KNOTS**2) / 2)  # that of N(0, 1)
# The trapezoidal rule on both sides of 0, weighted by the Gaussian
WEIGHTS = GAUSSIAN * np.where((KNOTS == 0) | (KNOTS == 3), 1, 2) * (KNOTS[1] - KNOTS[0])
# The mean statistic of samples of N(0, 1), whatever n: the variances of cosine and sine at t add up
# to 1 - exp(-t^2)
EXPECTED = float(np.sum(WEIGHTS * (1 - GAUSSIAN**2)))
HINGE_EPSILON = 1e-8  # VICReg has 1e-4: below a deviation of 0.01, its gradient would fade as well


def random_directions(key: Key[Array, ""], width: int, count: int) -> Float[Array, "D K"]:
    """Draw `count` unit vectors, uniform on the sphere."""
    directions = jax.random.normal(key, (width, count))
    return directions / jnp.linalg.norm(directions, axis=0, keepdims=True)


def step_directions(step: int | Int[Array, ""], width: int, count: int) -> Float[Array, "D K"]:
    """Draw the directions of a step: fresh in each, and the same on all devices."""
    return random_directions(jax.random.fold_in(jax.random.key(0), step), width, count)


def epps_pulley(x: Float[Array, "n K"], weight: Float[Array, " n"]) -> Float[Array, " K"]:
    """Compare the distribution of each column with N(0, 1).

    n sum_j w_j [(mean cos(t_j x) - exp(-t_j^2 / 2))^2 + (mean sin(t_j x))^2]

    It is about 1.05 for samples of N(0, 1), and 0.40 n where all x are 0.

    Args:
      x: samples, at least one.
      weight: 1 for samples and 0 for padding.
    """
    count = sum_over_devices(weight.sum())

    # Computed again for the gradient: the angles [J, n, K] need no memory
    @jax.checkpoint
    def sums(x: Array) -> tuple[Array, Array]:
        angles = jnp.asarray(KNOTS, jnp.float32)[:, None, None] * x[None]
        rows = weight[None, :, None]
        return (jnp.cos(angles) * rows).sum(axis=1), (jnp.sin(angles) * rows).sum(axis=1)

    cosines, sines = sums(x)
    real = sum_over_devices(cosines) / count
    imaginary = sum_over_devices(sines) / count
    gaps = jnp.square(real - jnp.asarray(GAUSSIAN, jnp.float32)[:, None]) + jnp.square(imaginary)
    return count * (jnp.asarray(WEIGHTS, jnp.float32)[:, None] * gaps).sum(axis=0)


def sigreg(
    features: Float[Array, "n D"],
    directions: Float[Array, "D K"],
    weight: Float[Array, " n"] | None = None,
) -> Scalar:
    """Mean of `epps_pulley` over directions; float32.

    It grows with the number of samples, unless they are Gaussian.

    Args:
      features: samples.
      directions: unit vectors, the same on all devices.
      weight: 1 for samples and 0 for padding; None: there is none.
    """
    features = features.astype(jnp.float32)
    if weight is None:
        weight = jnp.ones(len(features))
    projections = jnp.matmul(features, directions, precision="highest")
    return epps_pulley(projections, weight).mean()


def variance_hinge(
    features: Float[Array, "n D"], weight: Float[Array, " n"] | None = None
) -> Scalar:
    """Mean over channels of max(0, 1 - standard deviation over the samples); float32.

    The variance is unbiased (ddof=1), so there must be two samples; 1e-8 is added to it.

    Args:
      features: samples.
      weight: 1 for samples and 0 for padding; None: there is none.

    Source: VICReg, equation 1, with gamma 1.
    """
    features = features.astype(jnp.float32)
    if weight is None:
        weight = jnp.ones(len(features))
    count = sum_over_devices(weight.sum())
    mean = sum_over_devices((weight[:, None] * features).sum(axis=0)) / count
    squares = weight[:, None] * jnp.square(features - mean[None])
    variance = sum_over_devices(squares.sum(axis=0)) / (count - 1)
    return jnp.mean(jax.nn.relu(1 - jnp.sqrt(variance + HINGE_EPSILON)))
