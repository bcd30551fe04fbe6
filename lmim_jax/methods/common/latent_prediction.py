"""Options that the methods which predict latents share; all of them are off in the papers' recipes.

  masks_per_image   several masks share one pass of the teacher (data2vec 2.0, arXiv 2212.07525)
  position_noise    mask tokens are random instead of learned (StoP, arXiv 2308.00566)
  context_weight    a loss on the visible patches, see context_loss.py (V-JEPA 2.1)
  sigreg_weight     the encoder's features become Gaussian, see sigreg.py (LeJEPA)
  variance_weight   the encoder's features keep a spread of 1, see sigreg.py (VICReg)

Of methods with several masks per image, all arrays that are about masks have one row per mask; the
rows of an image follow each other.

Letters: R rows, one per mask; V visible patches, M masked patches, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmim_jax.methods.base import Metrics
from lmim_jax.methods.common import context_loss, sigreg
from lmim_jax.methods.common.checks import check_choice, check_range
from lmim_jax.methods.common.targets import TargetMethod

NOISE_STREAM = 1 << 16  # random numbers of position noise are no others' of the same key


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPrediction(TargetMethod):
    """A method that predicts latents of masked patches; the fields are explained in its recipe."""

    masks_per_image: int
    position_noise: float
    context_weight: float
    context_warmup: float
    sigreg_weight: float
    sigreg_directions: int
    variance_weight: float
    regularized: str

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_range("masks_per_image", self.masks_per_image, 1)
        check_range("position_noise", self.position_noise, 0)
        check_range("context_weight", self.context_weight, 0)
        check_range("context_warmup", self.context_warmup, 0, 1)
        check_range("sigreg_weight", self.sigreg_weight, 0)
        check_range("sigreg_directions", self.sigreg_directions, 1)
        check_range("variance_weight", self.variance_weight, 0)
        check_choice("regularized", self.regularized, ("images", "patches"))

    def mask_keys(self, keys: Key[Array, " B"]) -> Key[Array, " R"]:
        """Derive the random keys of masks from those of images; a single mask has the same."""
        if self.masks_per_image == 1:
            return keys
        return jax.vmap(lambda key: jax.random.split(key, self.masks_per_image))(keys).ravel()

    def draw_noise(self, keys: Key[Array, " R"], num_masked: int) -> dict[str, Array]:
        """Draw what mask tokens are made of, {"noise": [R, M, D]}; {} without position noise.

        The decoder embeds it with the linear layer that embeds tokens.

        Args:
          keys: of masks.
          num_masked: M, patches to predict.
        """
        if not self.position_noise:
            return {}

        def draw(key: Array) -> Float[Array, "M D"]:
            key = jax.random.fold_in(key, NOISE_STREAM)
            return self.position_noise * jax.random.normal(key, (num_masked, self.width))

        return {"noise": jax.vmap(draw)(keys)}

    def context_terms(
        self,
        predictions: Float[Array, "R V _"],
        targets: Float[Array, "R V _"],
        visible: Int[Array, "R V"],
        masked: Int[Array, "R M"],
        visible_mask: Bool[Array, "R V"] | None = None,
        mask: Bool[Array, "R M"] | None = None,
    ) -> Metrics:
        """{"context_loss"}, before its weight; see context_loss.py."""
        distances = context_loss.nearest_masked(visible, masked, self.grid, mask)
        loss = context_loss.context_loss(predictions, targets, distances, visible_mask)
        return {"context_loss": loss}

    def regularization_terms(
        self,
        tokens: Float[Array, "R V D"],
        step: int | Int[Array, ""],
        mask: Bool[Array, "R V"] | None = None,
    ) -> Metrics:
        """{"sigreg", "variance_hinge"} of the encoder's tokens, those that have a weight.

        Args:
          tokens: of visible patches.
          step: 0-based optimizer step.
          mask: False for tokens that are padding; None: there are none.
        """
        if not self.sigreg_weight and not self.variance_weight:
            return {}
        tokens = tokens.astype(jnp.float32)
        if mask is None:
            mask = jnp.ones(tokens.shape[:2], bool)
        if self.regularized == "images":
            total = (tokens * mask[:, :, None]).sum(axis=1)
            features = total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
            weight = jnp.ones(len(features))
        else:
            features = tokens.reshape(-1, tokens.shape[-1])
            weight = mask.ravel().astype(jnp.float32)
        terms: Metrics = {}
        if self.sigreg_weight:
            directions = sigreg.step_directions(step, features.shape[1], self.sigreg_directions)
            terms["sigreg"] = sigreg.sigreg(features, directions, weight)
        if self.variance_weight:
            terms["variance_hinge"] = sigreg.variance_hinge(features, weight)
        return terms

    def add_terms(
        self, loss: Float[Array, ""], terms: Metrics, step: int | Int[Array, ""]
    ) -> Float[Array, ""]:
        """Add weighted terms to a loss.

        Args:
          loss: without them.
          terms: of `context_terms` and `regularization_terms`.
          step: 0-based optimizer step; the weight of the context loss rises on a line from 0.
        """
        warmup_steps = max(self.context_warmup * self.total_steps, 1)
        weights = {
            "context_loss": self.context_weight * jnp.minimum(step / warmup_steps, 1),
            "sigreg": self.sigreg_weight,
            "variance_hinge": self.variance_weight,
        }
        for name, value in terms.items():
            loss = loss + weights[name] * value
        return loss
