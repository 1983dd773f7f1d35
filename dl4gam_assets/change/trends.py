"""Trend of each glacier's area over all its images, robust against a bad one.

Belongs here: Theil-Sen slopes with a bootstrap interval, weighted least squares, for many glaciers at once.
Does not belong here: change between two years (``rates``).
Beyond the paper, which compares two years. Source of the slope: Sen (1968,
doi:10.1080/01621459.1968.10480934).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from dl4gam_assets.change.rates import MIN_YEARS, decimal_year
from dl4gam_assets.settings import ChangeSettings
from dl4gam_assets.tables import TABLES

#: The interval holds this share of the resampled slopes (one standard deviation of a normal distribution).
COVERAGE = 0.6827
_BLOCK = 2_000_000  # slopes held at once


def area_trends(areas: pd.DataFrame, settings: ChangeSettings, seed: int = 0) -> pd.DataFrame:
    """Robust and weighted trends of glaciers with images of at least ``settings.trend_min_years`` different dates.

    Theil-Sen is the median of the slopes between all pairs of images at least half a year apart; up to 29% of the
    images may be wrong in any way without spoiling it. Its interval comes from resampling the images with replacement
    (``settings.trend_bootstrap`` times); with fewer than about six images it is too narrow, because few images cannot
    show their own scatter (docs/validation.md has the coverage by number of images). Weighted least squares weights by
    1/std^2; its deviation follows from the areas' own, widened by the scatter where that is larger (Birge ratio).

    Parameters
    ----------
    areas : rows of the table ``areas`` of all years, one a glacier and year
    seed : of the resampling; the result of a glacier does not depend on which others are there

    Returns
    -------
    DataFrame
        The table ``trends``, by glacier id.

    Raises
    ------
    ValueError
        if a glacier has two rows for a year.
    """
    rows = areas[["glacier_id", "year", "image_date", "area_km2", "std_km2"]].dropna(subset=["image_date", "area_km2"])
    rows = rows.reset_index(drop=True)
    twice = rows.duplicated(["glacier_id", "year"])
    if twice.any():
        bad = rows[twice].iloc[0]
        raise ValueError(f"areas: glacier {bad['glacier_id']} occurs twice in {int(bad['year'])}")
    rows = rows.sort_values(["glacier_id", "image_date", "year"]).drop_duplicates(["glacier_id", "image_date"])
    counts = rows.groupby("glacier_id")["year"].transform("size")
    rows = rows[counts >= settings.trend_min_years]
    out = []
    for _, group in rows.groupby(counts[rows.index]):  # glaciers with equally many images are one block of arrays
        out.append(_trends_of(group, settings, seed))
    if not out:
        return TABLES["trends"].empty()
    frame = pd.concat(out, ignore_index=True).dropna(subset=["theil_sen_km2_per_year", "wls_km2_per_year"])
    return TABLES["trends"].conform(frame.sort_values("glacier_id", ignore_index=True))


def _trends_of(rows: pd.DataFrame, settings: ChangeSettings, seed: int) -> pd.DataFrame:
    ids = rows["glacier_id"].unique()
    shape = (len(ids), len(rows) // len(ids))
    t = decimal_year(rows["image_date"]).to_numpy().reshape(shape)
    area, std = (rows[c].to_numpy(dtype=float).reshape(shape) for c in ("area_km2", "std_km2"))
    dates, years = rows["image_date"].to_numpy().reshape(shape), rows["year"].to_numpy(dtype=int).reshape(shape)
    slope = theil_sen(t, area)
    lower, upper = _bootstrap(t, area, settings.trend_bootstrap, seed)
    middle = np.median(area - slope[:, None] * (t - t[:, :1]), axis=1)  # at the first date
    residual = area - (middle[:, None] + slope[:, None] * (t - t[:, :1]))
    # A map without any doubt has deviation 0; its residual still counts, in units of the glacier's usual deviation.
    usual = np.where(std > 0, std, np.nan)
    with np.errstate(invalid="ignore"), _quiet():
        usual = np.where(np.isfinite(usual), usual, np.nanmedian(usual, axis=1, keepdims=True))
    scaled = residual / usual
    odd = np.abs(np.where(np.isfinite(scaled), scaled, residual)).argmax(axis=1)
    pick = np.arange(len(ids)), odd
    wls, wls_std = weighted_slopes(t, area, usual)
    with np.errstate(divide="ignore", invalid="ignore"):
        percent = np.where(middle > 0, 100.0 * slope / middle, np.nan)
    return pd.DataFrame(
        {
            "glacier_id": ids,
            "n_years": shape[1],
            "first_date": dates[:, 0],
            "last_date": dates[:, -1],
            "first_area_km2": middle,
            "theil_sen_km2_per_year": slope,
            "theil_sen_lower_km2_per_year": np.fmin(lower, slope),
            "theil_sen_upper_km2_per_year": np.fmax(upper, slope),
            "theil_sen_pct_per_year": percent,
            "wls_km2_per_year": wls,
            "wls_std_km2_per_year": wls_std,
            "odd_year": years[pick],
            "odd_residual": scaled[pick],
        }
    )


def theil_sen(t: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Median slope between all pairs of points at least half a year apart: (n,) from times and values (n, k).

    NaN where no pair is.
    """
    first, second = np.array(list(combinations(range(t.shape[1]), 2))).T
    span = t[:, second] - t[:, first]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(np.abs(span) >= MIN_YEARS, (y[:, second] - y[:, first]) / span, np.nan)
    return _row_medians(slopes)


