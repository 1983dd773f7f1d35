"""Area of one glacier from its probability map, with the bounds of the calibrated interval.

Belongs here: which share of which pixel counts, the lower, best and upper masks, and the figures of one row of the
table ``areas``.
Does not belong here: finding tau (``ensemble``), differences between years (``rates``), polygons (``outlines``).
Source of the rules: Diaconu et al. 2025, doi:10.1029/2025EA004197 (METHOD sections 7 and 8). Fractional pixels and the
rule for ground that two inventory outlines share go beyond it (docs/areas.md).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dl4gam_assets.tables import rows_of

if TYPE_CHECKING:
    import geopandas as gpd
    import shapely
    import xarray as xr
    from affine import Affine
    from pyproj import Transformer

#: Below this share of debris the recall on debris is too noisy to be reported (METHOD section 8).
MIN_DEBRIS_SHARE = 0.01
#: Lowest predicted pixels behind the terminus.
TERMINUS_PIXELS = 30
#: Covered shares below this are rounding of coordinates where a polygon ends on a pixel's edge: the pixel is outside.
MIN_SHARE = 1e-6


class BoundMasks(NamedTuple):
    """Masks (H, W) of one glacier with ``lower`` inside ``best`` inside ``upper``."""

    lower: np.ndarray
    best: np.ndarray
    upper: np.ndarray


class Ground(NamedTuple):
    """Polygons of one glacier in the CRS of its cube, from the inventory's tables.

    ``outline`` and ``zone`` (the outline and the ice-free 20 m around it, cut halfway to the neighbours) are what may
    count; ``debris`` is the debris-covered part of the outline. ``lost_outline`` and ``lost_zone`` are the outlines and
    zones of neighbours to which shared ground goes; empty where none is lost. ``outline`` and ``zone`` are cut already.
    """

    outline: shapely.Geometry
    zone: shapely.Geometry
    debris: shapely.Geometry
    lost_outline: shapely.Geometry
    lost_zone: shapely.Geometry


class Shares(NamedTuple):
    """Share of each pixel (H, W), 0 to 1, that counts to a glacier; bool where pixels count wholly or not at all.

    ``counted``: outline and ice-free 20 m zone; ``outline`` and ``debris``: the parts of it in the outline and on its
    debris. ``edge``: the polygon that cuts the counted pixels; None where they are whole.
    """

    counted: np.ndarray
    outline: np.ndarray
    debris: np.ndarray
    edge: shapely.Geometry | None = None


def ground_of(
    glacier_id: str,
    glaciers: gpd.GeoDataFrame,
    zones: gpd.GeoDataFrame,
    debris: gpd.GeoDataFrame,
    epsg: int,
    shared_ground: Literal["each", "once"] = "each",
) -> Ground:
    """Polygons of a glacier and, with ``shared_ground`` "once", what of them goes to neighbours.

    Zones are cut halfway between neighbours already: ground goes to the nearest outline. Ground that lies in several
    outlines is equally near to all of them; with "once" it goes to the one with the lowest ``glacier_int`` (the first
    in the inventory), and so does a pixel whose centre is exactly halfway between two outlines. With "each" every
    glacier keeps it.

    Parameters
    ----------
    glaciers, zones, debris : the tables (EPSG:4326); all glaciers, also those that are not modelled. Of the zones those
        of 20 m are enough.
    epsg : EPSG code of the cube's grid, in metres.

    Raises
    ------
    KeyError
        if the glacier is not in the inventory or has no 20 m zone.
    """
    import shapely

    own = rows_of(glaciers, glacier_id)
    # A table of 20 m zones alone is used as it is, with the spatial index that it has.
    of_20_m = zones if (zones["buffer_m"] == 20).all() else zones[zones["buffer_m"] == 20]
    own_zone = rows_of(of_20_m, glacier_id)
    if not len(own) or not len(own_zone):
        raise KeyError(f"glacier {glacier_id!r} has no outline or no 20 m zone: materialize glacier_zones")

    def metric(shapes: gpd.GeoSeries) -> np.ndarray:
        return np.array([polygonal(g) for g in shapes.to_crs(epsg).to_numpy()], dtype=object)

    outline, zone = metric(own.geometry)[0], metric(own_zone.geometry)[0]
    own_debris = rows_of(debris, glacier_id)
    rocks = metric(own_debris.geometry)[0] if len(own_debris) else shapely.MultiPolygon()
    lost_outline: shapely.Geometry = shapely.MultiPolygon()
    lost_zone: shapely.Geometry = shapely.MultiPolygon()
    if shared_ground == "once":
        near = of_20_m.iloc[of_20_m.sindex.query(own_zone.geometry.iloc[0], predicate="intersects")]
        others = glaciers[glaciers["glacier_id"].isin(near["glacier_id"])]
        before = others[others["glacier_int"] < own["glacier_int"].iloc[0]]
        if len(before):
            lost_outline = shapely.union_all(metric(before.geometry))
            lost_zone = shapely.union_all(metric(near[near["glacier_id"].isin(before["glacier_id"])].geometry))
            outline = polygonal(shapely.difference(outline, lost_outline))
            zone = polygonal(shapely.union(shapely.difference(zone, lost_zone), outline))
            rocks = polygonal(shapely.intersection(rocks, outline))
    return Ground(outline, zone, rocks, lost_outline, lost_zone)


def whole_shares(cube: xr.Dataset, ground: Ground | None = None) -> Shares:
    """Whole pixels (published): a pixel counts if its centre does.

    Counted are the pixels of the outline and of the ice-free part of the 20 m zone. Pixels of other glaciers never
    count, so that ice divides stay where the inventory has them. With ``ground``, pixels on ground that goes to a
    neighbour do not count either (see :func:`ground_of`).
    """
    from dl4gam_assets.cubes import cube_mask

    glacier = cube_mask(cube, "glacier")
    zone = cube_mask(cube, "zone_20") & ~cube_mask(cube, "any_glacier")
    if ground is not None:
        transform, _, _ = pixel_grid(cube)
        glacier = glacier & ~_centres_in(ground.lost_outline, glacier.shape, transform)
        zone = zone & ~_centres_in(ground.lost_zone, glacier.shape, transform)
    return Shares(glacier | zone, glacier, glacier & cube_mask(cube, "debris"))


def fractional_shares(cube: xr.Dataset, ground: Ground) -> Shares:
    """Fractional pixels: each pixel counts by the share of it that the glacier's polygons cover.

    A pixel on the outline's outer edge is covered by the outline and, for the rest, by the ice-free 20 m zone, so it
    counts wholly. A pixel on an ice divide is split between the neighbours by their covered shares, and one on the
    outer edge of the zone counts by the share within 20 m. Since zones do not overlap, the shares of a pixel add up to
    1 at most (where outlines overlap: with ``shared_ground`` "once"). A map that is ice everywhere has the area of the
    zone's polygon. Covered shares are exact (exactextract; Baston and contributors, github.com/isciences/exactextract).
    """
    transform, _, _ = pixel_grid(cube)
    height, width = cube["mask"].shape
    counted = covered_share(ground.zone, (height, width), transform)
    outline = np.minimum(covered_share(ground.outline, (height, width), transform), counted)
    debris = np.minimum(covered_share(ground.debris, (height, width), transform), outline)
    return Shares(counted, outline, debris, ground.zone)


def covered_share(polygon: shapely.Geometry, shape: tuple[int, int], transform: Affine) -> np.ndarray:
    """Share of each pixel (float64, H, W, 0 to 1) that a polygon in the grid's CRS covers; exact to rounding.

    Where a corner of the polygon lies within about 1e-9 m of a pixel's corner, as in outlines drawn along pixels and
    kept in degrees, exactextract 0.3 can lose that whole pixel. So corners are put on steps of a micrometre first, and
    the sum is compared with the polygon's area; where they differ, larger steps are tried.

    Raises
    ------
    ValueError
        if the grid is not north up, or the shares do not add up to the polygon's area within a tenth of a pixel.
    """
    import shapely

    height, width = shape
    if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
        raise ValueError(f"covered shares need a north-up grid, not {transform}")
    west, north = transform.c, transform.f
    frame = shapely.box(west, north + height * transform.e, west + width * transform.a, north)
    inside = polygon if shapely.covers(frame, polygon) else polygonal(shapely.intersection(polygon, frame))
    if inside.is_empty:
        return np.zeros(shape)
    pixels = inside.area / abs(transform.a * transform.e)
    for step_m in (1e-6, 1e-3, 1e-2):
        share = _covered(polygonal(shapely.set_precision(inside, step_m)), shape, frame.bounds)
        if abs(share.sum() - pixels) < 0.1:
            return share
    raise ValueError(
        f"shares of pixels add up to {share.sum():.1f} pixels, the polygon to {pixels:.1f}: set areas.pixels to whole "
        "and report the outline as a defect"
    )


def _covered(polygon: shapely.Geometry, shape: tuple[int, int], bounds: tuple[float, ...]) -> np.ndarray:
    import shapely
    from exactextract import exact_extract
    from exactextract.raster import NumPyRasterSource

    out = np.zeros(shape[0] * shape[1])
    if polygon.is_empty:
        return out.reshape(shape)
    feature = {"type": "Feature", "geometry": shapely.geometry.mapping(polygon), "properties": {}}
    # One piece: several would number their cells one after the other.
    grid = NumPyRasterSource(np.zeros(shape, np.uint8), *bounds)
    found = exact_extract(grid, [feature], ["cell_id", "coverage"], max_cells_in_memory=out.size)
    cells = found[0]["properties"]
    out[np.asarray(cells["cell_id"], dtype=np.int64)] = cells["coverage"]
    out[out < MIN_SHARE] = 0.0
    return np.minimum(out, 1.0).reshape(shape)


def counted_pixels(cube: xr.Dataset) -> np.ndarray:
    """Whole pixels (bool, H, W) that may count to this glacier: its outline and the ice-free part of its 20 m zone."""
    return whole_shares(cube).counted


def bound_masks(
    mean: np.ndarray, std: np.ndarray, allowed: np.ndarray, tau: float, threshold: float = 0.5
) -> BoundMasks:
    """Lower, best and upper mask of a map.

    ``best`` is ``mean >= threshold``; ``lower`` is ``mean - std >= 1 - tau``; ``upper`` is ``mean + std >= tau``, all
    within ``allowed``. With the threshold 0.5 and tau in [0, 0.5] they are nested by construction. With another
    threshold the best mask could leave the bounds, so ``lower`` is cut to ``best`` and ``upper`` widened to it.
    An allowed pixel without a prediction (NaN) is in no mask but ``upper``: it may or may not be ice.

    Parameters
    ----------
    mean, std : float arrays (H, W)
        Mean and standard deviation of the members' calibrated probabilities.
    allowed : bool array (H, W)
    tau : float in [0, 0.5]

    Raises
    ------
    ValueError
        if the shapes differ or tau is outside [0, 0.5].
    """
    from dl4gam_assets.ensemble import interval_masks

    if not (mean.shape == std.shape == allowed.shape):
        raise ValueError(f"map {mean.shape}, deviation {std.shape} and mask {allowed.shape} have different shapes")
    if not 0.0 <= tau <= 0.5:
        raise ValueError(f"tau is {tau}, outside [0, 0.5]")
    unknown = ~(np.isfinite(mean) & np.isfinite(std))
    best = allowed & ~unknown & (np.nan_to_num(mean, nan=0.0) >= threshold)
    lower, upper = interval_masks(mean, std, tau, allowed)
    return BoundMasks(lower & best, best, upper | best)


def pixel_grid(cube: xr.Dataset) -> tuple[Affine, int, float]:
    """Affine transform, EPSG code and pixel area (m2) of a cube.

    Raises
    ------
    ValueError
        if the cube has no EPSG coded, north-up grid in metres.
    """
    import rioxarray  # noqa: F401  (registers the accessor)

    transform = cube.rio.transform()
    crs = cube.rio.crs
    epsg = crs.to_epsg() if crs is not None else None
    if epsg is None or not crs.is_projected:
        raise ValueError(
            f"cube of {cube.attrs.get('glacier_id', 'unknown glacier')} has no projected CRS with an EPSG code "
            f"(found {crs}); build it again"
        )
    return transform, epsg, abs(transform.a * transform.e - transform.b * transform.d)


def area_row(
    mean: np.ndarray,
    std: np.ndarray,
    cube: xr.Dataset,
    tau: float,
    threshold: float = 0.5,
    shares: Shares | None = None,
    other_taus: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Figures of one glacier and image: a row of the table ``areas`` but for year, fold, date and filled share.

    Areas (km2) sum the counted shares of predicted pixels; ``shares`` None: whole pixels, as published. ``std_km2`` is
    (upper - lower) / 2. ``recall`` is the predicted share of the outline, ``false_positive_rate`` the predicted share
    of the ice-free pixels between 20 and 50 m outside, ``terminus_m`` the median elevation of the lowest 30 predicted
    pixels, ``terminus_lowest_m`` that of the lowest one, and ``terminus_lon``, ``terminus_lat`` (degrees, EPSG:4326)
    the centre of the one of the 30 that is nearest to their median position. ``debris_area_km2`` is predicted ice on
    the inventory's debris. ``usable_share`` is the share of the 20 m zone that was neither cloudy nor missing. A share
    without pixels to judge is None; recall on debris is None where debris covers less than 1% of the outline, the
    terminus where elevation is unknown.
    ``other_taus`` (name: tau) adds the columns ``lower_NAME_km2`` and ``upper_NAME_km2``, so that intervals by several
    rules stand side by side.

    Raises
    ------
    ValueError
        if the outline has no pixel on the grid or all of it goes to neighbours, shapes differ, or tau is outside
        [0, 0.5].
    """
    from dl4gam_assets.cubes import cube_mask

    name = str(cube.attrs.get("glacier_id", "unknown glacier"))
    mean = np.asarray(mean, dtype=np.float32)
    std = np.asarray(std, dtype=np.float32)
    glacier = cube_mask(cube, "glacier")
    if mean.shape != glacier.shape:
        raise ValueError(f"{name}: the map has {mean.shape} pixels, the cube {glacier.shape}: predict it again")
    if not glacier.any():
        raise ValueError(f"{name}: no pixel of the outline is on the cube's grid; build the cube again")
    shares = whole_shares(cube) if shares is None else shares
    if not shares.outline.any():
        raise ValueError(f"{name}: all of its outline goes to neighbours that share the ground (areas.shared_ground)")
    any_glacier = cube_mask(cube, "any_glacier")
    zone_20, zone_50 = cube_mask(cube, "zone_20"), cube_mask(cube, "zone_50")
    masks = bound_masks(mean, std, shares.counted > 0, tau, threshold)
    _, _, pixel_m2 = pixel_grid(cube)
    km2 = pixel_m2 / 1e6

    ring = zone_50 & ~zone_20 & ~any_glacier
    with np.errstate(invalid="ignore"):
        predicted = mean >= threshold
    near = glacier | zone_20
    lower, best, upper = (_pixels(shares.counted, mask) * km2 for mask in masks)
    outline_px, debris_px = _pixels(shares.outline), _pixels(shares.debris)
    terminus_m, terminus_lon, terminus_lat, terminus_lowest_m = _terminus(cube, masks.best & (shares.counted >= 0.5))
    row: dict[str, Any] = {
        "area_km2": best,
        "lower_km2": lower,
        "upper_km2": upper,
        "std_km2": (upper - lower) / 2,
        "tau": float(tau),
        "inventory_area_km2": outline_px * km2,
        "recall": _pixels(shares.outline, masks.best) / outline_px,
        "false_positive_rate": _share(predicted, ring),
        "debris_km2": debris_px * km2,
        "debris_area_km2": _pixels(shares.debris, masks.best) * km2,
        "debris_recall": (
            _pixels(shares.debris, masks.best) / debris_px
            if debris_px > 0 and debris_px >= MIN_DEBRIS_SHARE * outline_px
            else None
        ),
        "terminus_m": terminus_m,
        "terminus_lon": terminus_lon,
        "terminus_lat": terminus_lat,
        "terminus_lowest_m": terminus_lowest_m,
        "usable_share": _share(~cube_mask(cube, "not_ok"), near),
    }
    for rule, other in (other_taus or {}).items():
        bounds = masks if other == tau else bound_masks(mean, std, shares.counted > 0, other, threshold)
        row[f"lower_{rule}_km2"] = _pixels(shares.counted, bounds.lower) * km2
        row[f"upper_{rule}_km2"] = _pixels(shares.counted, bounds.upper) * km2
    if "glacier_id" in cube.attrs:
        row["glacier_id"] = name
    return row


