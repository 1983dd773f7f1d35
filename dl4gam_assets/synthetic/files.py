"""The files of a simulated region, in the formats of real data.

Belongs here: writing GeoTIFFs, the STAC catalog, inventory, debris, truth. Does not belong here: what they contain.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import rasterio
import rasterio.features
import rasterio.warp
import shapely
import shapely.geometry
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from scipy import ndimage

from dl4gam_assets.synthetic.acquisitions import Acquisition
from dl4gam_assets.synthetic.noise import F32, fractal_noise
from dl4gam_assets.synthetic.retreat import (
    elapsed_share,
    elevation_change,
    former_ice,
    retreat,
)
from dl4gam_assets.synthetic.scenes import (
    Bare,
    Ground,
    Scene,
    bare_ground,
    block_mean,
    classify,
    cloud_probability,
    render,
)
from dl4gam_assets.synthetic.spectra import BANDS

#: Changes when the same parameters give other files.
VERSION = 2
_OFFSET_SINCE = dt.date(2022, 1, 25)
_COMMON = {"blue": "blue", "green": "green", "red": "red", "nir": "nir", "swir16": "swir16"}
_SENTINEL = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B08", "swir16": "B11"}
_WAVELENGTH = {"blue": 0.49, "green": 0.56, "red": 0.665, "nir": 0.842, "swir16": 1.61}


@dataclass(frozen=True)
class SimulationSummary:
    """What a simulated region holds. ``regional_rate_*`` are the truth from the baseline to the last year."""

    n_glaciers: int
    n_modelled: int  # of at least 0.1 km2
    area_km2: dict[int, float]
    regional_rate_km2_per_year: float
    regional_rate_pct_per_year: float
    debris_share: float
    n_items: int
    bytes: int
    seconds: float


@dataclass
class World:
    """A simulated region before it is written. Arrays are (H, W) at 10 m, rows to the south."""

    title: str
    prefix: str  # of item ids
    transform: Affine
    crs: str
    ground: Ground
    label: NDArray[np.int32]  # baseline glaciers, from 1
    order: F32  # melt_order
    rates_pct: NDArray[np.float64]
    glaciers: pd.DataFrame  # glacier_id, name, country in the order of the labels
    dem: Path | None = None  # file passed on as the DEM; None writes the ground's surface
    outlines: gpd.GeoDataFrame | None = None  # the baseline's outlines where they are given

    @property
    def shape(self) -> tuple[int, int]:
        return self.label.shape


# --------------------------------------------------------------------------------------------- rasters
def write_cog(
    path: Path,
    data: NDArray[Any],
    transform: Affine,
    crs: str,
    *,
    nodata: float,
    description: str,
    tags: Mapping[str, str],
) -> None:
    """One band as a cloud-optimized GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "COG", "height": data.shape[0], "width": data.shape[1], "count": 1, "dtype": data.dtype.name,
        "crs": crs, "transform": transform, "nodata": nodata, "compress": "DEFLATE", "level": 1, "predictor": "YES",
        "blocksize": 256, "overview_resampling": "NEAREST" if data.dtype == np.uint8 else "AVERAGE", "num_threads": 1,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(data, 1)
        target.set_band_description(1, description)
        target.update_tags(**tags)
    with rasterio.open(path) as written:  # GDAL says nothing when the disk fills up while it closes a file
        written.checksum(1)


