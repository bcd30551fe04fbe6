"""Parts of probes: frozen features, batch normalization without parameters, a linear layer.

Letters: B batch, N patches, D width, K classes, H W image height and width, C channels.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

from lmim_jax.data.label_file import MULTILABEL, REGRESSION
from lmim_jax.evaluators.base import EvaluatedMethod, Params
from lmim_jax.utils.errors import UserError, did_you_mean

MOMENTUM = 0.1  # weight of a batch in the running statistics, the default of PyTorch

Statistics = dict[str, Float[Array, " D"]]
Linear = dict[str, Array]


def frozen_feature(
    method: EvaluatedMethod, params: Params, images: Float[Array, "B H W C"], feature: str
) -> Array:
    """A feature of a frozen encoder, [B, D] or [B, N, D], in the dtype of the method.

    Raises:
      UserError: the method has no such feature.
    """
    features = method.features(params, images)
    if feature not in features:
        hint = did_you_mean(feature, features)
        raise UserError(f"feature={feature!r}: the method has no feature of that name{hint}")
    return jax.lax.stop_gradient(features[feature])


def mean_over_patches(x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
    """Mean over the patches, float32."""
    return x.astype(jnp.float32).mean(axis=1)


def batch_norm_init(width: int) -> Statistics:
    """Running statistics before the first batch."""
    return {"mean": jnp.zeros(width), "variance": jnp.ones(width)}


def batch_norm(
    x: Float[Array, "B D"], statistics: Statistics, epsilon: float
) -> Float[Array, "B D"]:
    """Normalize by given statistics."""
    centered = x - statistics["mean"][None]
    return centered * jax.lax.rsqrt(statistics["variance"] + epsilon)[None]


def batch_norm_train(
    x: Float[Array, "B D"], running: Statistics, epsilon: float
) -> tuple[Float[Array, "B D"], Statistics]:
    """Normalize by the mean and (biased) variance of the batch.

    Returns:
      The normalized batch, and the running statistics after it, which use the unbiased variance as
      in PyTorch. The batch is that of all devices; MAE normalizes the 512 images of each device.
    """
    mean = x.mean(axis=0)
    variance = jnp.square(x - mean[None]).mean(axis=0)
    unbiased = variance * (len(x) / max(len(x) - 1, 1))
    after = {
        "mean": running["mean"] + MOMENTUM * (mean - running["mean"]),
        "variance": running["variance"] + MOMENTUM * (unbiased - running["variance"]),
    }
    return batch_norm(x, {"mean": mean, "variance": variance}, epsilon), after


def linear_init(rng: Array, width: int, classes: int, deviation: float) -> Linear:
    """A linear layer: a kernel [D, K], normal with this standard deviation, and a zero bias [K]."""
    return {
        "kernel": deviation * jax.random.normal(rng, (width, classes)),
        "bias": jnp.zeros(classes),
    }


def linear(layer: Linear, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
    """Apply a linear layer in float32."""
    x = x.astype(jnp.float32)
    product = jnp.matmul(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + layer["bias"][None]


def supervised_loss(
    kind: str, outputs: Float[Array, "B K"], labels: Shaped[Array, "B ..."]
) -> Float[Array, ""]:
    """Mean loss of the batch for labels of a kind, see data/label_file.py.

    Args:
      kind: classes: cross-entropy; multilabel: binary cross-entropy of each label; regression:
        squared error of each label.
      outputs: logits, or numbers.
      labels: classes [B], or labels [B, K].
    """
    if kind == MULTILABEL:
        return optax.sigmoid_binary_cross_entropy(outputs, labels).mean()
    if kind == REGRESSION:
        return jnp.square(outputs - labels).mean()
    return cross_entropy(outputs, labels)


def cross_entropy(logits: Float[Array, "B K"], labels: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean cross-entropy of the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
