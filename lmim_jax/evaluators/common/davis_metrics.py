"""Region similarity J and contour accuracy F of masks, as DAVIS 2017 measures them.

Source: Pont-Tuset et al. 2017; the official davis2017-evaluation, `db_eval_iou` and `f_measure`.
"""

import numpy as np
from scipy import ndimage

BOUND = 0.008  # how far contours may lie apart, as a share of the diagonal


def region(truth, found):
    """J: intersection over union of two masks, bool [H, W]; 1 where both are empty."""
    union = np.count_nonzero(truth | found)
    return np.count_nonzero(truth & found) / union if union else 1.0


def contour(truth, found):
    """F: harmonic mean of precision and recall of the contour pixels of two masks, bool [H, W].

    A contour pixel is right where one of the other mask lies within ceil(0.008 x diagonal) pixels.
    """
    reach = np.ceil(BOUND * np.linalg.norm(truth.shape))
    edges = boundary(truth), boundary(found)
    total = [np.count_nonzero(edge) for edge in edges]
    if not all(total):
        return float(
            total[0] == total[1]
        )  # one of precision and recall is 0, unless both are empty
    # the distance to the nearest contour pixel: within it is what dilation by a disk covers
    near = [ndimage.distance_transform_edt(~edge) <= reach for edge in edges]
    recall = np.count_nonzero(edges[0] & near[1]) / total[0]
    precision = np.count_nonzero(edges[1] & near[0]) / total[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask):
    """Pixels, bool [H, W], that differ from the one to the right, below or below right; the border repeats."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def scores(truth, found):
    """J and F of every object of a clip, [objects, 2]: means over frames without the first and the last.

    truth, found: int [T, H, W], 0 for no object. Objects are 1 .. the largest number in the first frame.
    """
    result = []
    for number in range(1, int(truth[0].max()) + 1):
        pairs = [(t == number, f == number) for t, f in zip(truth[1:-1], found[1:-1], strict=True)]
        result.append(
            [np.mean([measure(*pair) for pair in pairs]) for measure in (region, contour)]
        )
    return np.array(result).reshape(-1, 2)
