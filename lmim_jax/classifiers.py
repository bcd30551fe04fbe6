"""What can be read from frozen features with labels: neighbours that vote, and logistic regression.

Letters: N training vectors, Q queries, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax import logistic

CHUNK = 1024  # queries at a time: CHUNK x N similarities in memory


def neighbours(train, labels, queries, k, num_classes):
    """Classes [Q] that most of the k nearest training vectors (by cosine) have; of equals, the nearest one's.

    train [N, D], labels int [N], queries [Q, D]; k is cut to N.
    """
    vote, found = _vote(min(k, len(train)), num_classes), []
    bank, labels = jax.device_put(_unit(train)), jax.device_put(np.asarray(labels, np.int32))
    for start in range(0, len(queries), CHUNK):
        chunk = _unit(queries[start : start + CHUNK])
        padded = np.pad(chunk, ((0, CHUNK - len(chunk)), (0, 0)))  # one shape, one compilation
        found.append(np.asarray(jax.device_get(vote(bank, labels, padded)))[: len(chunk)])
    return np.concatenate(found)


@functools.lru_cache(maxsize=8)
def _vote(k, num_classes):
    """Jitted (bank, labels, queries) -> classes."""

    def vote(bank, labels, queries):
        _, index = jax.lax.top_k(jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST), k)
        weight = 1 + (jnp.arange(k) == 0) / 2  # half a vote more for the nearest: decides between equals
        ballots = jax.nn.one_hot(labels[index], num_classes) * weight[None, :, None]
        return ballots.sum(axis=1).argmax(axis=1)

    return jax.jit(vote)


def _unit(x):
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def linear(train, labels, queries, num_classes, l2, iterations):
    """Classes [Q] by logistic regression on standardised features.

    Its l2 is the one that a held-out tenth of the training vectors likes best (of equals, the largest), never the
    queries; then it is fitted to all of them.

    Args:
      train: float32 [N, D]. labels: int [N]. queries: [Q, D]. l2: to choose from, see logistic.py.
      iterations: of L-BFGS, at most.
    """
    mean, deviation = logistic.statistics(train)
    train, queries = (train - mean) / deviation, (queries - mean) / deviation
    order, strengths = np.random.default_rng(0).permutation(len(train)), sorted(l2, reverse=True)
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    if len(strengths) > 1 and len(held):
        trials = logistic.fit(train[rest], labels[rest], num_classes, strengths, iterations)
        strengths = strengths[int((trials.predict(train[held]) == labels[held]).mean(axis=1).argmax()) :]
    return logistic.fit(train, labels, num_classes, strengths[:1], iterations).predict(queries)[0]
