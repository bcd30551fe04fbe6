"""Contrast of the images of a batch as in MoCo v3 (Chen, Xie and He, ICCV 2021; arXiv 2104.02057).

Batch norms and the images to choose from are those of the whole batch on all devices: inside a
`shard_map` over the batch, statistics are averaged and keys are gathered.

Letters: B images on this device, G images of the whole batch, D width, O width of the output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmim_jax.methods.common import losses
from lmim_jax.models.layers import Dense, Dtype
from lmim_jax.models.normalization import l2_normalize

EPSILON = 1e-5  # of batch norms, torch's default


class BatchNormMLP(nn.Module, kw_only=True):
    """Bias-free linear layers with batch norm after each and ReLU between: D -> hidden -> .. -> O.

    The last norm has no scale and no bias. Norms always use the statistics of the batch: no running
    ones are kept, as nothing but the loss applies these layers.

    Attributes:
      depth: number of linear layers.
      hidden: width between them.
      features: O.
      dtype: of the products; norms are float32.

    Source: `_build_mlp` of the released code of MoCo v3.
    """

    depth: int
    hidden: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B O"]:
        """Project every image."""
        for i in range(self.depth - 1):
            x = Dense(self.hidden, self.dtype, name=f"linear{i}", use_bias=False)(x)
            x = nn.relu(BatchNorm(name=f"norm{i}")(x))
        last = f"linear{self.depth - 1}"
        x = Dense(self.features, self.dtype, name=last, use_bias=False)(x)
        return standardize_over_images(x)


class BatchNorm(nn.Module):
    """Batch norm with the statistics of the whole batch, float32; scale and bias are parameters."""

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Normalize every channel."""
        scale = self.param("scale", nn.initializers.ones, x.shape[1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:])
        return standardize_over_images(x) * scale[None] + bias[None]


def standardize_over_images(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Shift and scale every channel to mean 0 and variance 1 over the whole batch, float32."""
    x = x.astype(jnp.float32)
    centered = x - losses.mean_over_devices(x.mean(axis=0, keepdims=True))
    square = jnp.square(centered).mean(axis=0, keepdims=True)
    return centered * jax.lax.rsqrt(losses.mean_over_devices(square) + EPSILON)


def image_logits(
    queries: Float[Array, "B O"], keys: Float[Array, "B O"], tau: float
) -> tuple[Float[Array, "B G"], Int[Array, " B"]]:
    """Compute the cosine of every query with the key of every image, divided by tau.

    Args:
      queries: of the images on this device.
      keys: of the same images.
      tau: temperature.

    Returns:
      (logits, own): own are the columns of each query's own image.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    keys = l2_normalize(keys)
    own = jnp.arange(len(queries))
    if axes:
        keys = jax.lax.all_gather(keys, axes, tiled=True)
        own = own + len(queries) * jax.lax.axis_index(axes)
    # At default precision, float32 products are TF32 on GPUs and one bfloat16 pass on TPUs
    cosines = jnp.einsum("bo,go->bg", l2_normalize(queries), keys, precision="highest")
    return cosines / tau, own


def image_infonce(
    logits: Float[Array, "B G"], own: Int[Array, " B"], tau: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Image discrimination: each query must pick the key of its own image.

    Args:
      logits: as returned by `image_logits`.
      own: as returned by `image_logits`.
      tau: temperature of these logits.

    Returns:
      (loss, accuracy), means over the images on this device. The loss is 2 tau times the
      cross-entropy, and 2 tau ln G by chance; the accuracy is 1 / G by chance.

    Source: `contrastive_loss` of the released code of MoCo v3.
    """
    chosen = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    loss = 2 * tau * jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)
    return loss, jnp.mean(chosen >= logits.max(axis=1))
