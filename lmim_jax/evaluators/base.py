"""The contract of an evaluator, and its lookup by module name.

A file in this folder *is* a registered evaluator: its class `Evaluator` is a frozen dataclass that
derives from the protocol below. Its fields are its config section, without default values.

Letters: B batch, H W image height and width, C channels.
"""

import dataclasses
import importlib
import logging
import pkgutil
from collections.abc import Mapping, Sequence, Set
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Array, Float, UInt8

from lmim_jax.data.eval.eval_data import EvaluationData, known_labels, targets_of
from lmim_jax.data.label_file import CLASSES, MULTILABEL, REGRESSION, Targets
from lmim_jax.models.modalities import Modality
from lmim_jax.utils.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

Params = dict[str, Any]
Picture = UInt8[np.ndarray, "H W 3"]
Results = dict[str, float | Picture | str]

# `type` of an evaluator in the config.json of runs made before version 0.2 -> its module now
FORMER_NAMES = {
    "linear": "logistic_regression",
    "attentive": "attentive_probe",
    "video": "video_segmentation",
    "attributes": "clevr",
    "pictures": "visualization",
}
WEIGHTS = ("online", "target")
ENCODER_FREE = ("pixels", "histogram")  # features that need no encoder
STRICT = "strict"  # key of the config beside the sections: whether a failure stops the run


class EvaluatedMethod(Protocol):
    """What evaluators use of a method; methods/base.py has the complete contract."""

    def __hash__(self) -> int:
        """Methods are frozen: compiled functions are cached by method."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    def channels(self) -> int:
        """Channels of images."""

    @property
    def inputs(self) -> tuple[Modality, ...]:
        """The modalities of images, one at least."""

    @property
    def width(self) -> int:
        """Size of a feature vector."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of training images in pixels."""

    def features(self, params: Params, images: Float[Array, "B H W C"]) -> dict[str, Array]:
        """Features of normalized images, by name."""

    def sample(self, rng: Array, keys: Array) -> dict[str, Array]:
        """The random choices of the loss, such as the masks."""


class Evaluator(Protocol):
    """Measures the features of an encoder.

    Attributes:
      needs_labels: nothing can be measured where `problem` names one; `run` returns {} then.
      label_kinds: what labels may be, see data/label_file.py.
      takes: what an empty `feature` stands for: "image" or "patches" of `config.representation`.
      supports_pixel_baselines: the field `feature` may also be one of
        `ENCODER_FREE`, so that raw pixels can be measured for comparison.
      trains: it trains for many epochs on the images.
      cost: its time in comparison with others, roughly; for the order and the ETA of several.
    """

    needs_labels: ClassVar[bool] = False
    label_kinds: ClassVar[tuple[str, ...]] = (CLASSES,)
    takes: ClassVar[str] = "image"
    supports_pixel_baselines: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    cost: ClassVar[float] = 1.0

    def run(self, method: EvaluatedMethod, params: Params, data: EvaluationData) -> Results:
        """Evaluate.

        Args:
          method: the pretraining method, see methods/base.py.
          params: its online weights, or with the weights of the target encoder in their place.
          data: images of the run.

        Returns:
          Metrics by name, as numbers; pictures, uint8 [H, W, 3], which the run saves as PNG and
          writes to TensorBoard; and tables as text in CSV, which it saves.

        Raises:
          UserError: a field does not fit the images or the method.
        """


def names() -> list[str]:
    """The names of all evaluators: the modules of this folder, without base and common/."""
    import lmim_jax.evaluators as package

    found = []
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg and module.name != "base":
            found.append(module.name)
    return sorted(found)


def current_name(name: str) -> str:
    """The present name of an evaluator, given the present name or the one before version 0.2."""
    return FORMER_NAMES.get(name, name)


