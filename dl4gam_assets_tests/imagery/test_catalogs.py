"""Catalogs: search in space and time, days, processing versions, local folders."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import numpy as np
import pytest

from dl4gam_assets.imagery import group_by_day, open_catalog
from dl4gam_assets.imagery.catalogs import CatalogError, item_checksums
from dl4gam_assets.settings import SceneFolder, SensorSettings, StacFolder
from dl4gam_assets_tests.imagery.conftest import WEST, ItemMaker, save_catalog, write_tif


def test_a_catalog_on_disk_is_searched_in_space_and_time(make_item: ItemMaker, tmp_path: Path) -> None:
    items = [make_item("a", "2020-08-10"), make_item("b", "2020-09-10")]
    items.append(make_item("far", "2020-08-10", west=WEST + 9000))
    save_catalog(items, tmp_path)
    catalog = open_catalog(StacFolder(path="stac/catalog.json"), tmp_path, SensorSettings())
    box = items[0].bbox
    assert box is not None
    found = catalog.search(box, dt.date(2020, 8, 1), dt.date(2020, 10, 15))
    assert [i.id for i in found] == ["a", "b"]
    assert [i.id for i in catalog.search(box, dt.date(2020, 8, 1), dt.date(2020, 8, 10))] == ["a"]
    assert [i.id for i in catalog.get(["b", "a"])] == ["b", "a"]
    assert Path(found[0].assets["green"].href).is_absolute()
    with pytest.raises(CatalogError, match="no item 'gone'"):
        catalog.get(["gone"])


def test_an_absent_catalog_is_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"stac/catalog\.json does not exist"):
        open_catalog(StacFolder(path="stac/catalog.json"), tmp_path, SensorSettings())


def test_days_keep_the_newest_processing_of_each_tile(make_item: ItemMaker) -> None:
    old = make_item("old", "2020-08-10", baseline="02.14")
    new = make_item("new", "2020-08-10", baseline="05.00")
    other = make_item("other", "2020-08-10", tile="T2", baseline="03.00")
    later = make_item("later", "2020-08-13")
    days = group_by_day([old, later, other, new])
    assert {day.isoformat(): [i.id for i in group] for day, group in days.items()} == {
        "2020-08-10": ["new", "other"],
        "2020-08-13": ["later"],
    }


def test_a_folder_of_scenes_becomes_items(tmp_path: Path) -> None:
    for day in ("20200810", "20210911"):
        write_tif(tmp_path / f"S2_x_{day}.tif", np.ones((10, 10), np.uint16), 10)
    (tmp_path / "notes.txt").write_text("no scene")
    settings = SceneFolder(pattern=r"S2_(?P<scene>\w+)_(?P<date>\d{8})\.tif", band_order={"": ["B02"]})
    catalog = open_catalog(settings, tmp_path, SensorSettings(bands={"blue": "B02"}))
    found = catalog.search((-180, -90, 180, 90), dt.date(2020, 1, 1), dt.date(2022, 1, 1))
    assert [i.id for i in found] == ["x_20200810", "x_20210911"]
    assert found[0].assets["B02"].extra_fields["band_index"] == 1
    with pytest.raises(CatalogError, match="no file"):
        open_catalog(SceneFolder(pattern=r"(?P<date>\d{9})", band_order={"": ["x"]}), tmp_path, SensorSettings())


def test_checksums_change_with_the_file(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    before = item_checksums(item, ["green", "absent"])
    path = Path(item.assets["green"].href)
    path.write_bytes(path.read_bytes() + b" ")
    after = item_checksums(item, ["green"])
    assert set(before) == {"green"} and before != after
    item.assets["green"].extra_fields["file:checksum"] = "1220abcd"
    stated = item_checksums(item, ["green"])["green"]
    assert stated.startswith("multihash:1220abcd ")
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # as large as before, and the catalog knows nothing of it
    assert item_checksums(item, ["green"])["green"] != stated
    path.unlink()
    assert re.fullmatch(r"multihash:1220abcd as:[0-9a-f]{8}", item_checksums(item, ["green"])["green"])


def test_checksums_change_with_what_the_item_says_of_reading(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    green = item.assets["green"]
    seen = [item_checksums(item, ["green"])["green"]]

    def another() -> bool:
        seen.append(item_checksums(item, ["green"])["green"])
        return seen[-1] not in seen[:-1]

    for key, value in (("offset", -0.1), ("scale", 2e-4), ("nodata", 7)):
        green.extra_fields["raster:bands"][0][key] = value
        assert another(), key
    green.extra_fields["band_index"] = 2
    assert another()
    item.properties["s2:processing_baseline"] = "05.10"
    assert another()
    item.properties["earthsearch:boa_offset_applied"] = True
    assert another()
    item.properties["eo:cloud_cover"] = 12  # no word about reading
    assert not another()


def test_files_elsewhere_are_told_apart_by_their_address_but_not_by_its_signature(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    green = item.assets["green"]

    def at(href: str) -> str:
        green.href = href
        return item_checksums(item, ["green"])["green"]

    one = at("https://a.example/green.tif")
    assert at("https://a.example/green.tif?st=2026-01-01&se=2026-01-02&sp=rl&sv=2024&sr=c&sig=abc%3D") == one
    assert at("https://b.example/green.tif") != one
    green.extra_fields["file:checksum"] = "1220abcd"  # the same content wherever it lies
    assert at("https://a.example/green.tif") == at("https://b.example/green.tif")


def test_the_real_scenes_become_items(real_data: Path) -> None:
    import os

    from dl4gam_assets.settings import load_region

    os.environ.setdefault("DL4GAM_REAL_DATA", str(real_data))
    region = load_region("swiss")
    catalog = open_catalog(region.imagery.catalog, real_data, region.imagery.sensor)
    found = catalog.search((5, 45, 11, 48), dt.date(2015, 1, 1), dt.date(2018, 12, 31))
    assert len(found) == 33  # 9 pairs and 15 dates of Rhonegletscher
    assert all(set(i.assets) == {"B02", "B8A", "B08"} for i in found)
