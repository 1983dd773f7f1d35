"""Ranking candidates, overrides, the choice.

Belongs here: both published rankings, the override file, reasons in words.
Does not belong here: scores.
"""

from __future__ import annotations

import csv
import datetime as dt
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from dl4gam_assets.settings import SelectionSettings, SettingsError
from dl4gam_assets.tables import TABLES


def acceptable(frame: pd.DataFrame, settings: SelectionSettings) -> pd.Series:
    """Whether each candidate keeps the thresholds of coverage and cloud, and could be read."""
    readable = frame["reason"].isna() if "reason" in frame else pd.Series(True, index=frame.index)
    return (
        readable
        & (frame["coverage"].astype(float) >= settings.coverage_min)
        & (frame["cloud_share"].astype(float) <= settings.cloud_max)
    )


def rank_candidates(frame: pd.DataFrame, settings: SelectionSettings) -> pd.DataFrame:
    """Rank the acceptable candidates of each glacier; 1 is best.

    ``rank_positions`` (Alps code): the positions in cloud share and in NDSI (both rounded to 2 decimals, equal values
    share a position) are averaged; ties go to the lower albedo, then to the earlier date.
    ``min_max`` (modular code): cloud share, NDSI and albedo are scaled to [0, 1] within the candidates and averaged.
    Where no candidate of a glacier has an NDSI, albedo stands for it. A missing score counts as the worst, so it can
    never win over one that is there.

    Returns
    -------
    The frame with the columns ``rank`` (null: not acceptable) and ``score`` (lower is better).
    """
    out = frame.reset_index(drop=True)
    out["rank"] = pd.Series(pd.NA, index=out.index, dtype="Int64")
    out["score"] = np.nan
    if not len(out):
        return out
    good = out[acceptable(out, settings)]
    for _, mine in good.groupby("glacier_id", sort=False):
        score = _scores(mine, settings)
        albedo = mine["albedo"].astype(float).fillna(np.inf)
        order = pd.DataFrame({"score": score, "albedo": albedo, "date": mine["date"]}).sort_values(
            ["score", "albedo", "date"]
        )
        out.loc[order.index, "rank"] = np.arange(1, len(order) + 1)
        out.loc[order.index, "score"] = order["score"]
    return out


def _scores(mine: pd.DataFrame, settings: SelectionSettings) -> pd.Series:
    cloud, ndsi, albedo = (mine[c].astype(float) for c in ("cloud_share", "ndsi", "albedo"))
    snow = ndsi if ndsi.notna().any() else albedo
    if settings.ranking == "rank_positions":
        positions = [s.round(2).rank(method="min", na_option="bottom") for s in (cloud, snow)]
        return sum(positions[1:], positions[0]) / len(positions)
    metrics = [cloud, ndsi, albedo] if ndsi.notna().any() else [cloud, albedo]
    scaled = []
    for metric in metrics:
        span = metric.max() - metric.min()
        scaled.append(((metric - metric.min()) / span if span > 0 else metric * 0.0).fillna(1.0 + 1e-6))
    return sum(scaled[1:], scaled[0]) / len(scaled)


def select_scenes(frame: pd.DataFrame, year: int, overrides: pd.DataFrame | None = None) -> pd.DataFrame:
    """Choose the best candidate of each glacier, and say of each candidate why.

    Override rows (glacier_id, year, date) win: a date chooses that candidate even if it misses the thresholds,
    ``reject`` (a null date) leaves the glacier without an image in that year. A glacier without an acceptable candidate
    has no selected row.

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
        parts.append(_choose(group.sort_values("date").copy(), mine[glacier_id] if forced else None, forced))
    return pd.concat(parts, ignore_index=True)[names]


def _choose(group: pd.DataFrame, date: pd.Timestamp | None, forced: bool) -> pd.DataFrame:
    ranked = int(group["rank"].notna().sum())
    group["selected"] = (group["rank"] == 1).fillna(False).astype(bool)
    unreadable = group["reason"] if "reason" in group else pd.Series(None, index=group.index)
    group["reason"] = [
        str(broken) if isinstance(broken, str) and broken else _words(row, ranked)
        for broken, (_, row) in zip(unreadable, group.iterrows(), strict=True)
    ]
    if forced:
        wanted = (
            pd.Series(False, index=group.index) if pd.isna(date) else group["date"].dt.normalize() == pd.Timestamp(date)
        )
        verdict = "override: no image of this year is used" if pd.isna(date) else "override: another date was asked for"
        if not pd.isna(date) and not wanted.any():
            verdict = f"override: {pd.Timestamp(date):%Y-%m-%d} was asked for, but no scene of that day was found"
        group["reason"] = [
            f"selected: override by the user ({r})" if w else f"{verdict} ({r})"
            for w, r in zip(wanted, group["reason"], strict=True)
        ]
        group["selected"] = wanted
    return group


def _words(row: pd.Series, ranked: int) -> str:
    def number(value: object) -> str:
        return "unknown" if pd.isna(value) else f"{float(value):.2f}"  # type: ignore[arg-type]

    scores = f"cloud {number(row['cloud_share'])}, NDSI {number(row['ndsi'])}, albedo {number(row['albedo'])}"
    if pd.isna(row["rank"]):
        return f"not acceptable: coverage {number(row['coverage'])}, {scores}"
    if int(row["rank"]) == 1:
        return f"selected: rank 1 of {ranked} ({scores})"
    return f"rank {int(row['rank'])} of {ranked} ({scores})"


def read_overrides(path: Path, glaciers: pd.DataFrame, years: Collection[int]) -> pd.DataFrame:
    """The override file: columns glacier_id, year, date, where date is ISO or ``reject``. Every line is checked.

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
    rows: list[tuple[str, int, pd.Timestamp]] = []
    problems: list[str] = []
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        missing = {"glacier_id", "year", "date"} - set(reader.fieldnames or [])
        if missing:
            raise SettingsError(f"override file {path}: columns {sorted(missing)} are missing in the first line")
        seen: set[tuple[str, int]] = set()
        for number, line in enumerate(reader, start=2):
            glacier, year_text, date_text = ((line[k] or "").strip() for k in ("glacier_id", "year", "date"))
            where = f"line {number}"
            if glacier not in known:
                problems.append(f"{where}: glacier {glacier!r} is not in the inventory")
                continue
            if not year_text.isdigit() or int(year_text) not in years:
                problems.append(f"{where}: year {year_text!r} is not one of the region")
                continue
            try:
                date = pd.NaT if date_text.lower() == "reject" else pd.Timestamp(dt.date.fromisoformat(date_text))
            except ValueError:
                problems.append(f"{where}: date {date_text!r} is neither YYYY-MM-DD nor 'reject'")
                continue
            if (glacier, int(year_text)) in seen:
                problems.append(f"{where}: {glacier} has two lines for {year_text}")
                continue
            seen.add((glacier, int(year_text)))
            rows.append((glacier, int(year_text), date))
    if problems:
        raise SettingsError(f"override file {path}:\n  " + "\n  ".join(problems[:20]))
    return pd.DataFrame(rows, columns=["glacier_id", "year", "date"])
