"""Optimisers from config: schedule, AdamW, weight decay by parameter name."""

import re

import jax
import optax

from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError


def match_rules(rules, params, key):
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
    uncovered = []

    def choose(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = next((value for rule, value in compiled if rule.fullmatch(name)), None)
        uncovered.extend([name] if value is None else [])
        return value

    values = jax.tree_util.tree_map_with_path(
        choose, params
    )  # keeps empty sub-trees, such as that of no projector
    if uncovered:
        raise UserError(
            f"{key}: no rule matches {', '.join(uncovered[:5])}; end the list with ('.*', value)"
        )
    return values


def from_config(config, *, warmup_steps, total_steps):
    """Build the optimiser and its learning-rate schedule.

    Args:
      config: `config.optimizer`, see configs/vit_b.py. warmup_steps, total_steps: in optimiser steps.

    Returns:
      (optax transformation, function of the step giving the learning rate).
    """
    if config.name != "adamw":
        raise UserError(f"config.optimizer.name={config.name!r} is not known; there is: adamw")
    start, floor = config.warmup_start * config.lr, config.floor * config.lr
    rate = schedules.warmup_cosine(
        start, config.lr, floor, warmup_steps, total_steps, config.rebased
    )
    decay = lambda step: schedules.cosine(
        config.weight_decay, config.weight_decay_end, step / total_steps
    )

    def decayed(params):
        scale = match_rules(config.decay_rules, params, "config.optimizer.decay_rules")
        return jax.tree.map(bool, scale)

    optimizer = optax.chain(  # AdamW, with a schedule for the decay too
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(decay, mask=decayed),
        optax.scale_by_learning_rate(rate),
    )
    return optimizer, rate