def labels_problem(classes: Sequence[str], splits: Mapping[str, Any]) -> str:
    """Why accuracies on these images would have no meaning; "" if they have one.

    Args:
      classes: of the training images.
      splits: {"train": source, "test": source or None}.
    """
    targets = targets_of(splits["train"])
    if targets:
        return f"the labels are {targets.kind}, not {CLASSES}"
    if not classes:
        return "the images have no classes; folders give them: CLASS/ or train/CLASS/, test/CLASS/"
    if len(classes) == 1:
        return f"all training images are of one class, {classes[0]!r}, which says nothing"
    for split, name in (("train", "training"), ("test", "test")):
        if splits[split] is None:
            return f"there are no {name} images"
        labels, complete = known_labels(splits[split])
        found = np.unique(labels[labels >= 0])
        if not len(found):
            return f"the {name} images have no classes (those in {split}/CLASS/ have)"
        if complete and len(found) == 1:
            return f"all labeled {name} images are of one class, {classes[found[0]]!r}"
    return ""


def targets_problem(targets: Targets, test: Any) -> str:
    """Why nothing can be measured for labels that are no classes; "" if something can.

    Args:
      targets: of the training images.
      test: the source of the test images, or None.
    """
    if test is None:
        return "there are no test images"
    of_test = targets_of(test)
    if of_test is None:
        return "the test images have no labels"
    if targets.kind == REGRESSION and not np.ptp(of_test.values, axis=0).any():
        return "all test images have the same numbers"
    if targets.kind == MULTILABEL and not of_test.values.any():
        return "all labels of the test images are 0"
    return ""


def problem(
    evaluator: "Evaluator | type[Evaluator]", classes: Sequence[str], splits: Mapping[str, Any]
) -> str:
    """Why an evaluator cannot measure anything on these images; "" if it can.

    Args:
      evaluator: or its class.
      classes: of the training images.
      splits: {"train": source, "test": source or None}.
    """
    if not evaluator.needs_labels:
        return ""
    targets = targets_of(splits["train"])
    kind = targets.kind if targets else CLASSES
    if kind not in evaluator.label_kinds:
        return f"the labels are {kind}, not {' or '.join(evaluator.label_kinds)}"
    if targets:
        return targets_problem(targets, splits["test"])
    return labels_problem(classes, splits)


def is_possible(evaluator: "Evaluator", data: EvaluationData) -> bool:
    """Whether an evaluator can measure anything on these images, see `problem`."""
    return not problem(evaluator, data.classes, data.sources)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An evaluator of a run.

    Attributes:
      title: its name in logs.
      every: optimizer steps between two evaluations; 0: only at the end of training.
      weights: "online" or "target".
      evaluator: the evaluator itself.
    """

    title: str
    every: int
    weights: str
    evaluator: Evaluator

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to run after `step` optimizer steps: at the start, on schedule and at the end.

        A run shorter than the interval is evaluated at its end alone.
        """
        if not self.every:
            return step == total_steps
        if total_steps < self.every:
            return step == total_steps
        return step % self.every == 0 or step == total_steps

    def without_known_baselines(self, metrics: Set[str]) -> "Scheduled":
        """Itself, but without the features of `ENCODER_FREE` if their metrics are among these.

        They never change: a run measures them once.

        Args:
          metrics: names of the metrics that the run has already.
        """
        evaluator: Any = self.evaluator
        known = tuple(f"{self.title}/{feature}_" for feature in ENCODER_FREE)
        if not getattr(evaluator, "baselines", False) or not any(
            name.startswith(known) for name in metrics
        ):
            return self
        return dataclasses.replace(self, evaluator=dataclasses.replace(evaluator, baselines=False))

    def run(
        self, method: EvaluatedMethod, state: Any, data: EvaluationData
    ) -> tuple[dict[str, float], dict[str, Picture | str]]:
        """Evaluate.

        Args:
          method: the pretraining method.
          state: an object with the parameter trees `params` and `target`.
          data: images of the run.

        Returns:
          Metrics; pictures and tables; both with the keys "title/name".
        """
        params = state.params
        if self.weights == "target":
            params = {**state.params, **state.target}
        metrics: dict[str, float] = {}
        pictures: dict[str, Picture | str] = {}
        for name, value in self.evaluator.run(method, params, data).items():
            key = f"{self.title}/{name}"
            if isinstance(value, np.ndarray | str):
                pictures[key] = value
            else:
                metrics[key] = value
        return metrics, pictures


