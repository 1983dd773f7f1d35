"""DEM, dh/dt and velocity tiles onto a grid.

Belongs here: mosaicking tiles without seams, warping them, choosing the dh/dt period of a year.
Does not belong here: where tiles are (``tiles``), derivatives.

How a mosaic gets no seams: tiles that share a lattice of pixels (the usual case) are pasted into one window of it, with
a rim around the grid, and warped once, so that bilinear weights reach across the borders as if there were one file.
Tiles on other lattices (other UTM zones; Copernicus tiles get fewer columns at 50, 60, 70 ... degrees) are pasted into
windows of their own; each window is continued with the values of the others before it is warped, and a pixel of the
grid takes its value from the first lattice that has a value at that place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import rasterio.warp
import rasterio.windows
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling

from dl4gam_assets.settings import ElevationChangePeriod
from dl4gam_assets.terrain.tiles import Tile, TileError, TileIndex, find_tiles, with_tile

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


#: No ground of the Earth lies outside; what does is a void without a tag.
LOWEST_M, HIGHEST_M = -500.0, 9000.0
#: No glacier is faster (m/yr), and a speed is not negative.
FASTEST = 30_000.0
#: No glacier thins or thickens faster (m/yr), surges included; what does is a void without a tag.
FASTEST_CHANGE = 100.0
#: Pixels of a source read around a grid: bilinear weights reach one pixel.
_RIM = 2


def read_elevation(tiles: Sequence[Tile | Path | str], geobox: GeoBox, nodata: float | None = None) -> np.ndarray:
    """Elevation on a grid, bilinear, mosaicked in the order of the tiles (the first that has a value wins).

    Parameters
    ----------
    tiles : DEM files in any CRS, elevations in metres
    geobox : target grid
    nodata : value that means missing in files that do not say. Without it, -32768 means missing in int16 files.
        Elevations outside -500 to 9000 m are missing in every file.

    Returns
    -------
    float32 array (H, W) in metres, NaN where no file has a value at that place.

    Raises
    ------
    FileNotFoundError
        if a file is absent.
    OSError
        if a file can not be read; the message names it.
    """
    return read_mosaic(tiles, geobox, nodata=nodata, lowest=LOWEST_M, highest=HIGHEST_M)


def read_velocity(tiles: Sequence[Tile | Path | str], geobox: GeoBox) -> np.ndarray:
    """Surface speed (m/yr) on a grid, float32 (H, W), NaN where missing; otherwise as :func:`read_elevation`."""
    return read_mosaic(tiles, geobox, lowest=0.0, highest=FASTEST)


def read_dhdt(
    tiles: Sequence[Tile | Path | str], geobox: GeoBox, nodata: float | None = None, *, error_layer: bool = False
) -> np.ndarray:
    """dh/dt, or its standard error (m/yr), on a grid: float32 (H, W), NaN where missing; as :func:`read_elevation`.

    Rates beyond 100 m/yr and errors outside 0 to 100 m/yr are missing in every file.
    """
    lowest = 0.0 if error_layer else -FASTEST_CHANGE
    return read_mosaic(tiles, geobox, nodata=nodata, lowest=lowest, highest=FASTEST_CHANGE)


def read_mosaic(
    tiles: Sequence[Tile | Path | str],
    geobox: GeoBox,
    *,
    nodata: float | None = None,
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> np.ndarray:
    """First bands of tiles on a grid, bilinear, without seams at their borders.

    A pixel has a value where the tile's pixel under its centre has one; values outside ``lowest`` to ``highest`` are
    missing. Tiles of half the grid's pixel size or less are averaged to it by GDAL. Scale and offset in the files are
    applied. An optional tile that is absent (HTTP 404) is left out.

    Returns
    -------
    float32 array (H, W), NaN where missing.

    Raises
    ------
    FileNotFoundError, OSError
        as :func:`read_elevation`.
    """
    from dl4gam_assets.imagery.sources import reading_with

    out = np.full(geobox.shape, np.nan, dtype=np.float32)
    lattices: list[_Lattice] = []
    fine: list[np.ndarray] = []

    def take(source: Any) -> None:
        missing = source.nodata if source.nodata is not None else nodata
        if missing is None and source.dtypes[0] == "int16":
            missing = -32768.0
        if _much_finer(source, geobox):
            fine.append(_averaged(source, geobox, missing, lowest, highest))
            return
        lattice = next((found for found in lattices if found.holds(source)), None)
        if lattice is None:
            lattice = _Lattice(source, geobox)
            lattices.append(lattice)
        lattice.paste(source, missing, lowest, highest)

    with reading_with():
        for tile in tiles:
            with_tile(tile if isinstance(tile, Tile) else Tile(str(tile)), take)
    for values in fine:
        out = np.where(np.isnan(out), values, out)
    lattices = [lattice for lattice in lattices if np.isfinite(lattice.values).any()]
    for lattice in lattices:
        empty = np.isnan(out)
        if not empty.any():
            break
        whole = lattice.values
        for other in lattices:
            hole = np.isnan(whole)
            if other is lattice or not hole.any():
                continue
            continued = _warp(other, other.values, whole.shape, lattice.transform, lattice.crs)
            whole = np.where(hole, continued, whole)
        warped = _warp(lattice, whole, geobox.shape, geobox.affine, str(geobox.crs))
        if np.isnan(lattice.values).any():
            there = _warp(lattice, lattice.values, geobox.shape, geobox.affine, str(geobox.crs), Resampling.nearest)
            warped[np.isnan(there)] = np.nan
        out = np.where(empty, warped, out)
    return out


class _Lattice:
    """A window of a lattice of pixels that covers a grid and a rim, and what its tiles say there.

    Geographic coordinates near the antimeridian are counted from it (prime meridian at 180 degrees), so that a window
    across it is one window.
    """

    def __init__(self, source: Any, geobox: GeoBox):
        a = source.transform
        if a.b or a.d:
            raise TileError(f"tile {source.name} is rotated against its coordinate system; warp it first (gdalwarp)")
        self.native: CRS = source.crs
        self.shift = _antimeridian(source, geobox)
        self.crs = _from_antimeridian(source.crs) if self.shift else source.crs
        self.pixel = (a.a, a.e)
        left, bottom, right, top = rasterio.warp.transform_bounds(str(geobox.crs), self.crs, *geobox.boundingbox)
        self.origin = (self._west(source, left, right), a.f)
        columns = sorted((x - self.origin[0]) / a.a for x in (left, right))
        rows = sorted((y - self.origin[1]) / a.e for y in (bottom, top))
        self.first = (math.floor(rows[0]) - _RIM, math.floor(columns[0]) - _RIM)
        shape = (math.ceil(rows[1]) + _RIM - self.first[0], math.ceil(columns[1]) + _RIM - self.first[1])
        self.values = np.full(shape, np.nan, dtype=np.float32)
        self.transform = Affine(
            a.a, 0.0, self.origin[0] + self.first[1] * a.a, 0.0, a.e, self.origin[1] + self.first[0] * a.e
        )

    def _west(self, source: Any, left: float, right: float) -> float:
        """Left edge of a file in the coordinates of this lattice, on the same side of the Earth as the grid."""
        west = float(source.transform.c)
        if not source.crs.is_geographic:
            return west
        if self.shift:
            west -= 180.0
        width = source.transform.a * source.width
        turns = round(((left + right) / 2 - (west + width / 2)) / 360.0)
        return west + 360.0 * turns

    def holds(self, source: Any) -> bool:
        """Whether a file's pixels lie on this lattice (to a hundredth of a pixel)."""
        a = source.transform
        if source.crs != self.native or a.b or a.d:
            return False
        reach = max(source.width, source.height, *self.values.shape)
        if abs(a.a - self.pixel[0]) * reach > 0.01 * abs(a.a) or abs(a.e - self.pixel[1]) * reach > 0.01 * abs(a.e):
            return False
        row, column = self._offset(source)
        return abs(row - round(row)) < 0.01 and abs(column - round(column)) < 0.01

    def _offset(self, source: Any) -> tuple[float, float]:
        """Row and column of a file's first pixel in this window."""
        width = self.values.shape[1] * self.pixel[0]
        west = self._west(source, self.transform.c, self.transform.c + width)
        return (source.transform.f - self.transform.f) / self.pixel[1], (west - self.transform.c) / self.pixel[0]

    def paste(self, source: Any, nodata: float | None, lowest: float, highest: float) -> None:
        """Put a file's values where there are none yet."""
        top, left = (round(v) for v in self._offset(source))
        height, width = self.values.shape
        rows = slice(max(top, 0), min(top + source.height, height))
        columns = slice(max(left, 0), min(left + source.width, width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        here = self.values[rows, columns]
        empty = np.isnan(here)
        if not empty.any():
            return
        window = rasterio.windows.Window(
            columns.start - left, rows.start - top, columns.stop - columns.start, rows.stop - rows.start
        )
        raw = source.read(1, window=window)
        found = raw.astype(np.float32)
        if nodata is not None:
            found[np.isnan(raw) if math.isnan(nodata) else raw == nodata] = np.nan
        found = _scaled(found, source)
        found[~((found >= lowest) & (found <= highest))] = np.nan
        here[empty] = found[empty]


def _warp(
    lattice: _Lattice,
    values: np.ndarray,
    shape: Sequence[int],
    transform: Affine,
    crs: Any,
    resampling: Resampling = Resampling.bilinear,
) -> np.ndarray:
    out = np.full(tuple(shape), np.nan, dtype=np.float32)
    rasterio.warp.reproject(
        values,
        out,
        src_transform=lattice.transform,
        src_crs=lattice.crs,
        src_nodata=np.nan,
        dst_transform=transform,
        dst_crs=crs,
        dst_nodata=np.nan,
        init_dest_nodata=True,
        resampling=resampling,
    )
    return out


def _scaled(values: np.ndarray, source: Any) -> np.ndarray:
    scale, offset = source.scales[0], source.offsets[0]
    if (scale, offset) == (1.0, 0.0):
        return values
    out: np.ndarray = values * np.float32(scale) + np.float32(offset)
    return out


def _much_finer(source: Any, geobox: GeoBox) -> bool:
    """Whether two or more pixels of a file make one of the grid."""
    metres = abs(source.transform.e) * (111_320.0 if source.crs.is_geographic else 1.0)
    return bool(2 * metres <= abs(float(geobox.resolution.y)))


def _averaged(source: Any, geobox: GeoBox, nodata: float | None, lowest: float, highest: float) -> np.ndarray:
    """A fine file on the grid; GDAL widens the bilinear kernel to the grid's pixels and works in bounded memory."""
    out = np.full(geobox.shape, np.nan, dtype=np.float32)
    rasterio.warp.reproject(
        rasterio.band(source, 1),
        out,
        src_nodata=nodata,
        dst_transform=geobox.affine,
        dst_crs=str(geobox.crs),
        dst_nodata=np.nan,
        init_dest_nodata=True,
        resampling=Resampling.bilinear,
    )
    out = _scaled(out, source)
    out[~((out >= lowest) & (out <= highest))] = np.nan
    return out


def _antimeridian(source: Any, geobox: GeoBox) -> bool:
    """Whether longitudes of a geographic file should be counted from the antimeridian for this grid."""
    if not source.crs.is_geographic:
        return False
    box = geobox.boundingbox
    x, y = (box.left + box.right) / 2, (box.bottom + box.top) / 2
    (lon,), _ = rasterio.warp.transform(str(geobox.crs), "EPSG:4326", [x], [y])
    return bool(abs(lon) > 170.0)


@functools.lru_cache(maxsize=16)
def _from_antimeridian(crs: CRS) -> CRS:
    return CRS.from_dict({**crs.to_dict(), "pm": 180})


# --------------------------------------------------------------------------------------------- periods
def match_period(
    periods: Sequence[ElevationChangePeriod], year: int, rule: str = "ended"
) -> ElevationChangePeriod | None:
    """The dh/dt period that belongs to a year.

    Rule ``nearest_end``: the period whose end is nearest to the year (the earlier one of two), so that the lag between
    elevation change and image is the same as in training, at the price of looking at most some years ahead.
    Rule ``ended``: the latest period that has ended by the year (2010 to 2015 for the inventory of 2015, 2015 to 2020
    for 2023, as published), so that an image is never judged with elevation change of its future; for earlier years
    the first period there is. None without periods.
    """
    if not periods:
        return None
    if rule == "nearest_end":
        return min(periods, key=lambda p: (abs(p.end - year), p.end, p.start))
    ended = [p for p in periods if p.end <= year]
    return max(ended, key=lambda p: (p.end, p.start)) if ended else min(periods, key=lambda p: (p.end, p.start))


def period_tiles(period: ElevationChangePeriod, data_root: Path, *, error_layer: bool = False) -> TileIndex:
    """Index of the tiles of a dh/dt period, or of its errors; empty where the settings name none.

    Raises
    ------
    TileError
        as :func:`dl4gam_assets.terrain.tiles.find_tiles`.
    """
    named = period.error_path if error_layer else period.path
    sources = [] if named is None else [named] if isinstance(named, str) else named
    years = (period.start, period.end)
    setting = f"terrain.elevation_change, {'error_path' if error_layer else 'path'} of {period.start} to {period.end}"
    return find_tiles(sources, data_root, setting=setting, period=years, error_layer=error_layer)


def read_elevation_change(
    periods: Sequence[ElevationChangePeriod],
    year: int,
    geobox: GeoBox,
    rule: str = "ended",
    data_root: Path = Path(),
    nodata: float | None = -9999.0,
) -> tuple[np.ndarray, ElevationChangePeriod | None]:
    """dh/dt (m/yr) on a grid for a year, and the period it is of.

    Parameters
    ----------
    periods : their paths are relative to ``data_root``
    year : calendar year of the image
    geobox : target grid
    rule : see :func:`match_period`
    nodata : value that means missing in files that do not say

    Returns
    -------
    float32 array (H, W), bilinear, NaN where missing (everywhere without periods or tiles), and the period or None.

    Raises
    ------
    FileNotFoundError, OSError
        if what the period names is absent or can not be read.
    """
    period = match_period(periods, year, rule)
    if period is None:
        return np.full(geobox.shape, np.nan, dtype=np.float32), None
    tiles = period_tiles(period, data_root).touching(geobox)
    return read_dhdt(tiles, geobox, nodata), period
