"""Transfer of a region's maps to a second inventory: from files to a table; what ``dl4gam transfer`` does.

It writes nothing into the store, and no asset reads its result: the second inventory judges the maps and does not shape
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dl4gam_assets.settings import InventoryColumns, InventorySettings, SettingsError
from dl4gam_assets.stages.base import Site, UpstreamError, Workspace, cached_table

if TYPE_CHECKING:
    import geopandas as gpd

#: Zones that areas and scores need around an outline.
BUFFERS_M = (20, 50)


@dataclass(frozen=True)
class Transfer:
    """``glaciers``: a row a glacier of the second inventory (EPSG:4326), measured or with the reason why not.
    ``id_map``: from ``change.transfer.match_inventories``. ``summary``: figures over all. ``rejected``: outlines of the
    second inventory that can not be used (glacier_id, error, kind)."""

    glaciers: gpd.GeoDataFrame
    id_map: pd.DataFrame
    summary: dict[str, Any]
    rejected: pd.DataFrame


def read_second_inventory(
    path: Path, layer: str | None, id_column: str | None, work_folder: Path
) -> tuple[gpd.GeoDataFrame, pd.DataFrame]:
    """A second inventory as the platform reads its first, with parts of one id merged.

    ``path`` is a vector file, or the folder of the raw SGI2016 files, of which glaciers are made in ``work_folder``
    first (``inventory.sgi``).

    Raises
    ------
    SettingsError
        if the file can not be read, or no column looks like an id.
    """
    from dl4gam_assets.inventory import prepare_inventory, read_inventory
    from dl4gam_assets.inventory.vector import vector_info
    from dl4gam_assets.starter import guess_columns

    if path.is_dir():
        wish = InventorySettings(path=".", prepare="sgi2016", layer="glaciers")
        try:
            path, layer = prepare_inventory(wish, path, work_folder), "glaciers"
        except FileNotFoundError as error:
            raise SettingsError(str(error)) from error
    if not path.is_file():
        raise SettingsError(f"there is no inventory {path}")
    if path.suffix in {".parquet", ".geoparquet"}:
        import pyarrow.parquet

        names = pyarrow.parquet.read_schema(path).names
    else:
        try:
            names = list(vector_info(path, layer=layer)["fields"])
        except Exception as error:
            raise SettingsError(f"{path} can not be read as vector data: {error}") from error
    columns = guess_columns(names)
    columns["glacier_id"] = id_column or columns["glacier_id"]
    if columns["glacier_id"] is None:
        raise SettingsError(f"no column of {path.name} looks like a glacier id; name it ({', '.join(names)})")
    settings = InventorySettings(
        path=str(path), layer=layer, columns=InventoryColumns.model_validate(columns), merge_parts=True
    )
    return read_inventory(path, settings)


def transfer(
    ws: Workspace, second: gpd.GeoDataFrame, rejected: pd.DataFrame, year: int, *, separation_m: float = 0.0
) -> Transfer:
    """Measure the glaciers of a second inventory on the region's held-out maps of a year.

    Each glacier gets the fold that holds out all glaciers of the region that it overlaps
    (``change.transfer.transfer_folds``); its map is joined from theirs, cut at the second inventory's divides. One
    that can not be measured keeps its row with a reason, and never stops the others.

    Raises
    ------
    UpstreamError
        if the region has no inventory, folds or maps of the year.
    """
    from dl4gam_assets.change.transfer import match_inventories, relation_counts, summarize_transfer, transfer_folds
    from dl4gam_assets.inventory import glacier_zones

    storage = ws.storage
    first, folds = storage.read_table("glaciers"), storage.read_table("folds")
    predictions = storage.read_table("predictions", year=year)
    for name, frame in (("glaciers", first), ("folds", folds), (f"predictions of {year}", predictions)):
        if not len(frame):
            raise UpstreamError(f"the region has no {name} yet: run dl4gam materialize --region {ws.region.name}")
    id_map = match_inventories(first, second)
    rows = transfer_folds(first, second, folds, separation_m)
    held = rows[rows["reason"] == "held out"].set_index("glacier_id")
    # Zones of a glacier depend on its neighbours, so those near the held-out ones are needed too.
    west, south, east, north = second[second["glacier_id"].isin(held.index)].total_bounds if len(held) else (0, 0, 0, 0)
    near = second.cx[west - 0.05 : east + 0.05, south - 0.05 : north + 0.05] if len(held) else second.iloc[:0]
    near = near.reset_index(drop=True)
    zones = glacier_zones(near, list(BUFFERS_M))
    tasks = [
        (str(g), (ws.site, year, str(g), row.first_ids.split(","), int(row.fold), *_around(str(g), near, zones)))
        for g, row in held.iterrows()
    ]
    values, failed = {}, {}
    for done in ws.mapper.map(transferred_of, tasks):
        if done.ok:
            values[done.key] = done.value
        else:
            failed[done.key] = done.error or "failed"
            ws.logger.warning(f"transfer [{year}] glacier {done.key}: {done.error}")
    measured = pd.DataFrame([value | {"glacier_id": g} for g, value in sorted(values.items())])
    rows["error"] = rows["glacier_id"].map(failed).astype("string")
    if len(measured):
        rows = rows.merge(measured, on="glacier_id", how="left", validate="one_to_one")
    about = second[["glacier_id", "name", "inventory_date", "inventory_area_km2", "geometry"]]
    out = about.rename(columns={"inventory_area_km2": "outline_km2", "inventory_date": "outline_date"}).merge(
        rows, on="glacier_id", how="left", validate="one_to_one"
    )
    out.insert(1, "year", year)
    out = out.sort_values("glacier_id", ignore_index=True)
    summary = summarize_transfer(out, ws.region.change.usable_min)
    summary["relations"] = relation_counts(id_map)
    return Transfer(out, id_map, summary, rejected)


def _around(
    glacier_id: str, second: gpd.GeoDataFrame, zones: gpd.GeoDataFrame
) -> tuple[gpd.GeoDataFrame, gpd.GeoDataFrame]:
    """A glacier with its neighbours (within its box and about 5 km), and its own zones: what a worker needs."""
    import shapely

    own = second[second["glacier_id"] == glacier_id]
    west, south, east, north = own.total_bounds
    dy = 0.05
    dx = dy / float(np.cos(np.deg2rad(min(max(abs(south), abs(north)), 89.0))))
    box = shapely.box(west - dx, south - dy, east + dx, north + dy)
    return second.iloc[second.sindex.query(box, predicate="intersects")], zones[zones["glacier_id"] == glacier_id]


def transferred_of(
    site: Site,
    year: int,
    glacier_id: str,
    first_ids: list[str],
    fold: int,
    second: gpd.GeoDataFrame,
    zones: gpd.GeoDataFrame,
) -> dict[str, Any]:
    """Figures of one glacier of the second inventory; runs in a worker process.

    ``first_ids``: the region's glaciers that it overlaps, all tested by ``fold``, largest overlap first.

    Raises
    ------
    UpstreamError
        if none of them has a map in the year.
    """
    from dl4gam_assets.change.transfer import Source, join_maps, transferred_row
    from dl4gam_assets.cubes import cube_mask, open_cube, static_layers
    from dl4gam_assets.ensemble import read_prediction
    from dl4gam_assets.inventory import glacier_grid

    storage = site.storage
    predictions = cached_table(site, "predictions", year=year)
    mapped = set(predictions.loc[predictions["fold"] == fold, "glacier_id"])
    taus = cached_table(site, "taus", fold=fold).set_index("glacier_id")["tau"]
    sources, own_taus, dates, code = [], [], [], 0
    for first_id in first_ids:
        if first_id not in mapped:
            continue
        with (
            storage.reading(storage.cube(year, first_id)) as cube_path,
            storage.reading(storage.prediction(year, first_id)) as map_path,
            open_cube(cube_path) as cube,
        ):
            layers = {
                **read_prediction(map_path),
                "not_ok": cube_mask(cube, "not_ok"),
                "cell": cube_mask(cube, "cell"),
            }
            if layers["mean"].shape != layers["cell"].shape:
                raise UpstreamError(f"the map of {first_id} in {year} is older than its cube: predict it again")
            layers["dem"] = (
                cube["dem"].to_numpy().astype(np.float32)
                if "dem" in cube
                else np.full(layers["cell"].shape, np.nan, dtype=np.float32)
            )
            grid = cube.odc.geobox
            dates.append(str(cube.attrs["image_date"]))
        code = code or int(grid.crs.to_epsg())
        sources.append(Source(first_id, grid.affine, str(grid.crs), layers))
        own_taus.append(float(taus.get(first_id, taus.min())))
    if not sources:
        raise UpstreamError(f"none of {', '.join(first_ids)} has a map in {year}")
    inventory, imagery = site.region.inventory, site.region.imagery
    own = second[second["glacier_id"] == glacier_id]
    geobox = glacier_grid(own.geometry.iloc[0], code, imagery.sensor.pixel_m, imagery.margin_m)
    debris = cached_table(site, "debris") if inventory.debris else cached_table(site, "debris").iloc[:0]
    static = static_layers(glacier_id, second, zones, debris, geobox, buffers_m=BUFFERS_M)
    fill = {"mean": np.nan, "std": np.nan, "not_ok": True, "dem": np.nan}
    row = transferred_row(static, join_maps(sources, geobox, fill), own_taus, site.region.inference.threshold)
    row.pop("glacier_id", None)
    return row | {
        "image_date": pd.Timestamp(dates[0]).tz_localize(None),
        "image_dates": len(set(dates)),
        "sources": ",".join(s.glacier_id for s in sources),
    }
