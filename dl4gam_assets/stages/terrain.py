"""Stages of the group *terrain*: static layers of each glacier once, elevation change by year."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dl4gam_assets.settings import fingerprint
from dl4gam_assets.stages.base import (
    Site,
    StageResult,
    Workspace,
    cached_table,
    file_fingerprint,
    frame_fingerprint,
    run_stage,
)
from dl4gam_assets.storage import safe_name
from dl4gam_assets.tables import TABLES


def grid_of(site: Site, glacier_id: str) -> Any:
    """The glacier's grid (odc GeoBox): its UTM zone, the sensor's pixel, the region's margin."""
    from dl4gam_assets.inventory import glacier_grid

    glaciers = cached_table(site, "glaciers")
    row = glaciers[glaciers["glacier_id"] == glacier_id].iloc[0]
    imagery = site.region.imagery
    return glacier_grid(row["geometry"], int(row["utm_epsg"]), imagery.sensor.pixel_m, imagery.margin_m)


def static_path(site: Site, glacier_id: str) -> Any:
    return site.storage.path("static", f"{safe_name(glacier_id)}.nc")


def static_of(site: Site, glacier_id: str, wanted: str) -> dict[str, Any]:
    """Masks and terrain of one glacier, written unless they are there; runs in a worker process."""
    from dl4gam_assets.cubes import cube_mask, open_cube, static_layers, write_cube

    storage = site.storage
    path = static_path(site, glacier_id)
    mine = None
    if path.exists():
        with storage.reading(path) as local, open_cube(local) as found:
            if found.attrs.get("fingerprint") == wanted:
                mine = found.load()
    if mine is None:
        mine = static_layers(
            glacier_id,
            cached_table(site, "glaciers"),
            cached_table(site, "zones"),
            cached_table(site, "debris"),
            grid_of(site, glacier_id),
            dem_paths=[site.data_root / p for p in site.region.terrain.dem],
            dem_nodata=site.region.terrain.dem_nodata,
            smoothing_sigma=site.region.terrain.smoothing_sigma,
            buffers_m=site.region.inventory.buffers_m,
        )
        mine.attrs["fingerprint"] = wanted
        with storage.writing(path) as temporary:
            write_cube(mine, temporary)
    inside = cube_mask(mine, "glacier")
    row: dict[str, Any] = {"glacier_id": glacier_id, "fingerprint": wanted, "missing_share": 1.0}
    if "dem" in mine:
        dem = mine["dem"].to_numpy()
        row["missing_share"] = float(np.isnan(dem).mean())
        here = dem[inside & np.isfinite(dem)]
        if here.size:
            row |= {
                "elevation_min_m": float(here.min()),
                "elevation_mean_m": float(here.mean()),
                "elevation_max_m": float(here.max()),
                "slope_mean_deg": float(np.nanmean(mine["slope"].to_numpy()[inside])),
            }
    return row


