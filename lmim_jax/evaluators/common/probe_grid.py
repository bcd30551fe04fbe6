"""Probes of frozen features that choose among settings on held-out training images.

All settings are trained at once on the same batches: heads that differ only in learning rate and
weight decay in one `vmap`, so that the frozen features of a batch are computed once for all. A part
of the training images is held out; the head that is best on them is measured on the test images,
and no other: by the accuracy of classes, the mean average precision of 0/1 labels, or R^2 of
numbers. With one setting, nothing is held out.

Source: CAPI (Darcet et al. 2025), classification probes; DINOv2 (Oquab et al. 2024), linear ones.

Letters: B batch, H heads, Q held-out images, T labels.
"""

import abc
import csv
import dataclasses
import functools
import io
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Shaped

from lmim_jax.data.eval.eval_data import Batch, EvaluationData, targets_of, with_held_out
from lmim_jax.data.label_file import CLASSES, MULTILABEL
from lmim_jax.distributed import sharding
from lmim_jax.evaluators.base import EvaluatedMethod, Params, Results, is_possible
from lmim_jax.evaluators.common import probe_training, target_metrics
from lmim_jax.evaluators.common.probe_training import (
    Length,
    Probe,
    Rates,
    Task,
    TrainingBatch,
    Weights,
    build_programs,
    task_of,
)
from lmim_jax.utils.errors import UserError

log = logging.getLogger(__name__)

RATES = ("base_lr", "weight_decay")  # fields in which the heads of a group differ


