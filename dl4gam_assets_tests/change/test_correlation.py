"""Errors that glaciers share: limits, positions, and many glaciers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dl4gam_assets.change.correlation as module
from dl4gam_assets.change import ErrorCorrelation


def places(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.gamma(1.0, 0.1, n), rng.uniform(6, 14, n), rng.uniform(45, 47.5, n)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), seed=st.integers(0, 999), rho=st.floats(0, 1), length=st.floats(1, 5000))
def test_a_decaying_correlation_lies_between_independence_and_the_same_everywhere(
    n: int, seed: int, rho: float, length: float
) -> None:
    std, lon, lat = places(n, seed)
    independent = ErrorCorrelation(0.0).std_of_sum(std)
    everywhere = ErrorCorrelation(rho).std_of_sum(std)
    decaying = ErrorCorrelation(rho, length).std_of_sum(std, lon, lat)
    assert independent - 1e-9 <= decaying <= everywhere + 1e-9
    assert everywhere <= std.sum() + 1e-9
    order = np.random.default_rng(seed).permutation(n)
    assert ErrorCorrelation(rho, length).std_of_sum(std[order], lon[order], lat[order]) == pytest.approx(decaying)


def test_two_glaciers_by_hand() -> None:
    lon, lat = np.array([8.0, 8.0]), np.array([46.0, 46.0 + np.rad2deg(50 / 6371.0)])  # 50 km apart
    got = ErrorCorrelation(0.6, 100.0).std_of_sum(np.array([3.0, 4.0]), lon, lat)
    assert got == pytest.approx(np.sqrt(9 + 16 + 2 * 0.6 * np.exp(-0.5) * 12), rel=1e-6)
    across = ErrorCorrelation(1.0, 100.0).std_of_sum(np.array([1.0, 1.0]), np.array([179.9, -179.9]), np.zeros(2))
    assert across == pytest.approx(np.sqrt(2 + 2 * np.exp(-np.deg2rad(0.2) * 6371 / 100)), rel=1e-6)


def test_many_glaciers_in_cells_are_as_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    std, lon, lat = places(2500, 1)
    exact = ErrorCorrelation(0.8, 40.0).std_of_sum(std, lon, lat)
    monkeypatch.setattr(module, "MAX_EXACT", 100)
    in_cells = ErrorCorrelation(0.8, 40.0).std_of_sum(std, lon, lat)
    assert in_cells == pytest.approx(exact, rel=0.01)


def test_errors_drawn_with_the_correlation_have_the_deviation_of_their_sum() -> None:
    std, lon, lat = places(60, 5)
    a, b = np.deg2rad(lon), np.deg2rad(lat)
    unit = np.stack([np.cos(b) * np.cos(a), np.cos(b) * np.sin(a), np.sin(b)], axis=1)
    distance = 6371.0 * np.arccos(np.clip(unit @ unit.T, -1, 1))
    matrix = 0.7 * np.exp(-distance / 80.0)
    np.fill_diagonal(matrix, 1.0)
    draws = np.random.default_rng(2).multivariate_normal(np.zeros(60), matrix * np.outer(std, std), size=20000)
    assert ErrorCorrelation(0.7, 80.0).std_of_sum(std, lon, lat) == pytest.approx(draws.sum(axis=1).std(), rel=0.02)


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        ErrorCorrelation(1.5)
    with pytest.raises(ValueError, match="must be positive"):
        ErrorCorrelation(1.0, 0.0)
    with pytest.raises(ValueError, match="needs the glaciers' positions"):
        ErrorCorrelation(1.0, 50.0).std_of_sum(np.ones(3))
