"""Terrain derivatives on surfaces whose answer is known, and against the definitions of the published models."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dl4gam_assets.terrain import DERIVATIVES, mean_aspect, terrain_derivatives

PIXEL = 10.0


def grid(size: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Eastings and northings (m) of a square grid, north up, 0 in the middle."""
    half = (size - 1) / 2
    rows, columns = np.mgrid[0:size, 0:size]
    return (columns - half) * PIXEL, (half - rows) * PIXEL


@settings(max_examples=25, deadline=None)
@given(st.floats(2.0, 60.0), st.floats(0.0, 359.9), st.sampled_from([0.0, 1.0]))
def test_planes_have_one_slope_and_face_their_aspect(slope: float, aspect: float, sigma: float) -> None:
    east, north = grid(21)
    facing = np.deg2rad(aspect)
    downhill = east * np.sin(facing) + north * np.cos(facing)
    out = terrain_derivatives(3000.0 - np.tan(np.deg2rad(slope)) * downhill, PIXEL, sigma)
    assert out["slope"] == pytest.approx(np.full(east.shape, slope), abs=0.02)
    away = np.abs((out["aspect"] - aspect + 180.0) % 360.0 - 180.0)
    assert away.max() < 0.1
    for name in ("planform_curvature", "profile_curvature"):
        assert np.abs(out[name]).max() < 0.02


def test_curvature_signs_and_sizes() -> None:
    east, north = grid()
    radius = 1000.0
    ridge = terrain_derivatives(3000.0 - 0.5 * north - east**2 / (2 * radius), PIXEL, 0.0)
    gully = terrain_derivatives(3000.0 - 0.5 * north + east**2 / (2 * radius), PIXEL, 0.0)
    middle = 20
    # A ridge line is convex across the slope: the second derivative is 1/radius, in 1/m times 100.
    assert ridge["planform_curvature"][middle, middle] == pytest.approx(100.0 / radius, rel=0.01)
    assert gully["planform_curvature"][middle, middle] == pytest.approx(-100.0 / radius, rel=0.01)
    assert ridge["profile_curvature"][middle, middle] == pytest.approx(0.0, abs=1e-3)
    # Downhill is north, where it gets gentler.
    foot = terrain_derivatives(3000.0 - 0.5 * north + north**2 / (2 * radius), PIXEL, 0.0)
    assert foot["profile_curvature"][middle, middle] == pytest.approx(100.0 / radius, rel=0.01)
    assert foot["planform_curvature"][middle, middle] == pytest.approx(0.0, abs=1e-3)


def test_definitions_are_those_of_the_published_models() -> None:
    """Zevenbergen and Thorne's second derivatives, written out (equations 9, 10 and after of the paper, times 100)."""
    z = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(80, 90)), 4) * 400.0 + 3000.0
    out = terrain_derivatives(z, PIXEL, 1.0)
    kernel = np.exp(-np.array([1.0, 0.0, 1.0]) / 2.0)
    kernel /= kernel.sum()
    z = ndimage.convolve1d(ndimage.convolve1d(z, kernel, 0, mode="nearest"), kernel, 1, mode="nearest")

    def shifted(down: int, right: int) -> np.ndarray:
        return z[1 + down : z.shape[0] - 1 + down, 1 + right : z.shape[1] - 1 + right]

    d = ((shifted(0, -1) + shifted(0, 1)) / 2 - shifted(0, 0)) / PIXEL**2
    e = ((shifted(-1, 0) + shifted(1, 0)) / 2 - shifted(0, 0)) / PIXEL**2
    f = (-shifted(-1, -1) + shifted(-1, 1) + shifted(1, -1) - shifted(1, 1)) / (4 * PIXEL**2)
    g = (shifted(0, 1) - shifted(0, -1)) / (2 * PIXEL)
    h = (shifted(-1, 0) - shifted(1, 0)) / (2 * PIXEL)
    planform = -200.0 * (d * h**2 + e * g**2 - f * g * h) / (g**2 + h**2)
    profile = 200.0 * (d * g**2 + e * h**2 + f * g * h) / (g**2 + h**2)
    ruggedness = np.sqrt(sum((shifted(i, j) - shifted(0, 0)) ** 2 for i in (-1, 0, 1) for j in (-1, 0, 1)))
    inner = np.s_[3:-3, 3:-3]
    for name, expected in (
        ("planform_curvature", planform), ("profile_curvature", profile), ("terrain_ruggedness_index", ruggedness),
    ):  # fmt: skip
        found = out[name][1:-1, 1:-1][inner]
        scale = np.abs(expected[inner]).max()
        assert np.abs(found - expected[inner]).max() < 2e-3 * scale, name  # float32 elevations


def test_flat_ground_and_ranges() -> None:
    flat = terrain_derivatives(np.full((20, 20), 2500.0), PIXEL)
    assert all((values == 0).all() for values in flat.values())
    rough = terrain_derivatives(np.random.default_rng(0).uniform(0, 500, (60, 60)), PIXEL)
    assert rough["slope"].min() >= 0 and rough["slope"].max() < 90
    assert rough["aspect"].min() >= 0 and rough["aspect"].max() <= 360


def test_missing_elevations_stay_missing_and_do_not_spread() -> None:
    _, north = grid()
    dem = 3000.0 - 0.5 * north
    whole = terrain_derivatives(dem, PIXEL)
    holed = dem.copy()
    holed[10:14, 20:25] = np.nan
    out = terrain_derivatives(holed, PIXEL)
    hole = np.isnan(holed)
    far = ndimage.distance_transform_edt(~hole) > 3
    for name in DERIVATIVES:
        assert (np.isnan(out[name]) == hole).all()
        assert out[name][far] == pytest.approx(whole[name][far], abs=1e-3)
        assert out[name].dtype == np.float32
    nothing = terrain_derivatives(np.full((20, 20), np.nan), PIXEL)
    assert set(nothing) == set(DERIVATIVES) and all(np.isnan(v).all() for v in nothing.values())
    with pytest.raises(ValueError, match="at least 7"):
        terrain_derivatives(np.zeros((5, 20)), PIXEL)


def test_speed() -> None:
    dem = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(500, 500)), 5) * 500 + 3000
    terrain_derivatives(dem, PIXEL)
    start = time.perf_counter()
    terrain_derivatives(dem, PIXEL)
    assert time.perf_counter() - start < 2.0  # 0.1 s on one core that is free


@settings(max_examples=40, deadline=None)
@given(middle=st.floats(0, 360), spread=st.floats(0, 80))
def test_the_mean_aspect_knows_that_north_is_both_0_and_360(middle: float, spread: float) -> None:
    around = np.array([middle - spread, middle + spread, middle, np.nan]) % 360
    got = mean_aspect(around)
    assert got is not None and abs((got - middle + 180) % 360 - 180) < 1e-6


def test_aspects_that_cancel_out_have_no_mean() -> None:
    assert mean_aspect(np.array([0.0, 90.0, 180.0, 270.0])) is None
    assert mean_aspect(np.array([np.nan])) is None
