"""Ranking candidates, overrides, the choice.

Belongs here: both published rankings, the override file, reasons in words.
Does not belong here: scores.
"""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from dl4gam_assets.settings import SelectionSettings, SettingsError
from dl4gam_assets.tables import TABLES


def obstacles(frame: pd.DataFrame, settings: SelectionSettings) -> pd.Series:
    """Why each candidate is not acceptable, in words; null where it is: readable, and within the thresholds."""
    words = []
    unreadable = frame["reason"] if "reason" in frame else [None] * len(frame)
    unknown = frame["ndsi"].isna() & frame["albedo"].isna()
    columns = (unreadable, frame["coverage"], frame["cloud_share"], unknown)
    for broken, coverage, cloud, scoreless in zip(*columns, strict=True):
        found = []
        if isinstance(broken, str) and broken:
            found.append(broken)
        else:
            if not coverage >= settings.coverage_min:  # also where it is missing
                found.append(_beyond("coverage", coverage, "below", settings.coverage_min))
            if not cloud <= settings.cloud_max:
                found.append(_beyond("cloud share", cloud, "above", settings.cloud_max))
            if not found and scoreless:
                found.append(f"fewer than {settings.min_clean_pixels} clean pixels, so no score")
        words.append("; ".join(found) or None)
    return pd.Series(words, index=frame.index, dtype=object)


def _beyond(name: str, value: float, side: str, limit: float) -> str:
    if pd.isna(value):
        return f"{name} unknown"
    digits = next(d for d in (2, 4, 17) if d == 17 or f"{value:.{d}f}" != f"{limit:.{d}f}")
    return f"{name} {value:.{digits}f} {side} {limit:.{digits}f}"


def rank_candidates(frame: pd.DataFrame, settings: SelectionSettings) -> pd.DataFrame:
    """Rank the acceptable candidates of each glacier; 1 is best.

    ``rank_positions`` (Alps code): the positions in cloud share and in NDSI (both rounded to 2 decimals, equal values
    share a position) are averaged; ties go to the lower albedo.
    ``min_max`` (modular code): cloud share, NDSI and albedo are scaled to [0, 1] within the candidates, where equal all
    are 0, and averaged with ``settings.weights`` (equal ones by default); ties go to the lower albedo.
    The order of the rows never matters.

    Where no candidate of a glacier has an NDSI (no SWIR band, or no ice-free ground to see), albedo stands for it, and
    ties go to the lower cloud share: albedo has been counted then, and what is dark may be shadow. Cloud shares that
    exceed the lowest by less than ``settings.fallback_cloud_tolerance`` count as the lowest then: without SWIR, cloud
    is often shadow found by brightness, and a few pixels more of wet ice must not outweigh a glacier full of snow.

    A candidate that lacks a score that another has comes after all those that have it, whatever its other scores.
    Remaining ties go to the lower cloud share, the lower NDSI and the earlier date, so that a candidate that is nowhere
    better and somewhere worse than another (dominated) never wins. One without NDSI and albedo is not acceptable.

    Returns
    -------
    The frame with the columns ``rank`` (null: not acceptable), ``score`` (lower is better) and ``obstacle`` (why it is
    not acceptable).
    """
    out = frame.reset_index(drop=True)
    out["rank"] = pd.Series(pd.NA, index=out.index, dtype="Int64")
    out["score"] = np.nan
    out["obstacle"] = obstacles(out, settings)
    for _, mine in out[out["obstacle"].isna()].groupby("glacier_id", sort=False):
        cloud, ndsi, albedo = (mine[c].astype(float) for c in ("cloud_share", "ndsi", "albedo"))
        fallback = bool(ndsi.isna().all())
        judged = _apart(cloud, settings.fallback_cloud_tolerance) if fallback else cloud
        if settings.ranking == "rank_positions":
            score = _mean_of([_position(judged), _position(albedo if fallback else ndsi)])
        else:
            w = settings.weights
            parts = [(judged, w.cloud), *([] if fallback else [(ndsi, w.ndsi)]), (albedo, w.albedo)]
            score = _mean_of([_scaled(metric) for metric, _ in parts], [weight for _, weight in parts])
        first, second = (cloud, albedo) if fallback else (albedo, cloud)
        order = pd.DataFrame(
            {
                "lacking": 2 * ndsi.isna().astype(int) + albedo.isna().astype(int),
                "score": score,
                "first": first.fillna(np.inf),
                "second": second.fillna(np.inf),
                "third": ndsi.fillna(np.inf),
                "date": mine["date"],
            }
        ).sort_values(["lacking", "score", "first", "second", "third", "date"])
        out.loc[order.index, "rank"] = np.arange(1, len(order) + 1)
        out.loc[order.index, "score"] = order["score"]
    return out


