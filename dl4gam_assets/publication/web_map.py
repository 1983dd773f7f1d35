"""The report's map that a reader can move: outlines of every year over the chosen images, as data for Leaflet.

Belongs here: choosing what the map holds, so that a page of thousands of glaciers stays small; pictures of the chosen
images; the library's files.
Does not belong here: behaviour in the browser (``templates/report_map.js``), markup, drawing of plots (``figures``).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dl4gam_assets.storage import Storage

if TYPE_CHECKING:
    import geopandas as gpd
    from shapely.geometry.base import BaseGeometry

#: Glaciers on the map; of a larger inventory the largest ones.
MOST_GLACIERS = 6_000
#: Vertices of all outlines together: about five bytes each in the page.
MOST_VERTICES = 300_000
#: Longest side of a picture.
PICTURE_PX = 320
#: Outlines are kept to this (about a metre).
_STEP_DEG = 1e-5
_METRES_PER_DEGREE = 111_320.0


def map_data(
    storage: Storage,
    glaciers: gpd.GeoDataFrame,
    years: Sequence[int],
    baseline_year: int,
    year: int,
    closely: Sequence[str],
    anchors: dict[str, str],
) -> dict[str, Any]:
    """All that the map shows, ready for JSON.

    Parameters
    ----------
    glaciers : table ``glaciers`` (EPSG:4326)
    years : years that may have outlines; ``year`` and ``baseline_year`` among them
    closely : glaciers that are shown with pictures of their chosen images and with interval outlines, every year
    anchors : glacier id -> id of the element that tells where its numbers come from

    Returns
    -------
    dict
        ``years``, ``year``, ``baseline``, ``left_out`` (glaciers not on the map) and ``glaciers``: for each its id,
        name, box, inventory outline (where no year has a map of it) and ``y``: per year area, interval (km2), image
        date, outline(s), picture and its box. Outlines are polygons of rings of integers: steps of 1e-5 degrees
        (lon, lat), each relative to the one before.
    """
    shown = glaciers.nlargest(MOST_GLACIERS, "inventory_area_km2")
    ids = shown["glacier_id"].astype(str).tolist()
    closely = [g for g in closely if g in set(ids)]
    figures = {y: _figures(storage, y, set(ids)) for y in years}
    outlines = _outlines(storage, years, {baseline_year, year}, set(ids), set(closely), shown)
    pictures = _pictures(storage, closely, years)
    out = []
    for row in shown.itertuples(index=False):
        glacier = str(row.glacier_id)
        of_years: dict[str, Any] = {}
        for y in years:
            entry = dict(figures[y].get(glacier, {}))
            entry |= {k: _rings(s) for k, s in outlines.get((glacier, y), {}).items()}
            if (glacier, y) in pictures:
                entry["p"], entry["pb"] = pictures[glacier, y]
            if entry:
                of_years[str(y)] = entry
        item: dict[str, Any] = {"i": glacier, "a": round(float(row.inventory_area_km2), 4), "y": of_years}
        if isinstance(row.name, str) and row.name:
            item["n"] = row.name
        if glacier in anchors:
            item["e"] = anchors[glacier]
        if not any("o" in e for e in of_years.values()):
            item["s"] = _rings(outlines.get((glacier, 0), {}).get("s", row.geometry))
        west, south, east, north = row.geometry.bounds
        item["b"] = [[round(south, 5), round(west, 5)], [round(north, 5), round(east, 5)]]
        out.append(item)
    return {
        "years": [int(y) for y in years], "year": int(year), "baseline": int(baseline_year), "closely": closely,
        "left_out": len(glaciers) - len(shown), "glaciers": out,
    }  # fmt: skip


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element: no ``<`` that could end it."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def library() -> tuple[str, str, str]:
    """Script and style of Leaflet, and the script of our map, as text. Nothing in them is loaded from elsewhere."""
    leaflet = resources.files("js_lib_leaflet") / "static" / "js_lib_leaflet"
    script = (leaflet / "leaflet.js").read_text(encoding="utf-8")
    script = re.sub(r"\n//# sourceMappingURL=.*", "", script)
    style = (leaflet / "leaflet.css").read_text(encoding="utf-8")
    # Pictures of its layer control and markers, which the map does not have.
    style = re.sub(r"[^{}]*\{[^{}]*url\([^{}]*\}", "", style)
    ours = (resources.files("dl4gam_assets.publication") / "templates" / "report_map.js").read_text(encoding="utf-8")
    return script.strip(), style.strip(), ours.strip()


def policy_hash(script: str) -> str:
    """The source expression by which a Content-Security-Policy allows exactly this script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


