from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dl4gam_assets.change import area_row, bound_masks, counted_pixels, extract_outlines
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.change.small_cubes import box, make_cube

SHAPE = (40, 50)
GLACIER = box(SHAPE, (10, 30), (10, 30))
NEIGHBOUR = box(SHAPE, (10, 30), (30, 45))


def certain(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return mask.astype(np.float32), np.zeros(mask.shape, np.float32)


def test_pixels_of_the_outline_and_of_the_ice_free_20_m_count_and_a_neighbours_never() -> None:
    cube = make_cube(GLACIER, NEIGHBOUR)
    everywhere = certain(np.ones(SHAPE, bool))
    row = area_row(*everywhere, cube, tau=0.2)
    counted = counted_pixels(cube)
    assert not (counted & NEIGHBOUR).any()
    # 400 pixels inside, and two rows of pixels around three of four sides (corners beyond 20 m are cut).
    assert row["area_km2"] == pytest.approx(counted.sum() * 1e-4)
    assert 400 + 3 * 40 <= counted.sum() <= 400 + 3 * 40 + 8
    assert row["recall"] == 1.0
    assert row["false_positive_rate"] == 1.0
    assert row["inventory_area_km2"] == pytest.approx(0.04)


def test_a_perfect_map_has_the_inventory_area_and_no_false_positives() -> None:
    row = area_row(*certain(GLACIER), make_cube(GLACIER), tau=0.3)
    assert row["area_km2"] == row["lower_km2"] == row["upper_km2"] == row["inventory_area_km2"] == pytest.approx(0.04)
    assert row["std_km2"] == 0.0
    assert row["false_positive_rate"] == 0.0


def test_bounds_follow_tau_exactly() -> None:
    mean = np.full(SHAPE, 0.6, np.float32)
    std = np.full(SHAPE, 0.1, np.float32)
    narrow = area_row(mean, std, make_cube(GLACIER), tau=0.5)
    assert narrow["lower_km2"] == narrow["area_km2"] == narrow["upper_km2"]  # 0.5 >= 0.5 and 0.7 >= 0.5
    wide = area_row(mean, std, make_cube(GLACIER), tau=0.4)
    assert wide["lower_km2"] == 0.0  # 0.5 < 0.6
    assert wide["upper_km2"] == wide["area_km2"]
    assert wide["std_km2"] == pytest.approx(wide["upper_km2"] / 2)


def test_a_pixel_without_prediction_is_ice_in_the_upper_bound_only() -> None:
    mean, std = certain(GLACIER)
    mean[10:12] = np.nan
    row = area_row(mean, std, make_cube(GLACIER), tau=0.3)
    assert row["area_km2"] == row["lower_km2"] == pytest.approx(0.036)
    assert row["upper_km2"] > 0.04 - 1e-9
    assert row["recall"] == pytest.approx(0.9)


def test_debris_terminus_and_usable_share() -> None:
    debris = box(SHAPE, (25, 30), (10, 30))
    dem = np.repeat(np.linspace(3000, 2220, SHAPE[0])[:, None], SHAPE[1], axis=1)
    not_ok = box(SHAPE, (10, 20), (10, 30))
    cube = make_cube(GLACIER, debris=debris, dem=dem, not_ok=not_ok)
    row = area_row(*certain(GLACIER & ~box(SHAPE, (28, 30), (0, 50))), cube, tau=0.3)
    assert row["debris_km2"] == pytest.approx(0.01)
    assert row["debris_recall"] == pytest.approx(0.6)
    # Predicted rows end at 27; the lowest 30 of 20 columns a row: 20 pixels of row 27, 10 of row 26.
    assert row["terminus_m"] == pytest.approx(dem[27, 0], abs=1e-3)
    assert row["terminus_lowest_m"] == row["terminus_m"]
    pit = dem.copy()
    pit[15, 15] = 1000.0  # a hole in the DEM is the lowest pixel, and no terminus
    holed = area_row(*certain(GLACIER), make_cube(GLACIER, dem=pit), tau=0.3)
    assert holed["terminus_lowest_m"] == 1000.0 and holed["terminus_m"] > 2200
    near = counted_pixels(cube).sum()
    assert row["usable_share"] == pytest.approx(1 - 200 / near)
    few = area_row(*certain(GLACIER), make_cube(GLACIER, debris=box(SHAPE, (10, 11), (10, 13))), tau=0.3)
    assert few["debris_recall"] is None and few["debris_km2"] == pytest.approx(0.0003)
    assert few["terminus_m"] is few["terminus_lowest_m"] is None
    frame = TABLES["areas"].conform(_frame([row, few | {"glacier_id": "G2"}]), {"year": 2015, "fold": 1})
    assert len(frame) == 2


def _frame(rows: list[dict[str, object]]):  # type: ignore[no-untyped-def]
    import pandas as pd

    return pd.DataFrame(rows).assign(image_date=pd.Timestamp("2015-09-01"))


def test_what_can_not_be_measured_is_refused_by_name() -> None:
    cube = make_cube(GLACIER, glacier_id="G42")
    with pytest.raises(ValueError, match="G42"):
        area_row(np.zeros((3, 3)), np.zeros((3, 3)), cube, tau=0.1)
    with pytest.raises(ValueError, match="tau"):
        area_row(*certain(GLACIER), cube, tau=0.6)
    with pytest.raises(ValueError, match="no pixel of the outline"):
        area_row(*certain(GLACIER), make_cube(np.zeros(SHAPE, bool)), tau=0.1)


PROBABILITY = st.floats(0, 1, width=32)


@settings(max_examples=40, deadline=None)
@given(
    mean=arrays(np.float32, (12, 14), elements=PROBABILITY),
    std=arrays(np.float32, (12, 14), elements=st.floats(0, 0.5, width=32)),
    tau=st.floats(0, 0.5),
    threshold=st.floats(0.05, 0.95),
)
def test_masks_are_nested_and_wider_for_smaller_tau(
    mean: np.ndarray, std: np.ndarray, tau: float, threshold: float
) -> None:
    allowed = box((12, 14), (2, 10), (3, 12))
    lower, best, upper = bound_masks(mean, std, allowed, tau, threshold)
    assert not (lower & ~best).any() and not (best & ~upper).any() and not (upper & ~allowed).any()
    wider = bound_masks(mean, std, allowed, tau / 2, threshold)
    assert not (wider.lower & ~lower).any() and not (upper & ~wider.upper).any()


@settings(max_examples=15, deadline=None)
@given(
    mean=arrays(np.float32, (24, 26), elements=PROBABILITY),
    std=arrays(np.float32, (24, 26), elements=st.floats(0, 0.5, width=32)),
    tau=st.floats(0, 0.5),
    sieve=st.integers(0, 12),
)
def test_outlines_are_valid_nested_and_keep_off_neighbours(
    mean: np.ndarray, std: np.ndarray, tau: float, sieve: int
) -> None:
    import shapely

    shape = (24, 26)
    cube = make_cube(box(shape, (5, 18), (4, 14)), box(shape, (5, 18), (14, 22)))
    rows = extract_outlines(mean, std, cube, tau, sieve_px=sieve).set_index("bound")
    assert rows.geometry.is_valid.all()
    grid = rows.to_crs("EPSG:32632").geometry
    for inner, outer in (("lower", "best"), ("best", "upper")):
        if inner in rows.index:
            assert rows.loc[inner, "area_km2"] <= rows.loc[outer, "area_km2"] + 1e-12
            assert grid[inner].difference(grid[outer]).area < 1.0  # m2
    ox, oy = 600_000.0, 5_100_000.0
    neighbour = shapely.box(ox + 140, oy - 180, ox + 220, oy - 50)
    assert all(g.intersection(neighbour).area < 1.0 for g in grid)


def test_outline_without_sieve_has_the_area_of_the_row_and_the_sieve_removes_specks_and_holes() -> None:
    mask = GLACIER.copy()
    mask[15, 15] = False
    mask[31, 31] = True
    cube = make_cube(GLACIER)
    mean, std = certain(mask)
    row = area_row(mean, std, cube, tau=0.2)
    raw = extract_outlines(mean, std, cube, tau=0.2, sieve_px=0).set_index("bound")
    assert raw.loc["best", "area_km2"] == pytest.approx(row["area_km2"], abs=1e-9)
    assert raw.crs.to_epsg() == 4326 and set(raw["glacier_id"]) == {"G1"}
    clean = extract_outlines(mean, std, cube, tau=0.2, sieve_px=10).set_index("bound")
    assert clean.loc["best", "area_km2"] == pytest.approx(0.04, abs=1e-9)
    assert len(clean.geometry["best"].geoms if hasattr(clean.geometry["best"], "geoms") else [1]) == 1
    TABLES["outlines"].conform(clean.reset_index(), {"year": 2015})


def test_a_vanished_glacier_has_no_outline() -> None:
    mean, std = certain(np.zeros(SHAPE, bool))
    rows = extract_outlines(mean, std, make_cube(GLACIER), tau=0.2)
    assert len(rows) == 0 and list(rows.columns) == ["glacier_id", "bound", "area_km2", "geometry"]


def test_a_cube_read_back_from_its_file_gives_the_same_figures_and_outlines(tmp_path: Path) -> None:
    from dl4gam_assets.cubes import open_cube, write_cube

    rng = np.random.default_rng(1)
    dem = np.repeat(np.linspace(3000, 2220, SHAPE[0])[:, None], SHAPE[1], axis=1)
    cube = make_cube(GLACIER, NEIGHBOUR, debris=box(SHAPE, (25, 30), (10, 30)), dem=dem)
    mean, std = (rng.random(SHAPE) * f for f in (1.0, 0.3))
    write_cube(cube, tmp_path / "cube.nc")
    with open_cube(tmp_path / "cube.nc") as again:
        row, outlines = area_row(mean, std, again, 0.3), extract_outlines(mean, std, again, 0.3)
    expected = area_row(mean, std, cube, 0.3)
    for height in ("terminus_m", "terminus_lowest_m"):  # stored in half metres
        assert row.pop(height) == pytest.approx(expected.pop(height), abs=0.25)
    assert row == expected
    assert outlines.geometry.geom_equals_exact(extract_outlines(mean, std, cube, 0.3).geometry, 1e-9).all()
