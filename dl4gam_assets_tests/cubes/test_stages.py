"""Terrain and cubes through their stages on a small simulated region: tiles, missing companions, what is rebuilt."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import rasterio.warp
import rasterio.windows
import shapely
import shapely.geometry
import xarray as xr

from dl4gam_assets.compute import Mapper
from dl4gam_assets.cubes import channel_stack, cube_channels, open_cube
from dl4gam_assets.segmentation.packing import MISSING, PackedCubes, pack_cubes
from dl4gam_assets.settings import PUBLISHED_CHANNELS, SettingsError, parse_region
from dl4gam_assets.stages import cubes, imagery, inventory, simulation, terrain
from dl4gam_assets.stages.base import UpstreamError, Workspace
from dl4gam_assets.stages.code import code_fingerprint, plain_code
from dl4gam_assets.storage import Storage, safe_name
from dl4gam_assets.terrain import TileIndex
from dl4gam_assets_tests.region_files import packaged

YEAR = 2016
CHANNELS = [*PUBLISHED_CHANNELS, "velocity"]


class Place:
    """A region in a folder, changed by settings and run up to its cubes."""

    def __init__(self, home: Path, **terrain_settings: Any):
        raw = packaged("demo")
        raw["years"] = {"first": 2015, "last": YEAR, "baseline": 2015}
        raw["simulation"]["size_px"] = [640, 640]
        raw["terrain"] |= terrain_settings
        self.raw, self.home = raw, home

    @property
    def ws(self) -> Workspace:
        return Workspace(parse_region(self.raw), Storage(self.home), Mapper(1))

    def simulate(self) -> None:
        simulation.simulated_inputs(self.ws)
        inventory.inventory_outlines(self.ws)
        inventory.debris_outlines(self.ws)
        inventory.glacier_zones(self.ws)

    def run(self, **choice: Any) -> dict[str, dict[str, Any]]:
        ws = self.ws
        return {
            "elevation": terrain.elevation(ws, **choice).metadata,
            "elevation_change": terrain.elevation_change(ws, YEAR, **choice).metadata,
            "scene_candidates": imagery.scene_candidates(ws, YEAR).metadata,
            "selected_scenes": imagery.selected_scenes(ws, YEAR).metadata,
            "glacier_cubes": cubes.glacier_cubes(ws, YEAR).metadata,
        }

    def stamps(self, folder: str) -> dict[str, int]:
        files = (self.home / folder).rglob("*")
        return {f.stem: f.stat().st_mtime_ns for f in files if f.suffix in {".nc", ".tif"}}

    def changed(self, folder: str, before: dict[str, int]) -> set[str]:
        return {name for name, stamp in self.stamps(folder).items() if before.get(name) != stamp}

    def table(self, name: str, **where: Any) -> pd.DataFrame:
        return self.ws.storage.read_table(name, **where)


def cut(path: Path, folder: Path, rows: int, columns: int) -> list[Path]:
    """Cut a raster into tiles."""
    folder.mkdir(exist_ok=True)
    out = []
    with rasterio.open(path) as source:
        for i in range(rows):
            for j in range(columns):
                top, bottom = source.height * i // rows, source.height * (i + 1) // rows
                left, right = source.width * j // columns, source.width * (j + 1) // columns
                window = rasterio.windows.Window(left, top, right - left, bottom - top)
                profile = {"driver": "GTiff", "height": bottom - top, "width": right - left, "count": 1}
                profile |= {"dtype": source.dtypes[0], "crs": source.crs, "nodata": source.nodata}
                name = folder / f"tile_{i}_{j}.tif"
                with rasterio.open(name, "w", transform=source.window_transform(window), **profile) as target:
                    target.write(source.read(1, window=window), 1)
                out.append(name)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The region with its DEM in tiles, dh/dt with errors, velocity on a part of it; run once."""
    place = Place(
        tmp_path_factory.mktemp("cubes_stage"),
        dem=["dem_tiles"],
        velocity=["velocity.tif"],
        elevation_change=[
            {"path": "dhdt_2010_2015.tif", "error_path": "dhdt_error.tif", "start": 2010, "end": 2015},
        ],
    )
    place.simulate()
    inputs = place.home / "inputs"
    cut(inputs / "dem.tif", inputs / "dem_tiles", 3, 3)
    with rasterio.open(inputs / "dhdt_2010_2015.tif") as source:
        values, profile = source.read(1), source.profile
    profile |= {"driver": "GTiff", "dtype": "float32", "nodata": -9999.0}
    for name, layer in (("dhdt_error.tif", np.abs(values) * 0.3 + 0.1), ("velocity.tif", np.abs(values) * 20)):
        layer = np.where(np.isfinite(values), layer, -9999.0).astype(np.float32)
        if name == "velocity.tif":
            layer[:, layer.shape[1] // 2 :] = -9999.0
        with rasterio.open(inputs / name, "w", **profile) as target:
            target.write(layer, 1)
    place.first = place.run()  # type: ignore[attr-defined]
    return place


@pytest.fixture
def copy(base: Place, tmp_path: Path) -> Place:
    shutil.copytree(base.home, tmp_path / "copy")
    made = Place(tmp_path / "copy")
    made.raw, made.first = deepcopy(base.raw), base.first  # type: ignore[attr-defined]
    return made


def test_counts_of_what_is_there_and_what_is_missing(base: Place) -> None:
    first = base.first  # type: ignore[attr-defined]
    assert first["elevation"]["failed_glaciers"] == 0 and first["elevation"]["glaciers_without_elevation"] == 0
    elevations = base.table("elevations")
    assert len(elevations) > 3
    without = elevations["velocity_mean_m_per_year"].isna()
    assert first["elevation"]["glaciers_without_velocity"] == without.sum()
    assert elevations["velocity_missing_share"].between(0.01, 1).any()
    table = base.table("cubes", year=YEAR)
    assert table["velocity_missing_share"].notna().all()
    for row in table.itertuples():
        with open_cube(Path(str(base.ws.storage.cube(YEAR, row.glacier_id)))) as cube:
            assert {"dem", "dhdt", "dhdt_err", "v", "slope"} <= set(cube.data_vars)
            assert float(np.isnan(cube["v"]).mean()) == pytest.approx(row.velocity_missing_share)
            known = np.isfinite(cube["dhdt"]) & np.isfinite(cube["dhdt_err"])
            assert float(abs(cube["dhdt_err"] - (abs(cube["dhdt"]) * 0.3 + 0.1)).where(known).quantile(0.9)) < 0.05
            assert cube.attrs["fingerprint"] == row.fingerprint


def test_tiles_give_the_cubes_of_the_whole_dem(base: Place, copy: Place) -> None:
    """... and because the values are the same, nothing downstream of the static layers is made again."""
    before = copy.stamps("cubes")
    fingerprints = copy.table("elevations").set_index("glacier_id")["fingerprint"]
    copy.raw["terrain"]["dem"] = ["dem.tif"]
    static = copy.stamps("static")
    copy.run()
    assert copy.changed("static", static) == set(static)  # made from other files ...
    pd.testing.assert_series_equal(copy.table("elevations").set_index("glacier_id")["fingerprint"], fingerprints)
    assert copy.changed("cubes", before) == set()  # ... with the same content


def test_tiles_from_a_stac_catalog_give_the_same_cubes(base: Place, copy: Place) -> None:
    inputs = copy.home / "inputs"
    catalog = pystac.Catalog("dem", "tiles of the elevation model")
    for tile in sorted((inputs / "dem_tiles").glob("*.tif")):
        with rasterio.open(tile) as source:
            box = list(rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds))
        day = dt.datetime(2013, 8, 1, tzinfo=dt.UTC)
        item = pystac.Item(tile.stem, shapely.geometry.mapping(shapely.box(*box)), box, day, {})
        item.add_asset("data", pystac.Asset(str(tile)))
        catalog.add_item(item)
    catalog.normalize_and_save(str(inputs / "dem_stac"), pystac.CatalogType.SELF_CONTAINED)
    copy.raw["terrain"] |= {"dem": [], "dem_catalog": {"kind": "stac-folder", "path": "dem_stac/catalog.json"}}
    before = copy.table("elevations").set_index("glacier_id")["fingerprint"]
    static = copy.stamps("static")
    copy.run()
    assert copy.changed("static", static) == set(static)
    pd.testing.assert_series_equal(copy.table("elevations").set_index("glacier_id")["fingerprint"], before)


