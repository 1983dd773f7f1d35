"""The tables of the paper under its definitions, and what each of our corrections moves.

Belongs here: quality of the maps and regional rates from finished tables. Does not belong here: printing, the store.
Source: Diaconu et al. 2025, doi:10.1029/2025EA004197.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dl4gam_assets.change import area_changes, regional_changes
from dl4gam_assets.settings import AreaSettings, ChangeSettings

#: What the paper states of the Alps, 2015 to 2023 (inventory of Paul et al. 2020); the preprint gave another deviation.
PAPER = {
    "region": "alps", "from": 2015, "to": 2023, "glaciers": 1593, "area_km2": 1684.7,
    "rate_pct_per_year": -1.90, "rate_std_pct_per_year": 1.26, "earlier_rate_std_pct_per_year": 0.71,
    "filtered_glaciers": "about 900", "filtered_share_of_area": "about 70 %",
}  # fmt: skip
#: Debris recall is of glaciers with more than this share of debris (the paper's).
DEBRIS_SHARE = 0.01
#: Choices of the published code: whole years, both filters, fully dependent errors between glaciers.
AS_PUBLISHED: dict[str, Any] = {
    "dates": "whole_years", "snr_min": 1.0, "recall_min": 0.9, "filter": ["snr", "recall"],
    "between_glacier_correlation": 1.0, "correlation_length_km": None,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One correction: what it changes in the published choices."""

    name: str
    change: Mapping[str, Any] = field(default_factory=dict)
    intervals: str = "published"


STEPS = (
    Step("as published"),
    Step("dates of the images, not whole years", {"dates": "decimal_years"}),
    Step("small changes kept (no signal-to-noise filter)", {"filter": ["recall"]}),
    Step("no quality filter", {"filter": []}),
    Step("also without clouded, filled and growing", {"filter": ["snr", "recall", "cloud", "filled", "growth"]}),
    Step("errors of glaciers independent", {"between_glacier_correlation": 0.0}),
    Step("errors that correlate over 30 km", {"correlation_length_km": 30.0}),
    Step("conformal intervals", intervals="conformal"),
)
_METHODS = ("measured", "filtered", "extrapolated")


