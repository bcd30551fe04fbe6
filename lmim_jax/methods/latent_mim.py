"""Latent Masked Image Modeling (Wei, Gupta, Morgado; ECCV 2024; arXiv 2407.15837).

An online ViT sees V visible patches, a target ViT (an EMA of it) the M masked ones. A decoder
predicts the latent of each masked patch from the visible ones, and each prediction must pick its
own target among those of the same image.

The paper discusses four challenges; these options control the remedy of each:

  joint optimization     target, see common/targets.py
  direct regression      loss: patch_infonce | norm_l2 | mse | l1 | smooth_l1; tau; standardize;
                         negatives
  correlated patches     num_visible, gap, target_patches, similarity_weight
  weak conditioning      decoder: cross | self; visual_cues; projector_depth, projector_width

Letters: B batch, R masks, H W image height and width, C channels, N patches, V visible, M masked, T
tokens, h w rows and columns of the grid, P pixels of a patch, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmim_jax.methods.base import Features, Metrics, Params, Views
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_choice, check_heads, check_range
from lmim_jax.methods.common.latent_prediction import LatentPrediction
from lmim_jax.methods.common.several_modalities import SeveralModalities
from lmim_jax.models import normalization, vit
from lmim_jax.models.decoders import LatentDecoder
from lmim_jax.models.layers import sincos_positions
from lmim_jax.models.modalities import mean_over_modalities
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError

LOSSES = ("patch_infonce", *losses.REGRESSION_LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(SeveralModalities, LatentPrediction):
    """Latent MIM; the fields are `config.method`, explained key by key in configs/vit_b.py."""

    gap: int
    projector_depth: int
    projector_width: int
    decoder: str
    decoder_heads: int
    visual_cues: bool
    num_visible: int
    target_patches: str
    loss: str
    tau: float
    standardize: bool
    negatives: str
    duplicate_cosine: float
    similarity_weight: float
    similarity_start: float
    similarity_end: float

    SHARES: ClassVar[Mapping[str, float]] = {"num_visible": 20 / 196}
    TEACHER: ClassVar[tuple[str, ...]] = ("encoder", "projector")

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> bool:
        """Whether targets of other images are negatives."""
        return options["negatives"] == "batch"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("target_patches", self.target_patches, ("masked", "all"))
        check_choice("loss", self.loss, LOSSES)
        check_choice("negatives", self.negatives, ("image", "batch"))
        check_choice("decoder", self.decoder, ("cross", "self"))
        check_range("gap", self.gap, 0)
        check_range("tau", self.tau, 1e-6)
        check_range("duplicate_cosine", self.duplicate_cosine, 0, 1)
        check_range("num_visible", self.num_visible, 1, self.num_patches - 2)
        check_heads("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.duplicate_cosine and self.loss != "patch_infonce":
            raise UserError(
                f"config.method.duplicate_cosine={self.duplicate_cosine:g}: loss={self.loss} "
                "has no negatives; give 0"
            )
        if self.negatives != "image" and self.loss != "patch_infonce":
            raise UserError(
                f"config.method.negatives={self.negatives!r}: loss={self.loss} has no negatives; "
                "give 'image'"
            )
        self._check_target_patches()
        if self.projector_depth and (self.target_layers or self.target == "frozen"):
            raise UserError(
                f"config.method.projector_depth={self.projector_depth}: targets of several layers "
                "and those of a frozen teacher have no projector; give 0"
            )

    def _check_target_patches(self) -> None:
        """Raise a UserError where the target encoder must see all patches, and does not."""
        if self.context_weight and self.modalities:
            raise UserError(
                f"config.method.context_weight={self.context_weight:g}: distances to masked "
                "patches are those of one modality; give 0 with config.data.modalities"
            )
        if self.target_patches == "all":
            return
        if self.masks_per_image > 1:
            raise UserError(
                f"config.method.masks_per_image={self.masks_per_image}: the masks of an image "
                "share one pass of the target encoder over all patches; give target_patches=all"
            )
        if self.context_weight:
            raise UserError(
                f"config.method.context_weight={self.context_weight:g} needs targets of the "
                "visible patches too; give target_patches=all"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `loss_fn` takes: grid x (patch + gap)."""
        rows, columns = self.grid
        cell = self.patch_size + self.gap
        return rows * cell, columns * cell

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(**self.encoder_options)

    @property
    def _projector(self) -> vit.Projector:
        return vit.Projector(
            depth=self.projector_depth, hidden=self.projector_width, dtype=self.compute_dtype
        )

    @property
    def _decoder(self) -> LatentDecoder:
        return LatentDecoder(
            kind=self.decoder,
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=self.target_width,
            visual_cues=self.visual_cues,
            predict_visible=self.context_weight > 0,
            **self.block_options,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder, projector, decoder.

        With target "random_projection", there is also target_embed.
        """
        keys = jax.random.split(rng, 4)
        num_visible = len(self.inputs) * self.num_visible
        num_masked = len(self.inputs) * self.num_patches - num_visible
        patches = jnp.zeros((1, num_visible, self.patch_dim))
        positions = jnp.zeros((1, num_visible, self.width))
        tokens = jnp.zeros((1, 1 + num_visible, self.width))
        visible_positions = jnp.zeros((1, num_visible, self.decoder_width))
        masked_positions = jnp.zeros((1, num_masked, self.decoder_width))
        projector = self._projector.init(keys[1], tokens)
        decoder = self._decoder.init(keys[2], tokens, visible_positions, masked_positions)
        return {
            "encoder": self._encoder.init(keys[0], patches, positions)["params"],
            "projector": projector.get("params", {}),  # of depth 0, it has no parameters
            "decoder": decoder["params"],
            **self.init_target(keys[3]),
            **self.init_modalities(rng, self.decoder_width),
        }

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw visible [R, V] and masked [R, M] patch ids, and window offsets [B, h, w, 2].

        There are R = B x masks_per_image masks. Without gap, there are no offsets; with
        `position_noise`, there is noise [R, M, D]. The batch shares nothing, so `rng` is not used.
        """
        del rng
        mask_keys, window_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        mask_keys = self.mask_keys(mask_keys)
        visible, masked = self.split_tokens(
            mask_keys, lambda key: masking.random_split(key, self.num_patches, self.num_visible)
        )
        views = {"visible": visible, "masked": masked}
        views |= self.draw_noise(mask_keys, masked.shape[1])
        if self.gap:
            views["offsets"] = jax.vmap(
                lambda key: masking.window_offsets(key, self.grid, self.gap)
            )(window_keys)
        return views

    def _ema_schedule(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`: half a cosine in training progress.

        The official code updates the teacher before the forward pass with that iteration's
        momentum, which is the update after step s with the momentum of s + 1.
        """
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
        """Compute the reconstruction loss plus the similarity constraint.

        Args:
          params: as returned by `init`.
          target: weights of the teacher, as returned by `target_of`.
          images: normalized, H x W = `image_size`.
          views: as returned by `sample`.
          step: 0-based optimizer step, for the similarity schedule.

        Returns:
          (loss, metrics), float32 scalars. Metrics are the loss, the reconstruction term, the mean
          similarities of predictions, visible tokens and targets, patch accuracy and its chance,
          and those of further terms, see common/latent_prediction.py.

        Source: paper sections 3.2 and 3.3.
        """
        forward = self.forward(params, target, images, views)
        num_masked = views["masked"].shape[1]
        predictions = forward["predictions"][:, -num_masked:]
        targets = forward["targets"][:, -num_masked:]
        compared = predictions
        if self.standardize:
            compared = losses.standardize_over_patches(predictions)
        logits = losses.discrimination_logits(compared, targets, self.tau)
        chance = jnp.float32(1 / logits.shape[-1])
        if self.duplicate_cosine:
            duplicates = losses.near_duplicates(targets, self.duplicate_cosine)
            logits = jnp.where(duplicates, -jnp.inf, logits)
        if self.negatives == "batch":
            others = losses.other_image_logits(compared, targets, self.tau, self.masks_per_image)
            logits = jnp.concatenate([logits, others], axis=-1)
        if self.duplicate_cosine or self.negatives == "batch":
            chance = jnp.mean(1 / jnp.sum(logits > -jnp.inf, axis=-1))
        if self.loss == "patch_infonce":
            reconstruction = losses.patch_infonce(logits, self.tau)
        else:
            reconstruction = losses.REGRESSION_LOSSES[self.loss](predictions, targets)
        similarity_predictions = losses.similarity(predictions)
        similarity_visible = losses.similarity(forward["visible"][:, 1:])
        goal = schedules.cosine(self.similarity_start, self.similarity_end, step / self.total_steps)
        constraint = (similarity_predictions - goal) ** 2 + (similarity_visible - goal) ** 2
        loss = reconstruction + self.similarity_weight * constraint
        terms = self.regularization_terms(forward["visible"][:, 1:], step)
        if self.context_weight:
            terms |= self._context_terms(forward, views)
        loss = self.add_terms(loss, terms, step)
        return loss, {
            "loss": loss,
            "reconstruction": reconstruction,
            "similarity_predictions": similarity_predictions,
            "similarity_visible": similarity_visible,
            "similarity_targets": losses.similarity(targets),
            "patch_accuracy": losses.patch_accuracy(logits),
            "patch_chance": chance,
            **terms,
        }

    def _context_terms(self, forward: Mapping[str, Array], views: Views) -> Metrics:
        """The loss on visible patches, with targets in the form that the loss has."""
        visible = views["visible"]
        masked = views["masked"]
        first_masked = -masked.shape[1]
        first_visible = first_masked - visible.shape[1]
        predictions = forward["predictions"][:, first_visible:first_masked]
        targets = forward["targets"][:, first_visible:first_masked]
        if self.loss == "norm_l2":
            mean, stddev = normalization.token_moments(targets)
            targets = (targets.astype(jnp.float32) - mean) / stddev
        return self.context_terms(predictions, targets, visible, masked)

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Float[Array, "B T D"]]:
        """Compute the three sets of tokens that the loss is made of; arguments as in `loss_fn`.

        Returns:
          visible: [R, 1 + V, D], projected tokens of the online encoder, CLS first.
          targets: projected tokens of the target encoder, [B, 1 + M, D] or, with target_patches
            "all", [B, 1 + V + M, D], CLS first and masked patches last. With target
            "random_projection", there is no CLS. With several masks per image, it is [R, V + M, D],
            without CLS.
          predictions: [R, 1 + M, D], CLS first; with `context_weight`, [R, 1 + V + M, D].
        """
        visible = views["visible"]
        masked = views["masked"]
        patches = self.patches_of(images, self.grid, self.gap, views.get("offsets"))
        tokens = self._encode(params, masking.take(patches, visible), visible)
        index = masked
        if self.target_patches == "all":
            index = jnp.concatenate([visible, masked], axis=1)
        targets = self._targets(params, target, patches, index)
        positions = self.decoder_positions(params, sincos_positions(self.grid, self.decoder_width))
        predictions = self._decoder.apply(
            {"params": params["decoder"]},
            tokens,
            masking.take(positions, visible),
            masking.take(positions, masked),
            views.get("noise"),
        )
        return {"visible": tokens, "targets": targets, "predictions": predictions}

    def _encode(
        self, params: Params, patches: Float[Array, "B T P"], index: Int[Array, "B T"]
    ) -> Float[Array, "B 1+T D"]:
        """Apply encoder and projector to some patches with the given ids; CLS comes first."""
        positions = masking.take(self._positions(params["encoder"]), index)
        tokens, _ = self._encoder.apply({"params": params["encoder"]}, patches, positions)
        return self._projector.apply({"params": params["projector"]}, tokens)

    def _positions(self, encoder: Params) -> Float[Array, "1 N D"]:
        """Compute the positions of the training grid: fixed, the same for every encoder."""
        del encoder
        return jnp.asarray(self.for_all_modalities(sincos_positions(self.grid, self.width)))

    def _targets(
        self,
        params: Params,
        target: Params,
        patches: Float[Array, "B N P"],
        index: Int[Array, "R T"],
    ) -> Float[Array, "R _ W"]:
        """Compute the latents to predict; they have a gradient only with target "joint".

        The teacher sees the patches `index` of each image or, if an image has several masks, all of
        them once.
        """
        teacher = self.teacher(params, target)
        # Visible and masked patches together are not in the order of modalities
        sees_all = self.masks_per_image > 1
        sees_all = sees_all or (bool(self.modalities) and self.target_patches == "all")
        if not sees_all:
            tokens = self.encode_targets(teacher, masking.take(patches, index), index)
        else:
            tokens = self.encode_targets(teacher, patches)
        if "projector" in teacher and not self.target_layers:
            tokens = self._projector.apply({"params": teacher["projector"]}, tokens)
        if not sees_all:
            return tokens
        return masking.take(tokens[:, int(self.target_has_cls) :], index)

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Positions of an image of any grid span the range of the training grid."""
        del params
        positions = sincos_positions(grid, self.width, self.grid)
        return jnp.asarray(self.for_all_modalities(positions))

    def patch_features(
        self,
        params: Params,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N D"],
        mask: Bool[Array, "B N"] | None = None,
    ) -> Features:
        """Encode whole images; "latents" [B, N, D] are what targets are made of."""
        features = super().patch_features(params, patches, positions, mask)
        if self.target == "random_projection":
            latents = self.project_patches(params, patches)
            latents = mean_over_modalities(latents, len(self.inputs), 0, axis=1)
        else:
            projector = {"params": params["projector"]}
            latents = self._projector.apply(projector, features["patches"])
        return {**features, "latents": latents}
