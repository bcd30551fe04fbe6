"""Validation of method options: each check raises a UserError that names the config key."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from lmim_jax.methods.common import masking
from lmim_jax.utils.errors import UserError


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that an option has one of its possible values.

    Args:
      key: name of the option below `config.method`.
      value: its value.
      choices: all possible values.

    Raises:
      UserError: the value is not one of the choices, which the message lists.
    """
    known = list(choices)
    if value not in known:
        raise UserError(f"config.method.{key}={value!r} must be one of: {' | '.join(known)}")


def check_range(key: str, value: float, low: float, high: float = math.inf) -> None:
    """Check that low <= value <= high.

    Args:
      key: name of the option below `config.method`.
      value: its value.
      low: smallest value allowed.
      high: largest value allowed.

    Raises:
      UserError: the value is out of range.
    """
    if low <= value <= high:
        return
    allowed = f"{low} .. {high}"
    if high == math.inf:
        allowed = f"at least {low}"
    raise UserError(f"config.method.{key}={value} is out of range: it must be {allowed}")


def check_heads(width_key: str, width: int, heads_key: str, heads: int) -> None:
    """Check that a width can be split into attention heads and hold sin-cos positions.

    Args:
      width_key: name of the option with the width.
      width: its value, which must be divisible by 4.
      heads_key: name of the option with the number of attention heads.
      heads: its value, which must divide the width.

    Raises:
      UserError: one of the two conditions does not hold.
    """
    if heads < 1 or width % heads or width % 4:
        raise UserError(
            f"config.method.{width_key}={width} is not divisible by {heads_key}={heads} and by 4"
        )


def check_sampler(sampler: str, grid: tuple[int, int], mask_ratio: float) -> None:
    """Check that a mask sampler of `masking.SAMPLERS` can split a grid at this ratio.

    Args:
      sampler: `config.method.sampler`.
      grid: rows and columns of patches.
      mask_ratio: share of patches that are masked; one patch or more must be masked, and one or
        more visible.

    Raises:
      UserError: unknown sampler, ratio out of range, or a grid that the sampler cannot split so.
    """
    num_patches = math.prod(grid)
    check_range("mask_ratio", mask_ratio, 1 / num_patches, 1 - 1 / num_patches)
    check_choice("sampler", sampler, masking.SAMPLERS)
    split = masking.SAMPLERS[sampler]
    try:
        jax.eval_shape(lambda key: split(key, grid, mask_ratio), jax.random.key(0))
    except ValueError as error:
        raise UserError(f"config.method.sampler={sampler}: {error}") from error
