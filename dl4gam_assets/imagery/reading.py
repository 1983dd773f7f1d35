"""Pixels of a day's items on a glacier's grid.

Belongs here: reading windows, scale and offset, mosaicking, cloud and missing masks.
Does not belong here: judging an image (``scores``); opening files, retries and threads (``sources``).

Grids are odc-geo's, but windows are read with rasterio rather than by odc.stac.load, which gives the same digital
numbers (tests, benchmarks/imagery.py). Three reasons: for one date of a glacier odc.stac.load takes 2.1 to 3.6 times
as long with local files, where it sets up the load and opens the files anew for each glacier (over HTTP with 20 ms of
latency 1.1 to 1.3 times: waiting dominates); its reader offers no place for what ``sources`` does about failing
servers; and a failed header request would give pixels at the wrong place, which ``sources`` refuses.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import pystac
import rasterio
import rasterio.warp
import rasterio.windows
import xarray as xr
from rasterio.enums import Resampling

from dl4gam_assets.imagery.catalogs import CatalogError, asset_of, footprint, local_path, lonlat_box
from dl4gam_assets.imagery.masks import cloud_of_item, mask_assets, saturated
from dl4gam_assets.imagery.scaling import band_index, band_metadata, reflectance_scale
from dl4gam_assets.imagery.sources import (
    ReadPolicy,
    SceneError,
    SceneUnreachableError,
    bytes_read,
    closing_files,
    count_window,
    executor,
    forget_files,
    policy_in_force,
    read,
    reading_with,
    submit,
)
from dl4gam_assets.settings import ImagerySettings, SensorSettings

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "ReadPolicy",
    "SceneError",
    "SceneUnreachableError",
    "bytes_read",
    "closing_files",
    "forget_files",
    "read_image",
    "read_images",
]


def read_image(
    items: Sequence[pystac.Item],
    imagery: ImagerySettings,
    geobox: GeoBox,
    bands: Sequence[str] | None = None,
    policy: ReadPolicy | None = None,
) -> xr.Dataset:
    """A day's image on a grid.

    Items are taken in the order of the area of the grid that their footprint covers, the given order breaking ties; one
    that fills at least ``selection.single_tile_coverage`` of the grid is taken alone, otherwise later ones fill what
    is missing.

    Parameters
    ----------
    items : items of one day
    imagery : sensor (bands, scale, cloud masks) and thresholds
    geobox : grid of the glacier
    bands : our names of the bands to read; all of the sensor by default
    policy : how many files at once and how patiently; never changes a value

    Returns
    -------
    Dataset with ``reflectance`` float32 (band, y, x), unit 1, NaN where missing; ``cloud`` bool (y, x), false without
    a cloud mask; ``overruled`` bool (y, x), what a mask called cloud and the spectrum of snow or ice took back;
    ``saturated`` bool (y, x), only with ``sensor.saturated_at``: where any band reaches it; ``missing`` bool (y, x),
    where any of the bands is missing, or a mask that the sensor names has no value. The attribute ``scene_ids`` names
    the items that gave pixels, in order, joined by ``+``.

    Raises
    ------
    SceneError
        if a file can not be read, or its scale can not be established. SceneUnreachableError where a server did not
        give a file, though it may do so later.
    CatalogError
        if an item lacks an asset.
    """
    sensor = imagery.sensor
    names = list(bands if bands is not None else sensor.bands)
    reflectance = np.full((len(names), *geobox.shape), np.nan, dtype=np.float32)
    cloud, overruled, over = (np.zeros(geobox.shape, dtype=bool) for _ in range(3))
    missing = np.ones(geobox.shape, dtype=bool)
    used: list[str] = []
    with reading_with(policy) as rules:
        threads = threads_for(items, sensor, rules)
        for item in _by_cover(items, geobox):
            if 1.0 - missing.mean() >= imagery.selection.single_tile_coverage:
                break
            with _asked(item, sensor, names, geobox, threads) as (layers, masks):
                values = np.stack([layer() for layer in layers])
                absent = ~np.isfinite(values).all(axis=0)
                if not (missing & ~absent).any():
                    continue
                for mask in masks:
                    mask()
            *cloud_masks, unknown = _cloud(item, sensor, geobox, dict(zip(names, values, strict=True)))
            absent |= unknown  # nobody looked for cloud there
            fresh = missing & ~absent
            if not fresh.any():
                continue
            masks_of_item = (*cloud_masks, _saturated(item, sensor, names, values))
            if not used:  # the first: nothing to keep of what is there
                values[:, absent] = np.nan
                reflectance = values
            else:
                reflectance[:, fresh] = values[:, fresh]
            for kept, of_item in zip((cloud, overruled, over), masks_of_item, strict=True):
                kept[fresh] = of_item[fresh]
            missing &= absent
            used.append(item.id)
    layers_2d = {"cloud": cloud, "overruled": overruled, "missing": missing}
    if sensor.saturated_at is not None:
        layers_2d["saturated"] = over
    return xr.Dataset(
        {"reflectance": (("band", "y", "x"), reflectance), **{n: (("y", "x"), v) for n, v in layers_2d.items()}},
        coords={"band": names},
        attrs={"scene_ids": "+".join(used)},
    )


def read_images(
    days: Sequence[Sequence[pystac.Item]],
    imagery: ImagerySettings,
    geobox: GeoBox,
    bands: Sequence[str] | None = None,
    policy: ReadPolicy | None = None,
) -> Iterator[tuple[int, xr.Dataset | SceneError | CatalogError]]:
    """The images of several days on one grid, each as it is ready, with the index of its day.

    Files on a network are read concurrently, within the days and over them, with at most ``policy.concurrent`` at once
    and only as many days in memory as keep that many busy. Values are those of :func:`read_image`, whatever the order;
    a day that can not be read gives its error instead.
    """
    rules = policy or policy_in_force()
    threads = max((threads_for(items, imagery.sensor, rules) for items in days), default=1)
    if threads == 1:
        for index, items in enumerate(days):
            yield index, _or_error(items, imagery, geobox, bands, rules)
        return
    files = len(bands if bands is not None else imagery.sensor.bands) + 1
    at_once = min(len(days), threads // files + 2)
    pool = executor(f"days of {threads}", threads + 2)
    waiting: dict[Future[xr.Dataset | SceneError | CatalogError], int] = {}
    todo = iter(enumerate(days))
    try:
        while True:
            while len(waiting) < at_once and (following := next(todo, None)) is not None:
                index, items = following
                waiting[pool.submit(_or_error, items, imagery, geobox, bands, rules)] = index
            if not waiting:
                return
            ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(ready, key=waiting.__getitem__):
                yield waiting.pop(future), future.result()
    finally:
        for future in waiting:
            future.cancel()


def _or_error(
    items: Sequence[pystac.Item],
    imagery: ImagerySettings,
    geobox: GeoBox,
    bands: Sequence[str] | None,
    policy: ReadPolicy,
) -> xr.Dataset | SceneError | CatalogError:
    try:
        return read_image(items, imagery, geobox, bands, policy)
    except (SceneError, CatalogError) as error:
        return error


def threads_for(items: Sequence[pystac.Item], sensor: SensorSettings, policy: ReadPolicy) -> int:
    """How many files of these items are read at once (see ``ReadPolicy.concurrent``)."""
    if policy.concurrent:
        return policy.concurrent
    hrefs = (a.href for item in items for name in sensor.bands.values() if (a := item.assets.get(name)) is not None)
    return 16 if any(local_path(href) is None for href in hrefs) else 1


@contextlib.contextmanager
def _asked(
    item: pystac.Item, sensor: SensorSettings, names: Sequence[str], geobox: GeoBox, threads: int
) -> Iterator[tuple[list[Callable[[], np.ndarray]], list[Callable[[], np.ndarray]]]]:
    """Calls that give the bands of an item in their order, and calls that wait until its mask files were read.

    In threads all files are asked for when the block begins. The masks are read again afterwards, from open files
    and blocks in memory, so that whatever makes masks of them need not know of threads.
    """
    bands = [functools.partial(_reflectance, item, sensor, name, geobox) for name in names]
    if threads == 1:
        yield list(bands), []
        return
    files = [asset for name in mask_assets(sensor) if (asset := item.assets.get(name)) is not None]
    pool = executor("files", threads)
    futures = [submit(pool, band) for band in bands]
    masks = [submit(pool, _mask, asset, geobox, Resampling.nearest) for asset in files]
    try:
        yield [f.result for f in futures], [f.result for f in masks]
    finally:
        for future in (*futures, *masks):
            future.cancel()


def _by_cover(items: Sequence[pystac.Item], geobox: GeoBox) -> list[pystac.Item]:
    if len(items) < 2:
        return list(items)
    window = lonlat_box(rasterio.warp.transform_bounds(str(geobox.crs), "EPSG:4326", *geobox.boundingbox))
    cover = [footprint(item).intersection(window).area / window.area for item in items]
    order = sorted(range(len(items)), key=lambda k: (-round(cover[k], 2), k))
    return [items[k] for k in order]


def _reflectance(item: pystac.Item, sensor: SensorSettings, band: str, geobox: GeoBox) -> np.ndarray:
    asset = asset_of(item, sensor.bands[band])
    scale, offset = reflectance_scale(item, asset, sensor)
    stated = (band_metadata(asset, band_index(asset)).get("nodata"), sensor.nodata)
    values = _onto(asset, geobox, Resampling[sensor.resampling], [float(v) for v in stated if v is not None])
    # Reflectance below zero is noise of dark pixels after the offset; it stays, but never below -0.2.
    out: np.ndarray = np.maximum(values * np.float32(scale) + np.float32(offset), np.float32(-0.2))
    return out


def _cloud(
    item: pystac.Item, sensor: SensorSettings, geobox: GeoBox, known: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cloud, what snow overruled, unknown (``masks.cloud_of_item``); ``known`` are bands that were read already."""

    def mask(asset: pystac.Asset, interpolate: bool) -> np.ndarray:
        return _mask(asset, geobox, Resampling.bilinear if interpolate else Resampling.nearest)

    def band(name: str) -> np.ndarray:
        return known[name] if name in known else _reflectance(item, sensor, name, geobox)

    return cloud_of_item(item, sensor, (geobox.shape[0], geobox.shape[1]), mask, band)


