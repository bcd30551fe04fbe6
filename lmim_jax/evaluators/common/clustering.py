"""Clusters of the patches of one image.

Letters: N patches, D width.
"""

import numpy as np
from scipy.cluster import hierarchy


def nested(tokens, counts):
    """Cuts of one tree (Ward's) at several numbers of clusters: [N, D] -> {count: [N] int}.

    Each cut divides clusters of the one before. Labels stay: cluster 0 of the first cut is its largest, and the largest
    part of a divided cluster keeps its label.
    """
    tree, cuts, before = hierarchy.linkage(tokens, "ward"), {}, np.zeros(len(tokens), int)
    for count in sorted(counts):
        found = hierarchy.fcluster(tree, count, "maxclust") - 1
        sizes, known = np.bincount(found), set()
        label_of = np.zeros(len(sizes), int)
        for part in np.argsort(-sizes, kind="stable"):
            parent = before[np.argmax(found == part)]
            label_of[part] = (
                parent if parent not in known else min(set(range(count)) - known - set(before))
            )
            known.add(label_of[part])
        cuts[count] = before = label_of[found]
    return cuts
