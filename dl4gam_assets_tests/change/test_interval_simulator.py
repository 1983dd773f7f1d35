"""What the published and the conformal intervals of single areas hold, on drawn glaciers with known errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dl4gam_assets.change.interval_simulator import (
    INTERVAL_SCENARIOS,
    IntervalWorld,
    bounds,
    draw_glaciers,
    run_interval_scenarios,
    simulate_intervals,
)
from dl4gam_assets.settings import CalibrationSettings


def _of(table: pd.DataFrame, method: str, group: str = "all") -> pd.Series:
    return table[(table["method"] == method) & (table["group"] == group)].iloc[0]


def test_the_covering_tau_is_the_largest_whose_interval_holds_the_truth() -> None:
    drawn = draw_glaciers(IntervalWorld(), 500, 0.2, 1.0, np.random.default_rng(2), "G")
    inner = (drawn.covering > 0.002) & (drawn.covering < 0.499)
    assert inner.sum() > 300
    for step, holds in ((0.0, True), (0.002, False)):
        lower, upper = bounds(drawn, np.clip(drawn.covering + step, 1e-6, 0.5))
        inside = (lower <= drawn.truth + 1e-9) & (drawn.truth <= upper + 1e-9)
        assert (inside == holds)[inner].mean() > 0.99
    lower, upper = bounds(drawn, np.zeros(500))
    assert (lower == 0).all() and (upper >= drawn.truth).all()


def test_the_members_make_the_profile() -> None:
    """More scatter of the members shows in the epistemic deviation alone, more blur in the aleatoric one; the interval
    of a glacier lies around the area that all members together draw."""

    def features(**world: float) -> pd.Series:
        drawn = draw_glaciers(IntervalWorld(**world), 400, 0.0, 1.0, np.random.default_rng(3), "G")  # type: ignore[arg-type]
        lower, upper = bounds(drawn, np.full(400, 0.3))
        best = np.exp(drawn.features["log_area"].to_numpy())
        assert (lower <= best).all() and (best <= upper).all()
        return drawn.features.median()

    usual, scattered, blurred, one = (
        features(), features(member_km=0.006), features(blur_km=0.012), features(members=1),
    )  # fmt: skip
    assert scattered["epistemic_std"] > 1.5 * usual["epistemic_std"]
    assert abs(scattered["aleatoric_std"] / usual["aleatoric_std"] - 1) < 0.2
    assert blurred["aleatoric_std"] > 1.1 * usual["aleatoric_std"] and blurred["epistemic_std"] < usual["epistemic_std"]
    assert one["epistemic_std"] == 0


def test_both_rules_hold_what_they_claim_where_the_maps_tell_their_errors() -> None:
    found = simulate_intervals(INTERVAL_SCENARIOS["as_assumed"][1], CalibrationSettings(), draws=60, seed=3)
    for method in ("published", "conformal"):
        assert 0.63 < _of(found, method)["coverage"] < 0.73


@pytest.mark.parametrize("name", ["at_the_limit", "few"])
def test_few_validation_glaciers_keep_the_promise(name: str) -> None:
    """Just enough for the regression, and just too few."""
    world = INTERVAL_SCENARIOS[name][1]
    least = CalibrationSettings().min_glaciers
    assert world.validation == least if name == "at_the_limit" else world.validation < least
    found = simulate_intervals(world, CalibrationSettings(), draws=300, seed=6)
    for method in ("published", "conformal"):
        assert 0.63 < _of(found, method)["coverage"] < 0.73
    assert _of(found, "published")["coverage_std"] < 0.01


def test_two_validation_glaciers_promise_nothing_but_the_zone() -> None:
    found = simulate_intervals(INTERVAL_SCENARIOS["two"][1], CalibrationSettings(), draws=10, seed=6)
    assert _of(found, "published")["coverage"] == _of(found, "conformal")["coverage"] == 1.0


def test_hidden_errors_of_debris_escape_the_published_rule_and_not_the_conformal_one() -> None:
    """Known and documented: the four features do not know debris."""
    found = simulate_intervals(INTERVAL_SCENARIOS["debris_hidden"][1], CalibrationSettings(), draws=60, seed=4)
    assert _of(found, "published", "debris-covered")["coverage"] < 0.45
    assert _of(found, "published", "clean")["coverage"] > 0.72
    for group in ("debris-covered", "clean"):
        assert 0.63 < _of(found, "conformal", group)["coverage"] < 0.78
    wide = _of(found, "conformal", "debris-covered")["half_width"]
    assert wide > 1.5 * _of(found, "conformal", "clean")["half_width"]


def test_neither_rule_holds_for_later_images_that_err_more() -> None:
    found = simulate_intervals(INTERVAL_SCENARIOS["later_year"][1], CalibrationSettings(), draws=40, seed=5)
    assert all(_of(found, method)["coverage"] < 0.6 for method in ("published", "conformal"))


def test_scenarios_are_named_and_drawn_alike_in_any_number_of_processes() -> None:
    one = run_interval_scenarios(draws=2, names=["few", "heavy_tails"], workers=1)
    two = run_interval_scenarios(draws=2, names=["few", "heavy_tails"], workers=2)
    pd.testing.assert_frame_equal(one, two)
    assert set(one["scenario"]) == {"few", "heavy_tails"} and one["coverage"].between(0, 1).all()
    with pytest.raises(ValueError, match="no interval scenario 'nope'; there are as_assumed"):
        run_interval_scenarios(draws=2, names=["nope"])
