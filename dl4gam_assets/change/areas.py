"""Area of one glacier from its probability map, with the bounds of the calibrated interval.

Belongs here: which pixels count, the lower, best and upper masks, and the figures of one row of the table ``areas``.
Does not belong here: finding tau (``ensemble``), differences between years (``rates``), polygons (``outlines``).
Source of the rules: Diaconu et al. 2025, doi:10.1029/2025EA004197 (METHOD sections 7 and 8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from affine import Affine

#: Below this share of debris the recall on debris is too noisy to be reported (METHOD section 8).
MIN_DEBRIS_SHARE = 0.01
#: Lowest predicted pixels behind the terminus altitude.
TERMINUS_PIXELS = 30


class BoundMasks(NamedTuple):
    """Masks (H, W) of one glacier with ``lower`` inside ``best`` inside ``upper``."""

    lower: np.ndarray
    best: np.ndarray
    upper: np.ndarray


def counted_pixels(cube: xr.Dataset) -> np.ndarray:
    """Pixels (H, W) that may count to this glacier: its outline and the ice-free part of its 20 m zone.

    Pixels of other glaciers never count, so that ice divides stay where the inventory has them.
    """
    from dl4gam_assets.cubes import cube_mask

    glacier = cube_mask(cube, "glacier")
    return glacier | (cube_mask(cube, "zone_20") & ~cube_mask(cube, "any_glacier"))


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
    return BoundMasks(lower & best, best, (upper & ~unknown) | best | (allowed & unknown))


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


def area_row(mean: np.ndarray, std: np.ndarray, cube: xr.Dataset, tau: float, threshold: float = 0.5) -> dict[str, Any]:
    """Figures of one glacier and image: a row of the table ``areas`` but for year, fold, date and filled share.

    Areas count pixels of the glacier's outline and of the ice-free part of its 20 m zone. ``std_km2`` is
    (upper - lower) / 2. ``recall`` is the predicted share of the outline, ``false_positive_rate`` the predicted share
    of the ice-free pixels between 20 and 50 m outside, ``terminus_m`` the median elevation of the lowest 30 predicted
    pixels, ``usable_share`` the share of the 20 m zone that was neither cloudy nor missing. A share without pixels to
    judge is None; recall on debris is None where debris covers less than 1% of the outline.

    Raises
    ------
    ValueError
        if the outline has no pixel on the grid, shapes differ, or tau is outside [0, 0.5].
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
    any_glacier = cube_mask(cube, "any_glacier")
    zone_20, zone_50 = cube_mask(cube, "zone_20"), cube_mask(cube, "zone_50")
    debris = cube_mask(cube, "debris") & glacier
    masks = bound_masks(mean, std, counted_pixels(cube), tau, threshold)
    _, _, pixel_m2 = pixel_grid(cube)
    km2 = pixel_m2 / 1e6

    ring = zone_50 & ~zone_20 & ~any_glacier
    with np.errstate(invalid="ignore"):
        predicted = mean >= threshold
    near = glacier | zone_20
    has_debris = debris.sum() >= MIN_DEBRIS_SHARE * glacier.sum()
    lower, best, upper = (float(mask.sum()) * km2 for mask in masks)
    row: dict[str, Any] = {
        "area_km2": best,
        "lower_km2": lower,
        "upper_km2": upper,
        "std_km2": (upper - lower) / 2,
        "tau": float(tau),
        "inventory_area_km2": float(glacier.sum()) * km2,
        "recall": _share(masks.best, glacier),
        "false_positive_rate": _share(predicted, ring),
        "debris_km2": float(debris.sum()) * km2,
        "debris_recall": _share(masks.best, debris) if has_debris else None,
        "terminus_m": _terminus(cube, masks.best),
        "usable_share": _share(~cube_mask(cube, "not_ok"), near),
    }
    if "glacier_id" in cube.attrs:
        row["glacier_id"] = name
    return row


def _share(predicted: np.ndarray, where: np.ndarray) -> float | None:
    n = int(where.sum())
    return float((predicted & where).sum()) / n if n else None


def _terminus(cube: xr.Dataset, predicted: np.ndarray) -> float | None:
    if "dem" not in cube:
        return None
    heights = np.asarray(cube["dem"].values, dtype=np.float64)[predicted]
    heights = np.sort(heights[np.isfinite(heights)])[:TERMINUS_PIXELS]
    return float(np.median(heights)) if len(heights) else None
