"""Real outlines and real scenes through the first half of the chain: inventory, choice, cubes.

The networks of these regions are trained by `dl4gam materialize --region swiss` (minutes); here the inputs are checked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dl4gam_assets.compute import Mapper
from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import cubes, imagery, inventory, terrain
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage


def _through_cubes(name: str, years: list[int], home: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("DL4GAM_REAL_DATA", str(data))
    ws = Workspace(load_region(name), Storage(home / name), Mapper(1))
    for stage in (
        inventory.inventory_outlines,
        inventory.debris_outlines,
        inventory.glacier_zones,
        inventory.cross_validation_folds,
        terrain.elevation,
    ):
        stage(ws)
    for year in years:
        for by_year in (
            imagery.scene_candidates,
            imagery.selected_scenes,
            terrain.elevation_change,
            cubes.glacier_cubes,
        ):
            by_year(ws, year)
    return ws


def test_khumbu_from_outlines_to_cubes(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = _through_cubes("khumbu", [2000], tmp_path, real_data, monkeypatch)
    table = ws.storage.read_table("cubes", year=2000)
    glaciers = ws.storage.read_table("glaciers")
    assert len(glaciers) == 86 and len(table) == int(glaciers["modelled"].sum()) == 50
    assert set(table["image_date"].dt.strftime("%Y-%m-%d")) == {"2000-10-30"}
    assert set(table["utm_epsg"]) == {32645}
    # Clean ice is brighter than the ground around it: image and outlines lie on each other.
    brighter = []
    for glacier_id in table["glacier_id"]:
        with open_cube(Path(str(ws.storage.cube(2000, glacier_id)))) as cube:
            stack, valid = channel_stack(cube, ["blue"])
            ice, cell = cube_mask(cube, "glacier"), cube_mask(cube, "cell")
            ring = cube_mask(cube, "zone_100") & ~cube_mask(cube, "any_glacier")
            assert np.isfinite(stack[0][valid]).all() and cell[ice].all()
            if (ring & valid).sum() > 50:
                brighter.append(np.median(stack[0][ice & valid]) > np.median(stack[0][ring & valid]))
    assert np.mean(brighter) > 0.75


def test_swiss_from_ice_bodies_to_cubes(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = _through_cubes("swiss", [2015, 2018], tmp_path, real_data, monkeypatch)
    glaciers = ws.storage.read_table("glaciers")
    assert len(glaciers) == 1400 and int(glaciers["modelled"].sum()) == 10
    assert glaciers["inventory_area_km2"].sum() == pytest.approx(961.3, rel=0.003)
    for year, first, last in ((2015, "2015-08-01", "2016-10-15"), (2018, "2018-08-01", "2018-10-15")):
        table = ws.storage.read_table("cubes", year=year)
        assert len(table) == 10
        assert table["image_date"].between(first, last).all()
    rhone = ws.storage.read_table("scenes", year=2018).query("glacier_id == 'B43-03' and selected").iloc[0]
    assert f"{rhone['date']:%Y-%m-%d}" == "2018-09-09" and rhone["reason"].startswith("selected: rank 1 of 3")
    with open_cube(Path(str(ws.storage.cube(2018, "B43-03")))) as cube:
        stack, valid = channel_stack(cube, ["blue", "nir_narrow", "nir"])
        assert not valid.all() and np.isnan(stack[0][~valid]).all()
        assert 0.05 < float(np.median(stack[0][valid])) < 1.1
        assert cube_mask(cube, "debris").any()
    # A person's word goes before the ranking, and only the choice is made again.
    lines = tmp_path / "checked.csv"
    lines.write_text("glacier_id,year,date\nB43-03,2018,2018-09-17\nB36-01,2018,reject\n")
    checked = load_region("swiss", {"imagery.selection.overrides": str(lines)})
    again = Workspace(checked, ws.storage, Mapper(1))
    assert imagery.scene_candidates(again, 2018).unchanged
    imagery.selected_scenes(again, 2018)
    scenes = ws.storage.read_table("scenes", year=2018)
    chosen = scenes[scenes["selected"]].set_index("glacier_id")
    assert (
        f"{chosen.loc['B43-03', 'date']:%m-%d}" == "09-17" and "override by the user" in chosen.loc["B43-03", "reason"]
    )
    assert "B36-01" not in chosen.index and len(chosen) == 9
    rejected = ws.storage.read_table("failures").query("stage == 'selected_scenes' and glacier_id == 'B36-01'")
    assert len(rejected) == 1 and "override" in rejected["error"].iloc[0]
