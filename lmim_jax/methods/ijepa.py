"""I-JEPA (Assran et al., CVPR 2023; arXiv 2301.08243).

A predictor predicts the features of a few target blocks of an image from one context block; the
targets come from an EMA of the encoder. There is no CLS token.

Letters: B batch, R masks, H W image height and width, C channels, N patches, K context patches
(padded), T target patches of a block (padded), P pixels of a patch, D encoder width, d predictor
width, W width of a target.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.base import Metrics, Params, Views
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_choice, check_heads, check_range
from lmim_jax.methods.common.latent_prediction import LatentPrediction
from lmim_jax.models import initializers, normalization, vit
from lmim_jax.models.decoders import TokenDecoder
from lmim_jax.models.layers import patchify, sincos_positions
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError

LOSSES = {"smooth_l1": losses.smooth_l1, "mse": losses.mse, "l1": losses.l1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(LatentPrediction):
    """I-JEPA; the fields are `config.method`, explained key by key in configs/ijepa_vit_b.py.

    The paper evaluates the features of the teacher (`params: target` of an evaluator).
    """

    decoder_heads: int
    blocks: int
    target_scale: tuple[float, float]
    target_aspect: tuple[float, float]
    context_scale: tuple[float, float]
    context_capacity: int
    min_context: int
    mask_batch: int
    biased_masks: bool
    loss: str

    SHARES: ClassVar[Mapping[str, float]] = {"context_capacity": 72 / 196}

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_range("blocks", self.blocks, 1)
        check_range("mask_batch", self.mask_batch, 1)
        check_range("context_capacity", self.context_capacity, 1, self.num_patches)
        check_range("min_context", self.min_context, 0, self.context_capacity - 1)
        check_heads("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.biased_masks and min(self.grid) < 2:
            raise UserError(
                f"config.method.biased_masks=True needs a grid of 2 x 2 patches or more, not "
                f"{self.grid[0]} x {self.grid[1]}; set it to False"
            )

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(cls=False, **self.encoder_options)

    @property
    def _predictor(self) -> TokenDecoder:
        return TokenDecoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=self.target_width,
            **self.block_options,
        )

    @property
    def _mask_sampler(self) -> masking.Multiblock:
        return masking.Multiblock(
            grid=self.grid,
            blocks=self.blocks,
            scale=self.target_scale,
            aspect=self.target_aspect,
            context_scale=self.context_scale,
            capacity=self.context_capacity,
            min_context=self.min_context,
            group=self.mask_batch,
            biased=self.biased_masks,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder and predictor."""
        keys = jax.random.split(rng, 3)
        patches = jnp.zeros((1, 1, self.patch_dim))
        tokens = jnp.zeros((1, 1, self.width))
        positions = jnp.zeros((1, 1, self.decoder_width))
        params = {
            "encoder": self._encoder.init(keys[0], patches, tokens)["params"],
            "predictor": self._predictor.init(keys[1], tokens, positions, positions)["params"],
        }
        params = initializers.normal(keys[2], params)
        return {**params, **self.init_target(jax.random.fold_in(rng, 3))}

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw visible [R, K] and targets [R, blocks, T], patch ids with a mask each.

        There are R = B x masks_per_image contexts. With `position_noise`, there is also noise
        [R, blocks x T, D]. With `biased_masks`, block sizes depend on `rng` alone. See
        `masking.Multiblock`.
        """
        mask_keys = self.mask_keys(keys)
        views = self._mask_sampler(rng, mask_keys)
        _, blocks, length = views["targets"].shape
        return {**views, **self.draw_noise(mask_keys, blocks * length)}

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
        """Compare predicted with target features, averaged over the patches of all blocks.

        Arguments and result as in methods/base.py. Metrics are the loss, the mean numbers of
        context patches and of target patches per block, and those of further terms, see
        common/latent_prediction.py.

        Source: paper section 3; official `src/train.py` (smooth L1, where the paper has L2).
        """
        mask = views["target_mask"]
        forward = self.forward(params, target, images, views)
        loss = LOSSES[self.loss](forward["predictions"], forward["targets"], mask)
        terms = self.regularization_terms(forward["visible"], step, views["visible_mask"])
        if self.context_weight:
            terms |= self._context_terms(forward, views)
        loss = self.add_terms(loss, terms, step)
        return loss, {
            "loss": loss,
            "context_patches": views["visible_mask"].sum(axis=1).mean(dtype=jnp.float32),
            "target_patches": mask.sum(axis=2).mean(dtype=jnp.float32),
            **terms,
        }

    def _context_terms(self, forward: dict[str, Array], views: Views) -> Metrics:
        """The loss on context patches; each block predicts them beside its own patches."""
        rows, blocks, length = views["targets"].shape
        return self.context_terms(
            forward["context_predictions"],
            jnp.repeat(forward["context_targets"], blocks, axis=0),
            jnp.repeat(views["visible"], blocks, axis=0),
            views["targets"].reshape(rows * blocks, length),
            jnp.repeat(views["visible_mask"], blocks, axis=0),
            views["target_mask"].reshape(rows * blocks, length),
        )

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Array]:
        """Compute predictions and targets; arguments as in `loss_fn`.

        Returns:
          predictions, targets: [R, blocks, T, W], meaningless where views["target_mask"] is false.
          visible: [R, K, D], the encoder's tokens of the context.
          context_predictions: [R * blocks, K, W], those that each block makes of the context.
          context_targets: [R, K, W], of the context.
        """
        patches = patchify(images, self.grid, self.patch_size)
        index = views["targets"]
        tokens = self._encode_context(params, patches, views)
        predictions = self._predict(params, tokens, views)
        teacher = self.teacher(params, target)
        targets = self._encode_targets(teacher, patches)
        block_targets = masking.take(targets, index.reshape(len(index), -1))
        shape = (*index.shape, self.target_width)
        context = tokens.shape[1]
        return {
            "predictions": predictions[:, context:].reshape(shape),
            "targets": block_targets.reshape(shape),
            "visible": tokens,
            "context_predictions": predictions[:, :context],
            "context_targets": masking.take(targets, views["visible"]),
        }

    def _encode_context(
        self, params: Params, patches: Float[Array, "B N P"], views: Views
    ) -> Float[Array, "R K D"]:
        """Apply the online encoder to the context patches."""
        context = views["visible"]
        tokens, _ = self._encoder.apply(
            {"params": params["encoder"]},
            masking.take(patches, context),
            masking.take(self._positions(params["encoder"]), context),
            views["visible_mask"],
        )
        return tokens

    def _predict(
        self, params: Params, tokens: Float[Array, "R K D"], views: Views
    ) -> Float[Array, "R*blocks K+T W"]:
        """Predict the features of target blocks, each from the context alone: one row per block.

        The features of the context come first.
        """
        batch, blocks, length = views["targets"].shape
        positions = sincos_positions(self.grid, self.decoder_width, integer=True)
        positions = jnp.asarray(positions)[None]
        target_positions = masking.take(positions, views["targets"].reshape(batch * blocks, length))
        context_mask = jnp.repeat(views["visible_mask"], blocks, axis=0)
        mask = jnp.concatenate([context_mask, views["target_mask"].reshape(-1, length)], axis=1)
        context_positions = masking.take(positions, views["visible"])
        noise = views.get("noise")
        if noise is not None:
            noise = noise.reshape(batch * blocks, length, self.width)
        return self._predictor.apply(
            {"params": params["predictor"]},
            jnp.repeat(tokens, blocks, axis=0),
            jnp.repeat(context_positions, blocks, axis=0),
            target_positions,
            mask,
            noise,
        )

    def _encode_targets(
        self, teacher: Params, patches: Float[Array, "B N P"]
    ) -> Float[Array, "B N W"]:
        """Apply the teacher to whole images: normalized features of the patches."""
        tokens = self.encode_targets(teacher, patches)
        if not self.target_layers:
            tokens = normalization.standardize_tokens(tokens, 1e-5)
        return tokens[:, int(self.target_has_cls) :]

    def _positions(self, encoder: Params) -> Float[Array, "1 N D"]:
        """Compute the positions of the training grid: fixed, the same for every encoder."""
        del encoder
        return jnp.asarray(sincos_positions(self.grid, self.width, integer=True))[None]

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Positions of an image of any grid span the range of the training grid."""
        del params
        positions = sincos_positions(grid, self.width, self.grid, integer=True)
        return jnp.asarray(positions)[None]
