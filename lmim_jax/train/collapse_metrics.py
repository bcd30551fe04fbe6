"""Gauges of collapse, from features of a few fixed images, and the warning they give.

Letters: B images, N patches, D width.
"""

import logging

import jax
import jax.numpy as jnp

from lmim_jax.distributed import sharding
from lmim_jax.models import normalization

log = logging.getLogger(__name__)

COLLAPSED = 0.95  # collapse index above which images are as good as indistinguishable


def collapse_index(x, weight):
    """Mean cosine between rows of different images, [B, D] -> scalar. 1: all images are mapped to one direction.

    Args:
      weight: float32 [B], 1 for images and 0 for padding (here and below).

    Source: Latent MIM, table 1 (on mean-pooled latents of the target branch; 1.00 for naive joint training, 0.50 with
    an EMA target, on ImageNet-100).
    """
    count = weight.sum()
    total = (normalization.l2_normalize(x) * weight[:, None]).sum(axis=0)
    return (jnp.sum(total * total) - count) / (count * (count - 1))


def effective_rank(x, weight):
    """exp of the entropy of the singular values of [B, D]: how many dimensions are used, 1 .. min(B, D).

    Source: RankMe (Garrido et al., ICML 2023), equation 1.
    """
    values = jnp.linalg.svd(x.astype(jnp.float32) * weight[:, None], compute_uv=False)
    share = values / jnp.maximum(values.sum(), 1e-12) + 1e-7
    return jnp.exp(-jnp.sum(share * jnp.log(share)))


def feature_std(x, weight):
    """Standard deviation over images of unit-length features, mean over channels, times sqrt(D): 0 .. 1.

    0: all images alike; 1: spread over all directions. Source: SimSiam (Chen and He, CVPR 2021), figure 2.
    """
    x, count = normalization.l2_normalize(x), weight.sum()
    mean = (x * weight[:, None]).sum(axis=0) / count
    variance = (jnp.square(x - mean[None]) * weight[:, None]).sum(axis=0) / count
    return jnp.sqrt(variance).mean() * x.shape[-1] ** 0.5


def make(method, data, count):
    """Build `gauges(params, target) -> {name: float32 scalar on the device}`, over `count` fixed held-out images.

    collapse_index: of the target branch's projected latents, where the method has any (else of the features), mean over
    all patches. effective_rank, feature_std: of the online encoder's patch features before the final norm, their mean.
    """
    batch, _ = data.sample(data.held_out, count)
    weight = (batch["index"] >= 0).astype(jnp.float32)

    def gauges(params, target, images, weight):
        of_target = method.features({**params, **target}, images)
        latents = of_target.get("latents", of_target["patches"]).astype(jnp.float32).mean(axis=1)
        features = (
            method.features(params, images)["patches_prenorm"].astype(jnp.float32).mean(axis=1)
        )
        return {
            "collapse_index": collapse_index(latents, weight),
            "effective_rank": effective_rank(features, weight),
            "feature_std": feature_std(features, weight),
        }

    jitted = jax.jit(gauges, out_shardings=sharding.replicated(data.mesh))
    return lambda params, target: jitted(params, target, batch["images"], weight)


class Alarm:
    """Warns, once, when the gauges say that the representation collapses."""

    def __init__(self):
        self._given, self._before = False, 0.0

    def see(self, step, values):
        """Take note of a line of metrics: a collapse index above COLLAPSED twice, and not falling, is the sign."""
        if "collapse_index" not in values:
            return
        before, self._before = self._before, values["collapse_index"]
        if self._given or min(before, self._before) <= COLLAPSED or self._before < before - 0.01:
            return
        self._given = True
        log.warning(
            "step %d: COLLAPSING. Different images get nearly the same latents: collapse index %.3f, effective rank "
            "%.1f, feature std %.2f. A falling loss means nothing now. To try, in this order (the first three are "
            "knobs of latent_mim): config.method.target=ema, config.method.loss=patch_infonce, "
            "config.method.similarity_weight=0.1, a lower config.optimizer.base_lr",
            *(step, self._before, values["effective_rank"], values["feature_std"]),
        )
