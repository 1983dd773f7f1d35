"""The interval of an area: all tau at once equals one by one, and the rule covers as often as it promises."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.change.areas import bound_masks
from dl4gam_assets.ensemble import (
    TauRule,
    fit_tau,
    interval_areas,
    interval_masks,
    largest_covering_tau,
    left_out_taus,
    tau_features,
)
from dl4gam_assets.ensemble.intervals import FEATURES, quantile_plane
from dl4gam_assets.settings import CalibrationSettings

TAUS = np.linspace(0, 0.5, 501)


def _map(seed: int, grid: bool, holes: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean = rng.beta(0.4, 0.6, (9, 11))
    std = rng.uniform(0, 0.5, (9, 11)) * rng.random()
    if grid:  # values on the grid of tau, as stored maps have them: every comparison is a tie
        mean, std = np.round(mean, 3), np.round(std, 3)
    if holes:  # pixels that no patch reached and nothing filled
        mean[rng.random((9, 11)) < 0.2] = np.nan
        std[rng.random((9, 11)) < 0.1] = np.nan
    return mean.astype(np.float32), std.astype(np.float32), rng.random((9, 11)) < 0.8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_areas_for_all_tau_are_those_of_the_masks(seed: int, grid: bool, holes: bool) -> None:
    mean, std, allowed = _map(seed, grid, holes)
    unknown = allowed & ~(np.isfinite(mean) & np.isfinite(std))
    lower, upper = interval_areas(mean, std, allowed, 1e-4, TAUS)
    for k in range(0, 501, 20):
        below, above = interval_masks(mean, std, float(TAUS[k]), allowed)
        assert not (below & ~allowed).any() and not (above & ~allowed).any()
        assert lower[k] == pytest.approx(below.sum() * 1e-4) and upper[k] == pytest.approx(above.sum() * 1e-4)
        # What is not known may be ice and may be none: in no lower and every upper bound, of areas and outlines too.
        assert not (below & unknown).any() and not (unknown & ~above).any()
        of_tables = bound_masks(mean, std, allowed, float(TAUS[k]))
        assert (of_tables.lower == below).all() and (of_tables.upper == above).all()
    # A larger tau never widens the interval, and the best mask lies between the bounds.
    assert (np.diff(lower) >= 0).all() and (np.diff(upper) <= 0).all()
    best = (mean >= 0.5) & allowed & ~unknown
    below, above = interval_masks(mean, std, 0.5, allowed)
    assert not (below & ~best).any() and not (best & ~above).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.integers(0, 110))
def test_the_largest_covering_tau_is_the_one_a_loop_finds(seed: int, grid: bool, holes: bool, pixels: int) -> None:
    mean, std, allowed = _map(seed, grid, holes)
    true, best = pixels * 1e-4, 0.0
    for tau in TAUS:
        lower, upper = interval_masks(mean, std, float(tau), allowed)
        if lower.sum() * 1e-4 <= true + 1e-12 and true <= upper.sum() * 1e-4 + 1e-12:
            best = float(tau)
    assert largest_covering_tau(mean, std, allowed, 1e-4, true) == pytest.approx(best, abs=1e-12)


def test_where_no_tau_covers_the_widest_interval_is_taken() -> None:
    mean, std, allowed = np.zeros((3, 3), np.float32), np.zeros((3, 3), np.float32), np.zeros((3, 3), bool)
    assert largest_covering_tau(mean, std, allowed, 1e-4, 5e-4) == 0.0
    with pytest.raises(ValueError, match=r"not in \[0, 0\.5\]"):
        interval_masks(mean, std, 0.6, allowed)


def test_features() -> None:
    mean = np.array([[0.2, 0.8, 0.9]], np.float32)
    std = np.array([[0.1, 0.3, 0.9]], np.float32)
    got = tau_features(mean, std, np.array([[True, True, False]]), 2.0)
    assert tuple(got) == FEATURES
    assert got["log_area"] == pytest.approx(np.log(2)) and got["mean_probability"] == pytest.approx(0.5)
    assert got["epistemic_std"] == pytest.approx(np.sqrt(0.05), rel=1e-6)
    assert got["aleatoric_std"] == pytest.approx(0.4, rel=1e-6)
    empty = tau_features(mean, std, np.zeros((1, 3), bool), 0.0)
    assert all(np.isfinite(v) for v in empty.values())


# --------------------------------------------------------------------------------------------- the rule
def _sample(n: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Glaciers whose tau depends on two features, with noise that one of them widens."""
    rng = np.random.default_rng(seed)
    x = pd.DataFrame(rng.normal([0, 0.5, 0.1, 0.2], [1.5, 0.2, 0.04, 0.05], (n, 4)), columns=list(FEATURES))
    z = -0.5 + 0.6 * x["log_area"] - 8 * (x["epistemic_std"] - 0.1)
    z += rng.normal(0, 0.4 + 0.3 * (x["log_area"] > 0), n)
    return x, (0.5 / (1 + np.exp(-z))).to_numpy()


