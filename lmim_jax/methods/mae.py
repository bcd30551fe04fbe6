"""Masked Autoencoders (He et al., CVPR 2022; arXiv 2111.06377): the pixels of masked patches from a few visible ones.

No teacher. Letters: B batch, N patches, V visible, M masked, P pixels of a patch, D encoder width, d decoder width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lmim_jax.methods.base import check_choice, check_heads, check_range, check_sampler
from lmim_jax.methods.common import losses, masking
from lmim_jax.models import normalization, vit
from lmim_jax.models.decoders import TokenDecoder
from lmim_jax.models.layers import patchify, replace_patches, sincos_positions


@dataclasses.dataclass(frozen=True)
class Method:
    """MAE; the fields are `config.method`, explained key by key in configs/mae_vit_b.py."""

    grid: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    sampler: str
    mask_ratio: float
    norm_pix: bool
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
        dtype = jnp.dtype(self.dtype)
        return dict(
            mlp_ratio=self.mlp_ratio, norm_eps=self.norm_eps, dtype=dtype, attention=self.attention
        )

    @property
    def _encoder(self):
        return vit.ViT(width=self.width, depth=self.depth, heads=self.heads, **self._blocks)

    @property
    def _decoder(self):
        pixels = self.patch_size**2 * self.channels
        return TokenDecoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=pixels,
            **self._blocks,
        )

    def init(self, rng):
        """Fresh parameters, float32: encoder and decoder."""
        keys = jax.random.split(rng)
        patches, positions = (
            jnp.zeros((1, 1, self.patch_size**2 * self.channels)),
            jnp.zeros((1, 1, self.width)),
        )
        token, place = jnp.zeros((1, 1, self.width)), jnp.zeros((1, 1, self.decoder_width))
        return {
            "encoder": self._encoder.init(keys[0], patches, positions)["params"],
            "decoder": self._decoder.init(keys[1], token, place, place)["params"],
        }

    def sample(self, rng, keys):
        """Draw visible [B, V] and masked [B, M] patch ids."""
        del rng
        split = masking.SPLITS[self.sampler]
        visible, masked = jax.vmap(lambda key: split(key, self.grid, self.mask_ratio))(keys)
        return {"visible": visible, "masked": masked}

    def target_of(self, params):
        """Nothing: there is no teacher."""
        del params
        return {}

    def ema_rate(self, step):
        """0: there is no teacher."""
        del step
        return 0.0

    def loss_fn(self, params, target, images, views, step):
        """Mean squared error of masked pixels, each patch normalised before if `norm_pix`.

        Args and result as in methods/latent_mim.py; images [B, H, W, C], H x W = `image_size`.
        Source: paper section 3; official `forward_loss`.
        """
        del step
        masked = views["masked"]
        predictions = self.forward(params, target, images, views)["pixels"][:, -masked.shape[1] :]
        pixels = masking.take(patchify(images, self.grid, self.patch_size), masked)
        loss = (losses.norm_l2 if self.norm_pix else losses.mse)(predictions, pixels)
        return loss, {"loss": loss, "pixel_loss": loss}

    def forward(self, params, target, images, views):
        """pixels [B, V + M, P]: predictions for the visible patches, then for the masked ones."""
        del target
        visible, masked = views["visible"], views["masked"]
        patches = masking.take(patchify(images, self.grid, self.patch_size), visible)
        positions = masking.take(
            sincos_positions(self.grid, self.width, integer=True)[None], visible
        )
        tokens, _ = self._encoder.apply({"params": params["encoder"]}, patches, positions)
        positions = sincos_positions(self.grid, self.decoder_width, integer=True)[None]
        known = jnp.pad(
            masking.take(positions, visible), ((0, 0), (1, 0), (0, 0))
        )  # CLS: position zero
        out = self._decoder.apply(
            {"params": params["decoder"]}, tokens, known, masking.take(positions, masked)
        )
        return {"pixels": out[:, 1:]}

    def reconstruct(self, params, images, views):
        """The images with their masked patches as predicted, see methods/base.py."""
        masked = views["masked"]
        pixels = self.forward(params, {}, images, views)["pixels"][:, -masked.shape[1] :].astype(
            jnp.float32
        )
        if self.norm_pix:
            mean, deviation = normalization.token_moments(
                masking.take(patchify(images, self.grid, self.patch_size), masked)
            )
            pixels = pixels * deviation + mean
        return replace_patches(images, masked, pixels, self.grid, self.patch_size)

    def features(self, params, images, rng=None):
        """Tokens of full images, see `vit.features`; H and W multiples of the patch size."""
        del rng
        grid = tuple(size // self.patch_size for size in images.shape[1:3])
        positions = sincos_positions(grid, self.width, self.grid, integer=True)[None]
        return vit.features(
            self._encoder,
            params["encoder"],
            patchify(images, grid, self.patch_size),
            jnp.asarray(positions),
        )
