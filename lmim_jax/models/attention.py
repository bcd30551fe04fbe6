"""Attention itself.

Letters: B batch, T S tokens, A attention heads, D width.
"""

import jax
import jax.numpy as jnp


def attend(query, key, value, implementation, mask=None):
    """softmax(q k^T / sqrt(D/A)) v with a float32 softmax: [B, T, A, D/A], [B, S, A, D/A] x 2 -> [B, T, A, D/A].

    Args:
      implementation: "xla" anywhere, "cudnn" (fused; bfloat16 on an NVIDIA GPU only; an error elsewhere).
      mask: bool [B, S], True = this key counts; None: all do.
    """
    mask = None if mask is None else mask[:, None, None, :]
    if implementation != "xla":
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation=implementation
        )
    return _attend(query, key, value, mask)


def weights(query, key):
    """What `attend` multiplies the values by, float32 [B, A, T, S]."""
    return jax.nn.softmax(_scores(*map(_heads_first, (query, key))))


@jax.custom_vjp
def _attend(query, key, value, mask):
    return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
    """(what `_attend` gives, what `_backward` needs of it).

    The softmax's division comes last, on [T, D/A] instead of [T, S] numbers of a head, and of these only the
    exponentials are kept, in the operands' dtype. Heads come before tokens: these are plain matrix products then,
    several times as fast on a CPU.
    """
    query, key, value = map(_heads_first, (query, key, value))
    scores = _scores(query, key)
    scores = scores if mask is None else jnp.where(mask, scores, -1e30)
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)
    out = (_product(exponentials, value) / total).astype(value.dtype)
    return _heads_first(out), (query, key, value, exponentials, total, out)


def _backward(kept, gradient):
    """Gradients of query, key and value, as flash attention has them (Dao et al. 2022, appendix B).

    What is multiplied is rounded to the operands' dtype first: autodiff would multiply it in float32.
    """
    query, key, value, exponentials, total, out = kept
    gradient = _heads_first(gradient).astype(jnp.float32) / total
    common = (gradient * out).sum(axis=-1, keepdims=True)
    gradient = gradient.astype(value.dtype)
    of_value = _product(exponentials.mT, gradient)
    of_scores = exponentials * (_product(gradient, value.mT) - common) * query.shape[-1] ** -0.5
    of_scores = of_scores.astype(query.dtype)
    found = _product(of_scores, key), _product(of_scores.mT, query), of_value
    return *(_heads_first(x.astype(value.dtype)) for x in found), None


_attend.defvjp(_forward, _backward)


def _heads_first(x):
    """[B, T, A, D/A] <-> [B, A, T, D/A]."""
    return x.swapaxes(1, 2)


def _product(x, y):
    """Matrix product with float32 sums."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _scores(query, key):
    """q k^T / sqrt(D/A), float32: [B, A, T, D/A], [B, A, S, D/A] -> [B, A, T, S]."""
    return _product(query, key.mT) * query.shape[-1] ** -0.5