def _mask(asset: pystac.Asset, geobox: GeoBox, resampling: Resampling) -> np.ndarray:
    """A mask as its file has it, NaN only outside: a probability of 0 is a value, whatever the file's tag says."""
    return _onto(asset, geobox, resampling, None)


def _saturated(item: pystac.Item, sensor: SensorSettings, names: Sequence[str], values: np.ndarray) -> np.ndarray:
    if sensor.saturated_at is None:  # not looked for
        return np.zeros(values.shape[1:], dtype=bool)
    scales = [reflectance_scale(item, asset_of(item, sensor.bands[name]), sensor) for name in names]
    return saturated(values, [sensor.saturated_at * scale + offset for scale, offset in scales])


def _onto(asset: pystac.Asset, geobox: GeoBox, resampling: Resampling, nodata: Sequence[float] | None) -> np.ndarray:
    """One band on the grid as float32, NaN where missing: outside the file, where it has the value of its own tag, and
    where it has one of ``nodata``. None: every value in the file is one.

    Pixels that coincide are copied, others are resampled. To a grid whose pixels are more than 1.4 of the file's they
    are averaged; of classes the commonest is taken.
    """
    href = asset.get_absolute_href() or asset.href
    return read(href, functools.partial(_window, href, band_index(asset), nodata, geobox, resampling))


