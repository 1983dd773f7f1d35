"""Reading an inventory file into the table ``glaciers``.

Belongs here: columns, dates, geometry repair, rejection of what can not be used, areas and UTM zones.
Does not belong here: preparing published raw files (``_prepare``, ``sgi``), buffers, folds.
"""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from dl4gam_assets.inventory.vector import read_vector
from dl4gam_assets.settings import InventorySettings, SettingsError
from dl4gam_assets.storage import safe_name
from dl4gam_assets.tables import TABLES

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

#: Day that stands for "some time in that year": the middle of the late-summer mapping season.
UNKNOWN_DAY = (8, 15)

#: How much of a date an inventory states.
Precision = Literal["day", "month", "year"]

#: Names longer than this are cut: tables and pages show them.
NAME_LENGTH = 200


def read_inventory(path: Path, settings: InventorySettings) -> tuple[gpd.GeoDataFrame, pd.DataFrame]:
    """Glaciers of a vector file, and the outlines that can not be used.

    Invalid polygons are repaired (``make_valid``; only their polygonal parts are kept). Empty, missing and
    non-polygonal geometries, empty and repeated ids, and outlines with impossible coordinates are rejected one by one.

    Parameters
    ----------
    path : Path
        A vector file (GeoPackage, shapefile, GeoJSON, FlatGeobuf, GeoParquet ...; see ``vector``), with a CRS.
    settings : InventorySettings
        Column names, layer, threshold.

    Returns
    -------
    glaciers : GeoDataFrame, EPSG:4326
        The table ``glaciers`` in the order of the file. ``inventory_area_km2`` is the planar area in the UTM zone of a
        point inside the outline.
    rejected : DataFrame
        Columns glacier_id, error, kind.

    Raises
    ------
    SettingsError
        if the file is absent, can not be read, has no CRS, or lacks the id column.
    """
    frame = _read(path, settings.layer)
    columns = settings.columns
    if columns.glacier_id not in frame.columns:
        raise SettingsError(
            f"inventory {path}: there is no column {columns.glacier_id!r} (inventory.columns.glacier_id); "
            f"the file has {', '.join(map(str, frame.columns.drop('geometry', errors='ignore')))}"
        )
    if frame.crs is None:
        raise SettingsError(f"inventory {path} has no coordinate reference system; assign one (for example in QGIS)")
    frame = frame.reset_index(drop=True)
    if settings.merge_parts:
        frame = _merged(frame, columns.glacier_id)
    ids = [_text(v) for v in frame[columns.glacier_id]]
    geometry = frame.geometry.to_crs("EPSG:4326")
    seen: set[str] = set()
    keep: list[int] = []
    shapes: list[Any] = []
    rejected: list[tuple[str, str, str]] = []
    for row, (glacier_id, shape) in enumerate(zip(ids, geometry, strict=True)):
        usable, why, kind = _usable(shape)
        if not glacier_id:
            rejected.append((f"row {row + 1}", "the glacier has no id", "NoId"))
        elif not _is_file_name(glacier_id):
            why = f"the id has {len(glacier_id)} characters, too many for the name of a file (150 letters, 22 others)"
            rejected.append((glacier_id[:60] + "...", why, "BadId"))
        elif glacier_id in seen:
            why = (
                f"the id occurs again in row {row + 1}; only the first is used. If the rows are parts of one glacier, "
                "set inventory.merge_parts: true"
            )
            rejected.append((glacier_id, why, "DuplicateId"))
        elif usable is None:
            rejected.append((glacier_id, f"{why}; mend the outline in {path.name}", kind))
        else:
            seen.add(glacier_id)
            keep.append(row)
            shapes.append(usable)
    out = frame.iloc[keep]
    shapes_4326 = gpd.GeoSeries(shapes, crs="EPSG:4326")
    dates = _dates(out, settings)
    points = shapes_4326.representative_point()
    epsg = np.array([utm_epsg_of(p.x, p.y) for p in points], dtype=int)
    area = _areas_km2(shapes_4326, epsg)
    glaciers = gpd.GeoDataFrame(
        {
            "glacier_id": [ids[row] for row in keep],
            "glacier_int": np.arange(1, len(keep) + 1),
            "name": [str(n)[:NAME_LENGTH] for n in _column(out, columns.name, "")],
            "country": _column(out, columns.country, settings.default_country),
            "inventory_date": [None if d is None else d[0] for d in dates],
            "inventory_date_precision": [None if d is None else d[1] for d in dates],
            "inventory_area_km2": area,
            "stated_area_km2": pd.to_numeric(
                pd.Series(_column(out, columns.area_km2, None)), errors="coerce"
            ).to_numpy(),
            "lon": points.x.to_numpy(),
            "lat": points.y.to_numpy(),
            "utm_epsg": epsg,
            "modelled": area >= settings.min_area_km2,
        },
        geometry=list(shapes_4326),
        crs="EPSG:4326",
    )
    return TABLES["glaciers"].conform(glaciers), pd.DataFrame(rejected, columns=["glacier_id", "error", "kind"])


