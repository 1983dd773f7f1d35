"""Change of each glacier between the baseline and a year, with its uncertainty and quality flags.

Belongs here: matching two years by glacier id, time between images, rates, quality flags.
Does not belong here: sums over glaciers (``regional``), areas themselves (``areas``).
Source: Diaconu et al. 2025, doi:10.1029/2025EA004197 (METHOD sections 9 and 11).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from dl4gam_assets.settings import ChangeSettings
from dl4gam_assets.tables import TABLES

#: The quality flags, in the order in which they are named.
FLAGS = ("snr", "recall", "cloud", "filled", "growth")
#: Images closer together than this give no rate: the change is a small fraction of the error, divided by almost zero.
MIN_YEARS = 0.5

_EXCLUDED = ["glacier_id", "reason"]


def decimal_year(dates: pd.Series) -> pd.Series:
    """Calendar dates as decimal years: 1 January of Y is Y, and the same day of the next year is one more.

    Leap years stretch over 366 days; a missing date is NaN.
    """
    times = (dates if dates.dtype.kind == "M" else pd.to_datetime(dates)).to_numpy(dtype="datetime64[us]")
    years = times.astype("datetime64[Y]")
    start, end = (y.astype("datetime64[us]") for y in (years, years + 1))
    with np.errstate(invalid="ignore"):
        value = 1970.0 + years.astype("int64") + (times - start) / (end - start)
    return pd.Series(np.where(np.isnat(times), np.nan, value), index=dates.index)


def change_std(first: np.ndarray, second: np.ndarray, between_years: float) -> np.ndarray:
    """Standard deviation of the difference of two areas whose errors correlate by ``between_years`` in time.

    ``sqrt(s0^2 + s1^2 - 2 rho s0 s1)``; 0 is the published choice: errors of two images are independent.
    """
    if between_years == 0.0:
        return np.asarray(np.hypot(first, second))
    return np.sqrt(np.maximum(first**2 + second**2 - 2 * between_years * first * second, 0.0))


def area_changes(
    baseline: pd.DataFrame, areas: pd.DataFrame, settings: ChangeSettings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rate of area change of every glacier measured in both years.

    ``rate = (A1 - A0) / years`` with the time between the two images (settings.dates: decimal years, or whole years
    as published), ``std = sqrt(s0^2 + s1^2 - 2 rho s0 s1) / |years|`` with rho = settings.between_year_correlation
    (published: 0, errors independent in time). In percent of A0; A0's own error enters that a second time, as its
    divisor, and is left out (published) or carried (settings.baseline_error). Glaciers are matched by id, never by
    position. Years before the baseline are as good as years after it.

    Parameters
    ----------
    baseline, areas : rows of the tables ``baseline_areas`` and ``areas`` (one year).

    Returns
    -------
    changes : rows of the table ``changes``; empty where ``areas`` is the baseline year itself. A column for each flag:
        ``flag_snr`` (the change is smaller than its deviation), ``flag_recall`` (too little of the outline was found in
        the inventory year), ``flag_cloud`` and ``flag_filled`` (too little was seen, or too much filled, in either
        image), ``flag_growth`` (the glacier grew by more than its uncertainty allows). ``flags`` names them; ``ok``
        means that none of ``settings.filter`` is set. A share that is unknown raises no flag. ``snr`` is null where
        the deviation is zero.
    excluded : (glacier_id, reason) of glaciers without a rate: ``no_baseline``, ``not_measured`` (in this year),
        ``no_date`` (of either image), ``same_date`` (one image, or one whole year, served both) or ``short_time`` (less
        than half a year between).

    Raises
    ------
    ValueError
        if a glacier occurs twice, or either frame holds more than one year.
    """
    for name, frame in (("baseline", baseline), ("areas", areas)):
        twice = frame.loc[frame["glacier_id"].duplicated(), "glacier_id"].astype(str).tolist()
        if twice:
            raise ValueError(f"{name}: glaciers occur twice: {', '.join(twice[:3])}")
        if frame["year"].nunique() > 1:
            raise ValueError(f"{name}: holds several years {sorted(frame['year'].unique())}")
    empty = TABLES["changes"].empty(), pd.DataFrame(columns=_EXCLUDED, dtype="string")
    if len(areas) and len(baseline) and areas["year"].iloc[0] == baseline["year"].iloc[0]:
        return empty

    keep = ["glacier_id", "year", "image_date", "area_km2", "std_km2", "usable_share", "filled_share"]
    both = areas.reindex(columns=keep).merge(
        baseline.reindex(columns=[*keep, "recall"]),
        on="glacier_id",
        suffixes=("", "_0"),
        how="outer",
        validate="one_to_one",
    )
    both["glacier_id"] = both["glacier_id"].astype(str)
    both = both.sort_values("glacier_id", ignore_index=True)
    reason = pd.Series("", index=both.index)
    reason[both["year_0"].isna()] = "no_baseline"
    reason[both["year"].isna()] = "not_measured"
    if settings.dates == "whole_years":
        first, second = (pd.to_datetime(both[c]).dt.year.astype("float64") for c in ("image_date_0", "image_date"))
    else:
        first, second = decimal_year(both["image_date_0"]), decimal_year(both["image_date"])
    years = second - first
    reason[(reason == "") & years.isna()] = "no_date"
    reason[(reason == "") & (years == 0)] = "same_date"
    reason[(reason == "") & ~(years.abs() >= MIN_YEARS)] = "short_time"
    excluded = pd.DataFrame({"glacier_id": both["glacier_id"], "reason": reason})[reason != ""].astype("string")
    kept = both[reason == ""].copy()
    if kept.empty:
        return empty[0], excluded.reset_index(drop=True)

    t = years[kept.index].to_numpy()
    a0, a1, s0, s1 = (kept[c].to_numpy(dtype=float) for c in ("area_km2_0", "area_km2", "std_km2_0", "std_km2"))
    recall = kept["recall"].to_numpy(dtype=float)
    rate = (a1 - a0) / t
    of_change = change_std(s0, s1, settings.between_year_correlation)
    std = of_change / np.abs(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        snr = np.where(std > 0, np.abs(rate) / std, np.nan)
        percent = np.where(a0 > 0, 100.0 / a0, np.nan)
        # rate / A0 = (A1 / A0 - 1) / years: the error of A0 counts A1 / A0 times.
        carried = change_std(s0 * a1 / a0, s1, settings.between_year_correlation) / np.abs(t)
        std_pct = (carried if settings.baseline_error == "carried" else std) * percent
    usable = np.fmin(kept["usable_share"].to_numpy(dtype=float), kept["usable_share_0"].to_numpy(dtype=float))
    filled = np.fmax(kept["filled_share"].to_numpy(dtype=float), kept["filled_share_0"].to_numpy(dtype=float))
    later_minus_earlier = np.sign(t) * (a1 - a0)
    flags = {
        "snr": np.where(std > 0, ~(snr >= settings.snr_min), rate == 0),
        "recall": ~(recall >= settings.recall_min),
        "cloud": usable < settings.usable_min,
        "filled": filled > settings.filled_max,
        "growth": later_minus_earlier > settings.growth_max * of_change,
    }
    names = list(flags)
    raised = np.column_stack([flags[name] for name in names])
    stopped = raised[:, [names.index(name) for name in settings.filter]].any(axis=1)
    changes = pd.DataFrame(
        {
            "glacier_id": kept["glacier_id"].to_numpy(),
            "year": kept["year"].to_numpy(),
            "baseline_year": kept["year_0"].to_numpy(),
            "baseline_date": kept["image_date_0"].to_numpy(),
            "image_date": kept["image_date"].to_numpy(),
            "years": t,
            "baseline_area_km2": a0,
            "baseline_std_km2": s0,
            "area_km2": a1,
            "std_km2": s1,
            "rate_km2_per_year": rate,
            "rate_std_km2_per_year": std,
            "rate_pct_per_year": rate * percent,
            "rate_std_pct_per_year": std_pct,
            "snr": snr,
            "recall": recall,
            "usable_share": usable,
            "filled_share": filled,
            **{f"flag_{name}": flags[name] for name in FLAGS},
            "ok": ~stopped,
            "flags": [",".join(name for name, bad in zip(names, row, strict=True) if bad) for row in raised],
        }
    )
    return TABLES["changes"].conform(changes), excluded.reset_index(drop=True)
