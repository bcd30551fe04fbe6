"""BootMAE: Bootstrapped Masked Autoencoders (Dong et al.; ECCV 2022; arXiv 2207.07116; code LightDXY/BootMAE).

A ViT sees V visible patches. From its tokens one decoder regresses the pixels of the M masked patches, another the
features that an EMA of the ViT makes of the whole image. Each decoder is also given, by cross-attention, the features
of the visible patches that suit its target: those of the first block (pixels), those of the last (features).
Where paper and released code differ, this is the code.
Letters: B batch, N patches, V visible, M masked, P pixels of a patch, D width, d width of the pixel decoder.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lmim_jax.methods.base import check_choice, check_heads, check_range
from lmim_jax.methods.common import losses, masking
from lmim_jax.models import normalization, vit
from lmim_jax.models.decoders import PixelHead, TargetAwareDecoder
from lmim_jax.models.layers import Dense, patchify, replace_patches, sincos_positions
from lmim_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Method:
    """BootMAE; the fields are `config.method`, explained key by key in configs/bootmae_vit_b.py."""

    grid: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    num_visible: int
    block_total: int
    block_smallest: int
    block_largest: int
    block_aspect: float
    block_exposed: int
    decoder_width: int
    decoder_depth: int
    center_weight: float
    feature_weight: float
    feature_ramp: float
    momentum: tuple[float, ...]
    momentum_epochs: tuple[float, ...]
    dtype: str
    attention: str
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("attention", self.attention, ("xla", "cudnn"))
        check_heads("", self.width, self.heads)
        check_range("num_visible", self.num_visible, 1, self.num_patches - 1)
        if self.decoder_width < self.heads or self.decoder_width % 4:
            raise UserError(
                f"config.method.decoder_width={self.decoder_width} is no multiple of 4, or below `heads`"
            )
        check_range("decoder_depth", self.decoder_depth, 1)
        masked = self.num_patches - self.num_visible
        check_range("block_total", self.block_total, 0, masked)
        check_range("block_exposed", self.block_exposed, 0, min(self.num_visible, masked))
        # A square block of the smallest area must fit, or none may ever.
        check_range("block_smallest", self.block_smallest, 1, (min(self.grid) - 1) ** 2)
        check_range("block_largest", self.block_largest, self.block_smallest)
        check_range("block_aspect", self.block_aspect, 0.01, 1)
        check_range("feature_ramp", self.feature_ramp, 0, 1)
        epochs = (0, *self.momentum_epochs)
        if len(epochs) != len(self.momentum) or sorted(set(epochs)) != list(epochs):
            raise UserError(
                f"config.method.momentum_epochs={self.momentum_epochs} must rise from above 0, one value for each of "
                f"momentum={self.momentum} but the first"
            )

    @property
    def num_patches(self):
        """N, patches of the grid."""
        return math.prod(self.grid)

    @property
    def image_size(self):
        """(height, width) in pixels of the images that `loss` takes."""
        return tuple(n * self.patch_size for n in self.grid)

    feature_size = image_size

    # -- modules: plain Linen, applied to one sub-tree of params each

    def _blocks(self, width):
        # cuDNN takes heads whose width is a multiple of 8; those of the published pixel decoder are 42 wide.
        attention = self.attention if width // self.heads % 8 == 0 else "xla"
        shared = dict(mlp_ratio=self.mlp_ratio, norm_eps=self.norm_eps, dtype=jnp.dtype(self.dtype))
        return dict(shared, attention=attention, qkv_bias=(True, False, True))  # keys have none

    @property
    def _encoder(self):
        return vit.ViT(width=self.width, depth=self.depth, heads=self.heads, **self._blocks(self.width))

    @property
    def _regressor(self):
        head = PixelHead(
            patch_size=self.patch_size, channels=self.channels, dtype=jnp.dtype(self.dtype)
        )
        return TargetAwareDecoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.heads,
            head=head,
            **self._blocks(self.decoder_width),
        )

    @property
    def _predictor(self):
        head = Dense(self.width, jnp.dtype(self.dtype))
        return TargetAwareDecoder(
            width=self.width,
            depth=self.decoder_depth,
            heads=self.heads,
            head=head,
            **self._blocks(self.width),
        )

    # -- the contract

    def init(self, rng):
        """Fresh parameters, float32: encoder, regressor (of pixels), predictor (of features)."""
        keys = jax.random.split(rng, 3)
        patches = jnp.zeros((1, self.num_visible, self.patch_size**2 * self.channels))
        positions, tokens = (jnp.zeros((1, self.num_visible + more, self.width)) for more in (0, 1))
        masked = lambda width: jnp.zeros((1, self.num_patches - self.num_visible, width))
        params = {
            "encoder": self._encoder.init(keys[0], patches, positions)["params"],
            "regressor": self._regressor.init(keys[1], tokens, tokens, masked(self.decoder_width))[
                "params"
            ],
            "predictor": self._predictor.init(keys[2], tokens, tokens, masked(self.width))[
                "params"
            ],
        }
        return official_scales(params)

    def sample(self, rng, keys):
        """Draw visible [B, V] and masked [B, M] patch ids; `exposed` is one draw for the whole batch."""
        exposed = jax.random.randint(rng, (), 0, self.block_exposed + 1)
        block = self.block_total, self.block_smallest, self.block_largest, self.block_aspect

        def draw(key):
            block_key, split_key = jax.random.split(key)
            mask = masking.block_mask(block_key, self.grid, *block)
            return masking.block_split(split_key, mask, self.num_visible, exposed)

        visible, masked = jax.vmap(draw)(keys)
        return {"visible": visible, "masked": masked}

    def target_of(self, params):
        """What the teacher is made of: the encoder."""
        return {"encoder": params["encoder"]}

    def ema_rate(self, step):
        """1 - momentum after optimiser step `step`: piecewise linear in epochs, constant within one."""
        epoch = jnp.asarray(step // self.steps_per_epoch, jnp.float32)
        return jnp.interp(
            epoch,
            jnp.array([0.0, *self.momentum_epochs]),
            jnp.array([1 - m for m in self.momentum]),
        )

    def loss_fn(self, params, target, images, views, step):
        """The training loss of a batch.

        Args:
          params: as from `init`.
          target: as from `target_of`, the teacher's weights.
          images: [B, H, W, C] float, normalised, H x W = `image_size`.
          views: as from `sample`.
          step: optimiser step, for the ramp of the feature loss.

        Returns:
          (loss, metrics), float32 scalars: both terms, the weight of the second, mean cosines within an image.
        """
        forward = self.forward(params, target, images, views)
        weight = 1 + self.center_weight * losses.masked_neighbours(views["masked"], self.grid)
        mean = lambda x, y: jnp.mean(
            weight * jnp.mean(jnp.square(x.astype(jnp.float32) - y), axis=-1)
        )
        of_pixels = mean(forward["pixels"], forward["pixel_targets"])
        of_features = mean(forward["predictions"], forward["targets"])
        epochs = self.total_steps / self.steps_per_epoch
        ramp = (step // self.steps_per_epoch + 1) / max(self.feature_ramp * epochs, 1e-6)
        feature_weight = self.feature_weight * jnp.minimum(ramp, 1.0)
        loss = of_pixels + feature_weight * of_features
        return loss, {
            "loss": loss,
            "pixel_loss": of_pixels,
            "feature_loss": of_features,
            "feature_weight": jnp.float32(feature_weight),
            "similarity_predictions": losses.similarity(forward["predictions"]),
            "similarity_targets": losses.similarity(forward["targets"]),
        }

    def forward(self, params, target, images, views):
        """What the loss compares, of the masked patches, float32.

        Returns:
          predictions, targets [B, M, D]: features, each token with mean 0 and deviation 1 over its channels;
          pixels, pixel_targets [B, M, P]: with mean 0 and deviation 1 per patch and channel in the targets;
          reconstruction [B, M, P]: `pixels` given mean and deviation of the true patch: to be shown as an image.
        """
        visible, masked = views["visible"], views["masked"]
        patches = patchify(images, self.grid, self.patch_size)
        positions = self._positions(self.width)
        encoder = {"params": params["encoder"]}
        seen = masking.take(patches, visible), masking.take(positions, visible)
        (tokens, deep), state = self._encoder.apply(encoder, *seen, mutable=["intermediates"])
        shallow = state["intermediates"]["block00"]["tokens"][0]
        slots = masking.take(self._positions(self.decoder_width), masked)
        pixels = self._regressor.apply(
            {"params": params["regressor"]}, tokens, shallow, slots
        ).astype(jnp.float32)
        slots = masking.take(positions, masked)
        predictions = self._predictor.apply({"params": params["predictor"]}, tokens, deep, slots)

        _, targets = self._encoder.apply(
            {"params": jax.lax.stop_gradient(target["encoder"])}, patches, positions
        )
        pixel_targets, mean, deviation = losses.standardize_pixels(
            masking.take(patches, masked), self.channels
        )
        return {
            "predictions": normalization.standardize_tokens(predictions, 1e-6),
            "targets": normalization.standardize_tokens(masking.take(targets[:, 1:], masked), 1e-6),
            "pixels": pixels,
            "pixel_targets": pixel_targets,
            "reconstruction": pixels * deviation + mean,
        }

    def reconstruct(self, params, images, views):
        """The images with their masked patches as predicted, see methods/base.py."""
        pixels = self.forward(params, self.target_of(params), images, views)["reconstruction"]
        return replace_patches(images, views["masked"], pixels, self.grid, self.patch_size)

    def _positions(self, width, grid=None):
        """[1, N, width]; of another grid over the range of the training grid."""
        return jnp.asarray(sincos_positions(grid or self.grid, width, self.grid, integer=True))[
            None
        ]

    def features(self, params, images, rng=None):
        """What evaluators see: tokens of full images.

        Args:
          params: with "encoder".
          images: [B, H, W, C], H and W multiples of the patch size; positions span the training grid's range.

        Returns:
          See `vit.features`; and latents [B, N, D], what predictions are compared with.
        """
        del rng
        grid = tuple(size // self.patch_size for size in images.shape[1:3])
        patches = patchify(images, grid, self.patch_size)
        out = vit.features(
            self._encoder, params["encoder"], patches, self._positions(self.width, grid)
        )
        return {**out, "latents": normalization.standardize_tokens(out["patches_prenorm"], 1e-6)}


def official_scales(params):
    """Initial parameters with the official spread where it is not that of the modules.

    Query, key and value kernels of self-attention are xavier-uniform each for itself, not as one matrix three times as
    wide; the CLS token is as good as zero: its deviation is 1e-6, that of `vit.ViT` 0.02.
    """
    flat = flatten_dict(params)
    for path, value in flat.items():
        if path[-2:] == ("qkv", "kernel"):
            rows, columns = value.shape
            flat[path] = value * math.sqrt((rows + columns) / (rows + columns / 3))
        elif path[-1] == "cls_token":
            flat[path] = value * (1e-6 / 0.02)
    return unflatten_dict(flat)