def test_another_scene_for_one_glacier_changes_one_cube(copy: Place) -> None:
    scenes = copy.table("scenes", year=YEAR)
    ranked = scenes[scenes["rank"].notna()]
    glacier = ranked.groupby("glacier_id").size().idxmax()
    mine = ranked[ranked["glacier_id"] == glacier].sort_values("rank")
    assert len(mine) > 1
    (copy.home / "inputs" / "overrides.csv").write_text(
        f"glacier_id,year,date\n{glacier},{YEAR},{mine.iloc[1]['date']:%Y-%m-%d}\n"
    )
    copy.raw["imagery"]["selection"] = {"overrides": "overrides.csv"}
    cubes_before, static_before = copy.stamps("cubes"), copy.stamps("static")
    before = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    copy.run()
    assert copy.changed("cubes", cubes_before) == {safe_name(glacier)}
    assert copy.changed("static", static_before) == set()
    after = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    assert set(after.index[after != before]) == {glacier}


def _own_catalog(copy: Place) -> Path:
    """The simulated files as a region's own catalog, whose items may change; candidates and cubes are made from it."""
    copy.raw.pop("simulation")
    copy.raw["data_root"] = str(copy.home / "inputs")
    copy.run()
    return copy.home / "inputs" / "stac"


def _items(copy: Place) -> dict[str, Path]:
    return {p.stem: p for p in (copy.home / "inputs" / "stac").rglob("*.json") if '"Feature"' in p.read_text()}


