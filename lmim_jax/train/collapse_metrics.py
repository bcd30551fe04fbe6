"""Collapse metrics: how much of the feature space a few fixed images occupy, and a warning.

Letters: B images, N patches, D width.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.methods.common import sigreg
from lmim_jax.models import normalization

log = logging.getLogger(__name__)

DIRECTIONS = 256  # of `sigreg_gauge`, always the same
COLLAPSED = 0.95  # collapse index above which images are practically indistinguishable


def collapse_index(x: Float[Array, "B D"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """Mean cosine similarity between rows of different images; 1 if all have the same direction.

    Args:
      x: one feature vector per image.
      weight: 1 for images and 0 for padding (also below).

    Source: Latent MIM, table 1 (on mean-pooled latents of the target branch; 1.00 for naive joint
    training, 0.50 with an EMA target, on ImageNet-100).
    """
    count = weight.sum()
    total = (normalization.l2_normalize(x) * weight[:, None]).sum(axis=0)
    return (jnp.sum(total * total) - count) / (count * (count - 1))


def effective_rank(x: Float[Array, "B D"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """exp of the entropy of the normalized singular values: between 1 and min(B, D).

    Source: RankMe (Garrido et al., ICML 2023), equation 1.
    """
    values = jnp.linalg.svd(x.astype(jnp.float32) * weight[:, None], compute_uv=False)
    share = values / jnp.maximum(values.sum(), 1e-12) + 1e-7
    return jnp.exp(-jnp.sum(share * jnp.log(share)))


def feature_std(x: Float[Array, "B D"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """Standard deviation over images of unit-length features, mean over channels, times sqrt(D).

    Between 0 (all images have the same feature) and 1 (features point in all directions).
    Source: SimSiam (Chen and He, CVPR 2021), figure 2.
    """
    x = normalization.l2_normalize(x)
    count = weight.sum()
    mean = (x * weight[:, None]).sum(axis=0) / count
    variance = (jnp.square(x - mean[None]) * weight[:, None]).sum(axis=0) / count
    return jnp.sqrt(variance).mean() * x.shape[-1] ** 0.5


def sigreg_gauge(x: Float[Array, "B D"], weight: Float[Array, " B"]) -> Float[Array, ""]:
    """How far features are from a Gaussian that is the same in all directions.

    (T - 1.0525) / B, where T is SIGReg of features that are shifted to mean 0 and divided by one
    number, the root mean square of their standard deviations. About 0 for a Gaussian, and larger
    where they vary in a few directions only; 0.40 - 1.05 / B where all are the same.

    Source: see methods/common/sigreg.py.
    """
    count = weight.sum()
    x = x.astype(jnp.float32)
    mean = (x * weight[:, None]).sum(axis=0) / count
    centered = (x - mean[None]) * weight[:, None]
    scale = jnp.sqrt(jnp.square(centered).sum() / (count * x.shape[1]))
    directions = sigreg.random_directions(jax.random.key(0), x.shape[1], DIRECTIONS)
    statistic = sigreg.sigreg(centered / jnp.maximum(scale, 1e-12), directions, weight)
    return (statistic - sigreg.EXPECTED) / count


def make_collapse_metrics(method: Any, data: EvaluationData, count: int) -> "CollapseMetrics":
    """Build a function that computes the collapse metrics on `count` fixed held-out images.

    collapse_index is that of the target branch's projected latents (of its features, if the method
    has no latents), averaged over all patches. effective_rank, feature_std and sigreg_gauge are
    those of the online encoder's patch features before the final norm, averaged over patches.

    Returns:
      (params, target) -> {name: float32 scalar on the device}; {} with fewer than two images, which
      have nothing to be compared with.
    """
    batch, _ = data.sample(data.held_out, max(count, 1))
    weight = (batch["index"] >= 0).astype(jnp.float32)
    is_comparable = bool(weight.sum() > 1)
    if not is_comparable:
        log.info("collapse is not measured: it needs two %s images", data.held_out)

    def compute(
        params: Any, target: Any, images: Float[Array, "B H W C"], weight: Float[Array, " B"]
    ) -> dict[str, Float[Array, ""]]:
        if not is_comparable:
            return {}
        target_features = method.features({**params, **target}, images)
        tokens = target_features.get("latents", target_features["patches"])
        latents = tokens.astype(jnp.float32).mean(axis=1)
        online_tokens = method.features(params, images)["patches_prenorm"]
        features = online_tokens.astype(jnp.float32).mean(axis=1)
        return {
            "collapse_index": collapse_index(latents, weight),
            "effective_rank": effective_rank(features, weight),
            "feature_std": feature_std(features, weight),
            "sigreg_gauge": sigreg_gauge(features, weight),
        }

    jitted = jax.jit(compute, out_shardings=sharding.replicated(data.mesh))

    return CollapseMetrics(jitted, batch["images"], weight)


class CollapseMetrics:
    """(params, target) -> {name: float32 scalar on the device}, for fixed images."""

    def __init__(
        self,
        jitted: Callable[..., dict[str, Float[Array, ""]]],
        images: Float[Array, "B H W C"],
        weight: Float[Array, " B"],
    ) -> None:
        """Store the jitted function and its last arguments."""
        self._function: Any = jitted
        self._images = images
        self._weight = weight
        self.names: set[str] = set()  # of the metrics, once they are compiled

    def compile(self, params: Any, target: Any) -> None:
        """Compile the function ahead of its first use, for arguments like these."""
        lowered = self._function.lower(params, target, self._images, self._weight)
        self.names = set(lowered.out_info)
        self._function = lowered.compile()

    def __call__(self, params: Any, target: Any) -> dict[str, Float[Array, ""]]:
        """Compute the metrics."""
        return self._function(params, target, self._images, self._weight)


class CollapseMonitor:
    """Logs one warning when the collapse metrics show that the representation collapses."""

    def __init__(self, method: ConfigDict) -> None:
        """Set up the warning.

        Args:
          method: `config.method`, for the options that may help.
        """
        self._remedies = remedies(method)
        self._warned = False
        self._previous = 0.0

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Look at a line of metrics, and warn about a collapse.

        The sign is a collapse index above COLLAPSED in two lines in a row that is not falling.
        """
        if "collapse_index" not in values:
            return
        previous = self._previous
        current = values["collapse_index"]
        self._previous = current
        is_falling = current < previous - 0.01
        if self._warned or min(previous, current) <= COLLAPSED or is_falling:
            return
        self._warned = True
        log.warning(
            "step %d: COLLAPSE. Different images have nearly the same latents: collapse index "
            "%.3f, effective rank %.1f, feature std %.2f. The loss may fall all the same. Try, in "
            "this order: %s",
            step,
            current,
            values["effective_rank"],
            values["feature_std"],
            ", ".join(self._remedies),
        )


def remedies(method: ConfigDict) -> list[str]:
    """What may help against a collapse and is not set yet, the most promising first.

    Args:
      method: `config.method`; options that it does not have are left out.
    """
    found = []
    if method.get("target") in ("joint", "stop_gradient"):
        found.append("config.method.target=ema")
    if "similarity_weight" in method:  # of Latent MIM
        if method.loss != "patch_infonce":
            found.append("config.method.loss=patch_infonce")
        if method.similarity_weight < 0.1:
            found.append("config.method.similarity_weight=0.1")
        elif method.similarity_start > 0.5 or method.similarity_end > 0:
            found.append("config.method.similarity_start=0.5 with similarity_end=0.0")
    return [*found, "a lower config.optimizer.base_lr"]
