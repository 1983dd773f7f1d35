"""Stages of the group *terrain*: static layers of each glacier once, elevation change by year.

A glacier's files are made again only if what they were made from has changed: its own outline and those in its grid,
its zones, the debris there, the tiles that touch its grid, the settings, and the code of the rooms that shape them (so
nobody has to remember to raise a version number). Downstream looks at the content of the files, so a change of code or
of a tile that leaves the values as they were stops here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dl4gam_assets.settings import StacFolder, fingerprint
from dl4gam_assets.stages import published
from dl4gam_assets.stages.base import (
    Site,
    StageResult,
    UpstreamError,
    Workspace,
    cached_table,
    frame_fingerprint,
    run_stage,
)
from dl4gam_assets.stages.code import code_fingerprint
from dl4gam_assets.stages.mending import absent_if_damaged, removing_damaged
from dl4gam_assets.storage import safe_name
from dl4gam_assets.tables import TABLES, rows_of

if TYPE_CHECKING:
    from dl4gam_assets.terrain import Tile, TileIndex

#: Modules whose code shapes the static layers and dh/dt, and the packages that they rest on.
_CODE = (
    "dl4gam_assets.terrain.reading",
    "dl4gam_assets.terrain.derivatives",
    "dl4gam_assets.cubes.build",
    "dl4gam_assets.cubes.masks",
    "dl4gam_assets.cubes.files",
    "dl4gam_assets.inventory.grid",
)
_PACKAGES = ("xdem",)


# --------------------------------------------------------------------------------------------- fingerprints
def _code() -> str:
    return code_fingerprint(_CODE, _PACKAGES)


def _grid_key(grid: Any) -> list[Any]:
    return [str(grid.crs), list(grid.shape), list(grid.affine)[:6]]


def _tiles_key(tiles: Sequence[Tile]) -> list[str]:
    return [tile.identity or tile.href for tile in tiles]


def _near(frame: Any, window: Any) -> Any:
    return frame.iloc[sorted(frame.sindex.query(window, predicate="intersects"))] if len(frame) else frame


# --------------------------------------------------------------------------------------------- static layers
def grid_of(site: Site, glacier_id: str) -> Any:
    """The glacier's grid (odc GeoBox): its UTM zone, the sensor's pixel, the region's margin."""
    from dl4gam_assets.inventory import glacier_grid

    glaciers = cached_table(site, "glaciers")
    row = rows_of(glaciers, glacier_id).iloc[0]
    imagery = site.region.imagery
    return glacier_grid(row["geometry"], int(row["utm_epsg"]), imagery.sensor.pixel_m, imagery.margin_m)


def static_path(site: Site, glacier_id: str) -> Any:
    return site.storage.path("static", f"{safe_name(glacier_id)}.nc")


@functools.lru_cache(maxsize=32)
def _stored_index(root: str, parts: tuple[str, ...], signature: str) -> TileIndex:
    """An index of tiles that the stage wrote, once in each process."""
    from dl4gam_assets.storage import Storage
    from dl4gam_assets.terrain import TileIndex

    return TileIndex.from_json(Storage(root).path(*parts).read_text(encoding="utf-8"))


def _index(site: Site, parts: tuple[str, ...], signature: str | None) -> TileIndex | None:
    return None if signature is None else _stored_index(site.root, parts, signature)


def _store_index(ws: Workspace, parts: tuple[str, ...], index: TileIndex | None) -> str | None:
    if index is None:
        return None
    ws.storage.write_text(ws.storage.path(*parts), index.to_json())
    return index.signature


_DEM_TILES = ("static", "dem-tiles.json")
_VELOCITY_TILES = ("static", "velocity-tiles.json")


