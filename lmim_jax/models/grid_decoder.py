"""A decoder of grouped convolutions over the grid of patches.

Letters: B batch, N patches, h w rows and columns of the grid, D encoder width, d decoder width,
G groups, I = D / G channels of a group, k side of a kernel, O width of the prediction.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmim_jax.models.layers import Dense, Dtype, gelu
from lmim_jax.models.normalization import standardize_tokens
from lmim_jax.utils.platform import current_platform

NORM_EPS = 1e-5


class GridDecoder(nn.Module, kw_only=True):
    """Convolutions, each with a norm, GELU and a residual, and a linear layer.

    The norm is over the channels of a position and has no parameters. The residual is left out
    where the width changes.

    Attributes:
      grid: (h, w).
      width: d.
      depth: number of convolutions.
      kernel: k.
      groups: G, of channels.
      out_width: O.
      dtype: of the computation.

    Source: data2vec 2.0's released `Decoder2d`.
    """

    grid: tuple[int, int]
    width: int
    depth: int
    kernel: int
    groups: int
    out_width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N O"]:
        """Predict something of every patch.

        Args:
          x: all patches of the grid, in raster order.
        """
        x = x.astype(self.dtype).reshape(len(x), *self.grid, -1)
        for i in range(self.depth):
            y = GroupedConv(self.width, self.kernel, self.groups, self.dtype, name=f"conv{i}")(x)
            y = gelu(standardize_tokens(y, NORM_EPS).astype(self.dtype))
            if x.shape == y.shape:
                y = x + y
            x = y
        x = x.reshape(len(x), -1, x.shape[-1])
        return Dense(self.out_width, self.dtype, name="head")(x)


class GroupedConv(nn.Module):
    """Convolution over the grid with zeros beyond its edges, in groups of channels, with bias.

    Parameters start as those of torch's nn.Conv2d: kernel [k, k, I, d], bias [d].

    Attributes:
      features: d.
      kernel: k.
      groups: G.
      dtype: of the computation.
    """

    features: int
    kernel: int
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w d"]:
        """Apply the layer."""
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        bound = (self.kernel**2 * shape[2]) ** -0.5

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel = self.param("kernel", uniform, shape).astype(self.dtype)
        bias = self.param("bias", uniform, (self.features,)).astype(self.dtype)
        if current_platform() == "cpu":
            y = _sum_of_products(x, kernel, self.groups)
        else:
            y = _convolution(x, kernel, self.groups)
        return y + bias[None, None, None]


def _convolution(
    x: Float[Array, "B h w D"], kernel: Float[Array, "k k I d"], groups: int
) -> Float[Array, "B h w d"]:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _sum_of_products(
    x: Float[Array, "B h w D"], kernel: Float[Array, "k k I d"], groups: int
) -> Float[Array, "B h w d"]:
    """The same as matrix products, one for each element of the kernel: 20 times as fast on CPUs.

    XLA's CPU backend has no fast convolution in groups.
    """
    batch, h, w, _ = x.shape
    k = len(kernel)
    before = (k - 1) // 2
    after = k - 1 - before
    x = x.reshape(batch, h, w, groups, -1).transpose(3, 0, 1, 2, 4)
    x = jnp.pad(x, ((0, 0), (0, 0), (before, after), (before, after), (0, 0)))
    kernel = kernel.reshape(k, k, kernel.shape[2], groups, -1).transpose(0, 1, 3, 2, 4)
    total = jnp.float32(0)
    for row in range(k):
        for column in range(k):
            window = x[:, :, row : row + h, column : column + w]
            window = window.reshape(groups, batch * h * w, -1)
            total = total + jnp.matmul(
                window, kernel[row, column], preferred_element_type=jnp.float32
            )
    y = total.astype(x.dtype).reshape(groups, batch, h, w, -1)
    return y.transpose(1, 2, 3, 0, 4).reshape(batch, h, w, -1)
