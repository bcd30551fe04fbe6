"""Maps of several resolutions from the last block of a plain ViT, and dense heads on them.

Letters: B batch, h w rows and columns of patches, D width, F features, K classes.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmim_jax.models.layers import Dtype, gelu, layer_norm

SCALES = (4.0, 2.0, 1.0, 0.5)  # of the grid of patches
COARSEST = 0.25  # of one more map, every second vector of the last one
NORM_EPS = 1e-6
GROUPS = 32  # of group normalization
PRIOR = 0.01  # score of every class at every place before training


def strides(patch_size: int) -> tuple[float, ...]:
    """Pixels between neighbors on each map of `SimpleFeaturePyramid`, the finest first."""
    return tuple(patch_size / scale for scale in (*SCALES, COARSEST))


class Upsample(nn.Module):
    """A transposed convolution of 2 x 2 with stride 2, as a linear layer.

    Attributes:
      features: F.
      dtype: of the computation.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B 2h 2w F"]:
        """Twice as many rows and columns."""
        batch, rows, columns, _ = x.shape
        layer = nn.DenseGeneral(
            (2, 2, self.features), use_bias=False, dtype=self.dtype, name="kernels"
        )
        x = layer(x).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, 2 * rows, 2 * columns, self.features)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x + bias.astype(self.dtype)[None, None, None]