def static_of(
    site: Site, glacier_id: str, dem_signature: str | None, velocity_signature: str | None
) -> tuple[dict[str, Any], tuple[str, str, str] | None]:
    """Masks and terrain of one glacier, written unless they are there; runs in a worker process.

    The signatures name the stored indices of tiles; None where the settings name no tiles.

    A tile that can not be read loses no glacier: the layer is missing, as where there is no tile, and the second value
    is the row for ``failures`` that names the tile. The file is made again by the next run.
    """
    from dl4gam_assets.cubes import content_fingerprint, open_cube, static_layers, write_cube
    from dl4gam_assets.terrain import boxes, grid_box

    storage, terrain = site.storage, site.region.terrain
    grid = grid_of(site, glacier_id)
    glaciers, zones, debris = (cached_table(site, name) for name in ("glaciers", "zones", "debris"))
    window = boxes(grid_box(grid))
    dem, velocity = (
        None if index is None else index.touching(grid)
        for index in (_index(site, _DEM_TILES, dem_signature), _index(site, _VELOCITY_TILES, velocity_signature))
    )
    wanted = fingerprint(
        {
            "code": _code(),
            "grid": _grid_key(grid),
            "around": [[int(i), g.wkb_hex] for i, g in _near(glaciers, window)[["glacier_int", "geometry"]].to_numpy()],
            "debris": [g.wkb_hex for g in _near(debris, window).geometry],
            "zones": sorted(
                (int(b), g.wkb_hex) for b, g in rows_of(zones, glacier_id)[["buffer_m", "geometry"]].to_numpy()
            ),
            "buffers": site.region.inventory.buffers_m,
            "dem": None if dem is None else _tiles_key(dem),
            "velocity": None if velocity is None else _tiles_key(velocity),
            "settings": terrain.model_dump(mode="json", include={"dem_nodata", "smoothing_sigma"}),
        }
    )
    path = static_path(site, glacier_id)
    mine = None
    if path.exists():
        with absent_if_damaged(path), storage.reading(path) as local, open_cube(local) as found:
            if found.attrs.get("inputs") == wanted:
                mine = found.load()
    trouble = None
    if mine is None:
        no_dem: list[Tile] | None = None if dem is None else []
        no_velocity: list[Tile] | None = None if velocity is None else []
        for dem_now, velocity_now in ((dem, velocity), (dem, no_velocity), (no_dem, velocity), (no_dem, no_velocity)):
            try:
                mine = static_layers(
                    glacier_id,
                    glaciers,
                    zones,
                    debris,
                    grid,
                    dem_paths=dem_now,
                    dem_nodata=terrain.dem_nodata,
                    velocity_paths=velocity_now,
                    smoothing_sigma=terrain.smoothing_sigma,
                    buffers_m=site.region.inventory.buffers_m,
                )
                break
            except OSError as error:
                trouble = trouble or error
        assert mine is not None  # the last attempt opens no tile
        mine.attrs |= {"inputs": wanted if trouble is None else "", "fingerprint": content_fingerprint(mine)}
        with storage.writing(path) as temporary:
            write_cube(mine, temporary)
    row = ground_row(mine, glacier_id, mine.attrs["fingerprint"])
    return row, None if trouble is None else (glacier_id, str(trouble), type(trouble).__name__)


def ground_row(mine: Any, glacier_id: str, content: str) -> dict[str, Any]:
    """Row of ``elevations`` from the static layers of a glacier."""
    from dl4gam_assets.cubes import cube_mask
    from dl4gam_assets.terrain import mean_aspect

    inside = cube_mask(mine, "glacier")
    row: dict[str, Any] = {"glacier_id": glacier_id, "fingerprint": content, "missing_share": 1.0}
    if "dem" in mine:
        elevations = mine["dem"].to_numpy()
        row["missing_share"] = float(np.isnan(elevations).mean())
        here = elevations[inside & np.isfinite(elevations)]
        if here.size:
            row |= {
                "elevation_min_m": float(here.min()),
                "elevation_mean_m": float(here.mean()),
                "elevation_max_m": float(here.max()),
                "slope_mean_deg": float(np.nanmean(mine["slope"].to_numpy()[inside])),
                "aspect_mean_deg": mean_aspect(mine["aspect"].to_numpy()[inside]),
            }
    if "v" in mine:
        speeds = mine["v"].to_numpy()
        here = speeds[inside & np.isfinite(speeds)]
        row |= {
            "velocity_missing_share": float(np.isnan(speeds).mean()),
            "velocity_mean_m_per_year": float(here.mean()) if here.size else None,
        }
    return row


