"""PiLaMIM (Lee et al., NeurIPS 2024 workshop on self-supervised learning; arXiv 2501.03005): pixels, latents and CLS.

One encoder sees a few visible patches; a pixel decoder predicts the masked pixels as in MAE, a latent decoder what an
EMA encoder makes of the whole image, CLS included.
Letters: B batch, N patches, V visible, M masked, P pixels of a patch, D encoder width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lmim_jax.methods.base import check_choice, check_heads, check_range, check_sampler
from lmim_jax.methods.common import losses, masking
from lmim_jax.models import initializers, vit
from lmim_jax.models.decoders import TokenDecoder
from lmim_jax.models.layers import patchify, replace_patches, resample_positions
from lmim_jax.optim import schedules


@dataclasses.dataclass(frozen=True)
class Method:
    """PiLaMIM; the fields are `config.method`, explained key by key in configs/pilamim_vit_b.py."""

    grid: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    final_norm_eps: float
    qkv_bias: bool
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    latent_decoder_width: int
    sampler: str
    mask_ratio: float
    align_targets: bool
    pixel_weight: float
    latent_weight: float
    cls_weight: float
    momentum_start: float
    momentum_end: float
    dtype: str
    attention: str
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("attention", self.attention, ("xla", "cudnn"))
        check_range("mask_ratio", self.mask_ratio, 1 / self.num_patches, 1 - 1 / self.num_patches)
        check_sampler(self)
        check_heads("", self.width, self.heads)
        check_heads("decoder_", self.decoder_width, self.decoder_heads)
        check_heads("latent_decoder_", self.latent_decoder_width, self.decoder_heads)

    @property
    def num_patches(self):
        """N, patches of the grid."""
        return math.prod(self.grid)

    @property
    def image_size(self):
        """(height, width) in pixels of the images that `loss` takes."""
        return tuple(n * self.patch_size for n in self.grid)

    feature_size = image_size

    @property
    def _blocks(self):
        kernel = dict(dtype=jnp.dtype(self.dtype), attention=self.attention, qkv_bias=self.qkv_bias)
        return dict(mlp_ratio=self.mlp_ratio, norm_eps=self.norm_eps, **kernel)

    @property
    def _encoder(self):
        return vit.ViT(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            final_norm_eps=self.final_norm_eps,
            **self._blocks,
        )

    @property
    def _decoders(self):
        """{name: (module, width)} of the two."""
        shared = dict(
            self._blocks, depth=self.decoder_depth, heads=self.decoder_heads, final_norm=False
        )
        pixel_decoder = TokenDecoder(
            width=self.decoder_width, out_width=self.patch_size**2 * self.channels, **shared
        )
        latent_decoder = TokenDecoder(
            width=self.latent_decoder_width, out_width=self.width, **shared
        )
        return {
            "pixel_decoder": (pixel_decoder, self.decoder_width),
            "latent_decoder": (latent_decoder, self.latent_decoder_width),
        }

    def init(self, rng):
        """Fresh parameters, float32: encoder and two decoders, each with its learned `positions` [1, slots, width]."""
        keys = jax.random.split(rng, 7)
        patches, token = (
            jnp.zeros((1, 1, self.patch_size**2 * self.channels)),
            jnp.zeros((1, 1, self.width)),
        )
        params = {"encoder": self._encoder.init(keys[0], patches, token)["params"]}
        for key, (name, (decoder, width)) in zip(keys[1:3], self._decoders.items(), strict=True):
            place = jnp.zeros((1, 1, width))
            params[name] = decoder.init(key, token, place, place)["params"]
        params = initializers.torch_default(keys[3], params)
        slots = {"encoder": (self.num_patches, self.width)}  # its CLS has no position
        slots |= {
            name: (1 + self.num_patches, width) for name, (_, width) in self._decoders.items()
        }
        for key, (name, shape) in zip(keys[4:], slots.items(), strict=True):
            params[name]["positions"] = 0.02 * jax.random.normal(key, (1, *shape))
        return params

    def sample(self, rng, keys):
        """Draw visible [B, V] and masked [B, M] patch ids; without align_targets, the order [B, N] of targets too."""
        del rng
        split = masking.SPLITS[self.sampler]
        mask_keys, order_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        visible, masked = jax.vmap(lambda key: split(key, self.grid, self.mask_ratio))(mask_keys)
        views = {"visible": visible, "masked": masked}
        if not self.align_targets:
            views["order"] = jax.vmap(lambda key: jax.random.permutation(key, self.num_patches))(
                order_keys
            )
        return views

    def target_of(self, params):
        """The teacher is an EMA of the encoder, learned positions included."""
        return {"encoder": params["encoder"]}

    def ema_rate(self, step):
        """1 - momentum, which rises along a line; schedule[s] after step s, as in the released code."""
        return schedules.linear(
            1 - self.momentum_start, 1 - self.momentum_end, step / self.total_steps
        )

    def loss_fn(self, params, target, images, views, step):
        """pixel_weight x pixel + latent_weight x latent + cls_weight x cls, each a mean squared error.

        Args and result as in methods/latent_mim.py; images [B, H, W, C], H x W = `image_size`.
        The first two are sums over masked patches divided by mask_ratio x N, not by M, as in the released code.
        Source: paper section 3; official `pretrain.py`.
        """
        del step
        masked = views["masked"]
        count = masked.shape[1]
        forward = self.forward(params, target, images, views)
        pixels = masking.take(patchify(images, self.grid, self.patch_size), masked)
        places = (
            masked if self.align_targets else jnp.take_along_axis(views["order"], masked, axis=1)
        )
        targets = masking.take(forward["targets"][:, 1:], places)
        predictions = forward["latents"][:, -count:]
        scale = count / (self.num_patches * self.mask_ratio)
        pixel = scale * losses.mse(forward["pixels"][:, -count:], pixels)
        latent = scale * losses.mse(predictions, targets)
        cls = losses.mse(forward["latents"][:, 0], forward["targets"][:, 0])
        loss = self.pixel_weight * pixel + self.latent_weight * latent + self.cls_weight * cls
        return loss, {
            "loss": loss,
            "pixel_loss": pixel,
            "latent_loss": latent,
            "cls_loss": cls,
            "similarity_predictions": losses.similarity(predictions),
            "similarity_targets": losses.similarity(targets),
        }

    def forward(self, params, target, images, views):
        """Predictions and targets.

        Returns:
          pixels [B, V + M, P] and latents [B, 1 + V + M, D], the masked patches last, CLS first; targets [B, 1 + N, D]
          of the teacher, CLS first, in the order of the grid.
        """
        visible, masked = views["visible"], views["masked"]
        patches = patchify(images, self.grid, self.patch_size)
        places = params["encoder"]["positions"]
        seen = masking.take(patches, visible), masking.take(places, visible)
        tokens, _ = self._encoder.apply({"params": params["encoder"]}, *seen)
        out = {}
        for name, (decoder, _) in self._decoders.items():
            positions = params[name]["positions"]
            cls = jnp.broadcast_to(positions[:, :1], (len(tokens), 1, positions.shape[-1]))
            known = jnp.concatenate([cls, masking.take(positions[:, 1:], visible)], axis=1)
            hidden = masking.take(positions[:, 1:], masked)
            out[name] = decoder.apply({"params": params[name]}, tokens, known, hidden)
        teacher = jax.lax.stop_gradient(target["encoder"])
        targets, _ = self._encoder.apply({"params": teacher}, patches, teacher["positions"])
        return {
            "pixels": out["pixel_decoder"][:, 1:],
            "latents": out["latent_decoder"],
            "targets": targets,
        }

    def reconstruct(self, params, images, views):
        """The images with their masked patches as predicted, see methods/base.py."""
        masked = views["masked"]
        pixels = self.forward(params, self.target_of(params), images, views)["pixels"][
            :, -masked.shape[1] :
        ]
        return replace_patches(images, masked, pixels, self.grid, self.patch_size)

    def features(self, params, images, rng=None):
        """Tokens of full images, see `vit.features`; H and W multiples of the patch size."""
        del rng
        grid = tuple(size // self.patch_size for size in images.shape[1:3])
        positions = resample_positions(params["encoder"]["positions"], self.grid, grid)
        return vit.features(
            self._encoder, params["encoder"], patchify(images, grid, self.patch_size), positions
        )