def regional_rates(
    baseline: pd.DataFrame, areas: pd.DataFrame, glaciers: pd.DataFrame, settings: ChangeSettings, year: int,
    baseline_year: int, measured: AreaSettings | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Regional rates with the published choices, with each correction alone, and with the region's own settings.

    Parameters
    ----------
    baseline, areas : rows of the tables ``baseline_areas`` and ``areas`` of ``year``
    glaciers : the table ``glaciers``
    settings : the region's; what no step changes is taken from it (size classes)
    measured : how the region measures areas; where that is not the published way, the first step's name says so, since
        no setting of change can undo it

    Returns
    -------
    DataFrame with step, method (``measured``: before filters, ``filtered``, ``extrapolated``: all), n_glaciers,
    left_out (glaciers without an interval of the step's rule, in either year), share_of_area (of the inventory),
    baseline_area_km2, area_km2, rate_km2_per_year, rate_pct_per_year, rate_std_pct_per_year, and moves_rate, moves_std:
    the differences from ``as published`` of that method. Steps whose intervals no glacier has are left out.
    """
    rows = []
    published = settings.model_copy(update=AS_PUBLISHED)
    steps = [(s, published.model_copy(update=dict(s.change))) for s in STEPS]
    steps.append((Step("all together: the region's settings", intervals="own"), settings))
    for step, choice in steps:
        (before, lost), (after, lost_after) = (_with_intervals(frame, step.intervals) for frame in (baseline, areas))
        changes, _ = area_changes(before, after, choice)
        if not len(changes):
            continue
        left_out = len(lost | lost_after)
        totals = regional_changes(changes, glaciers, after, choice, year, baseline_year)
        totals = totals[totals["grouping"] == "region"].set_index("method")
        for method in _METHODS:
            if method in totals.index:
                row = totals.loc[method]
                told = {"step": step.name, "method": method, "left_out": left_out}
                rows.append(told | {name: row[name] for name in _COLUMNS})
    out = pd.DataFrame(rows, columns=["step", "method", "left_out", *_COLUMNS])
    inventory = float(glaciers["inventory_area_km2"].sum())
    out["share_of_area"] = out["baseline_area_km2"].astype(float) / inventory
    first = out[out["step"] == STEPS[0].name].set_index("method")
    for name, column in (("moves_rate", "rate_pct_per_year"), ("moves_std", "rate_std_pct_per_year")):
        reference = out["method"].map(first[column].astype(float)) if len(first) else np.nan
        out[name] = out[column].astype(float) - reference
    other = not_as_published(measured)
    if other:
        out["step"] = out["step"].replace(STEPS[0].name, f"{STEPS[0].name}, but with {other}")
    return out


def not_as_published(measured: AreaSettings | None) -> str:
    """In words, how a region measures areas otherwise than published; empty where it does not."""
    if measured is None:
        return ""
    words = ["fractional pixels"] if measured.pixels != "whole" else []
    words += ["shared ground counted once"] if measured.shared_ground != "each" else []
    return " and ".join(words)


_COLUMNS = [
    "n_glaciers", "baseline_area_km2", "area_km2", "rate_km2_per_year", "rate_pct_per_year", "rate_std_pct_per_year",
]  # fmt: skip


def _with_intervals(areas: pd.DataFrame, which: str) -> tuple[pd.DataFrame, set[str]]:
    """Areas with the intervals of a rule in place of those that the region uses, and the glaciers that have none."""
    if which == "own":
        return areas, set()
    lower, upper = (
        areas[name].astype(float) if name in areas else pd.Series(np.nan, index=areas.index)
        for name in (f"lower_{which}_km2", f"upper_{which}_km2")
    )
    there = lower.notna() & upper.notna()
    found = areas.assign(lower_km2=lower, upper_km2=upper, std_km2=(upper - lower) / 2)[there]
    return found, set(areas.loc[~there, "glacier_id"].astype(str))


def map_quality(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Quality of the maps of glaciers that the models did not see, under both definitions.

    ``paper``: false positives count within 50 m of the outline only, each glacier alone, then the mean over glaciers
    (Diaconu et al. 2025). ``whole image``: every valid pixel of the glacier's cell. Both are also given with glaciers
    weighted by their area.

    Parameters
    ----------
    evaluation : rows of the table ``evaluation``

    Returns
    -------
    DataFrame with method, definition, n_glaciers, iou, precision, recall, f1 (means over glaciers), iou_by_area, and
    debris_recall (mean over glaciers with more than 1 % debris; the same under both definitions)
    """
    tested = evaluation[evaluation["role"] == "test"]
    rows = []
    for method, mine in tested.groupby("method", sort=True):
        covered = (mine["scope"] == "debris") & (mine["debris_share"].astype(float) > DEBRIS_SHARE)
        debris = mine.loc[covered, "recall"].mean()
        for scope, definition in (("ring", "paper"), ("scene", "whole image")):
            part = mine[mine["scope"] == scope].dropna(subset=["iou"])
            if len(part):
                weights = part["inventory_area_km2"].astype(float)
                means = {m: float(part[m].mean()) for m in ("iou", "precision", "recall", "f1")}
                rows.append(
                    {"method": method, "definition": definition, "n_glaciers": len(part), **means,
                     "iou_by_area": float(np.average(part["iou"].astype(float), weights=weights)),
                     "debris_recall": float(debris)}
                )  # fmt: skip
    columns = ["method", "definition", "n_glaciers", "iou", "precision", "recall", "f1", "iou_by_area", "debris_recall"]
    return pd.DataFrame(rows, columns=columns)


def area_quality(areas: pd.DataFrame) -> pd.DataFrame:
    """Areas of a year as the paper sums them: within 20 m of the outline, standard deviations added linearly.

    Parameters
    ----------
    areas : rows of the table ``areas`` of one year

    Returns
    -------
    One row: n_glaciers, inventory_area_km2, area_km2, area_std_km2 (published intervals where there are), recall (of
    the inventory's area), false_positive_rate (mean over glaciers, 20 to 50 m), debris_km2, debris_recall (of the
    debris-covered area of glaciers with more than 1 % debris), inside (share of glaciers whose interval holds the
    inventory's area; meant for the inventory year), without_interval (glaciers that have no published interval, and are
    not in the deviation nor in that share; where no glacier has one, the region's own intervals are used)
    """
    interval, lost = _with_intervals(areas, "published")
    if not len(interval):
        interval, lost = areas, set()
    inventory = areas["inventory_area_km2"].astype(float)
    with_debris = areas["debris_km2"].astype(float) > DEBRIS_SHARE * inventory
    found = (areas["debris_recall"].astype(float) * areas["debris_km2"].astype(float))[with_debris].sum()
    debris = float(areas["debris_km2"].astype(float)[with_debris].sum())
    outline = interval["inventory_area_km2"].astype(float)
    inside = (interval["lower_km2"] - 1e-9 <= outline) & (outline <= interval["upper_km2"] + 1e-9)
    return pd.DataFrame(
        [
            {
                "n_glaciers": len(areas), "inventory_area_km2": float(inventory.sum()),
                "area_km2": float(areas["area_km2"].sum()), "area_std_km2": float(interval["std_km2"].sum()),
                "recall": float((areas["recall"].astype(float) * inventory).sum() / inventory.sum())
                if len(areas) else np.nan,
                "false_positive_rate": float(areas["false_positive_rate"].mean()), "debris_km2": debris,
                "debris_recall": float(found / debris) if debris > 0 else np.nan,
                "inside": float(inside.mean()) if len(interval) else np.nan, "without_interval": len(lost),
            }
        ]
    )  # fmt: skip
