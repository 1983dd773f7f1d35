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
    "planform_curvature": "0.01 m-1",
    "profile_curvature": "0.01 m-1",
    "terrain_ruggedness_index": "m",
}

#: Pixels at the edge on which the smoothed 3 x 3 window does not fit.
_EDGE = 3


def terrain_derivatives(dem: np.ndarray, pixel_m: float, sigma: float = 1.0) -> dict[str, np.ndarray]:
    """Slope, aspect, planform and profile curvature, and terrain ruggedness index of an elevation grid.

    The DEM is first smoothed by a Gaussian cut to 3 x 3 pixels (Diaconu et al. 2025, doi:10.1029/2025EA004197).
    Derivatives are made by xdem: slope and aspect after Horn (1981, doi:10.1109/PROC.1981.11918), curvatures after
    Zevenbergen and Thorne (1987, doi:10.1002/esp.3290120107), ruggedness after Riley et al. (1999).

    Curvatures are second derivatives of elevation across and along the slope, as xdem defined them when the published
    models were made (before 0.2): planform curvature is positive on ridges and negative in gullies, profile curvature
    is positive where the slope gets gentler downhill (concave), both 0 on flat ground. What newer versions of xdem call
    planform curvature is divided by the slope and grows without bound on flat ground: another quantity.

    Missing elevations are filled with the nearest one before, and are NaN in all layers again at the end. The outermost
    pixels repeat the nearest inner ones.

    Parameters
    ----------
    dem : float array (H, W) in metres, NaN where missing, at least 7 x 7
    pixel_m : pixel size in metres
    sigma : standard deviation of the Gaussian in pixels; 0 leaves the DEM as it is

    Returns
    -------
    dict of float32 arrays (H, W): slope 0 to 90 and aspect in degrees (the direction that the slope faces, clockwise
    from north; 0 on flat ground), curvatures in 1/m times 100, ruggedness in metres.

    Raises
    ------
    ValueError
        if the grid is smaller than 7 x 7 pixels.
    """
    import xdem

    if min(dem.shape) <= 2 * _EDGE:
        raise ValueError(f"elevation grid of {dem.shape} pixels is too small: at least {2 * _EDGE + 1} on each side")
    missing = ~np.isfinite(dem)
    if missing.all():
        return {name: np.full(dem.shape, np.nan, dtype=np.float32) for name in DERIVATIVES}
    filled = np.asarray(dem, dtype=np.float32)
    if missing.any():
        index = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
        filled = filled[tuple(index)]
    if sigma > 0:
        filled = ndimage.gaussian_filter(filled, sigma, mode="nearest", radius=1)
    attribute = xdem.terrain.get_terrain_attribute
    slope, aspect = attribute(filled, ["slope", "aspect"], resolution=pixel_m, surface_fit="Horn")
    across, along = attribute(
        filled,
        ["tangential_curvature", "profile_curvature"],
        resolution=pixel_m,
        surface_fit="ZevenbergThorne",
        curv_method="directional",
    )
    ruggedness = attribute(filled, "terrain_ruggedness_index", resolution=pixel_m, tri_method="Riley")
    layers = (slope, np.where(slope > 0, aspect, 0.0), across, -along, ruggedness)
    height, width = dem.shape
    rows = np.clip(np.arange(height), _EDGE, height - 1 - _EDGE)
    columns = np.clip(np.arange(width), _EDGE, width - 1 - _EDGE)
    out = {}
    for name, layer in zip(DERIVATIVES, layers, strict=True):
        values = np.asarray(layer, dtype=np.float32)[np.ix_(rows, columns)]
        values[missing] = np.nan
        out[name] = values
    return out


def mean_aspect(aspect_deg: np.ndarray) -> float | None:
    """Mean direction (degrees, 0 to 360) of aspects in degrees: that of the mean unit vector.

    None where there is no aspect, or the directions cancel out (mean vector shorter than a thousandth).
    """
    angles = np.deg2rad(aspect_deg[np.isfinite(aspect_deg)].astype(np.float64))
    if not angles.size:
        return None
    east, north = np.sin(angles).mean(), np.cos(angles).mean()
    return float(np.rad2deg(np.arctan2(east, north)) % 360.0) if np.hypot(east, north) >= 1e-3 else None