def test_quantile_regression_covers_new_glaciers_as_promised() -> None:
    """A tau at or below the covering one covers: that must hold for 68% of glaciers that were not fitted."""
    features, taus = _sample(3000, 1)
    covered = []
    for seed in range(8):
        fitted = _sample(400, seed)
        rule = fit_tau(*fitted, CalibrationSettings())
        assert rule.method == "quantile_regression"
        assert (rule.predict(fitted[0]) <= fitted[1]).mean() == pytest.approx(0.6827, abs=0.015)
        predicted = rule.predict(features)
        assert ((predicted > 0) & (predicted < 0.5)).all()
        covered.append((predicted <= taus).mean())
    assert np.mean(covered) == pytest.approx(0.6827, abs=0.025)
    # It uses the features: the same promise with narrower intervals (larger tau) than one number for all.
    regional = fit_tau(features[:19], taus[:19], CalibrationSettings(min_glaciers=20))
    assert predicted.mean() > regional.predict(features).mean()
    large, small = features["log_area"] > 1, features["log_area"] < -1
    assert predicted[large].mean() > predicted[small].mean() + 0.05


def test_few_glaciers_get_one_cautious_number() -> None:
    taus = np.array([0.4, 0.1, 0.3, 0.2, 0.25])
    features = _sample(5, 0)[0]
    rule = fit_tau(features, taus, CalibrationSettings())
    assert rule.method == "regional_quantile"
    # Rank floor(0.3173 * 6) = 1: the smallest, so that at least 5 / 6 of the next glaciers are covered.
    np.testing.assert_allclose(rule.predict(features), 0.1)
    # Of two the smallest covers the next in 2 of 3 cases only: no tau is low enough, and all of the zone is taken.
    for n in (1, 2):
        np.testing.assert_array_equal(fit_tau(features[:n], taus[:n], CalibrationSettings()).predict(features), 0.0)
    with pytest.raises(ValueError, match="no validation glacier"):
        fit_tau(features[:0], taus[:0], CalibrationSettings())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 19, 29])
