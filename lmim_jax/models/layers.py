"""What every Vision Transformer here starts from: patches, positions, linear layers, norms.

Letters: B batch, H W image height and width, C channels, h w grid rows and columns, N = h w patches,
p patch size, P = p p C pixels of a patch, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = jnp.dtype


def patchify(images, grid, patch_size, gap=0, offsets=None):
    """Cut images [B, h (p + gap), w (p + gap), C] into one window of p x p pixels per cell: [B, N, P].

    Patch id is row * w + column; pixel order inside a patch is (row, column, channel).

    Args:
      images: [B, H, W, C].
      grid: (h, w), rows and columns of cells.
      patch_size: p, side of a window in pixels.
      gap: a cell is p + gap pixels wide, so windows of neighbours lie 1 .. 2 gap - 1 pixels apart.
      offsets: [B, h, w, 2] int, (row, column) offset of the window in its cell, 0 <= offset <= gap.
        None where gap is 0.

    Raises:
      ValueError: the image is not grid x (patch_size + gap) pixels.

    Source: Latent MIM, section 3.3 (non-contiguous grid); official `Patchify`.
    """
    (h, w), p, cell = grid, patch_size, patch_size + gap
    batch, height, width, channels = images.shape
    if (height, width) != (h * cell, w * cell):
        raise ValueError(
            f"image of {height} x {width} pixels does not fit a grid of {h} x {w} cells of {cell} "
            f"(patch_size {p} + gap {gap}); give it {h * cell} x {w * cell} pixels"
        )
    x = images.reshape(batch, h, cell, w, cell, channels).transpose(
        0, 1, 3, 2, 4, 5
    )  # [B, h, w, cell, cell, C]
    if gap:
        rows = offsets[..., 0, None] + jnp.arange(p).reshape(1, 1, 1, p)
        columns = offsets[..., 1, None] + jnp.arange(p).reshape(1, 1, 1, p)
        x = jnp.take_along_axis(x, rows[..., None, None], axis=3)
        x = jnp.take_along_axis(x, columns[..., None, :, None], axis=4)
    return x.reshape(batch, h * w, p * p * channels)


def unpatchify(patches, grid, patch_size):
    """Patches [B, N, P] back to images [B, h p, w p, C]; the inverse of `patchify` without gap."""
    (h, w), p = grid, patch_size
    batch, _, pixels = patches.shape
    x = patches.reshape(batch, h, w, p, p, pixels // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, h * p, w * p, -1)


def replace_patches(images, ids, patches, grid, patch_size):
    """Images [B, H, W, C] with the patches `ids` [B, M] replaced by `patches` [B, M, P]."""
    known = jnp.asarray(patchify(images, grid, patch_size))
    changed = known.at[jnp.arange(len(ids))[:, None], ids].set(patches.astype(known.dtype))
    return unpatchify(changed, grid, patch_size)


def sincos_positions(grid, width, trained_grid=None, integer=False):
    """Fixed sin-cos position vectors, float32 [N, D]: the first half encodes the column, the second the row.

    Along an axis of n cells the positions are linspace(0, n_trained, n): n / (n - 1) apart at the training size,
    and the same range at any other size.

    Args:
      grid: (h, w) of this image.
      width: D, divisible by 4.
      trained_grid: (h, w) the model was trained with; None: this grid.
      integer: linspace(0, n_trained - 1, n) instead, 0, 1, 2, ... at the training size (MAE, I-JEPA).

    Source: official Latent MIM `PositionalEmbedding` (spacing measured: 14/13 for 14 cells); MAE `pos_embed.py`.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {width}")
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))

    def encode(n, n_trained):
        angles = np.linspace(0, 1, n)[:, None] * (n_trained - integer) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [n, D/2]

    (h, w), (trained_h, trained_w) = grid, trained_grid or grid
    rows, columns = encode(h, trained_h), encode(w, trained_w)
    table = np.concatenate([np.tile(columns, (h, 1)), np.repeat(rows, w, axis=0)], axis=1)
    return table.astype(np.float32)


def resample_positions(positions, trained_grid, grid):
    """Learned position vectors [1, N, D] of one grid, interpolated (bicubic) to another: [1, h w, D]."""
    width = positions.shape[-1]
    table = jax.image.resize(
        positions.reshape(*trained_grid, width), (*grid, width), "bicubic", antialias=False
    )
    return positions if grid == trained_grid else table.reshape(1, -1, width)


def gelu(x):
    """Exact GELU, x Phi(x), as torch computes it (Flax's default is the tanh approximation)."""
    return nn.gelu(x, approximate=False)


@jax.custom_vjp
def matmul(x, kernel):
    """x [R, in] @ kernel [in, out], with the kernel's gradient written as x^T dy.

    Autodiff writes it as (dy^T x)^T, which makes XLA's CPU backend transpose dy by recomputing it, and with it the
    residual chain of all layers behind: a fifth of the step.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, dy):
    x, kernel = residuals
    product = lambda a, b, axis: jax.lax.dot_general(a, b, (((axis,), (axis,)), ((), ())))
    return product(dy, kernel, 1), product(x, dy, 0)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """Linear layer over all tokens of a batch as one matrix product: kernel [in, out] xavier-uniform, bias zero.

    The init is that of MAE and Latent MIM. Parameters are float32, the product is in `dtype`.
    use_bias: a tuple says which of as many equal parts of the output have a bias.
    """

    features: int
    dtype: Dtype
    use_bias: bool | tuple[bool, ...] = True

    @nn.compact
    def __call__(self, x):
        """[..., in] -> [..., out]."""
        kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        )
        y = matmul(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel.astype(self.dtype))
        if np.any(self.use_bias):
            on = np.repeat(self.use_bias, self.features // np.size(self.use_bias))
            bias = self.param("bias", nn.initializers.zeros, (int(on.sum()),))
            if not on.all():
                bias = jnp.zeros(self.features).at[np.flatnonzero(on)].set(bias)
            y = y + bias.astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


def layer_norm(epsilon, dtype, name):
    """LayerNorm with float32 statistics by the two-pass variance, as torch computes them."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
