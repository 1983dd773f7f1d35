"""The report of a year: one HTML page that needs nothing but itself.

Belongs here: choosing from the tables what a reader should see, and saying plainly what it does not show.
Does not belong here: computing estimates; drawing (``figures``); markup (``templates/report.html``).
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from upath import UPath

from dl4gam_assets.publication.truth import truth_of_year
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Snapshot, Storage
from dl4gam_assets.tables import INTERVAL_RULES

PAPER = (
    "Diaconu, C.-A., Zekollari, H., and Bamber, J. L. (2025). Earth and Space Science, 12(9), e2025EA004197. "
    "https://doi.org/10.1029/2025EA004197"
)
#: Rows of the tables of glaciers and of failures that are shown.
SHOWN = 15
CLOSE_UPS = 6
_STATE = ("run_id", "code_version", "time", "output")
_METHOD_NAMES = {
    "extrapolated": "all glaciers (extrapolated)",
    "extrapolated_without_snr": "all glaciers, without the signal-to-noise filter",
    "measured": "measured glaciers, whatever their quality",
    "filtered": "measured glaciers that pass the quality filter",
}
_SCOPE_NAMES = {
    "scene": "whole scene (strict: false positives anywhere count)",
    "ring": "within 50 m of the outline (as in the DL4GAM paper; reads higher)",
    "debris": "debris-covered ice (recall only)",
    "reference": "whole scene, judged by a second inventory (other rules and dates)",
}
_FLAGS = {
    "snr": "the change is smaller than its own uncertainty",
    "recall": "too little of the inventory outline was found again in the inventory year",
    "cloud": "too little of the glacier was seen in one of the images",
    "filled": "too much of the map was filled from neighbouring pixels in one of the years",
    "growth": "the glacier grew by more than its uncertainty allows",
}


def write_report(storage: Storage, region: Region, year: int, path: UPath | os.PathLike[str]) -> None:
    """Write the report of ``year`` as one self-contained HTML file: no address in it leads out of it.

    Its only scripts are the map's (Leaflet and ours); the page's own policy allows these two by their hashes. Without
    scripts, and on paper, a drawn map stands in the map's place.

    Raises
    ------
    ValueError
        if the year has no regional totals yet.
    """
    storage.write_text(UPath(path), render(collect(storage, region, year)))


def render(content: dict[str, Any]) -> str:
    """HTML of what :func:`collect` gathered; everything that comes from data is escaped."""
    import jinja2

    from dl4gam_assets.publication.web_map import as_json

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda v, digits=0: number(None if _null(v) else 100 * float(v), digits)
    environment.filters["sentence"] = lambda v: v[:1].upper() + v[1:]
    environment.filters["day"] = lambda v: "" if _null(v) else f"{pd.Timestamp(v):%Y-%m-%d}"
    environment.filters["json_in_html"] = as_json
    text = (resources.files("dl4gam_assets.publication") / "templates" / "report.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(content)


def number(value: Any, digits: int = 2, signed: bool = False) -> str:
    """A figure for readers: true minus sign, an en dash where there is none."""
    if _null(value):
        return "–"
    text = f"{float(value):{'+' if signed else ''},.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def collect(storage: Storage, region: Region, year: int) -> dict[str, Any]:
    """Everything that the page shows, as plain values and image addresses."""
    from dl4gam_assets import __version__

    storage = Snapshot(storage)
    baseline_year = region.years.baseline
    regional = storage.read_table("regional_changes")
    regional = regional[regional["year"] <= year] if year >= baseline_year else regional[regional["year"] == year]
    mine = regional[regional["year"] == year]
    if mine.empty:
        raise ValueError(f"no regional totals of {year} for {region.name}: materialize regional_change first")
    totals = {r["method"]: r for r in mine[mine["grouping"] == "region"].to_dict("records")}
    glaciers = storage.read_table("glaciers")
    areas = storage.read_table("areas", year=year)
    changes = storage.read_table("changes", year=year)
    is_baseline = year == baseline_year
    largest = _largest(changes, glaciers, storage.read_table("areas"), year, region)
    closely = _closely(changes, glaciers, areas, region.publication.report_glaciers)
    told = list(dict.fromkeys([*(r["glacier_id"] for r in largest), *closely]))
    stories = _stories(storage, region, told, sorted({baseline_year, year}, reverse=True))
    return {
        "title": region.title or region.name,
        "region": region,
        "year": year,
        "baseline_year": baseline_year,
        "is_baseline": is_baseline,
        "tag": "simulated" if region.simulation is not None else str(getattr(region.imagery.catalog, "tag", "")),
        "note": region.evaluation.note,
        "totals": totals,
        "method_names": _METHOD_NAMES,
        "headline": _headline(totals, is_baseline),
        "counts": {
            "inventory": len(glaciers),
            "modelled": int(glaciers["modelled"].astype(bool).sum()),
            "measured": len(areas),
            "inventory_km2": float(glaciers["inventory_area_km2"].sum()),
        },
        "dates": _dates(areas),
        **_maps(storage, glaciers, areas, changes, year, baseline_year),
        **_series(regional, baseline_year),
        **_classes(mine, region),
        "countries": _countries(mine),
        "largest": largest,
        **_live_map(storage, glaciers, regional, year, baseline_year, closely, stories),
        "stories": stories,
        "anchors": {story["glacier_id"]: story["anchor"] for story in stories},
        "origin": _origin(storage, regional, year),
        "quality_origin": _origin_of_quality(storage, region),
        "quality": _quality(storage),
        "coverage": _coverage(storage, region),
        "known": truth_of_year(region, storage, year),
        "calibration": storage.read_table("calibration").drop_duplicates("fold").sort_values("fold").to_dict("records"),
        **_failures(storage, year),
        "exclusions": _exclusions(changes, region.change.filter),
        "paper": PAPER,
        "sources": _sources(region, areas),
        "fingerprint": region.fingerprint(),
        "version": __version__,
        "made": f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC",
    }


# --------------------------------------------------------------------------------------------- parts
def _null(value: Any) -> bool:
    return value is None or value is pd.NA or bool(pd.isna(value))


def _headline(totals: dict[str, dict[str, Any]], is_baseline: bool) -> dict[str, Any]:
    """The figure on top: extrapolated where it exists, otherwise measured; and what its interval lets one say."""
    for method in ("extrapolated", "measured"):
        row = totals.get(method)
        column = "area_km2" if is_baseline else "rate_pct_per_year"
        if row is None or _null(row[column]):
            continue
        out = {"method": method, "name": _METHOD_NAMES[method], "row": row, "verdict": ""}
        if not is_baseline and not _null(row["rate_std_pct_per_year"]):
            rate, std = float(row["rate_pct_per_year"]), float(row["rate_std_pct_per_year"])
            if abs(rate) <= std:
                out["verdict"] = "The interval contains zero: these figures do not show a change."
            elif abs(rate) <= 2 * std:
                out["verdict"] = "The change is more than one, but less than two standard deviations from zero."
        return out
    return {"method": None, "name": "", "row": None, "verdict": ""}


def _dates(areas: pd.DataFrame) -> dict[str, Any] | None:
    if areas.empty:
        return None
    days = areas["image_date"]
    return {"first": days.min(), "last": days.max(), "n": int(days.nunique())}


def _maps(
    storage: Storage, glaciers: Any, areas: pd.DataFrame, changes: pd.DataFrame, year: int, baseline_year: int
) -> dict[str, Any]:
    from dl4gam_assets.publication import figures

    out: dict[str, Any] = {"map": None, "close_ups": None, "close_up_names": []}
    if glaciers.empty:
        return out
    outlines = storage.read_table("outlines", year=year)
    now = outlines[outlines["bound"] == "best"]
    before = storage.read_table("outlines", year=baseline_year)
    before = before[before["bound"] == "best"]
    epsg = int(glaciers["utm_epsg"].mode().iloc[0])
    mapped = set(areas["glacier_id"].astype(str))
    out["map"] = figures.overview_map(glaciers, before, now, mapped, (baseline_year, year), epsg)
    if len(changes):
        sure = changes[changes["ok"].astype(bool)].assign(change=lambda f: f["area_km2"] - f["baseline_area_km2"])
        top = sure.nsmallest(CLOSE_UPS, "change")
        names = _names(glaciers)
        if len(top):
            titles = [
                f"{names.get(r.glacier_id) or r.glacier_id}: {number(r.change, 3, True)} km²" for r in top.itertuples()
            ]
            ids = top["glacier_id"].astype(str).tolist()
            upper = outlines[outlines["bound"] == "upper"]
            first, second, third = (f[f["glacier_id"].isin(ids)] for f in (before, now, upper))
            out["close_ups"] = figures.close_ups(ids, titles, first, second, third, epsg)
            out["close_up_names"] = titles
    return out


def _closely(changes: pd.DataFrame, glaciers: pd.DataFrame, areas: pd.DataFrame, n: int) -> list[str]:
    """Glaciers whose images the map shows: half by the size of their change, the others by their area."""
    measured = glaciers[glaciers["glacier_id"].isin(areas["glacier_id"])]
    by_area = measured.nlargest(n, "inventory_area_km2")["glacier_id"].astype(str).tolist()
    by_change: list[str] = []
    if len(changes):
        size = (changes["area_km2"] - changes["baseline_area_km2"]).abs()
        by_change = changes.loc[size.nlargest(-(-n // 2)).index, "glacier_id"].astype(str).tolist()
    return list(dict.fromkeys([*by_change, *by_area]))[:n]


def _live_map(
    storage: Storage,
    glaciers: Any,
    regional: pd.DataFrame,
    year: int,
    baseline_year: int,
    closely: list[str],
    stories: list[dict[str, Any]],
) -> dict[str, Any]:
    """Data, scripts and style of the map that can be moved, and the policy that allows these scripts."""
    from dl4gam_assets.publication import web_map

    if glaciers.empty:
        return {"live_map": None, "script_policy": "'none'"}
    years = sorted({baseline_year, year, *regional["year"].astype(int)})
    anchors = {story["glacier_id"]: story["anchor"] for story in stories}
    leaflet, style, ours = web_map.library()
    return {
        "live_map": {
            "data": web_map.map_data(storage, glaciers, years, baseline_year, year, closely, anchors),
            "leaflet": leaflet, "style": style, "script": ours,
        },
        "script_policy": f"{web_map.policy_hash(leaflet)} {web_map.policy_hash(ours)}",
    }  # fmt: skip


def _stories(storage: Storage, region: Region, ids: list[str], years: list[int]) -> list[dict[str, Any]]:
    """Where the numbers of some glaciers come from, the year's first. None of a glacier without lineage."""
    from dl4gam_assets.lineage import LineageError, explain
    from dl4gam_assets.lineage.page import explanation_fragment

    out = []
    for number_, glacier in enumerate(ids, start=1):
        parts = []
        name = ""
        for year in years:
            try:
                story = explain(storage, region, glacier, year)
            except LineageError:
                continue
            name = str(story.glacier.get("name") or "")
            parts.append({"year": year, "html": explanation_fragment(story)})
        if parts:
            out.append({"anchor": f"from-{number_}", "glacier_id": glacier, "name": name, "parts": parts})
    return out


