"""DEM and dh/dt mosaics onto a grid.

Belongs here: warping elevation rasters, choosing the dh/dt period of a year.
Does not belong here: derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
import rasterio.warp
from rasterio.enums import Resampling
from rasterio.errors import RasterioError

from dl4gam_assets.settings import ElevationChangePeriod

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


#: No ground of the Earth lies outside; what does is a void without a tag.
LOWEST_M, HIGHEST_M = -500.0, 9000.0


def read_elevation(paths: Sequence[Path], geobox: GeoBox, nodata: float | None = None) -> np.ndarray:
    """Elevation on a grid, bilinear, mosaicked in the order of the files (the first that has a value wins).

    Parameters
    ----------
    paths : DEM files in any CRS, elevations in metres
    geobox : target grid
    nodata : value that means missing in files that do not say. Without it, -32768 means missing in int16 files, and
        elevations outside -500 to 9000 m are missing in every file.

    Returns
    -------
    float32 array (H, W) in metres, NaN where no file has a value.

    Raises
    ------
    FileNotFoundError
        if a file is absent.
    OSError
        if a file can not be read; the message names it.
    """
    out = np.full(geobox.shape, np.nan, dtype=np.float32)
    for path in paths:
        missing = np.isnan(out)
        if not missing.any():
            break
        found = _warp(path, geobox, nodata)
        found[(found < LOWEST_M) | (found > HIGHEST_M)] = np.nan
        out = np.where(missing, found, out)
    return out


def _warp(path: Path, geobox: GeoBox, nodata: float | None) -> np.ndarray:
    """First band of a raster on a grid: float32 (H, W), bilinear, NaN where it has no value."""
    if not path.exists():
        raise FileNotFoundError(f"elevation file {path} does not exist; see terrain in the region's settings")
    out = np.full(geobox.shape, np.nan, dtype=np.float32)
    try:
        with rasterio.open(path) as source:
            missing = source.nodata if source.nodata is not None else nodata
            if missing is None and source.dtypes[0] == "int16":
                missing = -32768.0
            rasterio.warp.reproject(
                rasterio.band(source, 1),
                out,
                src_nodata=missing,
                dst_transform=geobox.affine,
                dst_crs=str(geobox.crs),
                dst_nodata=np.nan,
                init_dest_nodata=True,
                resampling=Resampling.bilinear,
            )
    except RasterioError as error:
        raise OSError(f"elevation file {path} can not be read: {error}") from error
    return out


def match_period(
    periods: Sequence[ElevationChangePeriod], year: int, rule: str = "ended"
) -> ElevationChangePeriod | None:
    """The dh/dt period that belongs to a year.

    Rule ``nearest_end``: the period whose end is nearest to the year (the earlier one of two), so that the lag between
    elevation change and image is the same as in training, at the price of looking at most some years ahead.
    Rule ``ended``: the latest period that has ended by the year (2010 to 2015 for the inventory of 2015, 2015 to 2020 for 2023, as
    published), so that an image is never judged with elevation change of its future; for earlier years the first
    period there is. None without periods.
    """
    if not periods:
        return None
    if rule == "nearest_end":
        return min(periods, key=lambda p: (abs(p.end - year), p.end, p.start))
    ended = [p for p in periods if p.end <= year]
    return max(ended, key=lambda p: (p.end, p.start)) if ended else min(periods, key=lambda p: (p.end, p.start))


def read_elevation_change(
    periods: Sequence[ElevationChangePeriod], year: int, geobox: GeoBox, rule: str = "ended"
) -> tuple[np.ndarray, ElevationChangePeriod | None]:
    """dh/dt (m/yr) on a grid for a year, and the period it is of.

    Parameters
    ----------
    periods : their ``path`` must be absolute, or relative to the working directory
    year : calendar year of the image
    geobox : target grid
    rule : see :func:`match_period`

    Returns
    -------
    float32 array (H, W), bilinear, NaN where missing (everywhere without periods), and the period or None.

    Raises
    ------
    FileNotFoundError, OSError
        if the period's file is absent or can not be read.
    """
    period = match_period(periods, year, rule)
    if period is None:
        return np.full(geobox.shape, np.nan, dtype=np.float32), None
    return _warp(Path(period.path), geobox, None), period