def _window(
    href: str, band: int, stated: Sequence[float] | None, geobox: GeoBox, resampling: Resampling, source: Any
) -> np.ndarray:
    if band > source.count:
        raise SceneError(f"scene file {href} has {source.count} bands, band {band} is wanted")
    tag = source.nodata
    tagged = set() if tag is None or math.isnan(tag) else {float(tag)}
    nodata = set() if stated is None else tagged | {v for v in stated if not math.isnan(v)}
    window = _aligned(source, geobox)
    if window is not None:
        count_window(source, band, window, href)
        return _copy(source, band, window, nodata)
    # GDAL leaves out what the file's tag says, and nothing else; nearest pixels are as they are.
    by_tag = nodata == tagged
    coarse = _parallel(source, geobox)
    if coarse is not None and (by_tag or (stated is None and resampling == Resampling.nearest)):
        # Same CRS, other pixel size: GDAL resamples while it reads, several times faster than a warp.
        count_window(source, band, coarse, href)
        out = source.read(band, window=coarse, out_shape=geobox.shape, resampling=resampling, out_dtype="float32")
        for value in nodata:
            out[out == value] = np.nan
        return out
    touched = _touched(source, geobox)
    count_window(source, band, touched, href)
    if touched.width > 1.4 * geobox.shape[1]:
        # Coarser than the file: the mean of the pixels below (the commonest of classes); bilinear would sample them.
        resampling = Resampling.mode if resampling == Resampling.nearest else Resampling.average
    out = np.full(geobox.shape, np.nan, dtype=np.float32)
    onto = {
        "dst_transform": geobox.affine, "dst_crs": str(geobox.crs), "dst_nodata": np.nan, "init_dest_nodata": True,
        "resampling": resampling,
    }  # fmt: skip
    if by_tag:
        rasterio.warp.reproject(rasterio.band(source, band), out, src_nodata=tag, **onto)
        return out
    part = _inside(touched, source)
    if part is not None:
        values = _copy(source, band, part, nodata)
        place = rasterio.windows.transform(part, source.transform)
        rasterio.warp.reproject(values, out, src_transform=place, src_crs=source.crs, src_nodata=np.nan, **onto)
    return out