def elevation(ws: Workspace, *, force: bool = False) -> StageResult:
    """Static layers of each modelled glacier: masks, elevation and its derivatives."""
    inputs = {
        "glaciers": ws.upstream("inventory_outlines"),
        "zones": ws.upstream("glacier_zones"),
        "debris": ws.upstream("debris_outlines"),
        "dem": [file_fingerprint(ws.data_root / p) for p in ws.region.terrain.dem],
        "settings": ws.region.terrain.model_dump(mode="json", include={"dem_nodata", "smoothing_sigma"}),
        "grid": [ws.region.imagery.sensor.pixel_m, ws.region.imagery.margin_m, ws.region.inventory.buffers_m],
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        wanted = fingerprint(inputs)
        glaciers = ws.storage.read_table("glaciers")
        ids = glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"].tolist()
        rows, failures = ws.over_glaciers("elevation", "all", static_of, [(g, (ws.site, g, wanted)) for g in ids])
        frame = pd.DataFrame(list(rows.values())) if rows else TABLES["elevations"].empty()
        ws.storage.write_table("elevations", frame)
        metadata = {
            "glaciers": len(frame),
            "failed_glaciers": len(failures),
            "mean_missing_share": float(frame["missing_share"].mean()) if len(frame) else None,
            "source": ws.region.terrain.dem_source or "none",
        }
        return frame_fingerprint(frame), metadata, {}

    return run_stage(ws, "elevation", "all", inputs, work, force=force)


def dhdt_path(site: Site, period: Any, glacier_id: str) -> Any:
    """File of a glacier's dh/dt on its grid; years that share a period share the file."""
    return site.storage.path("dhdt", f"period={period.start}-{period.end}", f"{safe_name(glacier_id)}.tif")


def elevation_change_of(site: Site, year: int, glacier_id: str, wanted: str) -> dict[str, Any]:
    """dh/dt of one glacier on its grid, written unless it is there; runs in a worker process."""
    import rasterio

    from dl4gam_assets.cubes import cube_mask, open_cube
    from dl4gam_assets.terrain import match_period, read_elevation_change

    storage = site.storage
    row: dict[str, Any] = {"glacier_id": glacier_id, "fingerprint": wanted, "missing_share": 1.0}
    periods = [
        p.model_copy(update={"path": str(site.data_root / p.path)}) for p in site.region.terrain.elevation_change
    ]
    period = match_period(periods, year, site.region.terrain.elevation_change_match)
    if period is None:
        return row
    path = dhdt_path(site, period, glacier_id)
    mine = None
    if path.exists():
        with storage.reading(path) as local, rasterio.open(local) as source:
            if source.tags().get("fingerprint") == wanted:
                mine = source.read(1)
    if mine is None:
        grid = grid_of(site, glacier_id)
        mine, _ = read_elevation_change(periods, year, grid, site.region.terrain.elevation_change_match)
        with storage.writing(path) as temporary, rasterio.open(
            temporary, "w", driver="GTiff", height=grid.shape[0], width=grid.shape[1], count=1, dtype="float32",
            crs=str(grid.crs), transform=grid.affine, nodata=float("nan"), compress="deflate", predictor=3,
        ) as target:  # fmt: skip
            target.write(mine, 1)
            target.set_band_description(1, "dh/dt (m/yr)")
            target.update_tags(fingerprint=wanted, period=f"{period.start}-{period.end}")
    with storage.reading(static_path(site, glacier_id)) as local, open_cube(local) as static:
        inside = cube_mask(static, "glacier")
    here = mine[inside & np.isfinite(mine)]
    return row | {
        "period_start": period.start,
        "period_end": period.end,
        "missing_share": float(np.isnan(mine).mean()),
        "dhdt_mean_m_per_year": float(here.mean()) if here.size else None,
    }


def elevation_change(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """dh/dt of the period that belongs to the year, on each glacier's grid."""
    periods = ws.region.terrain.elevation_change
    sources = {
        "elevation": ws.upstream("elevation"),
        "files": [file_fingerprint(ws.data_root / p.path) for p in periods],
        "periods": [(p.start, p.end) for p in periods],
        "match": ws.region.terrain.elevation_change_match,
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        wanted = fingerprint(sources)
        ids = ws.storage.read_table("elevations")["glacier_id"].tolist()
        rows, failures = ws.over_glaciers(
            "elevation_change", str(year), elevation_change_of, [(g, (ws.site, year, g, wanted)) for g in ids]
        )
        frame = pd.DataFrame(list(rows.values())) if rows else TABLES["elevation_changes"].empty().drop(columns="year")
        ws.storage.write_table("elevation_changes", frame, {"year": year})
        stored = ws.storage.read_table("elevation_changes", year=year)
        known = stored["period_start"].dropna()
        metadata = {
            "glaciers": len(stored),
            "failed_glaciers": len(failures),
            "period": f"{int(known.iloc[0])} to {int(stored['period_end'].dropna().iloc[0])}" if len(known) else "none",
            "mean_missing_share": float(stored["missing_share"].mean()) if len(stored) else None,
            "mean_dhdt_m_per_year": float(stored["dhdt_mean_m_per_year"].mean()) if len(known) else None,
        }
        return frame_fingerprint(stored), metadata, {}

    return run_stage(ws, "elevation_change", str(year), {**sources, "year": year}, work, force=force)