def outline_mask(path: Path, layer: str | None, geobox: GeoBox) -> np.ndarray:
    """Pixels of a grid whose centre lies in any outline of a vector file: bool (H, W).

    Of files that have a spatial index only the outlines near the grid are read.

    Raises
    ------
    SettingsError
        if the file is absent, can not be read, or has no CRS.
    """
    from rasterio.features import rasterize

    window = gpd.GeoSeries([shapely.box(*geobox.boundingbox)], crs=str(geobox.crs)).segmentize(1000.0)
    frame = _read(path, layer, near=window)
    if frame.crs is None:
        raise SettingsError(f"{path} has no coordinate reference system; assign one (for example in QGIS)")
    shapes = [found for shape in frame.geometry.to_crs(str(geobox.crs)) if (found := _polygons(shape)) is not None]
    if not shapes:
        return np.zeros(geobox.shape, dtype=bool)
    burnt: np.ndarray = rasterize(shapes, geobox.shape, transform=geobox.affine, dtype="uint8").astype(bool)
    return burnt


def _polygons(shape: Any) -> Any | None:
    """The valid polygonal part of a geometry, None where there is none."""
    if shape is None or shape.is_empty:
        return None
    parts = [p for p in shapely.get_parts(shapely.make_valid(shapely.force_2d(shape))) if "Polygon" in p.geom_type]
    whole = shapely.union_all(parts) if parts else None
    return whole if whole is not None and not whole.is_empty else None


def _merged(frame: gpd.GeoDataFrame, column: str) -> gpd.GeoDataFrame:
    """Rows with the same id as one: the union of their outlines, the attributes of the largest part."""
    ids = frame[column].map(_text)
    repeated = ids.duplicated(keep=False) & (ids != "")
    if not repeated.any():
        return frame
    size = pd.Series(shapely.area(frame.geometry.to_numpy()), index=frame.index).fillna(0.0)
    out = frame.copy()
    drop: list[Any] = []
    for _, rows in frame[repeated].groupby(ids[repeated], sort=False):
        largest = size[rows.index].idxmax()
        parts = [p for shape in rows.geometry if (p := _polygons(shape)) is not None]
        if parts:
            out.loc[[largest], "geometry"] = gpd.GeoSeries([shapely.union_all(parts)], [largest], crs=frame.crs)
        drop += [index for index in rows.index if index != largest]
    return out.drop(index=drop)


def _read(path: Path, layer: str | None, near: gpd.GeoSeries | None = None) -> gpd.GeoDataFrame:
    if not path.exists():
        raise SettingsError(f"inventory {path} does not exist (paths are relative to data_root)")
    try:
        if path.suffix in {".parquet", ".geoparquet"}:
            frame = gpd.read_parquet(path)
        else:
            frame = read_vector(path, **({"layer": layer} if layer else {}), bbox=near)
    except Exception as error:
        raise SettingsError(f"inventory {path} can not be read as vector data: {error}") from error
    if not isinstance(frame, gpd.GeoDataFrame) or "geometry" not in frame.columns:
        raise SettingsError(f"inventory {path} has no geometry column")
    return frame


def _is_file_name(glacier_id: str) -> bool:
    try:
        safe_name(glacier_id)
    except ValueError:
        return False
    return len(glacier_id) <= 150


