"""The contract of an evaluator, its lookup by module name, and features of a whole split.

An evaluator is a frozen dataclass whose fields are its config, without defaults, and

  run(method, params, data) -> {name: number or picture}

A picture is a uint8 array [H, W, 3]; the run writes it as PNG and to TensorBoard.
method: see methods/base.py. params: online weights, or with the target's in their place (`params: target`).
data: an `evaluation.Evaluation`. A file in this folder *is* a registered evaluator.

A class attribute `labelled = True` says that there is nothing to measure without classes and a test split: run gives
{} then. A class attribute `takes_pixels = True` says that its field `feature` may be any that `split_features` takes,
those of FIXED among them: what it comes to on raw pixels can stand beside.
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


def from_config(config, *, steps_per_epoch, has_target, where="config.evaluators"):
    """Build the evaluators of `config.evaluators`, a mapping of titles to sections; `where` is its name in errors.

    A section has `type` (a module of this folder), `every` (epochs; 0: at the end only), `params` (online | target),
    and the evaluator's own fields.

    Raises:
      UserError: unknown type, missing or unknown key, or `params: target` for a method without a target encoder.
    """
    scheduled = []
    for title, section in config.items():
        here, fields = f"{where}.{title}", dict(section)
        kind, every, weights = (_pop(fields, key, here) for key in ("type", "every", "params"))
        if kind not in names():
            near = difflib.get_close_matches(str(kind), names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (there are: {', '.join(names())})"
            raise UserError(f"{here}.type={kind!r} is no evaluator{hint}")
        if weights not in ("online", "target") or (weights == "target" and not has_target):
            why = "the method has no target encoder" if weights == "target" else "choose online or target"
            raise UserError(f"{here}.params={weights!r}: {why}")
        cls = importlib.import_module(f"lmim_jax.evaluators.{kind}").Evaluator
        known = {field.name for field in dataclasses.fields(cls)}
        if known != fields.keys():
            wrong = ", ".join(sorted(known ^ fields.keys()))
            raise UserError(f"{here}: unknown or missing keys {wrong}; {kind} takes {', '.join(sorted(known))}")
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
POOLS = ("mean", "cls", "both")


def parse_feature(feature):
    """[(name, pool)] of what `feature` puts side by side: "cls+block07/tokens:both"; see configs/evaluate.py.

    Raises:
      UserError: no such pool.
    """
    parts = []
    for part in feature.split("+"):
        name, _, pool = part.strip().partition(":")
        if (pool or POOLS[0]) not in POOLS:
            raise UserError(f"feature {feature!r}: {pool!r} is none of: {' | '.join(POOLS)}")
        parts.append((name, pool or POOLS[0]))
    return parts


def needs_encoder(feature):
    """Whether `feature` holds more than what is in FIXED."""
    return any(name not in FIXED for name, _ in parse_feature(feature))


def pool_tokens(features, name, pool):
    """One vector per image of what a method calls `name`: [B, D], with pool "both" [B, 2 D].

    Args:
      features: of a method, see `methods.base`. name: a key of it. pool: one of POOLS; for "blockNN/tokens", whose
        first row is CLS where the method has one; anything else has but one pool, the mean over its rows (or itself).

    Raises:
      UserError: there is no such feature, it is not one of tokens, or it has no such pool.
    """
    if name not in features:
        near = difflib.get_close_matches(name, [*features, *FIXED], n=1)
        usual = ", ".join([*sorted(key for key in features if "/" not in key), "block00/tokens, ...", *FIXED])
        hint = f"; did you mean {near[0]}?" if near else f" (there are: {usual})"
        raise UserError(f"feature {name!r}: the method has none of that name{hint}")
    x = features[name].astype(jnp.float32)
    if x.ndim not in (2, 3):
        raise UserError(f"feature {name!r} has no vectors for images or patches to evaluate")
    with_cls = name.endswith("/tokens") and "cls" in features
    if pool != "mean" and not with_cls:
        raise UserError(f"feature {name!r} has no CLS token for :{pool}; join features instead: cls+{name}")
    tokens = {"mean": lambda: x[:, int(with_cls) :].mean(axis=1) if x.ndim == 3 else x, "cls": lambda: x[:, 0]}
    return jnp.concatenate([tokens[one]() for one in (("cls", "mean") if pool == "both" else (pool,))], axis=-1)


@functools.lru_cache(maxsize=8)
def _pooled(method, augment, mesh, feature):
    """Jitted (params, batch) -> (feature of each image [B, D], label [B], index [B]), equal on all devices."""
    parts = parse_feature(feature)

    def pooled(params, batch):
        images = batch["images"]
        known = {name: fixed_features(images, augment.levels(images), name) for name, _ in parts if name in FIXED}
        if needs_encoder(feature):
            known |= method.features(params, images)
        x = jnp.concatenate([pool_tokens(known, name, pool) for name, pool in parts], axis=-1)
        return x, batch["label"], batch["index"]

    return jax.jit(pooled, out_shardings=sharding.replicated(mesh))


def split_features(method, params, data, split, feature, batch_size):
    """A feature of every readable image of a split.

    Args:
      feature: such as "cls" or "cls+patches_prenorm", see `parse_feature` and configs/evaluate.py.

    Returns:
      (float32 [N, D], labels int32 [N]), numpy, in order; from `data.cache`, where there is one, if they are there.

    Raises:
      UserError: the method has no such feature.
    """

    def compute():
        pooled = _pooled(method, data.augment, data.mesh, feature)
        rows = [jax.device_get(pooled(params, batch)) for batch in data.batches(split, batch_size)]
        x, labels, index = (np.concatenate(column) for column in zip(*rows, strict=True))
        return x[index >= 0], labels[index >= 0]

    if data.cache is None or not needs_encoder(feature):  # pixels take more room than time
        return compute()
    return data.cache.get(method, params, data, split, feature, compute)


def labelled(data):
    """Whether there are classes to tell apart, and test images to do it on."""
    return bool(data.classes) and data.sources["test"] is not None
