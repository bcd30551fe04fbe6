"""data2vec 2.0 for images (Baevski et al. 2022; arXiv 2212.07525).

A ViT sees V visible patches. Its tokens are put back on the grid, the holes are filled with noise,
and a few convolutions predict the latents of all patches. These are made by an EMA of the ViT from
the whole image: the outputs of the MLPs of its last blocks, each standardized over the patches of
an image, averaged, and standardized over channels. One pass of this teacher serves several masks of
an image.

What the released code (fairseq, examples/data2vec) does and the paper does not say, and is kept:
blocks are post-norm; CLS starts from N(0, 1); the centers of visible blocks are drawn with
replacement. One thing differs: the released CLS loss is a sum over the images of a device, so that
its weight grows with their number; here it is a mean, with a weight of its own (`cls_weight`).

Letters: B batch, R = B x masks_per_image masks, those of an image one after the other, H W image
height and width, C channels, N patches, V visible, P pixels of a patch, D width, O width of
targets.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmim_jax.methods.base import Features, Metrics, Params, Views
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_range
from lmim_jax.methods.common.targets import TargetMethod
from lmim_jax.models import initializers, normalization, vit
from lmim_jax.models.grid_decoder import GridDecoder
from lmim_jax.models.layers import patchify, sincos_positions
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError

TARGET_EPS = 1e-5  # of both standardizations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(TargetMethod):
    """data2vec 2.0; the fields are `config.method`, explained in configs/data2vec2_vit_b.py."""

    prenet_depth: int
    target_start: int
    momentum_ramp: float
    mask_ratio: float
    mask_adjust: float
    mask_block: int
    masks_per_image: int
    noise: float
    decoder_kernel: int
    decoder_groups: int
    cls_weight: float

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_range("prenet_depth", self.prenet_depth, 0, self.depth)
        check_range("target_start", self.target_start, 0, self.depth - 1)
        check_range("momentum_ramp", self.momentum_ramp, 1e-6)
        check_range("mask_ratio", self.mask_ratio, 1 / self.num_patches, 1 - 1 / self.num_patches)
        check_range("mask_adjust", self.mask_adjust, 0, 1)
        check_range("mask_block", self.mask_block, 1, min(self.grid))
        check_range("masks_per_image", self.masks_per_image, 1)
        check_range("noise", self.noise, 0)
        check_range("decoder_depth", self.decoder_depth, 0)
        check_range("decoder_kernel", self.decoder_kernel, 1)
        check_range("cls_weight", self.cls_weight, 0)
        for key in ("width", "decoder_width"):
            if self.decoder_groups < 1 or getattr(self, key) % self.decoder_groups:
                raise UserError(
                    f"config.method.{key}={getattr(self, key)} must be divisible by "
                    f"decoder_groups={self.decoder_groups}"
                )
        if self.cls_weight and self.target_width != self.width:
            raise UserError(
                f"config.method.cls_weight={self.cls_weight}: CLS of width {self.width} cannot "
                f"predict targets of width {self.target_width}; give 0"
            )

    @property
    def num_visible(self) -> int:
        """V, visible patches."""
        return max(int(self.num_patches * (1 - self.mask_ratio)), 1)

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(post_norm=True, **self.encoder_options)

    @property
    def _decoder(self) -> GridDecoder:
        return GridDecoder(
            grid=self.grid,
            width=self.decoder_width,
            depth=self.decoder_depth,
            kernel=self.decoder_kernel,
            groups=self.decoder_groups,
            out_width=self.target_width,
            dtype=self.compute_dtype,
        )

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder and decoder."""
        keys = jax.random.split(rng, 6)
        patches = jnp.zeros((1, 1, self.patch_dim))
        positions = jnp.zeros((1, 1, self.width))
        tokens = jnp.zeros((1, self.num_patches, self.width))
        fresh = self._encoder.init(keys[0], patches, positions)["params"]
        encoder = initializers.normal(keys[1], fresh)
        # The patch embedding is a convolution there, whose bias is drawn
        bound = self.patch_dim**-0.5
        bias = jax.random.uniform(keys[2], (self.width,), minval=-bound, maxval=bound)
        encoder["patch_embed"] = {"kernel": fresh["patch_embed"]["kernel"], "bias": bias}
        encoder["cls_token"] = fresh["cls_token"] / 0.02
        decoder = self._decoder.init(keys[3], tokens)["params"]
        decoder["head"] = initializers.torch_default(keys[4], decoder["head"])
        return {"encoder": encoder, "decoder": decoder, **self.init_target(keys[5])}

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw visible [R, V] patch ids, and noise [R, N, D] for the holes; the batch shares none.

        Noise of visible patches is not used.
        """
        del rng
        shape = (self.num_patches, self.width)

        def draw(key: Array) -> Views:
            block_key, split_key, noise_key = jax.random.split(key, 3)
            blocks = visible_blocks(block_key, self.grid, self._num_blocks, self.mask_block)
            visible, _ = masking.block_split(split_key, ~blocks, self.num_visible, 0)
            noise = self.noise * jax.random.normal(noise_key, shape)
            return {"visible": jnp.sort(visible), "noise": noise}

        rows = jax.vmap(lambda key: jax.random.split(key, self.masks_per_image))(keys)
        return jax.vmap(draw)(rows.ravel())

    @property
    def _num_blocks(self) -> int:
        share = 1 - self.mask_ratio + self.mask_adjust
        return int(self.num_patches * (share / self.mask_block**2))

    def _ema_schedule(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """1 - momentum, linear in the steps done over a share of the run, then constant."""
        progress = (step + 1) / (self.momentum_ramp * self.total_steps)
        return schedules.linear(
            1 - self.momentum_start, 1 - self.momentum_end, jnp.minimum(progress, 1)
        )

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss of the masked patches plus that of CLS.

        Both are squared errors, summed over channels, divided by sqrt(D). The target of CLS is the
        mean of those of all patches.

        Args:
          params: as returned by `init`.
          target: weights of the teacher, as returned by `target_of`.
          images: normalized, H x W = `image_size`.
          views: as returned by `sample`.
          step: not used.

        Returns:
          (loss, metrics), float32 scalars. Metrics are the loss, its two terms before the weight,
          and the standard deviations of targets and predictions: of every channel over the masked
          patches of the batch, averaged over channels.
        """
        del step
        forward = self.forward(params, target, images, views)
        masked = jnp.broadcast_to(
            ~self._is_visible(views["visible"])[:, :, None], (*views["noise"].shape[:2], 1)
        )
        targets = jnp.repeat(forward["targets"], self.masks_per_image, axis=0)
        predictions = forward["predictions"].astype(jnp.float32)
        patch_loss = _mean_over_masked(jnp.square(predictions - targets), masked).sum()
        cls_target = targets.mean(axis=1)
        metrics = {
            "patch_loss": patch_loss * self.target_width**-0.5,
            "cls_loss": jnp.float32(0),
            "target_std": _spread(targets, masked),
            "prediction_std": _spread(predictions, masked),
        }
        if self.cls_weight:
            error = forward["visible"][:, 0].astype(jnp.float32) - cls_target
            metrics["cls_loss"] = jnp.square(error).sum(axis=-1).mean() * self.width**-0.5
        loss = metrics["patch_loss"] + self.cls_weight * metrics["cls_loss"]
        return loss, {"loss": loss, **metrics}

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Float[Array, "_ _ _"]]:
        """Compute everything that the losses are made of; arguments as in `loss_fn`.

        Returns:
          visible: [R, 1 + V, D], the student's tokens, CLS first.
          predictions: [R, N, O], of all patches.
          targets: [B, N, O], float32.
        """
        patches = patchify(images, self.grid, self.patch_size)
        tokens, _ = self._encoder.apply(
            {"params": params["encoder"]},
            masking.take(patches, views["visible"]),
            masking.take(self._positions(params["encoder"]), views["visible"]),
        )
        return {
            "visible": tokens,
            "predictions": self._decoder.apply(
                {"params": params["decoder"]}, self._fill(tokens[:, 1:], views)
            ),
            "targets": self._targets(self.teacher(params, target), patches),
        }

    def _is_visible(self, visible: Int[Array, "R V"]) -> Bool[Array, "R N"]:
        """Tell which patches are visible."""
        rows = jnp.arange(len(visible))[:, None]
        return jnp.zeros((len(visible), self.num_patches), bool).at[rows, visible].set(True)

    def _fill(self, tokens: Float[Array, "R V D"], views: Views) -> Float[Array, "R N D"]:
        """Put visible tokens on the grid, and noise into the holes."""
        rows = jnp.arange(len(tokens))[:, None]
        return jnp.asarray(views["noise"], tokens.dtype).at[rows, views["visible"]].set(tokens)

    def _targets(self, teacher: Params, patches: Float[Array, "B N P"]) -> Float[Array, "B N O"]:
        """Compute the latents to predict, of all patches."""
        if self.frozen or self.target_layers or self.target == "random_projection":
            tokens = self.encode_targets(teacher, patches)[:, int(self.target_has_cls) :]
            return normalization.standardize_tokens(tokens, TARGET_EPS)
        encoder = teacher["encoder"]
        _, state = self._encoder.apply(
            {"params": encoder}, patches, self._positions(encoder), mutable=["intermediates"]
        )
        outputs = []
        for number in range(self.target_start, self.depth):
            block = state["intermediates"][f"block{number:02d}"]
            outputs.append(self._encoder.without_registers(block["mlp_output"][0])[:, 1:])
        return average_layers(outputs)

    def _positions(
        self, encoder: Params, grid: tuple[int, int] | None = None
    ) -> Float[Array, "1 N D"]:
        """Compute the positions of a grid; any grid spans the range of the training grid."""
        del encoder
        table = sincos_positions(grid or self.grid, self.width, self.grid, integer=True)
        return jnp.asarray(table)[None]

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N D"]:
        """Positions of an image of any grid span the range of the training grid."""
        return self._positions(params["encoder"], grid)

    def patch_features(
        self,
        params: Params,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N D"],
        mask: Bool[Array, "B N"] | None = None,
    ) -> Features:
        """Encode whole images; "latents" [B, N, D] are what the published targets are."""
        features = super().patch_features(params, patches, positions, mask)
        outputs = []
        for number in range(self.target_start, self.depth):
            outputs.append(features[f"block{number:02d}/mlp"][:, 1:])
        return {**features, "latents": average_layers(outputs, mask)}