class SimpleFeaturePyramid(nn.Module):
    """Five maps from one: four by up- or downsampling it, the fifth from every second vector.

    Attributes:
      features: F.
      dtype: of the computation.

    Source: ViTDet (Li et al., ECCV 2022, arXiv 2203.16527), section 3, and detectron2's
    SimpleFeaturePyramid with LastLevelMaxPool.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> list[Float[Array, "B _ _ F"]]:
        """The maps, the finest first, see `strides`."""
        maps = []
        for level, scale in enumerate(SCALES):
            found = self._rescale(x, scale, f"level{level}")
            for kernel in (1, 3):
                found = nn.Conv(
                    self.features,
                    (kernel, kernel),
                    use_bias=False,
                    dtype=self.dtype,
                    name=f"level{level}_conv{kernel}",
                )(found)
                found = layer_norm(NORM_EPS, self.dtype, f"level{level}_norm{kernel}")(found)
            maps.append(found)
        maps.append(maps[-1][:, ::2, ::2])
        return maps

    def _rescale(self, x: Float[Array, "B h w D"], scale: float, name: str) -> Array:
        width = x.shape[-1]
        if scale == 0.5:
            return nn.max_pool(x, (2, 2), (2, 2))
        if scale == 1.0:
            return x
        x = Upsample(width // 2, self.dtype, name=f"{name}_up0")(x)
        if scale == 4.0:
            x = gelu(layer_norm(NORM_EPS, self.dtype, f"{name}_up_norm")(x))
            x = Upsample(width // 4, self.dtype, name=f"{name}_up1")(x)
        return x


class Tower(nn.Module):
    """Convolutions of 3 x 3, each with group normalization and ReLU.

    Attributes:
      features: F.
      depth: number of convolutions.
      dtype: of the computation.
    """

    features: int
    depth: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w F"]) -> Float[Array, "B h w F"]:
        """Apply the layers."""
        for i in range(self.depth):
            x = nn.Conv(
                self.features,
                (3, 3),
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.01),
                name=f"conv{i}",
            )(x)
            groups = math.gcd(GROUPS, self.features)
            x = nn.GroupNorm(groups, dtype=self.dtype, epsilon=1e-5, name=f"norm{i}")(x)
            x = jax.nn.relu(x)
        return x


class FcosHead(nn.Module):
    """Classes, distances to the sides of a box, and centerness at every place of all maps.

    All maps share their weights except for one scale of the distances each.

    Attributes:
      classes: K.
      features: F.
      depth: convolutions of each of two towers.
      dtype: of the computation.

    Source: FCOS (Tian et al., ICCV 2019, arXiv 1904.01355) with group normalization, exp(s x) and
    the initial values of its section 4; centerness beside the distances: arXiv 2006.09214.
    """

    classes: int
    features: int
    depth: int
    dtype: Dtype

    @nn.compact
    def __call__(self, maps: list[Float[Array, "B _ _ F"]]) -> dict[str, Float[Array, "B L _"]]:
        """Predictions of L places, those of each map row by row, the finest map first.

        Returns:
          "logits" [B, L, K] of classes; "distances" [B, L, 4], logarithms of the distances to left,
          top, right and bottom in strides of the map; "centerness" [B, L, 1], logits. float32.
        """
        small = nn.initializers.normal(0.01)
        prior = nn.initializers.constant(-math.log((1 - PRIOR) / PRIOR))
        class_tower = Tower(self.features, self.depth, self.dtype, name="class_tower")
        box_tower = Tower(self.features, self.depth, self.dtype, name="box_tower")
        class_layer = _output(self.classes, small, prior, "classes")
        box_layer = _output(4, small, nn.initializers.zeros, "distances")
        centerness_layer = _output(1, small, nn.initializers.zeros, "centerness")
        scales = self.param("level_scale", nn.initializers.ones, (len(maps),))
        found: dict[str, list[Array]] = {"logits": [], "distances": [], "centerness": []}
        for level, x in enumerate(maps):
            x = x.astype(self.dtype)
            boxes = box_tower(x)
            found["logits"].append(_flat(class_layer(class_tower(x))))
            found["distances"].append(_flat(box_layer(boxes)) * scales[level])
            found["centerness"].append(_flat(centerness_layer(boxes)))
        return {name: jnp.concatenate(parts, axis=1) for name, parts in found.items()}


class Detector(nn.Module):
    """`FcosHead` on a `SimpleFeaturePyramid`.

    Attributes:
      classes: K.
      features: F.
      depth: see `FcosHead`.
      dtype: of the computation.
    """

    classes: int
    features: int
    depth: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> dict[str, Float[Array, "B L _"]]:
        """Predictions from a map of patches, see `FcosHead`."""
        maps = SimpleFeaturePyramid(self.features, self.dtype, name="pyramid")(x)
        return FcosHead(self.classes, self.features, self.depth, self.dtype, name="head")(maps)


class LinearSegmenter(nn.Module):
    """Classes of patches by a norm and a linear layer.

    Attributes:
      classes: K.
      dtype: of the norm.
    """

    classes: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w K"]:
        """Logits, float32."""
        x = layer_norm(NORM_EPS, self.dtype, "norm")(x)
        return nn.Dense(self.classes, dtype=jnp.float32, name="classes")(x)


class PyramidSegmenter(nn.Module):
    """Classes from all maps of a `SimpleFeaturePyramid` but the coarsest one.

    The maps are enlarged to the finest one and added, as in semantic FPN (Kirillov et al., CVPR
    2019), whose convolutions between two enlargements are left out: ours.

    Attributes:
      classes: K.
      features: F.
      dtype: of the computation.
    """

    classes: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B 4h 4w K"]:
        """Logits, float32."""
        maps = SimpleFeaturePyramid(self.features, self.dtype, name="pyramid")(x)
        finest = maps[0]
        total = finest
        for coarser in maps[1:-1]:
            total = total + jax.image.resize(coarser, finest.shape, "bilinear")
        total = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv")(total)
        total = gelu(layer_norm(NORM_EPS, self.dtype, "norm")(total))
        return nn.Dense(self.classes, dtype=jnp.float32, name="classes")(total)


def _output(
    features: int,
    kernel_init: nn.initializers.Initializer,
    bias_init: nn.initializers.Initializer,
    name: str,
) -> nn.Conv:
    """A convolution of 3 x 3 in float32."""
    return nn.Conv(
        features,
        (3, 3),
        dtype=jnp.float32,
        kernel_init=kernel_init,
        bias_init=bias_init,
        name=name,
    )


def _flat(x: Float[Array, "B h w F"]) -> Float[Array, "B h*w F"]:
    return x.reshape(len(x), -1, x.shape[-1])
