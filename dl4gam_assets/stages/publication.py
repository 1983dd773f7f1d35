"""Stages of the group *publication*: the database, the year's report, the STAC catalog."""

from __future__ import annotations

from typing import Any

from dl4gam_assets.lineage.environment import settings_content
from dl4gam_assets.stages.base import (
    StageResult,
    Upstream,
    Workspace,
    fold_label,
    frame_fingerprint,
    run_stage,
    utc_now,
    year_fold_label,
)
from dl4gam_assets.storage import glacier_id_of

#: Every asset whose tables are in results.duckdb.
_IN_DATABASE = (
    "inventory_outlines", "debris_outlines", "glacier_zones", "cross_validation_folds", "elevation", "scene_candidates",
    "selected_scenes", "elevation_change", "glacier_cubes", "normalization", "ensemble_member", "calibration",
    "band_ratio_baseline", "glacier_predictions", "interval_taus", "evaluation", "glacier_areas", "baseline_areas",
    "glacier_outlines", "area_change", "regional_change", "area_trends",
)  # fmt: skip


def _states(ws: Workspace, *assets: str) -> dict[str, Upstream]:
    """Output fingerprints of all partitions of some assets that there are."""
    found = {}
    for asset in assets:
        folder = ws.storage.path("state", asset)
        for file in sorted(folder.glob("*.json"), key=str) if folder.exists() else []:
            label = glacier_id_of(file.stem)
            found[f"{asset}/{label}"] = ws.upstream(asset, label)
    return found


def _lineage(ws: Workspace, *years: int) -> dict[str, str]:
    """Hash of the lineage of each fold in some years (default: all): equal areas may come from something else."""
    found = {}
    folder = ws.storage.path("state", "glacier_areas")
    for file in sorted(folder.glob("*.json"), key=str) if folder.exists() else []:
        if not years or int(file.stem.split(".")[0]) in years:
            state = ws.storage.read_json(file) or {}
            found[file.stem] = str((state.get("metadata", {}).get("lineage") or {}).get("lineage"))
    return found


def _failures(ws: Workspace) -> str:
    return frame_fingerprint(ws.storage.read_table("failures"), ["time"])


def _words(ws: Workspace, *more: str) -> dict[str, Any]:
    """What is printed of the settings themselves, and of the program: results can be the same under another title."""
    from dl4gam_assets import __version__

    return {
        **settings_content(ws.region),
        "publication": ws.region.publication.model_dump(mode="json", include=set(more)),
        "version": __version__,
    }


def results_database(ws: Workspace, *, force: bool = False) -> StageResult:
    """Build results.duckdb from the tables and put it in place in one step."""
    from dl4gam_assets.publication import build_database

    path = ws.storage.path("results.duckdb")

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        counts = build_database(ws.storage, ws.region, path)
        metadata = {
            "rows": sum(counts.values()),
            "size_bytes": path.stat().st_size,
            "tables": [{"table": name, "rows": n} for name, n in sorted(counts.items())],
            "path": str(path),
        }
        return f"{utc_now().isoformat()}", metadata, {}

    inputs = {
        **_states(ws, *_IN_DATABASE),
        "lineage": _lineage(ws),
        "failures": _failures(ws),
        "printed": _words(ws, *type(ws.region.publication).model_fields),
    }
    return run_stage(ws, "results_database", "all", inputs, work, force=force or not path.exists())


def report(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Write the year's report."""
    from dl4gam_assets.publication import write_report

    path = ws.storage.path("reports", f"{year}.html")

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        with ws.storage.writing(path) as temporary:
            write_report(ws.storage, ws.region, year, temporary)
        return utc_now().isoformat(), {"path": str(path), "size_bytes": path.stat().st_size}, {}

    folds = range(1, ws.region.folds.n + 1)
    inputs = {
        "year": ws.upstream("regional_change", str(year)),
        "region": {y: ws.upstream_or_none("regional_change", str(y)) for y in range(ws.region.years.first, year + 1)},
        "outlines": ws.upstream("glacier_outlines", str(year)),
        "evaluation": {f: ws.upstream_or_none("evaluation", fold_label(f)) for f in folds},
        "calibration": {f: ws.upstream_or_none("calibration", fold_label(f)) for f in folds},
        "baseline": ws.upstream_or_none("baseline_areas"),
        "areas": {f: ws.upstream_or_none("glacier_areas", year_fold_label(year, f)) for f in folds},
        "changes": ws.upstream_or_none("area_change", str(year)),
        "lineage": _lineage(ws, year, ws.region.years.baseline),
        "printed": _words(ws, "report_glaciers"),
        "failures": _failures(ws),
    }
    return run_stage(ws, "report", str(year), inputs, work, force=force or not path.exists())


def stac_catalog(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Write the STAC catalog of the year's maps and outlines."""
    from dl4gam_assets.publication import write_stac

    folder = ws.storage.path("stac", f"year={year}")

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        items = write_stac(ws.storage, ws.region, year, folder)
        return utc_now().isoformat(), {"items": items, "path": str(folder / "catalog.json")}, {}

    folds = range(1, ws.region.folds.n + 1)
    inputs = {
        "outlines": ws.upstream("glacier_outlines", str(year)),
        "predictions": {f: ws.upstream_or_none("glacier_predictions", year_fold_label(year, f)) for f in folds},
        "areas": {f: ws.upstream_or_none("glacier_areas", year_fold_label(year, f)) for f in folds},
        "lineage": _lineage(ws, year),
        "printed": _words(ws, "license"),
    }
    return run_stage(ws, "stac_catalog", str(year), inputs, work, force=force or not (folder / "catalog.json").exists())
