"""One search for many glaciers, the item index, stac-geoparquet, and scoring that goes on where it stopped."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import stac_geoparquet.arrow
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.imagery import CatalogError, open_catalog, read_items, search_plan, write_items
from dl4gam_assets.imagery.scaling import implausible
from dl4gam_assets.settings import SensorSettings, StacGeoparquet
from dl4gam_assets_tests.imagery.conftest import WEST, ItemMaker

DAY = dt.date(2020, 8, 1)
ASSETS = ["blue", "green", "red", "nir", "swir16", "scl", "cld"]


def _covers(box: Sequence[float], part: Sequence[float]) -> bool:
    return box[0] <= part[0] and box[1] <= part[1] and box[2] >= part[2] and box[3] >= part[3]


SIDES = st.floats(0.01, 0.5)
BOXES = st.tuples(st.floats(-180, 179.4), st.floats(-85, 84), SIDES, SIDES, st.integers(0, 4000))


@settings(max_examples=60, deadline=None)
@given(boxes=st.lists(BOXES, min_size=1, max_size=30))
def test_few_searches_cover_every_glacier_and_period(boxes: list[tuple[float, float, float, float, int]]) -> None:
    windows = []
    for west, south, width, height, days in boxes:
        start = DAY + dt.timedelta(days=days)
        windows.append(((west, south, west + width, south + height), [(start, start + dt.timedelta(days=30))]))
    plan = search_plan(windows)
    for box, periods in windows:
        for start, end in periods:
            assert any(_covers(b, box) and a <= start and e >= end for b, a, e in plan)
    assert len(plan) <= len(windows)


def test_glaciers_that_share_scenes_share_a_search() -> None:
    season = [(DAY, DAY + dt.timedelta(days=75))]
    alps = [((7 + i * 0.001, 46.2, 7.05 + i * 0.001, 46.25), season) for i in range(500)]
    assert len(search_plan(alps)) == 1
    fiji = [((179.9, -17, -179.9, -16.9), season)]
    assert [p[0] for p in search_plan(fiji)] == [(-180.0, -17, -179.9, -16.9), (179.9, -17, 180.0, -16.9)]
    years_apart = [
        ((7, 46, 7.1, 46.1), [(DAY.replace(year=y), DAY.replace(year=y, day=20))]) for y in (2014, 2016, 2015)
    ]
    assert [p[1].year for p in search_plan(years_apart)] == [2014, 2015, 2016]


def test_the_item_index_gives_back_what_matters_and_nothing_else(make_item: ItemMaker, tmp_path: Path) -> None:
    items = [make_item("b", "2020-09-10"), make_item("a", "2020-08-10", baseline="05.00")]
    items[0].properties["a_long_story"] = "x" * 1000
    items[0].add_asset("thumbnail", pystac.Asset("https://example.org/t.jpg"))
    path = tmp_path / "items.jsonl"
    assert write_items(items, ASSETS, path) == 2
    assert "long_story" not in path.read_text() and "thumbnail" not in path.read_text()
    back = read_items(path).get(["a", "b"])
    assert [i.id for i in back] == ["a", "b"] and back[0].properties["s2:processing_baseline"] == "05.00"
    assert {n: a.href for n, a in back[1].assets.items()} == {
        n: items[0].assets[n].href for n in ASSETS if n in items[0].assets
    }
    assert back[1].assets["green"].extra_fields == items[0].assets["green"].extra_fields
    box = items[0].bbox
    assert box is not None
    assert [i.id for i in read_items(path).search(box, DAY, dt.date(2020, 8, 30))] == ["a"]
    path.write_text(path.read_text()[:-50])
    with pytest.raises(CatalogError, match=r"items\.jsonl can not be read"):
        read_items(path)


@pytest.fixture
def parquet(make_item: ItemMaker, tmp_path: Path) -> tuple[Path, list[pystac.Item]]:
    items = [make_item("a", "2020-08-10"), make_item("b", "2020-09-10", scale=2e-4, offset=-0.1)]
    items.append(make_item("far", "2020-08-10", west=WEST + 9000))
    del items[1].assets["cld"]
    # stac-geoparquet wants equal properties; the folder is that of the files.
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([json.loads(json.dumps(i.to_dict())) for i in items])
    path = tmp_path / "items.parquet"
    stac_geoparquet.arrow.to_parquet(table, path)
    return path, items


def test_stac_geoparquet_is_searched_like_any_catalog(parquet: tuple[Path, list[pystac.Item]], tmp_path: Path) -> None:
    path, items = parquet
    catalog = open_catalog(StacGeoparquet(path=path.name), tmp_path, SensorSettings())
    box = items[0].bbox
    assert box is not None
    found = catalog.search(box, DAY, dt.date(2020, 10, 15))
    assert [i.id for i in found] == ["a", "b"]
    assert [i.id for i in catalog.search(box, DAY, dt.date(2020, 8, 30))] == ["a"]
    assert [i.id for i in catalog.get(["far", "a"])] == ["far", "a"]
    for mine, theirs in zip(found, items, strict=False):
        assert mine.datetime == theirs.datetime and mine.properties["grid:code"] == theirs.properties["grid:code"]
        assert set(mine.assets) == set(theirs.assets)
        for name, asset in mine.assets.items():
            assert asset.href == theirs.assets[name].href
            assert asset.extra_fields.get("raster:bands") == theirs.assets[name].extra_fields.get("raster:bands")
    with pytest.raises(CatalogError, match="no item 'gone'"):
        catalog.get(["gone"])
    several = open_catalog(StacGeoparquet(path="*.parquet"), tmp_path, SensorSettings())
    assert [i.id for i in several.search(box, DAY, dt.date(2020, 10, 15))] == ["a", "b"]


def test_other_parquet_files_are_refused(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"id": ["a"]}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(CatalogError, match="is no stac-geoparquet: it lacks the columns assets, bbox"):
        open_catalog(StacGeoparquet(path="table.parquet"), tmp_path, SensorSettings())
    with pytest.raises(CatalogError, match="does not exist"):
        open_catalog(StacGeoparquet(path="none.parquet"), tmp_path, SensorSettings())
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(CatalogError, match="can not be read"):
        open_catalog(StacGeoparquet(path="broken.parquet"), tmp_path, SensorSettings())


def test_an_offset_that_was_taken_off_twice_is_noticed_and_shadow_is_not() -> None:
    rng = np.random.default_rng(0)
    ground = np.abs(rng.normal(0.08, 0.04, (2, 60, 60))).astype(np.float32)
    shadow = ground.copy()
    shadow[:, :20] = rng.normal(-0.01, 0.01, (2, 20, 60))
    shadow[:, -5:] = np.nan
    assert implausible(ground, ["blue", "red"]) is None and implausible(shadow, ["blue", "red"]) is None
    words = implausible(ground - 0.1, ["blue", "red"])
    assert words is not None and "blue pixels are below" in words and "imagery.sensor.offset" in words
    assert implausible(np.full((1, 3, 3), np.nan), ["blue"]) is None
    twice = implausible(ground * 1e-4, ["blue", "red"])
    assert twice is not None and "the scale that its metadata state seems to be applied" in " ".join(twice.split())


def test_types(parquet: Any) -> None:
    """Properties keep their types through Parquet."""
    path, _ = parquet
    (item,) = open_catalog(StacGeoparquet(path=path.name), path.parent, SensorSettings()).get(["a"])
    assert isinstance(item.properties["s2:processing_baseline"], str)
    assert isinstance(item.assets["green"].extra_fields["raster:bands"], list)
