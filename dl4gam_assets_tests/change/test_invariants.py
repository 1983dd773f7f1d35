"""What must hold whatever the figures are: ids decide and positions do not, sums add up, and files change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.xr import assign_crs

from dl4gam_assets.change import area_changes, area_row, area_trends, regional_changes
from dl4gam_assets.cubes import write_cube
from dl4gam_assets.ensemble import read_prediction, write_prediction
from dl4gam_assets.settings import ChangeSettings, Region, load_region
from dl4gam_assets.stages import areas as stages
from dl4gam_assets.stages.base import Site, UpstreamError, Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.change.test_shares import Valley, at

SETTINGS = ChangeSettings(trend_bootstrap=50)


def region_of_glaciers(seed: int, n: int) -> tuple[pd.DataFrame, dict[int, pd.DataFrame]]:
    """An inventory and the areas of three years, each glacier with its own image dates and flags."""
    rng = np.random.default_rng(seed)
    ids = [f"g{i:03d}" for i in range(n)]
    size = 10 ** rng.uniform(-1.5, 1.4, n)
    inventory = pd.DataFrame(
        {
            "glacier_id": ids, "inventory_area_km2": size, "inventory_date": pd.Timestamp("2015-09-01"),
            "country": rng.choice(["CH", "AT", ""], n), "lon": rng.uniform(8, 12, n), "lat": rng.uniform(46, 47, n),
        }
    )  # fmt: skip
    years = {}
    for year in (2015, 2019, 2023):
        there = rng.random(n) < 0.85
        frame = pd.DataFrame(
            {
                "glacier_id": ids, "year": year,
                "image_date": pd.Timestamp(f"{year}-08-01") + pd.to_timedelta(rng.integers(0, 70, n), unit="D"),
                "area_km2": size * rng.uniform(0.6, 1.1, n), "std_km2": size * rng.uniform(0, 0.1, n),
                "recall": rng.uniform(0.8, 1, n), "usable_share": rng.uniform(0.5, 1, n),
                "filled_share": rng.uniform(0, 0.5, n),
            }
        )  # fmt: skip
        years[year] = frame[there]
    return inventory, years


def renamed(frame: pd.DataFrame, names: dict[str, str], rng: np.random.Generator) -> pd.DataFrame:
    """The same glaciers under other names, in another order and with another index."""
    mixed = frame.iloc[rng.permutation(len(frame))].copy()
    mixed["glacier_id"] = mixed["glacier_id"].map(names)
    return mixed.set_axis(rng.permutation(len(mixed)) + 7)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 25))
def test_other_names_and_another_order_give_every_glacier_the_same_figures(seed: int, n: int) -> None:
    inventory, years = region_of_glaciers(seed, n)
    rng = np.random.default_rng(seed)
    names = dict(zip(inventory["glacier_id"], [f"x{i}" for i in rng.permutation(n)], strict=True))
    others = {year: renamed(frame, names, rng) for year, frame in years.items()}
    changes, excluded = area_changes(years[2015], years[2023], SETTINGS)
    again, excluded_again = area_changes(others[2015], others[2023], SETTINGS)

    def by_new_name(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(glacier_id=frame["glacier_id"].map(names)).set_index("glacier_id").sort_index()

    def as_it_is(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.set_index("glacier_id").sort_index()

    def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
        pd.testing.assert_frame_equal(first, second, check_index_type=False)

    same(by_new_name(changes), as_it_is(again))
    same(by_new_name(excluded), as_it_is(excluded_again))
    assert len(changes) + len(excluded) == len(set(years[2015]["glacier_id"]) | set(years[2023]["glacier_id"]))
    trends = area_trends(pd.concat(years.values(), ignore_index=True), SETTINGS)
    trends_again = area_trends(pd.concat(list(others.values())[::-1], ignore_index=True), SETTINGS)
    same(by_new_name(trends), as_it_is(trends_again))  # the bootstrap's bounds too: its seed knows no position
    totals = regional_changes(changes, inventory, years[2023], SETTINGS, 2023, 2015)
    totals_again = regional_changes(again, renamed(inventory, names, rng), others[2023], SETTINGS, 2023, 2015)
    pd.testing.assert_frame_equal(totals, totals_again)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30))
def test_measured_totals_are_sums_of_the_glaciers_by_every_grouping(seed: int, n: int) -> None:
    inventory, years = region_of_glaciers(seed, n)
    changes, _ = area_changes(years[2015], years[2023], SETTINGS)
    aspects = pd.Series(np.linspace(0, 359, n), index=inventory["glacier_id"])
    totals = regional_changes(changes, inventory, years[2023], SETTINGS, 2023, 2015, aspects)
    measured = totals[totals["method"] == "measured"]
    for _, groups in measured.groupby("grouping"):
        assert groups["n_glaciers"].sum() == len(changes)
        for column in ("area_km2", "baseline_area_km2", "rate_km2_per_year"):
            assert np.nansum(groups[column]) == pytest.approx(changes[column].sum(), abs=1e-9)
        # Fully dependent errors (published) add up over groups too.
        assert np.nansum(groups["std_km2"]) == pytest.approx(changes["std_km2"].sum(), abs=1e-9)
    passing = totals[(totals["method"] == "filtered") & (totals["grouping"] == "region")]
    assert passing["n_glaciers"].sum() == changes["ok"].sum()


# --------------------------------------------------------------------------------------------- through files
VALLEY = Valley(
    [
        at((0, 0), (203, 0), (217, 160), (203, 300), (4, 300)),
        at((185, 0), (400, 0), (400, 300), (190, 300)),  # lies over a part of the first
        at((0, 300), (203, 300), (203, 400), (0, 400)),
    ]
)
FOLDS = {"G0": 1, "G1": 2, "G2": 1}
TAUS = {"G0": 0.1, "G1": 0.25, "G2": 0.4}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A store with cubes, maps and taus of three glaciers, tables in a strange order."""
    storage = Storage(tmp_path)
    region = load_region("demo")
    points = VALLEY.glaciers.geometry.representative_point()
    glaciers = VALLEY.glaciers.assign(lon=points.x, lat=points.y, modelled=True)
    storage.write_table("glaciers", glaciers.iloc[[2, 0, 1]])
    storage.write_table("zones", VALLEY.zones.iloc[::-1])
    storage.write_table("debris", VALLEY.debris)
    for fold in (1, 2):
        mine = [g for g in ("G2", "G1", "G0") if FOLDS[g] == fold]
        storage.write_table("taus", pd.DataFrame({"glacier_id": mine, "tau": [TAUS[g] for g in mine]}), {"fold": fold})
    rng = np.random.default_rng(1)
    for glacier_id, cube in VALLEY.cubes.items():
        shape = cube["mask"].shape
        for path in (storage.cube(2015, glacier_id), storage.prediction(2015, glacier_id)):
            Path(str(path)).parent.mkdir(parents=True, exist_ok=True)
        write_cube(cube.assign_attrs(fingerprint=f"cube of {glacier_id}"), Path(str(storage.cube(2015, glacier_id))))
        grid = assign_crs(cube, 32632).odc.geobox
        mean, std = rng.random(shape, dtype=np.float32), 0.2 * rng.random(shape, dtype=np.float32)
        write_prediction(Path(str(storage.prediction(2015, glacier_id))), mean, std, grid, {})
    cubes = {g: {"fingerprint": f"cube of {g}", "height_px": 1, "width_px": 1} for g in reversed(VALLEY.cubes)}
    table = pd.DataFrame.from_dict(cubes, orient="index").rename_axis("glacier_id").reset_index()
    table = table.assign(image_date=pd.Timestamp("2015-08-29"), scene_ids="S", utm_epsg=32632, size_bytes=1)
    storage.write_table("cubes", table, {"year": 2015})
    for asset in ("inventory_outlines", "glacier_zones", "debris_outlines"):
        storage.write_state(asset, "all", {"input": "", "output": f"content of {asset}"})
    return Workspace(region, storage)


