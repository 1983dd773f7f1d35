"""One estimate made again from its recorded inputs, in an empty store.

Belongs here: copying what was recorded (outlines, weights, calibration, tau), making layers, cube, map and area of one
glacier anew, and comparing each step. Does not belong here: training (weights are inputs of an estimate), why two
stores disagree (``lineage.compare``).

The scene files, tiles of elevation and dh/dt are read again from where they are now, so a changed file shows as the
first step that differs.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from dl4gam_assets.compute import choose_device
from dl4gam_assets.lineage import LineageError, Provenance
from dl4gam_assets.lineage.environment import hardware_class, recorded_settings, settings_difference, software
from dl4gam_assets.lineage.sources import plain_row
from dl4gam_assets.settings import Region
from dl4gam_assets.stages import published
from dl4gam_assets.stages.base import Workspace, fold_label
from dl4gam_assets.stages.files import changed_files, sampled_hash
from dl4gam_assets.storage import Storage

#: Another class of hardware, precision or version of a library rounds otherwise. There, within these, the result counts
#: as the same: 99.9th percentile of the map's differences (probability), and of the areas in percent, or in km2 where
#: that is more (a few pixels of 10 m: percents of almost nothing say nothing). On the same class, with the same
#: versions, only the same bits are the same.
MAP_TOLERANCE = 0.02
AREA_TOLERANCE_PCT = 0.2
AREA_TOLERANCE_KM2 = 0.0005


class Compared(BaseModel):
    """One step: as it was recorded, as it came out again, and whether it is the same or within the tolerance."""

    step: str
    recorded: str
    again: str
    same: bool
    within: bool


class Reproduction(BaseModel):
    """An estimate made again. ``verdict``: ``same bits``, ``same within tolerances`` or ``different``."""

    glacier_id: str
    year: int
    verdict: str
    steps: list[Compared]
    notes: list[str]
    seconds: float
    store: str | None


def reproduce(ws: Workspace, glacier_id: str, year: int, keep: Path | None = None) -> Reproduction:
    """Make an estimate again in an empty store and compare. ``keep``: a folder for that store (default: temporary).

    Raises
    ------
    LineageError
        if there is no such estimate, or an input that it was made from is no longer in the store (weights, calibration,
        the candidate image).
    FileExistsError
        if ``keep`` is not empty.
    """
    start = time.perf_counter()
    provenance = _provenance(ws.storage, glacier_id, year)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise FileExistsError(f"{keep} is not empty: name a new folder")
        steps, notes = _again(ws, provenance, keep)
    else:
        with tempfile.TemporaryDirectory(prefix="dl4gam-") as folder:
            steps, notes = _again(ws, provenance, Path(folder))
    reasons = _other_software(ws.storage, provenance) + _other_hardware(ws, provenance)
    return Reproduction(
        glacier_id=glacier_id, year=year, verdict=verdict(steps, exact=not reasons), steps=steps,
        notes=[*notes, *reasons],
        seconds=round(time.perf_counter() - start, 1), store=None if keep is None else str(keep),
    )  # fmt: skip


def verdict(steps: list[Compared], *, exact: bool) -> str:
    """``same bits``, ``same within tolerances`` or ``different``; ``exact``: nothing explains other bits."""
    if all(step.same for step in steps):
        return "same bits"
    return "same within tolerances" if not exact and all(step.within for step in steps) else "different"


def _provenance(storage: Storage, glacier_id: str, year: int) -> Provenance:
    rows = storage.read_table("lineage", year=year)
    rows = rows[rows["glacier_id"] == glacier_id]
    if not len(rows):
        raise LineageError(f"there is no estimate of {glacier_id} in {year}; `dl4gam explain` says why")
    return Provenance.model_validate(plain_row(rows.iloc[0]))


def _region(ws: Workspace, p: Provenance) -> tuple[Region, list[str]]:
    """The settings that the estimate was made with."""
    if ws.region.fingerprint() == p.settings_fingerprint:
        return ws.region, []
    recorded = recorded_settings(ws.storage, p.settings_fingerprint)
    if recorded is None:
        return ws.region, ["the settings of the estimate were not recorded: those of now are used"]
    apart = {"data_root", "compute", "publication"}
    present = ws.region.model_dump(mode="json", include=apart)
    region = Region.model_validate({**recorded, **present})
    changed = settings_difference(recorded, json.loads(ws.region.model_dump_json(exclude=apart)))
    return region, [f"made with the recorded settings; {len(changed)} are others now ({', '.join(list(changed)[:5])})"]


def _again(ws: Workspace, p: Provenance, folder: Path) -> tuple[list[Compared], list[str]]:
    from dl4gam_assets.stages.areas import area_of
    from dl4gam_assets.stages.cubes import cube_of
    from dl4gam_assets.stages.predictions import prediction_of
    from dl4gam_assets.stages.terrain import elevation_change_of, static_of

    region, notes = _region(ws, p)
    # A name of its own, so that nothing kept in this process for the other store is taken for this one's.
    scratch = Storage(folder / region.name)
    scratch.root.mkdir(parents=True, exist_ok=True)
    here = dataclasses.replace(ws, region=region, storage=scratch)
    signatures = _copy_inputs(ws, here, p)
    notes += [
        str(file) for file in changed_files(ws, "scene_candidates", str(p.year), sampled_hash, gone=True)
        if not set(file.labels).isdisjoint(p.scene_ids.split("+"))
    ]  # fmt: skip
    g, year, fold, site = p.glacier_id, p.year, p.fold, here.site

    imported = published.cubes_import(scratch, year) is not None
    if imported:
        notes.append("the cube was imported: it is converted again from the published file")
        static = published.ground_of(site, region.years.baseline, g)
    else:
        static, trouble = static_of(site, g, signatures["dem"], signatures["velocity"])
        if trouble is not None:
            notes.append(f"elevation: {trouble[1]}")
    scratch.write_table("elevations", pd.DataFrame([static]))
    if imported:
        dhdt = published.change_of(site, year, g)
    else:
        dhdt = elevation_change_of(site, year, g, signatures["dhdt"], signatures["dhdt error"])
    scratch.write_table("elevation_changes", pd.DataFrame([dhdt]), {"year": year})
    if imported:
        cube = published.cube_of(site, year, g, "reproduced")
    else:
        cube = cube_of(site, year, g, "reproduced", p.scene_ids)
    scratch.write_table("cubes", pd.DataFrame([cube]), {"year": year})
    mapped = prediction_of(site, year, fold, g, p.prediction_fingerprint, choose_device(ws.device), None)
    scratch.write_table("predictions", pd.DataFrame([mapped]), {"year": year, "fold": fold})
    area = area_of(site, year, fold, g)

    before = ws.storage.read_table("areas", year=year, fold=fold)
    row = before[before["glacier_id"] == g].iloc[0]
    steps = [_hash("masks and terrain", p.static_fingerprint, static["fingerprint"]),
             _hash("elevation change", p.dhdt_fingerprint, dhdt["fingerprint"]),
             _hash("glacier cube", p.cube_fingerprint, cube["fingerprint"])]  # fmt: skip
    steps = [s for s in steps if s is not None]
    steps.append(_maps(ws.storage, scratch, p))
    for name in ("area_km2", "lower_km2", "upper_km2"):
        steps.append(_number(name.replace("_km2", " (km2)"), row[name], area[name]))
    steps.append(_number("tau", row["tau"], area["tau"]))
    return [s for s in steps if s is not None], notes


def _copy_inputs(ws: Workspace, here: Workspace, p: Provenance) -> dict[str, str | None]:
    """Bring what was recorded into the empty store; returns the signatures of the indices of tiles."""
    from dl4gam_assets.stages.imagery import index_path
    from dl4gam_assets.stages.terrain import _DEM_TILES, _VELOCITY_TILES, _dhdt_tiles
    from dl4gam_assets.terrain import TileIndex, match_period

    old, new, year, fold = ws.storage, here.storage, p.year, p.fold
    if ws.region.simulation is not None:  # the inputs of a simulated region lie in its store
        Path(str(new.inputs())).symlink_to(Path(str(old.inputs())).absolute(), target_is_directory=True)
    for manifest in (published.cubes_import(old, y) for y in {year, ws.region.years.baseline}):
        if manifest is not None:
            new.write_json(new.path("imports", "cubes", f"{manifest['year']}.json"), manifest)
    for name in ("glaciers", "zones", "debris", "folds"):
        new.write_table(name, old.read_table(name))
    scenes = old.read_table("scenes", year=year)
    image = scenes[(scenes["glacier_id"] == p.glacier_id) & (scenes["scene_ids"] == p.scene_ids)]
    if not len(image):
        raise LineageError(
            f"{p.scene_ids}, the image of {p.glacier_id} in {year}, is no candidate any more: its scenes were searched "
            "again; `dl4gam explain` tells what was recorded"
        )
    image = image.head(1).drop(columns="year").assign(selected=True)
    new.write_table("scenes", image, {"year": year})
    for name in ("calibration", "normalization", "taus"):
        new.write_table(name, old.read_table(name, fold=fold).drop(columns="fold"), {"fold": fold})
    wanted = set(p.member_sha256.split(","))
    there = set(new.read_table("calibration", fold=fold)["sha256"])
    if wanted != there:
        raise LineageError(
            f"the ensemble of fold {fold} was trained again since {p.glacier_id} was mapped in {year}: the weights "
            "behind the estimate are no longer in the store; `dl4gam diff` compares it with another store"
        )
    if str(ws.upstream("calibration", fold_label(fold))) != p.calibration_fingerprint:
        raise LineageError(f"fold {fold} was calibrated again since {p.glacier_id} was mapped in {year}")
    folder = old.path("models", f"fold={fold}")
    numbers = [int(m) for m in new.read_table("calibration", fold=fold)["member"]]
    names = ["ensemble.json", *(f"member={m:02d}/model.{end}" for m in numbers for end in ("json", "safetensors"))]
    for name in names:
        _copy_file(folder.joinpath(*name.split("/")), new.path("models", f"fold={fold}", *name.split("/")))
    index = index_path(ws.site, year)
    if index.exists():
        _copy_file(index, index_path(here.site, year))
    signatures: dict[str, str | None] = {"dem": None, "velocity": None, "dhdt": None, "dhdt error": None}
    parts: dict[str, tuple[str, ...]] = {"dem": _DEM_TILES, "velocity": _VELOCITY_TILES}
    terrain = here.region.terrain
    period = match_period(terrain.elevation_change, year, terrain.elevation_change_match)
    if period is not None:
        parts |= {"dhdt": _dhdt_tiles(period)}
        if period.error_path is not None:
            parts |= {"dhdt error": _dhdt_tiles(period, True)}
    for name, place in parts.items():
        file = old.path(*place)
        if file.exists():
            _copy_file(file, new.path(*place))
            signatures[name] = TileIndex.from_json(file.read_text(encoding="utf-8")).signature
    return signatures


def _copy_file(source: Any, target: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _other_software(storage: Storage, p: Provenance) -> list[str]:
    rows = storage.read_table("software", fingerprint=p.software_fingerprint) if p.software_fingerprint else None
    known = {} if rows is None else dict(zip(rows["package"], rows["version"], strict=True))
    now = software()
    changed = [f"{k} {v} instead of {known[k]}" for k, v in now.items() if k in known and known[k] != v]
    return [f"other versions than recorded: {', '.join(changed)}"] if changed else []


def _other_hardware(ws: Workspace, p: Provenance) -> list[str]:
    sources = ws.storage.read_table("lineage_sources", year=p.year, fold=p.fold)
    machine = sources.loc[sources["kind"] == "hardware", "name"].tolist()
    here = hardware_class(choose_device(ws.device))
    if not machine or machine[0] == here:
        return []
    return [f"recorded on {machine[0]}, made again on {here}: bits may differ, see the tolerances"]


def _hash(step: str, recorded: str | None, again: str) -> Compared | None:
    if recorded is None:
        return None
    # Whether a difference matters shows in the steps after it.
    return Compared(step=step, recorded=recorded, again=again, same=recorded == again, within=True)


def _maps(old: Storage, new: Storage, p: Provenance) -> Compared:
    from dl4gam_assets.ensemble import read_prediction

    maps = []
    for storage in (old, new):
        with storage.reading(storage.prediction(p.year, p.glacier_id)) as local:
            maps.append(read_prediction(local))
    step = "map (mean and deviation)"
    if maps[0]["mean"].shape != maps[1]["mean"].shape:
        shapes = [str(m["mean"].shape) for m in maps]
        return Compared(step=step, recorded=shapes[0], again=shapes[1], same=False, within=False)
    off = np.concatenate([np.abs(maps[0][n] - maps[1][n]).ravel() for n in ("mean", "std")])
    same = all(np.array_equal(maps[0][n], maps[1][n], equal_nan=True) for n in ("mean", "std"))
    known = off[np.isfinite(off)]
    far = float(np.quantile(known, 0.999)) if known.size else 0.0
    text = "same pixels" if same else f"{far:.4f} (99.9th percentile of the differences), {known.max():.4f} at most"
    return Compared(step=step, recorded="", again=text, same=same, within=same or far <= MAP_TOLERANCE)


def _number(step: str, recorded: float, again: float) -> Compared:
    off = abs(again - recorded)
    return Compared(
        step=step, recorded=f"{recorded:.6f}", again=f"{again:.6f}", same=bool(recorded == again),
        within=bool(off <= max(AREA_TOLERANCE_KM2, abs(recorded) * AREA_TOLERANCE_PCT / 100)),
    )  # fmt: skip
