"""The candidates of one glacier and year.

Belongs here: search periods, reading and scoring each day, rows of the table ``candidates``.
Does not belong here: the choice (``ranking``).
"""

from __future__ import annotations

import calendar
import datetime as dt
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import rasterio.features
import rasterio.warp

from dl4gam_assets.imagery.catalogs import SceneCatalog, group_by_day, item_checksums, lonlat_box
from dl4gam_assets.imagery.reading import ReadPolicy, SceneUnreachableError, bytes_read, read_images
from dl4gam_assets.imagery.scaling import implausible
from dl4gam_assets.imagery.scores import score_image
from dl4gam_assets.imagery.signing import unsigned
from dl4gam_assets.inventory import glacier_grid
from dl4gam_assets.settings import ComputeSettings, ImagerySettings, Region
from dl4gam_assets.tables import TABLES

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


def search_periods(
    year: int,
    inventory_date: dt.date | None,
    imagery: ImagerySettings,
    baseline_year: int,
    precision: str = "day",
) -> list[tuple[dt.date, dt.date]]:
    """First and last days (both included, by solar day) in which images of a year are searched.

    A year has its window. The baseline year follows the inventory (mode ``inventory_date``), or has a fixed window. It
    follows the inventory by days around the glacier's own acquisition date; where only a month is stated, around that
    month, and where only a year is, by that year's window (so in the season of either hemisphere). A glacier without a
    date has the window of the baseline year.

    Parameters
    ----------
    precision : how much of ``inventory_date`` the inventory states: ``day``, ``month`` or ``year``
    """
    settings, known = imagery.baseline, inventory_date
    if year != baseline_year:
        return [_season(year, imagery)]
    if settings.mode == "window" and settings.start and settings.end:
        return [(settings.start, settings.end)]
    if known is None or precision == "year":
        return [_season(year if known is None else known.year, imagery)]
    first = last = known
    if precision == "month":
        first, last = (known.replace(day=day) for day in (1, calendar.monthrange(known.year, known.month)[1]))
    span = dt.timedelta(days=settings.tolerance_days)
    return [(first - span, last + span)]


def _season(year: int, imagery: ImagerySettings) -> tuple[dt.date, dt.date]:
    start, end = (dt.date.fromisoformat(f"{year}-{day}") for day in imagery.window)
    return start, end


def candidates_of_glacier(
    glacier: pd.Series,
    glaciers: gpd.GeoDataFrame,
    zones: gpd.GeoDataFrame,
    catalog: SceneCatalog,
    region: Region,
    year: int,
    items: Mapping[str, pystac.Item] | None = None,
) -> pd.DataFrame:
    """Score every day's image over one glacier.

    Days are read concurrently where their files are on a network (``compute.concurrent_reads``), scored as each is
    ready and dropped. A day whose files can not be read is a row with the reason and without scores; the others go on.

    Parameters
    ----------
    glacier : row of the table ``glaciers``
    glaciers : the table, for the ice of the neighbours
    zones : rows of the table ``zones`` of this glacier
    items : from :func:`items_of_glacier`, where they are known already

    Returns
    -------
    DataFrame
        Rows of the table ``candidates`` (without the year), by date; empty where no scene touches the glacier.
        ``attrs["bytes_read"]`` is what ``reading.bytes_read`` counted meanwhile in this process;
        ``attrs["unreachable"]`` the number of days that a server did not give now, though it may do so later.
    """
    imagery = region.imagery
    grid = glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), imagery.sensor.pixel_m, imagery.margin_m)
    if items is None:
        items = items_of_glacier(glacier, catalog, region, year)
    if not items:
        nothing = TABLES["candidates"].empty().drop(columns="year")
        nothing.attrs |= {"bytes_read": 0, "unreachable": 0}
        return nothing

    selection = imagery.selection
    crs = str(grid.crs)
    window = lonlat_box(_degrees(grid))
    ice = _burn(glaciers.geometry.iloc[glaciers.sindex.query(window, predicate="intersects")].to_crs(crs), grid)
    outline = gpd.GeoSeries([glacier["geometry"]], crs="EPSG:4326").to_crs(crs)
    own = _burn(outline, grid)
    zone = zones[zones["buffer_m"] == selection.cloud_buffer_m]
    buffered = zone.geometry.to_crs(crs) if len(zone) else outline.buffer(selection.cloud_buffer_m)
    near = own | _burn(buffered, grid)
    covered = np.ones(grid.shape, dtype=bool) if selection.coverage_geometry == "region_of_interest" else own

    names = assets_of(imagery)
    wanted = [b for b in imagery.sensor.bands if b in {"blue", "green", "red", "swir16"}]
    if "swir16" not in wanted or not {"blue", "green", "red"} <= set(wanted):
        wanted = list(imagery.sensor.bands)
    if selection.shadow_nir_max is not None and "nir" not in wanted:
        wanted.append("nir")
    days = group_by_day(items.values())
    rows: list[dict[str, Any]] = [
        {
            "glacier_id": glacier["glacier_id"],
            "date": dt.datetime.combine(day, dt.time()),
            "scene_ids": "+".join(item.id for item in group),
            "hrefs": json.dumps({i.id: {n: unsigned(i.assets[n].href) for n in names if n in i.assets} for i in group}),
            "checksums": json.dumps({i.id: item_checksums(i, names) for i in group}),
        }
        for day, group in days.items()
    ]
    before, unreachable = bytes_read(), 0
    for index, image in read_images(list(days.values()), imagery, grid, wanted, policy_of(region.compute)):
        row = rows[index]
        if isinstance(image, Exception):
            row["reason"] = f"can not be read: {image}"
            unreachable += isinstance(image, SceneUnreachableError)
            continue
        wrong = implausible(image["reflectance"].to_numpy(), [str(b) for b in image["band"].to_numpy()])
        if wrong is not None:
            row["reason"] = f"can not be used: {row['scene_ids']}: {wrong}"
            continue
        row |= score_image(image, region=covered, near=near, glaciers=ice, settings=selection)
        row["scene_ids"] = image.attrs["scene_ids"] or row["scene_ids"]
    frame = TABLES["candidates"].conform(pd.DataFrame(rows).assign(year=year)).drop(columns="year")
    frame.attrs |= {"bytes_read": bytes_read() - before, "unreachable": unreachable}
    return frame