def test_the_regional_number_keeps_the_promise_on_average(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = []
    features, settings = _sample(n, 0)[0], CalibrationSettings()
    for _ in range(400):
        taus = rng.uniform(0, 0.5, n + 1)
        tau = fit_tau(features, taus[:n], settings).predict(features[:1])[0]
        covered.append(tau <= taus[n])
    assert np.mean(covered) >= 0.6827 - 0.05


@pytest.mark.parametrize("seed", range(12))
def test_the_plane_is_the_best_there_is(seed: int) -> None:
    """The check loss has its minimum on a plane through as many points as it has coefficients: all are tried."""
    rng = np.random.default_rng(seed)
    n, k, q = int(rng.integers(6, 12)), int(rng.integers(1, 4)), float(rng.uniform(0.1, 0.9))
    x, y = rng.normal(size=(n, k)), rng.normal(size=n) * 10 ** rng.uniform(-2, 2)
    design = np.column_stack([np.ones(n), x])

    def loss(plane: np.ndarray) -> float:
        residual = y - design @ plane
        return float(np.maximum(q * residual, (q - 1) * residual).sum())

    picks = [list(some) for some in itertools.combinations(range(n), k + 1)]
    best = min(loss(np.linalg.solve(design[some], y[some])) for some in picks)
    found = quantile_plane(x, y, q)
    assert found is not None and loss(found) == pytest.approx(best, rel=1e-6)
    below, on = (y < design @ found - 1e-9).sum(), (np.abs(y - design @ found) <= 1e-9).sum()
    assert below <= q * n <= below + on  # and it is the quantile


def test_glaciers_with_holes_in_their_maps_are_left_out_by_name() -> None:
    features, taus = _sample(41, 3)
    features.index = [f"G{i:02d}" for i in range(41)]
    holed = features.copy()
    holed.loc[["G07", "G30"], "mean_probability"] = np.nan
    rule = fit_tau(holed, taus, CalibrationSettings())
    rest = features.index.difference(["G07", "G30"])
    without = fit_tau(features.loc[rest], taus[features.index.isin(rest)], CalibrationSettings())
    assert rule.left_out == ("G07", "G30") and without.left_out == ()
    assert rule.method == without.method == "quantile_regression" and rule.intercept == without.intercept
    assert TauRule.from_json(rule.to_json()) == rule
    predicted = rule.predict(holed)
    assert (predicted[[7, 30]] == 0.0).all() and (np.delete(predicted, [7, 30]) > 0).all()
    # A quantile of covering taus needs no features, and no glacier without a tau.
    few = fit_tau(holed[:10], np.r_[np.nan, taus[1:10]], CalibrationSettings())
    assert few.method == "regional_quantile" and few.left_out == ("G00",)
    np.testing.assert_allclose(few.predict(holed[:10]), np.sort(taus[1:10])[2])


@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_a_glacier_that_is_left_out_does_not_shape_its_own_tau(n: int) -> None:
    features, taus = _sample(n, 5)
    got = left_out_taus(features, taus, CalibrationSettings())
    changed = taus.copy()
    changed[0] = 0.5 - taus[0]
    again = left_out_taus(features, changed, CalibrationSettings())
    assert got[0] == again[0] and ((got >= 0) & (got <= 0.5)).all()
    if n == 1:
        assert got[0] == 0.0
    if n == 8:  # of seven others the second lowest
        assert got[0] == pytest.approx(np.sort(taus[1:])[1])
    if n == 30:  # the rule of all is a regression, and so are these
        assert len(np.unique(got)) > 20


@pytest.mark.parametrize("taus", [np.zeros(30), np.full(30, 0.5), np.r_[np.zeros(15), np.full(15, 0.5)]])
def test_taus_at_their_limits(taus: np.ndarray) -> None:
    features = _sample(30, 0)[0].assign(epistemic_std=0.0)  # a feature that never varies
    rule = fit_tau(features, taus, CalibrationSettings())
    predicted = rule.predict(features)
    assert ((predicted >= 0) & (predicted <= 0.5)).all() and np.isfinite(predicted).all()


@pytest.mark.parametrize("n", [6, 60])
def test_rules_survive_as_json(n: int) -> None:
    features, taus = _sample(n, 2)
    rule = fit_tau(features, taus, CalibrationSettings())
    back = TauRule.from_json(rule.to_json())
    assert back == rule and back.to_json() == rule.to_json()
    np.testing.assert_array_equal(back.predict(features), rule.predict(features))


def test_features_far_outside_the_fitted_ones_stay_in_range() -> None:
    rule = fit_tau(*_sample(60, 2), CalibrationSettings())
    far = pd.DataFrame({name: [1e6, -1e6] for name in FEATURES})
    predicted = rule.predict(far)
    assert np.isfinite(predicted).all() and ((predicted >= 0) & (predicted <= 0.5)).all()