#: Pixels of a file read around a grid that is warped from memory: cubic weights reach two, of coarser pixels three.
_RIM = 4


def _inside(window: rasterio.windows.Window, source: Any) -> rasterio.windows.Window | None:
    """The whole pixels of a file under a window and a rim, None where there are none."""
    left, top = (max(math.floor(v) - _RIM, 0) for v in (window.col_off, window.row_off))
    right = min(math.ceil(window.col_off + window.width) + _RIM, source.width)
    bottom = min(math.ceil(window.row_off + window.height) + _RIM, source.height)
    return rasterio.windows.Window(left, top, right - left, bottom - top) if right > left and bottom > top else None


def _touched(source: Any, geobox: GeoBox) -> rasterio.windows.Window:
    """The window of a file under a grid of any CRS."""
    bounds = rasterio.warp.transform_bounds(str(geobox.crs), source.crs, *geobox.boundingbox)
    return rasterio.windows.from_bounds(*bounds, transform=source.transform)


def _aligned(source: Any, geobox: GeoBox) -> rasterio.windows.Window | None:
    """The window of the grid in a file whose pixels coincide with it, else None."""
    a, b = source.transform, geobox.affine
    if (a.a, a.b, a.d, a.e) != (b.a, b.b, b.d, b.e) or not _same_crs(source, geobox):
        return None
    col, row = (b.c - a.c) / a.a, (b.f - a.f) / a.e
    if abs(col - round(col)) > 1e-3 or abs(row - round(row)) > 1e-3:
        return None
    return rasterio.windows.Window(round(col), round(row), geobox.shape[1], geobox.shape[0])


def _parallel(source: Any, geobox: GeoBox) -> rasterio.windows.Window | None:
    """The window of the grid in a file of the same CRS and any pixel size that contains it whole, else None."""
    a, b = source.transform, geobox.affine
    if a.b or a.d or b.b or b.d or a.a <= 0 or a.e >= 0 or not _same_crs(source, geobox):
        return None
    if a.a > 4 * b.a or b.a > a.a:  # averaging of finer pixels is left to the warp
        return None
    window = rasterio.windows.Window(
        (b.c - a.c) / a.a, (b.f - a.f) / a.e, geobox.shape[1] * b.a / a.a, geobox.shape[0] * b.e / a.e
    )
    return window if _within(window, source) else None


def _within(window: rasterio.windows.Window, source: Any) -> bool:
    return bool(
        window.col_off >= 0
        and window.row_off >= 0
        and window.col_off + window.width <= source.width
        and window.row_off + window.height <= source.height
    )


def _same_crs(source: Any, geobox: GeoBox) -> bool:
    """Whether both have the same EPSG code; a CRS without one is never taken for another."""
    code = geobox.crs.epsg if geobox.crs is not None else None
    return code is not None and source.crs.to_epsg() == code


def _copy(source: Any, band: int, window: rasterio.windows.Window, nodata: Collection[float]) -> np.ndarray:
    """A window of whole pixels, which may reach beyond the file, as float32 with NaN where there is nothing."""
    out = np.full((window.height, window.width), np.nan, dtype=np.float32)
    top, left = max(window.row_off, 0), max(window.col_off, 0)
    bottom = min(window.row_off + window.height, source.height)
    right = min(window.col_off + window.width, source.width)
    if bottom <= top or right <= left:
        return out
    values = source.read(band, window=rasterio.windows.Window(left, top, right - left, bottom - top))
    inside = out[top - window.row_off : bottom - window.row_off, left - window.col_off : right - window.col_off]
    inside[:] = values
    for value in nodata:
        inside[values == value] = np.nan
    return out