def _position(metric: pd.Series) -> pd.Series:
    """Position among the candidates after rounding, 1 is lowest; equal ones share it, missing ones are last."""
    return metric.round(2).rank(method="min", na_option="bottom")


def _apart(cloud: pd.Series, tolerance: float) -> pd.Series:
    """Cloud shares, where those that exceed the lowest by less than the tolerance are the lowest."""
    return cloud.where(cloud - cloud.min() >= tolerance, cloud.min())


def _scaled(metric: pd.Series) -> pd.Series:
    """Scaled to [0, 1] among the candidates; 0 where all are equal, 1 where missing."""
    low, span = metric.min(), metric.max() - metric.min()
    scaled = (metric - low) / span if span > 0 else metric * 0.0
    return scaled.fillna(1.0)


def _mean_of(parts: list[pd.Series], weights: list[float] | None = None) -> pd.Series:
    """Weighted mean; of equal weights where there are none, or all are 0."""
    if weights is None or not any(weights):
        weights = [1.0] * len(parts)
    weighted = [part * weight for part, weight in zip(parts, weights, strict=True)]
    return sum(weighted[1:], weighted[0]) / sum(weights)


def select_scenes(frame: pd.DataFrame, year: int, overrides: pd.DataFrame | None = None) -> pd.DataFrame:
    """Choose the best candidate of each glacier, and say of each candidate why.

    Override rows (glacier_id, year, date) win: a date chooses that candidate even if it misses the thresholds, unless
    it can not be read; ``reject`` (a null date) leaves the glacier without an image in that year. A glacier without an
    acceptable candidate has no selected row.

    Parameters
    ----------
    frame : from :func:`rank_candidates`

    Returns
    -------
    Rows of the table ``scenes`` (without the year).
    """
    names = [c.name for c in TABLES["scenes"].columns if c.name != "year"]
    if not len(frame):
        return TABLES["scenes"].empty().drop(columns="year")
    mine = None if overrides is None else overrides[overrides["year"] == year].set_index("glacier_id")["date"]
    parts = []
    for glacier_id, group in frame.groupby("glacier_id", sort=True):
        forced = mine is not None and glacier_id in mine.index
        date = mine[glacier_id] if mine is not None and forced else None
        parts.append(_choose(group.sort_values("date").copy(), date, forced))
    return pd.concat(parts, ignore_index=True).reindex(columns=names)


def _choose(group: pd.DataFrame, date: pd.Timestamp | None, forced: bool) -> pd.DataFrame:
    ranked = int(group["rank"].notna().sum())
    group["selected"] = (group["rank"] == 1).fillna(False).astype(bool)
    readable = ~group["coverage"].isna()
    words = [_words(row, ranked) for _, row in group.iterrows()]
    if not forced:
        group["reason"] = [f"selected: {w}" if s else w for s, w in zip(group["selected"], words, strict=True)]
        return group
    if pd.isna(date):
        wanted = pd.Series(False, index=group.index)
        verdict = "override: no image of this year is used"
    else:
        wanted = group["date"].dt.normalize() == pd.Timestamp(date)
        verdict = f"override: {pd.Timestamp(date):%Y-%m-%d} was asked for"
        if not wanted.any():
            verdict += ", but no scene of that day was found"
    group["selected"] = wanted & readable
    group["reason"] = [
        (f"selected: override by the user ({w})" if can_be else f"override: asked for, but {w}")
        if is_wanted
        else f"{verdict} ({w})"
        for is_wanted, can_be, w in zip(wanted, readable, words, strict=True)
    ]
    return group


