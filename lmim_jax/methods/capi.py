"""CAPI (Darcet et al. 2025, "Cluster and Predict Latent Patches"; arXiv 2502.08769).

A student ViT sees one block of an image. For a few of the other patches, a predictor tells to which
clusters the teacher, an EMA of the student that sees the whole image, assigns the patch there. The
clusters are learned beside it, by a linear layer on the teacher's tokens whose targets are its own
assignments, balanced over the batch. There are no augmented views and no pixels to predict.

The loss is the sum of both losses. Their parameters are disjoint, so that one optimizer with
factors by name (`optimizer.lr_rules`, `optimizer.decay_rules`) does what two do in the released
code. Assignments are balanced over the whole batch on all devices: the loss is no mean over images.

What the released code does and the paper does not say, and is kept: the linear layer of the
clusters starts from N(0, 1) and has a bias; the scales of the weight-normed head are trained and
decayed; the head of the teacher is tracked, though nothing uses it. Two things differ: branches are
dropped for each image by itself, instead of for a fixed share of the images of a device, and
coordinates are float32.

Letters: B batch, H W image height and width, C channels, N patches, V visible, M patches to
predict, R registers, K clusters, P pixels of a patch, D encoder width, d predictor width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmim_jax.methods.base import Features, Metrics, Params, Views, ViTMethod
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_choice, check_heads, check_range
from lmim_jax.models import initializers, rope, vit
from lmim_jax.models.decoders import CrossPredictor
from lmim_jax.models.heads import ClusterLayer, WeightNormedHead
from lmim_jax.models.layers import patchify
from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError

SAMPLERS = ("inverse_block", "block", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(ViTMethod):
    """CAPI; the fields are `config.method`, explained key by key in configs/capi_vit_b.py."""

    decoder_heads: int
    rope: str
    rope_frequencies: tuple[float, float]
    drop_path: float
    sampler: str
    roll: bool
    mask_ratio: float
    prediction_ratio: float
    clusters: int
    sinkhorn_tau: float
    sinkhorn_iterations: int
    positionwise: bool
    cluster_tau: float
    tau: float
    momentum: float
    momentum_warmup: float
    momentum_share: float
    total_steps: int

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> bool:
        """Whether gradient accumulation would change the loss: always."""
        del options
        return True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_heads("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        check_choice("rope", self.rope, rope.PARTS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_range("drop_path", self.drop_path, 0, 0.99)
        check_range("decoder_depth", self.decoder_depth, 1)
        check_range("clusters", self.clusters, 2)
        for key in ("sinkhorn_tau", "cluster_tau", "tau"):
            check_range(key, getattr(self, key), 1e-6)
        check_range("momentum", self.momentum, 0, 1)
        check_range("momentum_warmup", self.momentum_warmup, 0, 1)
        check_range("mask_ratio", self.mask_ratio, 1 / self.num_patches, 1 - 1 / self.num_patches)
        check_range("prediction_ratio", self.prediction_ratio, 1 / self._num_masked, 1)
        if self.registers % 4:
            raise UserError(
                f"config.method.registers={self.registers} must be divisible by 4: as many are "
                "placed along each side of the image"
            )
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if getattr(self, width) // getattr(self, heads) % 4:
                raise UserError(
                    f"config.method.{width}={getattr(self, width)} / {heads}="
                    f"{getattr(self, heads)} must be divisible by 4 for rope"
                )

    @property
    def _num_masked(self) -> int:
        return max(int(self.num_patches * self.mask_ratio), 1)

    # Networks: Linen modules, each applied to one sub-tree of the parameters

    @property
    def _rope_options(self) -> dict[str, Any]:
        return {"rope": self.rope, "rope_frequencies": self.rope_frequencies}

    @property
    def _encoder(self) -> vit.ViT:
        return vit.ViT(
            cls=False,
            qkv_bias=False,
            bias=False,
            norm="rms",
            final_norm_scaled=False,
            **self.encoder_options,
            **self._rope_options,
        )

    @property
    def _predictor(self) -> CrossPredictor:
        return CrossPredictor(
            width=self.decoder_width,
            depth=self.decoder_depth,
            heads=self.decoder_heads,
            **self.block_options,
            **self._rope_options,
        )

    @property
    def _head(self) -> WeightNormedHead:
        return WeightNormedHead(self.clusters, self.compute_dtype)

    @property
    def _clustering(self) -> ClusterLayer:
        return ClusterLayer(self.clusters, self.compute_dtype)

    # The interface of a method, see methods/base.py

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters: encoder, predictor, head and clustering."""
        keys = jax.random.split(rng, 5)
        coordinates = jnp.zeros((1, 1, 2))
        patches = jnp.zeros((1, 1, self.patch_dim))
        tokens = jnp.zeros((1, 1, self.width))
        encoder = self._encoder.init(keys[0], patches, coordinates)["params"]
        predictor = self._predictor.init(keys[1], tokens, coordinates, coordinates)["params"]
        predictions = jnp.zeros((1, 1, self.decoder_width))
        # The patch embedding is a convolution there, whose bias is drawn
        bound = self.patch_dim**-0.5
        bias = jax.random.uniform(keys[4], (self.width,), minval=-bound, maxval=bound)
        encoder["patch_embed"]["bias"] = bias
        return {
            "encoder": initializers.xavier_by_projection(encoder),
            "predictor": initializers.xavier_by_projection(predictor),
            "head": self._head.init(keys[2], predictions)["params"],
            "clustering": self._clustering.init(keys[3], tokens)["params"],
        }

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw visible [B, V] and predicted [B, M] patch ids; the batch shares nothing.

        With `drop_path`, also kept [B, blocks of encoder and predictor, 2], False for the branches
        of the student that are dropped.
        """
        del rng
        split_keys, drop_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

        def split(key: Array) -> masking.Split:
            return masking.split_by_block(key, self.grid, self._num_masked, self.sampler, self.roll)

        def keep(key: Array) -> Bool[Array, "blocks 2"]:
            return jax.random.bernoulli(
                key, 1 - self.drop_path, (self.depth + self.decoder_depth, 2)
            )

        visible, masked = jax.vmap(split)(split_keys)
        # Masked patches come in random order
        views = {
            "visible": visible,
            "predicted": masked[:, : max(int(self._num_masked * self.prediction_ratio), 1)],
        }
        if self.drop_path:
            views["kept"] = jax.vmap(keep)(drop_keys)
        return views

    def target_of(self, params: Params) -> Params:
        """Select what the teacher tracks: everything but the clusters, which are learned."""
        return {name: params[name] for name in ("encoder", "predictor", "head")}

    def ema_rate(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Compute 1 - momentum: it rises from 0 and falls again, as the learning rate does."""
        curve = schedules.warmup_cosine(
            0.0,
            1 - self.momentum,
            0.0,
            self.momentum_warmup * self.total_steps,
            self.total_steps,
            peak_in_warmup=True,
            cosine_share=self.momentum_share,
        )
        return curve(step)

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss of predictions plus the loss of the clusters.

        Args:
          params: as returned by `init`.
          target: weights of the teacher, as returned by `target_of`.
          images: normalized, H x W = `image_size`.
          views: as returned by `sample`.
          step: not used.

        Returns:
          (loss, metrics), float32 scalars. Metrics are the loss, its two terms, the mean entropy of
          the assignments that are predicted (in nats, at most log K), and how often a prediction
          has the same most likely cluster as its target.

        Source: `do_teacher` and `do_student` of the released `train_capi.py`.
        """
        del step
        forward = self.forward(params, target, images, views)
        cluster_loss = losses.soft_cross_entropy(
            forward["cluster_logits"], forward["assignments"], self.cluster_tau
        )
        targets = masking.take(forward["assignments"], views["predicted"])
        logits = forward["logits"]
        prediction_loss = losses.soft_cross_entropy(logits, targets, self.tau)
        loss = prediction_loss + cluster_loss
        entropy = -jnp.mean(jnp.sum(jax.scipy.special.xlogy(targets, targets), axis=-1))
        accuracy = jnp.mean(logits.argmax(axis=-1) == targets.argmax(axis=-1))
        return loss, {
            "loss": loss,
            "prediction_loss": prediction_loss,
            "cluster_loss": cluster_loss,
            "target_entropy": entropy,
            "cluster_accuracy": accuracy,
        }

    def forward(
        self, params: Params, target: Params, images: Float[Array, "B H W C"], views: Views
    ) -> dict[str, Float[Array, "B _ _"]]:
        """Compute everything that the losses are made of; arguments as in `loss_fn`.

        Returns:
          visible: [B, R + V, D], the student's tokens, registers first.
          predictions: [B, M, d]; logits: [B, M, K], before the temperature.
          targets: [B, N, D], the teacher's tokens of all patches.
          cluster_logits: [B, N, K] of these; assignments: [B, N, K].
        """
        patches = patchify(images, self.grid, self.patch_size)
        visible, predictions = self._predict(params, patches, views)
        whole = rope.grid_coordinates(self.grid)[None]
        teacher = jax.lax.stop_gradient(target["encoder"])
        targets, _ = self._encoder.apply({"params": teacher}, patches, whole)
        targets = jax.lax.stop_gradient(targets)
        cluster_logits = self._clustering.apply({"params": params["clustering"]}, targets)
        assignments = losses.sinkhorn(
            cluster_logits, self.sinkhorn_tau, self.sinkhorn_iterations, self.positionwise
        )
        return {
            "visible": visible,
            "predictions": predictions,
            "logits": self._head.apply({"params": params["head"]}, predictions),
            "targets": targets,
            "cluster_logits": cluster_logits,
            "assignments": assignments,
        }

    def _predict(
        self, params: Params, patches: Float[Array, "B N P"], views: Views
    ) -> tuple[Float[Array, "B R+V D"], Float[Array, "B M d"]]:
        """Encode visible patches, and predict from them."""
        coordinates = rope.grid_coordinates(self.grid)[None]
        of_visible = masking.take(coordinates, views["visible"])
        encoder_scales = None
        predictor_scales = None
        if self.drop_path:
            scales = views["kept"] / (1 - self.drop_path)
            encoder_scales, predictor_scales = jnp.split(scales, [self.depth], axis=1)
        tokens, _ = self._encoder.apply(
            {"params": params["encoder"]},
            masking.take(patches, views["visible"]),
            of_visible,
            keep_registers=True,
            branch_scales=encoder_scales,
        )
        predictions = self._predictor.apply(
            {"params": params["predictor"]},
            tokens,
            vit.with_registers(of_visible, self.registers),
            masking.take(coordinates, views["predicted"]),
            predictor_scales,
        )
        return tokens, predictions

    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N 2"]:
        """Coordinates of an image of any grid, which span the unit square."""
        del params
        return jnp.asarray(rope.grid_coordinates(grid))[None]

    def patch_features(
        self,
        params: Params,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N 2"],
        mask: Bool[Array, "B N"] | None = None,
    ) -> Features:
        """Encode whole images; "predicted" [B, N, d] is the output of the predictor's first block.

        Its mean over all positions is the feature of an image in the released evaluation.
        """
        features = super().patch_features(params, patches, positions, mask)
        coordinates = vit.with_registers(positions, self.registers, mask)
        tokens = features["patches"]
        if self.registers:
            tokens = jnp.concatenate([features["registers"], tokens], axis=1)
            if mask is not None:
                mask = jnp.pad(mask, [(0, 0), (self.registers, 0)], constant_values=True)
        predicted = self._predictor.clone(depth=1).apply(
            {"params": params["predictor"]},
            tokens,
            coordinates,
            positions,
            mask=mask,
        )
        return {**features, "predicted": predicted}
