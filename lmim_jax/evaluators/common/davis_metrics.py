"""Region similarity J and contour accuracy F of masks, as defined by DAVIS 2017.

Source: Pont-Tuset et al. 2017; the official davis2017-evaluation, `db_eval_iou` and `f_measure`.

Letters: T frames, H W height and width.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

TOLERANCE = 0.008  # largest distance between two contours, as a share of the diagonal


def region_similarity(truth: Bool[np.ndarray, "H W"], found: Bool[np.ndarray, "H W"]) -> float:
    """J: intersection over union of two masks; 1 where both are empty."""
    union = np.count_nonzero(truth | found)
    if not union:
        return 1.0
    return np.count_nonzero(truth & found) / union


def contour_accuracy(truth: Bool[np.ndarray, "H W"], found: Bool[np.ndarray, "H W"]) -> float:
    """F: harmonic mean of precision and recall of the contour pixels of two masks.

    A contour pixel is correct if there is one of the other mask within ceil(0.008 x diagonal)
    pixels.
    """
    reach = np.ceil(TOLERANCE * np.linalg.norm(truth.shape))
    true_edge = contour_pixels(truth)
    found_edge = contour_pixels(found)
    true_count = np.count_nonzero(true_edge)
    found_count = np.count_nonzero(found_edge)
    if not true_count or not found_count:
        # Precision or recall is 0, unless both masks are empty
        return float(true_count == found_count)
    # Pixels within a distance of the contour are those that a dilation by a disk covers
    near_true = ndimage.distance_transform_edt(~true_edge) <= reach
    near_found = ndimage.distance_transform_edt(~found_edge) <= reach
    recall = np.count_nonzero(true_edge & near_found) / true_count
    precision = np.count_nonzero(found_edge & near_true) / found_count
    if not precision + recall:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def contour_pixels(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels that differ from the one to the right, below or below right; the border repeats."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right = padded[:-1, 1:]
    below = padded[1:, :-1]
    diagonal = padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def object_scores(
    truth: Int[np.ndarray, "T H W"], found: Int[np.ndarray, "T H W"]
) -> Float[np.ndarray, "objects 2"]:
    """J and F of every object of a clip: means over the frames between the first and the last.

    Args:
      truth: the number of the object at each pixel; 0 is the background. The objects are
        1 .. the largest number in the first frame.
      found: the predicted numbers.
    """
    scores = []
    for number in range(1, int(truth[0].max()) + 1):
        region = []
        contour = []
        for true_frame, found_frame in zip(truth[1:-1], found[1:-1], strict=True):
            true_mask = true_frame == number
            found_mask = found_frame == number
            region.append(region_similarity(true_mask, found_mask))
            contour.append(contour_accuracy(true_mask, found_mask))
        scores.append([np.mean(region), np.mean(contour)])
    return np.array(scores).reshape(-1, 2)
