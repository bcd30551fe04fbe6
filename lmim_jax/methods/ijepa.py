"""I-JEPA (Assran et al., CVPR 2023; arXiv 2301.08243): the features of a few blocks of an image from one context block.

No CLS. Letters: B batch, N patches, K context patches (padded), T target patches of a block (padded), D encoder width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lmim_jax.methods.base import check_choice, check_heads, check_range
from lmim_jax.methods.common import losses, masking
from lmim_jax.models import initializers, normalization, vit
from lmim_jax.models.decoders import TokenDecoder
from lmim_jax.models.layers import patchify, sincos_positions
from lmim_jax.optim import schedules

LOSSES = {"smooth_l1": losses.smooth_l1, "mse": losses.mse, "l1": losses.l1}


@dataclasses.dataclass(frozen=True)
class Method:
    """I-JEPA; the fields are `config.method`, explained key by key in configs/ijepa_vit_b.py."""

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
    blocks: int
    target_scale: tuple[float, float]
    target_aspect: tuple[float, float]
    context_scale: tuple[float, float]
    context_capacity: int
    min_context: int
    mask_batch: int
    biased_masks: bool
    loss: str
    momentum_start: float
    momentum_end: float
    dtype: str
    attention: str
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self):
        check_choice("loss", self.loss, LOSSES)
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("attention", self.attention, ("xla", "cudnn"))
        check_range("blocks", self.blocks, 1)
        check_range("mask_batch", self.mask_batch, 1)
        check_range("context_capacity", self.context_capacity, 1, self.num_patches)
        check_range("min_context", self.min_context, 0, self.context_capacity - 1)
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
        return vit.ViT(width=self.width, depth=self.depth, heads=self.heads, **self._blocks, cls=False)

    @property
    def _predictor(self):
        return TokenDecoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            out_width=self.width,
            **self._blocks,
        )

    @property
    def _masks(self):
        scales = dict(
            scale=self.target_scale, aspect=self.target_aspect, context_scale=self.context_scale
        )
        sizes = dict(
            capacity=self.context_capacity, min_context=self.min_context, group=self.mask_batch
        )
        return masking.Multiblock(
            self.grid, self.blocks, **scales, **sizes, biased=self.biased_masks
        )

    def init(self, rng):
        """Fresh parameters, float32: encoder and predictor."""
        keys = jax.random.split(rng, 3)
        patches, token = (
            jnp.zeros((1, 1, self.patch_size**2 * self.channels)),
            jnp.zeros((1, 1, self.width)),
        )
        place = jnp.zeros((1, 1, self.decoder_width))
        params = {
            "encoder": self._encoder.init(keys[0], patches, token)["params"],
            "predictor": self._predictor.init(keys[1], token, place, place)["params"],
        }
        return initializers.normal(keys[2], params)

    def sample(self, rng, keys):
        """Draw visible [B, K] and targets [B, blocks, T] patch ids, with a mask of each; `rng` gives block sizes."""
        return self._masks(rng, keys)

    def target_of(self, params):
        """The teacher is an EMA of the encoder."""
        return {"encoder": params["encoder"]}

    def ema_rate(self, step):
        """1 - momentum, which rises along a line; schedule[s] after step s, as in the released code."""
        return schedules.linear(
            1 - self.momentum_start, 1 - self.momentum_end, step / self.total_steps
        )

    def loss_fn(self, params, target, images, views, step):
        """Smooth L1 (or another) between predicted and target features, mean over patches of all blocks.

        Args and result as in methods/latent_mim.py; images [B, H, W, C], H x W = `image_size`.
        Source: paper section 3; official `src/train.py` (smooth L1, where the paper writes L2).
        """
        del step
        forward, mask = self.forward(params, target, images, views), views["target_mask"]
        loss = LOSSES[self.loss](forward["predictions"], forward["targets"], mask)
        return loss, {
            "loss": loss,
            "context_patches": views["visible_mask"].sum(axis=1).mean(dtype=jnp.float32),
            "target_patches": mask.sum(axis=2).mean(dtype=jnp.float32),
        }

    def forward(self, params, target, images, views):
        """predictions and targets [B, blocks, T, D]; where views["target_mask"] is false they mean nothing."""
        context, targets = views["visible"], views["targets"]
        batch, blocks, length = targets.shape
        patches = patchify(images, self.grid, self.patch_size)
        seen = (
            masking.take(patches, context),
            masking.take(self._positions(params["encoder"]), context),
        )
        tokens, _ = self._encoder.apply({"params": params["encoder"]}, *seen, views["visible_mask"])
        # The predictor sees the context and one block: blocks are images to it
        each = lambda x: jnp.repeat(x, blocks, axis=0)
        places = jnp.asarray(sincos_positions(self.grid, self.decoder_width, integer=True))[None]
        hidden = masking.take(places, targets.reshape(batch * blocks, length))
        mask = jnp.concatenate(
            [each(views["visible_mask"]), views["target_mask"].reshape(-1, length)], axis=1
        )
        known = each(tokens), each(masking.take(places, context))
        predictions = self._predictor.apply({"params": params["predictor"]}, *known, hidden, mask)[
            :, -length:
        ]
        teacher = jax.lax.stop_gradient(target["encoder"])
        whole, _ = self._encoder.apply({"params": teacher}, patches, self._positions(teacher))
        wanted = masking.take(normalization.standardize_tokens(whole, 1e-5), targets.reshape(batch, -1))
        shape = (batch, blocks, length, self.width)
        return {"predictions": predictions.reshape(shape), "targets": wanted.reshape(shape)}

    def _positions(self, encoder):
        """Position vectors [1, N, D] of the grid, fixed: the same for every encoder."""
        del encoder
        return jnp.asarray(sincos_positions(self.grid, self.width, integer=True))[None]

    def features(self, params, images, rng=None):
        """Tokens of full images, see `vit.features`; the paper evaluates those of the teacher (`params: target`)."""
        del rng
        grid = tuple(size // self.patch_size for size in images.shape[1:3])
        positions = jnp.asarray(sincos_positions(grid, self.width, self.grid, integer=True))[None]
        return vit.features(
            self._encoder, params["encoder"], patchify(images, grid, self.patch_size), positions
        )