def with_areas(workspace: Workspace, **areas: Any) -> Workspace:
    settings_of: Region = load_region("demo", {f"areas.{key}": value for key, value in areas.items()})
    return Workspace(settings_of, workspace.storage)


@pytest.mark.parametrize("shared_ground", ["each", "once"])
@pytest.mark.parametrize("pixels", ["whole", "fractional"])
def test_a_glacier_is_measured_on_its_own_cube_map_tau_and_polygons(
    workspace: Workspace, pixels: str, shared_ground: str
) -> None:
    site: Site = with_areas(workspace, pixels=pixels, shared_ground=shared_ground).site
    for glacier_id, cube in VALLEY.cubes.items():
        got = stages.area_of(site, 2015, FOLDS[glacier_id], glacier_id)
        prediction = read_prediction(Path(str(workspace.storage.prediction(2015, glacier_id))))
        shares = VALLEY.shares(glacier_id, pixels, shared_ground)
        expected = area_row(prediction["mean"], prediction["std"], cube, TAUS[glacier_id], shares=shares)
        assert got == pytest.approx(expected)
        assert got["tau"] == TAUS[glacier_id] and got["glacier_id"] == glacier_id
        outlines = stages.outlines_of(site, 2015, FOLDS[glacier_id], glacier_id)
        assert set(outlines["glacier_id"]) == {glacier_id}


