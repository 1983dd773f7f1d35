"""Stage of the group *cubes*: everything a model sees of a glacier in a year."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from dl4gam_assets.compute import TransientError
from dl4gam_assets.settings import fingerprint
from dl4gam_assets.stages import previews, published
from dl4gam_assets.stages.base import (
    STAGE_VERSION,
    Site,
    StageResult,
    UpstreamError,
    Workspace,
    cached_table,
    frame_fingerprint,
    run_stage,
)
from dl4gam_assets.stages.code import code_fingerprint
from dl4gam_assets.stages.imagery import catalog_fingerprint, catalog_of
from dl4gam_assets.stages.mending import absent_if_damaged, removing_damaged
from dl4gam_assets.stages.terrain import dhdt_path, static_path
from dl4gam_assets.tables import TABLES, rows_of

if TYPE_CHECKING:
    import xarray as xr
    from odc.geo.geobox import GeoBox


#: Modules whose code shapes the image and dh/dt of a cube; that of its static layers is in their own fingerprint.
_CODE = (
    "dl4gam_assets.imagery.indices",
    "dl4gam_assets.imagery.masks",
    "dl4gam_assets.imagery.reading",
    "dl4gam_assets.imagery.scaling",
    "dl4gam_assets.cubes.build",
    "dl4gam_assets.cubes.files",
    "dl4gam_assets.cubes.masks",
)


def cube_of(site: Site, year: int, glacier_id: str, wanted: str, stamp: str, again: bool = False) -> dict[str, Any]:
    """Build one glacier's cube unless the file made from the same inputs is there; runs in a worker process.

    ``again`` builds it in any case.
    """
    import rasterio

    from dl4gam_assets.cubes import build_cube, content_fingerprint, cube_mask, open_cube, write_cube

    storage = site.storage
    path = storage.cube(year, glacier_id)
    scenes = cached_table(site, "scenes", year=year)
    candidates = rows_of(scenes, glacier_id)
    row = candidates[candidates["selected"].astype(bool)].iloc[0]
    changes = cached_table(site, "elevation_changes", year=year)
    change = rows_of(changes, glacier_id)
    elevations = cached_table(site, "elevations")
    ground = rows_of(elevations, glacier_id).iloc[0]
    mine = None
    if path.exists() and not again:
        with absent_if_damaged(path), storage.reading(path) as local, open_cube(local) as found:
            if found.attrs.get("inputs") == wanted:
                mine = found[["mask"]].load()
    if mine is None:
        ground_path = static_path(site, glacier_id)
        with (
            removing_damaged(site, "elevation", "all", ground_path),
            storage.reading(ground_path) as base,
            open_cube(base) as static,
        ):
            static["mask"].load()
            image = _image(site, year, row, candidates, static.odc.geobox, stamp)
            dhdt = error = None
            if len(change) and pd.notna(change["period_start"].iloc[0]):
                start, end = int(change["period_start"].iloc[0]), int(change["period_end"].iloc[0])
                period = next(p for p in site.region.terrain.elevation_change if (p.start, p.end) == (start, end))
                change_path = dhdt_path(site, period, glacier_id)
                with (
                    removing_damaged(site, "elevation_change", str(year), change_path),
                    storage.reading(change_path) as local,
                    rasterio.open(local) as source,
                ):
                    dhdt = source.read(1)
                    error = source.read(2) if source.count > 1 else None
            tag = "simulated" if site.region.simulation is not None else getattr(site.region.imagery.catalog, "tag", "")
            cube = build_cube(
                static,
                image,
                dhdt=dhdt,
                dhdt_error=error,
                attrs={
                    "glacier_id": glacier_id,
                    "year": year,
                    "image_date": row["date"].isoformat(),
                    "scene_ids": row["scene_ids"],
                    "sensor": site.region.imagery.sensor.name,
                    "region": site.region.name,
                    "tag": tag,
                    "inputs": wanted,
                },
            )
            cube.attrs["fingerprint"] = content_fingerprint(cube, static.attrs["fingerprint"])
            with storage.writing(path) as temporary:
                write_cube(cube, temporary, base)
            mine = cube[["mask"]]
    near = cube_mask(mine, "zone_20")
    bad = cube_mask(mine, "not_ok")
    if near.any() and bad[near].all():
        raise UpstreamError(f"the image of {row['date']:%Y-%m-%d} has no usable pixel on glacier {glacier_id}")
    height, width = bad.shape
    return {
        "glacier_id": glacier_id,
        "image_date": row["date"],
        "scene_ids": row["scene_ids"],
        "fingerprint": mine.attrs["fingerprint"],
        "height_px": height,
        "width_px": width,
        "utm_epsg": int(mine.odc.geobox.crs.epsg),
        "not_ok_share": float(bad[near].mean()) if near.any() else 1.0,
        "dem_missing_share": float(ground["missing_share"]),
        "dhdt_missing_share": float(change["missing_share"].iloc[0]) if len(change) else 1.0,
        "velocity_missing_share": ground["velocity_missing_share"],
        "size_bytes": int(path.stat().st_size),
    }


def _image(site: Site, year: int, row: pd.Series, candidates: pd.DataFrame, geobox: GeoBox, stamp: str) -> xr.Dataset:
    """The selected image with all bands; the choice saw only those that its scores need.

    Raises
    ------
    SceneError
        if a file can not be read or its values can not be right; says which image would be the next best.
    """
    from dl4gam_assets.imagery import SceneError, implausible, items_from_row, policy_of, read_image

    items = items_from_row(row, catalog_of(site, year, stamp))
    try:
        image = read_image(items, site.region.imagery, geobox, policy=policy_of(site.region.compute))
        wrong = implausible(image["reflectance"].to_numpy(), [str(b) for b in image["band"].to_numpy()])
        if wrong is not None:
            raise SceneError(f"{row['scene_ids']} can not be used: {wrong}")
    except SceneError as error:
        if isinstance(error, TransientError):
            raise
        others = candidates[candidates["rank"].notna() & ~candidates["selected"].astype(bool)].sort_values("rank")
        advice = (
            f"the next best image is of {others['date'].iloc[0]:%Y-%m-%d}: name that date in imagery.overrides"
            if len(others)
            else "no other image of the year is acceptable: mend the file and materialize glacier_cubes again"
        )
        raise SceneError(f"{error}; {advice}") from error
    return image


def cube_preview(site: Site, year: int, glacier_id: str) -> bytes:
    """The inventory outline over the selected image."""
    from dl4gam_assets.cubes import cube_mask, open_cube, true_colour

    storage = site.storage
    with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
        bands = {str(b): cube["reflectance"].sel(band=b).to_numpy() for b in cube["band"].to_numpy()}
        outline = cube_mask(cube, "glacier")
        date = str(cube.attrs["image_date"])[:10]
    return previews.contours(
        true_colour(bands), [(outline, "#ffd400", "inventory")], f"{glacier_id}, {date}",
        site.region.imagery.sensor.pixel_m,
    )  # fmt: skip


def glacier_cubes(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Build the cubes of a year's selected scenes; glaciers whose inputs are unchanged are left alone.

    ``force`` builds all of them.
    """
    force = force or ws.force
    if (manifest := published.cubes_import(ws.storage, year)) is not None:
        return published.glacier_cubes(ws, year, manifest, force=force)
    label = str(year)
    inputs = {
        "scenes": ws.upstream("selected_scenes", label),
        "static": ws.upstream("elevation"),
        "dhdt": ws.upstream("elevation_change", label),
        "sensor": ws.region.imagery.sensor.model_dump(mode="json"),
        "single_tile_coverage": ws.region.imagery.selection.single_tile_coverage,
        "code": code_fingerprint(_CODE),
    }

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        storage = ws.storage
        scenes = storage.read_table("scenes", year=year)
        chosen = scenes[scenes["selected"].astype(bool)]
        static = storage.read_table("elevations").set_index("glacier_id")["fingerprint"]
        dhdt = storage.read_table("elevation_changes", year=year).set_index("glacier_id")
        stamp = catalog_fingerprint(ws, year)
        tasks = []
        for row in chosen.itertuples():
            if row.glacier_id not in static.index:
                continue  # its static layers failed, which is a row in failures already
            wanted = fingerprint(
                {
                    "version": STAGE_VERSION,
                    "code": inputs["code"],
                    "scenes": [row.scene_ids, row.checksums],
                    "static": static[row.glacier_id],
                    "dhdt": [
                        str(dhdt["fingerprint"].get(row.glacier_id)), str(dhdt["period_start"].get(row.glacier_id)),
                    ],
                    "sensor": inputs["sensor"],
                    "single_tile_coverage": inputs["single_tile_coverage"],
                }
            )  # fmt: skip
            tasks.append((row.glacier_id, (ws.site, year, row.glacier_id, wanted, stamp, force)))
        rows, failures = ws.over_glaciers("glacier_cubes", label, cube_of, tasks)
        frame = pd.DataFrame(list(rows.values())) if rows else TABLES["cubes"].empty().drop(columns="year")
        storage.write_table("cubes", frame, {"year": year})
        pictures = {}
        if len(frame):
            largest = frame.loc[(frame["height_px"] * frame["width_px"]).idxmax(), "glacier_id"]
            pictures["largest glacier"] = cube_preview(ws.site, year, str(largest))
        metadata = {
            "glaciers": len(frame),
            "failed_glaciers": len(failures),
            "mean_unusable_share": float(frame["not_ok_share"].mean()) if len(frame) else None,
            "size_mb": round(float(frame["size_bytes"].sum()) / 1e6, 1) if len(frame) else 0.0,
        }
        return frame_fingerprint(frame[["glacier_id", "fingerprint"]]), metadata, pictures

    return run_stage(ws, "glacier_cubes", label, inputs, work, force=force)
