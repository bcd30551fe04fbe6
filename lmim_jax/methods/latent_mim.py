"""Latent Masked Image Modeling (Wei, Gupta, Morgado; ECCV 2024; arXiv 2407.15837).

An online ViT sees V visible patches, a target ViT (an EMA of it) the M masked ones; a decoder predicts each masked
latent from the visible ones, and each prediction must pick its own target among those of the same image.
The paper's four challenges, and the switch of each remedy:

  joint optimisation     target: ema | joint | stop_gradient | random | random_projection
  direct regression      loss: patch_infonce | norm_l2 | mse | l1 | smooth_l1; tau; standardize
  correlated patches     num_visible, gap, target_patches, similarity_weight
  weak conditioning      decoder: cross | self; visual_cues; projector_depth, projector_width
Letters: B batch, N patches, V visible, M masked, P pixels of a patch, D width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lmim_jax.methods.base import check_choice, check_heads, check_range
from lmim_jax.methods.common import losses, masking
from lmim_jax.models import vit
from lmim_jax.models.decoders import LatentDecoder
from lmim_jax.models.layers import Dense, patchify, sincos_positions
from lmim_jax.optim import schedules


@dataclasses.dataclass(frozen=True)
class Method:
    """Latent MIM; the fields are `config.method`, explained key by key in configs/vit_b.py.

    """

    grid: tuple[int, int]
    patch_size: int
    gap: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    projector_depth: int
    projector_width: int
    decoder: str
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    visual_cues: bool
    num_visible: int
    target: str
    target_patches: str
    loss: str
    tau: float
    standardize: bool
    similarity_weight: float
    similarity_start: float
    similarity_end: float
    momentum_start: float
    momentum_end: float
    dtype: str
    attention: str
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self):
        check_choice(
            "target", self.target, ("ema", "joint", "stop_gradient", "random", "random_projection")
        )
        check_choice("target_patches", self.target_patches, ("masked", "all"))
        check_choice("loss", self.loss, ("patch_infonce", *losses.REGRESSION))
        check_choice("decoder", self.decoder, ("cross", "self"))
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("attention", self.attention, ("xla", "cudnn"))
        check_range("gap", self.gap, 0)
        check_range("tau", self.tau, 1e-6)
        check_range("num_visible", self.num_visible, 1, self.num_patches - 2)
        check_heads("", self.width, self.heads)
        check_heads("decoder_", self.decoder_width, self.decoder_heads)

    @property
    def num_patches(self):
        """N, patches of the grid."""
        return math.prod(self.grid)

    @property
    def image_size(self):
        """(height, width) in pixels of the images that `loss` takes: grid x (patch + gap)."""
        return tuple(n * (self.patch_size + self.gap) for n in self.grid)

    @property
    def feature_size(self):
        """(height, width) in pixels of the images that `features` is evaluated on: grid x patch, without gap."""
        return tuple(n * self.patch_size for n in self.grid)

    # -- modules: plain Linen, applied to one sub-tree of params each

    @property
    def _blocks(self):
        dtype = jnp.dtype(self.dtype)
        return dict(
            mlp_ratio=self.mlp_ratio, norm_eps=self.norm_eps, dtype=dtype, attention=self.attention
        )

    @property
    def _encoder(self):
        return vit.ViT(width=self.width, depth=self.depth, heads=self.heads, **self._blocks)

    @property
    def _projector(self):
        return vit.Projector(
            depth=self.projector_depth,
            hidden=self.projector_width,
            dtype=jnp.dtype(self.dtype),
        )

    @property
    def _decoder(self):
        return LatentDecoder(
            kind=self.decoder,
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=self.width,
            visual_cues=self.visual_cues,
            **self._blocks,
        )

    @property
    def _target_embed(self):
        return Dense(self.width, jnp.dtype(self.dtype))

    # -- the contract

    def init(self, rng):
        """Fresh parameters, float32: encoder, projector, decoder (and target_embed for the random projection)."""
        keys = jax.random.split(rng, 4)
        pixels = self.patch_size**2 * self.channels
        visible, positions = (
            jnp.zeros((1, self.num_visible, pixels)),
            jnp.zeros((1, self.num_visible, self.width)),
        )
        tokens = jnp.zeros((1, self.num_visible + 1, self.width))
        split = self.num_visible, self.num_patches - self.num_visible
        latent = [jnp.zeros((1, count, self.decoder_width)) for count in split]
        params = {
            "encoder": self._encoder.init(keys[0], visible, positions)["params"],
            "projector": self._projector.init(keys[1], tokens).get("params", {}),
            "decoder": self._decoder.init(keys[2], tokens, *latent)["params"],
        }
        if (
            self.target == "random_projection"
        ):  # "embed" in the name: neither decay nor gradient ever changes it
            params["target_embed"] = self._target_embed.init(keys[3], visible)["params"]
        return params

    def sample(self, rng, keys):
        """Draw visible [B, V] and masked [B, M] patch ids and window offsets [B, h, w, 2] (none without gap)."""
        del rng  # nothing is shared by the batch
        mask_keys, window_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        split = lambda key: masking.random_split(key, self.num_patches, self.num_visible)
        visible, masked = jax.vmap(split)(mask_keys)
        views = {"visible": visible, "masked": masked}
        if self.gap:
            views["offsets"] = jax.vmap(
                lambda key: masking.window_offsets(key, self.grid, self.gap)
            )(window_keys)
        return views

    def target_of(self, params):
        """What the teacher is made of: encoder and projector, a frozen embedding, or nothing."""
        if self.target in ("ema", "random"):
            return {"encoder": params["encoder"], "projector": params["projector"]}
        return (
            {"target_embed": params["target_embed"]} if self.target == "random_projection" else {}
        )

    def ema_rate(self, step):
        """1 - momentum after optimiser step `step`.

        The official code updates the teacher before the forward pass with that iteration's momentum, which is the
        update after step s with the momentum of s + 1.
        """
        if self.target != "ema":
            return 0.0
        return schedules.cosine(
            1 - self.momentum_start, 1 - self.momentum_end, (step + 1) / self.total_steps
        )

    def loss_fn(self, params, target, images, views, step):
        """The training loss of a batch.

        Args:
          params: as from `init`.
          target: as from `target_of`, the teacher's weights.
          images: [B, H, W, C] float, normalised, H x W = `image_size`.
          views: as from `sample`.
          step: optimiser step, for the similarity schedule.

        Returns:
          (loss, metrics), float32 scalars: the reconstruction term, the three similarities, patch accuracy and chance.
        """
        forward = self.forward(params, target, images, views)
        predictions, targets = (
            forward["predictions"][:, 1:],
            forward["targets"][:, -views["masked"].shape[1] :],
        )
        compared = losses.standardize_over_patches(predictions) if self.standardize else predictions
        logits = losses.discrimination_logits(compared, targets, self.tau)
        if self.loss == "patch_infonce":
            reconstruction = losses.patch_infonce(logits, self.tau)
        else:
            reconstruction = losses.REGRESSION[self.loss](predictions, targets)
        of_predictions, of_visible = (
            losses.similarity(predictions),
            losses.similarity(forward["visible"][:, 1:]),
        )
        goal = schedules.cosine(self.similarity_start, self.similarity_end, step / self.total_steps)
        constraint = (of_predictions - goal) ** 2 + (of_visible - goal) ** 2
        loss = reconstruction + self.similarity_weight * constraint
        return loss, {
            "loss": loss,
            "reconstruction": reconstruction,
            "similarity_predictions": of_predictions,
            "similarity_visible": of_visible,
            "similarity_targets": losses.similarity(targets),
            "patch_accuracy": losses.patch_accuracy(logits),
            "patch_chance": jnp.float32(1 / logits.shape[-1]),
        }

    def forward(self, params, target, images, views):
        """The three sets of tokens behind the loss, CLS first where there is one.

        Returns:
          visible [B, 1 + V, D] projected online tokens; targets [B, 1 + M, D] (masked) or [B, 1 + V + M, D] (all, the
          masked ones last) projected target tokens, [B, V + M, D] without CLS for random_projection;
          predictions [B, 1 + M, D].
        """
        visible, masked, offsets = views["visible"], views["masked"], views.get("offsets")
        patches = patchify(images, self.grid, self.patch_size, self.gap, offsets)
        tokens = self._encode(params, masking.take(patches, visible), visible)
        seen = (
            masked
            if self.target_patches == "masked"
            else jnp.concatenate([visible, masked], axis=1)
        )
        targets = self._targets(params, target, masking.take(patches, seen), seen)
        positions = sincos_positions(self.grid, self.decoder_width)[None]
        predictions = self._decoder.apply(
            {"params": params["decoder"]},
            tokens,
            masking.take(positions, visible),
            masking.take(positions, masked),
        )
        return {"visible": tokens, "targets": targets, "predictions": predictions}

    def _encode(self, params, patches, index):
        """Encoder and projector on chosen patches [B, T, P] with ids [B, T]: [B, 1 + T, D]."""
        positions = masking.take(sincos_positions(self.grid, self.width)[None], index)
        tokens, _ = self._encoder.apply({"params": params["encoder"]}, patches, positions)
        return self._projector.apply({"params": params["projector"]}, tokens)

    def _targets(self, params, target, patches, index):
        """The latents to predict; gradient flows through them for `joint` only."""
        if self.target == "joint":
            return self._encode(params, patches, index)
        if self.target == "random_projection":
            return jax.lax.stop_gradient(
                self._target_embed.apply({"params": target["target_embed"]}, patches)
            )
        weights = params if self.target == "stop_gradient" else target
        return jax.lax.stop_gradient(self._encode(jax.lax.stop_gradient(weights), patches, index))

    def features(self, params, images, rng=None):
        """What evaluators see: tokens of full images, without gap, mask or projector.

        Args:
          params: with "encoder" and, for "latents", what the latents to predict are made by.
          images: [B, H, W, C], H and W multiples of the patch size; positions span the training grid's range.

        Returns:
          See `vit.features`; and latents [B, N, D], what predictions are compared with.
        """
        del rng
        grid = tuple(size // self.patch_size for size in images.shape[1:3])
        positions = jnp.asarray(sincos_positions(grid, self.width, self.grid))[None]
        patches = patchify(images, grid, self.patch_size)
        out = vit.features(self._encoder, params["encoder"], patches, positions)
        if self.target == "random_projection":
            return {
                **out,
                "latents": self._target_embed.apply({"params": params["target_embed"]}, patches),
            }
        return {
            **out,
            "latents": self._projector.apply({"params": params["projector"]}, out["patches"]),
        }
