"""Stages of what was imported instead of made: published cubes, folds, normalization and checkpoints.

Belongs here: registering files with the store (``imports/``), and what the assets of the chain do for a year, a fold or
a member that was imported. Does not belong here: the published layout (``published``), the command line.

An import is a small file in the store that names what was found; the assets read it. So partitions of imports appear in
Dagster like any others: ``scene_candidates`` holds one candidate a glacier (the published file, with its checksum),
``selected_scenes`` selects it, ``elevation`` and ``elevation_change`` describe the layers in the files, and
``glacier_cubes`` converts them. Everything after that runs without a difference.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pandas as pd

from dl4gam_assets.settings import InferenceSettings, fingerprint
from dl4gam_assets.stages.base import (
    STAGE_VERSION,
    Site,
    StageResult,
    UpstreamError,
    Workspace,
    cached_table,
    fold_label,
    frame_fingerprint,
    run_stage,
)
from dl4gam_assets.stages.files import changed_files, full_hash, record_files, sampled_hash
from dl4gam_assets.stages.mending import absent_if_damaged
from dl4gam_assets.storage import Storage, safe_name
from dl4gam_assets.tables import rows_of

if TYPE_CHECKING:
    import xarray as xr

_ENTRY = re.compile(r"g_0*(\d+)")


# ---------------------------------------------------------------------------------------------------------- registering
def cubes_import(storage: Storage, year: int) -> dict[str, Any] | None:
    """What was registered of a year's cubes: path, fingerprint, and by glacier [file below the path, date]."""
    return storage.read_json(storage.path("imports", "cubes", f"{year}.json"))


def folds_import(storage: Storage) -> dict[str, Any] | None:
    """What was registered of the folds: file, sha256, and the rows of the table."""
    return storage.read_json(storage.path("imports", "folds.json"))


def statistics_import(storage: Storage, fold: int) -> dict[str, Any] | None:
    """What was registered of a fold's normalization: file, sha256, and the rows of the table."""
    return storage.read_json(storage.path("imports", "normalization", f"{fold}.json"))


def member_import(storage: Storage, fold: int, member: int) -> dict[str, Any] | None:
    """What was registered of a member: checkpoint, its sha256, seed, epoch, score, channels."""
    return storage.read_json(storage.path("imports", "members", f"{fold}.{member}.json"))


