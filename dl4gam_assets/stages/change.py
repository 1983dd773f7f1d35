"""Stages of the group *change*."""

from __future__ import annotations

from typing import Any

from dl4gam_assets.stages import previews
from dl4gam_assets.stages.base import (
    StageResult,
    Workspace,
    fold_label,
    frame_fingerprint,
    run_stage,
    year_fold_label,
)


def _areas_fingerprints(ws: Workspace, year: int) -> dict[str, str | None]:
    folds = range(1, ws.region.folds.n + 1)
    return {fold_label(f): ws.upstream_or_none("glacier_areas", year_fold_label(year, f)) for f in folds}


def area_change(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Change of each glacier between the baseline and ``year``."""
    from dl4gam_assets.change import area_changes

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        baseline = ws.storage.read_table("baseline_areas")
        areas = ws.storage.read_table("areas", year=year)
        changes, excluded = area_changes(baseline, areas, ws.region.change)
        ws.storage.write_table("changes", changes, {"year": year})
        kind = "NoRate"
        is_baseline = year == ws.region.years.baseline
        rows = [] if is_baseline else [(str(r.glacier_id), str(r.reason), kind) for r in excluded.itertuples()]
        ws.write_failures("area_change", str(year), rows)
        metadata = {
            "glaciers": len(changes),
            "pass_quality_filter": int(changes["ok"].sum()) if len(changes) else 0,
            "without_rate": len(excluded),
            "median_rate_pct_per_year": float(changes["rate_pct_per_year"].median()) if len(changes) else None,
        }
        return frame_fingerprint(changes), metadata, {}

    inputs = {
        "areas": _areas_fingerprints(ws, year),
        "baseline": ws.upstream("baseline_areas"),
        "settings": ws.region.fingerprint("change"),
    }
    return run_stage(ws, "area_change", str(year), inputs, work, force=force)


def regional_change(ws: Workspace, year: int, *, force: bool = False) -> StageResult:
    """Totals of the year by region, country, size class and aspect."""
    from dl4gam_assets.change import regional_changes
    from dl4gam_assets.inventory import double_counted_km2

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        changes = ws.storage.read_table("changes", year=year)
        elevations = ws.storage.read_table("elevations").set_index("glacier_id")
        glaciers = ws.storage.read_table("glaciers")
        totals = regional_changes(
            changes=changes,
            glaciers=glaciers,
            areas=ws.storage.read_table("areas", year=year),
            settings=ws.region.change,
            year=year,
            baseline_year=ws.region.years.baseline,
            aspects=elevations["aspect_mean_deg"],
        )
        ws.storage.write_table("regional_changes", totals, {"year": year})
        metadata: dict[str, Any] = {}
        if ws.region.areas.shared_ground == "each":  # with "once" no ground is
            metadata["double_counted_km2"] = double_counted_km2(glaciers)
        for row in totals[totals["grouping"] == "region"].itertuples():
            metadata |= {
                f"{row.method}_area_km2": _number(row.area_km2),
                f"{row.method}_rate_pct_per_year": _number(row.rate_pct_per_year),
                f"{row.method}_rate_std_pct_per_year": _number(row.rate_std_pct_per_year),
            }
        everything = ws.storage.read_table("regional_changes")
        series = everything[
            (everything["grouping"] == "region")
            & (everything["method"] == "extrapolated")
            & (everything["year"] <= year)
            & everything["area_km2"].notna()
        ].sort_values("year")
        title = f"{ws.region.title}: all {int(totals['n_glaciers'].max())} glaciers, so many measured"
        pictures = {"area by year": previews.area_series(series, title)} if len(series) else {}
        return frame_fingerprint(totals), metadata, pictures

    inputs = {
        "changes": ws.upstream("area_change", str(year)),
        "areas": _areas_fingerprints(ws, year),
        "glaciers": ws.upstream("inventory_outlines"),
        "aspects": ws.upstream("elevation"),
        "version": 2,  # raised when the rules of totals change
        "settings": ws.region.fingerprint("change"),
    }
    return run_stage(ws, "regional_change", str(year), inputs, work, force=force)


def area_trends(ws: Workspace, *, force: bool = False) -> StageResult:
    """Trend of each glacier over all the years that are there."""
    from dl4gam_assets.change import area_trends as trends_of

    def work() -> tuple[str, dict[str, Any], dict[str, bytes]]:
        trends = trends_of(ws.storage.read_table("areas"), ws.region.change)
        ws.storage.write_table("trends", trends)
        least = ws.region.change.trend_min_years
        metadata: dict[str, Any] = {
            "glaciers": len(trends),
            "median_years": float(trends["n_years"].median()) if len(trends) else None,
            "median_trend_pct_per_year": float(trends["theil_sen_pct_per_year"].median()) if len(trends) else None,
            "odd_images": [
                {"glacier_id": r.glacier_id, "year": int(r.odd_year), "deviations_from_trend": float(r.odd_residual)}
                for r in trends.dropna(subset=["odd_residual"])
                .sort_values("odd_residual", key=lambda v: v.abs(), ascending=False)
                .head(10)
                .itertuples()
            ],
        }
        if not len(trends):
            metadata["why_none"] = f"no glacier has images of {least} years yet (change.trend_min_years)"
        return frame_fingerprint(trends), metadata, {}

    areas = {str(year): _areas_fingerprints(ws, year) for year in ws.region.years.all()}
    inputs = {"areas": areas, "settings": ws.region.fingerprint("change")}
    return run_stage(ws, "area_trends", "all", inputs, work, force=force)


def _number(value: Any) -> float | None:
    import pandas as pd

    return None if pd.isna(value) else float(value)
