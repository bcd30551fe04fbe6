"""What methods share that take images of several modalities: masks, and embeddings in decoders.

Token m N + i is position i of modality m, see models/modalities.py. Every modality has as many
visible and as many masked patches as any other.

Letters: B batch, M modalities, N positions, V visible and H masked patches of a modality, T tokens,
d decoder width, P values of a patch.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lmim_jax.methods.base import Params, ViTMethod
from lmim_jax.methods.common.checks import check_choice
from lmim_jax.methods.common.masking import Split
from lmim_jax.models import normalization
from lmim_jax.models.modalities import replace_all

MASKS = ("independent", "joint")
EMBEDDING_STREAM = 1 << 17  # random numbers of the embeddings are no others' of the same key


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeveralModalities(ViTMethod):
    """A method whose images may have several modalities; the field is explained in its recipe."""

    modality_masks: str

    SEVERAL_MODALITIES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("modality_masks", self.modality_masks, MASKS)

    def split_tokens(
        self, keys: Key[Array, " B"], split: Callable[[Key[Array, ""]], Split]
    ) -> tuple[Int[Array, "B M*V"], Int[Array, "B M*H"]]:
        """Draw the visible and masked tokens of all modalities.

        Args:
          keys: one for each mask; the first modality is split by these.
          split: divides the positions of one modality, see masking.py.
        """
        visible = []
        masked = []
        for number in range(len(self.inputs)):
            own = keys
            if number and self.modality_masks == "independent":
                own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
            seen, hidden = jax.vmap(split)(own)
            visible.append(seen + number * self.num_patches)
            masked.append(hidden + number * self.num_patches)
        return jnp.concatenate(visible, axis=1), jnp.concatenate(masked, axis=1)

    def init_modalities(self, rng: Key[Array, ""], width: int) -> Params:
        """Create the embeddings of modalities in a decoder, {"modalities"}; {} of a single one."""
        embeddings = {}
        for number, modality in enumerate(self.modalities):
            key = jax.random.fold_in(rng, EMBEDDING_STREAM + number)
            embeddings[f"{modality.name}_embed"] = 0.02 * jax.random.normal(key, (1, 1, width))
        return {"modalities": embeddings} if embeddings else {}

    def decoder_positions(
        self, params: Params, positions: Float[np.ndarray, "N d"]
    ) -> Float[Array, "1 T d"]:
        """Positions of all tokens for a decoder, with the embeddings of their modalities."""
        if not self.modalities:
            return self.for_all_modalities(positions)
        parts = []
        for modality in self.modalities:
            parts.append(positions[None] + params["modalities"][f"{modality.name}_embed"])
        return jnp.concatenate(parts, axis=1)

    def losses_of(
        self,
        loss: Callable[[Array, Array], Float[Array, ""]],
        predictions: Float[Array, "B T _"],
        targets: Float[Array, "B T _"],
        padded: bool = True,
    ) -> list[Float[Array, ""]]:
        """Compute a loss of each modality by itself.

        Args:
          loss: of predictions and targets.
          predictions: as many of each modality, one modality after the other.
          targets: likewise.
          padded: whether they are pixels, of which the padding is left out.
        """
        count = len(self.inputs)
        found = []
        for modality, predicted, true in zip(
            self.inputs,
            jnp.split(predictions, count, axis=1),
            jnp.split(targets, count, axis=1),
            strict=True,
        ):
            width = modality.patch_dim if padded else None
            found.append(loss(predicted[..., :width], true[..., :width]))
        return found

    def pixel_moments(
        self, patches: Float[Array, "B T P"]
    ) -> tuple[Float[Array, "B T 1"], Float[Array, "B T 1"]]:
        """Mean and standard deviation of every patch, without padding."""
        means = []
        stddevs = []
        parts = jnp.split(patches, len(self.inputs), axis=1)
        for modality, part in zip(self.inputs, parts, strict=True):
            mean, stddev = normalization.token_moments(part[..., : modality.patch_dim])
            means.append(mean)
            stddevs.append(stddev)
        return jnp.concatenate(means, axis=1), jnp.concatenate(stddevs, axis=1)

    def paint(
        self,
        images: Float[Array, "B H W C"],
        tokens: Int[Array, "B T"],
        patches: Float[Array, "B T P"],
    ) -> Float[Array, "B H W C"]:
        """Replace some patches of images, see `modalities.replace_all`."""
        return replace_all(images, tokens, patches, self.inputs, self.grid, self.patch_size)
