"""After SymMIM (Nguyen and Park, ICPR 2024; arXiv 2408.12772): two fixed checkerboards as masks.

An online ViT sees an image with every second patch hidden, a momentum ViT, its EMA, the same image
with every second cell of larger ones hidden. The online ViT predicts the pixels of its hidden
patches, and its image must be found among those of the batch by what the momentum ViT makes of it.
No share of hidden patches has to be chosen: it is a half at both scales, and the mirror image of
every hidden patch, left-right or up-down, is visible.

The authors have released no code. Known of the paper is what is above (the sizes of the cells from
summaries by others), and that the contrast is MoCo v3's, with a predictor behind the online
projector alone. Everything else is a choice made here, with its reason in
configs/symmim_vit_b.py: results are not those of the paper.

Hidden patches are replaced by a mask token and not left out, as in SimMIM (arXiv 2111.09886).

The contrast is one of the whole batch on all devices: the loss is no mean over images, and gradient
accumulation would change it.

Letters: B batch, H W image height and width, C channels, N patches, h w rows and columns of the
grid, V visible, M masked, P pixels of a patch, D width, O width of projections.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.base import Metrics, Params, Views, ViTMethod
from lmim_jax.methods.common import contrast, losses, masking
from lmim_jax.methods.common.checks import check_range
from lmim_jax.models import vit
from lmim_jax.models.heads import PatchMLP
from lmim_jax.models.layers import patchify, replace_patches, sincos_positions
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(ViTMethod):
    """After SymMIM; the fields are `config.method`, see configs/symmim_vit_b.py."""

    cell: int
    momentum_cell: int
    contrast_weight: float
    tau: float
    projector_depth: int
    projector_width: int
    projection_width: int
    predictor_depth: int
    momentum_start: float
    momentum_end: float
    total_steps: int

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> bool:
        """Whether gradient accumulation would change the loss: always."""
        del options
        return True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.width % 4:
            raise UserError(
                f"config.method.width={self.width} must be divisible by 4 for positions"
            )
        for key in ("cell", "momentum_cell"):
            self._check_mirrors(key)
        for key in ("decoder_depth", "projector_depth", "projection_width", "predictor_depth"):
            check_range(key, getattr(self, key), 1)
        check_range("contrast_weight", self.contrast_weight, 0)
        check_range("tau", self.tau, 1e-6)
        check_range("momentum_start", self.momentum_start, 0, 1)
        check_range("momentum_end", self.momentum_end, 0, 1)

    def _check_mirrors(self, key: str) -> None:
        """Raise a UserError unless half is hidden and every mirror image of it is visible."""
        cell = getattr(self, key)
        check_range(key, cell, 1)
        period = 2 * cell
        if self.grid[0] % period or self.grid[1] % period:
            raise UserError(
                f"config.method.grid={self.grid} with {key}={cell}: rows and columns must be "
                f"divisible by {period}, so that half of the patches are hidden and their mirror "
                "images are not; give another grid, such as (16, 16), 256 pixels in patches of 16"
            )

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(cls=False, **self.encoder_options)

    @property
    def _decoder(self) -> PatchMLP:
        return PatchMLP(
            depth=self.decoder_depth,
            hidden=self.decoder_width,
            features=self.patch_dim,
            dtype=self.compute_dtype,
        )

    @property
    def _projector(self) -> contrast.BatchNormMLP:
        return self._contrast_layers(self.projector_depth)

    @property
    def _predictor(self) -> contrast.BatchNormMLP:
        return self._contrast_layers(self.predictor_depth)

    def _contrast_layers(self, depth: int) -> contrast.BatchNormMLP:
        return contrast.BatchNormMLP(
            depth=depth,
            hidden=self.projector_width,
            features=self.projection_width,
            dtype=self.compute_dtype,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder, mask token, decoder, projector, predictor."""
        keys = jax.random.split(rng, 5)
        patches = jnp.zeros((1, 1, self.patch_dim))
        tokens = jnp.zeros((1, 1, self.width))
        projections = jnp.zeros((1, self.projection_width))
        return {
            "encoder": self._encoder.init(keys[0], patches, tokens)["params"],
            "mask": {"token": 0.02 * jax.random.normal(keys[1], (1, 1, self.width))},
            "decoder": self._decoder.init(keys[2], tokens)["params"],
            "projector": self._projector.init(keys[3], tokens[0])["params"],
            "predictor": self._predictor.init(keys[4], projections)["params"],
        }

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Return visible [B, V] and masked [B, M] patch ids of the online encoder.

        They are always the same: nothing is drawn.
        """
        del rng
        hidden = masking.checkerboard(self.grid, self.cell)
        views = {}
        for name, mask in (("visible", ~hidden), ("masked", hidden)):
            ids = jnp.asarray(np.flatnonzero(mask), jnp.int32)[None]
            views[name] = jnp.broadcast_to(ids, (len(keys), ids.shape[1]))
        return views

    def target_of(self, params: Params) -> Params:
        """Select what the momentum branch consists of: all but decoder and predictor."""
        return {name: params[name] for name in ("encoder", "mask", "projector")}

    def ema_rate(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`: half a cosine in training progress."""
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
        """Compute the mean absolute error of hidden pixels plus the weighted contrast.

        Args:
          params: as returned by `init`.
          target: weights of the momentum branch, as returned by `target_of`.
          images: normalized, H x W = `image_size`.
          views: as returned by `sample`.
          step: not used.

        Returns:
          (loss, metrics), float32 scalars. Metrics are the loss, its two terms, and how often the
          own image is the most similar one, with its chance, one by the images of the whole batch.
        """
        del step
        forward = self.forward(params, target, images, views)
        pixel_loss = losses.l1(forward["pixels"], forward["pixel_targets"])
        logits, own = contrast.image_logits(forward["queries"], forward["keys"], self.tau)
        contrast_loss, accuracy = contrast.image_infonce(logits, own, self.tau)
        loss = pixel_loss + self.contrast_weight * contrast_loss
        return loss, {
            "loss": loss,
            "pixel_loss": pixel_loss,
            "contrast_loss": contrast_loss,
            "image_accuracy": accuracy,
            "image_chance": jnp.float32(1 / logits.shape[1]),
        }

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Float[Array, "B ..."]]:
        """Compute everything that the loss is made of; arguments as in `loss_fn`.

        Returns:
          pixels, pixel_targets: [B, M, P], of the patches that are hidden from the online encoder.
          queries: [B, O], of the online branch; keys: [B, O], of the momentum branch, without
            gradient.
        """
        del views  # always the same
        patches = patchify(images, self.grid, self.patch_size)
        tokens = self._encode(params, patches, self.cell)
        projected = self._project(params, tokens)
        teacher = jax.lax.stop_gradient(target)
        keys = self._project(teacher, self._encode(teacher, patches, self.momentum_cell))
        return {
            "pixels": self._decode(params, tokens),
            "pixel_targets": patches[:, masking.checkerboard(self.grid, self.cell)],
            "queries": self._predictor.apply({"params": params["predictor"]}, projected),
            "keys": keys,
        }

    def _encode(
        self, weights: Params, patches: Float[Array, "B N P"], cell: int
    ) -> Float[Array, "B N D"]:
        """Encode all patches, those under a checkerboard as mask tokens."""
        hidden = masking.checkerboard(self.grid, cell)[None, :, None]
        encoder = weights["encoder"]
        # A patch of zeros is embedded as the bias: with this added, it becomes the mask token
        replacement = weights["mask"]["token"] - encoder["patch_embed"]["bias"][None, None]
        positions = self.positions_of(weights, self.grid) + jnp.where(hidden, replacement, 0)
        tokens, _ = self._encoder.apply(
            {"params": encoder}, jnp.where(hidden, 0, patches), positions
        )
        return tokens

    def _decode(self, params: Params, tokens: Float[Array, "B N D"]) -> Float[Array, "B M P"]:
        """Predict the pixels of the patches that are hidden from the online encoder."""
        hidden = tokens[:, masking.checkerboard(self.grid, self.cell)]
        return self._decoder.apply({"params": params["decoder"]}, hidden)

    def _project(self, weights: Params, tokens: Float[Array, "B N D"]) -> Float[Array, "B O"]:
        """Project the mean over all tokens."""
        mean = tokens.astype(jnp.float32).mean(axis=1)
        return self._projector.apply({"params": weights["projector"]}, mean)

    def reconstruct(
        self, params: Params, images: Float[Array, "B H W C"], views: Views
    ) -> Float[Array, "B H W C"]:
        """Replace the hidden patches of images by the predictions, see methods/base.py."""
        patches = patchify(images, self.grid, self.patch_size)
        pixels = self._decode(params, self._encode(params, patches, self.cell))
        return replace_patches(images, views["masked"], pixels, self.grid, self.patch_size)

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Positions of an image of any grid span the range of the training grid."""
        del params
        positions = sincos_positions(grid, self.width, self.grid, integer=True)
        return jnp.asarray(positions)[None]
