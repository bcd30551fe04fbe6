"""Interactive Masked Image Modeling of several modalities, after Vu et al. (arXiv 2409.08885).

Patches of co-registered modalities are masked; one ViT encodes the visible ones of all. Masked
tokens then attend to the visible tokens of all modalities, not to each other: what is hidden in one
modality is predicted from what is visible in the other. Targets are pixels, as published, or
latents of a teacher that sees everything, with patch discrimination as in Latent MIM.

With one modality, pixels and decoder "self", this is MAE.

Letters: B batch, H W image height and width, C channels, N positions, T tokens of all modalities,
V visible, M masked, P values of a patch, D encoder width, d decoder width.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmim_jax.methods.base import Features, Metrics, Params, Views
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_choice, check_heads, check_range, check_sampler
from lmim_jax.methods.common.several_modalities import SeveralModalities
from lmim_jax.methods.common.targets import TargetMethod
from lmim_jax.models import vit
from lmim_jax.models.decoders import QueryDecoder, TokenDecoder
from lmim_jax.models.layers import sincos_positions
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(SeveralModalities, TargetMethod):
    """Interactive MIM; the fields are `config.method`, see configs/interactive_mim_vit_s.py."""

    sampler: str
    mask_ratio: float
    decoder: str
    decoder_heads: int
    predict: str
    norm_pix: bool
    tau: float
    standardize: bool

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_sampler(self.sampler, self.grid, self.mask_ratio)
        check_choice("decoder", self.decoder, ("cross", "self"))
        check_choice("predict", self.predict, ("pixels", "latents"))
        check_range("tau", self.tau, 1e-6)
        check_heads("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.predict == "pixels" and (self.target != "ema" or self.target_layers):
            raise UserError(
                f"config.method.target={self.target} and target_layers={self.target_layers} are "
                "those of latents; give predict=latents, or leave them as they are in the recipe"
            )

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(**self.encoder_options)

    @property
    def _decoder(self) -> nn.Module:
        options = {
            "width": self.decoder_width,
            "depth": self.decoder_depth,
            "heads": self.decoder_heads,
            "out_width": self.target_width if self.predict == "latents" else self.patch_dim,
            **self.block_options,
        }
        if self.decoder == "self":
            return TokenDecoder(**options)
        heads: tuple[tuple[str, int], ...] = ()  # latents: one for all modalities
        if self.predict == "pixels":
            heads = tuple((part.name, part.patch_dim) for part in self.modalities)
        return QueryDecoder(**options, modalities=heads)

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder and decoder.

        With target "random_projection", there is also target_embed; with several modalities,
        their embeddings in the decoder.
        """
        keys = jax.random.split(rng)
        count = len(self.inputs)
        patches = jnp.zeros((1, count, self.patch_dim))
        tokens = jnp.zeros((1, count, self.width))
        positions = jnp.zeros((1, count, self.decoder_width))
        return {
            "encoder": self._encoder.init(keys[0], patches, tokens)["params"],
            "decoder": self._decoder.init(keys[1], tokens, positions, positions)["params"],
            **self.init_target(jax.random.fold_in(rng, 1)),
            **self.init_modalities(rng, self.decoder_width),
        }

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw the ids of visible [B, V] and masked [B, M] tokens of all modalities.

        The batch shares nothing.
        """
        del rng
        split = masking.SAMPLERS[self.sampler]
        visible, masked = self.split_tokens(
            keys, lambda key: split(key, self.grid, self.mask_ratio)
        )
        return {"visible": visible, "masked": masked}

    def target_of(self, params: Params) -> Params:
        """Select what the teacher consists of; {} where pixels are predicted."""
        if self.predict == "pixels":
            return {}
        return super().target_of(params)

    def ema_rate(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`; 0 without a teacher."""
        if self.predict == "pixels":
            return 0.0
        return super().ema_rate(step)

    def _ema_schedule(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`: half a cosine, as in Latent MIM."""
        progress = (step + 1) / self.total_steps
        return schedules.cosine(1 - self.momentum_start, 1 - self.momentum_end, progress)

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss on masked patches, the mean over modalities.

        Arguments and result as in methods/base.py. Of pixels, metrics are "loss" and the same
        number as "pixel_loss"; of latents, "loss", "patch_accuracy", its chance, and the mean
        similarity of targets. Of several modalities, there is also the loss of each,
        "NAME_loss".
        """
        del step
        found = self.forward(params, target, images, views)
        num_masked = views["masked"].shape[1]
        predictions = found["predictions"][:, -num_masked:]
        error = losses.norm_l2 if self.norm_pix else losses.mse
        if self.predict == "pixels":
            parts = self.losses_of(error, predictions, found["targets"])
        else:
            parts = self.losses_of(self._discriminate, predictions, found["targets"], padded=False)
        loss = sum(parts[1:], parts[0]) / len(parts)
        metrics = {"loss": loss}
        for modality, part in zip(self.modalities, parts, strict=False):
            metrics[f"{modality.name}_loss"] = part
        if self.predict == "pixels":
            return loss, {**metrics, "pixel_loss": loss}
        accuracies = self.losses_of(self._accuracy, predictions, found["targets"], padded=False)
        return loss, {
            **metrics,
            "patch_accuracy": sum(accuracies[1:], accuracies[0]) / len(accuracies),
            "patch_chance": jnp.float32(len(self.inputs) / num_masked),
            "similarity_targets": losses.similarity(found["targets"]),
        }

    def _logits(
        self, predictions: Float[Array, "B M D"], targets: Float[Array, "B M D"]
    ) -> Float[Array, "B M M"]:
        """Compare the predictions of one modality with its targets of the same image."""
        if self.standardize:
            predictions = losses.standardize_over_patches(predictions)
        return losses.discrimination_logits(predictions, targets, self.tau)

    def _discriminate(self, predictions: Array, targets: Array) -> Float[Array, ""]:
        """Patch discrimination, see `losses.patch_infonce`."""
        return losses.patch_infonce(self._logits(predictions, targets), self.tau)

    def _accuracy(self, predictions: Array, targets: Array) -> Float[Array, ""]:
        """The share of predictions that are closest to their own target."""
        return losses.patch_accuracy(self._logits(predictions, targets))

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Float[Array, "B _ _"]]:
        """Compute predictions and targets; arguments as in `loss_fn`.

        Returns:
          predictions: [B, _, P] or [B, _, D], those of masked tokens last.
          targets: [B, M, P] or [B, M, D], of masked tokens.
        """
        visible = views["visible"]
        masked = views["masked"]
        patches = self.patches_of(images, self.grid)
        tokens, _ = self._encoder.apply(
            {"params": params["encoder"]},
            masking.take(patches, visible),
            masking.take(self._positions(params["encoder"]), visible),
        )
        positions = self.decoder_positions(
            params, sincos_positions(self.grid, self.decoder_width, integer=True)
        )
        # The position of CLS is zero
        visible_positions = jnp.pad(masking.take(positions, visible), ((0, 0), (1, 0), (0, 0)))
        predictions = self._decoder.apply(
            {"params": params["decoder"]},
            tokens,
            visible_positions,
            masking.take(positions, masked),
        )
        if self.predict == "pixels":
            targets = patches
        else:
            targets = self.encode_targets(self.teacher(params, target), patches)
            targets = targets[:, int(self.target_has_cls) :]
        return {"predictions": predictions, "targets": masking.take(targets, masked)}

    @property
    def reconstruct(self) -> Callable[[Params, Array, Views], Float[Array, "B H W C"]]:
        """The function that paints predicted pixels into images, see methods/base.py.

        Raises:
          AttributeError: latents are predicted.
        """
        if self.predict != "pixels":
            raise AttributeError("latents are predicted, no pixels")
        return self._reconstruct

    def _reconstruct(
        self, params: Params, images: Float[Array, "B H W C"], views: Views
    ) -> Float[Array, "B H W C"]:
        """Replace the masked patches of images by the predictions."""
        masked = views["masked"]
        found = self.forward(params, {}, images, views)
        pixels = found["predictions"][:, -masked.shape[1] :].astype(jnp.float32)
        if self.norm_pix:
            mean, stddev = self.pixel_moments(found["targets"])
            pixels = pixels * stddev + mean
        return self.paint(images, masked, pixels)

    def _positions(self, encoder: Params) -> Float[Array, "1 T D"]:
        """Compute the positions of the training grid: fixed, the same for every encoder."""
        del encoder
        return self.positions_of({}, self.grid)

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 T D"]:
        """Positions of an image of any grid span the range of the training grid."""
        del params
        positions = sincos_positions(grid, self.width, self.grid, integer=True)
        return jnp.asarray(self.for_all_modalities(positions))

    def patch_features(
        self,
        params: Params,
        patches: Float[Array, "B T P"],
        positions: Float[Array, "#B T D"],
        mask: Bool[Array, "B T"] | None = None,
    ) -> Features:
        """Encode whole images; where latents are predicted, "latents" [B, N, D] are these."""
        features = super().patch_features(params, patches, positions, mask)
        if self.predict == "pixels":
            return features
        return {**features, "latents": features["patches"]}