def _find(sources: Sequence[str], ws: Workspace, setting: str) -> TileIndex:
    from dl4gam_assets.terrain import TileError, find_tiles

    try:
        return find_tiles(sources, ws.data_root, setting=setting)
    except TileError as error:
        raise UpstreamError(str(error)) from error


def _catalog_tiles(ws: Workspace, glaciers: Any) -> list[Tile]:
    """DEM tiles of the STAC catalog near the modelled glaciers: one search for each block of 5 x 5 degrees."""
    import datetime as dt

    from dl4gam_assets.imagery import CatalogError, open_catalog
    from dl4gam_assets.terrain import catalog_tiles, search_blocks

    terrain = ws.region.terrain
    assert terrain.dem_catalog is not None
    try:
        catalog = open_catalog(terrain.dem_catalog, ws.data_root, ws.region.imagery.sensor)
        items = {
            item.id: item
            for block in search_blocks(_windows(glaciers.geometry.to_numpy(), ws.region.imagery.margin_m))
            for item in catalog.search(block, dt.date(1990, 1, 1), dt.date(2100, 1, 1))
        }
        return catalog_tiles(items.values(), terrain.dem_asset)
    except CatalogError as error:
        raise UpstreamError(f"terrain.dem_catalog: {error}") from error


def _windows(outlines: Any, margin_m: float) -> list[tuple[float, float, float, float]]:
    """Boxes in degrees around outlines; parts of an outline alone, because the antimeridian may lie between them."""
    import shapely

    out = []
    lat_margin = (margin_m + 1000.0) / 111_000.0
    for west, south, east, north in shapely.bounds(shapely.get_parts(outlines)):
        lon_margin = lat_margin / max(math.cos(math.radians(max(abs(south), abs(north)))), 0.05)
        west, east = west - lon_margin, east + lon_margin
        west, east = (w + 360.0 if w < -180.0 else w - 360.0 if w > 180.0 else w for w in (west, east))
        out.append((float(west), float(south - lat_margin), float(east), float(north + lat_margin)))
    return out


