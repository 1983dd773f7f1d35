"""Predictions where the image had no usable pixel.

Belongs here: filling gaps. Does not belong here: prediction.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from dl4gam_assets.settings import InferenceSettings


def fill_gaps(
    mean: np.ndarray, std: np.ndarray, valid: np.ndarray, zone: np.ndarray, dem: np.ndarray | None,
    settings: InferenceSettings,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Replace predictions of unusable pixels of the zone by the mean of their nearest usable ones.

    ``settings.fill``: ``nearest`` takes the ``fill_neighbours`` (30, published) nearest usable pixels of the zone in
    the plane, ``elevation`` those nearest in elevation (the plane where a pixel has no elevation, or without a DEM).
    Pixels of the zone without a prediction (NaN, where no patch of mode ``stride`` reaches) are gaps too. Outside the
    zone NaN stays. Without any usable pixel nothing was measured: the whole zone counts as filled, with what the
    networks said about the missing image.

    Parameters
    ----------
    mean, std : float arrays (H, W)
    valid : bool (H, W), usable pixels
    zone : bool (H, W), where gaps matter (the 50 m buffer)
    dem : float (H, W) or None

    Returns
    -------
    mean, std, and the bool array (H, W) of pixels of the zone whose values do not come from their own image.
    """
    predicted = np.isfinite(mean)
    gaps, good = zone & ~(valid & predicted), zone & valid & predicted
    filled = np.zeros_like(zone)
    if not good.any():
        gaps, good, filled = zone & ~predicted, zone & predicted, zone.copy()
    if not gaps.any() or not good.any():
        return mean, std, filled
    mean, std = mean.copy(), std.copy()
    by_height = np.zeros_like(zone)
    if settings.fill == "elevation" and dem is not None:
        known = np.isfinite(dem)
        if (good & known).any():
            by_height = gaps & known
    for where, coordinates in ((by_height, dem), (gaps & ~by_height, None)):
        if not where.any():
            continue
        source = good & np.isfinite(dem) if coordinates is not None and dem is not None else good
        points = _points(source, coordinates)
        k = min(settings.fill_neighbours, len(points))
        _, index = cKDTree(points).query(_points(where, coordinates), k=k)
        index = index.reshape(int(where.sum()), k)
        for layer in (mean, std):
            layer[where] = layer[source][index].mean(axis=1)
        filled |= where
    return mean, std, filled


def _points(where: np.ndarray, heights: np.ndarray | None) -> np.ndarray:
    if heights is not None:
        return heights[where][:, None]
    return np.argwhere(where).astype(np.float64)