def match_ids(entries: Iterable[str], known: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Published entry ids -> ids of the inventory, and those that match none.

    They match as they are, or by number: the published ``g_0123`` is 123 in the inventory's column GLACIER_NR. Names of
    files that we export are percent-encoded.

    Raises
    ------
    PublishedFileError
        if several entries are one glacier of the inventory.
    """
    from dl4gam_assets.published import PublishedFileError

    there = set(known)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    lost = []
    for entry in entries:
        number = _ENTRY.fullmatch(entry)
        candidates = [entry, *([number[1]] if number else []), unquote(entry)]
        match = next((c for c in candidates if c in there), None)
        if match is None:
            lost.append(entry)
            continue
        if taken.setdefault(match, entry) != entry:
            raise PublishedFileError(f"{taken[match]} and {entry} are both glacier {match} of the inventory: keep one")
        found[entry] = match
    return found, lost


def register_cubes(
    ws: Workspace, path: Path, year: int | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Register the published cubes of a folder or tar archive as a year's.

    The year is that of the images. Images of several years are of the inventory: they become the baseline year's if
    they are the years of the inventory's own dates. An archive is unpacked into the store, and what another one left
    there is removed.

    Returns
    -------
    ``year``, ``cubes``, ``not_modelled`` (cubes of glaciers below the threshold, left out), ``without`` (modelled
    glaciers without a cube)

    Raises
    ------
    PublishedFileError
        if the files are not of this layout, none can be opened, years are mixed, glaciers are not of this inventory, or
        the same files are another year's already. What was registered before then stays.
    """
    from dl4gam_assets.published import PublishedFileError, unpack_cubes

    path = folder = path.expanduser().absolute()
    unpacked = ws.storage.path("imports", "unpacked")
    if path.is_file():
        if not ws.storage.is_local:
            raise PublishedFileError(f"{path} is an archive and the store is no folder: unpack it, and name the folder")
        folder = unpack_cubes(path, Path(str(unpacked)), say)
    try:
        manifest, told = _cubes_manifest(ws, folder, year, path)
        ws.storage.write_json(ws.storage.path("imports", "cubes", f"{manifest['year']}.json"), manifest)
    finally:
        if ws.storage.is_local:
            _sweep(ws, Path(str(unpacked)))
    return told


def _sweep(ws: Workspace, unpacked: Path) -> None:
    """Remove unpacked archives that no year is registered with."""
    found = (cubes_import(ws.storage, year) for year in ws.region.years.all())
    used = {manifest["path"] for manifest in found if manifest is not None}
    for folder in unpacked.iterdir() if unpacked.is_dir() else ():
        if str(folder) not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _cubes_manifest(ws: Workspace, folder: Path, year: int | None, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to register of a folder, and what to say; ``path`` is what was named, for messages."""
    from dl4gam_assets.published import PublishedFileError, find_cubes, trouble_with

    files = find_cubes(folder)
    glaciers = ws.storage.read_table("glaciers")
    matched, lost = match_ids([f.glacier_id for f in files], glaciers["glacier_id"])
    if lost:
        raise PublishedFileError(
            f"{path}: {len(lost)} of {len(files)} glaciers are not in the inventory of {ws.region.name} "
            f"({', '.join(lost[:5])}): is it the inventory that the cubes were made with?"
        )
    modelled = set(glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"])
    kept = [f for f in files if matched[f.glacier_id] in modelled]
    if not kept:
        raise PublishedFileError(f"{path}: none of its {len(files)} glaciers is modelled (inventory.min_area_km2)")
    baseline, inventory = ws.region.years.baseline, _inventory_years(glaciers)
    years = {f.date.year for f in kept}
    wanted = year if year is not None else _year_of([f.date.year for f in kept], glaciers, baseline, path)
    if wanted not in ws.region.years.all():
        raise PublishedFileError(f"{path}: {wanted} is no year of the region (years.first, years.last)")
    allowed = inventory | {baseline} if wanted == baseline else {wanted}
    if not years <= allowed:
        of = f"of the inventory's years ({_words(allowed)})" if wanted == baseline else f"of {wanted} alone"
        raise PublishedFileError(f"{path}: its images are of {_words(years)}, not {of}")
    if all(trouble := [trouble_with(f.path) for f in kept]):
        raise PublishedFileError(f"{path}: none of its {len(kept)} files can be read; {kept[0].path}: {trouble[0]}")
    entries = {
        matched[f.glacier_id]: [f.path.relative_to(folder).as_posix(), f.date.isoformat(), f.path.stat().st_size]
        for f in kept
    }
    manifest = {"path": str(folder), "year": wanted, "glaciers": entries, "fingerprint": fingerprint(entries)}
    for other in ws.region.years.all():
        there = cubes_import(ws.storage, other) if other != wanted else None
        if there is not None and any(there[key] == manifest[key] for key in ("path", "fingerprint")):
            raise PublishedFileError(
                f"{path} holds the cubes that are registered as those of {other}: if that was wrong, remove "
                f"{ws.storage.path('imports', 'cubes', f'{other}.json')} first"
            )
    told = {
        "year": wanted, "cubes": len(entries), "not_modelled": len(files) - len(kept),
        "without": len(modelled - set(entries)),
    }  # fmt: skip
    return manifest, told


def _words(years: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(years)))


def _inventory_years(glaciers: pd.DataFrame) -> set[int]:
    return set(glaciers["inventory_date"].dropna().dt.year.astype(int))


def _year_of(years: Sequence[int], glaciers: pd.DataFrame, baseline: int, path: Path) -> int:
    from dl4gam_assets.published import PublishedFileError

    inventory = _inventory_years(glaciers)
    found = sorted(set(years))
    if len(found) == 1 and (found[0] not in inventory or found[0] == baseline or len(inventory) == 1):
        return found[0]
    if set(found) <= inventory | {baseline}:
        return baseline
    raise PublishedFileError(
        f"{path}: its images are of {_words(found)}, the inventory's of {_words(inventory) or 'unknown years'}: say "
        "the year they stand for with --year"
    )


def register_splits(ws: Workspace, path: Path) -> dict[str, Any]:
    """Register a published fold map, and the normalization tables ``stats_agg_split_<i>.csv`` if ``path`` is a folder.

    Tables that came with another map are removed: they are of other training glaciers.

    Returns
    -------
    ``glaciers``, ``without`` (modelled glaciers in no fold), ``normalization`` (tables registered), ``removed`` (tables
    of a former import that are not any more)

    Raises
    ------
    PublishedFileError
        if there is none, one is wrong, it names glaciers that the inventory does not have, or a split is left without
        training, validation or test glaciers.
    """
    from dl4gam_assets.published import PublishedFileError, read_splits, read_statistics

    path, n = path.expanduser().absolute(), ws.region.folds.n
    tables: dict[int, Path] = {}
    if path.is_dir():
        maps = sorted(path.rglob("map_all_splits_all_folds.csv"))
        if len(maps) != 1:
            raise PublishedFileError(f"{path} holds {len(maps)} files map_all_splits_all_folds.csv, not one")
        for file in sorted(path.rglob("stats_agg_split_*.csv")):
            number = file.stem.removeprefix("stats_agg_split_")
            if not number.isdigit() or int(number) in tables:
                raise PublishedFileError(f"{file}: no number of a split, or a second table of it")
            tables[int(number)] = file
        if tables and sorted(tables) != list(range(1, n + 1)):
            raise PublishedFileError(f"{path} has normalization tables of splits {sorted(tables)}, not of 1 to {n}")
        path = maps[0]
    folds = read_splits(path, n)
    glaciers = ws.storage.read_table("glaciers")
    matched, lost = match_ids(folds["glacier_id"].unique(), glaciers["glacier_id"])
    if lost:
        raise PublishedFileError(
            f"fold map {path}: {len(lost)} glaciers are not in the inventory of {ws.region.name}: {', '.join(lost[:5])}"
        )
    modelled = set(glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"])
    folds = folds.assign(glacier_id=folds["glacier_id"].map(matched))
    folds = folds[folds["glacier_id"].isin(modelled)]
    for fold in range(1, n + 1):
        lacking = {"train", "valid", "test"} - set(folds.loc[folds["fold"] == fold, "role"])
        if lacking:
            raise PublishedFileError(
                f"fold map {path}: split_{fold} has no modelled glacier that is fold_{min(lacking)}: is it complete?"
            )
    statistics = {i: read_statistics(file, ws.region.model.channels) for i, file in tables.items()}
    for i, frame in statistics.items():
        rows = frame.drop(columns="n_pixels").to_dict("records")
        ws.storage.write_json(
            ws.storage.path("imports", "normalization", f"{i}.json"),
            {"file": tables[i].name, "sha256": full_hash(tables[i]), "rows": rows},
        )
    rows = folds.to_dict("records")
    removed = 0
    if (before := folds_import(ws.storage)) is not None and before["rows"] != rows:
        stale = [i for i in range(1, n + 1) if i not in tables and statistics_import(ws.storage, i) is not None]
        for i in stale:
            ws.storage.path("imports", "normalization", f"{i}.json").unlink()
        removed = len(stale)
    ws.storage.write_json(
        ws.storage.path("imports", "folds.json"), {"file": path.name, "sha256": full_hash(path), "rows": rows}
    )
    ids = set(folds["glacier_id"])
    return {
        "glaciers": len(ids), "without": len(modelled - ids), "normalization": len(tables), "removed": removed,
    }  # fmt: skip


def register_checkpoints(ws: Workspace, path: Path, indices: Sequence[str] | None = None) -> dict[str, Any]:
    """Register the published checkpoints of a folder as members: splits are folds, seeds in their order are members.

    Parameters
    ----------
    indices : order of the optical indices, where the settings beside the checkpoints do not say it

    Returns
    -------
    ``folds``, ``members`` (of each), ``checkpoints``, ``set_aside`` (checkpoints of a lower score beside the best one),
    ``removed`` (folds whose former import is not in this set, and was removed)

    Raises
    ------
    PublishedFileError
        if a fold has another number of checkpoints than the region has members, two are the same file, or one is not
        read, does not fit, or contradicts its folder or the region. Nothing is registered then, and what was stays.
    """
    from dl4gam_assets.published import (
        PublishedFileError,
        adopt,
        channels_of,
        find_checkpoints,
        read_settings,
        read_weights,
    )

    found = find_checkpoints(path.expanduser().absolute())
    folds, members = ws.region.folds.n, ws.region.training.members
    by_fold: dict[int, list[Any]] = {}
    for one in found:
        by_fold.setdefault(one.split, []).append(one)
    if not set(by_fold) <= set(range(1, folds + 1)):
        raise PublishedFileError(f"{path} has splits {sorted(by_fold)}, the region has folds 1 to {folds} (folds.n)")
    for fold, ones in by_fold.items():
        if len(ones) != members:
            raise PublishedFileError(
                f"{path}: split_{fold} has {len(ones)} checkpoints, the region has {members} members (training.members)"
            )
    entries = []
    same: dict[str, Path] = {}
    for fold, ones in sorted(by_fold.items()):
        for member, one in enumerate(sorted(ones, key=lambda c: c.seed), start=1):
            model = read_settings(one.settings, split=one.split, seed=one.seed)
            channels = channels_of(model, one.settings or one.path, *([indices] if indices else []))
            sha256 = full_hash(one.path)
            if same.setdefault(sha256, one.path) != one.path:
                raise PublishedFileError(f"{one.path} is the same file as {same[sha256]}: members must differ")
            adopt(read_weights(one.path)[0], model, channels, ws.region.model, one.path)
            stated = isinstance((model.get("inputs") or {}).get("optical_indices"), list)
            entry = {
                "path": str(one.path), "name": f"split_{one.split}/seed_{one.seed}/{one.path.name}", "seed": one.seed,
                "sha256": sha256, "epoch": one.epoch, "validation_iou": one.validation_iou,
                "channels": channels, "order_stated": bool(stated or indices), "model": model,
            }  # fmt: skip
            entries.append((fold, member, json.loads(json.dumps(entry, default=str))))
    for fold, member, entry in entries:
        ws.storage.write_json(ws.storage.path("imports", "members", f"{fold}.{member}.json"), entry)
    removed = set()
    for file in ws.storage.path("imports", "members").glob("*.json"):
        fold, member = map(int, file.name.removesuffix(".json").split("."))
        if fold not in by_fold or member > members:
            file.unlink()
            removed.add(fold)
    return {
        "folds": sorted(by_fold), "members": members, "checkpoints": len(found),
        "set_aside": sum(one.set_aside for one in found), "removed": sorted(removed),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- cubes
def _file(manifest: Mapping[str, Any], glacier_id: str) -> Path:
    return Path(manifest["path"]) / manifest["glaciers"][glacier_id][0]


def _scene_id(manifest: Mapping[str, Any], glacier_id: str) -> str:
    """Name of an imported image: the published entry and file, which no other glacier shares."""
    return str(manifest["glaciers"][glacier_id][0]).removesuffix(".nc").replace("+", "_")


def candidate_of(site: Site, year: int, glacier_id: str) -> dict[str, Any]:
    """The published file of a glacier as its only candidate; runs in a worker process."""
    import netCDF4

    from dl4gam_assets.published import PublishedFileError

    manifest = _manifest(site, year)
    path = _file(manifest, glacier_id)
    try:
        checksum = full_hash(path)
        with netCDF4.Dataset(path) as file:
            raw = str(getattr(file, "fn", "")) or "unknown"
    except OSError as error:
        raise PublishedFileError(f"cube {path} can not be read: {' '.join(str(error).split())[:200]}") from error
    name = _scene_id(manifest, glacier_id)
    return {
        "glacier_id": glacier_id, "date": dt.datetime.fromisoformat(manifest["glaciers"][glacier_id][1]),
        "scene_ids": name, "hrefs": json.dumps({name: {"published cube": str(path)}}),
        "checksums": json.dumps({name: {"published cube": f"sha256:{checksum}"}}),
        "reason": f"published cube, made from the raw image {raw[:200]}",
    }  # fmt: skip


def _manifest(site: Site, year: int) -> dict[str, Any]:
    found = cubes_import(site.storage, year)
    if found is None:
        raise UpstreamError(f"no published cubes of {year} are registered: run dl4gam import-cubes")
    return found


def _cube(site: Site, year: int, glacier_id: str, attrs: dict[str, Any] | None = None) -> xr.Dataset:
    """A published file as a cube of ours, in memory."""
    from dl4gam_assets.published import read_published, to_cube

    manifest, region = _manifest(site, year), site.region
    data = read_published(_file(manifest, glacier_id), region.inventory.buffers_m, region.model.channels)
    mine = rows_of(cached_table(site, "glaciers"), glacier_id)
    return to_cube(
        data, glacier_id, dt.datetime.fromisoformat(manifest["glaciers"][glacier_id][1]),
        list(region.imagery.sensor.bands), region.inventory.buffers_m, pixel_m=region.imagery.sensor.pixel_m,
        outline=mine.geometry.to_crs(str(data.odc.geobox.crs)).iloc[0],
        area_km2=float(mine["inventory_area_km2"].iloc[0]), attrs=attrs,
    )  # fmt: skip


def ground_of(site: Site, year: int, glacier_id: str) -> dict[str, Any]:
    """Row of ``elevations`` from a published cube; runs in a worker process."""
    from dl4gam_assets.cubes import content_fingerprint
    from dl4gam_assets.cubes.files import YEARLY
    from dl4gam_assets.stages.terrain import ground_row

    cube = _cube(site, year, glacier_id)
    static = cube.drop_vars([n for n in YEARLY if n in cube and n != "mask"] + ["band"])
    return ground_row(static, glacier_id, content_fingerprint(static))


def change_of(site: Site, year: int, glacier_id: str) -> dict[str, Any]:
    """Row of ``elevation_changes`` from a published cube; runs in a worker process."""
    from dl4gam_assets.cubes import cube_mask
    from dl4gam_assets.terrain import match_period

    row: dict[str, Any] = {"glacier_id": glacier_id, "fingerprint": "none", "missing_share": 1.0}
    cube, terrain = _cube(site, year, glacier_id), site.region.terrain
    if "dhdt" not in cube:
        return row
    # The files do not say their period: it is the one that the region's settings have for the year.
    period = match_period(terrain.elevation_change, year, terrain.elevation_change_match)
    values = cube["dhdt"].to_numpy()
    here = values[cube_mask(cube, "glacier") & np.isfinite(values)]
    return row | {
        "fingerprint": fingerprint(values.tobytes().hex()), "missing_share": float(np.isnan(values).mean()),
        "dhdt_mean_m_per_year": float(here.mean()) if here.size else None,
        "period_start": None if period is None else period.start, "period_end": None if period is None else period.end,
    }  # fmt: skip


def cube_of(site: Site, year: int, glacier_id: str, wanted: str) -> dict[str, Any]:
    """Convert one published cube unless the file made from it is there; runs in a worker process."""
    from dl4gam_assets.cubes import content_fingerprint, cube_mask, open_cube, write_cube

    manifest, storage = _manifest(site, year), site.storage
    path = storage.cube(year, glacier_id)
    name = _scene_id(manifest, glacier_id)
    mine = None
    if path.exists():
        with absent_if_damaged(path), storage.reading(path) as local, open_cube(local) as found:
            if found.attrs.get("inputs") == wanted:
                mine = found.drop_vars("reflectance").load()
    if mine is None:
        about = {
            "year": year, "scene_ids": name, "sensor": site.region.imagery.sensor.name, "region": site.region.name,
            "tag": "imported", "inputs": wanted,
        }  # fmt: skip
        mine = _cube(site, year, glacier_id, about)
        mine.attrs["fingerprint"] = content_fingerprint(mine)
        with storage.writing(path) as temporary:
            write_cube(mine, temporary)
    near, bad = cube_mask(mine, "zone_20"), cube_mask(mine, "not_ok")
    if near.any() and bad[near].all():
        raise UpstreamError(f"the published image of {glacier_id} in {year} has no usable pixel on the glacier")

    def missing(layer: str) -> float | None:
        return float(np.isnan(mine[layer].to_numpy()).mean()) if layer in mine else None

    lacking = {name: missing(name) for name in ("dem", "dhdt", "v")}
    return {
        "glacier_id": glacier_id, "image_date": dt.datetime.fromisoformat(str(mine.attrs["image_date"])),
        "scene_ids": name, "fingerprint": mine.attrs["fingerprint"],
        "height_px": bad.shape[0], "width_px": bad.shape[1], "utm_epsg": int(mine.odc.geobox.crs.epsg),
        "not_ok_share": float(bad[near].mean()) if near.any() else 1.0,
        "dem_missing_share": 1.0 if lacking["dem"] is None else lacking["dem"],
        "dhdt_missing_share": 1.0 if lacking["dhdt"] is None else lacking["dhdt"],
        "velocity_missing_share": lacking["v"], "size_bytes": int(path.stat().st_size),
    }  # fmt: skip


def _assert_some(rows: Mapping[str, Any], failures: pd.DataFrame, year: int, manifest: Mapping[str, Any]) -> None:
    """An import of which nothing can be used must not replace what is there."""
    if not rows:
        first = f" (the first: {failures['error'].iloc[0]})" if len(failures) else ""
        raise UpstreamError(
            f"none of the {len(manifest['glaciers'])} published cubes of {year} in {manifest['path']} can be "
            f"used{first}: what was made before is left as it is"
        )


def _record(ws: Workspace, asset: str, label: str, manifest: Mapping[str, Any], ids: Iterable[str]) -> None:
    """Keep what the files behind a partition of terrain are, by glacier."""
    record_files(ws, asset, label, {_file(manifest, g): [g] for g in ids}, sampled_hash)


def _changed(ws: Workspace, asset: str, label: str) -> list[str]:
    return [str(file) for file in changed_files(ws, asset, label, sampled_hash)]


def scene_candidates(ws: Workspace, year: int, manifest: Mapping[str, Any], *, force: bool = False) -> StageResult:
    """The published files as candidates."""
    label = str(year)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        ids = sorted(manifest["glaciers"])
        start = time.perf_counter()
        rows, failures = ws.over_glaciers(
            "scene_candidates", label, candidate_of, [(g, (ws.site, year, g)) for g in ids]
        )
        _assert_some(rows, failures, year, manifest)
        frame = pd.DataFrame(list(rows.values()))
        ws.storage.write_table("candidates", frame, {"year": year})
        record_files(
            ws, "scene_candidates", label, {_file(manifest, g): [_scene_id(manifest, g)] for g in rows}, sampled_hash
        )
        metadata = {
            "imported": len(frame), "failed_glaciers": len(failures), "from": manifest["path"],
            "glaciers_per_minute": 60 * len(frame) / max(time.perf_counter() - start, 1e-6),
        }  # fmt: skip
        return frame_fingerprint(frame, ["hrefs"]), metadata, {}

    # The folder too: addresses, and the files that are watched, follow those that were moved. Nothing after them does.
    inputs = {
        "imported": manifest["fingerprint"], "folder": manifest["path"], "glaciers": ws.upstream("inventory_outlines"),
    }  # fmt: skip
    changed = _changed(ws, "scene_candidates", label)
    return run_stage(ws, "scene_candidates", label, inputs, work, force=force, changed=changed)


def refused_cubes(storage: Storage, year: int) -> tuple[int, pd.DataFrame]:
    """How many cubes of a year were converted, and the failures of those that were not: glacier_id, error."""
    manifest = cubes_import(storage, year)
    ids = set(manifest["glaciers"]) if manifest is not None else set()
    failures = storage.read_table("failures")
    mine = failures["stage"].isin(["scene_candidates", "glacier_cubes"]) & (failures["partition"] == str(year))
    refused = failures[mine & failures["glacier_id"].isin(ids)].drop_duplicates("glacier_id")
    there = set(storage.read_table("cubes", year=year)["glacier_id"])
    return len((ids & there) - set(refused["glacier_id"])), refused[["glacier_id", "error"]]


def selected_scenes(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """The only candidate of each glacier is the image used: the choice was made by those who published it."""
    label = str(year)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        scenes = ws.storage.read_table("candidates", year=year).drop(columns="year")
        scenes = scenes.assign(rank=1, selected=True)
        ws.storage.write_table("scenes", scenes, {"year": year})
        glaciers = ws.storage.read_table("glaciers")
        modelled = glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"]
        missing = sorted(set(modelled) - set(scenes["glacier_id"]))
        reason = f"no published cube of {year}"
        ws.write_failures("selected_scenes", label, [(g, reason, "NoImage") for g in missing])
        days = scenes["date"].dt.strftime("%Y-%m-%d").value_counts().sort_index()
        metadata = {
            "glaciers_with_image": len(scenes), "glaciers_without_image": len(missing),
            "dates": [{"date": day, "glaciers": int(n)} for day, n in days.items()],
        }  # fmt: skip
        return frame_fingerprint(ws.storage.read_table("scenes", year=year), ["hrefs"]), metadata, {}

    inputs = {"candidates": ws.upstream("scene_candidates", label), "imported": True}
    return run_stage(ws, "selected_scenes", label, inputs, work, force=force)


def elevation(ws: Workspace, manifest: Mapping[str, Any], *, force: bool = False) -> StageResult:
    """Elevation of each glacier, from the layers in the published cubes of the baseline year."""
    year = ws.region.years.baseline

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        ids = sorted(manifest["glaciers"])
        rows, failures = ws.over_glaciers("elevation", "all", ground_of, [(g, (ws.site, year, g)) for g in ids])
        _assert_some(rows, failures, year, manifest)
        ws.storage.write_table("elevations", pd.DataFrame(list(rows.values())))
        _record(ws, "elevation", "all", manifest, rows)
        stored = ws.storage.read_table("elevations")
        metadata = {
            "glaciers": len(stored), "failed_glaciers": len(failures), "source": "published cubes",
            "glaciers_without_elevation": int(stored["elevation_mean_m"].isna().sum()),
        }  # fmt: skip
        return frame_fingerprint(stored), metadata, {}

    inputs = {
        "imported": manifest["fingerprint"], "folder": manifest["path"], "glaciers": ws.upstream("inventory_outlines"),
        "buffers": ws.region.inventory.buffers_m, "pixel_m": ws.region.imagery.sensor.pixel_m,
    }  # fmt: skip
    return run_stage(ws, "elevation", "all", inputs, work, force=force, changed=_changed(ws, "elevation", "all"))


def elevation_change(ws: Workspace, year: int, manifest: Mapping[str, Any], *, force: bool = False) -> StageResult:
    """dh/dt of each glacier, from the layer in the published cubes."""
    label, terrain = str(year), ws.region.terrain

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        ids = sorted(manifest["glaciers"])
        rows, failures = ws.over_glaciers("elevation_change", label, change_of, [(g, (ws.site, year, g)) for g in ids])
        _assert_some(rows, failures, year, manifest)
        ws.storage.write_table("elevation_changes", pd.DataFrame(list(rows.values())), {"year": year})
        _record(ws, "elevation_change", label, manifest, rows)
        stored = ws.storage.read_table("elevation_changes", year=year)
        known = stored["dhdt_mean_m_per_year"].dropna()
        metadata = {
            "glaciers": len(stored), "failed_glaciers": len(failures), "source": "published cubes",
            "glaciers_without_dhdt": len(stored) - len(known),
            "mean_dhdt_m_per_year": float(known.mean()) if len(known) else None,
        }  # fmt: skip
        return frame_fingerprint(stored), metadata, {}

    inputs = {
        "imported": manifest["fingerprint"], "folder": manifest["path"], "elevation": ws.upstream("elevation"),
        "periods": [[p.start, p.end] for p in terrain.elevation_change], "match": terrain.elevation_change_match,
    }  # fmt: skip
    changed = _changed(ws, "elevation_change", label)
    return run_stage(ws, "elevation_change", label, inputs, work, force=force, changed=changed)


def glacier_cubes(ws: Workspace, year: int, manifest: Mapping[str, Any], *, force: bool = False) -> StageResult:
    """Published cubes as cubes of ours, checked file by file; those whose file is unchanged are left alone."""
    from dl4gam_assets.stages.cubes import cube_preview

    label = str(year)
    sensor = ws.region.imagery.sensor
    settings = {"bands": list(sensor.bands), "pixel_m": sensor.pixel_m, "buffers": ws.region.inventory.buffers_m}

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        scenes = ws.storage.read_table("scenes", year=year).set_index("glacier_id")
        tasks = []
        for glacier_id in sorted(set(scenes.index) & set(manifest["glaciers"])):
            wanted = fingerprint({"version": STAGE_VERSION, "file": scenes.at[glacier_id, "checksums"], **settings})
            tasks.append((glacier_id, (ws.site, year, glacier_id, wanted)))
        rows, failures = ws.over_glaciers("glacier_cubes", label, cube_of, tasks)
        _assert_some(rows, failures, year, manifest)
        frame = pd.DataFrame(list(rows.values()))
        ws.storage.write_table("cubes", frame, {"year": year})
        largest = frame.loc[(frame["height_px"] * frame["width_px"]).idxmax(), "glacier_id"]
        pictures = {"largest glacier": cube_preview(ws.site, year, str(largest))}
        metadata = {
            "glaciers": len(frame), "failed_glaciers": len(failures), "imported_from": manifest["path"],
            "mean_unusable_share": float(frame["not_ok_share"].mean()),
            "size_mb": round(float(frame["size_bytes"].sum()) / 1e6, 1),
        }  # fmt: skip
        return frame_fingerprint(frame[["glacier_id", "fingerprint"]]), metadata, pictures

    inputs = {
        "scenes": ws.upstream("selected_scenes", label), "static": ws.upstream("elevation"),
        "dhdt": ws.upstream("elevation_change", label), "imported": manifest["fingerprint"], **settings,
    }  # fmt: skip
    return run_stage(ws, "glacier_cubes", label, inputs, work, force=force)


def expect_not_imported(ws: Workspace) -> None:
    """A year of our own needs static layers of our own.

    Raises
    ------
    UpstreamError
        if the store's static layers came with imported cubes.
    """
    baseline = ws.region.years.baseline
    if cubes_import(ws.storage, baseline) is not None:
        raise UpstreamError(
            f"the cubes of {baseline} in this store are published ones, of another sensor level and grid: years of "
            "your own need a store of their own (another DL4GAM_HOME), or import their cubes too"
        )


# ---------------------------------------------------------------------------------------------------------- folds
def imported_folds(manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The table ``folds`` of an imported map."""
    return pd.DataFrame(manifest["rows"], columns=["glacier_id", "fold", "role"])


#: Validation glaciers on which the order of a checkpoint's indices is tried, and a difference of IoU that tells.
_TRIED_ON, _TELLING = 3, 0.01
#: A checkpoint that reaches less than this share of the IoU in its name, on glaciers that it was chosen on, is not it.
_OF_ITS_NAME = 0.5


def adopt_one(site: Site, fold: int, member: int, wanted: str) -> dict[str, Any]:
    """Make a member of a registered checkpoint and store it; runs in a worker process. Returns its row.

    Raises
    ------
    PublishedFileError
        if the checkpoint is another file than it was, does not fit, or its channels seem to be in another order.
    """
    import torch

    from dl4gam_assets.published import PublishedFileError, adopt, read_weights
    from dl4gam_assets.segmentation import TrainedMember, save_member

    storage, region = site.storage, site.region
    entry = member_import(storage, fold, member)
    if entry is None:
        raise UpstreamError(
            f"no checkpoint of fold {fold}, member {member} is registered: run dl4gam import-checkpoints"
        )
    path, begin = Path(entry["path"]), time.perf_counter()
    if not path.is_file() or full_hash(path) != entry["sha256"]:
        raise PublishedFileError(f"checkpoint {path} is gone or another file than it was: import it again")
    weights, facts = read_weights(path)
    state, proof = adopt(weights, entry["model"], entry["channels"], region.model, path)
    proof["validation_iou_by_order"] = _tried_orders(site, fold, weights, entry)
    statistics = storage.read_table("normalization", fold=fold)
    epoch = entry["epoch"] if entry["epoch"] is not None else facts.get("epoch")
    history = pd.DataFrame([{"epoch": epoch, "validation_iou": entry["validation_iou"]}])
    trained = TrainedMember(
        state, history, int(epoch or 0), float(entry["validation_iou"] or float("nan")), 0,
        sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor)), int(entry["seed"]),
    )  # fmt: skip
    extra = {"fingerprint": wanted, "imported": {k: entry[k] for k in ("name", "sha256", "channels")}, "golden": proof,
             "facts": facts}  # fmt: skip
    sha256 = save_member(storage, storage.model(fold, member), trained, region.model, statistics, extra)
    return {
        "seed": trained.seed, "sha256": sha256, "best_epoch": epoch, "validation_iou": entry["validation_iou"],
        "epochs": None, "train_patches": None, "parameters": trained.parameters, "fingerprint": wanted,
        "seconds": time.perf_counter() - begin, "encoder_weights": f"imported from {entry['name']}",
        "initial_sha256": None, "device": None, "precision": None, "history": history,
        "proof": {
            "imported_from": entry["name"], "checkpoint_sha256": entry["sha256"],
            "largest_difference_from_published_network": proof["largest_difference"],
            "published_channel_order": ", ".join(proof["channels"]),
            "golden_input_sha256": proof["input_sha256"], "golden_output_sha256": proof["output_sha256"],
            "golden_output_mean": proof["output_mean"],
            "golden_response": [{"channel": c, "response": r} for c, r in proof["response"].items()],
            **{f"validation_iou_with_{order}": v for order, v in proof["validation_iou_by_order"].items()},
        },
    }  # fmt: skip


