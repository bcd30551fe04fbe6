"""The contract of an evaluator, its lookup by module name, and features of a whole split.

An evaluator is a frozen dataclass whose fields are its config, without defaults, and

  run(method, params, data) -> {name: number or picture}

A picture is a uint8 array [H, W, 3]; the run writes it as PNG and to TensorBoard.
method: see methods/base.py. params: online weights, or with the target's in their place (`params: target`).
data: an `EvaluationData`. A file in this folder *is* a registered evaluator.

A class attribute `labelled = True` says that there is nothing to measure without classes and a test split: run gives
{} then. A class attribute `takes_pixels = True` says that its field `feature` may be any that `split_features` takes,
those of pooling.FIXED among them: what it comes to on raw pixels can stand beside.
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil

import jax
import numpy as np

from lmim_jax.distributed import sharding
from lmim_jax.evaluators.common import image_features
from lmim_jax.utils.errors import UserError

# `type` of an evaluator in the config.json of runs made before version 0.2 -> its module now
FORMER_NAMES = {
    "linear": "logistic_regression",
    "attentive": "attentive_probe",
    "video": "video_segmentation",
    "attributes": "clevr",
    "pictures": "visualization",
}


def _registered(module):
    """Whether a module of this folder is an entry: any file but this one; the folder common/ is shared code."""
    return not module.ispkg and module.name != "base"


def names():
    """The evaluators there are: the modules of this folder."""
    import lmim_jax.evaluators as package

    return sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if _registered(module)
    )


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
        kind = FORMER_NAMES.get(kind, kind)
        if kind not in names():
            near = difflib.get_close_matches(str(kind), names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (there are: {', '.join(names())})"
            raise UserError(f"{here}.type={kind!r} is no evaluator{hint}")
        if weights not in ("online", "target") or (weights == "target" and not has_target):
            why = (
                "the method has no target encoder"
                if weights == "target"
                else "choose online or target"
            )
            raise UserError(f"{here}.params={weights!r}: {why}")
        cls = importlib.import_module(f"lmim_jax.evaluators.{kind}").Evaluator
        known = {field.name for field in dataclasses.fields(cls)}
        if known != fields.keys():
            wrong = ", ".join(sorted(known ^ fields.keys()))
            raise UserError(
                f"{here}: unknown or missing keys {wrong}; {kind} takes {', '.join(sorted(known))}"
            )
        scheduled.append(Scheduled(title, round(every * steps_per_epoch), weights, cls(**fields)))
    return scheduled


def _pop(fields, key, where):
    """Take a key every evaluator has out of its section."""
    if key not in fields:
        raise UserError(f"{where} lacks {key!r}")
    return fields.pop(key)


@functools.lru_cache(maxsize=8)
def _pooled(method, augment, mesh, feature):
    """Jitted (params, batch) -> (feature of each image [B, D], label [B], index [B]), equal on all devices."""

    def pooled(params, batch):
        return (
            image_features.vectors(method, augment, params, batch["images"], feature),
            batch["label"],
            batch["index"],
        )

    return jax.jit(pooled, out_shardings=sharding.replicated(mesh))


def split_features(method, params, data, split, feature, batch_size):
    """A feature of every readable image of a split.

    Args:
      feature: such as "cls" or "cls+patches_prenorm", see `pooling.parse` and configs/evaluate.py.

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

    if data.cache is None or not image_features.needs_encoder(
        feature
    ):  # pixels take more room than time
        return compute()
    return data.cache.get(method, params, data, split, feature, compute)


def labelled(data):
    """Whether there are classes to tell apart, and test images to do it on."""
    return bool(data.classes) and data.sources["test"] is not None