def digital_numbers(reflectance: F32, offset: float, valid: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """uint16 numbers of reflectance: (reflectance - offset) x 10000, 0 where not valid, at least 1 elsewhere."""
    numbers = np.clip(np.rint((reflectance - np.float32(offset)) * 10000), 1, 65535)
    out: NDArray[np.uint16] = np.where(valid, numbers, 0).astype(np.uint16)
    return out


# --------------------------------------------------------------------------------------------- vectors
def outlines_of(
    label: NDArray[np.int32], transform: Affine, crs: str, ids: Sequence[str], *, tolerance_m: float = 9.0
) -> gpd.GeoDataFrame:
    """Polygons of labels 1 to n, without the stairs of pixels; neighbours keep their common border exactly."""
    parts: dict[int, list[shapely.Polygon]] = {}
    for shape, value in rasterio.features.shapes(label, mask=label > 0, connectivity=4, transform=transform):
        polygon = shapely.geometry.shape(shape)
        if polygon.area > 250:
            parts.setdefault(int(value), []).append(polygon)
    keys = sorted(parts)
    flat = [p for k in keys for p in parts[k]]
    owner = np.repeat(keys, [len(parts[k]) for k in keys])
    simple = shapely.coverage_simplify(np.array(flat), tolerance_m)
    geometry = [shapely.make_valid(shapely.union_all(simple[owner == k])) for k in keys]
    geometry = [_polygonal(g) for g in geometry]
    return gpd.GeoDataFrame({"glacier_id": [ids[k - 1] for k in keys]}, geometry=geometry, crs=crs)


def _polygonal(geometry: shapely.Geometry) -> shapely.Geometry:
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    parts = [g for g in shapely.get_parts(geometry) if g.geom_type in ("Polygon", "MultiPolygon")]
    return shapely.union_all(parts)


def digitizing_noise(
    frame: gpd.GeoDataFrame, world: World, rng: np.random.Generator, *, std_m: float = 3.3
) -> gpd.GeoDataFrame:
    """Outlines moved by a smooth random field, so that common borders stay common.

    The field has a standard deviation of ``std_m`` in each direction and wavelengths from about 60 m.
    """
    east = std_m * fractal_noise(world.shape, rng, beta=2.0, longest_px=40, shortest_px=6)
    north = std_m * fractal_noise(world.shape, rng, beta=2.0, longest_px=40, shortest_px=6)
    inverse = ~world.transform

    def move(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        col, row = inverse * (xy[:, 0], xy[:, 1])
        where = [row - 0.5, col - 0.5]
        dx = ndimage.map_coordinates(east, where, order=1, mode="nearest")
        dy = ndimage.map_coordinates(north, where, order=1, mode="nearest")
        return np.column_stack([xy[:, 0] + dx, xy[:, 1] + dy])

    moved = shapely.transform(frame.geometry.to_numpy(), move)
    moved = [_polygonal(shapely.make_valid(g)) for g in moved]
    # Where a fold made neighbours overlap (seldom), the first keeps the ground.
    tree = shapely.STRtree(moved)
    for i in range(len(moved)):
        for j in tree.query(moved[i], predicate="overlaps"):
            if j > i:
                moved[j] = _polygonal(shapely.difference(moved[j], moved[i]))
    return frame.set_geometry(gpd.GeoSeries(moved, index=frame.index, crs=frame.crs))


def _write_vector(frame: gpd.GeoDataFrame, path: Path, layer: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # GeoPackage stamps the time of writing; a fixed one keeps equal runs equal.
    os.environ.setdefault("OGR_CURRENT_DATE", "2026-01-01T00:00:00.000Z")
    frame.to_file(path, layer=layer, driver="GPKG", engine="pyogrio")


# --------------------------------------------------------------------------------------------- scenes
def _tiles(shape: tuple[int, int]) -> dict[str, slice]:
    """Columns of the two tiles; they overlap by about a ninth of the width. Even, for the 20 m bands."""
    overlap = max(8, shape[1] // 18)
    middle = shape[1] // 2
    return {"west": slice(0, (middle + overlap) // 2 * 2), "east": slice((middle - overlap) // 2 * 2, shape[1])}


_TILE_NAME = {"west": "32SYW", "east": "32SYE"}


def _valid(tile: str, columns: slice, shape: tuple[int, int], cut: str | None) -> NDArray[np.bool_]:
    """Pixels inside the orbit's swath: its edge runs 13 degrees off north."""
    valid = np.ones((shape[0], columns.stop - columns.start), bool)
    if cut == tile:
        width = valid.shape[1]
        row = np.arange(shape[0])[:, None]
        col = np.arange(width)[None, :]
        edge = width * 0.30 + (shape[0] / 2 - row) * np.tan(np.radians(13.0))
        valid = col >= edge if tile == "west" else col <= width - edge
        valid = np.repeat(np.repeat(valid[::2, ::2], 2, 0), 2, 1)[: shape[0], :width]
    return valid


def _footprint(valid: NDArray[np.bool_], transform: Affine, crs: str) -> shapely.Geometry:
    shapes = [
        shapely.geometry.shape(s)
        for s, v in rasterio.features.shapes(valid.astype(np.uint8), mask=valid, transform=transform)
        if v
    ]
    outline = shapely.union_all(shapes).convex_hull
    projected = gpd.GeoSeries([outline.segmentize(2000.0)], crs=crs).to_crs(4326).iloc[0]
    return shapely.set_precision(projected, 1e-7)


def _render_item_files(
    folder: Path, world: World, when: Acquisition, scene: Scene, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Write the files of an overpass; returns the facts of its items."""
    items = []
    probability = cloud_probability(scene, rng)
    codes = classify(scene, probability, rng)
    rows = world.shape[0] // 2 * 2
    processings = [_processing(when.date)]
    if when.older_processing:
        processings.insert(0, _processing(when.date, older=True))
    for tile in when.tiles:
        columns = _tiles(world.shape)[tile]
        columns = slice(columns.start, columns.start + (columns.stop - columns.start) // 2 * 2)
        valid = _valid(tile, columns, (rows, world.shape[1]), when.cut)
        half = slice(columns.start // 2, columns.stop // 2)
        valid20 = valid[::2, ::2]
        transform = world.transform * Affine.translation(columns.start, 0)
        transform20 = transform * Affine.scale(2)
        for baseline, generated, gain in processings:
            offset = -0.1 if when.date >= _OFFSET_SINCE else 0.0
            unit, number = "AB"[when.date.toordinal() % 2], baseline.replace(".", "")
            ident = f"S2{unit}_{_TILE_NAME[tile]}_{when.date:%Y%m%d}_{number}_{world.prefix}"
            tags = {"SIMULATED": "yes", "DATE": when.date.isoformat()}
            facts: dict[str, Any] = {
                "id": ident,
                "tile": tile,
                "baseline": baseline,
                "generated": generated,
                "offset": offset,
            }
            facts |= {
                "transform": transform,
                "shape": valid.shape,
                "footprint": _footprint(valid, transform, world.crs),
            }
            assets: dict[str, Path] = {}
            for b, name in enumerate(BANDS):
                band = scene.reflectance[b] * np.float32(gain)
                path = folder / "scenes" / ident / f"{name}.tif"
                if name == "swir16":
                    numbers = digital_numbers(block_mean(band)[:, half], offset, valid20)
                    write_cog(path, numbers, transform20, world.crs, nodata=0, description=name, tags=tags)
                else:
                    numbers = digital_numbers(band[:rows, columns], offset, valid)
                    write_cog(path, numbers, transform, world.crs, nodata=0, description=name, tags=tags)
                assets[name] = path
            scl = np.where(valid20, codes[:, half], 0).astype(np.uint8)
            clouds = np.where(valid20, probability[:, half], 255).astype(np.uint8)
            for name, data, nodata in (("scl", scl, 0), ("cloud_probability", clouds, 255)):
                path = folder / "scenes" / ident / f"{name}.tif"
                write_cog(path, data, transform20, world.crs, nodata=nodata, description=name, tags=tags)
                assets[name] = path
            facts["assets"] = {n: (p, _multihash(p), p.stat().st_size) for n, p in assets.items()}
            facts["cloud_cover"] = float(np.isin(scl, (8, 9, 10))[valid20].mean() * 100)
            facts["snow_cover"] = float((scl == 11)[valid20].mean() * 100)
            facts["nodata_share"] = float((~valid20).mean() * 100)
            facts |= {"azimuth": scene.azimuth, "elevation": scene.elevation, "moment": when.moment}
            items.append(facts)
    return items


def _multihash(path: Path) -> str:
    # SHA-256 in multihash notation, as the STAC file extension asks.
    return "1220" + hashlib.sha256(path.read_bytes()).hexdigest()


def _processing(date: dt.date, *, older: bool = False) -> tuple[str, str, float]:
    """Processing baseline, time of generation, gain of a product of a date."""
    current = "02.04" if date < dt.date(2018, 11, 6) else "02.14" if date < _OFFSET_SINCE else "04.00"
    later = {"02.04": "02.08", "02.14": "03.01", "04.00": "05.10"}[current]
    made = dt.datetime.combine(date, dt.time(16, 20, 11), tzinfo=dt.UTC)
    if older:
        return current, made.isoformat().replace("+00:00", "Z"), 1.02
    return later, (made + dt.timedelta(days=400)).isoformat().replace("+00:00", "Z"), 1.0


def write_catalog(folder: Path, world: World, items: Sequence[Mapping[str, Any]]) -> None:
    """A self-contained STAC catalog of the scenes, links and assets relative."""
    catalog = pystac.Catalog(
        id=f"{world.prefix.lower()}-simulated", title=f"{world.title} (simulated)",
        description="Simulated Sentinel-2-like scenes. Nothing in here was measured.",
    )  # fmt: skip
    footprints = [i["footprint"] for i in items]
    west, south, east, north = shapely.union_all(footprints).bounds
    moments = [i["moment"] for i in items]
    collection = pystac.Collection(
        id="sentinel-2-l2a-simulated",
        title=f"Sentinel-2 Level-2A, simulated: {world.title}",
        description="Surface reflectance like that of Sentinel-2 Level-2A, simulated from a seed over a known truth.",
        license="CC0-1.0",
        keywords=["simulated", "glacier", "Sentinel-2"],
        extent=pystac.Extent(
            pystac.SpatialExtent([[west, south, east, north]]), pystac.TemporalExtent([[min(moments), max(moments)]])
        ),
    )
    catalog.add_child(collection)
    here = folder / "stac" / collection.id
    for facts in sorted(items, key=lambda i: str(i["id"])):
        collection.add_item(_item(facts, world, folder, here / str(facts["id"])))
    catalog.normalize_hrefs(str(folder / "stac"))
    catalog.save(catalog_type=pystac.CatalogType.SELF_CONTAINED)


def _item(facts: Mapping[str, Any], world: World, folder: Path, here: Path) -> pystac.Item:
    footprint = facts["footprint"]
    transform, shape = facts["transform"], facts["shape"]
    left, top = transform.c, transform.f
    right, bottom = transform * (shape[1], shape[0])
    item = pystac.Item(
        id=facts["id"],
        geometry=json.loads(shapely.to_geojson(footprint)),
        bbox=list(footprint.bounds),
        datetime=facts["moment"],
        stac_extensions=[
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
            "https://stac-extensions.github.io/view/v1.0.0/schema.json",
            "https://stac-extensions.github.io/grid/v1.1.0/schema.json",
            "https://stac-extensions.github.io/file/v2.1.0/schema.json",
        ],
        properties={
            "platform": "simulated-sentinel-2" + facts["id"][2].lower(),
            "constellation": "simulated",
            "instruments": ["msi"],
            "simulated": True,
            "description": "simulated",
            "created": facts["generated"],
            "updated": facts["generated"],
            "grid:code": f"MGRS-{_TILE_NAME[facts['tile']]}",
            "s2:mgrs_tile": _TILE_NAME[facts["tile"]],
            "s2:processing_baseline": facts["baseline"],
            "s2:generation_time": facts["generated"],
            "s2:nodata_pixel_percentage": round(facts["nodata_share"], 3),
            "eo:cloud_cover": round(facts["cloud_cover"], 3),
            "eo:snow_cover": round(facts["snow_cover"], 3),
            "view:sun_azimuth": round(facts["azimuth"], 4),
            "view:sun_elevation": round(facts["elevation"], 4),
            "proj:code": world.crs,
            "proj:shape": [int(n) for n in shape],
            "proj:transform": [float(v) for v in list(transform)[:6]],
            "proj:bbox": [left, bottom, right, top],
        },
    )
    for name, (path, checksum, size) in facts["assets"].items():
        fine = name in ("blue", "green", "red", "nir")
        grid = transform if fine else transform * Affine.scale(2)
        rows, cols = shape if fine else (shape[0] // 2, shape[1] // 2)
        extra: dict[str, Any] = {
            "proj:shape": [int(rows), int(cols)],
            "proj:transform": [float(v) for v in list(grid)[:6]],
            "gsd": 10 if fine else 20,
            "file:checksum": checksum,
            "file:size": size,
        }
        if name in _COMMON:
            extra["eo:bands"] = [{
                "name": _SENTINEL[name], "common_name": _COMMON[name], "center_wavelength": _WAVELENGTH[name],
            }]  # fmt: skip
            extra["raster:bands"] = [{
                "data_type": "uint16", "nodata": 0, "scale": 0.0001, "offset": facts["offset"],
                "spatial_resolution": extra["gsd"],
            }]  # fmt: skip
        else:
            extra["raster:bands"] = [
                {"data_type": "uint8", "nodata": 0 if name == "scl" else 255, "spatial_resolution": 20}
            ]
        item.add_asset(name, pystac.Asset(
            href=Path(os.path.relpath(path, here)).as_posix(),
            title=f"{name} (simulated)", media_type=pystac.MediaType.COG,
            roles=["data", "reflectance"] if name in _COMMON else ["data", "metadata"], extra_fields=extra,
        ))  # fmt: skip
    return item


# --------------------------------------------------------------------------------------------- the region
def write_region(
    folder: Path,
    parameters: Mapping[str, Any],
    make: Callable[[], tuple[World, list[Acquisition]]],
    *,
    seed: int,
    years: Sequence[int],
    baseline_year: int,
    workers: int,
    progress: Callable[[str], None] | None,
) -> SimulationSummary:
    """Write all files of a region into a folder, or nothing.

    They are made in a sibling folder that takes the name when complete. A folder that holds the same simulation already
    (``simulation.json`` with equal version and parameters) is left as it is; another simulation is replaced.

    Raises
    ------
    FileExistsError
        if the folder holds something that is no simulation.
    ValueError
        if a year lies before the baseline, or the folder's parent can not hold the region.
    """
    say = progress or (lambda _text: None)
    folder = Path(folder)
    if not years or min(years) < baseline_year:
        raise ValueError(f"years must not be empty nor lie before the baseline {baseline_year}: {list(years)}")
    wanted = json.loads(json.dumps({"version": VERSION, **parameters}))
    stamp = folder / "simulation.json"
    if stamp.is_file():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found.get("parameters") == wanted:
            say(f"{folder} holds this simulation already")
            known = dict(found["summary"])
            known["area_km2"] = {int(k): v for k, v in known["area_km2"].items()}
            return SimulationSummary(**known)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no simulation; name another folder or empty it")
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        say("terrain and glaciers")
        world, plan = make()
        summary = _write_all(work, world, plan, seed, sorted(set(years)), baseline_year, workers, say, started)
        content = {"parameters": wanted, "summary": asdict(summary)}
        (work / "simulation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        old = None
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
        work.rename(folder)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(
        f"{summary.n_glaciers} glaciers, {summary.n_items} scenes, "
        f"{summary.bytes / 1e6:.0f} MB in {summary.seconds:.0f} s"
    )
    return summary


def _write_all(
    folder: Path, world: World, plan: Sequence[Acquisition], seed: int, years: Sequence[int], baseline_year: int,
    workers: int, say: Callable[[str], None], started: float,
) -> SimulationSummary:  # fmt: skip
    ids = list(world.glaciers.glacier_id)
    elapsed = elapsed_share(years, baseline_year)
    labels = {
        y: retreat(world.label, world.order, world.rates_pct / 100 * elapsed[y])
        for y in sorted({baseline_year, *years})
    }
    truth = {y: outlines_of(label, world.transform, world.crs, ids) for y, label in labels.items()}

    # Scenes. Every overpass has random numbers of its own, so the number of workers changes nothing.
    cloud_on: dict[dt.date, NDArray[np.bool_]] = {}
    lock = threading.Lock()

    @functools.lru_cache(maxsize=2)
    def ground_of_year(year: int) -> tuple[NDArray[np.bool_], Bare]:
        ice = labels[year] > 0
        return ice, bare_ground(world.ground, ice)

    def ground_of(year: int) -> tuple[NDArray[np.bool_], Bare]:
        with lock:  # two dates of a year wait for one computation
            return ground_of_year(year)

    def overpass(when: Acquisition) -> list[dict[str, Any]]:
        rng = np.random.default_rng([seed, when.date.toordinal()])
        ice, bare = ground_of(when.date.year)
        scene = render(world.ground, ice, when, rng, bare)
        if when.date.year == baseline_year and when.kind == "clean":
            cloud_on[when.date] = (scene.cloud > 0.1) | (scene.cloud_shadow > 0.3)
        return _render_item_files(folder, world, when, scene, rng)

    items: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for k, made in enumerate(pool.map(overpass, plan), start=1):
            items += made
            if k % 10 == 0 or k == len(plan):
                say(f"scenes of {k} of {len(plan)} dates")
    write_catalog(folder, world, items)

    say("inventory, terrain, truth")
    rng = np.random.default_rng([seed, 1])
    baseline = world.outlines if world.outlines is not None else digitizing_noise(truth[baseline_year], world, rng)
    _write_inventory(folder, world, baseline, labels[baseline_year], cloud_on)
    _write_debris(folder, world, labels[baseline_year], rng)
    _write_elevation(folder, world, labels, baseline_year, rng)
    areas = pd.concat(
        [pd.DataFrame({"glacier_id": f.glacier_id, "year": y, "area_km2": f.area / 1e6}) for y, f in truth.items()],
        ignore_index=True,
    )
    # A glacier that is gone has area 0.
    full = pd.MultiIndex.from_product([ids, sorted(truth)], names=["glacier_id", "year"])
    areas = areas.set_index(["glacier_id", "year"]).reindex(full, fill_value=0.0).reset_index()
    areas["year"] = areas.year.astype("int64")
    (folder / "truth").mkdir(exist_ok=True)
    areas.to_parquet(folder / "truth" / "areas.parquet", index=False)
    for y, frame in truth.items():
        _write_vector(frame, folder / "truth" / f"outlines_{y}.gpkg", "glaciers")
    total = areas.groupby("year").area_km2.sum()
    rates = {
        int(y): {
            "rate_km2_per_year": float((total[y] - total[baseline_year]) / (y - baseline_year)),
            "rate_pct_per_year": float((total[y] / total[baseline_year] - 1) / (y - baseline_year) * 100),
        }
        for y in total.index
        if y != baseline_year
    }
    regional = {
        "baseline_year": baseline_year,
        "area_km2": {int(y): float(a) for y, a in total.items()},
        "rates": rates,
    }
    (folder / "truth" / "regional.json").write_text(json.dumps(regional, indent=1), encoding="utf-8")
    last = rates.get(max(years), {"rate_km2_per_year": 0.0, "rate_pct_per_year": 0.0})
    first = areas[areas.year == baseline_year]
    ice = labels[baseline_year] > 0
    return SimulationSummary(
        n_glaciers=len(ids),
        n_modelled=int((first.area_km2 >= 0.1).sum()),
        area_km2={int(y): round(float(a), 4) for y, a in total.items()},
        regional_rate_km2_per_year=last["rate_km2_per_year"],
        regional_rate_pct_per_year=last["rate_pct_per_year"],
        debris_share=float((world.ground.debris[ice] > 0).mean()),
        n_items=len(items),
        bytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        seconds=round(time.monotonic() - started, 1),
    )


def _write_inventory(
    folder: Path,
    world: World,
    outlines: gpd.GeoDataFrame,
    label: NDArray[np.int32],
    cloud_on: Mapping[dt.date, NDArray[np.bool_]],
) -> None:
    """The date of a glacier is that of the baseline year's clean image with the least cloud over it."""
    days = sorted(cloud_on)
    inside = np.bincount(label.ravel(), minlength=len(world.glaciers) + 1).astype(float)
    share = np.stack([
        np.bincount(label.ravel(), weights=cloud_on[d].ravel(), minlength=len(inside)) / np.maximum(inside, 1)
        for d in days
    ])  # fmt: skip
    best = [days[k].isoformat() for k in np.round(share[:, 1:], 2).argmin(axis=0)]
    frame = outlines.merge(world.glaciers.assign(date=best), on="glacier_id", how="left", validate="1:1")
    frame["area_km2"] = frame.area / 1e6
    frame = frame[["glacier_id", "name", "country", "date", "area_km2", "geometry"]].to_crs(4326)
    frame.geometry = [_polygonal(shapely.make_valid(g)) for g in frame.geometry]
    _write_vector(frame, folder / "inventory.gpkg", "glaciers")


def _write_debris(folder: Path, world: World, label: NDArray[np.int32], rng: np.random.Generator) -> None:
    """Two sources that agree in part: one draws generously and misses a tenth of the glaciers, one tightly and more."""
    n = int(label.max())
    most = int(
        np.bincount(label.ravel(), weights=((world.ground.debris > 0) & (label > 0)).ravel()).argmax()
    )  # seen by both
    for name, bias, seen in (("debris_a", 0.04, 0.9), ("debris_b", -0.03, 0.65)):
        wobble = 0.04 * fractal_noise(world.shape, rng, beta=2.6, longest_px=40)
        lucky = np.concatenate([[False], rng.random(n) < seen])
        lucky[most] = label.max() > 0
        cover = ndimage.binary_opening(
            (world.ground.debris + bias + wobble > 0) & lucky[label] & (label > 0), iterations=1
        )
        parts = np.where(cover, label, 0).astype(np.int32)
        frame = outlines_of(parts, world.transform, world.crs, list(world.glaciers.glacier_id)).to_crs(4326)
        frame.geometry = [_polygonal(shapely.make_valid(g)) for g in frame.geometry]
        _write_vector(frame, folder / f"{name}.gpkg", "debris")


def _write_elevation(
    folder: Path, world: World, labels: Mapping[int, NDArray[np.int32]], baseline_year: int, rng: np.random.Generator
) -> None:
    tags = {"SIMULATED": "yes"}
    area = np.bincount(world.label.ravel(), minlength=len(world.glaciers) + 1)[1:] * world.ground.pixel_m**2 / 1e6
    debris = (world.ground.debris > 0).astype(np.float32)
    change = elevation_change(world.label, world.ground.surface, debris, world.rates_pct, area)
    # The DEM is of about two years before the baseline: the glaciers stood higher.
    surface = world.ground.surface - 2 * change
    surface = surface + 0.35 * fractal_noise(world.shape, rng, beta=1.0)
    height, width = world.shape
    bounds = rasterio.transform.array_bounds(height, width, world.transform)
    west, south, east, north = rasterio.warp.transform_bounds(world.crs, "EPSG:4326", *bounds)
    step = 1 / 3600
    left, top = np.floor(west / step) * step, np.ceil(north / step) * step
    grid = Affine(step, 0, left, 0, -step, top)
    shape = (int(np.ceil((top - south) / step)), int(np.ceil((east - left) / step)))
    dem = np.full(shape, -9999.0, np.float32)
    rasterio.warp.reproject(
        surface.astype(np.float32), dem, src_transform=world.transform, src_crs=world.crs, dst_transform=grid,
        dst_crs="EPSG:4326", dst_nodata=-9999.0, resampling=Resampling.average,
    )  # fmt: skip
    write_cog(folder / "dem.tif", dem, grid, "EPSG:4326", nodata=-9999.0, description="elevation (m)", tags=tags)

    step_px = round(100 / world.ground.pixel_m)
    coarse = world.transform * Affine.scale(step_px)
    last = max(labels)
    elapsed = elapsed_share([last], baseline_year)

    # Ground that the ice left before the baseline thinned too: without it, thinning would give ice away.
    owner, vacated = former_ice(world.label, world.ground.surface, world.rates_pct, pixel_m=world.ground.pixel_m)
    nearest = ndimage.distance_transform_edt(world.label == 0, return_distances=False, return_indices=True)
    change = np.where(owner > 0, change[tuple(nearest)], change)

    def ice_in(year: int) -> NDArray[np.float32]:
        # Years without scenes have ice too.
        if year < baseline_year:
            return ((world.label > 0) | ((owner > 0) & (vacated < baseline_year - year))).astype(np.float32)
        loss = world.rates_pct / 100 * elapsed[min(year, last)]
        return (retreat(world.label, world.order, loss) > 0).astype(np.float32)

    for start, end, factor in ((2010, 2015, 0.9), (2015, 2020, 1.0), (2020, 2025, 1.12)):
        there = np.mean([ice_in(y) for y in range(start, end)], axis=0)
        mean = _blocks(change * factor * there, step_px)
        noise = 0.16 * fractal_noise(mean.shape, rng, beta=2.2, longest_px=12) + 0.10 * rng.standard_normal(mean.shape)
        gaps = fractal_noise(mean.shape, rng, beta=2.4, longest_px=10) > 2.3
        data = np.where(gaps, -9999.0, mean + noise).astype(np.float32)
        write_cog(folder / f"dhdt_{start}_{end}.tif", data, coarse, world.crs, nodata=-9999.0,
                  description=f"dh/dt {start} to {end} (m/yr)", tags=tags)  # fmt: skip


def _blocks(field: NDArray[np.floating], n: int) -> F32:
    field = np.pad(field, ((0, -field.shape[0] % n), (0, -field.shape[1] % n)), mode="edge")
    return field.reshape(field.shape[0] // n, n, field.shape[1] // n, n).mean(axis=(1, 3)).astype(np.float32)
