"""Optimisers from config: schedule, AdamW, weight decay by parameter name."""

import re

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lmim_jax import schedules
from lmim_jax.errors import UserError


def by_name(rules, params, key):
    """A value for every parameter from (regex, value) rules on its path, "encoder/block00/norm1/scale".

    First full match wins; every parameter must match.

    Args:
      rules: sequence of (regex, value).
      params: nested dict.
      key: the config key of the rules, for the error.

    Returns:
      A tree like `params` of values.

    Raises:
      UserError: listing parameters that no rule covers.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    names = flatten_dict(params, sep="/")
    values = {name: next((value for rule, value in compiled if rule.fullmatch(name)), None) for name in names}
    if uncovered := [name for name, value in values.items() if value is None]:
        raise UserError(f"{key}: no rule matches {', '.join(uncovered[:5])}; end the list with ('.*', value)")
    return unflatten_dict(values, sep="/")


def from_config(config, *, warmup_steps, total_steps):
    """Build the optimiser and its learning-rate schedule.

    Args:
      config: `config.optimizer`, see configs/vit_b.py. warmup_steps, total_steps: in optimiser steps.

    Returns:
      (optax transformation, function of the step giving the learning rate).
    """
    if config.name != "adamw":
        raise UserError(f"config.optimizer.name={config.name!r} is not known; there is: adamw")
    rate = schedules.warmup_cosine(config.lr, config.floor * config.lr, warmup_steps, total_steps)

    def decayed(params):
        scale = by_name(config.decay_rules, params, "config.optimizer.decay_rules")
        return jax.tree.map(bool, scale)

    optimizer = optax.adamw(
        rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    return optimizer, rate
