"""Polygons of a glacier's map: best estimate, lower and upper bound.

Belongs here: mask to polygon, and fewer corners.
Does not belong here: which pixels count and what a bound is (``areas``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dl4gam_assets.change.areas import Shares, bound_masks, pixel_grid, polygonal, whole_shares

if TYPE_CHECKING:
    import geopandas as gpd
    import shapely
    import xarray as xr
    from affine import Affine
    from shapely.geometry import MultiPolygon

#: Pixels that touch only at a corner are separate: their joint polygon would touch itself, which is not valid.
CONNECTIVITY = 4


def extract_outlines(
    mean: np.ndarray,
    std: np.ndarray,
    cube: xr.Dataset,
    tau: float,
    threshold: float = 0.5,
    sieve_px: int = 10,
    shares: Shares | None = None,
    simplify_m: float = 0.0,
) -> gpd.GeoDataFrame:
    """Outlines of one glacier as rows of the table ``outlines`` (glacier_id, bound, area_km2, geometry EPSG:4326).

    The masks are those of the areas, with patches and holes smaller than ``sieve_px`` pixels removed (0 or 1: none),
    then cut again to the pixels that count, so that a filled hole never takes another glacier's pixel. Lower stays
    inside best inside upper. With fractional ``shares`` the outlines are cut along the glacier's ground, so that they
    follow ice divides. ``simplify_m`` (metres) removes corners (see :func:`simplified`); it moves no line between this
    glacier's ground and another's. A bound without any pixel left has no row. ``area_km2`` is the polygon's area on
    the cube's grid, so it differs from the table ``areas`` by what sieve and simplification changed.

    Raises
    ------
    ValueError
        as :func:`~dl4gam_assets.change.areas.bound_masks`; also if the grid has no EPSG code.
    """
    import geopandas as gpd
    import shapely

    shares = whole_shares(cube) if shares is None else shares
    allowed = shares.counted > 0
    masks = bound_masks(np.asarray(mean, np.float32), np.asarray(std, np.float32), allowed, tau, threshold)
    transform, epsg, _ = pixel_grid(cube)
    lower = sieved(masks.lower, sieve_px) & allowed
    best = (sieved(masks.best, sieve_px) & allowed) | lower
    upper = (sieved(masks.upper, sieve_px) & allowed) | best
    shapes: tuple[shapely.Geometry, ...]
    if simplify_m > 0:
        shapes = simplified(lower, best, upper, allowed, transform, simplify_m)
    else:
        shapes = tuple(polygonize(mask, transform) for mask in (lower, best, upper))
    if shares.edge is not None:
        shapes = tuple(polygonal(shapely.intersection(shape, shares.edge)) for shape in shapes)
    rows = [
        {"bound": bound, "area_km2": shape.area / 1e6, "geometry": shape}
        for bound, shape in zip(("best", "lower", "upper"), (shapes[1], shapes[0], shapes[2]), strict=True)
        if not shape.is_empty
    ]
    columns = ["bound", "area_km2", "geometry"]
    frame = gpd.GeoDataFrame(rows, columns=columns, geometry="geometry", crs=f"EPSG:{epsg}").to_crs("EPSG:4326")
    frame["geometry"] = [polygonal(shape) for shape in frame.geometry]
    frame.insert(0, "glacier_id", str(cube.attrs.get("glacier_id", "")))
    return frame


def simplified(
    lower: np.ndarray, best: np.ndarray, upper: np.ndarray, allowed: np.ndarray, transform: Affine, tolerance_m: float
) -> tuple[shapely.Geometry, shapely.Geometry, shapely.Geometry]:
    """Polygons of nested masks (H, W) with fewer corners, in the grid's CRS: lower inside best inside upper.

    Each mask divides the ``allowed`` ground in two; the border between the two is simplified (coverage simplification
    of GEOS after Visvalingam and Whyatt 1993, doi:10.1179/000870493786962263), which neither opens nor closes a patch
    or hole. The border of the allowed ground stays as it is: that is where neighbours begin. Where the simplified
    lines then cross, lower is cut at best and upper widened to it. ``tolerance_m``: corners go whose triangle has less
    than its square in area.
    """
    import shapely

    pixel_m = np.sqrt(abs(transform.a * transform.e - transform.b * transform.d))
    low, middle, high = (_fewer_corners(mask, allowed, tolerance_m / pixel_m) for mask in (lower, best, upper))
    shapes = (shapely.intersection(low, middle), middle, shapely.union(high, middle))

    def placed(corners: np.ndarray) -> np.ndarray:
        column, row = corners[:, 0], corners[:, 1]
        x = transform.c + transform.a * column + transform.b * row
        return np.column_stack([x, transform.f + transform.d * column + transform.e * row])

    low, middle, high = (polygonal(shapely.transform(polygonal(shape), placed)) for shape in shapes)
    return low, middle, high


def _fewer_corners(mask: np.ndarray, allowed: np.ndarray, tolerance: float) -> shapely.Geometry:
    """Simplified polygon of a mask inside the fixed border of ``allowed``; in pixels, tolerance too."""
    import shapely
    from rasterio.features import shapes

    found = list(shapes(allowed.astype(np.uint8) + mask, mask=allowed, connectivity=CONNECTIVITY))
    inside = np.array([value == 2 for _, value in found], dtype=bool)
    if not inside.any():
        return shapely.MultiPolygon()
    pieces = np.array([shapely.geometry.shape(geometry) for geometry, _ in found], dtype=object)
    # Pieces count as neighbours only where their borders have the same corners: every pixel's corner is one.
    pieces = shapely.transform(shapely.segmentize(pieces, 1.0), np.round)
    pieces = shapely.coverage_simplify(pieces, tolerance, simplify_boundary=False)
    # Without the corners on straight stretches of the fixed border.
    return polygonal(shapely.simplify(shapely.union_all(pieces[inside]), 0.0))


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