# ------------------------------------------------------------------------------------------- outlines
def _figures(storage: Storage, year: int, ids: set[str]) -> dict[str, dict[str, Any]]:
    areas = storage.read_table("areas", year=year)
    areas = areas[areas["glacier_id"].isin(ids)]
    return {
        str(r.glacier_id): {
            "k": [_round(r.area_km2), _round(r.lower_km2), _round(r.upper_km2)],
            "d": "" if pd.isna(r.image_date) else f"{pd.Timestamp(r.image_date):%Y-%m-%d}",
        }
        for r in areas.itertuples(index=False)
    }


def _round(value: Any) -> float | None:
    return None if pd.isna(value) else round(float(value), 4)


def _outlines(
    storage: Storage,
    years: Sequence[int],
    always: set[int],
    ids: set[str],
    closely: set[str],
    glaciers: gpd.GeoDataFrame,
) -> dict[tuple[str, int], dict[str, BaseGeometry]]:
    """Outlines by glacier and year: ``o`` (best), for some glaciers also ``lo`` and ``up``; year 0: the inventory's.

    Simplified as little as the number of vertices allows; where even that does not suffice, the years between baseline
    and the report's year are left out for glaciers that are not shown closely.
    """
    import shapely

    keys: list[tuple[str, int, str]] = []
    shapes: list[BaseGeometry] = []
    names = {"best": "o", "lower": "lo", "upper": "up"}
    for y in years:
        frame = storage.read_table("outlines", year=y)
        wanted = frame["glacier_id"].isin(closely) | ((frame["bound"] == "best") & frame["glacier_id"].isin(ids))
        frame = frame[wanted.to_numpy(dtype=bool)]
        keys += [(str(g), y, names[str(b)]) for g, b in zip(frame["glacier_id"], frame["bound"], strict=True)]
        shapes += list(frame.geometry)
    mapped = {g for g, _, name in keys if name == "o"}
    rest = glaciers[~glaciers["glacier_id"].isin(mapped)]
    keys += [(str(g), 0, "s") for g in rest["glacier_id"]]
    shapes += list(rest.geometry)
    raw = np.array(shapes, dtype=object)
    keep = np.ones(len(keys), dtype=bool)
    simple, metres = raw, 0
    for metres in (2, 5, 10, 20, 40):
        simple = shapely.simplify(raw, _degrees(metres))
        if shapely.get_num_coordinates(simple).sum() <= MOST_VERTICES:
            break
    else:
        keep = np.array([y in always or y == 0 or g in closely for g, y, _ in keys], dtype=bool)
    out: dict[tuple[str, int], dict[str, BaseGeometry]] = {}
    for (glacier, y, name), shape, kept in zip(keys, simple, keep, strict=True):
        if kept and shape is not None and not shape.is_empty:
            out.setdefault((glacier, y), {})[name] = shape
    # Whose only outlines were left out with the middle years: the inventory's stands for them.
    left = {g for (g, _), names_ in out.items() if not {"o", "s"}.isdisjoint(names_)}
    lost = glaciers[~glaciers["glacier_id"].isin(left)]
    for glacier, shape in zip(lost["glacier_id"], shapely.simplify(lost.geometry.to_numpy(), _degrees(metres))):
        out.setdefault((str(glacier), 0), {})["s"] = shape
    return out


def _degrees(metres: float) -> float:
    return metres / _METRES_PER_DEGREE


def _rings(shape: BaseGeometry) -> list[list[list[int]]]:
    import shapely

    return [
        [_steps(shapely.get_coordinates(ring)) for ring in (part.exterior, *part.interiors)]
        for part in shapely.get_parts(shape)
        if part.geom_type == "Polygon"
    ]


