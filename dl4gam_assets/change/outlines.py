"""Polygons of a glacier's map: best estimate, lower and upper bound.

Belongs here: mask to polygon. Does not belong here: which pixels count and what a bound is (``areas``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dl4gam_assets.change.areas import bound_masks, counted_pixels, pixel_grid

if TYPE_CHECKING:
    import geopandas as gpd
    import xarray as xr
    from affine import Affine
    from shapely.geometry import MultiPolygon

#: Pixels that touch only at a corner are separate: their joint polygon would touch itself, which is not valid.
CONNECTIVITY = 4


def extract_outlines(
    mean: np.ndarray, std: np.ndarray, cube: xr.Dataset, tau: float, threshold: float = 0.5, sieve_px: int = 10
) -> gpd.GeoDataFrame:
    """Outlines of one glacier as rows of the table ``outlines`` (glacier_id, bound, area_km2, geometry EPSG:4326).

    The masks are those of the areas, with patches and holes smaller than ``sieve_px`` pixels removed (0 or 1: none),
    then cut again to the pixels that count, so that a filled hole never takes another glacier's pixel. Lower stays
    inside best inside upper. A bound without any pixel left has no row. ``area_km2`` is the polygon's area on the
    cube's grid, so it differs from the table ``areas`` by what the sieve changed.

    Raises
    ------
    ValueError
        as :func:`~dl4gam_assets.change.areas.bound_masks`; also if the grid has no EPSG code.
    """
    import geopandas as gpd
    import shapely

    allowed = counted_pixels(cube)
    masks = bound_masks(np.asarray(mean, np.float32), np.asarray(std, np.float32), allowed, tau, threshold)
    transform, epsg, _ = pixel_grid(cube)
    lower = sieved(masks.lower, sieve_px) & allowed
    best = (sieved(masks.best, sieve_px) & allowed) | lower
    upper = (sieved(masks.upper, sieve_px) & allowed) | best
    rows = []
    for bound, mask in (("best", best), ("lower", lower), ("upper", upper)):
        if mask.any():
            shape = polygonize(mask, transform)
            rows.append({"bound": bound, "area_km2": shape.area / 1e6, "geometry": shape})
    columns = ["bound", "area_km2", "geometry"]
    frame = gpd.GeoDataFrame(rows, columns=columns, geometry="geometry", crs=f"EPSG:{epsg}").to_crs("EPSG:4326")
    invalid = ~frame.geometry.is_valid
    if invalid.any():
        frame.loc[invalid, "geometry"] = shapely.make_valid(frame.loc[invalid, "geometry"].array)
    frame.insert(0, "glacier_id", str(cube.attrs.get("glacier_id", "")))
    return frame


def sieved(mask: np.ndarray, size_px: int) -> np.ndarray:
    """``mask`` without patches and without holes of fewer than ``size_px`` pixels (4-connected, as GDAL's sieve)."""
    from rasterio.features import sieve

    if size_px <= 1 or not mask.any():
        return mask.copy()
    return sieve(mask.astype(np.uint8), size=size_px, connectivity=CONNECTIVITY).astype(bool)


def polygonize(mask: np.ndarray, transform: Affine) -> MultiPolygon:
    """The pixels of ``mask`` as one multipolygon along pixel edges, in the grid's CRS; its area is exact."""
    import shapely
    from rasterio.features import shapes

    found = shapes(mask.astype(np.uint8), mask=mask, connectivity=CONNECTIVITY, transform=transform)
    return shapely.MultiPolygon([shapely.geometry.shape(geometry) for geometry, _ in found])
