"""Measures of object masks in videos: region similarity J and boundary accuracy F (Perazzi et al., CVPR 2016).

J is the intersection over union of the predicted and the true mask of an object. F compares their boundaries: precision
is the fraction of predicted boundary pixels with a true one within a tolerance, recall the fraction of true ones with a
predicted one, and F their harmonic mean. The tolerance is 0.8 % of the image's diagonal, rounded up to whole pixels.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

TOLERANCE = 0.008  # of the image's diagonal

Region = NDArray[np.bool_]  # [H, W]


def region_similarity(truth: Region, predicted: Region) -> float:
    """Return J; 1 if both masks are empty."""
    union = int((truth | predicted).sum())
    return int((truth & predicted).sum()) / union if union else 1.0


def boundary_accuracy(truth: Region, predicted: Region) -> float:
    """Return F; 1 if neither mask has a boundary, 0 if only one has."""
    of_truth, of_predicted = boundary(truth), boundary(predicted)
    if not (of_truth.any() and of_predicted.any()):
        return float(of_truth.any() == of_predicted.any())
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape)) + 1e-6
    precision = float((distance_transform_edt(~of_truth)[of_predicted] <= reach).mean())
    recall = float((distance_transform_edt(~of_predicted)[of_truth] <= reach).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Region) -> Region:
    """Return the pixels that differ from the one to the right, the one below, or the one right below: bool [H, W]."""
    found = np.zeros_like(mask)
    found[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    found[:-1] |= mask[:-1] != mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return found
