"""Ridge regression of numbers on frozen features, which are computed once, without augmentation.

Numbers are standardized by the training images. How l2 is chosen is in common/linear_evaluator.py:
it has the smallest squared error on the held-out images.

Metrics:
  r2        R^2, the share of the variance of the test images that is explained; mean of the numbers
  mae       mean absolute error in their own unit; mean of the numbers
  mean_mae  the same for always answering the mean of the training images, whose R^2 is 0 at most
  l2        the chosen strength
On request, also of features that need no encoder: pixels_r2, histogram_mae, ...
"""

import dataclasses

from lmim_jax.data.label_file import REGRESSION
from lmim_jax.evaluators.common.linear_evaluator import LinearEvaluator


@dataclasses.dataclass(frozen=True)
class Evaluator(LinearEvaluator):
    """Ridge regression on one feature; the fields are explained in configs/evaluate.py."""

    label_kinds = (REGRESSION,)
