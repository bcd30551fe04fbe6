"""Where the latents to predict come from, and in what form: the same for several methods.

`target` is the source:

  ema                a teacher, the exponential moving average of the encoder
  joint              the encoder itself, with gradients
  stop_gradient      the encoder itself, without gradients
  random             the encoder as it was at the start
  random_projection  a fixed random projection of the pixels of a patch
  frozen             the encoder of an earlier run, of any method, which does not change

`target_layers` gives the form: () is what the method's paper has, the output of the encoder; block
numbers such as (2, 5, 8, 11) are tokens after these blocks, each standardized (`target_norm`), then
concatenated or averaged (`target_combine`).

Sources: Latent MIM, table 1, for the first four; OlmoEarth (random_projection); SALT (arXiv
2509.24317) for frozen teachers; Bootleg (arXiv 2603.15553) for several layers side by side, and
data2vec 2.0 (arXiv 2212.07525) for their mean after instance normalization.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.base import Params, ViTMethod
from lmim_jax.methods.common import losses, masking
from lmim_jax.methods.common.checks import check_choice, check_range
from lmim_jax.models import normalization, vit
from lmim_jax.models.layers import Dense
from lmim_jax.utils.errors import UserError

SOURCES = ("ema", "joint", "stop_gradient", "random", "random_projection", "frozen")
NORMS = ("layer", "instance", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetMethod(ViTMethod):
    """A method that predicts latents; the fields are explained in its recipe.

    Attributes:
      frozen: the method of the run that a frozen teacher comes from; None: there is none.
    """

    target: str
    target_layers: tuple[int, ...]
    target_combine: str
    target_norm: str
    momentum_start: float
    momentum_end: float
    total_steps: int
    frozen: Any

    # The sub-trees of the parameters that a teacher consists of
    TEACHER: ClassVar[tuple[str, ...]] = ("encoder",)

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("target", self.target, SOURCES)
        check_choice("target_combine", self.target_combine, ("concat", "mean"))
        check_choice("target_norm", self.target_norm, NORMS)
        depth = self.frozen.depth if self.frozen else self.depth
        for layer in self.target_layers:
            check_range("target_layers", layer, 0, depth - 1)
        if self.target_layers and self.target == "random_projection":
            raise UserError(
                f"config.method.target_layers={self.target_layers}: target=random_projection has "
                "no layers; give ()"
            )
        if self.target == "frozen":
            self._check_frozen()

    def _check_frozen(self) -> None:
        """Raise a UserError unless the frozen teacher takes the patches of this method."""
        if self.frozen is None:
            raise UserError("config.method.target=frozen needs a run: give frozen:RUN")
        if not isinstance(self.frozen, ViTMethod):
            raise UserError("config.method.target: the frozen run has no encoder of patches")
        for key in ("patch_size", "channels", "modalities"):
            theirs = getattr(self.frozen, key)
            ours = getattr(self, key)
            if theirs != ours:
                raise UserError(
                    f"config.method.target=frozen: that run has {key}={theirs}, this one {ours}"
                )

    @property
    def target_width(self) -> int:
        """Channels of a target."""
        width: int = self.frozen.width if self.frozen else self.width
        if self.target_layers and self.target_combine == "concat":
            return width * len(self.target_layers)
        return width

    @property
    def target_has_cls(self) -> bool:
        """Whether the first of the target tokens is CLS."""
        if self.target == "random_projection":
            return False
        return self._teacher_encoder.cls

    @property
    def _teacher_encoder(self) -> vit.ViT:
        encoder: vit.ViT = self.frozen._encoder if self.frozen else self._encoder
        return encoder

    @property
    def _target_embed(self) -> Dense:
        return Dense(features=self.width, dtype=self.compute_dtype)

    def init_target(self, rng: Key[Array, ""]) -> Params:
        """Create the parameters of a random projection, {"target_embed"}; {} of other targets."""
        if self.target != "random_projection":
            return {}
        # Targets are read from the copy in `target_of`, which never changes; this one has no
        # gradient, but shrinks where `decay_rules` include it.
        patches = jnp.zeros((1, 1, self.patch_dim))
        return {"target_embed": self._target_embed.init(rng, patches)["params"]}

    def target_of(self, params: Params) -> Params:
        """Select what the teacher consists of, depending on `target`; it can be nothing.

        Of a frozen teacher, it has the right shapes alone: its weights are read when a run starts.
        """
        if self.target == "frozen":
            return {"frozen": self.frozen.init(jax.random.key(0))["encoder"]}
        if self.target in ("ema", "random"):
            return {name: params[name] for name in self.TEACHER}
        if self.target == "random_projection":
            return {"target_embed": params["target_embed"]}
        return {}

    def ema_rate(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Compute 1 - momentum after optimizer step `step`; 0 of teachers that never change."""
        if self.target != "ema":
            return 0.0
        return self._ema_schedule(step)

    @abc.abstractmethod
    def _ema_schedule(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Compute 1 - momentum of an EMA after optimizer step `step`."""

    def teacher(self, params: Params, target: Params) -> Params:
        """The weights that targets are computed with; they have a gradient only if joint."""
        if self.target == "joint":
            return params
        if self.target == "stop_gradient":
            return jax.lax.stop_gradient(params)
        return jax.lax.stop_gradient(target)

    @abc.abstractmethod
    def _positions(self, encoder: Params) -> Float[Array, "1 N _"]:
        """Compute what the encoder with these weights takes as positions of the training grid."""

    def project_patches(
        self, teacher: Params, patches: Float[Array, "B N P"]
    ) -> Float[Array, "B N D"]:
        """Apply the fixed random projection of pixels."""
        return self._target_embed.apply({"params": teacher["target_embed"]}, patches)

    def encode_targets(
        self,
        teacher: Params,
        patches: Float[Array, "B T P"],
        index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B _ W"]:
        """Compute the targets of patches, W = `target_width`.

        Args:
          teacher: see `teacher`.
          patches: that the teacher sees.
          index: their ids; None: they are all patches of the grid.

        Returns:
          Tokens, CLS first if there is one, see `target_has_cls`.
        """
        if self.target == "random_projection":
            return self.project_patches(teacher, patches)
        weights = teacher["frozen" if self.frozen else "encoder"]
        if self.frozen:
            positions = self.frozen.positions_of({"encoder": weights}, self.grid)
        else:
            positions = self._positions(weights)
        if index is not None:
            positions = masking.take(positions, index)
        encoder = self._teacher_encoder
        variables = {"params": weights}
        if not self.target_layers:
            tokens, _ = encoder.apply(variables, patches, positions)
            return tokens
        _, state = encoder.apply(variables, patches, positions, mutable=["intermediates"])
        layers = []
        for number in self.target_layers:
            block = state["intermediates"][f"block{number:02d}"]["tokens"][0]
            layers.append(self._normalize(encoder.without_registers(block)))
        if self.target_combine == "concat":
            return jnp.concatenate(layers, axis=-1)
        return jnp.mean(jnp.stack(layers), axis=0)

    def _normalize(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Standardize the tokens of a layer: each over its channels, or a channel over patches."""
        if self.target_norm == "none":
            return tokens.astype(jnp.float32)
        if self.target_norm == "layer":
            return normalization.standardize_tokens(tokens, 1e-5)
        first_patch = int(self._teacher_encoder.cls)
        cls = normalization.standardize_tokens(tokens[:, :first_patch], 1e-5)
        patches = losses.standardize_over_patches(tokens[:, first_patch:])
        return jnp.concatenate([cls, patches], axis=1)