def _pixels(shares: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Sum of shares (bool: number of pixels) within a mask. The same pixels in the same order give the same sum."""
    return float(np.sum(shares if mask is None else shares[mask], dtype=np.float64))


def _share(predicted: np.ndarray, where: np.ndarray) -> float | None:
    n = int(where.sum())
    return float((predicted & where).sum()) / n if n else None


def _terminus(cube: xr.Dataset, predicted: np.ndarray) -> tuple[float | None, float | None, float | None, float | None]:
    """Elevation (m), longitude and latitude (degrees) of the lowest predicted pixels, and the elevation of the lowest
    one; None without elevation.

    The position is a predicted pixel's centre, also where the lowest pixels are on two tongues.
    """
    if "dem" not in cube:
        return None, None, None, None
    rows, columns = np.nonzero(predicted)
    heights = np.asarray(cube["dem"].values, dtype=np.float64)[rows, columns]
    order = np.argsort(heights, kind="stable")
    lowest = order[np.isfinite(heights[order])][:TERMINUS_PIXELS]
    if not len(lowest):
        return None, None, None, None
    transform, epsg, _ = pixel_grid(cube)
    column, row = columns[lowest] + 0.5, rows[lowest] + 0.5
    x = transform.c + transform.a * column + transform.b * row
    y = transform.f + transform.d * column + transform.e * row
    k = int(np.argmin((x - np.median(x)) ** 2 + (y - np.median(y)) ** 2))
    lon, lat = _to_degrees(epsg).transform(x[k], y[k])
    return float(np.median(heights[lowest])), float(lon), float(lat), float(heights[lowest[0]])


@functools.lru_cache(maxsize=64)
def _to_degrees(epsg: int) -> Transformer:
    from pyproj import Transformer

    return Transformer.from_crs(epsg, 4326, always_xy=True)


def _centres_in(polygon: shapely.Geometry, shape: tuple[int, int], transform: Affine) -> np.ndarray:
    """Pixels (bool, H, W) whose centre is in a polygon, by the same rule as the masks of cubes."""
    from rasterio.features import rasterize

    if polygon.is_empty:
        return np.zeros(shape, dtype=bool)
    burnt: np.ndarray = rasterize([polygon], out_shape=shape, transform=transform, fill=0, dtype="uint8")
    return burnt == 1


def polygonal(shape: shapely.Geometry) -> shapely.Geometry:
    """Valid polygons of a geometry: what crosses itself is repaired, lines and points are left out."""
    import shapely

    valid = shape if shape.is_valid else shapely.make_valid(shape)
    if valid.geom_type in {"Polygon", "MultiPolygon"}:
        return valid
    return shapely.MultiPolygon([g for g in shapely.get_parts(shapely.get_parts(valid)) if g.geom_type == "Polygon"])
