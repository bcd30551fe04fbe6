"""Logistic regression on frozen features, which are computed once, without augmentation.

How l2 is chosen is in common/linear_evaluator.py. The protocol of MAE, with augmentation and LARS,
is the evaluator linear_probe.

Metrics:
  accuracy   percent of the test images
  held_out   percent of the held-out training images
  l2         the chosen strength
  majority   percent of the most frequent class of the test images
Of several 0/1 labels, each has a logistic regression of its own; l2 has the smallest cross-entropy
on the held-out images:
  map             mean average precision of the labels, percent
  prevalence_map  the same for equal answers
On request, also of features that need no encoder: pixels_accuracy, histogram_map, ...
"""

import dataclasses

from lmim_jax.data.label_file import CLASSES, MULTILABEL
from lmim_jax.evaluators.common.linear_evaluator import LinearEvaluator


@dataclasses.dataclass(frozen=True)
class Evaluator(LinearEvaluator):
    """Logistic regression on one feature; the fields are explained in configs/evaluate.py."""

    label_kinds = (CLASSES, MULTILABEL)