def _row_medians(values: np.ndarray) -> np.ndarray:
    """Median of each row (n, m) without NaN; NaN where nothing is left. Faster than numpy's nanmedian by a sort."""
    ordered = np.sort(values, axis=1)  # NaN last
    count = np.isfinite(ordered).sum(axis=1)
    rows = np.arange(len(values))
    low, high = ordered[rows, np.maximum(count - 1, 0) // 2], ordered[rows, np.minimum(count // 2, values.shape[1] - 1)]
    return np.where(count > 0, (low + high) / 2, np.nan)


def _bootstrap(t: np.ndarray, y: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the Theil-Sen slope: the same resamples of the k images for every glacier of the block."""
    k = t.shape[1]
    picks = np.random.default_rng([seed, k]).integers(0, k, size=(n, k))
    # A resample of one and the same image has no slope.
    picks = picks[(picks != picks[:, :1]).any(axis=1)]
    lower, upper = np.empty(len(t)), np.empty(len(t))
    step = max(_BLOCK // (len(picks) * k * (k - 1) // 2), 1)
    tail = (1.0 - COVERAGE) / 2
    for first in range(0, len(t), step):
        some = slice(first, first + step)
        tt, yy = (v[some][:, picks].reshape(-1, k) for v in (t, y))
        slopes = theil_sen(tt, yy).reshape(-1, len(picks))
        with _quiet():
            lower[some], upper[some] = np.nanquantile(slopes, [tail, 1 - tail], axis=1)
    return lower, upper


def weighted_slopes(t: np.ndarray, y: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes of weighted least squares and their deviations: (n,) each, from times, values, deviations (n, k).

    Without any deviation all points weigh the same and the deviation follows from the scatter alone.
    """
    known = np.isfinite(std)
    weight = np.where(known, 1.0 / np.where(known, std, 1.0) ** 2, 0.0)
    blind = ~known.any(axis=1)
    weight[blind] = 1.0
    total = weight.sum(axis=1, keepdims=True)
    mean_t, mean_y = ((weight * v).sum(axis=1, keepdims=True) / total for v in (t, y))
    sxx = (weight * (t - mean_t) ** 2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (weight * (t - mean_t) * (y - mean_y)).sum(axis=1) / sxx
        residual = y - mean_y - slope[:, None] * (t - mean_t)
        birge = np.sqrt((weight * residual**2).sum(axis=1) / (t.shape[1] - 2))
        deviation = np.where(blind, birge, np.maximum(birge, 1.0)) / np.sqrt(sxx)
    return np.where(sxx > 0, slope, np.nan), deviation


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without numpy's warning on rows of NaN: NaN is the answer there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
