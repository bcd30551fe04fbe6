"""Building blocks of Vision Transformers: patches, positions, linear layers, norms.

Letters: B batch, H W image height and width, C channels, h w grid rows and columns,
N = h w patches, p patch size, P = p p C pixel values of a patch, D width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmim_jax.utils.platform import current_platform

Dtype = jnp.dtype


def patchify(
    images: Float[Array, "B H W C"],
    grid: tuple[int, int],
    patch_size: int,
    gap: int = 0,
    offsets: Int[Array, "B h w 2"] | None = None,
) -> Float[Array, "B N P"]:
    """Cut one window of p x p pixels out of every cell of a grid over the images.

    The patch index is row * w + column; values inside a patch are ordered (row, column, channel).

    Args:
      images: [B, h (p + gap), w (p + gap), C].
      grid: (h, w), rows and columns of cells.
      patch_size: p, side of a window in pixels.
      gap: a cell is p + gap pixels wide, so neighboring windows are 1 .. 2 gap - 1 pixels apart.
      offsets: (row, column) offset of the window in its cell, 0 <= offset <= gap; None where gap is
        0.

    Raises:
      ValueError: the image does not have grid x (patch_size + gap) pixels, or there is a gap and no
        offsets.

    Source: Latent MIM, section 3.3 (non-contiguous grid); official `Patchify`.
    """
    h, w = grid
    cell = patch_size + gap
    batch, height, width, channels = images.shape
    if (height, width) != (h * cell, w * cell):
        raise ValueError(
            f"an image of {height} x {width} pixels does not fit a grid of {h} x {w} cells of "
            f"{cell} (patch_size {patch_size} + gap {gap}): it needs {h * cell} x {w * cell} pixels"
        )
    x = images.reshape(batch, h, cell, w, cell, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, w, cell, cell, C]
    if gap:
        if offsets is None:
            raise ValueError(f"windows in cells with a gap of {gap} need offsets")
        x = _window(x, offsets[..., 0], patch_size, axis=3)
        x = _window(x, offsets[..., 1], patch_size, axis=4)
    return x.reshape(batch, h * w, patch_size * patch_size * channels)


def _window(
    cells: Float[Array, "B h w _ _ C"], offsets: Int[Array, "B h w"], size: int, axis: int
) -> Float[Array, "B h w _ _ C"]:
    """Cut `size` rows (axis 3) or columns (axis 4) out of every cell, from its own offset on.

    On TPUs, where a gather is a loop over small slices, it is a choice among all possible windows.
    """
    offsets = jnp.expand_dims(offsets, (3, 4, 5))
    if current_platform() != "tpu":
        index = jnp.expand_dims(jnp.arange(size), [i for i in range(6) if i != axis])
        return jnp.take_along_axis(cells, offsets + index, axis=axis)
    window = jax.lax.slice_in_dim(cells, 0, size, axis=axis)
    for start in range(1, cells.shape[axis] - size + 1):
        other = jax.lax.slice_in_dim(cells, start, start + size, axis=axis)
        window = jnp.where(offsets == start, other, window)
    return window


def unpatchify(
    patches: Float[Array, "B N P"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "B H W C"]:
    """Put patches back together into images: the inverse of `patchify` without a gap.

    Args:
      patches: [B, h w, P].
      grid: (h, w), rows and columns of patches.
      patch_size: p, side of a patch in pixels.
    """
    h, w = grid
    batch, _, values = patches.shape
    channels = values // (patch_size * patch_size)
    x = patches.reshape(batch, h, w, patch_size, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, h * patch_size, w * patch_size, -1)


def replace_patches(
    images: Float[Array, "B H W C"],
    ids: Int[Array, "B M"],
    patches: Float[Array, "B M P"],
    grid: tuple[int, int],
    patch_size: int,
) -> Float[Array, "B H W C"]:
    """Replace some patches of every image.

    Args:
      images: [B, h p, w p, C].
      ids: indices of the patches to replace.
      patches: what to put there.
      grid: (h, w), rows and columns of patches.
      patch_size: p, side of a patch in pixels.
    """
    original = jnp.asarray(patchify(images, grid, patch_size))
    rows = jnp.arange(len(ids))[:, None]
    changed = original.at[rows, ids].set(patches.astype(original.dtype))
    return unpatchify(changed, grid, patch_size)


def sincos_positions(
    grid: tuple[int, int],
    width: int,
    trained_grid: tuple[int, int] | None = None,
    integer: bool = False,
    row_first: bool = False,
) -> Float[np.ndarray, "N D"]:
    """Fixed sin-cos position embeddings, float32.

    The first half of a vector encodes the column, the second the row; see `row_first`.

    Along an axis of n cells the positions are linspace(0, n_trained, n): n / (n - 1) apart at the
    size of training, and the same range at any other size.

    Args:
      grid: (h, w) of the images.
      width: D, divisible by 4.
      trained_grid: (h, w) of the images the model was trained on; None: `grid`.
      integer: linspace(0, n_trained - 1, n) instead, which is 0, 1, 2, ... at the size of training
        (MAE, I-JEPA, BootMAE).
      row_first: the first half encodes the row, the second the column (BootMAE).

    Raises:
      ValueError: the width is not divisible by 4.

    Source: official Latent MIM `PositionalEmbedding` (spacing measured: 14/13 for 14 cells); MAE
      `pos_embed.py`.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {width}")
    h, w = grid
    trained_h, trained_w = trained_grid or grid
    rows = _sincos(h, trained_h - integer, width // 2)
    columns = _sincos(w, trained_w - integer, width // 2)
    halves = [np.tile(columns, (h, 1)), np.repeat(rows, w, axis=0)]
    if row_first:
        halves.reverse()
    return np.concatenate(halves, axis=1).astype(np.float32)


def _sincos(count: int, end: int, width: int) -> Float[np.ndarray, "count width"]:
    """Encode `count` equally spaced positions from 0 to `end`: sines, then cosines."""
    frequencies = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    angles = np.linspace(0, 1, count)[:, None] * end * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def resample_positions(
    positions: Float[Array, "1 N D"], trained_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "1 M D"]:
    """Interpolate learned position embeddings (bicubic) from one grid to another.

    Args:
      positions: embeddings of the h w cells of `trained_grid`.
      trained_grid: (h, w) of the embeddings.
      grid: (h, w) of the result.
    """
    if grid == trained_grid:
        return positions
    width = positions.shape[-1]
    trained_h, trained_w = trained_grid
    h, w = grid
    table = positions.reshape(trained_h, trained_w, width)
    table = jax.image.resize(table, (h, w, width), "bicubic", antialias=False)
    return table.reshape(1, -1, width)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, x Phi(x), as torch computes it (Flax's default is the tanh approximation)."""
    if current_platform() == "cpu":
        return nn.gelu(x, approximate=False)
    return gelu_float32(x)


@jax.custom_vjp
def gelu_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU in float32, with one kernel each for itself and its gradient on accelerators.

    Only x, in its own dtype, is kept for the backward pass: autodiff of flax's form keeps a float32
    array, and XLA makes two kernels of it on GPUs.
    """
    return (x * _normal_cdf(x)).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu_float32(x), x


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * y * y) * np.float32((2 * np.pi) ** -0.5)
    return (((_normal_cdf(x) + y * density) * dy).astype(x.dtype),)


def _normal_cdf(x: Array) -> Array:
    """The standard normal distribution function, float32."""
    return 0.5 * (1 + jax.lax.erf(x.astype(jnp.float32) * np.float32(2**-0.5)))


gelu_float32.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def matmul(x: Float[Array, "R I"], kernel: Float[Array, "I O"]) -> Float[Array, "R O"]:
    """Multiply x by a kernel whose gradient is written as x^T dy.

    Autodiff writes it as (dy^T x)^T. That makes XLA's CPU backend transpose dy by recomputing it,
    and with it the residuals of all later layers: a fifth of the step.
    """
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return _contract(dy, kernel, axis=1), _contract(x, dy, axis=0)


def _contract(x: Array, y: Array, axis: int) -> Array:
    """Multiply two matrices over the same axis of both."""
    return jax.lax.dot_general(x, y, (((axis,), (axis,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """Linear layer over all tokens of a batch as one matrix product, in `dtype`.

    Parameters are float32: kernel [in, out], xavier-uniform, and bias, zero, as in MAE and Latent
    MIM.

    Attributes:
      features: width of the output.
      dtype: of the computation and the output.
      use_bias: a tuple says which of as many equal parts of the output have a bias.
    """

    features: int
    dtype: Dtype
    use_bias: bool | tuple[bool, ...] = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Apply the layer to the last axis."""
        kernel, bias = self._parameters(x.shape[-1])
        return _linear(x, kernel, bias, self.dtype)

    @nn.compact
    def by_head(
        self, x: Float[Array, "B T I"], parts: int, heads: int
    ) -> list[Float[Array, "B T A K"]]:
        """Apply the layer; the output in equal parts, such as query, key and value, by heads.

        On a GPU every part is a product of its own: dividing the output of one product would copy
        it. Elsewhere the one product is faster.
        """
        kernel, bias = self._parameters(x.shape[-1])
        if current_platform() != "gpu":
            y = _linear(x, kernel, bias, self.dtype)
            return jnp.split(y.reshape(x.shape[:-1] + (parts * heads, -1)), parts, axis=-2)
        kernels = jnp.split(kernel, parts, axis=1)
        biases = [None] * parts if bias is None else jnp.split(bias, parts)
        outputs = []
        for part_kernel, part_bias in zip(kernels, biases, strict=True):
            y = _linear(x, part_kernel, part_bias, self.dtype)
            outputs.append(y.reshape(x.shape[:-1] + (heads, -1)))
        return outputs

    def _parameters(self, width: int) -> tuple[Float[Array, "I O"], Float[Array, " O"] | None]:
        """Kernel and bias of every output; a bias is zero in the parts that have none."""
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (width, self.features))
        if not np.any(self.use_bias):
            return kernel, None
        part_size = self.features // np.size(self.use_bias)
        has_bias = np.repeat(self.use_bias, part_size)
        bias = self.param("bias", nn.initializers.zeros, (int(has_bias.sum()),))
        if not has_bias.all():
            bias = jnp.zeros(self.features).at[np.flatnonzero(has_bias)].set(bias)
        return kernel, bias


def _linear(x: Array, kernel: Array, bias: Array | None, dtype: Dtype) -> Array:
    """Multiply the last axis of x by a kernel and add a bias, in `dtype`."""
    y = matmul(x.reshape(-1, x.shape[-1]).astype(dtype), kernel.astype(dtype))
    if bias is not None:
        y = y + bias.astype(dtype)[None]
    return y.reshape(x.shape[:-1] + y.shape[-1:])


class LayerNorm(nn.Module):
    """LayerNorm with float32 statistics, for accelerators: flax's in every value but for rounding.

    The gradients of scale and bias are sums over all tokens, for which autodiff writes float32
    arrays of the size of x. Here they are computed from x and the statistics of its tokens.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output.
    """

    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalize every token."""
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        return normalize(x, scale, bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
    dtype: Dtype,
) -> Float[Array, "... D"]:
    """Shift and scale every token to mean 0 and variance 1, then by the parameters."""
    return _normalize_forward(x, scale, bias, epsilon, dtype)[0]


def _normalize_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype
) -> tuple[Array, tuple[Array, ...]]:
    mean = x.astype(jnp.float32).mean(axis=-1, keepdims=True)
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    y = (x - mean) * (jax.lax.rsqrt(variance + epsilon) * _of_rank(x, scale)) + _of_rank(x, bias)
    return y.astype(dtype), (x, scale)


def _of_rank(x: Array, channels: Array) -> Array:
    """Channels [D] as [..., D], of as many axes as x has."""
    return channels.reshape((1,) * (x.ndim - 1) + channels.shape)


def _normalize_backward(
    epsilon: float, dtype: Dtype, residuals: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    """Gradients in two passes over x and dy: sums over channels, then everything else.

    The variance is the mean square minus the squared mean. What float32 loses by that is small
    beside the rounding of x to bfloat16.
    """
    x, scale = residuals
    dtype = x.dtype
    # Behind a barrier, so that XLA does not take the mean out of the kernel of the forward pass
    x = jax.lax.optimization_barrier(x).astype(jnp.float32)
    dy = dy.astype(jnp.float32)
    scaled = dy * _of_rank(x, scale)
    sums = (x, x * x, scaled, scaled * x)
    means = []
    for values in sums:
        means.append(values.mean(axis=-1, keepdims=True))
    mean, square, gradient, product = jax.lax.optimization_barrier(tuple(means))
    variance = jnp.maximum(square - mean * mean, 0)  # rounding may make it negative
    factor = jax.lax.rsqrt(variance + epsilon)
    normalized = (x - mean) * factor
    common = gradient + normalized * (factor * (product - mean * gradient))
    tokens = tuple(range(x.ndim - 1))
    return (
        ((scaled - common) * factor).astype(dtype),
        (dy * normalized).sum(axis=tokens),
        dy.sum(axis=tokens),
    )


normalize.defvjp(_normalize_forward, _normalize_backward)


def layer_norm(epsilon: float, dtype: Dtype, name: str) -> nn.Module:
    """A LayerNorm with float32 statistics and the two-pass variance, as in torch.

    Args:
      epsilon: added to the variance.
      dtype: of the output.
      name: of the module, and so of its parameters.
    """
    if current_platform() == "cpu":
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
    return LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


def norm(kind: str, epsilon: float, dtype: Dtype, name: str, scaled: bool = True) -> nn.Module:
    """The norm of a network.

    Args:
      kind: "layer": see `layer_norm`; "rms": division by the root of the mean square, in float32.
      epsilon: added to the variance or the mean square.
      dtype: of the output.
      name: of the module.
      scaled: "rms": whether channels are scaled by a parameter. Layer norms have scale and bias.
    """
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, use_scale=scaled, name=name)
    return layer_norm(epsilon, dtype, name)
