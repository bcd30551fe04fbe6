"""PiLaMIM (Lee et al., NeurIPS 2024 workshop on self-supervised learning; arXiv 2501.03005).

One encoder sees a few visible patches. A pixel decoder predicts the masked pixels as in MAE; a
latent decoder predicts the features that an EMA of the encoder computes from the whole image, CLS
included.

Letters: B batch, R masks, H W image height and width, C channels, N patches, V visible, M masked, P
pixels of a patch, D encoder width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.base import Metrics, Params, Views
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_heads, check_sampler
from lmim_jax.methods.common.latent_prediction import LatentPrediction
from lmim_jax.models import initializers, vit
from lmim_jax.models.decoders import TokenDecoder
from lmim_jax.models.layers import patchify, replace_patches, resample_positions
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(LatentPrediction):
    """PiLaMIM; the fields are `config.method`, explained key by key in configs/pilamim_vit_b.py."""

    final_norm_eps: float
    qkv_bias: bool
    decoder_heads: int
    latent_decoder_width: int
    sampler: str
    mask_ratio: float
    align_targets: bool
    pixel_weight: float
    latent_weight: float
    cls_weight: float

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_sampler(self.sampler, self.grid, self.mask_ratio)
        check_heads("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        check_heads(
            "latent_decoder_width", self.latent_decoder_width, "decoder_heads", self.decoder_heads
        )
        if self.cls_weight and not self.target_has_cls:
            raise UserError(
                f"config.method.cls_weight={self.cls_weight:g}: these targets have no CLS token; "
                "give 0"
            )

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(
            qkv_bias=self.qkv_bias, final_norm_eps=self.final_norm_eps, **self.encoder_options
        )

    @property
    def _pixel_decoder(self) -> TokenDecoder:
        return self._make_decoder(self.decoder_width, self.patch_dim)

    @property
    def _latent_decoder(self) -> TokenDecoder:
        return self._make_decoder(self.latent_decoder_width, self.target_width)

    def _make_decoder(self, width: int, out_width: int) -> TokenDecoder:
        return TokenDecoder(
            width=width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=out_width,
            qkv_bias=self.qkv_bias,
            final_norm=False,
            **self.block_options,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder, pixel_decoder, latent_decoder.

        Each of the three has learned "positions" [1, slots, width], one for every patch; those of
        the decoders begin with one for CLS.
        """
        keys = jax.random.split(rng, 7)
        patches = jnp.zeros((1, 1, self.patch_dim))
        tokens = jnp.zeros((1, 1, self.width))
        pixel_positions = jnp.zeros((1, 1, self.decoder_width))
        latent_positions = jnp.zeros((1, 1, self.latent_decoder_width))
        pixel_decoder = self._pixel_decoder.init(keys[1], tokens, pixel_positions, pixel_positions)
        latent_decoder = self._latent_decoder.init(
            keys[2], tokens, latent_positions, latent_positions
        )
        params = {
            "encoder": self._encoder.init(keys[0], patches, tokens)["params"],
            "pixel_decoder": pixel_decoder["params"],
            "latent_decoder": latent_decoder["params"],
        }
        params = initializers.torch_default(keys[3], params)
        slots = self.num_patches
        params["encoder"]["positions"] = _init_positions(keys[4], slots, self.width)
        params["pixel_decoder"]["positions"] = _init_positions(
            keys[5], 1 + slots, self.decoder_width
        )
        params["latent_decoder"]["positions"] = _init_positions(
            keys[6], 1 + slots, self.latent_decoder_width
        )
        return {**params, **self.init_target(jax.random.fold_in(rng, 7))}

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw visible [R, V] and masked [R, M] patch ids; the batch shares nothing.

        There are R = B x masks_per_image masks. Without `align_targets`, also draw a random order
        [R, N] of the targets; with `position_noise`, also noise [R, M, D].
        """
        del rng
        split = masking.SAMPLERS[self.sampler]
        keys = self.mask_keys(keys)
        mask_keys, order_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        visible, masked = jax.vmap(lambda key: split(key, self.grid, self.mask_ratio))(mask_keys)
        views = {"visible": visible, "masked": masked}
        views |= self.draw_noise(mask_keys, masked.shape[1])
        if not self.align_targets:
            views["order"] = jax.vmap(lambda key: jax.random.permutation(key, self.num_patches))(
                order_keys
            )
        return views

    def _ema_schedule(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`.

        The momentum rises linearly; the released code uses schedule[s] after step s.
        """
        progress = step / self.total_steps
        return schedules.linear(1 - self.momentum_start, 1 - self.momentum_end, progress)

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the weighted sum of the pixel, latent and CLS losses, mean squared errors each.

        The first two are sums over masked patches divided by mask_ratio x N instead of M, as in the
        released code. Arguments and result as in methods/base.py; metrics are the loss, its three
        terms, the mean similarities of predictions and of targets, and those of further terms, see
        common/latent_prediction.py.

        Source: paper section 3; official `pretrain.py`.
        """
        visible = views["visible"]
        masked = views["masked"]
        num_masked = masked.shape[1]
        forward = self.forward(params, target, images, views)
        pixels = masking.take(patchify(images, self.grid, self.patch_size), masked)
        target_index = masked
        if not self.align_targets:
            target_index = jnp.take_along_axis(views["order"], masked, axis=1)
        first_patch = int(self.target_has_cls)
        targets = masking.take(forward["targets"][:, first_patch:], target_index)
        predictions = forward["latents"][:, -num_masked:]
        scale = num_masked / (self.num_patches * self.mask_ratio)
        pixel_loss = scale * losses.mse(forward["pixels"][:, -num_masked:], pixels)
        latent_loss = scale * losses.mse(predictions, targets)
        cls_loss = jnp.float32(0)
        if self.target_has_cls:
            cls_targets = jnp.repeat(forward["targets"][:, 0], self.masks_per_image, axis=0)
            cls_loss = losses.mse(forward["latents"][:, 0], cls_targets)
        loss = (
            self.pixel_weight * pixel_loss
            + self.latent_weight * latent_loss
            + self.cls_weight * cls_loss
        )
        terms = self.regularization_terms(forward["visible"][:, 1:], step)
        if self.context_weight:
            terms |= self.context_terms(
                forward["latents"][:, 1:-num_masked],
                masking.take(forward["targets"][:, first_patch:], visible),
                visible,
                masked,
            )
        loss = self.add_terms(loss, terms, step)
        return loss, {
            "loss": loss,
            "pixel_loss": pixel_loss,
            "latent_loss": latent_loss,
            "cls_loss": cls_loss,
            "similarity_predictions": losses.similarity(predictions),
            "similarity_targets": losses.similarity(targets),
            **terms,
        }

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Array]:
        """Compute predictions and targets; arguments as in `loss_fn`.

        Returns:
          visible: [R, 1 + V, D], the encoder's tokens, CLS first.
          pixels: [R, V + M, P], masked patches last.
          latents: [R, 1 + V + M, W], CLS first, masked patches last.
          targets: [B, 1 + N, W] of the teacher, CLS first if it has one, in raster order.
        """
        visible = views["visible"]
        patches = patchify(images, self.grid, self.patch_size)
        positions = params["encoder"]["positions"]
        tokens, _ = self._encoder.apply(
            {"params": params["encoder"]},
            masking.take(patches, visible),
            masking.take(positions, visible),
        )
        pixels = _decode(self._pixel_decoder, params["pixel_decoder"], tokens, views)
        latents = _decode(
            self._latent_decoder, params["latent_decoder"], tokens, views, views.get("noise")
        )
        targets = self.encode_targets(self.teacher(params, target), patches)
        return {
            "visible": tokens,
            "pixels": pixels[:, 1:],
            "latents": latents,
            "targets": targets,
        }

    def _positions(self, encoder: Params) -> Float[Array, "1 N D"]:
        """The positions that an encoder has learned."""
        return encoder["positions"]

    def reconstruct(
        self, params: Params, images: Float[Array, "B H W C"], views: Views
    ) -> Float[Array, "B H W C"]:
        """Replace the masked patches of images by the predictions, see methods/base.py."""
        masked = views["masked"]
        forward = self.forward(params, self.target_of(params), images, views)
        pixels = forward["pixels"][:, -masked.shape[1] :]
        return replace_patches(images, masked, pixels, self.grid, self.patch_size)

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Learned positions, interpolated to other grids than that of training."""
        return resample_positions(params["encoder"]["positions"], self.grid, grid)


def _init_positions(rng: Key[Array, ""], slots: int, width: int) -> Float[Array, "1 slots width"]:
    return 0.02 * jax.random.normal(rng, (1, slots, width))


def _decode(
    decoder: TokenDecoder,
    params: Params,
    tokens: Float[Array, "R 1+V D"],
    views: Views,
    noise: Float[Array, "R M D"] | None = None,
) -> Float[Array, "R 1+V+M _"]:
    """Apply a decoder to the encoder's tokens, with its learned positions."""
    positions = params["positions"]
    patch_positions = positions[:, 1:]
    cls = jnp.broadcast_to(positions[:, :1], (len(tokens), 1, positions.shape[-1]))
    visible = jnp.concatenate([cls, masking.take(patch_positions, views["visible"])], axis=1)
    masked = masking.take(patch_positions, views["masked"])
    return decoder.apply({"params": params}, tokens, visible, masked, noise=noise)
