"""Rotary position embeddings in two dimensions, and the coordinates that they encode.

A coordinate is (row, column) in 0 .. 1, end points included: an image always spans the unit square,
whatever its size. Queries and keys are turned by angles in proportion to it, so that their products
depend on where two tokens are relative to each other.

Letters: B batch, T tokens, N patches, R registers, A attention heads, K width of a head.
"""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# How many parts of a head are turned by themselves. "axial": the halves, one by the row and one by
# the column; products depend on differences of coordinates alone. "capi": the whole head, whose
# halves have angles of their own, as in the released code of CAPI; this is not a rotation, but the
# published weights need it.
PARTS = {"axial": 2, "capi": 1}


class Rope(flax.struct.PyTreeNode):
    """What tokens are turned by.

    Attributes:
      cos: of the angle of every channel.
      sin: of the angle of every channel.
      parts: see PARTS.
    """

    cos: Float[Array, "#B T 1 K"]
    sin: Float[Array, "#B T 1 K"]
    parts: int = flax.struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "B T A K"]) -> Float[Array, "B T A K"]:
        """Turn queries or keys, computed in float32: x cos + (-second half, first half) sin."""
        parts = x.astype(jnp.float32).reshape(*x.shape[:-1], self.parts, 2, -1)
        first, second = jnp.moveaxis(parts, -2, 0)
        swapped = jnp.stack([-second, first], axis=-2).reshape(x.shape)
        return (x * self.cos + swapped * self.sin).astype(x.dtype)


def make_rope(
    coordinates: Float[Array, "#B T 2"],
    head_width: int,
    kind: str,
    frequencies: tuple[float, float],
) -> Rope:
    """Compute what tokens at some coordinates are turned by.

    Args:
      coordinates: of the tokens, (row, column).
      head_width: K, divisible by 4. Angles of the first half of the channels follow the row, those
        of the second half the column; each half is two equal parts.
      kind: a key of PARTS.
      frequencies: the highest and the lowest, in turns over the unit square; those between are in
        geometric progression.
    """
    per_channel = angular_frequencies(head_width, frequencies)
    angles = jnp.matmul(coordinates, per_channel, precision="highest")[:, :, None]
    return Rope(jnp.cos(angles), jnp.sin(angles), PARTS[kind])


def angular_frequencies(
    head_width: int, frequencies: tuple[float, float]
) -> Float[np.ndarray, "2 K"]:
    """Angles per unit of the row and of the column, float32; arguments as in `make_rope`."""
    highest, lowest = frequencies
    quarter = highest * (highest / lowest) ** np.linspace(0, -1, head_width // 4)
    half = 2 * np.pi * np.concatenate([quarter, quarter])
    return np.kron(np.eye(2), half).astype(np.float32)


def grid_coordinates(grid: tuple[int, int]) -> Float[np.ndarray, "N 2"]:
    """The coordinates of the patches of a grid (rows, columns), float32."""
    rows, columns = grid
    axes = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 2).astype(np.float32)


def register_coordinates(
    coordinates: Float[Array, "#B N 2"], count: int, mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "#B R 2"]:
    """Place registers at equal distances on the border of the box around the patches.

    Args:
      coordinates: of the patches that are seen.
      count: R, divisible by 4.
      mask: False for patches that only pad the array; None: there are none.

    Source: CAPI's released `get_edge_coordinates`.
    """
    side = np.arange(count // 4, dtype=np.float32) / max(count // 4, 1)
    zeros = np.zeros_like(side)
    rows = np.concatenate([side, zeros + 1, 1 - side, zeros])
    columns = np.concatenate([zeros, side, zeros + 1, 1 - side])
    border = np.stack([rows, columns], axis=-1)[None]
    lowest = coordinates
    highest = coordinates
    if mask is not None:
        lowest = jnp.where(mask[..., None], coordinates, jnp.inf)
        highest = jnp.where(mask[..., None], coordinates, -jnp.inf)
    low = lowest.min(axis=1, keepdims=True)
    high = highest.max(axis=1, keepdims=True)
    return low + border * (high - low)
