"""Trends: against scipy and statsmodels, with one bad image, and what the interval covers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import theilslopes

from dl4gam_assets.change import area_trends, decimal_year
from dl4gam_assets.change.trends import weighted_slopes
from dl4gam_assets.settings import ChangeSettings
from dl4gam_assets.tables import TABLES

SETTINGS = ChangeSettings()


def series(area: np.ndarray, std: float | np.ndarray = 0.02, first: int = 2015, glacier_id: str = "A") -> pd.DataFrame:
    years = np.arange(first, first + len(area))
    return pd.DataFrame(
        {
            "glacier_id": glacier_id,
            "year": years,
            "image_date": pd.to_datetime([f"{y}-09-{1 + y % 20:02d}" for y in years]),
            "area_km2": area,
            "std_km2": std,
        }
    )


def test_slopes_are_those_of_scipy_and_statsmodels() -> None:
    rng = np.random.default_rng(1)
    rows = series(5 - 0.1 * np.arange(9) + rng.normal(0, 0.05, 9), rng.uniform(0.02, 0.1, 9))
    got = area_trends(rows, SETTINGS).iloc[0]
    t = decimal_year(rows["image_date"]).to_numpy()
    assert got["theil_sen_km2_per_year"] == pytest.approx(theilslopes(rows["area_km2"], t).slope, rel=1e-12)
    fitted = sm.WLS(rows["area_km2"], sm.add_constant(t), weights=1 / rows["std_km2"] ** 2).fit()
    assert got["wls_km2_per_year"] == pytest.approx(fitted.params.iloc[1], rel=1e-9)
    birge = np.sqrt(fitted.scale)
    assert got["wls_std_km2_per_year"] == pytest.approx(fitted.bse.iloc[1] * max(birge, 1) / birge, rel=1e-6)
    assert got["first_date"] == rows["image_date"].iloc[0] and got["n_years"] == 9


def test_one_bad_image_is_named_and_does_not_make_the_story() -> None:
    area = 5 - 0.1 * np.arange(8)
    area[7] = 6.5  # seasonal snow in the last year
    got = area_trends(series(area), SETTINGS).iloc[0]
    assert got["theil_sen_km2_per_year"] == pytest.approx(-0.1, abs=0.003)
    assert got["odd_year"] == 2022 and got["odd_residual"] > 50
    assert got["wls_km2_per_year"] > 0  # least squares follows it, and says how little it knows
    assert got["wls_std_km2_per_year"] > 0.05


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), slope=st.floats(-0.5, 0.5), shift=st.floats(-5, 5), scale=st.floats(0.1, 10),
    n=st.integers(3, 10),
)  # fmt: skip
def test_trends_follow_the_data_and_no_order(seed: int, slope: float, shift: float, scale: float, n: int) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.1, n)
    rows = pd.concat([series(9 + slope * np.arange(n) + noise), series(4 + noise, glacier_id="B")])
    got = area_trends(rows.sample(frac=1, random_state=seed), SETTINGS).set_index("glacier_id")
    assert got["theil_sen_lower_km2_per_year"].le(got["theil_sen_km2_per_year"]).all()
    assert got["theil_sen_upper_km2_per_year"].ge(got["theil_sen_km2_per_year"]).all()
    alone = area_trends(rows[rows["glacier_id"] == "B"], SETTINGS).iloc[0]
    pd.testing.assert_series_equal(alone.drop("glacier_id"), got.loc["B"], check_names=False)
    moved = rows.assign(area_km2=shift + scale * rows["area_km2"], std_km2=scale * rows["std_km2"])
    again = area_trends(moved, SETTINGS).set_index("glacier_id")
    for column in ("theil_sen_km2_per_year", "wls_km2_per_year", "theil_sen_lower_km2_per_year"):
        np.testing.assert_allclose(again[column], scale * got[column], rtol=1e-6, atol=1e-9)


def test_few_images_equal_dates_and_missing_deviations() -> None:
    two = series(np.array([5.0, 4.9]))
    assert not len(area_trends(two, SETTINGS))
    same = pd.concat([two, series(np.array([4.8])).assign(year=2017, image_date=two["image_date"].iloc[0])])
    assert not len(area_trends(same, SETTINGS))  # the baseline's image serves two years: two dates are no trend
    blind = area_trends(series(np.array([5.0, 4.9, 4.7, 4.75]), 0.0), SETTINGS).iloc[0]
    assert blind["wls_std_km2_per_year"] > 0 and np.isnan(blind["odd_residual"])
    with pytest.raises(ValueError, match="A occurs twice in 2015"):
        area_trends(pd.concat([two, two]), SETTINGS)
    empty = area_trends(two.iloc[:0], SETTINGS)
    assert list(empty.columns) == [c.name for c in TABLES["trends"].columns]


def test_the_interval_covers_with_ten_images_and_not_with_four() -> None:
    """Known and documented: few images can not show their own scatter."""
    rng = np.random.default_rng(3)
    share = {}
    for n in (4, 10):
        rows = pd.concat(
            [series(5 - 0.05 * np.arange(n) + rng.normal(0, 0.1, n), 0.1, glacier_id=f"G{k:03d}") for k in range(400)]
        )
        got = area_trends(rows, SETTINGS)
        inside = (got["theil_sen_lower_km2_per_year"] <= -0.05) & (got["theil_sen_upper_km2_per_year"] >= -0.05)
        share[n] = inside.mean()
        z = (got["wls_km2_per_year"] + 0.05) / got["wls_std_km2_per_year"]
        assert 0.63 < (z.abs() < 1).mean() < 0.80
    assert 0.60 < share[10] < 0.76 and share[4] < share[10]


def test_slopes_of_equal_times_are_unknown() -> None:
    slope, _ = weighted_slopes(np.full((1, 3), 2020.0), np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3)))
    assert np.isnan(slope[0])