@dataclasses.dataclass(frozen=True)
class GridProbe(Probe, abc.ABC):
    """A probe whose fields may hold several values to choose from.

    Attributes:
      feature: of the frozen encoder.
      held_out: share of the training images on which settings are compared.
    """

    feature: str
    held_out: float

    def choices(self) -> dict[str, Sequence[Any]]:
        """The values to choose from, by field; single numbers count as one value."""
        found: dict[str, Sequence[Any]] = {}
        for field in RATES:
            found[field] = as_choices(getattr(self, field))
        return found

    def settings(self) -> list["GridProbe"]:
        """All combinations of the choices, each a probe with one value in each field.

        Raises:
          UserError: a field is empty, or nothing is held out to choose on.
        """
        choices = self.choices()
        empty = [field for field, values in choices.items() if not values]
        if empty:
            raise UserError(f"evaluator {self.name}: {empty[0]} is empty; give at least one value")
        found = []
        for values in itertools.product(*choices.values()):
            found.append(dataclasses.replace(self, **dict(zip(choices, values, strict=True))))
        if len(found) > 1 and not 0 < self.held_out < 1:
            raise UserError(
                f"evaluator {self.name}: held_out={self.held_out} must be in 0 .. 1 to choose "
                f"among {len(found)} settings"
            )
        return found

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Train all settings on a part of the training images, and test the best one.

        Returns:
          With one setting, see `Probe.run`. With several, also {"held_out": percent that the best
          head reaches on the held-out training images, its "base_lr" and "weight_decay", "grid":
          a table of all settings in CSV}.

        Raises:
          UserError: see `Probe.run`.
        """
        settings = self.settings()
        if len(settings) == 1:
            return Probe.run(settings[0], method, params, data)
        if not is_possible(self, data):
            return {}
        data = with_held_out(self.prepare(data), self.held_out, self.seed)
        length = self.length(data)
        task = task_of(method, self.augmentation(data.augment), data)
        grid = build_grid(tuple(settings), task, data.mesh, length, data.config.channels)
        log.info(
            "%s: %d heads at once; %d training images are held out to choose one",
            self.name,
            len(settings),
            len(data.sources["held_out"]),
        )
        state = probe_training.train(self, grid, params, data, length)
        scores = self._held_out_scores(grid, task, params, state, data)
        best = int(scores.argmax())  # the first of equally good ones
        chosen = settings[best]
        self._report(settings, scores, best)
        programs = build_programs(chosen, task, data.mesh, length, data.config.channels)
        results = chosen.test(task, programs, params, grid.select(state, best), data)
        results["held_out"] = float(scores[best])
        for field in RATES:
            results[field] = float(getattr(chosen, field))
        results["grid"] = self._table(settings, scores)
        return results

    def _held_out_scores(
        self,
        grid: "GridPrograms",
        task: Task,
        params: Params,
        state: Params,
        data: EvaluationData,
    ) -> Float[np.ndarray, " H"]:
        """The percentage that each head reaches on the held-out images, see the file.

        That of a head whose outputs are not finite is -inf.

        Raises:
          UserError: this holds for all of them.
        """
        targets = targets_of(data.sources["held_out"])
        answers = []
        truth = []
        finite = []
        for batch in data.batches("held_out", self.batch_size):
            found = jax.device_get(grid.score(state, params, batch))
            counted = found["index"] >= 0
            if not targets:
                counted = counted & (found["label"] >= 0)
            answers.append(found["answers"][:, counted])
            finite.append(found["finite"][:, counted])
            own = found["label"] if not targets else targets.values[found["index"]]
            truth.append(own[counted])
        is_finite = np.concatenate(finite, axis=1).all(axis=1)
        if not is_finite.any():
            raise UserError(
                f"{self.name}: the outputs of all heads are not finite, so that nothing can be "
                "measured; lower its base_lr"
            )
        labels = np.concatenate(truth)
        scores = []
        for own, usable in zip(np.concatenate(answers, axis=1), np.asarray(is_finite), strict=True):
            scores.append(_score(task.kind, own, labels) if usable else -np.inf)
        if np.isnan(scores).any():
            raise UserError(
                f"{self.name}: no label has two values among the {len(labels)} held-out images, "
                "so that nothing can be chosen on them; raise its held_out"
            )
        return np.array(scores)

    def _report(
        self, settings: Sequence["GridProbe"], scores: Float[np.ndarray, " H"], best: int
    ) -> None:
        """Log the choice, and whether it lies at an end of what it was chosen from."""
        chosen = settings[best]
        several = {field: values for field, values in self.choices().items() if len(values) > 1}
        listed = ", ".join(f"{field} {getattr(chosen, field)}" for field in several)
        log.info(
            "%s: the best of %d heads on held-out images: %s (%.2f %%; the worst %.2f %%)",
            self.name,
            len(settings),
            listed,
            scores[best],
            scores.min(),
        )
        for field in RATES:
            values = several.get(field, ())
            if len(values) > 2 and getattr(chosen, field) in (min(values), max(values)):
                log.info(
                    "%s: the best %s is the last of the candidates, %g: also try others beyond it",
                    self.name,
                    field,
                    getattr(chosen, field),
                )

    def _table(self, settings: Sequence["GridProbe"], scores: Float[np.ndarray, " H"]) -> str:
        """All settings with their percentages on held-out images, in CSV."""
        text = io.StringIO()
        fields = list(self.choices())
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*fields, "held_out"])
        for setting, score in zip(settings, scores, strict=True):
            values = [getattr(setting, field) for field in fields]
            writer.writerow([*values, f"{score:.3f}"])
        return text.getvalue()


def _score(
    kind: str, answers: Shaped[np.ndarray, "Q ..."], truth: Shaped[np.ndarray, "Q ..."]
) -> float:
    """The percentage by which heads are compared; NaN where the labels do not vary.

    Args:
      kind: of labels, see data/label_file.py.
      answers: classes, probabilities of labels, or numbers.
      truth: the labels.
    """
    if kind == CLASSES:
        return 100 * float(np.mean(answers == truth))
    if kind == MULTILABEL:
        return 100 * _mean_of_known(target_metrics.average_precisions(answers, truth))
    return 100 * _mean_of_known(target_metrics.determination(answers, truth))


def _mean_of_known(values: Float[np.ndarray, " T"]) -> float:
    """The mean of what is not NaN; NaN where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def as_choices(value: Any) -> tuple[Any, ...]:
    """The values of a field: of a tuple, its elements; else itself."""
    return value if isinstance(value, tuple) else (value,)


