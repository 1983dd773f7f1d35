"""Spectral indices.

Belongs here: what scores, masks and the channels of models compute alike from reflectance.
Does not belong here: reading it, thresholds.
"""

from __future__ import annotations

import numpy as np


def normalized_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(first - second) / (first + second), from -1 to 1.

    Reflectance below zero, noise of dark pixels, counts as 0: otherwise the sum could be negative and turn the sign. A
    sum of zero counts as 1, as in the published code, so that black is 0 and not the most of something.

    Parameters
    ----------
    first, second : float arrays of one shape, reflectance, NaN where missing

    Returns
    -------
    float array of that shape and type, NaN where one of them is missing.
    """
    first, second = np.maximum(first, 0), np.maximum(second, 0)
    total = first + second
    out: np.ndarray = (first - second) / np.where(total == 0, total.dtype.type(1), total)
    return out
