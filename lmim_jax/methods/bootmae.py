"""BootMAE: Bootstrapped Masked Autoencoders (Dong et al., ECCV 2022; arXiv 2207.07116).

A ViT sees V visible patches. From its tokens, a regressor predicts the pixels of the M masked
patches, and a predictor the features that an EMA of the ViT computes from the whole image. Each of
these two decoders also attends to features of the visible patches that suit its target: those of
the first block for pixels, those of the last block for features.

Where the paper and the released code (LightDXY/BootMAE) differ, this follows the code.

Letters: B batch, H W image height and width, C channels, N patches, V visible, M masked,
P pixels of a patch, D width, d width of the pixel decoder.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, Key

from lmim_jax.methods.base import Features, Metrics, Params, Views, ViTMethod
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_range
from lmim_jax.models import normalization, vit
from lmim_jax.models.decoders import PixelHead, TargetAwareDecoder
from lmim_jax.models.layers import Dense, patchify, replace_patches, sincos_positions
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(ViTMethod):
    """BootMAE; the fields are `config.method`, explained key by key in configs/bootmae_vit_b.py."""

    num_visible: int
    block_total: int
    block_smallest: int
    block_largest: int
    block_aspect: float
    block_exposed: int
    center_weight: float
    feature_weight: float
    feature_ramp: float
    momentum: tuple[float, ...]
    momentum_epochs: tuple[float, ...]
    total_steps: int
    steps_per_epoch: int

    SHARES: ClassVar[Mapping[str, float]] = {
        "num_visible": 49 / 196,
        "block_total": 120 / 196,
        "block_smallest": 16 / 196,
        "block_largest": 60 / 196,
    }

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_range("num_visible", self.num_visible, 1, self.num_patches - 1)
        if self.decoder_width < self.heads or self.decoder_width % 4:
            raise UserError(
                f"config.method.decoder_width={self.decoder_width} must be a multiple of 4 and at "
                f"least heads={self.heads}"
            )
        check_range("decoder_depth", self.decoder_depth, 1)
        self._check_blocks()
        epochs = (0, *self.momentum_epochs)
        if len(epochs) != len(self.momentum) or sorted(set(epochs)) != list(epochs):
            raise UserError(
                f"config.method.momentum_epochs={self.momentum_epochs} must increase, start above "
                f"0, and have one value for each of momentum={self.momentum} except the first"
            )

    def _check_blocks(self) -> None:
        """Check the options of masks."""
        num_masked = self.num_patches - self.num_visible
        check_range("block_total", self.block_total, 0, num_masked)
        check_range("block_exposed", self.block_exposed, 0, min(self.num_visible, num_masked))
        # A square block of the smallest area must fit; otherwise it could be that no block does.
        check_range("block_smallest", self.block_smallest, 1, (min(self.grid) - 1) ** 2)
        check_range("block_largest", self.block_largest, self.block_smallest)
        check_range("block_aspect", self.block_aspect, 0.01, 1)
        check_range("feature_ramp", self.feature_ramp, 0, 1)

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _options(self) -> dict[str, Any]:
        """Options of the blocks of all networks."""
        return {**self.block_options, "qkv_bias": (True, False, True)}  # keys have no bias

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(**{**self.encoder_options, **self._options})

    @property
    def _regressor(self) -> TargetAwareDecoder:
        head = PixelHead(
            patch_size=self.patch_size, channels=self.channels, dtype=self.compute_dtype
        )
        return TargetAwareDecoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.heads,
            head=head,
            **self._options,
        )

    @property
    def _predictor(self) -> TargetAwareDecoder:
        head = Dense(features=self.width, dtype=self.compute_dtype)
        return TargetAwareDecoder(
            width=self.width,
            depth=self.decoder_depth,
            heads=self.heads,
            head=head,
            **self._options,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder, regressor (pixels), predictor (features)."""
        keys = jax.random.split(rng, 3)
        num_masked = self.num_patches - self.num_visible
        patches = jnp.zeros((1, self.num_visible, self.patch_dim))
        positions = jnp.zeros((1, self.num_visible, self.width))
        tokens = jnp.zeros((1, 1 + self.num_visible, self.width))
        pixel_positions = jnp.zeros((1, num_masked, self.decoder_width))
        feature_positions = jnp.zeros((1, num_masked, self.width))
        regressor = self._regressor.init(keys[1], tokens, tokens, pixel_positions)
        predictor = self._predictor.init(keys[2], tokens, tokens, feature_positions)
        params = {
            "encoder": self._encoder.init(keys[0], patches, positions)["params"],
            "regressor": regressor["params"],
            "predictor": predictor["params"],
        }
        return official_scales(params)

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw visible [B, V] and masked [B, M] patch ids.

        The number of patches under the blocks that stay visible is one draw for the whole batch.
        """
        exposed = jax.random.randint(rng, (), 0, self.block_exposed + 1)

        def draw(key):
            block_key, split_key = jax.random.split(key)
            mask = masking.block_mask(
                block_key,
                self.grid,
                total=self.block_total,
                smallest=self.block_smallest,
                largest=self.block_largest,
                aspect=self.block_aspect,
            )
            return masking.block_split(split_key, mask, self.num_visible, exposed)

        visible, masked = jax.vmap(draw)(keys)
        return {"visible": visible, "masked": masked}

    def target_of(self, params: Params) -> Params:
        """Select what the teacher consists of: the encoder."""
        return {"encoder": params["encoder"]}

    def ema_rate(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`.

        It is piecewise linear in epochs, and constant within an epoch.
        """
        epoch = jnp.asarray(step // self.steps_per_epoch, jnp.float32)
        epochs = jnp.array([0.0, *self.momentum_epochs])
        rates = jnp.array([1 - momentum for momentum in self.momentum])
        return jnp.interp(epoch, epochs, rates)

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the pixel loss plus the feature loss, whose weight ramps up.

        Both are mean squared errors, in which a patch has more weight the more of its neighbors are
        masked. Arguments and result as in methods/base.py; metrics are the loss, its two terms, the
        weight of the feature loss, and the mean similarities of predictions and of targets.
        """
        forward = self.forward(params, target, images, views)
        weight = 1 + self.center_weight * losses.masked_neighbors(views["masked"], self.grid)
        pixel_loss = _weighted_mse(forward["pixels"], forward["pixel_targets"], weight)
        feature_loss = _weighted_mse(forward["predictions"], forward["targets"], weight)
        feature_weight = self._feature_weight(step)
        loss = pixel_loss + feature_weight * feature_loss
        return loss, {
            "loss": loss,
            "pixel_loss": pixel_loss,
            "feature_loss": feature_loss,
            "feature_weight": jnp.float32(feature_weight),
            "similarity_predictions": losses.similarity(forward["predictions"]),
            "similarity_targets": losses.similarity(forward["targets"]),
        }

    def _feature_weight(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """Compute the weight of the feature loss: it rises linearly in epochs, then is constant."""
        epochs = self.total_steps / self.steps_per_epoch
        ramp = (step // self.steps_per_epoch + 1) / max(self.feature_ramp * epochs, 1e-6)
        return self.feature_weight * jnp.minimum(ramp, 1.0)

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Array]:
        """Compute predictions and targets of the masked patches; arguments as in `loss_fn`.

        Returns:
          predictions, targets: [B, M, D], features; every token has mean 0 and standard deviation 1
            over its channels.
          pixels, pixel_targets: [B, M, P]; every channel of a target patch has mean 0 and standard
            deviation 1.
          reconstruction: [B, M, P], `pixels` with the mean and the standard deviation of the true
            patch, which can be shown as an image.
          All are float32.
        """
        visible = views["visible"]
        masked = views["masked"]
        patches = patchify(images, self.grid, self.patch_size)
        positions = self._positions(self.width)
        (tokens, deep), state = self._encoder.apply(
            {"params": params["encoder"]},
            masking.take(patches, visible),
            masking.take(positions, visible),
            mutable=["intermediates"],
        )
        shallow = self._encoder.without_registers(state["intermediates"]["block00"]["tokens"][0])
        pixels = self._regressor.apply(
            {"params": params["regressor"]},
            tokens,
            shallow,
            masking.take(self._positions(self.decoder_width), masked),
        )
        pixels = pixels.astype(jnp.float32)
        predictions = self._predictor.apply(
            {"params": params["predictor"]}, tokens, deep, masking.take(positions, masked)
        )
        teacher = jax.lax.stop_gradient(target["encoder"])
        _, targets = self._encoder.apply({"params": teacher}, patches, positions)
        pixel_targets, mean, stddev = losses.standardize_pixels(
            masking.take(patches, masked), self.channels
        )
        targets = masking.take(targets[:, 1:], masked)
        return {
            "predictions": normalization.standardize_tokens(predictions, 1e-6),
            "targets": normalization.standardize_tokens(targets, 1e-6),
            "pixels": pixels,
            "pixel_targets": pixel_targets,
            "reconstruction": pixels * stddev + mean,
        }

    def reconstruct(
        self, params: Params, images: Float[Array, "B H W C"], views: Views
    ) -> Float[Array, "B H W C"]:
        """Replace the masked patches of images by the predictions, see methods/base.py."""
        pixels = self.forward(params, self.target_of(params), images, views)["reconstruction"]
        return replace_patches(images, views["masked"], pixels, self.grid, self.patch_size)

    def _positions(
        self, width: int, grid: tuple[int, int] | None = None
    ) -> Float[Array, "1 N width"]:
        """Compute the positions of a grid; any grid spans the range of the training grid."""
        table = sincos_positions(grid or self.grid, width, self.grid, integer=True, row_first=True)
        return jnp.asarray(table)[None]

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Positions of an image of any grid span the range of the training grid."""
        del params
        return self._positions(self.width, grid)

    def patch_features(
        self,
        params: Params,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N D"],
        mask: Bool[Array, "B N"] | None = None,
    ) -> Features:
        """Encode whole images; "latents" [B, N, D] are what targets are made of."""
        features = super().patch_features(params, patches, positions, mask)
        latents = normalization.standardize_tokens(features["patches_prenorm"], 1e-6)
        return {**features, "latents": latents}


def _weighted_mse(
    predictions: Float[Array, "B M D"],
    targets: Float[Array, "B M D"],
    weight: Float[Array, "B M"],
) -> Float[Array, ""]:
    """Mean squared error with a weight per patch; weights are not normalized."""
    errors = jnp.square(predictions.astype(jnp.float32) - targets)
    return jnp.mean(weight * jnp.mean(errors, axis=-1))


def official_scales(params: Params) -> Params:
    """Rescale initial parameters to the official spread where modules have another one.

    The official code initializes query, key and value kernels of self-attention one by one as
    xavier-uniform, not as one matrix three times as wide. Its CLS token has a standard deviation of
    1e-6 instead of the 0.02 of `vit.ViT`.
    """
    flat = flatten_dict(params)
    for path, value in flat.items():
        if path[-2:] == ("qkv", "kernel"):
            rows, columns = value.shape
            flat[path] = value * math.sqrt((rows + columns) / (rows + columns / 3))
        elif path[-1] == "cls_token":
            flat[path] = value * (1e-6 / 0.02)
    return unflatten_dict(flat)