def _darker(item: Path, by: float) -> None:
    """Correct the offset of all bands in an item."""
    said = json.loads(item.read_text())
    for asset in said["assets"].values():
        for band in asset.get("raster:bands", []):
            if "offset" in band:
                band["offset"] -= by
    item.write_text(json.dumps(said))


def _chosen(copy: Place) -> pd.DataFrame:
    """The chosen images by glacier: ids of the items that gave pixels, and of all items of their day."""
    scenes = copy.table("scenes", year=YEAR)
    scenes = scenes[scenes["selected"].astype(bool)].set_index("glacier_id")
    return pd.DataFrame({"used": scenes["scene_ids"].str.split("+"), "day": scenes["checksums"].map(json.loads)})


def test_a_corrected_offset_is_scored_again_and_changes_the_cubes_that_it_concerns(copy: Place) -> None:
    _own_catalog(copy)
    candidates, chosen = copy.table("candidates", year=YEAR), _chosen(copy)
    before = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    count = {i: sum(i in ids for ids in chosen["used"]) for i in sorted(set(chosen["used"].explode()))}
    item = min(count, key=lambda i: count[i])
    assert 0 < count[item] < len(chosen)
    made = copy.stamps("cubes")
    _darker(_items(copy)[item], 0.01)
    done = copy.run()
    of_day = candidates["checksums"].map(lambda text: item in json.loads(text))
    near = set(candidates.loc[of_day, "glacier_id"])
    assert done["scene_candidates"]["scored_now"] == len(near) < done["scene_candidates"]["glaciers"]
    both = candidates.merge(copy.table("candidates", year=YEAR), on=["glacier_id", "date"], suffixes=("", "_now"))
    fall = both["albedo"] - both["albedo_now"]
    assert fall[of_day.to_numpy()].between(0.009, 0.0101).any() and (fall[~of_day.to_numpy()].dropna() == 0).all()
    now = _chosen(copy)
    assert set(now.index) == set(chosen.index)
    changed = {g for g in now.index if item in now["used"][g] or item in chosen["used"][g]}
    after = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    assert set(after.index[after != before.reindex(after.index)]) == changed
    again = {g for g in now.index if item in now["day"][g] or item in chosen["day"][g]}
    assert changed and copy.changed("cubes", made) == {safe_name(g) for g in again}