def elevation(ws: Workspace, *, force: bool = False) -> StageResult:
    """Static layers of each modelled glacier: masks, elevation and its derivatives, velocity."""
    if (manifest := published.cubes_import(ws.storage, ws.region.years.baseline)) is not None:
        return published.elevation(ws, manifest, force=force)
    terrain = ws.region.terrain
    dem = _find(terrain.dem, ws, "terrain.dem")
    velocity = _find(terrain.velocity, ws, "terrain.velocity")
    catalog: Mapping[str, Any] | None = None
    if terrain.dem_catalog is not None:
        catalog = {**terrain.dem_catalog.model_dump(mode="json"), "asset": terrain.dem_asset}
        if isinstance(terrain.dem_catalog, StacFolder):
            catalog = {**catalog, "file": _find([terrain.dem_catalog.path], ws, "terrain.dem_catalog").signature}
    inputs = {
        "glaciers": ws.upstream("inventory_outlines"),
        "zones": ws.upstream("glacier_zones"),
        "debris": ws.upstream("debris_outlines"),
        "dem": [_tiles_key(dem.tiles), dem.templates, catalog],
        "velocity": [_tiles_key(velocity.tiles), velocity.templates],
        "settings": terrain.model_dump(mode="json", include={"dem_nodata", "smoothing_sigma"}),
        "grid": [ws.region.imagery.sensor.pixel_m, ws.region.imagery.margin_m, ws.region.inventory.buffers_m],
        "code": _code(),
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        from dl4gam_assets.terrain import TileIndex

        glaciers = ws.storage.read_table("glaciers")
        modelled = glaciers[glaciers["modelled"].astype(bool)]
        tiles = dem.tiles + (_catalog_tiles(ws, modelled) if terrain.dem_catalog is not None else [])
        signatures = (
            _store_index(ws, _DEM_TILES, TileIndex(tiles, dem.templates) if terrain.has_dem else None),
            _store_index(ws, _VELOCITY_TILES, velocity if terrain.velocity else None),
        )
        ids = modelled["glacier_id"].tolist()
        done, failures = ws.over_glaciers("elevation", "all", static_of, [(g, (ws.site, g, *signatures)) for g in ids])
        rows = [row for row, _ in done.values()]
        if degraded := [trouble for _, trouble in done.values() if trouble is not None]:
            for glacier_id, error, _ in degraded:
                ws.logger.warning(f"elevation glacier {glacier_id}: {error}; until then the layer is missing")
            known = failures[["glacier_id", "error", "kind"]].itertuples(index=False, name=None)
            failures = ws.write_failures("elevation", "all", [*known, *degraded])
        frame = pd.DataFrame(rows) if rows else TABLES["elevations"].empty()
        ws.storage.write_table("elevations", frame)
        stored = ws.storage.read_table("elevations")
        metadata = {
            "glaciers": len(stored),
            "failed_glaciers": len(failures),
            "mean_missing_share": float(stored["missing_share"].mean()) if len(stored) else None,
            "glaciers_without_elevation": int(stored["elevation_mean_m"].isna().sum()),
            "source": terrain.dem_source or "none",
        }
        if terrain.velocity:
            metadata |= {
                "glaciers_without_velocity": int(stored["velocity_mean_m_per_year"].isna().sum()),
                "mean_missing_share_of_velocity": float(stored["velocity_missing_share"].mean())
                if len(stored)
                else None,
            }
        return frame_fingerprint(stored), metadata, {}

    return run_stage(ws, "elevation", "all", inputs, work, force=force)


# --------------------------------------------------------------------------------------------- elevation change
def dhdt_path(site: Site, period: Any, glacier_id: str) -> Any:
    """File of a glacier's dh/dt on its grid; years that share a period share the file."""
    return site.storage.path("dhdt", f"period={period.start}-{period.end}", f"{safe_name(glacier_id)}.tif")


def _dhdt_tiles(period: Any, error_layer: bool = False) -> tuple[str, ...]:
    return ("dhdt", f"period={period.start}-{period.end}", "error-tiles.json" if error_layer else "tiles.json")


def elevation_change_of(
    site: Site, year: int, glacier_id: str, signature: str | None, error_signature: str | None
) -> dict[str, Any]:
    """dh/dt of one glacier on its grid, written unless it is there; runs in a worker process."""
    import rasterio

    from dl4gam_assets.cubes import cube_mask, open_cube
    from dl4gam_assets.terrain import match_period, read_dhdt

    storage, terrain = site.storage, site.region.terrain
    row: dict[str, Any] = {"glacier_id": glacier_id, "fingerprint": "none", "missing_share": 1.0}
    period = match_period(terrain.elevation_change, year, terrain.elevation_change_match)
    if period is None:
        return row
    grid = grid_of(site, glacier_id)
    layers = [
        [] if index is None else index.touching(grid)
        for index in (
            _index(site, _dhdt_tiles(period), signature), _index(site, _dhdt_tiles(period, True), error_signature)
        )
    ][: 1 if error_signature is None else 2]  # fmt: skip
    wanted = fingerprint(
        {
            "code": _code(), "grid": _grid_key(grid), "period": [period.start, period.end],
            "tiles": [_tiles_key(tiles) for tiles in layers], "nodata": terrain.dhdt_nodata,
        }
    )  # fmt: skip
    path = dhdt_path(site, period, glacier_id)
    elevations = cached_table(site, "elevations")
    ground = rows_of(elevations, glacier_id)["fingerprint"]
    outline = str(ground.iloc[0]) if len(ground) else ""
    row |= {"period_start": period.start, "period_end": period.end}
    mine = None
    if path.exists():
        with absent_if_damaged(path), storage.reading(path) as local, rasterio.open(local) as source:
            tags = source.tags()
            if tags.get("inputs") == wanted:
                content = tags["fingerprint"]
                if outline and tags.get("outline") == outline:  # a further year of the same period
                    return row | {"fingerprint": content} | json.loads(tags["summary"])
                mine = source.read(1)
    values = None
    if mine is None:
        values = [
            read_dhdt(tiles, grid, terrain.dhdt_nodata, error_layer=bool(layer)) for layer, tiles in enumerate(layers)
        ]
        mine = values[0]
        content = fingerprint([_grid_key(grid), *(hashlib.sha256(v.tobytes()).hexdigest() for v in values)])
    ground_path = static_path(site, glacier_id)
    with (
        removing_damaged(site, "elevation", "all", ground_path),
        storage.reading(ground_path) as local,
        open_cube(local) as static,
    ):
        inside = cube_mask(static, "glacier")
    here = mine[inside & np.isfinite(mine)]
    summary = {
        "missing_share": float(np.isnan(mine).mean()),
        "dhdt_mean_m_per_year": float(here.mean()) if here.size else None,
    }
    if values is not None:
        with storage.writing(path) as temporary, rasterio.open(
            temporary, "w", driver="GTiff", height=grid.shape[0], width=grid.shape[1], count=len(values),
            dtype="float32", crs=str(grid.crs), transform=grid.affine, nodata=float("nan"), compress="deflate",
            predictor=3, zlevel=1,
        ) as target:  # fmt: skip
            for band, (layer, name) in enumerate(
                zip(values, ("dh/dt (m/yr)", "error of dh/dt (m/yr)"), strict=False), 1
            ):
                target.write(layer, band)
                target.set_band_description(band, name)
            target.update_tags(
                inputs=wanted, fingerprint=content, period=f"{period.start}-{period.end}",
                outline=outline, summary=json.dumps(summary),
            )  # fmt: skip
    return row | {"fingerprint": content} | summary


def elevation_change(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """dh/dt of the period that belongs to the year, on each glacier's grid."""
    if (manifest := published.cubes_import(ws.storage, year)) is not None:
        return published.elevation_change(ws, year, manifest, force=force)
    published.expect_not_imported(ws)
    from dl4gam_assets.terrain import TileError, match_period, period_tiles

    terrain = ws.region.terrain
    period = match_period(terrain.elevation_change, year, terrain.elevation_change_match)
    tiles = errors = None
    if period is not None:
        try:
            tiles = period_tiles(period, ws.data_root)
            errors = period_tiles(period, ws.data_root, error_layer=True) if period.error_path is not None else None
        except TileError as error:
            raise UpstreamError(str(error)) from error
    inputs = {
        "elevation": ws.upstream("elevation"),
        "files": [None if index is None else [_tiles_key(index.tiles), index.templates] for index in (tiles, errors)],
        "period": None if period is None else [period.start, period.end],
        "settings": terrain.model_dump(mode="json", include={"dhdt_nodata"}),
        "code": _code(),
        "year": year,
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        signatures: tuple[str | None, str | None] = (None, None)
        if period is not None:
            signatures = (
                _store_index(ws, _dhdt_tiles(period), tiles), _store_index(ws, _dhdt_tiles(period, True), errors)
            )  # fmt: skip
        ids = ws.storage.read_table("elevations")["glacier_id"].tolist()
        rows, failures = ws.over_glaciers(
            "elevation_change", str(year), elevation_change_of, [(g, (ws.site, year, g, *signatures)) for g in ids]
        )
        frame = pd.DataFrame(list(rows.values())) if rows else TABLES["elevation_changes"].empty().drop(columns="year")
        ws.storage.write_table("elevation_changes", frame, {"year": year})
        stored = ws.storage.read_table("elevation_changes", year=year)
        known = stored["dhdt_mean_m_per_year"].dropna()
        metadata = {
            "glaciers": len(stored),
            "failed_glaciers": len(failures),
            "period": "none" if period is None else f"{period.start} to {period.end}",
            "mean_missing_share": float(stored["missing_share"].mean()) if len(stored) else None,
            "glaciers_without_dhdt": len(stored) - len(known),
            "mean_dhdt_m_per_year": float(known.mean()) if len(known) else None,
        }
        return frame_fingerprint(stored), metadata, {}

    return run_stage(ws, "elevation_change", str(year), inputs, work, force=force)
