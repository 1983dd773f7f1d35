"""Comparison of a simulated region's estimates with the truth they were simulated from.

Belongs here: bias, coverage of the intervals, and whether regional rates contain the true ones.
Does not belong here: anything that could leak the truth into an estimate; nothing else may import this module's
inputs, and real regions have no truth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dl4gam_assets.tables import INTERVAL_RULES


@dataclass(frozen=True)
class TruthComparison:
    """Figures of the comparison; :meth:`lines` tells them as (what, estimate, truth).

    ``coverage_by_rule``: the same share for each rule that the areas have intervals of (published, conformal).
    ``rates`` holds one mapping a year and method; ``not_compared`` names the regional rates whose glaciers are not
    those of the truth, and why.
    """

    n_estimates: int
    n_glaciers: int
    bias_km2: float
    bias_pct: float
    mean_absolute_error_km2: float
    median_relative_error_pct: float
    interval_coverage: float
    coverage_by_rule: dict[str, float] = field(default_factory=dict)
    rates: list[dict[str, Any]] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain data."""
        return dict(self.__dict__)

    def lines(self) -> list[tuple[str, str, str]]:
        """What was compared, the estimate, the truth: text for a table of three columns; rates of the last year."""
        last = max((r["year"] for r in self.rates), default=None)
        out = [
            ("glacier areas compared (glacier and year)", str(self.n_estimates), f"{self.n_glaciers} glaciers"),
            ("summed bias of the areas", f"{self.bias_km2:+.3f} km2 ({self.bias_pct:+.1f}%)", "0"),
            ("median error of an area", f"{self.median_relative_error_pct:.1f}%", "0"),
            ("intervals that contain the truth", f"{100 * self.interval_coverage:.0f}%", "68% if calibrated"),
        ]
        out += [
            (f"the same with {rule} intervals", f"{100 * share:.0f}%", "68% if calibrated")
            for rule, share in self.coverage_by_rule.items()
        ]
        for r in (r for r in self.rates if r["year"] == last):
            verdict = "inside" if r["inside"] else "outside"
            out.append(
                (
                    f"rate {r['baseline_year']} to {r['year']}, {r['method']} ({r['n_glaciers']} glaciers)",
                    f"{r['rate_pct_per_year']:+.2f} +/- {r['rate_std_pct_per_year']:.2f} %/yr",
                    f"{r['truth_pct_per_year']:+.2f} %/yr ({verdict} one deviation)",
                )
            )
        return out


def compare_with_truth(
    areas: pd.DataFrame, regional_changes: pd.DataFrame, truth: pd.DataFrame, baseline_year: int
) -> TruthComparison:
    """Judge estimates against the known areas of a simulated region.

    The regional truth of a method is summed over the glaciers the method speaks of: for ``measured`` those with an
    area in both years, for the extrapolated methods all glaciers of ``truth``; the true change is divided by the
    method's own time span. Methods whose glaciers the tables do not tell (``filtered``) are left out, as are years
    without truth.

    Parameters
    ----------
    areas : rows of the table ``areas``
    regional_changes : rows of the table ``regional_changes``
    truth : DataFrame (glacier_id, year, area_km2)
    baseline_year : int

    Raises
    ------
    ValueError
        if no estimate has a truth.
    """
    known = truth.assign(glacier_id=truth["glacier_id"].astype(str), year=truth["year"].astype(int))
    found = areas.assign(glacier_id=areas["glacier_id"].astype(str), year=areas["year"].astype(int))
    both = found.merge(
        known[["glacier_id", "year", "area_km2"]].rename(columns={"area_km2": "truth_km2"}), on=["glacier_id", "year"]
    )
    if both.empty:
        raise ValueError("no estimate has a known truth: the ids or the years of the two tables do not meet")
    error = both["area_km2"].to_numpy(dtype=float) - both["truth_km2"].to_numpy(dtype=float)
    true = both["truth_km2"].to_numpy(dtype=float)
    inside = (both["lower_km2"] <= both["truth_km2"]) & (both["truth_km2"] <= both["upper_km2"])
    by_year = known.pivot_table(index="glacier_id", columns="year", values="area_km2", aggfunc="sum")
    rates, not_compared = _rates(found, regional_changes, by_year, baseline_year)
    return TruthComparison(
        n_estimates=len(both),
        n_glaciers=int(both["glacier_id"].nunique()),
        bias_km2=float(error.sum()),
        bias_pct=float(100 * error.sum() / true.sum()) if true.sum() > 0 else float("nan"),
        mean_absolute_error_km2=float(np.abs(error).mean()),
        median_relative_error_pct=float(np.median(100 * np.abs(error[true > 0]) / true[true > 0]))
        if (true > 0).any()
        else float("nan"),
        interval_coverage=float(inside.mean()),
        coverage_by_rule={
            rule: float(both["truth_km2"].between(both[f"lower_{rule}_km2"], both[f"upper_{rule}_km2"]).mean())
            for rule in INTERVAL_RULES
            if f"lower_{rule}_km2" in both and both[f"lower_{rule}_km2"].notna().all()
        },
        rates=rates,
        not_compared=not_compared,
    )


def _rates(
    areas: pd.DataFrame, regional: pd.DataFrame, by_year: pd.DataFrame, baseline_year: int
) -> tuple[list[dict[str, Any]], list[str]]:
    if baseline_year not in by_year:
        return [], [f"the truth has no areas of the baseline year {baseline_year}"]
    rows = regional[(regional["grouping"] == "region") & regional["rate_pct_per_year"].notna()]
    measured_first = set(areas.loc[areas["year"] == baseline_year, "glacier_id"])
    out: list[dict[str, Any]] = []
    skipped: list[str] = []
    for row in rows.sort_values(["year", "method"]).itertuples():
        year = int(row.year)
        if year not in by_year or row.method == "filtered":
            continue
        ids = by_year.index[by_year[[baseline_year, year]].notna().all(axis=1)]
        if row.method == "measured":
            now = set(areas.loc[areas["year"] == year, "glacier_id"])
            ids = ids.intersection(pd.Index(sorted(measured_first & now)))
        if len(ids) != int(row.n_glaciers):
            skipped.append(f"{row.method} {year}: {int(row.n_glaciers)} glaciers, but {len(ids)} with a truth")
            continue
        start, end = float(by_year.loc[ids, baseline_year].sum()), float(by_year.loc[ids, year].sum())
        rate = 100 * (end - start) / float(row.years) / start
        estimate, std = float(row.rate_pct_per_year), float(row.rate_std_pct_per_year)
        out.append(
            {
                "year": year,
                "baseline_year": baseline_year,
                "method": str(row.method),
                "n_glaciers": len(ids),
                "rate_pct_per_year": estimate,
                "rate_std_pct_per_year": std,
                "truth_pct_per_year": rate,
                "inside": abs(estimate - rate) <= std,
                "deviations_off": abs(estimate - rate) / std if std > 0 else float("inf"),
            }
        )
    return out, skipped
