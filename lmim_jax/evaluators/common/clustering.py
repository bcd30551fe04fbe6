"""Clusters of the patches of one image.

Letters: N patches, D width.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster import hierarchy


def nested_clusters(
    tokens: Float[np.ndarray, "N D"], counts: Iterable[int]
) -> dict[int, Int[np.ndarray, " N"]]:
    """Cut one tree (Ward's method) at several numbers of clusters.

    Each cut divides clusters of the cut before. Labels are kept: cluster 0 of the first cut is its
    largest one, and the largest part of a divided cluster keeps its label.

    Args:
      tokens: features of the patches.
      counts: numbers of clusters.

    Returns:
      {number of clusters: label of each patch}.
    """
    tree = hierarchy.linkage(tokens, "ward")
    cuts = {}
    labels = np.zeros(len(tokens), int)
    for count in sorted(counts):
        clusters = hierarchy.fcluster(tree, count, "maxclust") - 1
        labels = _relabel(clusters, labels, count)
        cuts[count] = labels
    return cuts


def _relabel(
    clusters: Int[np.ndarray, " N"], before: Int[np.ndarray, " N"], count: int
) -> Int[np.ndarray, " N"]:
    """Give clusters the labels of the cut before, and new labels below `count` to the others."""
    sizes = np.bincount(clusters)
    label_of = np.zeros(len(sizes), int)
    unused = set(range(count)) - set(before)
    assigned: set[int] = set()
    for cluster in np.argsort(-sizes, kind="stable"):
        parent = before[np.argmax(clusters == cluster)]
        label = parent if parent not in assigned else min(unused)
        label_of[cluster] = label
        assigned.add(label)
        unused.discard(label)
    return label_of[clusters]