def _words(row: pd.Series, ranked: int) -> str:
    def number(value: object) -> str:
        return "unknown" if pd.isna(value) else f"{float(value):.2f}"  # type: ignore[arg-type]

    obstacle = row.get("obstacle")
    if isinstance(obstacle, str) and obstacle:
        return obstacle
    if pd.isna(row["rank"]):
        return "not acceptable"
    stated = row.get("snow_score")
    kind = "ndsi" if pd.isna(stated) else str(stated)
    snow = f"NDSI {number(row['ndsi'])}" if kind == "ndsi" else f"{kind} {number(row['albedo'])}, no NDSI"
    return f"rank {int(row['rank'])} of {ranked} (cloud {number(row['cloud_share'])}, {snow})"


def read_overrides(
    path: Path, glaciers: pd.DataFrame, years: Collection[int], baseline_year: int | None = None
) -> pd.DataFrame:
    """The override file: columns glacier_id, year, date, where date is ISO or ``reject``. Every line is checked.

    Parameters
    ----------
    path : CSV, UTF-8
    glaciers : the table ``glaciers``, or at least its glacier_id
    years : years of the region
    baseline_year : the one whose images may be of another calendar year, since they follow the inventory's dates

    Returns
    -------
    DataFrame with glacier_id, year (int) and date (Timestamp, NaT for reject).

    Raises
    ------
    SettingsError
        naming the file, the line and what is wrong.
    """
    if not path.is_file():
        raise SettingsError(f"override file {path} does not exist (imagery.selection.overrides)")
    known = set(glaciers["glacier_id"])
    modelled = set(glaciers.loc[glaciers["modelled"].astype(bool), "glacier_id"]) if "modelled" in glaciers else known
    rows: list[tuple[str, int, pd.Timestamp]] = []
    problems: list[str] = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"override file {path} is not UTF-8 ({error}): save it as CSV UTF-8") from error
    with io.StringIO(text, newline="") as handle:
        reader = csv.DictReader(handle)
        missing = {"glacier_id", "year", "date"} - set(reader.fieldnames or [])
        if missing:
            raise SettingsError(f"override file {path}: columns {sorted(missing)} are missing in the first line")
        seen: set[tuple[str, int]] = set()
        for line in reader:
            glacier, year_text, date_text = ((line[k] or "").strip() for k in ("glacier_id", "year", "date"))
            where = f"line {reader.line_num}"
            if None in line:
                problems.append(f"{where}: more values than columns")
                continue
            if glacier not in known:
                problems.append(f"{where}: glacier {glacier!r} is not in the inventory")
                continue
            if glacier not in modelled:
                problems.append(f"{where}: glacier {glacier!r} is not modelled, so it has no images to choose from")
                continue
            if not year_text.isdigit() or int(year_text) not in years:
                problems.append(f"{where}: year {year_text!r} is not one of the region")
                continue
            try:
                date = pd.NaT if date_text.lower() == "reject" else pd.Timestamp(dt.date.fromisoformat(date_text))
            except ValueError:
                problems.append(f"{where}: date {date_text!r} is neither YYYY-MM-DD nor 'reject'")
                continue
            if not pd.isna(date) and date.year != int(year_text) and int(year_text) != baseline_year:
                problems.append(f"{where}: date {date_text} is not in the year {year_text}")
                continue
            if (glacier, int(year_text)) in seen:
                problems.append(f"{where}: {glacier} has two lines for {year_text}")
                continue
            seen.add((glacier, int(year_text)))
            rows.append((glacier, int(year_text), date))
    if problems:
        raise SettingsError(f"override file {path}:\n  " + "\n  ".join(problems[:20]))
    return pd.DataFrame(rows, columns=["glacier_id", "year", "date"])
