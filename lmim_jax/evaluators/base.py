"""The contract of an evaluator, its lookup by module name, and features of a whole split.

An evaluator is a frozen dataclass whose fields are its config, without defaults, and

  run(method, params, data) -> {name: number or picture}

A picture is a uint8 array [H, W, 3]; the run writes it as PNG and to TensorBoard.
method: see methods/base.py. params: online weights, or with the target's in their place (`params: target`).
data: an `evaluation.Evaluation`. A file in this folder *is* a registered evaluator.
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax import sharding
from lmim_jax.errors import UserError


def names():
    """The evaluators there are: the modules of this folder."""
    import lmim_jax.evaluators as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An evaluator of a run: its name in logs, when it runs and on which weights."""

    title: str
    every: int
    weights: str
    evaluator: object

    def due(self, step, total_steps):
        """Whether to run after `step` optimiser steps: on schedule, at the start and at the end.

        A run shorter than the interval is not evaluated: a smoke test of two steps need not embed a whole dataset.
        """
        if not self.every:
            return step == total_steps
        return total_steps >= self.every and (step % self.every == 0 or step == total_steps)

    def run(self, method, state, data):
        """({"title/name": number}, {"title/name": picture})."""
        params = state.params if self.weights == "online" else {**state.params, **state.target}
        result = self.evaluator.run(method, params, data)
        split = {True: {}, False: {}}
        for name, value in result.items():
            split[isinstance(value, np.ndarray)][f"{self.title}/{name}"] = value
        return split[False], split[True]


def from_config(config, *, steps_per_epoch, has_target):
    """Build the evaluators of `config.evaluators`, a mapping of titles to sections.

    A section has `type` (a module of this folder), `every` (epochs; 0: at the end only), `params` (online | target),
    and the evaluator's own fields.

    Raises:
      UserError: unknown type, missing or unknown key, or `params: target` for a method without a target encoder.
    """
    scheduled = []
    for title, section in config.items():
        where, fields = f"config.evaluators.{title}", dict(section)
        kind, every, weights = (_pop(fields, key, where) for key in ("type", "every", "params"))
        if kind not in names():
            near = difflib.get_close_matches(str(kind), names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (there are: {', '.join(names())})"
            raise UserError(f"{where}.type={kind!r} is no evaluator{hint}")
        if weights not in ("online", "target") or (weights == "target" and not has_target):
            why = "the method has no target encoder" if weights == "target" else "choose online or target"
            raise UserError(f"{where}.params={weights!r}: {why}")
        cls = importlib.import_module(f"lmim_jax.evaluators.{kind}").Evaluator
        known = {field.name for field in dataclasses.fields(cls)}
        if known != fields.keys():
            wrong = ", ".join(sorted(known ^ fields.keys()))
            raise UserError(f"{where}: unknown or missing keys {wrong}; {kind} takes {', '.join(sorted(known))}")
        scheduled.append(Scheduled(title, round(every * steps_per_epoch), weights, cls(**fields)))
    return scheduled


def _pop(fields, key, where):
    """Take a key every evaluator has out of its section."""
    if key not in fields:
        raise UserError(f"{where} lacks {key!r}")
    return fields.pop(key)


def fixed_features(images, levels, name):
    """What needs no encoder, one vector per image.

    Args:
      images: [B, H, W, C] as the encoder sees them. levels: the same as levels 0 .. 255.
      name: "pixels": the image itself. "histogram": square root of the share of pixels in each of 6^C colours (so that
        the cosine is Bhattacharyya's coefficient).
    """
    if name == "pixels":
        return images.reshape(len(images), -1)
    channels = images.shape[-1]
    color = jnp.minimum((levels * (6 / 256)).astype(jnp.int32), 5) @ 6 ** jnp.arange(channels)
    count = lambda row: jnp.bincount(row, length=6**channels)
    return jnp.sqrt(jax.vmap(count)(color.reshape(len(images), -1)) / color[0].size)


FIXED = ("pixels", "histogram")


@functools.lru_cache(maxsize=8)
def _pooled(method, augment, mesh, name):
    """Jitted (params, batch) -> (mean of a feature over tokens [B, D], label [B], index [B]), equal on all devices."""

    def pooled(params, batch):
        if name in FIXED:
            x = fixed_features(batch["images"], augment.levels(batch["images"]), name)
        else:
            x = method.features(params, batch["images"])[name]
        x = x.astype(jnp.float32)
        return (x.mean(axis=1) if x.ndim == 3 else x), batch["label"], batch["index"]

    return jax.jit(pooled, out_shardings=sharding.replicated(mesh))


def split_features(method, params, data, split, name, batch_size):
    """A feature of every readable image of a split, averaged over patches where it has any.

    Args:
      name: key of the method's features, "cls" or "patches_prenorm", ...; or of FIXED.

    Returns:
      (float32 [N, D], labels int32 [N]), numpy, in order.
    """
    pooled = _pooled(method, data.augment, data.mesh, name)
    rows = [jax.device_get(pooled(params, batch)) for batch in data.batches(split, batch_size)]
    x, labels, index = (np.concatenate(column) for column in zip(*rows, strict=True))
    return x[index >= 0], labels[index >= 0]