def _origin(storage: Storage, regional: pd.DataFrame, year: int) -> list[dict[str, Any]]:
    """The partitions that the year's totals were made of, the last step first: asset, partition, run, version, time."""
    years = sorted({int(y) for y in regional["year"]} | {year}, reverse=True)
    wanted = [("regional_change", str(y)) for y in years] + [("area_change", str(year))]
    areas = storage.path("state", "glacier_areas")
    names = sorted(f.stem for f in areas.glob("*.json")) if areas.exists() else []
    wanted += [("glacier_areas", name) for name in names if name.split(".")[0] == str(year)]
    return _made(storage, wanted)


def _origin_of_quality(storage: Storage, region: Region) -> list[dict[str, Any]]:
    """The partitions behind scores, coverage and calibration."""
    folds = [f"fold_{f}" for f in range(1, region.folds.n + 1)]
    wanted = [(asset, fold) for asset in ("evaluation", "calibration", "interval_taus") for fold in folds]
    return _made(storage, [("baseline_areas", "all"), *wanted])


def _made(storage: Storage, wanted: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    out = []
    for asset, partition in wanted:
        state = storage.read_state(asset, partition)
        if state:
            out.append({"asset": asset, "partition": partition, **{k: state.get(k) for k in _STATE}})
    return out


def _names(glaciers: pd.DataFrame) -> dict[str, str]:
    return {str(g): str(n) for g, n in zip(glaciers["glacier_id"], glaciers["name"].fillna("").astype(str)) if n}


def _series(regional: pd.DataFrame, baseline_year: int) -> dict[str, Any]:
    from dl4gam_assets.publication import figures

    rows = regional[(regional["grouping"] == "region") & regional["method"].isin(["extrapolated", "measured"])]
    table = []
    for y, of_year in rows.groupby("year"):
        by_method = of_year.set_index("method")
        line: dict[str, Any] = {"year": int(y)}
        for method in ("extrapolated", "measured"):
            found = by_method.loc[method].to_dict() if method in by_method.index else {}
            line[method] = {k: found.get(k) for k in ("area_km2", "std_km2", "n_glaciers", "n_measured")}
        table.append(line)
    drawn = rows[rows["area_km2"].notna()]
    picture = figures.area_series(drawn, baseline_year) if drawn["year"].nunique() > 1 else None
    return {"series": table, "series_figure": picture, "series_trend": _series_trend(rows)}


def _series_trend(rows: pd.DataFrame) -> dict[str, Any] | None:
    """Theil-Sen slope of the region's extrapolated areas: one odd year does not turn it, as it may a two-year rate."""
    from dl4gam_assets.change.trends import theil_sen

    drawn = rows[(rows["method"] == "extrapolated") & rows["area_km2"].notna()].sort_values("year")
    if len(drawn) < 3:
        return None
    t, area = (drawn[c].to_numpy(dtype=float) for c in ("year", "area_km2"))
    slope = float(theil_sen(t[None], area[None])[0])
    start = float(np.median(area - slope * (t - t[0])))
    return {"km2": slope, "pct": 100 * slope / start if start > 0 else None, "n": len(drawn), "first": int(t[0])}


def _classes(mine: pd.DataFrame, region: Region) -> dict[str, Any]:
    from dl4gam_assets.change import size_class_labels
    from dl4gam_assets.publication import figures

    order = {label: i for i, label in enumerate(size_class_labels(region.change.size_class_edges_km2))}
    rows = mine[(mine["grouping"] == "size_class") & (mine["method"] == "extrapolated") & mine["area_km2"].notna()]
    if rows.empty:
        rows = mine[(mine["grouping"] == "size_class") & (mine["method"] == "measured") & mine["area_km2"].notna()]
    rows = rows.assign(label=rows["group"], order=rows["group"].map(order)).sort_values("order")
    if rows.empty:
        return {"classes": [], "classes_figure": None, "classes_method": ""}
    method = _METHOD_NAMES[str(rows["method"].iloc[0])]
    return {
        "classes": rows.to_dict("records"), "classes_figure": figures.size_classes(rows), "classes_method": method,
    }  # fmt: skip


def _countries(mine: pd.DataFrame) -> list[dict[str, Any]]:
    rows = mine[(mine["grouping"] == "country") & (mine["method"] == "extrapolated")]
    return rows.sort_values("area_km2", ascending=False).to_dict("records") if len(rows) > 1 else []


def _largest(
    changes: pd.DataFrame, glaciers: pd.DataFrame, areas: pd.DataFrame, year: int, region: Region
) -> list[dict[str, Any]]:
    """The largest changes, each with its robust trend over all images up to the year (null: fewer than three)."""
    from dl4gam_assets.change import area_trends

    if changes.empty:
        return []
    names = _names(glaciers)
    rows = changes.assign(
        change_km2=changes["area_km2"] - changes["baseline_area_km2"], name=changes["glacier_id"].map(names).fillna("")
    )
    rows = rows.reindex(rows["change_km2"].abs().sort_values(ascending=False, kind="stable").index)
    rows = rows.head(SHOWN)
    seen = areas[areas["glacier_id"].isin(rows["glacier_id"]) & (areas["year"] <= max(year, region.years.baseline))]
    trends = area_trends(seen, region.change).set_index("glacier_id")[["n_years", "theil_sen_pct_per_year"]]
    return rows.join(trends, on="glacier_id").to_dict("records")


def _quality(storage: Storage) -> list[dict[str, Any]]:
    """Held-out scores by scope: the ensemble first, baselines beside it."""
    from dl4gam_assets.change import pooled_scores

    pooled = pooled_scores(storage.read_table("evaluation"))
    out = []
    for scope in _SCOPE_NAMES:
        rows = pooled[pooled["scope"] == scope]
        rows = rows.assign(first=rows["method"] != "ensemble").sort_values(["first", "method"])
        if len(rows):
            out.append({"scope": scope, "name": _SCOPE_NAMES[scope], "rows": rows.to_dict("records")})
    return out


def _coverage(storage: Storage, region: Region) -> dict[str, Any] | None:
    """How many inventory areas lie inside their glacier's interval in the baseline year."""
    areas = storage.read_table("baseline_areas")
    areas = areas[areas["inventory_area_km2"].notna()]
    if areas.empty:
        return None
    inside = (areas["lower_km2"] <= areas["inventory_area_km2"]) & (areas["inventory_area_km2"] <= areas["upper_km2"])
    n = len(areas)
    share = float(inside.mean())
    known = areas["inventory_area_km2"]
    rules = {
        rule: float(known.between(areas[f"lower_{rule}_km2"], areas[f"upper_{rule}_km2"]).mean())
        for rule in INTERVAL_RULES
        if f"lower_{rule}_km2" in areas and areas[f"lower_{rule}_km2"].notna().all()
    }
    # Wilson's interval for one standard deviation: honest for shares near 0 and 1, where the usual one vanishes.
    middle = (share + 0.5 / n) / (1 + 1 / n)
    half = float(np.sqrt(share * (1 - share) / n + 0.25 / n**2)) / (1 + 1 / n)
    return {
        "inside": int(inside.sum()), "n": n, "share": share, "target": region.calibration.coverage,
        "low": max(middle - half, 0.0), "high": min(middle + half, 1.0), "rules": rules,
    }  # fmt: skip


def _failures(storage: Storage, year: int) -> dict[str, Any]:
    """Failures of this year and those that no year owns (inventory, folds)."""
    failures = storage.read_table("failures")
    part = failures["partition"].astype(str)
    own = part.str.match(rf"^{year}(\.|$)") | ~part.str.match(r"^\d{4}(\.|$)")
    # Glaciers without a rate are no failure of the method; they are told among the exclusions.
    no_rate = failures[own & (failures["stage"] == "area_change")]
    failed = failures[own & (failures["stage"] != "area_change")]
    by_stage = failed.groupby("stage")["glacier_id"].nunique().sort_values(ascending=False)
    return {
        "failures": failed.sort_values(["stage", "glacier_id"]).to_dict("records"),
        "failures_by_stage": [(str(s), int(n)) for s, n in by_stage.items()],
        "no_rate": [(str(r), int(n)) for r, n in no_rate["error"].value_counts().items()],
    }


def _exclusions(changes: pd.DataFrame, used: Sequence[str]) -> list[dict[str, Any]]:
    """Measured glaciers with a quality flag, by flag."""
    out = []
    flags = changes["flags"].fillna("").str.split(",")
    for flag, meaning in _FLAGS.items():
        hit = flags.map(lambda own, flag=flag: flag in own).astype(bool)
        if hit.any():
            out.append(
                {
                    "flag": flag,
                    "meaning": meaning,
                    "excluded": flag in used,
                    "n": int(hit.sum()),
                    "area_km2": float(changes.loc[hit, "baseline_area_km2"].sum()),
                }
            )
    return out


def _sources(region: Region, areas: pd.DataFrame) -> list[tuple[str, str]]:
    out = [("Method", PAPER)]
    if region.inventory.source:
        out.append(("Inventory", region.inventory.source))
    sensor = region.imagery.sensor.name
    if "sentinel-2" in sensor.lower() and region.simulation is None:
        when = "" if areas.empty else f" {int(areas['image_date'].dt.year.min())}"
        out.append(("Imagery", f"{sensor}; contains modified Copernicus Sentinel data{when}"))
    else:
        out.append(("Imagery", f"{sensor}{', simulated' if region.simulation is not None else ''}"))
    if region.terrain.dem_source:
        out.append(("Elevation", region.terrain.dem_source))
    if region.terrain.elevation_change_source:
        out.append(("Elevation change", region.terrain.elevation_change_source))
    return out
