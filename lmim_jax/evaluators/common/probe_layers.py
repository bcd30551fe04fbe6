"""Parts of probes on frozen features: the features, batch normalisation without parameters, a linear layer.

Letters: B batch, N patches, D width, K classes.
"""

import jax
import jax.numpy as jnp
import optax

from lmim_jax.utils.errors import UserError

MOMENTUM = 0.1  # share of a batch in the running statistics, torch's default


def frozen(method, params, images, feature):
    """A feature of images through a frozen encoder, [B, D] or [B, N, D], in the dtype of the method.

    Raises:
      UserError: the method has no such feature.
    """
    features = method.features(params, images)
    if feature not in features:
        raise UserError(f"feature={feature!r}: this method's encoder has {', '.join(features)}")
    return jax.lax.stop_gradient(features[feature])


def pooled(x):
    """Mean over patches where there are any: [B, N, D] or [B, D] -> float32 [B, D]."""
    x = x.astype(jnp.float32)
    return x.mean(axis=1) if x.ndim == 3 else x


def batch_norm_init(width):
    """Running statistics before the first batch."""
    return {"mean": jnp.zeros(width), "variance": jnp.ones(width)}


def batch_norm(x, statistics, epsilon):
    """x [B, D] normalised by given statistics."""
    return (x - statistics["mean"][None]) * jax.lax.rsqrt(statistics["variance"] + epsilon)[None]


def batch_norm_train(x, running, epsilon):
    """x [B, D] normalised by its own mean and (biased) variance, and the running statistics after it.

    These take the unbiased variance, as in torch. The batch is that of all devices; MAE's was the 512 images of each.
    """
    mean = x.mean(axis=0)
    variance = jnp.square(x - mean[None]).mean(axis=0)
    batch = {"mean": mean, "variance": variance * (len(x) / max(len(x) - 1, 1))}
    after = jax.tree.map(lambda old, new: old + MOMENTUM * (new - old), running, batch)
    return batch_norm(x, {"mean": mean, "variance": variance}, epsilon), after


def linear_init(rng, width, classes, deviation):
    """A linear layer: kernel [D, K] normal with this deviation, bias 0."""
    return {
        "kernel": deviation * jax.random.normal(rng, (width, classes)),
        "bias": jnp.zeros(classes),
    }


def linear(params, x):
    """x [B, D] -> float32 [B, K]."""
    kernel = params["kernel"]
    return (
        jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        + params["bias"][None]
    )


def cross_entropy(logits, labels):
    """Mean over the batch: logits [B, K], classes [B] -> scalar."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