def search_window(
    glacier: pd.Series, region: Region, year: int
) -> tuple[tuple[float, float, float, float], list[tuple[dt.date, dt.date]]]:
    """Where and when a glacier's scenes are searched: its grid's box (west, south, east, north in degrees; west > east
    crosses the antimeridian), and its periods (first and last day)."""
    imagery = region.imagery
    grid = glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), imagery.sensor.pixel_m, imagery.margin_m)
    date = glacier["inventory_date"]
    known = None if pd.isna(date) else pd.Timestamp(date).date()
    stated = glacier.get("inventory_date_precision")  # none in tables of before
    precision = stated if isinstance(stated, str) else "day"
    return _degrees(grid), search_periods(year, known, imagery, region.years.baseline, precision)


def items_of_glacier(glacier: pd.Series, catalog: SceneCatalog, region: Region, year: int) -> dict[str, pystac.Item]:
    """The items of a catalog that may show a glacier in a year, by id."""
    box, periods = search_window(glacier, region, year)
    return {item.id: item for start, end in periods for item in catalog.search(box, start, end)}


def assets_of(imagery: ImagerySettings) -> list[str]:
    """Names of the assets that a region reads: bands and masks."""
    sensor = imagery.sensor
    masks = (sensor.scene_classification, sensor.cloud_probability, getattr(sensor, "qa_pixel", None))
    return [*sensor.bands.values(), *(name for name in masks if name)]


def _degrees(grid: GeoBox) -> tuple[float, float, float, float]:
    west, south, east, north = rasterio.warp.transform_bounds(str(grid.crs), "EPSG:4326", *grid.boundingbox)
    return west, south, east, north


def policy_of(compute: ComputeSettings) -> ReadPolicy:
    """How the settings want files to be read."""
    return ReadPolicy(concurrent=compute.concurrent_reads, attempts=compute.read_attempts, stall_s=compute.read_stall_s)


def _burn(shapes: gpd.GeoSeries, grid: Any) -> np.ndarray:
    pairs = [s for s in shapes if s is not None and not s.is_empty]
    if not pairs:
        return np.zeros(grid.shape, dtype=bool)
    burnt: np.ndarray = rasterio.features.rasterize(
        pairs, out_shape=grid.shape, transform=grid.affine, dtype="uint8"
    ).astype(bool)
    return burnt


def items_from_row(row: pd.Series, catalog: SceneCatalog) -> list[pystac.Item]:
    """The items behind a row of the table ``scenes``, in mosaicking order.

    Raises
    ------
    CatalogError
        if one is not in the catalog any more.
    """
    return catalog.get(str(row["scene_ids"]).split("+"))
