"""The contract of a method, and its lookup by module name: a file in this folder *is* a registered method.

A method is a frozen dataclass whose fields are its config, without defaults, so that a misspelt key is an error.
Its functions are pure:

  init(rng) -> params                                  {"encoder": ..., ...}
  sample(rng, keys) -> views                           every random choice of the loss: "visible" [B, V], the patches
                                                       that the encoder sees (where padded, bool "visible_mask" says
                                                       which count), window "offsets", ...
  loss_fn(params, target, images, views, step) -> (scalar, metrics)
  target_of(params) -> the sub-tree tracked by EMA     {} : no teacher
  ema_rate(step) -> scalar                             1 - momentum, applied right after optimiser step `step`
  features(params, images, rng=None) -> dict           "patches", "patches_prenorm", "cls", "block07/tokens", ...;
                                                       "latents", what targets are made of, where there are any
  image_size, feature_size -> (H, W)                   pixels that `loss` takes, and `features` at evaluation

and, of methods that predict pixels, one that nothing in training needs:

  reconstruct(params, images, views) -> images         [B, H, W, C] as `loss` takes them, hidden patches as predicted.
                                                       Where predictions are normalised patch by patch, they are given
                                                       mean and deviation of the true patch

`rng` serves what the whole batch shares, `keys` [B] what is drawn per image.
The step around it (`step.py`) is the same for all: sample, gradient, optimiser, target += ema_rate (new - target).
"""

import dataclasses
import difflib
import importlib
import math
import pkgutil

import jax

from lmim_jax.methods.common import masking
from lmim_jax.utils.errors import UserError


def _registered(module):
    """Whether a module of this folder is an entry: any file but this one; the folder common/ is shared code."""
    return not module.ispkg and module.name != "base"


def names():
    """The methods there are: the modules of this folder."""
    import lmim_jax.methods as package

    return sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if _registered(module)
    )


def from_config(config, *, total_steps, steps_per_epoch):
    """Build a method from its config section: `name` picks the module, everything else is its fields.

    Args:
      config: mapping with `name` and exactly the fields of `lmim_jax.methods.<name>.Method`.
      total_steps, steps_per_epoch: lengths of the run, for the method's schedules.

    Raises:
      UserError: unknown method, missing or unknown key, or a value the method refuses.
    """
    fields = dict(config)
    name = fields.pop("name")
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"config.method.name={name!r} is no method{hint} (there are: {', '.join(names())})"
        )
    method = importlib.import_module(f"lmim_jax.methods.{name}").Method
    field_of = {field.name.removesuffix("_"): field.name for field in dataclasses.fields(method)}
    known = field_of.keys() - {"total_steps", "steps_per_epoch"}
    if unknown := sorted(fields.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f" (it has: {', '.join(sorted(known))})"
        raise UserError(f"config.method.{unknown[0]}: {name} has no such key{hint}")
    if missing := sorted(known - fields.keys()):
        raise UserError(
            f"config.method lacks {', '.join(missing)}, which {name} needs; see its recipe in configs/"
        )
    # JSON has no tuples, and fields must be hashable
    fields = {
        field_of[key]: tuple(value) if isinstance(value, list) else value
        for key, value in fields.items()
    }
    return method(**fields, total_steps=total_steps, steps_per_epoch=steps_per_epoch)


def check_choice(key, value, choices):
    """Raise a UserError naming the key and the choices, unless value is one of them."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"config.method.{key}={value!r} is none of: {' | '.join(choices)}{hint}")


def check_range(key, value, low, high=math.inf):
    """Raise a UserError naming the key and the range, unless low <= value <= high."""
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} .. {high}"
        raise UserError(f"config.method.{key}={value} is out of range: it must be {wanted}")


def check_heads(prefix, width, heads):
    """Raise a UserError unless heads divide the width, and 4 does (sin-cos positions)."""
    if heads < 1 or width % heads or width % 4:
        raise UserError(
            f"config.method.{prefix}width={width} is not divisible by {prefix}heads={heads} and by 4"
        )


def check_sampler(method):
    """Raise a UserError unless `method.sampler` is one of masking.SPLITS and can split its grid by its mask_ratio."""
    check_choice("sampler", method.sampler, masking.SPLITS)
    split = masking.SPLITS[method.sampler]
    try:
        jax.eval_shape(lambda key: split(key, method.grid, method.mask_ratio), jax.random.key(0))
    except ValueError as error:
        raise UserError(f"config.method.sampler={method.sampler}: {error}") from error
