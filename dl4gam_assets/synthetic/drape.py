"""Simulated scenes over real terrain and real outlines.

Belongs here: turning a DEM and outlines into a ground to render. Does not belong here: the rendering, and files.

Nothing that is made here says anything about the real glaciers: the retreat, the debris where none is given and all
scenes are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import rasterio.features
import rasterio.warp
import shapely
from affine import Affine
from rasterio.enums import Resampling
from scipy import ndimage

from dl4gam_assets.settings import fingerprint
from dl4gam_assets.synthetic.acquisitions import Acquisition, plan_acquisitions
from dl4gam_assets.synthetic.files import SimulationSummary, World, write_region
from dl4gam_assets.synthetic.noise import F32, fractal_noise
from dl4gam_assets.synthetic.region import flow_texture, lakes
from dl4gam_assets.synthetic.retreat import area_loss_rates, debris_cover, melt_order
from dl4gam_assets.synthetic.scenes import Ground


def drape_region(
    folder: Path,
    *,
    dem: Path,
    outlines: gpd.GeoDataFrame,
    debris: gpd.GeoDataFrame | None = None,
    seed: int = 7,
    years: Sequence[int],
    baseline_year: int,
    annual_rate_pct: float = -1.9,
    margin_m: float = 1000.0,
    dates_per_year: int = 4,
    workers: int = 2,
    progress: Callable[[str], None] | None = None,
) -> SimulationSummary:
    """Write the same files as ``write_demo_region`` over a real DEM and real outlines.

    The outlines are the truth of the baseline year and shrink from there on; the DEM is smoothed to 10 m for the light
    and passed on, resampled to 1 arc-second, as ``dem.tif``. Items, titles and file tags say "simulated".

    Parameters
    ----------
    folder : becomes the region's folder
    dem : elevation in metres, any CRS; values at or below -500 count as missing
    outlines : glaciers with ``glacier_id`` and geometry in any CRS; ``name`` and ``country`` are kept
    debris : debris-covered parts, any CRS; simulated where None
    annual_rate_pct : regional rate from the baseline to the last year, percent of the baseline area a year, negative
    margin_m : ground around the outlines

    Raises
    ------
    ValueError
        if outlines are empty, ids repeat, or the DEM does not cover the outlines.
    """
    if outlines.empty or outlines.crs is None:
        raise ValueError("outlines must hold glaciers and have a CRS")
    if outlines.glacier_id.duplicated().any():
        raise ValueError(f"glacier_id repeats: {outlines.glacier_id[outlines.glacier_id.duplicated()].iloc[0]!r}")
    years = [int(y) for y in years]
    stat = Path(dem).stat()
    parameters = {
        "kind": "drape",
        "seed": seed,
        "years": years,
        "baseline_year": baseline_year,
        "annual_rate_pct": annual_rate_pct,
        "margin_m": margin_m,
        "dates_per_year": dates_per_year,
        "dem": {"name": Path(dem).name, "bytes": stat.st_size},
        "outlines": fingerprint([list(map(str, outlines.glacier_id)), [g.wkb_hex for g in outlines.geometry]]),
        "debris": None if debris is None else fingerprint([g.wkb_hex for g in debris.geometry]),
    }

    def make() -> tuple[World, list[Acquisition]]:
        world = _world(Path(dem), outlines, debris, seed, -annual_rate_pct, margin_m)
        rng = np.random.default_rng([seed, 2])
        return world, plan_acquisitions(sorted({baseline_year, *years}), rng, dates_per_year=dates_per_year)

    return write_region(
        folder,
        parameters,
        make,
        seed=seed,
        years=years,
        baseline_year=baseline_year,
        workers=workers,
        progress=progress,
    )


def _world(
    dem: Path, outlines: gpd.GeoDataFrame, debris: gpd.GeoDataFrame | None, seed: int, rate_pct: float, margin_m: float
) -> World:
    rng = np.random.default_rng([seed, 0])
    epsg = outlines.to_crs(4326).estimate_utm_crs().to_epsg()
    crs = f"EPSG:{epsg}"
    frame = outlines.to_crs(crs).sort_values("glacier_id", ignore_index=True)
    frame["geometry"] = shapely.make_valid(shapely.force_2d(frame.geometry.to_numpy()))
    left, bottom, right, top = frame.total_bounds
    left, top = math.floor((left - margin_m) / 100) * 100, math.ceil((top + margin_m) / 100) * 100
    shape = (math.ceil((top - bottom + margin_m) / 200) * 20, math.ceil((right + margin_m - left) / 200) * 20)
    transform = Affine(10, 0, left, 0, -10, top)
    surface = smooth_elevation(dem, transform, shape, crs)
    label = rasterio.features.rasterize(
        ((g, k + 1) for k, g in enumerate(frame.geometry)), out_shape=shape, transform=transform, dtype=np.int32
    )
    seen = np.bincount(label.ravel(), minlength=len(frame) + 1)[1:]
    if (seen == 0).any():
        raise ValueError(
            f"glacier {frame.glacier_id[int(np.argmin(seen))]} is too small for a grid of 10 m, or wholly overlapped"
        )
    ice = label > 0
    # The real thickness is not known to the simulation: thick inside, thin at margins that are not divides.
    margin = ndimage.distance_transform_edt(ice).astype(np.float32) * 10
    thickness = np.where(ice, 3 + 0.9 * np.minimum(margin, 300) ** 0.8, 0).astype(np.float32)
    area = seen * 1e-4
    rates = area_loss_rates(area, rng, regional_pct=rate_pct)
    patches = fractal_noise(shape, rng, beta=2.6, longest_px=40)
    streaks = flow_texture(surface, ice, rng)
    order = melt_order(label, surface, thickness, patches, pixel_m=10.0)
    if debris is None:
        cover = debris_cover(label, surface, patches, streaks, rng, pixel_m=10.0)
    else:
        cover = _given_debris(debris.to_crs(crs), transform, shape)
    ela = float(np.average([np.median(surface[label == k + 1]) for k in range(len(frame))], weights=area))
    centre = frame.to_crs(4326).total_bounds
    ground = Ground(
        surface,
        ela,
        float(centre[0] + centre[2]) / 2,
        float(centre[1] + centre[3]) / 2,
        10.0,
        cover,
        lakes(surface, ice),
    ).prepare(ice, rng, streaks)
    table = pd.DataFrame({
        "glacier_id": frame.glacier_id.astype(str),
        "name": frame.name if "name" in frame.columns else "",
        "country": frame.country if "country" in frame.columns else "",
    })  # fmt: skip
    given = frame[["glacier_id", "geometry"]].copy()
    given["glacier_id"] = given.glacier_id.astype(str)
    return World("scenes over real terrain", "DRAPED", transform, crs, ground, label, order, rates, table, given)


def smooth_elevation(dem: Path, transform: Affine, shape: tuple[int, int], crs: str) -> F32:
    """A coarse DEM on a 10 m grid without the steps of its pixels and whole metres, float32 (H, W).

    Cubic-spline resampling, then a Gaussian of half a source pixel.

    Raises
    ------
    ValueError
        if the DEM does not cover the grid.
    """
    out = np.full(shape, np.nan, np.float32)
    with rasterio.open(dem) as source:
        data = source.read(1).astype(np.float32)
        nodata = source.nodata
        missing = (data <= -500) | ~np.isfinite(data)
        if nodata is not None:
            missing |= data == nodata
        data[missing] = np.nan
        rasterio.warp.reproject(
            data, out, src_transform=source.transform, src_crs=source.crs, src_nodata=np.nan, dst_transform=transform,
            dst_crs=crs, dst_nodata=np.nan, resampling=Resampling.cubic_spline,
        )  # fmt: skip
        corners = rasterio.warp.transform_bounds(source.crs, crs, *source.bounds)
        pixel = math.sqrt((corners[2] - corners[0]) * (corners[3] - corners[1]) / (source.width * source.height))
    gap = ~np.isfinite(out)
    if gap.mean() > 0.02:
        raise ValueError(f"{dem} covers {1 - gap.mean():.0%} of the outlines with their margin; give a larger DEM")
    if gap.any():
        nearest = ndimage.distance_transform_edt(gap, return_distances=False, return_indices=True)
        out = out[tuple(nearest)]
    smooth: F32 = ndimage.gaussian_filter(out, max(0.5 * pixel / 10.0, 0.5))
    return smooth


def _given_debris(debris: gpd.GeoDataFrame, transform: Affine, shape: tuple[int, int]) -> F32:
    if debris.empty:
        return np.full(shape, -9.0, np.float32)
    inside = rasterio.features.rasterize(list(debris.geometry), out_shape=shape, transform=transform, dtype=np.uint8)
    out: F32 = np.where(inside > 0, 0.2, -0.2).astype(np.float32)
    return ndimage.gaussian_filter(out, 1.0)