def golden_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """What the forward pass on the golden input said, for the lineage: from a member's ``model.json``."""
    proof = model.get("golden")
    if not proof:
        return {}
    return {
        "golden input": f"sha256:{proof['input_sha256']}", "golden output": f"sha256:{proof['output_sha256']}",
        "mean of the golden output": str(proof["output_mean"]), "order of channels": ",".join(proof["channels"]),
        "response to each channel": json.dumps(proof["response"]),
    }  # fmt: skip


def _tried_orders(site: Site, fold: int, weights: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, float]:
    """IoU on some validation glaciers with each order of the indices that published code has had.

    Raises
    ------
    PublishedFileError
        if another order fits clearly better, or none comes near to the IoU in the checkpoint's name.
    """
    from dl4gam_assets.published import PublishedFileError, adopt
    from dl4gam_assets.segmentation import build_model

    triple = [c for c in entry["channels"] if c in {"ndvi", "ndwi", "ndsi"}]
    orders = [triple]
    if len(triple) == 3 and not entry["order_stated"]:
        orders += [o for o in (["ndvi", "ndwi", "ndsi"], ["ndsi", "ndvi", "ndwi"]) if o != triple]
    found = {}
    for order in orders:
        names = iter(order)
        channels = [next(names) if c in triple else c for c in entry["channels"]]
        state, _ = adopt(dict(weights), entry["model"], channels, site.region.model, entry["name"])
        model = build_model(site.region.model, pretrained=False)
        model.load_state_dict(state)
        found[",".join(c.upper() for c in order) or "none"] = round(_iou_on_validation(site, fold, model.eval()), 4)
    first, best = next(iter(found)), max(found, key=lambda k: found[k])
    if found[best] > found[first] + _TELLING:
        raise PublishedFileError(
            f"{entry['name']}: on validation glaciers its IoU is {found[first]:.3f} with the indices in the order "
            f"{first}, and {found[best]:.3f} with {best}: import it with --indices {best}"
        )
    stated = entry["validation_iou"]
    if stated and found[best] < _OF_ITS_NAME * stated:
        raise PublishedFileError(
            f"{entry['name']}: on validation glaciers its IoU is {found[best]:.3f} at best, and {stated:.3f} by its "
            "name: are the cubes, the folds and the normalization those that it was trained with?"
        )
    return found