def _steps(lonlat: np.ndarray) -> list[int]:
    """Longitudes and latitudes (n, 2) as integer steps, each relative to the one before; the closing one left out."""
    whole = np.rint(lonlat[:-1] / _STEP_DEG).astype(np.int64)
    return [int(v) for v in np.diff(whole, axis=0, prepend=np.zeros((1, 2), dtype=np.int64)).ravel()]


# ------------------------------------------------------------------------------------------- pictures
def _pictures(
    storage: Storage, glaciers: Iterable[str], years: Sequence[int]
) -> dict[tuple[str, int], tuple[str, list[list[float]]]]:
    """WebP pictures of the chosen images, as data addresses with their boxes (south, west), (north, east).

    The pictures of a glacier share one stretch, that of its first image, so that a snowier year looks brighter. A cube
    that is not there, or can not be read, gives no picture: the report tells results, and ``dl4gam status`` tells of
    damaged files.
    """
    out = {}
    for glacier in glaciers:
        white: float | None = None
        for y in years:
            path = storage.cube(y, glacier)
            try:
                made = path.stat().st_mtime
                with storage.reading(path) as local:
                    white = white or _white(str(local), made)
                    out[glacier, y] = _picture(str(local), made, white)
            except OSError:
                continue
    return out


# The reports of ten years, made one after the other, show the same pictures.
@lru_cache(maxsize=4096)
def _white(path: str, made: float) -> float:
    from dl4gam_assets.cubes import white_point

    return white_point(_bands(path)[0])


@lru_cache(maxsize=4096)
def _picture(path: str, made: float, white: float) -> tuple[str, list[list[float]]]:
    from dl4gam_assets.cubes import true_colour

    bands, box = _bands(path)
    there = np.isfinite(np.stack(list(bands.values()))).all(axis=0)
    return _web_picture(true_colour(bands, white), there, box)


def _bands(path: str) -> tuple[dict[str, np.ndarray], Any]:
    """The bands of a picture in a cube, not larger than needed, and their grid."""
    from pathlib import Path

    from dl4gam_assets.cubes import open_cube, shown_bands

    with open_cube(Path(path)) as cube:
        names = shown_bands([str(b) for b in cube["band"].to_numpy()])
        step = max(1, round(max(cube.sizes["y"], cube.sizes["x"]) / PICTURE_PX))
        small = cube["reflectance"].sel(band=list(dict.fromkeys(names)))[:, ::step, ::step].load()
        return {str(b): small.sel(band=b).to_numpy() for b in small["band"].to_numpy()}, small.odc.geobox


def _web_picture(colours: np.ndarray, there: np.ndarray, box: Any) -> tuple[str, list[list[float]]]:
    """In the projection of web maps (EPSG:3857), transparent where there is no pixel."""
    from PIL import Image
    from rasterio.warp import Resampling, calculate_default_transform, reproject, transform_bounds

    source = np.concatenate([np.moveaxis(colours, -1, 0), there[None].astype(np.uint8) * 255])
    crs, bounds = str(box.crs), box.boundingbox
    transform, width, height = calculate_default_transform(
        crs, "EPSG:3857", box.shape[1], box.shape[0], bounds.left, bounds.bottom, bounds.right, bounds.top
    )
    target = np.zeros((4, height, width), dtype=np.uint8)
    reproject(
        source, target, src_transform=box.affine, src_crs=crs, dst_transform=transform, dst_crs="EPSG:3857",
        resampling=Resampling.bilinear,
    )  # fmt: skip
    raw = io.BytesIO()
    Image.fromarray(np.moveaxis(target, 0, -1)).save(raw, format="webp", quality=68, method=2)
    west, north = transform.c, transform.f
    box_deg = transform_bounds(
        "EPSG:3857", "EPSG:4326", west, north + height * transform.e, west + width * transform.a, north
    )
    return (
        "data:image/webp;base64," + base64.b64encode(raw.getvalue()).decode(),
        [[round(box_deg[1], 6), round(box_deg[0], 6)], [round(box_deg[3], 6), round(box_deg[2], 6)]],
    )
