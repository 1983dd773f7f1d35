"""Totals of many glaciers with their uncertainty, and extrapolation to glaciers that were not measured.

Belongs here: the law of relative rate against area, totals by region, country, size class and aspect.
Does not belong here: rates of single glaciers (``rates``), how errors correlate (``correlation``).
Source: Diaconu et al. 2025, doi:10.1029/2025EA004197 (METHOD sections 9 and 11). Where this goes beyond the paper:
any correlation of errors between glaciers, a method without the signal-to-noise filter, guards for small samples, and
no glacier loses more than all its area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd

from dl4gam_assets.change.correlation import ErrorCorrelation
from dl4gam_assets.change.rates import decimal_year
from dl4gam_assets.settings import ChangeSettings
from dl4gam_assets.tables import TABLES

#: With fewer good glaciers than this, three coefficients would follow noise: their mean rate is used instead.
MIN_GLACIERS_OF_LAW = 6
#: With fewer than this, the law is not used outside the areas it was fitted on.
MIN_GLACIERS_TO_REACH_OUT = 30
#: How far below and above the fitted areas a well supported law may be used, in powers of ten. Modelled glaciers
#: have at least 0.1 km2, and the inventory goes on to 0.01 km2.
REACH_DECADES = 1.0
#: A size class with fewer good glaciers borrows its uncertainty from the nearest class that has them.
MIN_GLACIERS_OF_CLASS = 3
#: Day of the year, as a fraction, that stands for a year without images: mid September.
_LATE_SUMMER = 0.7

SECTORS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
GROUPINGS = ("region", "country", "size_class", "aspect")
METHODS = ("measured", "filtered", "extrapolated", "extrapolated_without_snr")


def combined_std(std: np.ndarray, correlation: float) -> float:
    """Standard deviation of a sum whose terms' errors all correlate pairwise by ``correlation`` in [0, 1].

    1 adds them linearly (published: fully dependent), 0 in quadrature:
    ``var = rho (sum s)^2 + (1 - rho) sum s^2``.
    """
    return ErrorCorrelation(correlation).std_of_sum(std)


def size_class(area_km2: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Class index of each area: 0 is below the first edge, i is [edges[i-1], edges[i]), the last is open."""
    return np.searchsorted(np.asarray(edges, dtype=float), np.asarray(area_km2, dtype=float), side="right")


def size_class_labels(edges: Sequence[float]) -> list[str]:
    """Names of the classes that :func:`size_class` numbers, in km2: ``< 0.01``, ``0.01 to 0.1``, ..., ``>= 20``."""
    text = [f"{e:g}" for e in edges]
    return [f"< {text[0]}", *[f"{a} to {b}" for a, b in pairwise(text)], f">= {text[-1]}"]