def _iou_on_validation(site: Site, fold: int, model: Any) -> float:
    from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
    from dl4gam_assets.segmentation import member_logits, normalize
    from dl4gam_assets.stages.training import members_of

    storage, year = site.storage, site.region.years.baseline
    statistics = storage.read_table("normalization", fold=fold)
    both = either = 0
    for glacier_id in members_of(site, fold, "valid")[:_TRIED_ON]:
        with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
            stack, valid = channel_stack(cube, site.region.model.channels)
            ready = normalize(stack, site.region.model.channels, statistics)
            logits = next(iter(member_logits([model], ready, InferenceSettings(), "cpu")))
            here, truth = valid & cube_mask(cube, "zone_50"), cube_mask(cube, "any_glacier")
            made = (logits >= 0) & here
            both += int((made & truth).sum())
            either += int((made | (truth & here)).sum())
    return both / max(either, 1)


def normalization(ws: Workspace, fold: int, manifest: Mapping[str, Any], *, force: bool = False) -> StageResult:
    """The published normalization of a fold."""

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        frame = pd.DataFrame(manifest["rows"]).set_index("channel")
        lacking = [c for c in ws.region.model.channels if c not in frame.index]
        if lacking:
            raise UpstreamError(
                f"the imported normalization {manifest['file']} lacks {', '.join(lacking)}: import it again"
            )
        frame = frame.loc[ws.region.model.channels].reset_index()
        ws.storage.write_table("normalization", frame, {"fold": fold})
        rows = [
            {"channel": r.channel, "mean": round(float(r.mean), 5), "std": round(float(r.std), 5)}
            for r in frame.itertuples()
        ]
        return frame_fingerprint(frame), {"imported_from": manifest["file"], "channels": rows}, {}

    inputs = {
        "imported": manifest["sha256"], "folds": ws.upstream("cross_validation_folds"),
        "channels": ws.region.model.channels,
    }  # fmt: skip
    return run_stage(ws, "normalization", fold_label(fold), inputs, work, force=force)


