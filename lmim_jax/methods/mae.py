"""Masked Autoencoders (He et al., CVPR 2022; arXiv 2111.06377).

A ViT sees a few visible patches; a decoder predicts the pixels of the masked ones. There is no
teacher.

Letters: B batch, H W image height and width, C channels, N patches, V visible, M masked,
P pixels of a patch, D encoder width, d decoder width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.base import Metrics, Params, Views
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_heads, check_sampler
from lmim_jax.methods.common.several_modalities import SeveralModalities
from lmim_jax.models import vit
from lmim_jax.models.decoders import TokenDecoder
from lmim_jax.models.layers import sincos_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(SeveralModalities):
    """MAE; the fields are `config.method`, explained key by key in configs/mae_vit_b.py."""

    decoder_heads: int
    sampler: str
    mask_ratio: float
    norm_pix: bool

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_sampler(self.sampler, self.grid, self.mask_ratio)
        check_heads("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(**self.encoder_options)

    @property
    def _decoder(self) -> TokenDecoder:
        return TokenDecoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=self.patch_dim,
            **self.block_options,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder and decoder."""
        keys = jax.random.split(rng)
        count = len(self.inputs)
        patches = jnp.zeros((1, count, self.patch_dim))
        tokens = jnp.zeros((1, count, self.width))
        positions = jnp.zeros((1, count, self.decoder_width))
        return {
            "encoder": self._encoder.init(keys[0], patches, tokens)["params"],
            "decoder": self._decoder.init(keys[1], tokens, positions, positions)["params"],
            **self.init_modalities(rng, self.decoder_width),
        }

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw the ids of visible [B, V] and masked [B, M] patches of all modalities.

        The batch shares nothing.
        """
        del rng
        split = masking.SAMPLERS[self.sampler]
        visible, masked = self.split_tokens(
            keys, lambda key: split(key, self.grid, self.mask_ratio)
        )
        return {"visible": visible, "masked": masked}

    def target_of(self, params: Params) -> Params:
        """Return {}: there is no teacher."""
        del params
        return {}

    def ema_rate(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Return 0: there is no teacher."""
        del step
        return 0.0

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the mean squared error of masked pixels.

        With `norm_pix`, the pixels of each patch are normalized first. Arguments and result as in
        methods/base.py; metrics are "loss" and the same number as "pixel_loss".

        Source: paper section 3; official `forward_loss`.
        """
        del step
        predictions = self._predict_masked(params, target, images, views)
        pixels = masking.take(self.patches_of(images, self.grid), views["masked"])
        error = losses.norm_l2 if self.norm_pix else losses.mse
        parts = self.losses_of(error, predictions, pixels)
        loss = sum(parts[1:], parts[0]) / len(parts)
        return loss, {"loss": loss, "pixel_loss": loss}

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Float[Array, "B N P"]]:
        """Predict pixels; arguments as in `loss_fn`.

        Returns:
          pixels: [B, V + M, P], predictions for the visible patches, then for the masked ones.
        """
        del target
        visible = views["visible"]
        masked = views["masked"]
        patches = masking.take(self.patches_of(images, self.grid), visible)
        positions = self.for_all_modalities(sincos_positions(self.grid, self.width, integer=True))
        tokens, _ = self._encoder.apply(
            {"params": params["encoder"]}, patches, masking.take(positions, visible)
        )
        positions = self.decoder_positions(
            params, sincos_positions(self.grid, self.decoder_width, integer=True)
        )
        # The position of CLS is zero.
        visible_positions = jnp.pad(masking.take(positions, visible), ((0, 0), (1, 0), (0, 0)))
        predictions = self._decoder.apply(
            {"params": params["decoder"]},
            tokens,
            visible_positions,
            masking.take(positions, masked),
        )
        return {"pixels": predictions[:, 1:]}

    def _predict_masked(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> Float[Array, "B M P"]:
        """Predict the pixels of the masked patches alone."""
        num_masked = views["masked"].shape[1]
        return self.forward(params, target, images, views)["pixels"][:, -num_masked:]

    def reconstruct(
        self, params: Params, images: Float[Array, "B H W C"], views: Views
    ) -> Float[Array, "B H W C"]:
        """Replace the masked patches of images by the predictions, see methods/base.py."""
        masked = views["masked"]
        pixels = self._predict_masked(params, {}, images, views).astype(jnp.float32)
        if self.norm_pix:
            patches = self.patches_of(images, self.grid)
            mean, stddev = self.pixel_moments(masking.take(patches, masked))
            pixels = pixels * stddev + mean
        return self.paint(images, masked, pixels)

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Positions of an image of any grid span the range of the training grid."""
        del params
        positions = sincos_positions(grid, self.width, self.grid, integer=True)
        return jnp.asarray(self.for_all_modalities(positions))