def test_force_builds_cubes_again(copy: Place) -> None:
    made = copy.stamps("cubes")
    assert cubes.glacier_cubes(copy.ws, YEAR).unchanged
    cubes.glacier_cubes(copy.ws, YEAR, force=True)
    assert copy.changed("cubes", made) == set(made) != set()


def test_other_code_of_reading_scores_and_builds_again(copy: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """... with equal content, where the change of code changes no value."""
    before = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    made = copy.stamps("cubes")
    assert copy.run()["scene_candidates"]["scored_now"] == copy.first["scene_candidates"]["scored_now"]  # unchanged
    assert copy.changed("cubes", made) == set()
    for module in (imagery, cubes):
        assert "dl4gam_assets.imagery.masks" in module._CODE and "dl4gam_assets.imagery.scaling" in module._CODE
        monkeypatch.setattr(module, "_CODE", (*module._CODE, "dl4gam_assets.imagery.ranking"))
    done = copy.run()
    assert done["scene_candidates"]["scored_now"] == done["scene_candidates"]["glaciers"]
    assert copy.changed("cubes", made) == set(made)
    pd.testing.assert_series_equal(copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"], before)


def test_another_dem_tile_changes_only_the_glaciers_that_touch_it(copy: Place) -> None:
    inputs = copy.home / "inputs"
    tile = inputs / "dem_tiles" / "tile_0_0.tif"
    index = TileIndex.from_json((copy.home / "static" / "dem-tiles.json").read_text())
    ids = copy.table("elevations")["glacier_id"]
    named = {g: {Path(t.href).name for t in index.touching(terrain.grid_of(copy.ws.site, g))} for g in ids}
    touching = {g for g, names in named.items() if tile.name in names}
    assert 0 < len(touching) < len(ids)
    with rasterio.open(tile, "r+") as target:
        target.write(target.read(1) + 5, 1)
    static, made = copy.stamps("static"), copy.stamps("cubes")
    copy.run()
    assert copy.changed("static", static) == {safe_name(g) for g in touching}
    assert copy.changed("cubes", made) <= {safe_name(g) for g in touching} and copy.changed("cubes", made)


def test_a_broken_tile_is_a_failure_row_and_loses_no_glacier(copy: Place) -> None:
    tile = copy.home / "inputs" / "dem_tiles" / "tile_0_0.tif"
    whole = tile.read_bytes()
    tile.write_bytes(whole[: len(whole) // 3])
    count = len(copy.table("cubes", year=YEAR))
    before = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    done = copy.run()
    assert done["elevation"]["failed_glaciers"] > 0
    failures = copy.table("failures", stage="elevation")
    assert failures["error"].str.contains(r"tile_0_0\.tif can not be read", regex=True).all()
    table = copy.table("cubes", year=YEAR).set_index("glacier_id")
    assert len(table) == count
    assert (table.loc[failures["glacier_id"], "dem_missing_share"] == 1).all()
    assert (table["dem_missing_share"] == 1).sum() == len(failures) == done["elevation"]["glaciers_without_elevation"]
    for glacier in failures["glacier_id"]:
        with open_cube(Path(str(copy.ws.storage.cube(YEAR, glacier)))) as cube:
            channels = cube_channels(cube)  # masks, image and dh/dt are there; terrain is for the model to fill
            assert np.isnan(channels.sel(channel="dem")).all() and np.isfinite(channels.sel(channel="dhdt")).all()
    tile.write_bytes(whole)
    assert copy.run()["elevation"]["failed_glaciers"] == 0  # repaired, it is tried again
    after = copy.table("cubes", year=YEAR).set_index("glacier_id")["fingerprint"]
    pd.testing.assert_series_equal(after, before)


def test_a_broken_dhdt_tile_is_a_failure_row_and_the_cube_goes_without(copy: Place) -> None:
    path = copy.home / "inputs" / "dhdt_2010_2015.tif"
    path.write_bytes(path.read_bytes()[:400])
    done = copy.run()
    failures = copy.table("failures", stage="elevation_change")
    table = copy.table("cubes", year=YEAR)
    assert done["elevation_change"]["failed_glaciers"] == len(failures) == len(table) > 0
    assert failures["error"].str.contains("dhdt_2010_2015.tif", regex=False).all()
    assert (table["dhdt_missing_share"] == 1).all() and (table["dem_missing_share"] < 1).all()
    with open_cube(Path(str(copy.ws.storage.cube(YEAR, table["glacier_id"].iloc[0])))) as cube:
        assert (cube_channels(cube).sel(channel="dhdt") == 0).all()


def test_without_companions_every_glacier_keeps_its_cube(copy: Place) -> None:
    copy.raw["model"]["channels"] = ["red", "green", "blue", "dhdt"]
    copy.raw["terrain"] = {"dem": [], "elevation_change": []}
    done = copy.run()
    table = copy.table("cubes", year=YEAR)
    assert len(table) == done["glacier_cubes"]["glaciers"] == len(copy.table("elevations"))
    assert (table["dem_missing_share"] == 1).all() and (table["dhdt_missing_share"] == 1).all()
    assert table["velocity_missing_share"].isna().all()
    assert done["elevation_change"]["period"] == "none"
    assert done["elevation_change"]["glaciers_without_dhdt"] == len(table)
    with open_cube(Path(str(copy.ws.storage.cube(YEAR, table["glacier_id"].iloc[0])))) as cube:
        stack, _ = channel_stack(cube, ["red", "dhdt", "velocity"])
        assert (stack[1:] == 0).all()


def test_tiles_of_dhdt_that_do_not_reach_a_glacier_are_missing_data(copy: Place) -> None:
    inputs = copy.home / "inputs"
    parts = cut(inputs / "dhdt_2010_2015.tif", inputs / "dhdt_tiles", 1, 3)
    parts[1].unlink()
    parts[2].unlink()
    copy.raw["terrain"]["elevation_change"] = [{"path": "dhdt_tiles/*.tif", "start": 2010, "end": 2015}]
    done = copy.run()
    changes = copy.table("elevation_changes", year=YEAR)
    assert done["elevation_change"]["failed_glaciers"] == 0
    assert done["elevation_change"]["glaciers_without_dhdt"] == changes["dhdt_mean_m_per_year"].isna().sum() > 0
    assert changes["missing_share"].max() == 1 and changes["missing_share"].min() < 1
    assert len(copy.table("cubes", year=YEAR)) == len(changes)


def test_voids_of_dhdt_without_a_tag_are_missing(copy: Place) -> None:
    """A hole in dh/dt and its error, once tagged, once as -9999 untagged, once as another number that can not be."""
    inputs = copy.home / "inputs"
    names = ("dhdt_2010_2015.tif", "dhdt_error.tif")
    found = []
    for void, tag in ((-9999.0, -9999.0), (-9999.0, None), (-3.4e38, None), (777.0, None)):
        for name in names:
            with rasterio.open(inputs / name) as source:
                values, profile = source.read(1), source.profile
            values = np.where(np.abs(values) < 100, values, np.nan)
            values[values.shape[0] // 3 : values.shape[0] // 2] = np.nan
            profile |= {"driver": "GTiff", "dtype": "float32", "nodata": tag}
            with rasterio.open(inputs / name, "w", **profile) as target:
                target.write(np.where(np.isnan(values), void, values).astype(np.float32), 1)
        assert terrain.elevation_change(copy.ws, YEAR).metadata["failed_glaciers"] == 0
        found.append(copy.table("elevation_changes", year=YEAR).set_index("glacier_id"))
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0])
    assert found[0]["missing_share"].between(0.02, 0.98).any() and found[0]["dhdt_mean_m_per_year"].abs().max() < 20
    for glacier in found[0].index:
        with rasterio.open(
            str(terrain.dhdt_path(copy.ws.site, copy.ws.region.terrain.elevation_change[0], glacier))
        ) as s:
            rates, errors = s.read(1), s.read(2)
            assert np.nanmin(errors, initial=0) >= 0 and np.nanmax(np.abs(rates), initial=0) < 20
    copy.raw["terrain"]["dhdt_nodata"] = float(np.nanmedian(values))  # the setting counts where no tag does
    terrain.elevation_change(copy.ws, YEAR)
    assert (
        copy.table("elevation_changes", year=YEAR)
        .set_index("glacier_id")["missing_share"]
        .ge(found[0]["missing_share"])
        .all()
    )


def test_settings_that_name_nothing_stop_the_stage(copy: Place) -> None:
    copy.raw["terrain"]["velocity"] = ["no_such_folder/*.tif"]
    with pytest.raises(UpstreamError, match=r"no file matches .*no_such_folder.* \(terrain\.velocity\)"):
        terrain.elevation(copy.ws)


def test_a_channel_needs_its_companion(copy: Place) -> None:
    copy.raw["model"]["channels"] = ["red", "velocity"]
    assert copy.ws.region.model.channels == ["red", "velocity"]
    copy.raw["terrain"]["velocity"] = []
    with pytest.raises(SettingsError, match=r"velocity needs terrain\.velocity"):
        _ = copy.ws


def test_code_counts_and_comments_do_not() -> None:
    one = '"""Doc."""\ndef f(a):\n    """Says."""\n    # why\n    return a  + 1\n'
    same = '"""Other words."""\n\n\ndef f(a):\n    """More."""\n    return a + 1\n'
    assert plain_code(one) == plain_code(same)
    assert plain_code(one) != plain_code(one.replace("+ 1", "+ 2"))
    masks, files = "dl4gam_assets.cubes.masks", "dl4gam_assets.cubes.files"
    assert code_fingerprint((masks,)) != code_fingerprint((files,)) != code_fingerprint((files,), ("xdem",))


def test_training_sees_the_channels_that_the_file_gives(base: Place, tmp_path: Path) -> None:
    """Packed for training and read back, every channel is that of the public function on the plain file."""
    storage = base.ws.storage
    ids = base.table("cubes", year=YEAR)["glacier_id"].tolist()[:3]
    paths = {g: Path(str(storage.cube(YEAR, g))) for g in ids}
    packed = pack_cubes(paths, CHANNELS, tmp_path / "packed")
    packed = packed if isinstance(packed, PackedCubes) else PackedCubes.open(tmp_path / "packed")
    for glacier in ids:
        with xr.open_dataset(paths[glacier], decode_coords="all") as plain:
            channels = cube_channels(plain, CHANNELS)
            assert channels.dims == ("channel", "y", "x") and channels["channel"].to_numpy().tolist() == CHANNELS
            seen = packed.glacier(glacier)
            values = np.where(seen.channels == MISSING, np.nan, seen.channels * packed.steps[:, None, None])
            assert (np.isnan(values) == np.isnan(channels.to_numpy())).all()
            for i, name in enumerate(CHANNELS):
                away = np.abs(values[i] - channels[i].to_numpy())
                assert np.nanmax(away) <= 0.51 * packed.steps[i] + 1e-4 * np.nanmax(np.abs(values[i])), name
            assert (seen.valid == channels["usable"].to_numpy()).all()
            assert not np.isnan(values[CHANNELS.index("velocity")]).any()