def test_outlines_are_simplified_on_request_only(workspace: Workspace) -> None:
    plain = stages.outlines_of(workspace.site, 2015, 1, "G0")
    smooth = stages.outlines_of(with_areas(workspace, simplify_m=15.0).site, 2015, 1, "G0")
    assert smooth.get_coordinates().shape[0] < plain.get_coordinates().shape[0]


@pytest.mark.parametrize("measure", [stages.area_of, stages.outlines_of])
def test_a_map_that_the_table_does_not_name_is_not_measured(workspace: Workspace, measure: Any) -> None:
    rows = pd.DataFrame({"glacier_id": ["G0"], "fingerprint": "another", "cube_fingerprint": "c", "member_sha256": "m"})
    workspace.storage.write_table("predictions", rows, {"year": 2015, "fold": 1})
    with pytest.raises(UpstreamError, match="is not the one that the table predictions names"):
        measure(workspace.site, 2015, 1, "G0")


def test_no_outlines_of_maps_that_are_older_than_their_cubes(workspace: Workspace) -> None:
    rows = pd.DataFrame({"glacier_id": ["G0"], "fingerprint": "f", "cube_fingerprint": "old", "member_sha256": "m"})
    workspace.storage.write_table("predictions", rows, {"year": 2015, "fold": 1})
    cube = {"glacier_id": "G0", "fingerprint": "new", "image_date": pd.Timestamp("2015-08-01"), "scene_ids": "s"}
    sizes = dict.fromkeys(("height_px", "width_px", "utm_epsg", "size_bytes"), 1)
    workspace.storage.write_table("cubes", pd.DataFrame([cube | sizes]), {"year": 2015})
    with pytest.raises(UpstreamError, match="1 maps are older than their cubes"):
        stages.glacier_outlines(workspace, 2015)


def test_areas_are_made_again_when_what_they_were_measured_by_changes(workspace: Workspace) -> None:
    whole = stages._shares_inputs(workspace)
    fractional = with_areas(workspace, pixels="fractional")
    assert stages._shares_inputs(with_areas(workspace, simplify_m=5.0)) == whole  # of no effect on areas
    first = stages._shares_inputs(fractional)
    assert first != whole
    workspace.storage.write_state("glacier_zones", "all", {"input": "", "output": "other zones"})
    assert stages._shares_inputs(workspace) == whole  # whole pixels come from the cube alone
    assert stages._shares_inputs(fractional) != first
    workspace.storage.state_path("glacier_zones").unlink()
    with pytest.raises(UpstreamError, match="glacier_zones"):
        stages._shares_inputs(fractional)
