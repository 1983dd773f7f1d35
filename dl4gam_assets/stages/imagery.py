"""Stages of the group *imagery*: candidates with scores, and the choice."""

from __future__ import annotations

import datetime as dt
import functools
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from dl4gam_assets.settings import StacApi, StacFolder
from dl4gam_assets.stages.base import (
    Site,
    StageResult,
    Workspace,
    cached_table,
    file_fingerprint,
    folder_fingerprint,
    frame_fingerprint,
    run_stage,
)
from dl4gam_assets.tables import TABLES


@functools.lru_cache(maxsize=4)
def _catalog(site: Site, stamp: str) -> Any:
    from dl4gam_assets.imagery import open_catalog

    imagery = site.region.imagery
    return open_catalog(imagery.catalog, site.data_root, imagery.sensor)


def catalog_of(site: Site, stamp: str = "") -> Any:
    """The region's imagery catalog, opened once a process (and again when ``stamp`` changes)."""
    return _catalog(site, stamp)


def catalog_fingerprint(ws: Workspace, year: int) -> str:
    """Identity of what a search in the catalog can find now."""
    catalog = ws.region.imagery.catalog
    if isinstance(catalog, StacFolder):
        if ws.region.simulation is not None:
            return ws.upstream("simulated_inputs")
        return folder_fingerprint((ws.data_root / catalog.path).parent, "*.json")
    if isinstance(catalog, StacApi):
        # The past does not change; a season that is not over may still get scenes.
        season_end = dt.date.fromisoformat(f"{year}-{ws.region.imagery.window[1]}") + dt.timedelta(days=30)
        open_season = dt.date.today() <= season_end
        return f"{catalog.url} {dt.date.today()}" if open_season else catalog.url
    return folder_fingerprint(ws.data_root / catalog.path, "*.tif")


def candidates_of(site: Site, year: int, glacier_id: str, stamp: str) -> pd.DataFrame:
    """Candidate rows of one glacier and year; runs in a worker process."""
    from dl4gam_assets.imagery import candidates_of_glacier

    glaciers = cached_table(site, "glaciers")
    glacier = glaciers[glaciers["glacier_id"] == glacier_id].iloc[0]
    zones = cached_table(site, "zones")
    return candidates_of_glacier(
        glacier,
        glaciers,
        zones[zones["glacier_id"] == glacier_id],
        catalog_of(site, stamp),
        site.region,
        year,
    )


def scene_candidates(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Score every scene of the season over each modelled glacier."""
    label = str(year)
    catalog = catalog_fingerprint(ws, year)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        ids = glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"].tolist()
        frames, failures = ws.over_glaciers(
            "scene_candidates", label, candidates_of, [(g, (ws.site, year, g, catalog)) for g in ids]
        )
        found = [f for f in frames.values() if len(f)]
        frame = pd.concat(found, ignore_index=True) if found else TABLES["candidates"].empty()
        frame["year"] = year
        frame = frame[[c.name for c in TABLES["candidates"].columns if c.name in frame]]
        ws.storage.write_table("candidates", frame, {"year": year})
        metadata = {
            "candidates": len(frame),
            "dates": int(frame["date"].nunique()),
            "glaciers_with_candidates": int(frame["glacier_id"].nunique()),
            "glaciers": len(ids),
            "failed_glaciers": len(failures),
            "median_cloud_share": _median(frame["cloud_share"]),
        }
        return frame_fingerprint(frame), metadata, {}

    inputs = {
        "glaciers": ws.upstream("inventory_outlines"),
        "zones": ws.upstream("glacier_zones"),
        "catalog": catalog,
        "settings": ws.region.imagery.model_dump(mode="json"),
        "years": ws.region.years.baseline == year,
    }
    return run_stage(ws, "scene_candidates", label, inputs, work, force=force)


def selected_scenes(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Rank the candidates, apply the overrides and keep the best scene of each glacier."""
    from dl4gam_assets.imagery import rank_candidates, read_overrides, select_scenes

    label = str(year)
    selection = ws.region.imagery.selection
    override_file = _override_file(ws)

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        glaciers = ws.storage.read_table("glaciers")
        candidates = ws.storage.read_table("candidates", year=year)
        overrides = None
        if override_file is not None:
            overrides = read_overrides(override_file, glaciers, ws.region.years.all())
        scenes = select_scenes(rank_candidates(candidates, selection), year, overrides)
        ws.storage.write_table("scenes", scenes, {"year": year})
        scenes = ws.storage.read_table("scenes", year=year)
        chosen = scenes[scenes["selected"].astype(bool)]
        modelled = glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"]
        missing = sorted(set(modelled) - set(chosen["glacier_id"]))
        ws.write_failures("selected_scenes", label, [(g, _no_image(scenes, g, year), "NoImage") for g in missing])
        days = chosen["date"].dt.strftime("%Y-%m-%d").value_counts().sort_index()
        metadata = {
            "glaciers_with_image": len(chosen),
            "glaciers_without_image": len(missing),
            "candidates": len(scenes),
            "mean_cloud_share": _mean(chosen["cloud_share"]),
            "mean_ndsi_of_surroundings": _mean(chosen["ndsi"]),
            "dates": [{"date": day, "glaciers": int(n)} for day, n in days.items()],
            "overrides": 0 if overrides is None else len(overrides),
        }
        return frame_fingerprint(scenes), metadata, {}

    inputs = {
        "candidates": ws.upstream("scene_candidates", label),
        "selection": selection.model_dump(mode="json"),
        "overrides": file_fingerprint(override_file) if override_file is not None else None,
    }
    return run_stage(ws, "selected_scenes", label, inputs, work, force=force)


def _override_file(ws: Workspace) -> Path | None:
    """The override file of the region: below data_root, or shipped with the package (``package:NAME``)."""
    name = ws.region.imagery.selection.overrides
    if name is None:
        return None
    if name.startswith("package:"):
        return Path(str(resources.files("dl4gam_assets") / "regions" / name.removeprefix("package:")))
    return ws.data_root / name


def _no_image(scenes: pd.DataFrame, glacier_id: str, year: int) -> str:
    mine = scenes[scenes["glacier_id"] == glacier_id]
    if not len(mine):
        return f"no scene of {year} touches the glacier in the search window; widen imagery.window or add scenes"
    reasons = "; ".join(f"{r.date:%Y-%m-%d}: {r.reason}" for r in mine.sort_values("date").head(4).itertuples())
    return (
        f"none of {len(mine)} scenes of {year} is acceptable ({reasons}); add an override line to use one all the same"
    )


def _median(values: pd.Series) -> float | None:
    clean = values.dropna()
    return float(clean.median()) if len(clean) else None


def _mean(values: pd.Series) -> float | None:
    clean = values.dropna()
    return float(clean.mean()) if len(clean) else None