class GridPrograms(NamedTuple):
    """The jitted functions of all settings.

    Attributes:
      create: (params of the method) -> state.
      step: (state, params, batch of canvases) -> (state, losses [H]).
      score: (state, params, batch of test images) -> {"answers": classes [H, B] or labels
        [H, B, T], "finite": bool [H, B], "index" and "label": as in the batch}.
      select: (state, number of a setting) -> the state of this setting alone, as that of
        `probe_training.Programs`.
    """

    create: Callable[[Params], Params]
    step: Callable[[Params, Params, Batch], tuple[Params, Array]]
    score: Callable[[Params, Params, Batch], Batch]
    select: Callable[[Params, int], Params]


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Settings that differ only in `RATES`: heads that are trained in one `vmap`.

    Attributes:
      probe: any of them.
      rates: of all, arrays [H].
      places: their numbers among all settings.
      task: what they learn.
      length: of training.
    """

    probe: GridProbe
    rates: Rates
    places: list[int]
    task: Task
    length: Length

    def create(self, params: Params, channels: int) -> Params:
        """The heads before training, with a leading axis."""

        def create_one(rates: Rates) -> Params:
            return probe_training.create_head(
                self.probe, rates, self.task, params, self.length, channels
            )

        return jax.vmap(create_one)(self.rates)

    def train(
        self, heads: Params, params: Params, batch: TrainingBatch
    ) -> tuple[Params, Float[Array, " H"]]:
        """The heads after a step, and their losses."""

        def train_one(rates: Rates, head: Params) -> tuple[Params, Float[Array, ""]]:
            return probe_training.train_head(
                self.probe, rates, self.task, params, self.length, head, batch
            )

        return jax.vmap(train_one)(self.rates, heads)

    def score(
        self, heads: Params, params: Params, batch: Batch
    ) -> tuple[Shaped[Array, "H B ..."], Bool[Array, "H B"]]:
        """The most likely classes, or labels [H, B, T]; and whether the outputs are finite."""

        def score_one(head: Params) -> tuple[Array, Array]:
            weights = Weights(params, head["trained"], head["buffers"])
            logits = self.probe.logits(self.task, weights, batch["images"])
            answers = self.task.answers(logits)
            if self.task.kind == CLASSES:
                answers = logits.argmax(axis=1)
            return answers, jnp.isfinite(logits).all(axis=1)

        return jax.vmap(score_one)(heads)


def _group(settings: Sequence[GridProbe], task: Task, length: Length) -> dict[str, _Group]:
    """The settings by what they have in common, under names."""
    members: dict[GridProbe, list[int]] = {}
    for place, setting in enumerate(settings):
        common = dataclasses.replace(setting, base_lr=0.0, weight_decay=0.0)
        members.setdefault(common, []).append(place)
    groups: dict[str, _Group] = {}
    for common, places in members.items():
        arrays = []
        for field in RATES:
            values = [getattr(settings[place], field) for place in places]
            arrays.append(np.array(values, np.float32))
        groups[f"group{len(groups)}"] = _Group(common, Rates(*arrays), places, task, length)
    return groups


def _select(groups: Mapping[str, _Group], state: Params, number: int) -> Params:
    """The state of one setting, see `GridPrograms`."""
    (name,) = (name for name, group in groups.items() if number in group.places)
    row = groups[name].places.index(number)

    def take(leaf: Array) -> Array:
        return leaf[row]

    return {"step": state["step"], **jax.tree.map(take, state[name])}


@functools.lru_cache(maxsize=4)
def build_grid(
    settings: tuple[GridProbe, ...], task: Task, mesh: Mesh, length: Length, channels: int
) -> GridPrograms:
    """Build the programs of all settings; each is compiled on its first call.

    Args:
      settings: see `GridProbe.settings`.
      task: what they learn.
      mesh: of the batches.
      length: of training.
      channels: of images.
    """
    groups = _group(settings, task, length)
    order = np.argsort(np.concatenate([group.places for group in groups.values()]))

    def place(state: Params) -> Params:
        return jax.lax.with_sharding_constraint(state, sharding.state_sharding(state, mesh))

    def create(params: Params) -> Params:
        state: Params = {"step": jnp.zeros((), jnp.int32)}
        for name, group in groups.items():
            state[name] = group.create(params, channels)
        return place(state)

    def step(state: Params, params: Params, batch: Batch) -> tuple[Params, Float[Array, " H"]]:
        training_batch = probe_training.augmented_batch(
            settings[0], task, mesh, state["step"], batch
        )
        after: Params = {"step": state["step"] + 1}
        losses = []
        for name, group in groups.items():
            after[name], group_losses = group.train(state[name], params, training_batch)
            losses.append(group_losses)
        return place(after), jnp.concatenate(losses)[order]

    def score(state: Params, params: Params, batch: Batch) -> Batch:
        answers = []
        finite = []
        for name, group in groups.items():
            found, is_finite = group.score(state[name], params, batch)
            answers.append(found)
            finite.append(is_finite)
        return {
            "answers": jnp.concatenate(answers)[order],
            "finite": jnp.concatenate(finite)[order],
            "index": batch["index"],
            "label": batch["label"],
        }

    return GridPrograms(
        create=jax.jit(create),
        step=jax.jit(step, donate_argnums=0),
        score=jax.jit(score, out_shardings=sharding.replicated(mesh)),
        select=functools.partial(_select, groups),
    )
