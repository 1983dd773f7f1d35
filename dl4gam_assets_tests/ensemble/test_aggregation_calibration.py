"""Means and spreads are those of NumPy, and calibration finds what was put in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dl4gam_assets.ensemble import (
    aggregate,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    reliability,
)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
               elements=st.floats(-40, 40, width=32)),
    st.data(),
)  # fmt: skip
def test_mean_and_population_deviation_of_scaled_probabilities(logits: np.ndarray, data: st.DataObject) -> None:
    temperatures = data.draw(st.lists(st.floats(0.5, 5), min_size=len(logits), max_size=len(logits)))
    mean, std = aggregate(logits, temperatures)
    p = 1 / (1 + np.exp(-logits.astype(float) / np.array(temperatures)[:, None, None]))
    assert mean.dtype == std.dtype == np.float32 and mean.shape == logits.shape[1:]
    np.testing.assert_allclose(mean, p.mean(axis=0), atol=2e-6)
    np.testing.assert_allclose(std, p.std(axis=0), atol=1e-4)
    assert (mean - std >= -1e-4).all() or len(logits) > 1


def test_one_member_has_no_spread_and_extremes_are_finite() -> None:
    mean, std = aggregate(np.array([[1e5, -1e5, 0.0]], np.float32), [1.0])
    np.testing.assert_array_equal(mean, [1.0, 0.0, 0.5])
    assert (std == 0).all()


def test_what_was_not_predicted_stays_so() -> None:
    mean, std = aggregate(iter([np.array([np.nan, 2.0], np.float32)] * 3), [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(np.isnan(mean), [True, False])
    np.testing.assert_array_equal(np.isnan(std), [True, False])


def test_refusals() -> None:
    logits = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="1 temperatures, but more members"):
        aggregate(logits, [1.0])
    with pytest.raises(ValueError, match="3 temperatures, but fewer members"):
        aggregate(iter(logits), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="no members"):
        aggregate([], [])
    with pytest.raises(ValueError, match="must be positive"):
        aggregate(logits, [1.0, 0.0])
    with pytest.raises(ValueError, match="no validation pixels"):
        fit_temperature(np.zeros(0), np.zeros(0, bool))


@pytest.mark.parametrize("true", [0.7, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(true: float) -> None:
    rng = np.random.default_rng(4)
    z = rng.normal(0, 4, 60_000)
    labels = rng.random(len(z)) < 1 / (1 + np.exp(-z / true))
    found = fit_temperature(z, labels)
    assert found == pytest.approx(true, rel=0.05)
    for other in (found * 0.97, found * 1.03):
        assert log_loss(z, labels, found) <= log_loss(z, labels, other)
    p_raw, p = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-z / found))
    if true != 1.0:
        assert expected_calibration_error(p, labels) < 0.3 * expected_calibration_error(p_raw, labels)


def test_temperatures_stay_in_bounds() -> None:
    z, labels = np.array([5.0, -5.0]), np.array([False, True])
    assert fit_temperature(z, labels, (0.5, 5.0)) == pytest.approx(5.0, abs=1e-2)
    assert fit_temperature(z, ~labels, (0.5, 5.0)) == pytest.approx(0.5, abs=1e-2)


def test_log_loss_is_finite_for_certain_mistakes() -> None:
    assert log_loss(np.array([800.0]), np.array([False])) == pytest.approx(800.0)
    assert log_loss(np.array([0.0, 0.0]), np.array([True, False])) == pytest.approx(np.log(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.integers(1, 50))
def test_reliability_and_its_error_against_a_loop(seed: int, n: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    p[0] = rng.choice([0.0, 1.0])
    labels = rng.random(n) < p**2
    table = reliability(p, labels, bins)
    assert table["n_pixels"].sum() == n
    error = 0.0
    for k in range(bins):
        inside = (p >= k / bins) & ((p < (k + 1) / bins) | (k == bins - 1))
        # Bin edges are rational; only values exactly there could fall to either side.
        if inside.any():
            error += abs(p[inside].mean() - labels[inside].mean()) * inside.mean()
    assert expected_calibration_error(p, labels, bins) == pytest.approx(error, abs=1e-9)
