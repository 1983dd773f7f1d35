"""One input is changed at a time: exactly the estimates that it concerns are stale, and a run makes only them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from dl4gam_assets.stages.base import UpstreamError
from dl4gam_assets.stages.staleness import Staleness, find_stale
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
    mine = set(folds.loc[(folds["fold"] == 1) & (folds["role"] == "test"), "glacier_id"])
    areas = copy.storage.read_table("areas")
    assert _of(found, "stale") == _keys(areas[areas["glacier_id"].isin(mine)]) != _keys(areas)
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
        if tested[g] in learning or g in users  # tau of all years comes from the map of the inventory year
    }  # fmt: skip
    assert _of(found, "stale") == expected


def test_a_file_that_is_gone_makes_nothing_stale_and_is_told(copy: Small) -> None:
    file = next(f for f in sorted(Path(str(copy.storage.inputs())).rglob("*.tif")) if "2016" in str(f))
    file.unlink()
    found = find_stale(copy.workspace())
    assert [Path(name).name for name in found.gone] == [file.name]
    assert not len(found.estimates)


def test_an_empty_store_is_named(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="nothing is materialized"):
        find_stale(Small(tmp_path).workspace())


def test_touched_files_are_the_same(copy: Small) -> None:
    for file in Path(str(copy.storage.inputs())).rglob("*.tif"):
        shutil.copyfile(file, file.with_suffix(".again"))
        file.with_suffix(".again").replace(file)
    assert find_stale(copy.workspace()).current
    assert np.isfinite(copy.storage.read_table("areas")["area_km2"]).all()