# ---------------------------------------------------------------------------------------------------------- export
def export_one(site: Site, year: int, glacier_id: str, folder: str) -> str:
    """Write one cube in the published layout; runs in a worker process. Returns its file below ``folder``."""
    from dl4gam_assets.cubes import open_cube
    from dl4gam_assets.published import from_cube, write_published

    storage = site.storage
    area = float(rows_of(cached_table(site, "glaciers"), glacier_id)["inventory_area_km2"].iloc[0])
    with storage.reading(storage.cube(year, glacier_id)) as local, open_cube(local) as cube:
        data = from_cube(cube.load(), area)
        date = str(cube.attrs["image_date"])[:10]
    target = Path(folder) / safe_name(glacier_id) / f"{date}.nc"
    target.parent.mkdir(parents=True, exist_ok=True)
    with Storage(folder).writing(target) as temporary:
        write_published(data, temporary)
    return target.relative_to(folder).as_posix()


def export_published(ws: Workspace, year: int, folder: Path) -> dict[str, Any]:
    """Write a year's cubes, the fold map and the normalization tables in the published layout.

    Cubes go to ``glacier_wide/<year>/<glacier>/<date>.nc``, ``map_all_splits_all_folds.csv`` to ``cv_split_outlines``,
    and ``stats_agg_split_<i>.csv`` to ``norm_stats``.

    Returns
    -------
    ``cubes``, ``failed`` (texts), ``tables``

    Raises
    ------
    UpstreamError
        if the year has no cubes.
    """
    from dl4gam_assets.published import write_splits, write_statistics

    ids = ws.storage.read_table("cubes", year=year)["glacier_id"].tolist()
    if not ids:
        raise UpstreamError(f"glacier_cubes [{year}] is not there yet: materialize it first")
    place = folder / "glacier_wide" / str(year)
    place.mkdir(parents=True, exist_ok=True)

    def progress(done: int, total: int, seconds: float) -> None:
        ws.logger.info(f"export: {done} of {total} cubes, {60 * done / max(seconds, 1e-9):.0f} a minute")

    tasks = [(g, (ws.site, year, g, str(place))) for g in ids]
    results = list(ws.mapper.map(export_one, tasks, progress=progress))
    tables = 0
    folds = ws.storage.read_table("folds")
    if len(folds):
        target = folder / "cv_split_outlines" / "map_all_splits_all_folds.csv"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_splits(folds.assign(glacier_id=[safe_name(g) for g in folds["glacier_id"]]), target)
        tables += 1
    for fold in range(1, ws.region.folds.n + 1):
        statistics = ws.storage.read_table("normalization", fold=fold)
        if len(statistics):
            target = folder / "norm_stats" / f"stats_agg_split_{fold}.csv"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(statistics, target)
            tables += 1
    failed = [f"{r.key}: {r.error}" for r in results if not r.ok]
    return {"cubes": len(results) - len(failed), "failed": failed, "tables": tables}
