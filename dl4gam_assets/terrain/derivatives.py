"""Terrain derivatives of an elevation grid.

Belongs here: slope, aspect, curvatures, ruggedness, as the published models saw them.
Does not belong here: reading elevation.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

#: Names and units of the derivatives.
DERIVATIVES: dict[str, str] = {
    "slope": "degree",
    "aspect": "degree",
    "planform_curvature": "100/m",
    "profile_curvature": "100/m",
    "terrain_ruggedness_index": "m",
}


def terrain_derivatives(dem: np.ndarray, pixel_m: float, sigma: float = 1.0) -> dict[str, np.ndarray]:
    """Slope, aspect, planform and profile curvature, and terrain ruggedness index of an elevation grid.

    The DEM is first smoothed by a Gaussian cut to 3 x 3 pixels (Diaconu et al. 2025); derivatives are xdem's (Horn 1981
    for slope and aspect, Zevenbergen and Thorne 1987 for curvatures, Riley et al. 1999 for ruggedness). Missing
    elevations are first filled with the nearest one and set to NaN again at the end; the outermost pixels repeat their
    neighbours.

    Parameters
    ----------
    dem : float array (H, W) in metres, NaN where missing
    pixel_m : pixel size in metres
    sigma : standard deviation of the Gaussian in pixels; 0 leaves the DEM as it is

    Returns
    -------
    dict of float32 arrays (H, W): slope and aspect in degrees (aspect clockwise from north), curvatures in 100/m,
    ruggedness in metres.
    """
    import xdem

    missing = ~np.isfinite(dem)
    if missing.all():
        return {name: np.full(dem.shape, np.nan, dtype=np.float32) for name in DERIVATIVES}
    filled = np.asarray(dem, dtype=np.float32)
    if missing.any():
        index = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
        filled = filled[tuple(index)]
    if sigma > 0:
        filled = ndimage.gaussian_filter(filled, sigma, mode="nearest", truncate=1.0 / sigma)
    values = xdem.terrain.get_terrain_attribute(filled, attribute=list(DERIVATIVES), resolution=pixel_m)
    edge = np.ones(dem.shape, dtype=bool)
    edge[3:-3, 3:-3] = False
    nearest = ndimage.distance_transform_edt(edge, return_distances=False, return_indices=True)
    out = {}
    for name, layer in zip(DERIVATIVES, values, strict=True):
        # The window (with the smoothing) does not fit on the outermost pixels: they repeat the nearest inner ones.
        inner = np.asarray(layer, dtype=np.float32)[tuple(nearest)]
        # On flat ground aspect is undefined: north, which is as good as any other.
        inner = np.where(np.isfinite(inner), inner, 0.0).astype(np.float32) if name == "aspect" else inner
        inner[missing] = np.nan
        out[name] = inner
    return out
