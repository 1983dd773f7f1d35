"""One input is changed at a time: exactly the estimates that it concerns are stale, and a run makes only them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import rasterio.warp
import rasterio.windows

from dl4gam_assets.lineage.environment import software
from dl4gam_assets.stages import terrain as terrain_stages
from dl4gam_assets.stages.base import UpstreamError
from dl4gam_assets.stages.provenance import terrain_of
from dl4gam_assets.stages.staleness import Cause, Staleness, find_stale
from dl4gam_assets.terrain import match_period
from dl4gam_assets_tests.small_region import Small

Key = tuple[str, int]


@pytest.fixture
def copy(small: Small, tmp_path: Path) -> Small:
    return small.copy(tmp_path)


def _keys(frame: pd.DataFrame) -> set[Key]:
    return {(str(g), int(y)) for g, y in zip(frame["glacier_id"], frame["year"], strict=True)}


def _of(found: Staleness, state: str) -> set[Key]:
    return _keys(found.estimates[found.estimates["state"] == state])


def _figures(region: Small) -> pd.DataFrame:
    areas = region.storage.read_table("areas").set_index(["glacier_id", "year"])
    lineage = region.storage.read_table("lineage").set_index(["glacier_id", "year"])
    return areas[["area_km2", "lower_km2", "upper_km2"]].join(lineage[["prediction_fingerprint", "tau"]])


def _changed(before: pd.DataFrame, after: pd.DataFrame) -> set[Key]:
    """Estimates that are made from something else, or came out otherwise."""
    assert before.index.sort_values().equals(after.index.sort_values())
    after = after.loc[before.index]
    return {(str(g), int(y)) for g, y in before.index[(before != after).any(axis=1)]}


def _brighten(region: Small, item: str) -> None:
    """Other values in a file of a scene."""
    file = next(f for f in Path(str(region.storage.inputs())).rglob("*.tif") if item in str(f) and "red" in f.name)
    with rasterio.open(file) as source:
        profile, values = source.profile, source.read()
    with rasterio.open(file, "w", **profile) as target:
        target.write((values * 0.9).astype(values.dtype))


def test_nothing_is_stale_where_nothing_changed(small: Small) -> None:
    found = find_stale(small.workspace())
    assert found.current and not len(found.estimates) and not len(found.partitions) and not found.gone
    assert found.checked > 40


def test_another_file_of_a_scene(copy: Small) -> None:
    scenes = copy.storage.read_table("scenes", year=2016)
    chosen = scenes[scenes["selected"].astype(bool)]
    item = chosen["scene_ids"].str.split("+").str[0].value_counts().index[-1]
    users = set(chosen.loc[[item in str(s).split("+") for s in chosen["scene_ids"]], "glacier_id"])
    others = set(scenes.loc[[item in str(s).split("+") for s in scenes["scene_ids"]], "glacier_id"]) - users
    assert users and len(users) < len(chosen)
    before = _figures(copy)
    _brighten(copy, item)
    found = find_stale(copy.workspace())
    assert _of(found, "stale") == {(g, 2016) for g in users}
    assert _of(found, "may change") == {(g, 2016) for g in others}
    assert found.estimates["reasons"].str.contains("is another file than it was").all()
    assert copy.run(years=[2016]).failed == []
    changed = _changed(before, _figures(copy))
    assert {(g, 2016) for g in users} <= changed <= {(g, 2016) for g in users | others}
    left = find_stale(copy.workspace())
    assert not len(left.estimates) and {c.asset for c in left.causes} <= {"report"}  # of 2017: it shows all years


def test_other_weights(copy: Small) -> None:
    file = Path(str(copy.storage.model(1, 2) / "model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(bytes(content))
    found = find_stale(copy.workspace())
    folds = copy.storage.read_table("folds")
    areas = copy.storage.read_table("areas")
    of_fold = folds[folds["role"] == "test"].set_index("glacier_id")["fold"]
    concerned = [g for g in areas["glacier_id"] if of_fold[g] in {1} | _pooled(copy)]
    assert _of(found, "stale") == _keys(areas[areas["glacier_id"].isin(concerned)])
    # Only those of the fold have another map; others share its validation glaciers for tau.
    maps = found.partitions.loc[found.partitions["asset"] == "glacier_predictions", "partition"]
    assert {str(p).partition(".")[2] for p in maps} == {"fold_1"}
    assert not _of(found, "may change")
    assert found.causes[0].asset == "ensemble_member" and found.causes[0].partition == "fold_1.member_02"
    members = _times(copy, "models")
    before = _figures(copy)
    assert copy.run().failed == []
    made = {name for name, time in _times(copy, "models").items() if members.get(name) != time and "member" in name}
    assert made and all("fold=1/member=02" in name for name in made)  # the other three members are kept
    again = _figures(copy)
    pd.testing.assert_frame_equal(  # trained again with the same seed: the same figures
        again[["area_km2", "lower_km2", "upper_km2"]], before.loc[again.index, ["area_km2", "lower_km2", "upper_km2"]]
    )
    assert find_stale(copy.workspace()).current


def _pooled(region: Small) -> set[int]:
    """Folds with too few validation glaciers for a rule of their own, which take those of other folds too."""
    taus = region.storage.read_table("taus")
    return set(taus.loc[taus["published_scope"] == "folds", "fold"].astype(int))


def _times(region: Small, folder: str) -> dict[str, int]:
    root = Path(str(region.storage.path(folder)))
    return {str(f.relative_to(root)): f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file()}


def test_a_setting_of_the_maps_concerns_all_estimates(copy: Small) -> None:
    copy.change(inference__threshold=0.45)
    found = find_stale(copy.workspace())
    assert _of(found, "stale") == _keys(copy.storage.read_table("areas"))
    assert found.estimates["reasons"].str.contains("threshold is 0.45, and was 0.5").all()


def test_a_setting_of_the_choice_concerns_the_glaciers_that_it_gives_another_image(copy: Small) -> None:
    copy.change(imagery__selection__ranking="min_max")
    found = find_stale(copy.workspace())
    before = _figures(copy)
    later = {key for key in _of(found, "stale") if key[1] != 2015}
    assert not _of(found, "may change")
    assert copy.run(years=[2016, 2017]).failed == []
    figures = _figures(copy)
    changed = _changed(before, figures)
    if not any(key[1] == 2015 for key in changed):  # the choice of the inventory year decides on the models
        assert changed == later
    assert changed <= _of(found, "stale")
    assert not len(find_stale(copy.workspace()).estimates)


def test_a_setting_of_later_assets_concerns_no_estimate(copy: Small) -> None:
    copy.change(change__sieve_px=25)
    found = find_stale(copy.workspace())
    assert not len(found.estimates) and not found.current
    assert {"glacier_outlines", "area_change"} <= set(found.partitions["asset"])
    assert "glacier_areas" not in set(found.partitions["asset"])


def test_an_image_of_the_inventory_year_concerns_the_folds_that_learn_from_it(copy: Small) -> None:
    """A glacier trains or validates some folds and is tested by one, which keeps its models."""
    scenes = copy.storage.read_table("scenes", year=2015)
    chosen = scenes[scenes["selected"].astype(bool)]
    item = chosen["scene_ids"].str.split("+").str[0].value_counts().index[-1]
    users = set(chosen.loc[[item in str(s).split("+") for s in chosen["scene_ids"]], "glacier_id"])
    _brighten(copy, item)
    found = find_stale(copy.workspace())
    folds = copy.storage.read_table("folds")
    areas = copy.storage.read_table("areas")
    learning = set(folds.loc[folds["glacier_id"].isin(users) & (folds["role"] != "test"), "fold"])
    tested = folds[(folds["role"] == "test")].set_index("glacier_id")["fold"]
    expected = {
        (g, y) for g, y in _keys(areas)
        # tau of all years comes from the map of the inventory year, and from other folds where a fold has few
        if tested[g] in learning or g in users or (learning and tested[g] in _pooled(copy))
    }  # fmt: skip
    assert _of(found, "stale") == expected


def test_a_file_that_is_gone_makes_nothing_stale_and_is_told(copy: Small) -> None:
    file = next(f for f in sorted(Path(str(copy.storage.inputs())).rglob("*.tif")) if "2016" in str(f))
    file.unlink()
    found = find_stale(copy.workspace())
    assert [Path(name).name for name in found.gone] == [file.name]
    assert not len(found.estimates)


def _all(region: Small) -> set[Key]:
    return _keys(region.storage.read_table("areas"))


def _shift(file: Path, by: float, target: Path | None = None, around: tuple[float, float] | None = None) -> None:
    """Other values in a raster; ``target``: in a new file, ``around`` a longitude and latitude only."""
    with rasterio.open(file) as source:
        profile, values = source.profile, source.read()
        if around is not None:
            (x,), (y,) = rasterio.warp.transform("EPSG:4326", source.crs, [around[0]], [around[1]])
            row, column = source.index(x, y)
            window = rasterio.windows.Window(column - 2, row - 2, 4, 4)
            values = source.read(window=window)
            profile |= {"width": 4, "height": 4, "transform": source.window_transform(window)}
    for name in ("blockxsize", "blockysize", "tiled"):
        profile.pop(name, None)
    with rasterio.open(target or file, "w", **(profile | {"driver": "GTiff"})) as out:
        out.write((values + by).astype(values.dtype))


def _cause(found: Staleness, asset: str) -> Cause:
    (cause,) = [c for c in found.causes if c.asset == asset]
    return cause


def test_another_tile_of_elevation_concerns_all_that_touch_it(copy: Small) -> None:
    _shift(Path(str(copy.storage.inputs())) / "dem.tif", 3)
    assert _of(find_stale(copy.workspace()), "stale") == _all(copy)


def test_tiles_that_are_replaced_and_added_at_once_concern_the_glaciers_at_either(copy: Small) -> None:
    inputs = Path(str(copy.storage.inputs()))
    glaciers = copy.storage.read_table("glaciers").query("modelled").set_index("glacier_id")
    west, east = glaciers["lon"].idxmin(), glaciers["lon"].idxmax()
    places = {g: (float(glaciers.loc[g, "lon"]), float(glaciers.loc[g, "lat"])) for g in (west, east)}
    _shift(inputs / "dem.tif", 5, inputs / "a.tif", places[west])
    copy.change(terrain__dem=["a.tif", "dem.tif"])
    added = _cause(find_stale(copy.workspace()), "elevation").certain
    assert west in added and east not in added
    before = copy.storage.read_table("elevations").set_index("glacier_id")["fingerprint"]
    terrain_stages.elevation(copy.workspace())
    after = copy.storage.read_table("elevations").set_index("glacier_id")["fingerprint"]
    assert west in set(after.index[after != before[after.index]]) <= added
    _shift(inputs / "a.tif", 5)
    (inputs / "more").mkdir()
    _shift(inputs / "dem.tif", 5, inputs / "more" / "a.tif", places[east])  # of another folder, under the same name
    copy.change(terrain__dem=["a.tif", "more/a.tif", "dem.tif"])
    both = _cause(find_stale(copy.workspace()), "elevation").certain
    assert {west, east} <= both and west in added and len(both) < len(glaciers)
    terrain_stages.elevation(copy.workspace())
    again = copy.storage.read_table("elevations").set_index("glacier_id")["fingerprint"]
    assert {west, east} <= set(again.index[again != after[again.index]]) <= both
    _, sets = terrain_of(copy.workspace().site, 2015, [west, east])
    names = {row["name"] for rows in sets.values() for _, _, row in rows if row["kind"] == "elevation"}
    assert names >= {"a.tif", "dem.tif"}


def test_another_tile_of_dhdt_concerns_the_years_of_its_period(copy: Small) -> None:
    inputs, terrain = Path(str(copy.storage.inputs())), copy.region.terrain
    periods = {y: match_period(terrain.elevation_change, y, terrain.elevation_change_match) for y in (2015, 2016, 2017)}
    used = {p.path for p in periods.values() if p is not None}
    unused = {p.path for p in terrain.elevation_change} - used
    assert used and unused
    _shift(inputs / sorted(unused)[0], 1)
    assert find_stale(copy.workspace()).current
    _shift(inputs / sorted(used)[0], 1)
    found = find_stale(copy.workspace())
    mine = {str(y) for y, p in periods.items() if p is not None and p.path == sorted(used)[0]}
    assert {c.partition for c in found.causes if c.asset == "elevation_change"} == mine
    assert {str(y) for _, y in _of(found, "stale")} >= mine


def test_debris_outlines_concern_all(copy: Small) -> None:
    inputs = Path(str(copy.storage.inputs()))
    gpd.read_file(inputs / copy.region.inventory.path).head(1).to_file(inputs / "stones.gpkg")
    copy.change(inventory__debris=[{"path": "stones.gpkg"}])
    found = find_stale(copy.workspace())
    assert _of(found, "stale") == _all(copy) and "debris_outlines" in {c.asset for c in found.causes}


def test_an_override_line_concerns_the_glacier_and_year_that_it_names(copy: Small) -> None:
    glacier = str(copy.storage.read_table("areas", year=2017)["glacier_id"].iloc[0])
    lines = Path(str(copy.storage.inputs())) / "overrides.csv"
    lines.write_text(f"glacier_id,year,date\n{glacier},2017,reject\n")
    copy.change(imagery__selection__overrides="overrides.csv")
    found = find_stale(copy.workspace())
    assert _of(found, "stale") == {(glacier, 2017)} and not _of(found, "may change")


def test_an_override_file_that_can_not_be_used_is_told(copy: Small) -> None:
    (Path(str(copy.storage.inputs())) / "overrides.csv").write_text("glacier,year\nnobody,2017\n")
    copy.change(imagery__selection__overrides="overrides.csv")
    done = copy.cli("status")
    assert done.exit_code == 0 and done.exception is None, done.output
    assert "columns" in done.output and "are missing in the first line" in done.output


def test_a_cube_or_map_that_is_gone_or_damaged_is_told(copy: Small) -> None:
    first, second = copy.storage.read_table("areas", year=2016)["glacier_id"].astype(str).head(2)
    Path(str(copy.storage.cube(2016, first))).unlink()
    Path(str(copy.storage.cube(2016, second))).write_bytes(b"cut off")
    Path(str(copy.storage.prediction(2016, first))).unlink()
    found = find_stale(copy.workspace())
    assert len(found.lost) == 3 and found.current
    assert any("7 bytes instead of" in line for line in found.lost) and sum("is gone" in s for s in found.lost) == 2
    done = copy.cli("status")
    assert done.output.count("is gone") == 2 and "remove their years from state/glacier_cubes" in done.output


def test_other_code_and_packages_are_told_and_make_nothing_stale(copy: Small) -> None:
    state = copy.storage.read_state("glacier_cubes", "2016")
    assert state is not None
    then = software() | {"numpy": "1.0"}
    rows = pd.DataFrame({"package": list(then), "version": list(then.values())})
    copy.storage.write_table("software", rows, {"fingerprint": "old"})
    copy.storage.write_state("glacier_cubes", "2016", state | {"code_version": "0.0.1", "software": "old"})
    found = find_stale(copy.workspace())
    assert found.current
    assert any(
        line.startswith("1 partitions were made by dl4gam_assets 0.0.1; this is") for line in found.other_programs
    )
    assert any("numpy 1.0 (now" in line for line in found.other_programs)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("title", "Another title"), ("publication__license", "CC0-1.0"), ("terrain__dem_source", "another DEM"),
     ("calibration__coverage", 0.8), ("description", "Another description")],
)  # fmt: skip
def test_what_is_printed_is_made_again_when_its_words_change(copy: Small, setting: str, value: object) -> None:
    copy.change(**{setting: value})
    stale = {c.asset for c in find_stale(copy.workspace()).causes}
    assert {"results_database", "stac_catalog"} <= stale
    assert ("report" in stale) == (setting != "publication__license")  # which does not print it


def test_an_empty_store_is_named(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="nothing is materialized"):
        find_stale(Small(tmp_path).workspace())


def test_touched_files_are_the_same(copy: Small) -> None:
    for file in Path(str(copy.storage.inputs())).rglob("*.tif"):
        shutil.copyfile(file, file.with_suffix(".again"))
        file.with_suffix(".again").replace(file)
    assert find_stale(copy.workspace()).current
    assert np.isfinite(copy.storage.read_table("areas")["area_km2"]).all()