def visible_blocks(
    key: Key[Array, ""], grid: tuple[int, int], count: int, size: int
) -> Bool[Array, "h w"]:
    """Draw squares of one image, centered on any patches; they may overlap and leave the grid.

    Args:
      key: random key of the image.
      grid: (h, w).
      count: number of squares.
      size: their side in patches.

    Returns:
      True inside.

    Source: fairseq's `compute_block_mask_2d`.
    """
    h, w = grid
    centers = jax.random.randint(key, (count, 1, 1), 0, h * w)
    rows = jnp.arange(h)[None, :, None] - centers // w + size // 2
    columns = jnp.arange(w)[None, None] - centers % w + size // 2
    return ((rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)).any(axis=0)


def average_layers(
    layers: Sequence[Float[Array, "B N D"]], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B N D"]:
    """Average layers, each standardized over the patches of an image, and standardize the tokens.

    Args:
      layers: tokens of patches.
      mask: False for patches that are padding; None: there are none.

    Returns:
      float32.
    """
    weight = jnp.ones((1, layers[0].shape[1], 1))
    if mask is not None:
        weight = mask[:, :, None].astype(jnp.float32)
    weight = weight / weight.sum(axis=1, keepdims=True)
    total = jnp.float32(0)
    for layer in layers:
        x = layer.astype(jnp.float32)
        centered = x - (weight * x).sum(axis=1, keepdims=True)
        variance = (weight * jnp.square(centered)).sum(axis=1, keepdims=True)
        total = total + centered * jax.lax.rsqrt(variance + TARGET_EPS)
    return normalization.standardize_tokens(total / len(layers), TARGET_EPS)


def _mean_over_masked(x: Float[Array, "R N D"], masked: Bool[Array, "R N 1"]) -> Float[Array, " D"]:
    """Average every channel over the masked patches, of which each row has as many."""
    return (x * masked).sum(axis=(0, 1)) / masked.sum()


def _spread(x: Float[Array, "R N D"], masked: Bool[Array, "R N 1"]) -> Float[Array, ""]:
    """Average the standard deviations of channels over masked patches on all devices."""
    x = jax.lax.stop_gradient(x)
    mean = losses.mean_over_devices(_mean_over_masked(x, masked))
    variance = _mean_over_masked(jnp.square(x - mean[None, None]), masked)
    return jnp.mean(jnp.sqrt(losses.mean_over_devices(variance) + 1e-6))
