"""Estimates of a simulated region beside the truth that it was simulated from.

Belongs here: reading that truth, which no estimate may read, and the tables that people are shown.
Does not belong here: the comparison itself (``change.truth``, ``change.coverage``). Real regions have no truth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dl4gam_assets.change.truth import TruthComparison, compare_with_truth
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage


def known_truth(region: Region, storage: Storage) -> pd.DataFrame | None:
    """True areas (glacier_id, year, area_km2) of a simulated region; None of a real one, or where no file is."""
    if region.simulation is None:
        return None
    path = Path(str(storage.inputs())) / "truth" / "areas.parquet"
    return pd.read_parquet(path) if path.exists() else None


def truth_of_year(region: Region, storage: Storage, year: int) -> dict[str, Any] | None:
    """What the areas and rates of one year are worth: ``areas`` (a comparison of that year's areas alone) and
    ``rates`` (one mapping a method); None without a truth of the year."""
    truth = known_truth(region, storage)
    if truth is None:
        return None
    baseline = region.years.baseline
    areas = storage.read_table("areas")
    regional = storage.read_table("regional_changes")
    mine = regional[regional["year"] == year]
    try:
        of_year = compare_with_truth(areas[areas["year"] == year], mine.head(0), truth, baseline)
    except ValueError:
        return None
    of_both = compare_with_truth(areas[areas["year"].isin([baseline, year])], mine, truth, baseline)
    return {"areas": of_year, "rates": of_both.rates, "not_compared": of_both.not_compared}


def truth_tables(region: Region, storage: Storage) -> dict[str, pd.DataFrame]:
    """Tables ``areas`` (a row a year) and ``rates`` (a row a year and method) of all years; empty without a truth."""
    years = sorted({int(y) for y in storage.read_table("areas")["year"]})
    found = {year: told for year in years if (told := truth_of_year(region, storage, year)) is not None}
    if not found:
        return {}
    areas = [{"year": year, **_figures(told["areas"])} for year, told in found.items()]
    rates = [rate for told in found.values() for rate in told["rates"]]
    table = pd.DataFrame(rates)
    if len(table):
        table["bias"] = table["rate_pct_per_year"] - table["truth_pct_per_year"]
        columns = ["year", "method", "n_glaciers", "truth_pct_per_year", "rate_pct_per_year", "rate_std_pct_per_year"]
        table = table[[*columns, "bias", "inside"]]
    return {"areas": pd.DataFrame(areas), "rates": table}


def _figures(of_year: TruthComparison) -> dict[str, Any]:
    return {
        "n_glaciers": of_year.n_glaciers,
        "bias_km2": of_year.bias_km2,
        "bias_pct": of_year.bias_pct,
        "median_error_pct": of_year.median_relative_error_pct,
        **{f"inside_{rule}": share for rule, share in of_year.coverage_by_rule.items()},
    }


def markdown(table: pd.DataFrame) -> str:
    """A frame as a Markdown table for docs/validation.md: shares and percentages short, signs where they matter."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, bool) or name == "inside":
            return "inside" if value else "**outside**"
        if name in {"coverage", "coverage_low", "coverage_high"} or name.startswith("inside_"):
            return f"{100 * value:.0f} %"
        if isinstance(value, float):
            return f"{value:+.2f}" if name.startswith(("bias", "truth_", "rate_pct")) else f"{value:.2f}"
        return str(value)

    names = list(table.columns)
    lines = [" | ".join(n.replace("_", " ") for n in names), "|".join("---" if n in _TEXT else "---:" for n in names)]
    lines += [
        " | ".join(text(n, v) for n, v in zip(names, row, strict=True)) for row in table.astype(object).to_numpy()
    ]
    return "\n".join(f"| {line} |" if k != 1 else f"|{line}|" for k, line in enumerate(lines))


_TEXT = {"rule", "grouping", "group", "method", "inside"}
