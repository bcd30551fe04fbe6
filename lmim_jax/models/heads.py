"""Heads: what is computed from each token alone.

Letters: B batch, T tokens, D width, K clusters, O width of the output.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmim_jax.models.layers import Dense, Dtype, gelu, matmul
from lmim_jax.models.normalization import l2_normalize


class PatchMLP(nn.Module, kw_only=True):
    """Linear layers with GELU between: D -> hidden -> .. -> O.

    Attributes:
      depth: number of linear layers; 1 is a linear head, SimMIM's choice for pixels.
      hidden: width between them.
      features: O.
      dtype: of the computation.
    """

    depth: int
    hidden: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        """Apply the layers to every token."""
        for i in range(self.depth - 1):
            x = gelu(Dense(self.hidden, self.dtype, name=f"linear{i}")(x))
        return Dense(self.features, self.dtype, name=f"linear{self.depth - 1}")(x)


class ClusterLayer(nn.Module):
    """The affinities of tokens, scaled to length 1, and clusters: kernel from N(0, 1), and bias.

    Attributes:
      clusters: K.
      dtype: of the computation.
    """

    clusters: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K"]:
        """Apply the layer to every token."""
        shape = (x.shape[-1], self.clusters)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.clusters,))
        return _project(x, kernel, self.dtype) + bias.astype(self.dtype)[None, None]


class WeightNormedHead(nn.Module):
    """Cosines of tokens and K directions, each times a gain; no bias.

    Attributes:
      clusters: K.
      dtype: of the computation.

    Source: CAPI's released `L2NormLinear` and `weight_norm`.
    """

    clusters: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K"]:
        """Apply the head to every token."""
        shape = (x.shape[-1], self.clusters)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        gain = self.param("gain", nn.initializers.ones, (self.clusters,))
        lengths = jnp.linalg.norm(kernel, axis=0, keepdims=True)
        return _project(x, kernel / (lengths + 1e-8) * gain[None], self.dtype)


def _project(
    x: Float[Array, "B T D"], kernel: Float[Array, "D K"], dtype: Dtype
) -> Float[Array, "B T K"]:
    """Scale tokens to length 1 and multiply them by a kernel, in `dtype`."""
    rows = l2_normalize(x).astype(dtype).reshape(-1, x.shape[-1])
    return matmul(rows, kernel.astype(dtype)).reshape(*x.shape[:-1], -1)
