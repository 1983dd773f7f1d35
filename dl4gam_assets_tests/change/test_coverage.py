"""Counting the intervals that hold a known area, by rule and class; intervals by both rules in one row."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.change import area_row, interval_coverage
from dl4gam_assets.publication.validation_plots import coverage_plot
from dl4gam_assets_tests.change.small_cubes import box, make_cube


def _store(rng: np.random.Generator, n: int = 40, years: int = 3) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    ids = [f"G{i}" for i in range(n)]
    areas = pd.DataFrame({"glacier_id": np.repeat(ids, years), "year": np.tile(np.arange(years) + 2015, n)})
    known = pd.Series(rng.uniform(0.1, 5, len(areas)))
    middle = known + rng.normal(0, 0.1, len(areas))
    for rule, half in (("published", 0.1), ("conformal", 0.2)):
        areas[f"lower_{rule}_km2"], areas[f"upper_{rule}_km2"] = middle - half, middle + half
    classes = pd.DataFrame(
        {
            "glacier_id": ids,
            "size_class": np.where(np.arange(n) % 2, "under 0.5 km2", "from 0.5 km2"),
            "debris_class": np.where(np.arange(n) % 5, "clean", "debris-covered"),
        }
    )
    return areas, known, classes


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_counts_add_up_and_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    areas, known, classes = _store(rng)
    found = interval_coverage(areas, known, classes)
    order = rng.permutation(len(areas))
    again = interval_coverage(areas.iloc[order], known.iloc[order], classes.sample(frac=1, random_state=seed % 1000))
    pd.testing.assert_frame_equal(found, again)
    assert (found["coverage_low"] <= found["coverage"]).all() and (found["coverage"] <= found["coverage_high"]).all()
    for rule, rows in found.groupby("rule"):
        inside = (areas[f"lower_{rule}_km2"] <= known + 1e-9) & (known <= areas[f"upper_{rule}_km2"] + 1e-9)
        for grouping in ("all", "size", "debris"):
            part = rows[rows["grouping"] == grouping]
            assert part["n"].sum() == len(areas) and part["n_glaciers"].sum() == 40
            assert (part["n"] * part["coverage"]).sum() == pytest.approx(inside.sum())


def test_more_years_of_the_same_glaciers_do_not_make_the_range_narrower() -> None:
    areas, known, classes = _store(np.random.default_rng(1), years=1)
    once = interval_coverage(areas, known, classes)
    areas, known = (pd.concat([x] * 5, ignore_index=True) for x in (areas, known))
    often = interval_coverage(areas, known, classes)
    assert (often["n"] == 5 * once["n"]).all()
    pd.testing.assert_frame_equal(often.drop(columns="n"), once.drop(columns="n"))


def test_rows_without_a_known_area_are_left_out_and_old_tables_are_named() -> None:
    areas, known, classes = _store(np.random.default_rng(2))
    found = interval_coverage(areas, known.where(areas["year"] == 2015), classes)
    assert found.loc[found["grouping"] == "all", "n"].tolist() == [40, 40]
    with pytest.raises(ValueError, match="no lower_conformal_km2, they were measured by an older version"):
        interval_coverage(areas.assign(lower_conformal_km2=np.nan), known, classes)
    with pytest.raises(ValueError, match="glacier 'G0' has no size and debris class"):
        interval_coverage(areas, known, classes.iloc[1:])
    figure = coverage_plot(found, "test")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "all glaciers (40)"


def test_a_row_holds_the_bounds_of_every_rule() -> None:
    """The bounds of a rule are those that a row with its tau alone would have."""
    shape = (40, 50)
    rng = np.random.default_rng(3)
    mean, std = rng.random(shape).astype(np.float32), (0.3 * rng.random(shape)).astype(np.float32)
    cube = make_cube(box(shape, (10, 30), (10, 30)))
    row = area_row(mean, std, cube, tau=0.3, other_taus={"published": 0.3, "conformal": 0.1})
    for rule, tau in (("published", 0.3), ("conformal", 0.1)):
        alone = area_row(mean, std, cube, tau=tau)
        assert row[f"lower_{rule}_km2"] == alone["lower_km2"] and row[f"upper_{rule}_km2"] == alone["upper_km2"]
    names = ("lower_conformal_km2", "lower_km2", "area_km2", "upper_km2", "upper_conformal_km2")
    assert np.all(np.diff([row[name] for name in names]) > 0)
