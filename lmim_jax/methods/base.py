"""The interface of a pretraining method, what all methods share, and the registry of methods.

Every file of this folder except this one is a registered method: its module name is the value of
`config.method.name`, and its class is called `Method`. The sub-package `common` holds code that
several methods share; it is not a method.

A method is a frozen dataclass whose fields are the keys of `config.method`. Fields have no default
values, so that a misspelled or forgotten key is an error. Its functions are pure. One training step
(`train/step.py`) is the same for all methods:

  images, keys                 augmented images, one random key each
  views = sample(rng, keys)    all random choices of the loss
  loss_fn(params, target, images, views, step)  -> gradient -> optimizer -> new params
  target += ema_rate(step) * (target_of(params) - target)

Letters: B batch, H W image height and width, C channels, N patches, V visible patches, D width.
"""

import abc
import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

import lmim_jax.methods
from lmim_jax.methods.common.checks import check_choice, check_heads, check_range
from lmim_jax.models import attention, vit
from lmim_jax.models.modalities import Modality, patchify_all
from lmim_jax.utils.errors import UserError, did_you_mean

Params = dict[str, Any]  # a nested dict of float32 arrays
Views = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Features = dict[str, Array]


class Method(Protocol):
    """What training and evaluation need of a method.

    A method that predicts pixels also has

      reconstruct(params, images, views) -> images

    [B, H, W, C] as `loss_fn` takes them, with masked patches replaced by the predictions. Where
    predictions are normalized patch by patch, they get the mean and the standard deviation of the
    true patch. Training does not need it.

    A method whose features do not need images of one size in a batch also has

      positions_of(params, grid) -> [1, N, D]
      patch_features(params, patches, positions, mask) -> features

    the position embeddings of an image of any grid, and `features` of patches [B, N, P] with their
    positions [B, N, D], where `mask` [B, N] is False for the patches that pad smaller images to N.
    Without them, `lmim features` compiles a program for each size of images.
    """

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    def patch_size(self) -> int:
        """Height and width of a patch in pixels."""

    @property
    def channels(self) -> int:
        """Channels of an image."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those of images; (): one, without a name."""

    @property
    def inputs(self) -> tuple[Modality, ...]:
        """The modalities of images, one at least."""

    @property
    def width(self) -> int:
        """D, size of a feature vector."""

    @property
    def depth(self) -> int:
        """Number of encoder blocks."""

    @property
    def num_patches(self) -> int:
        """N, patches of the grid."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `loss_fn` takes."""

    @property
    def feature_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `features` takes in evaluation."""

    def init(self, rng: Key[Array, ""]) -> Params:
        """Create fresh float32 parameters, {"encoder": ..., ...}."""

    def sample(self, rng: Key[Array, ""], keys: Key[Array, " B"]) -> Views:
        """Draw all random choices of the loss, with static shapes.

        Args:
          rng: random key for what the whole batch shares.
          keys: one random key per image; whatever differs between images depends on these alone.

        Returns:
          A dict of arrays with a leading batch axis. Of methods that draw several masks for an
          image, arrays about masks have one row per mask, those of an image one after the other.
          "visible" [B, V] int32 holds the ids of the patches that the encoder sees; where this
          array is padded, the bool array "visible_mask" [B, V] is true for the entries that count.
          Other entries depend on the method.
        """

    def loss_fn(
        self,
        params: Params,
        target: Params,
        images: Float[Array, "B H W C"],
        views: Views,
        step: int | Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the training loss of a batch.

        Args:
          params: as returned by `init`.
          target: weights of the teacher, as returned by `target_of`.
          images: normalized, H x W = `image_size`.
          views: as returned by `sample`.
          step: 0-based optimizer step, for schedules.

        Returns:
          (loss, metrics), float32 scalars; metrics contain "loss".
        """

    def target_of(self, params: Params) -> Params:
        """Select the sub-tree of `params` that the teacher tracks by EMA; {} without a teacher."""

    def ema_rate(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """Compute 1 - momentum of the EMA update that follows optimizer step `step`."""

    def features(self, params: Params, images: Float[Array, "B H W C"]) -> Features:
        """Encode whole images for evaluation.

        Args:
          params: contains at least "encoder".
          images: normalized, without gap; H and W are multiples of the patch size.

        Returns:
          "patches", "patches_prenorm" [B, N, D]; "cls" [B, D] of encoders with a CLS token;
          "registers" [B, R, D] of those with registers;
          "block07/tokens", "block07/attention", ... (see `vit.features`); "latents" [B, N, D]
          where the method predicts latents: what its targets are made of, unless options take
          these from other blocks or from a frozen teacher.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseMethod:
    """Fields, sizes and checks that all methods share: a ViT on a grid of patches, and a decoder.

    The fields are keys of `config.method`, explained in the recipe of each method in configs/.

    Attributes:
      modalities: those of images, from `config.data.modalities`; (): one, see `inputs`.
    """

    grid: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    norm_eps: float
    registers: int
    decoder_width: int
    decoder_depth: int
    dtype: str
    attention: str
    modalities: tuple[Modality, ...]

    # Options that follow the grid where they are None: {name: share of the patches}
    SHARES: ClassVar[Mapping[str, float]] = {}
    # Whether images may have several modalities, see common/several_modalities.py
    SEVERAL_MODALITIES: ClassVar[bool] = False

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> bool:
        """Whether the loss is no mean over images, so that gradient accumulation would change it.

        Args:
          options: `config.method`.
        """
        del options
        return False

    def __post_init__(self) -> None:
        """Check the fields; sub-classes extend this."""
        self._check_modalities()
        check_range("registers", self.registers, 0)
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("attention", self.attention, attention.IMPLEMENTATIONS)
        check_heads("width", self.width, "heads", self.heads)

    def _check_modalities(self) -> None:
        """Raise a UserError for modalities that the method or the grid does not take."""
        if self.modalities and not self.SEVERAL_MODALITIES:
            takes = [name for name in names() if method_class(name).SEVERAL_MODALITIES]
            raise UserError(
                f"config.data.modalities: this method takes images of one modality; "
                f"{', '.join(takes)} take several"
            )
        for modality in self.modalities:
            size = modality.patch_size
            if size < 1 or self.patch_size % size:
                raise UserError(
                    f"config.data.modalities.{modality.name}.patch_size={size} must divide "
                    f"config.method.patch_size={self.patch_size}, so that the patches of all "
                    "modalities are on one grid"
                )

    @property
    def inputs(self) -> tuple[Modality, ...]:
        """The modalities of images; a single one has no name."""
        return self.modalities or (Modality("", self.channels, self.patch_size),)

    @property
    def num_patches(self) -> int:
        """N, patches of the grid."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """P, numbers in a patch: height x width x channels; the most of all modalities."""
        return max(modality.patch_dim for modality in self.inputs)

    @property
    def feature_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `features` takes in evaluation."""
        rows, columns = self.grid
        return rows * self.patch_size, columns * self.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `loss_fn` takes."""
        return self.feature_size

    @property
    def compute_dtype(self) -> Any:
        """The dtype that networks compute in; parameters are float32."""
        return jnp.dtype(self.dtype)

    @property
    def block_options(self) -> dict[str, Any]:
        """Options of Transformer blocks, the same in the encoder and in decoders."""
        return {
            "mlp_ratio": self.mlp_ratio,
            "norm_eps": self.norm_eps,
            "dtype": self.compute_dtype,
            "attention": self.attention,
        }

    @property
    def encoder_options(self) -> dict[str, Any]:
        """Options of the encoder, a `vit.ViT`."""
        return {
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "registers": self.registers,
            "modalities": tuple((part.name, part.patch_dim) for part in self.modalities),
            **self.block_options,
        }

    def grid_of(self, images: Float[Array, "B H W C"]) -> tuple[int, int]:
        """Compute the rows and columns of patches of images of any size, without gap."""
        _, height, width, _ = images.shape
        return height // self.patch_size, width // self.patch_size

    def patches_of(
        self,
        images: Float[Array, "B H W C"],
        grid: tuple[int, int],
        gap: int = 0,
        offsets: Int[Array, "B h w 2"] | None = None,
    ) -> Float[Array, "B T P"]:
        """Cut images into the patches of all modalities, see `modalities.patchify_all`."""
        return patchify_all(images, self.inputs, grid, self.patch_size, gap, offsets)

    def for_all_modalities(self, positions: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "1 T D"]:
        """Repeat the positions of a grid for the tokens of every modality."""
        return np.tile(positions, (len(self.inputs), 1))[None]


class ViTMethod(BaseMethod, abc.ABC):
    """The features of a method that encodes patches with a `vit.ViT`, under params["encoder"]."""

    @property
    @abc.abstractmethod
    def _encoder(self) -> vit.ViT:
        """The encoder."""

    @abc.abstractmethod
    def positions_of(self, params: Params, grid: tuple[int, int]) -> Float[Array, "1 N _"]:
        """Compute what the encoder takes as positions, see `vit.ViT`, for an image of any grid.

        Args:
          params: contains "encoder".
          grid: rows and columns of patches; N is their product.
        """

    def features(self, params: Params, images: Float[Array, "B H W C"]) -> Features:
        """Encode whole images for evaluation, without gap or mask.

        Args:
          params: contains "encoder".
          images: normalized; H and W are multiples of the patch size.

        Returns:
          See `patch_features`.
        """
        grid = self.grid_of(images)
        patches = self.patches_of(images, grid)
        return self.patch_features(params, patches, self.positions_of(params, grid))

    def patch_features(
        self,
        params: Params,
        patches: Float[Array, "B N P"],
        positions: Float[Array, "#B N _"],
        mask: Bool[Array, "B N"] | None = None,
    ) -> Features:
        """Encode the patches of whole images; methods that predict latents add "latents".

        Args:
          params: contains "encoder", and what "latents" need.
          patches: all patches of the images.
          positions: see `positions_of`.
          mask: False for patches that pad smaller images to N; None: there are none.

        Returns:
          See `vit.features`.
        """
        return vit.features(self._encoder, params["encoder"], patches, positions, mask)


def names() -> list[str]:
    """List the registered methods: the modules of this folder, in alphabetical order."""
    modules = pkgutil.iter_modules(lmim_jax.methods.__path__)
    return sorted(module.name for module in modules if _is_registered(module))


def method_class(name: str) -> Any:
    """The class of a registered method."""
    return importlib.import_module(f"lmim_jax.methods.{name}").Method


def has_option(name: str, option: str) -> bool:
    """Whether a registered method has an option of this name."""
    if name not in names():
        return False
    return option in {field.name for field in dataclasses.fields(method_class(name))}


def _is_registered(module: pkgutil.ModuleInfo) -> bool:
    """Decide whether an entry of this folder is a method: files are, sub-packages are not."""
    return not module.ispkg and module.name != "base"


def from_config(config: Mapping[str, Any], *, total_steps: int, steps_per_epoch: int) -> Method:
    """Build a method from its config section.

    Args:
      config: `config.method`: `name` selects the module, all other keys are fields of its `Method`.
      total_steps: length of the run in optimizer steps. Only methods with a schedule in training
        progress have this field; for others it is ignored.
      steps_per_epoch: optimizer steps in an epoch. Only methods with a schedule in epochs have
        this field; for others it is ignored.

    An option of `SHARES` that is None follows the grid. Recipes lack `frozen`, the `config.method`
    of the run that a frozen teacher comes from, see common/targets.py; and `modalities`, (name,
    channels, patch size) of each, see data/modalities.py.

    Raises:
      UserError: unknown method, missing or unknown key, or an invalid value.
    """
    options = dict(config)
    name = options.pop("name")
    frozen = options.pop("frozen", None)
    modalities = options.pop("modalities", ())
    if name not in names():
        raise UserError(f"config.method.name={name!r} is not a method{did_you_mean(name, names())}")
    found = method_class(name)
    fields = {field.name for field in dataclasses.fields(found)}
    schedule = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    _check_keys(name, options.keys(), fields - schedule.keys() - {"frozen", "modalities"})
    arguments = {key: _hashable(value) for key, value in options.items()}
    if "target" in arguments:
        arguments["target"] = arguments["target"].partition(":")[0]  # frozen:RUN
    arguments["modalities"] = tuple(Modality(*modality) for modality in modalities)
    if "frozen" in fields:
        arguments["frozen"] = None
    if frozen:
        arguments["frozen"] = from_config(frozen, **schedule)
    for key, share in found.SHARES.items():
        if arguments[key] is None:
            arguments[key] = round(share * math.prod(arguments["grid"]))
    for key, length in schedule.items():
        if key in fields:
            arguments[key] = length
    return found(**arguments)


def _check_keys(name: str, given: Iterable[str], known: set[str]) -> None:
    """Raise a UserError unless exactly the known keys are given."""
    unknown = sorted(set(given) - known)
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise UserError(f"config.method.{unknown[0]}: {name} has no such key{hint}")
    missing = sorted(known - set(given))
    if missing:
        raise UserError(
            f"config.method lacks {', '.join(missing)}, which {name} needs; see its recipe in "
            "configs/"
        )


def _hashable(value: Any) -> Any:
    """Turn a list into a tuple: JSON has no tuples, and a method must be hashable."""
    return tuple(value) if isinstance(value, list) else value