@dataclass(frozen=True)
class RateLaw:
    """Relative rate of change (%/yr) as a function of glacier area (km2).

    ``kind`` is ``quadratic`` (a + b log10 A + c log10(A)^2), ``mean`` (one rate for all: too few good glaciers) or
    ``none`` (no good glacier: nothing can be said).
    """

    kind: Literal["quadratic", "mean", "none"]
    coefficients: tuple[float, ...]
    n_glaciers: int
    log_area_range: tuple[float, float]
    edges_km2: tuple[float, ...]
    class_std: tuple[float, ...]

    def predict(self, area_km2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rates and their standard deviations (%/yr) for areas in km2; NaN where the kind is ``none``."""
        area = np.asarray(area_km2, dtype=float)
        std = np.asarray(self.class_std, dtype=float)[size_class(area, self.edges_km2)]
        if self.kind == "none":
            return np.full(area.shape, np.nan), std
        if self.kind == "mean":
            return np.full(area.shape, self.coefficients[0]), std
        x = np.clip(np.log10(np.maximum(area, 1e-6)), *self.log_area_range)
        return np.polynomial.polynomial.polyval(x, np.asarray(self.coefficients)), std


def fit_rate_law(
    area_km2: np.ndarray,
    rate_pct: np.ndarray,
    std_pct: np.ndarray,
    edges_km2: Sequence[float],
) -> RateLaw:
    """Weighted least squares of relative rates on 1, log10 A and log10(A)^2, weights 1/std^2.

    The uncertainty of a predicted rate is the root mean square of its size class: that of the glaciers' deviations
    or that of their residuals from the law, whichever is larger (the paper leaves open which; the larger one never
    claims too much). A class with fewer than 3 good glaciers borrows from the nearest one that has them (so the
    smallest class, below the modelled areas, borrows from the next, as published), or from all glaciers together.

    Guards: with fewer than 6 glaciers, or hardly any spread in area, the law is the area-weighted mean rate and its
    uncertainty the area-weighted spread, if larger than the deviations. With fewer than 30 it is held constant
    outside the fitted areas, otherwise beyond a power of ten from them.

    Parameters
    ----------
    area_km2, rate_pct, std_pct : arrays (n,)
        Inventory area, rate and its standard deviation (percent of the area a year) of the good glaciers.
    """
    area, rate, std = (np.asarray(v, dtype=float) for v in (area_km2, rate_pct, std_pct))
    edges = tuple(float(e) for e in edges_km2)
    usable = np.isfinite(rate) & np.isfinite(std) & (area > 0)
    area, rate, std = area[usable], rate[usable], std[usable]
    n = len(area)
    if n == 0:
        return RateLaw("none", (), 0, (0.0, 0.0), edges, (float("nan"),) * (len(edges) + 1))
    x = np.log10(area)
    span = (float(x.min()), float(x.max()))
    if n < MIN_GLACIERS_OF_LAW or len(np.unique(np.round(x, 6))) < 3:
        mean = float(np.average(rate, weights=area))
        spread = float(np.sqrt(np.average((rate - mean) ** 2, weights=area)))
        both = max(spread, _rms(std))
        return RateLaw("mean", (mean,), n, span, edges, (both,) * (len(edges) + 1))

    positive = std[std > 0]
    floor = 1e-3 * float(np.median(positive)) if len(positive) else 1.0
    root = 1.0 / np.maximum(std, floor)  # of the weights
    design = np.column_stack([np.ones(n), x, x**2])
    coefficients = np.linalg.lstsq(design * root[:, None], rate * root, rcond=None)[0]
    residuals = rate - design @ coefficients
    classes = size_class(area, edges)
    of_class = np.maximum(_class_rms(std, classes, len(edges) + 1), _class_rms(residuals, classes, len(edges) + 1))
    reach = REACH_DECADES if n >= MIN_GLACIERS_TO_REACH_OUT else 0.0
    return RateLaw(
        "quadratic",
        tuple(float(c) for c in coefficients),
        n,
        (span[0] - reach, span[1] + reach),
        edges,
        tuple(float(v) for v in of_class),
    )


def regional_changes(
    changes: pd.DataFrame,
    glaciers: pd.DataFrame,
    areas: pd.DataFrame,
    settings: ChangeSettings,
    year: int,
    baseline_year: int,
    aspects: pd.Series | None = None,
    groupings: Sequence[str] = GROUPINGS,
) -> pd.DataFrame:
    """Rows of the table ``regional_changes`` for one year: the region, each country, each size class and aspect.

    The column ``method`` says which glaciers:

    - ``measured``: all glaciers with a rate, whatever their quality.
    - ``filtered``: those that pass the quality filter. The signal-to-noise part of the filter drops small changes, so
      the kept sample leans towards large ones: compare with ``measured``.
    - ``extrapolated``: every glacier of the inventory (published): measured where it passes the filter, otherwise the
      law of relative rate against area (:func:`fit_rate_law`), starting from the inventory area at the inventory date.
    - ``extrapolated_without_snr``: the same with the filter's other flags only (published: recall): free of the lean
      above, at the price of noisier glaciers.

    Rates are sums of the glaciers' own rates. Deviations are combined over glaciers for each of the two times
    (:class:`~dl4gam_assets.change.correlation.ErrorCorrelation`: settings.between_glacier_correlation and
    correlation_length_km, both kept in the row), and over time in quadrature, or with
    settings.between_year_correlation. A rate from the law is given an equal error at each time. Percentages are of the
    summed baseline area, whose own error is left out or carried (settings.baseline_error). Sizes are classes of the
    inventory area. Groups without any glacier of a method have ``n_glaciers`` 0 and nulls.
    In the baseline year rates are null; a glacier that was not measured then, or has a flag of the filter that one
    image can raise (recall, cloud, filled), enters the extrapolated totals with its inventory area and the relative
    deviation of its size class.

    Parameters
    ----------
    changes : rows of the table ``changes`` of the year (empty in the baseline year)
    glaciers : the table ``glaciers``
    areas : rows of the table ``areas`` of the year
    aspects : mean aspect of glaciers in degrees clockwise from north, by glacier id; adds the grouping ``aspect`` of
        eight sectors (glaciers without one, such as those too small to be modelled, are ``unknown``)
    groupings : only these

    Raises
    ------
    ValueError
        if a measured glacier is not in the inventory, or a glacier occurs twice.
    """
    inventory = inventory_frame(glaciers, settings)
    for name, frame in (("changes", changes), ("areas", areas)):
        ids = pd.Index(frame["glacier_id"].astype(str))
        if ids.has_duplicates:
            raise ValueError(f"{name} of {year}: glacier {ids[ids.duplicated()][0]} occurs twice")
        unknown = ids.difference(inventory.index)
        if len(unknown):
            raise ValueError(f"{name} of {year}: {len(unknown)} glaciers are not in the inventory, e.g. {unknown[0]}")
    groups = [g for g in _groups(inventory, settings, aspects) if g[0] in groupings]
    rows = total_rows(inventory, changes, areas, settings, year, baseline_year, groups)
    return TABLES["regional_changes"].conform(pd.DataFrame(rows))


def total_rows(
    inventory: pd.DataFrame,
    changes: pd.DataFrame,
    areas: pd.DataFrame,
    settings: ChangeSettings,
    year: int,
    baseline_year: int,
    groups: Sequence[tuple[str, str, pd.Index]],
) -> list[dict[str, Any]]:
    """The rows of :func:`regional_changes` as plain data, for groups (grouping, group, glacier ids) of an inventory by
    :func:`inventory_frame`. Nothing is checked: for callers that make many regions themselves."""
    if year == baseline_year:
        estimates = _baseline_estimates(inventory, areas, settings)
    else:
        estimates = _year_estimates(inventory, changes, areas, settings, year, baseline_year)
    rows = []
    correlation = ErrorCorrelation(settings.between_glacier_correlation, settings.correlation_length_km)
    for grouping, group, ids in groups:
        for method in METHODS:
            frame = estimates[method]
            mine = frame if len(ids) == len(inventory) else frame[frame.index.isin(ids)]
            rows.append(
                {
                    "year": year,
                    "grouping": grouping,
                    "group": group,
                    "method": method,
                    "baseline_year": baseline_year,
                    **_total(mine, correlation, inventory, settings),
                }
            )
    return rows


# --------------------------------------------------------------------------------------------- estimates by glacier
_ESTIMATE = ["a0", "s0", "a1", "s1", "years", "rate", "e0", "e1", "measured"]


def inventory_frame(glaciers: pd.DataFrame, settings: ChangeSettings) -> pd.DataFrame:
    """What totals need of the table ``glaciers``, by glacier id in order: area, decimal date, country, class, position.

    Raises
    ------
    ValueError
        if a glacier occurs twice.
    """
    country = glaciers["country"].astype("string").fillna("").str.strip()
    frame = pd.DataFrame(
        {
            "area": glaciers["inventory_area_km2"].to_numpy(dtype=float),
            "date": decimal_year(glaciers["inventory_date"]).to_numpy(),
            "country": country.mask(country == "", "unknown").to_numpy(dtype=object),
            **{axis: glaciers[axis].to_numpy(dtype=float) for axis in ("lon", "lat") if axis in glaciers},
        },
        index=pd.Index(glaciers["glacier_id"].astype(str), name="glacier_id"),
    )
    if frame.index.has_duplicates:
        raise ValueError(f"inventory: glacier {frame.index[frame.index.duplicated()][0]} occurs twice")
    frame["class"] = size_class(frame["area"].to_numpy(), settings.size_class_edges_km2)
    return frame.sort_index()


def aspect_sector(degrees: np.ndarray) -> np.ndarray:
    """Name of the eighth of the compass (N: 337.5 to 22.5 degrees) of each aspect; ``unknown`` where it is NaN."""
    degrees = np.asarray(degrees, dtype=float)
    known = np.isfinite(degrees)
    index = np.floor(np.where(known, degrees, 0.0) / 45.0 + 0.5).astype(int) % 8
    return np.where(known, np.asarray(SECTORS, dtype=object)[index], "unknown")


def _groups(
    inventory: pd.DataFrame, settings: ChangeSettings, aspects: pd.Series | None
) -> list[tuple[str, str, pd.Index]]:
    labels = size_class_labels(settings.size_class_edges_km2)
    groups = [("region", "all", inventory.index)]
    groups += [("country", str(c), rows.index) for c, rows in inventory.groupby("country", sort=True)]
    groups += [("size_class", labels[int(c)], rows.index) for c, rows in inventory.groupby("class", sort=True)]
    if aspects is not None and aspects.notna().any():
        sectors = pd.Series(aspect_sector(aspects.reindex(inventory.index).to_numpy(dtype=float)), inventory.index)
        found = sectors.groupby(sectors)
        groups += [
            ("aspect", name, found.get_group(name).index) for name in (*SECTORS, "unknown") if name in found.groups
        ]
    return groups


def _year_estimates(
    inventory: pd.DataFrame,
    changes: pd.DataFrame,
    areas: pd.DataFrame,
    settings: ChangeSettings,
    year: int,
    baseline_year: int,
) -> dict[str, pd.DataFrame]:
    rows = changes.assign(glacier_id=changes["glacier_id"].astype(str)).set_index("glacier_id").sort_index()
    t = rows["years"].to_numpy(dtype=float)
    measured = pd.DataFrame(
        {
            "a0": rows["baseline_area_km2"].to_numpy(dtype=float),
            "s0": rows["baseline_std_km2"].to_numpy(dtype=float),
            "a1": rows["area_km2"].to_numpy(dtype=float),
            "s1": rows["std_km2"].to_numpy(dtype=float),
            "years": t,
            "rate": rows["rate_km2_per_year"].to_numpy(dtype=float),
            "measured": True,
        },
        index=rows.index,
    )
    measured["e0"] = measured["s0"] / np.abs(t)
    measured["e1"] = measured["s1"] / np.abs(t)
    ok = rows["ok"].to_numpy(dtype=bool)
    raised = [rows[f"flag_{name}"].to_numpy(dtype=bool) for name in settings.filter if name != "snr"]
    without_snr = ~np.logical_or.reduce(raised) if raised else np.ones(len(rows), dtype=bool)
    time = _time_of(inventory, rows, areas, settings, year, baseline_year)
    estimates = {"measured": measured, "filtered": measured[ok]}
    for method, keep in (("extrapolated", ok), ("extrapolated_without_snr", without_snr)):
        good = measured[keep]
        law = fit_rate_law(
            inventory.loc[good.index, "area"].to_numpy(),
            rows.loc[keep, "rate_pct_per_year"].to_numpy(dtype=float),
            rows.loc[keep, "rate_std_pct_per_year"].to_numpy(dtype=float),
            settings.size_class_edges_km2,
        )
        rest = inventory.drop(good.index)
        # Equal errors at both times, correlated in time as all errors are, that make up the law's own deviation.
        share = 1.0 / np.sqrt(2.0 * (1.0 - settings.between_year_correlation))
        estimates[method] = _joined(good, _from_law(rest, law, time, _relative_std(inventory, good), share))
    return estimates


def _from_law(
    rest: pd.DataFrame, law: RateLaw, time: pd.Series, relative_std: np.ndarray, share: float
) -> pd.DataFrame:
    area = rest["area"].to_numpy()
    percent, std = law.predict(area)
    t = time.reindex(rest.index).to_numpy(dtype=float)
    rate = percent / 100.0 * area
    later = area + rate * t
    # A law of rates knows no end: nothing is left of a glacier that would shrink below zero, and no more is lost.
    gone = later < 0
    later = np.where(gone, 0.0, later)
    rate = np.where(gone, -area / np.where(gone, t, 1.0), rate)
    rate_std = std / 100.0 * area
    return pd.DataFrame(
        {
            "a0": area,
            "s0": relative_std[rest["class"].to_numpy()] * area,
            "a1": later,
            "s1": rate_std * np.abs(t),
            "years": t,
            "rate": rate,
            "e0": rate_std * share,
            "e1": rate_std * share,
            "measured": False,
        },
        index=rest.index,
    )


def _time_of(
    inventory: pd.DataFrame,
    rows: pd.DataFrame,
    areas: pd.DataFrame,
    settings: ChangeSettings,
    year: int,
    baseline_year: int,
) -> pd.Series:
    """Years from each glacier's inventory date to the middle of the year's images."""
    images = decimal_year(areas["image_date"]) if len(areas) else pd.Series(dtype=float)
    end = float(images.median()) if images.notna().any() else year + _LATE_SUMMER
    starts = decimal_year(rows["baseline_date"]) if len(rows) else pd.Series(dtype=float)
    usual = float(starts.median()) if starts.notna().any() else baseline_year + _LATE_SUMMER
    start = inventory["date"].fillna(usual)
    if settings.dates == "whole_years":
        return float(np.floor(end)) - np.floor(start)
    return end - start


def _baseline_estimates(
    inventory: pd.DataFrame, areas: pd.DataFrame, settings: ChangeSettings
) -> dict[str, pd.DataFrame]:
    rows = areas.assign(glacier_id=areas["glacier_id"].astype(str)).set_index("glacier_id").sort_index()
    measured = pd.DataFrame(
        {"a0": rows["area_km2"].to_numpy(dtype=float), "s0": rows["std_km2"].to_numpy(dtype=float), "measured": True},
        index=rows.index,
    )
    measured[["a1", "s1"]] = measured[["a0", "s0"]]
    of_one_image = rows.reindex(columns=["recall", "usable_share", "filled_share"]).astype(float)
    stopped = {  # an unknown share raises no flag; an unknown recall does, as in `area_changes`
        "recall": ~(of_one_image["recall"] >= settings.recall_min),
        "cloud": of_one_image["usable_share"] < settings.usable_min,
        "filled": of_one_image["filled_share"] > settings.filled_max,
    }
    bad = [flag.to_numpy() for name, flag in stopped.items() if name in settings.filter]
    good = measured[~np.logical_or.reduce(bad)] if bad else measured
    rest = inventory.drop(good.index)
    relative = _relative_std(inventory, good)
    borrowed = pd.DataFrame({"a0": rest["area"], "measured": False}, index=rest.index)
    borrowed["s0"] = relative[rest["class"].to_numpy()] * borrowed["a0"]
    borrowed[["a1", "s1"]] = borrowed[["a0", "s0"]]
    every = _joined(good, borrowed)
    frames = {"measured": measured, "filtered": good, "extrapolated": every, "extrapolated_without_snr": every}
    return {name: frame.reindex(columns=_ESTIMATE) for name, frame in frames.items()}


def _relative_std(inventory: pd.DataFrame, good: pd.DataFrame) -> np.ndarray:
    """Relative deviation of a baseline area by size class (root mean square of the good glaciers)."""
    n_classes = int(inventory["class"].max()) + 1 if len(inventory) else 1
    known = good[good["a0"] > 0]
    if known.empty:
        return np.full(n_classes, np.nan)
    classes = inventory.loc[known.index, "class"].to_numpy()
    return _class_rms((known["s0"] / known["a0"]).to_numpy(dtype=float), classes, n_classes)


def _joined(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([f for f in (first, second) if len(f)] or [first]).sort_index()


# --------------------------------------------------------------------------------------------- sums
def _total(
    frame: pd.DataFrame, correlation: ErrorCorrelation, inventory: pd.DataFrame, settings: ChangeSettings
) -> dict[str, float | int | None]:
    total: dict[str, float | int | None] = {
        "n_glaciers": len(frame),
        "n_measured": int(frame["measured"].astype(bool).sum()) if len(frame) else 0,
        "correlation": correlation.rho,
        "correlation_length_km": correlation.length_km,
    }
    if frame.empty:
        return total
    values = {c: frame[c].to_numpy(dtype=float) for c in _ESTIMATE if c != "measured"}
    where = inventory.loc[frame.index, ["lon", "lat"]].to_numpy().T if correlation.length_km else (None, None)

    def combined(column: str) -> float:
        return correlation.std_of_sum(values[column], *where)

    a0 = float(values["a0"].sum())
    rate = float(values["rate"].sum())
    second, between_years = combined("e1"), settings.between_year_correlation

    def of_change(e0: np.ndarray) -> float:
        independent = float(np.hypot(correlation.std_of_sum(e0, *where), second))
        if not between_years:
            return independent
        # var(e1 - e0) = e0'Ce0 + e1'Ce1 - 2 rho e0'Ce1, and (e0 + e1)'C(e0 + e1) holds the last term.
        both = correlation.std_of_sum(e0 + values["e1"], *where) ** 2
        return float(np.sqrt(max(independent**2 - between_years * (both - independent**2), 0.0)))

    rate_std = rate_std_pct = of_change(values["e0"])
    if settings.baseline_error == "carried" and a0 > 0 and np.isfinite(values["e0"]).all():
        # A measured baseline is also what its rate is divided by: its error counts 1 + years * rate / A0 times.
        again = np.where(frame["measured"].to_numpy(dtype=bool), values["years"] * rate / a0, 0.0)
        rate_std_pct = of_change(values["e0"] * np.maximum(1.0 + again, 0.0))
    total |= {
        "years": float(np.average(values["years"], weights=values["a0"])) if a0 > 0 else float("nan"),
        "baseline_area_km2": a0,
        "baseline_std_km2": combined("s0"),
        "area_km2": float(values["a1"].sum()),
        "std_km2": combined("s1"),
        "rate_km2_per_year": rate,
        "rate_std_km2_per_year": rate_std,
    }
    if a0 > 0:
        total |= {"rate_pct_per_year": 100 * rate / a0, "rate_std_pct_per_year": 100 * rate_std_pct / a0}
    return total


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _class_rms(values: np.ndarray, classes: np.ndarray, n_classes: int) -> np.ndarray:
    """Root mean square by class; thin classes borrow from the nearest sound one (of two, the larger glaciers')."""
    sound = [c for c in range(n_classes) if (classes == c).sum() >= MIN_GLACIERS_OF_CLASS]
    if not sound:
        return np.full(n_classes, _rms(values))
    nearest = [min(sound, key=lambda c: (abs(c - own), -c)) for own in range(n_classes)]
    return np.array([_rms(values[classes == c]) for c in nearest])
