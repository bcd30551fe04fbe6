"""The pretraining optimizer from its config: AdamW, its schedules, and what depends on names."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from lmim_jax.optim import schedules
from lmim_jax.utils.errors import UserError

Rules = Sequence[tuple[str, Any]]


def match_rules(rules: Rules, params: Any, key: str) -> Any:
    """Choose a value for every parameter from rules on its path, "encoder/block00/norm1/scale".

    The first full match wins; every parameter must match.

    Args:
      rules: pairs of (regex, value).
      params: nested dict of parameters.
      key: the config key of the rules, for the error message.

    Returns:
      A tree like `params`, of values.

    Raises:
      UserError: parameters that no rule matches, with their names.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    unmatched = []

    def choose(path: tuple[Any, ...], _: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, value in compiled:
            if pattern.fullmatch(name):
                return value
        unmatched.append(name)
        return None

    # Unlike a loop over leaves, this keeps empty sub-trees, such as that of a missing projector.
    values = jax.tree_util.tree_map_with_path(choose, params)
    if unmatched:
        raise UserError(
            f"{key}: no rule matches {', '.join(unmatched[:5])}; end the list with ('.*', value)"
        )
    return values


def make_schedules(
    config: ConfigDict,
    *,
    warmup_steps: float,
    total_steps: int,
    steps_per_epoch: float,
    start: int = 0,
) -> tuple[schedules.Schedule, schedules.Schedule]:
    """Build the schedules of the learning rate and of the weight decay.

    Args:
      config: `config.optimizer`, see configs/vit_b.py.
      warmup_steps: length of the warm-up in optimizer steps.
      total_steps: length of the schedules in optimizer steps, warm-up included.
      steps_per_epoch: optimizer steps in an epoch, for `config.per_epoch`.
      start: the step at which they begin.

    Returns:
      (learning rate, weight decay), what the optimizer uses in a step, counted from 0.
    """
    unit = 1.0
    if config.per_epoch:
        unit = steps_per_epoch
    curve = schedules.warmup_cosine(
        config.warmup_start * config.lr,
        config.lr,
        config.floor * config.lr,
        warmup_steps / unit,
        total_steps / unit,
        config.rebased,
        config.peak_in_warmup,
        config.cosine_share,
    )

    def learning_rate(step: schedules.Step) -> schedules.Scalar:
        step = schedules.since(step, start) + config.steps_ahead
        if config.per_epoch:
            step = step // steps_per_epoch
        return curve(step)

    def weight_decay(step: schedules.Step) -> schedules.Scalar:
        progress = (schedules.since(step, start) + config.steps_ahead) / total_steps
        return schedules.cosine(config.weight_decay, config.weight_decay_end, progress)

    return learning_rate, weight_decay


def from_config(
    config: ConfigDict,
    *,
    warmup_steps: float,
    total_steps: int,
    steps_per_epoch: float,
    start: int = 0,
) -> tuple[optax.GradientTransformation, schedules.Schedule]:
    """Build the optimizer and its learning-rate schedule.

    Args:
      config: `config.optimizer`, see configs/vit_b.py.
      warmup_steps: see `make_schedules`.
      total_steps: see `make_schedules`.
      steps_per_epoch: see `make_schedules`.
      start: see `make_schedules`.

    Returns:
      (optax transformation, learning rate as a function of the step).

    Raises:
      UserError: unknown `config.name`; and, when the optimizer is initialized, parameters that no
        rule of `config.decay_rules` or `config.lr_rules` matches.
    """
    if config.name not in ADAM:
        listed = " | ".join(ADAM)
        raise UserError(f"config.optimizer.name={config.name!r} must be one of: {listed}")
    learning_rate, weight_decay = make_schedules(
        config,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        start=start,
    )
    adam = ADAM[config.name](b1=config.b1, b2=config.b2, eps=config.eps)
    if config.clip_norm:
        adam = optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
    # With usual rules, this is optax.adamw, with a schedule for the weight decay too.
    transforms = [adam, *_decays(config.decay_rules, weight_decay)]
    if any(factor != 1 for _, factor in config.lr_rules):
        transforms.append(_scale_by_rules(config.lr_rules))
    transforms.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*transforms), learning_rate


def scale_by_fairseq_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as in fairseq: eps is added to the root of the second moment before its correction.

    So eps is divided by sqrt(1 - b2^step), 4.5 at the first step with b2 = 0.95. The state is that
    of `optax.scale_by_adam`.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: see above.

    Source: `fairseq.optim.adam.Adam`.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(grads, state, params)
        factor = jnp.sqrt(1 - b2**state.count) / (1 - b1**state.count)

        def scale(mean: Array, square: Array) -> Array:
            return factor * mean / (jnp.sqrt(square) + eps)

        return jax.tree.map(scale, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


# The first part of the optimizer by its names in configs
ADAM: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adamw_fairseq": scale_by_fairseq_adam,
}


def _decays(
    rules: Rules, weight_decay: schedules.Schedule
) -> Iterator[optax.GradientTransformation]:
    """Yield the weight decay of the parameters with each of the factors of some rules."""

    def of_factor(factor: float) -> optax.GradientTransformation:
        def decay(step: schedules.Step) -> schedules.Scalar:
            return factor * weight_decay(step)

        def mask(params: Any) -> Any:
            factors = match_rules(rules, params, "config.optimizer.decay_rules")
            return jax.tree.map(lambda found: found == factor, factors)

        return optax.add_decayed_weights(decay, mask=mask)

    factors = {float(factor) for _, factor in rules}
    # Also where nothing is decayed: checkpoints have the count of its steps
    for factor in sorted(factors - {0.0}) or [1.0]:
        yield of_factor(factor)


def _scale_by_rules(rules: Rules) -> optax.GradientTransformation:
    """Scale the updates of every parameter by the factor that rules give it."""

    def scale(updates: Any, _: Any) -> Any:
        factors = match_rules(rules, updates, "config.optimizer.lr_rules")
        return scale_by(factors, updates)

    return optax.stateless(scale)


def scale_by(factors: Any, updates: Any) -> Any:
    """Multiply the updates of every parameter by its factor."""
    return jax.tree.map(lambda update, factor: update * factor, updates, factors)
