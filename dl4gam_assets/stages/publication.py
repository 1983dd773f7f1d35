"""Stages of the group *publication*: the database, the year's report, the STAC catalog."""

from __future__ import annotations

from typing import Any

from dl4gam_assets.stages.base import (
    StageResult,
    Upstream,
    Workspace,
    fold_label,
    frame_fingerprint,
    is_unfinished,
    run_stage,
    utc_now,
    year_fold_label,
)


def _states(ws: Workspace, *assets: str) -> dict[str, Upstream]:
    """Output fingerprints of all partitions of some assets that there are."""
    found = {}
    for asset in assets:
        folder = ws.storage.path("state", asset)
        for file in sorted(folder.glob("*.json"), key=str) if folder.exists() else []:
            state = ws.storage.read_json(file)
            if state:
                found[f"{asset}/{file.name}"] = Upstream(
                    str(state["output"]), asset, file.name.removesuffix(".json"), unfinished=is_unfinished(state)
                )
    return found


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

    inputs: dict[str, Any] = _states(
        ws, "inventory_outlines", "selected_scenes", "glacier_cubes", "evaluation", "glacier_areas", "glacier_outlines",
        "area_change", "regional_change", "area_trends", "calibration",
    ) | {"leave_out": ",".join(sorted(ws.region.publication.leave_out))}  # fmt: skip
    return run_stage(ws, "results_database", "all", inputs, work, force=force or not path.exists())


def report(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Write the year's report."""
    from dl4gam_assets.publication import write_report

    path = ws.storage.path("reports", f"{year}.html")

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        with ws.storage.writing(path) as temporary:
            write_report(ws.storage, ws.region, year, temporary)
        return utc_now().isoformat(), {"path": str(path), "size_bytes": path.stat().st_size}, {}

    inputs = {
        "year": ws.upstream("regional_change", str(year)),
        "region": {y: ws.upstream_or_none("regional_change", str(y)) for y in range(ws.region.years.first, year + 1)},
        "outlines": ws.upstream("glacier_outlines", str(year)),
        "evaluation": {f: ws.upstream_or_none("evaluation", fold_label(f)) for f in range(1, ws.region.folds.n + 1)},
        "settings": ws.region.fingerprint("evaluation", "inventory", "title", "description"),
        "shown": ws.region.publication.report_glaciers,
        "failures": frame_fingerprint(ws.storage.read_table("failures"), ["time"]),
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
    }
    return run_stage(ws, "stac_catalog", str(year), inputs, work, force=force or not (folder / "catalog.json").exists())