def _text(value: Any) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _usable(shape: Any) -> tuple[Any | None, str, str]:
    """The polygon or multipolygon of an outline, or why there is none."""
    if shape is None or shape.is_empty:
        return None, "the outline is empty", "EmptyGeometry"
    if shape.geom_type not in {"Polygon", "MultiPolygon", "GeometryCollection"}:
        return None, f"the outline is a {shape.geom_type}, not a polygon", "NotAPolygon"
    shape = shapely.force_2d(shape)
    if not np.isfinite(shapely.get_coordinates(shape)).all():
        return None, "the outline has coordinates that are no numbers", "BadCoordinates"
    if not shape.is_valid:
        shape = shapely.make_valid(shape)
    if shape.geom_type == "GeometryCollection":
        parts = [p for p in shapely.get_parts(shape) if p.geom_type in {"Polygon", "MultiPolygon"}]
        shape = shapely.union_all(parts) if parts else shapely.Polygon()
    if shape.geom_type not in {"Polygon", "MultiPolygon"} or shape.is_empty or shape.area == 0:
        return None, "the outline encloses no area, even after repair", "NoArea"
    west, south, east, north = shape.bounds
    if west < -180.001 or east > 180.001 or south < -90 or north > 90:
        return (
            None,
            f"the outline lies outside the world ({west:.3f}, {south:.3f}); is the CRS right?",
            "BadCoordinates",
        )
    return shape, "", ""


def _column(frame: pd.DataFrame, name: str | None, default: Any) -> list[Any]:
    if name is None or name not in frame.columns:
        return [default] * len(frame)
    return [default if v is None or (not isinstance(v, str) and pd.isna(v)) else v for v in frame[name]]


def _dates(frame: pd.DataFrame, settings: InventorySettings) -> list[tuple[dt.datetime, Precision] | None]:
    default = settings.default_date
    fallback: tuple[dt.datetime, Precision] | None = None
    if default is not None:
        fallback = dt.datetime.combine(default, dt.time()), "day"
    return [dated(v) or fallback for v in _column(frame, settings.columns.date, None)]


def read_date(value: Any) -> dt.datetime | None:
    """Acquisition date as inventories write it; None where it is unknown.

    Reads dates and times, ISO text, a year (2016, "2016.0"), a year and a month (2016-08), and RGI's YYYYMMDD with 99
    for an unknown month or day and -9999999 for none. An unknown month becomes 15 August, an unknown day the 15th of
    its month: :func:`dated` says which it was. What lies outside 1800 to 2199 is no date of an image or a map, and so
    unknown.
    """
    found = dated(value)
    return None if found is None else found[0]


def dated(value: Any) -> tuple[dt.datetime, Precision] | None:
    """The date of :func:`read_date`, and how much of it is stated: ``day``, ``month`` or ``year``."""
    found = _read_date(value)
    return found if found is not None and 1800 <= found[0].year < 2200 else None


def _read_date(value: Any) -> tuple[dt.datetime, Precision] | None:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return None
    if isinstance(value, dt.datetime):
        return value.replace(tzinfo=None), "day"
    if isinstance(value, dt.date):
        return dt.datetime.combine(value, dt.time()), "day"
    text = str(value).strip()
    if re.fullmatch(r"\d+\.0+", text):
        text = text.split(".")[0]
    if text.startswith("-") or not text:
        return None
    parts = re.fullmatch(r"(\d{4})[-/]?(\d\d)[-/]?(\d\d)", text) or re.fullmatch(r"(\d{4})[-/](\d\d)()", text)
    try:
        if re.fullmatch(r"\d{4}", text):
            return dt.datetime(int(text), *UNKNOWN_DAY), "year"
        if parts:
            year, month, day = (int(p or 0) for p in parts.groups())
            if month in (0, 99):
                return dt.datetime(year, *UNKNOWN_DAY), "year"
            return (dt.datetime(year, month, 15), "month") if day in (0, 99) else (dt.datetime(year, month, day), "day")
        return dt.datetime.fromisoformat(text.replace("/", "-")).replace(tzinfo=None), "day"
    except ValueError:
        return None


def utm_epsg_of(lon: float, lat: float) -> int:
    """EPSG code of the UTM zone of a point in degrees (WGS 84): 326zz north, 327zz south of the equator."""
    zone = min(int(((lon + 180.0) % 360.0) // 6.0) + 1, 60)
    return (32700 if lat < 0 else 32600) + zone


def _areas_km2(shapes: gpd.GeoSeries, epsg: np.ndarray) -> np.ndarray:
    area = np.zeros(len(shapes))
    for code in np.unique(epsg):
        mine = epsg == code
        area[mine] = shapes[mine].to_crs(int(code)).area.to_numpy() / 1e6
    return area