def only_possible(
    scheduled: Sequence[Scheduled], classes: Sequence[str], splits: Mapping[str, Any]
) -> list[Scheduled]:
    """The evaluators that can measure something; the others are logged, with their `problem`."""
    kept = []
    left_out: dict[str, list[str]] = {}
    for one in scheduled:
        reason = problem(one.evaluator, classes, splits)
        if reason:
            left_out.setdefault(reason, []).append(one.title)
        else:
            kept.append(one)
    for reason, titles in left_out.items():
        log.info("not measured, as %s: %s", reason, ", ".join(titles))
    return kept


def fill_in(
    sections: Mapping[str, Any], representation: Mapping[str, str], where: str = "config.evaluators"
) -> None:
    """Replace empty `params` and `feature` by the choice of the recipe, in place.

    Args:
      sections: by title, see `from_config`.
      representation: `config.representation`, see configs/vit_b.py.
      where: name of `sections` in error messages.

    Raises:
      UserError: there is no evaluator of that type.
    """
    for title, section in sections.items():
        if title == STRICT:
            continue
        if section.get("params") == "":
            section["params"] = representation["weights"]
        if section.get("feature") == "":
            kind = current_name(section["type"])
            section["feature"] = representation[find(kind, f"{where}.{title}").takes]


def from_config(
    config: Mapping[str, Mapping[str, Any]],
    *,
    steps_per_epoch: int,
    has_target: bool,
    where: str = "config.evaluators",
) -> list[Scheduled]:
    """Build the evaluators of `config.evaluators`.

    Args:
      config: a section by title. A section has `type` (a module of this folder), `every` (epochs;
        0: only at the end), `params` ("online" or "target"), and the fields of the evaluator; what
        is empty was replaced by `fill_in`. The key `strict` is none.
      steps_per_epoch: optimizer steps in an epoch.
      has_target: whether the method has a target encoder.
      where: name of `config` in error messages.

    Raises:
      UserError: unknown type, missing or unknown key, or `params: target` for a method without a
        target encoder.
    """
    scheduled = []
    for title, section in config.items():
        if title == STRICT:
            continue
        here = f"{where}.{title}"
        fields = dict(section)
        kind = current_name(_pop(fields, "type", here))
        every = _pop(fields, "every", here)
        weights = _pop(fields, "params", here)
        _check_weights(weights, has_target, here)
        evaluator = _build(kind, fields, here)
        steps = max(1, round(every * steps_per_epoch)) if every else 0
        scheduled.append(Scheduled(title, steps, weights, evaluator))
    return scheduled


def _pop(fields: dict[str, Any], key: str, where: str) -> Any:
    """Remove a key that every evaluator needs from its section, and return its value."""
    if key not in fields:
        raise UserError(f"{where} lacks {key!r}")
    return fields.pop(key)


def _check_weights(weights: str, has_target: bool, where: str) -> None:
    """Raise a UserError unless these weights exist."""
    if weights not in WEIGHTS:
        raise UserError(f"{where}.params={weights!r} must be one of: {' | '.join(WEIGHTS)}")
    if weights == "target" and not has_target:
        raise UserError(
            f"{where}.params={weights!r}: the method has no target encoder; set it, or "
            "config.representation.weights where it follows that, to online"
        )


def find(kind: str, where: str) -> Any:
    """The class of an evaluator.

    Args:
      kind: the name of its module.
      where: its section, for the error message.

    Raises:
      UserError: there is no such evaluator.
    """
    if kind not in names():
        hint = did_you_mean(kind, names())
        raise UserError(f"{where}.type={kind!r} is not an evaluator{hint}")
    return importlib.import_module(f"lmim_jax.evaluators.{kind}").Evaluator


def _build(kind: str, fields: dict[str, Any], where: str) -> Evaluator:
    """An evaluator from the name of its module and its fields."""
    evaluator_class = find(kind, where)
    known = {field.name for field in dataclasses.fields(evaluator_class)}
    if known != fields.keys():
        wrong = ", ".join(sorted(known ^ fields.keys()))
        raise UserError(
            f"{where}: unknown or missing keys {wrong}; {kind} has {', '.join(sorted(known))}"
        )
    for key, value in fields.items():
        if isinstance(value, list):  # a config from JSON; fields must be hashable
            fields[key] = tuple(value)
    return evaluator_class(**fields)
