"""Classifiers that evaluators left in RUN/evaluations/NAME: opened, and used on other images.

Letters: B batch, H W image height and width, C channels, K classes or labels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.evaluators.common import kept_classifier
from lmim_jax.evaluators.common.probe_training import Task
from lmim_jax.train import checkpoint_manifest, checkpoints, modality_subset, runs
from lmim_jax.utils import buckets
from lmim_jax.utils.errors import UserError


class Predictions(NamedTuple):
    """Of a batch of images.

    Attributes:
      indices: of the images in their source.
      outputs: probabilities of the classes or of the labels, or numbers.
    """

    indices: Int[np.ndarray, " B"]
    outputs: Float[np.ndarray, "B K"]


@dataclasses.dataclass(frozen=True, eq=False)
class SavedClassifier:
    """A classifier with its encoder.

    Attributes:
      kind: of labels, see data/label_file.py.
      names: of the classes, or of the labels.
      evaluator: that trained it.
      run: method and augmentation.
      params: of the method.
      weights: of the classifier.
      task: what it learned.
    """

    kind: str
    names: tuple[str, ...]
    evaluator: Any
    run: runs.Run
    params: Any
    weights: Any
    task: Task

    def predict(
        self, source: Any, batch_size: int, data_config: ConfigDict | None = None
    ) -> Iterator[Predictions]:
        """The answers for all readable images of a source, prepared as the test images were.

        Args:
          source: the images, see data/sources.py.
          batch_size: images at a time.
          data_config: how they are read; None: as those of the run.
        """
        data_config = ConfigDict(dict(data_config or self.run.config.data))
        data_config.max_bad_fraction = 1.0  # those that cannot be read are left out
        data = EvaluationData(
            {"train": source, "test": source},
            data_config,
            self.task.augment,
            self.run.mesh,
        )
        for batch in data.batches("test", batch_size):
            outputs = self._outputs(self.params, self.weights, batch["images"])
            found = jax.device_get({"outputs": outputs, "index": batch["index"]})
            readable = found["index"] >= 0
            yield Predictions(found["index"][readable], found["outputs"][readable])

    @functools.cached_property
    def _outputs(self) -> Callable[[Any, Any, Float[Array, "B H W C"]], Float[Array, "B K"]]:
        def outputs(params: Any, weights: Any, images: Array) -> Array:
            return self.evaluator.outputs(self.task, params, weights, images)

        return jax.jit(outputs, out_shardings=sharding.replicated(self.run.mesh))


def load(folder: buckets.Pathname) -> SavedClassifier:
    """Open the folder of a classifier.

    A fine-tuned one holds its encoder. Others need the checkpoint of the run on whose features they
    were trained.

    Raises:
      UserError: it is not such a folder, or that checkpoint is gone.
    """
    description = kept_classifier.read_description(folder)
    run = runs.open_run(folder)  # by the config.json that was kept
    evaluator = _evaluator(description)
    weights = unflatten_dict(kept_classifier.read_weights(folder), sep="/")
    augment = run.augmentation
    interpolation = getattr(evaluator, "interpolation", augment.interpolation)
    augment = dataclasses.replace(augment, interpolation=interpolation)
    mean = tuple(description["statistics"].get("mean", ()))
    deviation = tuple(description["statistics"].get("deviation", ()))
    names = tuple(description["names"])
    task = Task(run.method, augment, len(names), description["kind"], mean, deviation)
    if "encoder" in weights.get("trained", {}):
        shapes = jax.eval_shape(run.method.init, jax.random.key(0))
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    else:
        params = _encoder(folder, description["origin"])
    replicated = sharding.replicated(run.mesh)
    placed = jax.device_put((params, weights), replicated)
    return SavedClassifier(description["kind"], names, evaluator, run, placed[0], placed[1], task)


def _evaluator(description: dict[str, Any]) -> Any:
    """The evaluator that trained a classifier."""
    fields = {}
    for key, value in description["options"].items():
        fields[key] = tuple(value) if isinstance(value, list) else value
    name = description["evaluator"]
    return evaluators.find(name, "classifier.json")(**fields)


def _encoder(folder: buckets.Pathname, origin: dict[str, Any]) -> Any:
    """The parameters of the method at the step at which the classifier was trained.

    Raises:
      UserError: they are gone.
    """
    home = buckets.path(folder).absolute().parent.parent
    if not (home / "config.json").is_file():
        home = buckets.path(origin["run"])
    owner = runs.open_run(home)
    if not owner.exported:
        weights = _saved_weights(folder, origin, home, owner.method)
        owner = dataclasses.replace(owner, loaded=weights)
    chosen = modality_subset.choose(owner, origin.get("modalities", ()))
    return chosen.encoder_params(origin["weights"])


def _saved_weights(
    folder: buckets.Pathname, origin: dict[str, Any], home: buckets.Path, method: Any
) -> runs.Weights:
    """The weights on whose features the classifier in `folder` was trained, those of a run."""
    step = origin["step"]
    found = checkpoint_manifest.steps(home).get(step)
    is_other = False
    if found is not None and origin["checkpoint"]:  # unknown where training left it
        is_other = checkpoint_manifest.checksum(found) != origin["checkpoint"]
    if found is None or is_other:
        raise UserError(
            f"{folder} was trained on features of step {step} of {home}, whose checkpoint is "
            "gone; evaluate the run again"
        )
    params, target = checkpoints.read_weights(home, method, step)
    return runs.Weights(params, target, step)
