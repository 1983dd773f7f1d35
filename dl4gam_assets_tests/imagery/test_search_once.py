"""One search for many glaciers as a stage does it: what is stored, what is asked again, and what is not."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pytest
import shapely
import stac_geoparquet.arrow

from dl4gam_assets.compute import Done, Mapper
from dl4gam_assets.imagery import CatalogError, merge_items, write_items
from dl4gam_assets.settings import parse_region
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.stages.imagery import _Reading, catalog_fingerprint, catalog_of, search_items
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.imagery.conftest import WEST, ItemMaker
from dl4gam_assets_tests.imagery.test_stac_api import Api, api  # noqa: F401 - a fixture

YEAR, FAR = 2020, WEST + 160_000  # two degrees further east
NAMES = ["blue", "green", "red", "nir", "swir16"]


def _glacier(west: float, size: float = 300.0) -> shapely.Geometry:
    shape = gpd.GeoSeries([shapely.box(west, 5_199_300, west + size, 5_199_300 + size)], crs="EPSG:32632")
    return shape.to_crs("EPSG:4326").iloc[0]


def _glaciers(*shapes: shapely.Geometry) -> gpd.GeoDataFrame:
    rows = [
        {"glacier_id": f"g{i}", "utm_epsg": 32632, "inventory_date": pd.NaT, "geometry": s}
        for i, s in enumerate(shapes)
    ]
    return gpd.GeoDataFrame(rows, crs="EPSG:4326")


def _workspace(catalog: dict[str, Any], folder: Path) -> Workspace:
    region = parse_region(
        {
            "name": "x", "years": {"first": 2015, "baseline": 2015}, "inventory": {"path": "a"},
            "data_root": str(folder), "imagery": {"catalog": catalog}, "model": {"channels": NAMES},
        }
    )  # fmt: skip
    return Workspace(region, Storage(str(folder / "store")))


@pytest.fixture
def ws(api: Api, tmp_path: Path) -> Workspace:  # noqa: F811
    return _workspace({"kind": "stac-api", "url": api.url, "collections": ["s2"]}, tmp_path)


def _ids(ws: Workspace) -> list[str]:
    found = catalog_of(ws.site, YEAR).search((-180, -90, 180, 90), dt.date(2020, 1, 1), dt.date(2020, 12, 31))
    return [item.id for item in found]


def _places(api: Api) -> int:  # noqa: F811
    return len({tuple(asked["bbox"]) for asked in api.asked})


def test_a_search_that_was_killed_goes_on_where_it_stopped(api: Api, ws: Workspace, make_item: ItemMaker) -> None:  # noqa: F811
    api.items = [make_item("near", "2020-08-10"), make_item("far", "2020-08-10", west=FAR)]
    glaciers = _glaciers(_glacier(WEST), _glacier(FAR))
    api.refuse = [400]  # one of the two is refused
    with pytest.raises(CatalogError, match=rf"search in {api.url} failed"):
        search_items(ws, YEAR, glaciers, "one")
    assert len(api.asked) == 1
    assert search_items(ws, YEAR, glaciers, "one") == {"searches": 2, "searched_now": 1, "items": 2}
    assert _ids(ws) == ["far", "near"] and len(api.asked) == 2
    api.refuse = [500] * 100  # nothing is needed from the server any more
    assert search_items(ws, YEAR, glaciers, "one")["searched_now"] == 0
    assert api.refuse == [500] * 100


def test_another_glacier_asks_for_its_surroundings_only(api: Api, ws: Workspace, make_item: ItemMaker) -> None:  # noqa: F811
    api.items = [make_item("near", "2020-08-10"), make_item("far", "2020-08-10", west=FAR)]
    search_items(ws, YEAR, _glaciers(_glacier(WEST)), "one")
    assert _ids(ws) == ["near"]
    both = _glaciers(_glacier(WEST), _glacier(FAR))
    assert search_items(ws, YEAR, both, "one")["searched_now"] == 1
    assert _ids(ws) == ["far", "near"] and _places(api) == 2
    # Thirty more inside the box that was asked for already change nothing.
    inside = [_glacier(WEST + 100, 100.0)] * 30
    assert search_items(ws, YEAR, _glaciers(_glacier(WEST), *inside, _glacier(FAR)), "one")["searched_now"] == 0


def test_an_open_season_and_force_ask_again(api: Api, ws: Workspace, make_item: ItemMaker) -> None:  # noqa: F811
    api.items = [make_item("a", "2020-08-10")]
    glaciers = _glaciers(_glacier(WEST))
    search_items(ws, YEAR, glaciers, "monday")
    api.items.append(make_item("b", "2020-08-13"))
    assert search_items(ws, YEAR, glaciers, "monday")["items"] == 1
    assert search_items(ws, YEAR, glaciers, "tuesday") == {"searches": 1, "searched_now": 1, "items": 2}
    assert len(list(Path(str(ws.storage.path("items", f"year={YEAR}"))).iterdir())) == 1, "Monday's search was left"
    api.items.append(make_item("c", "2020-08-16"))
    assert search_items(ws, YEAR, glaciers, "tuesday", again=True)["items"] == 3
    assert _ids(ws) == ["a", "b", "c"]


def test_only_an_open_season_has_a_date_in_its_identity(ws: Workspace) -> None:
    today = dt.date.today()
    assert str(today) not in catalog_fingerprint(ws, 2020)
    assert str(today) in catalog_fingerprint(ws, today.year + 1)


def test_other_prefixes_of_addresses_reach_the_stored_items(api: Api, tmp_path: Path, make_item: ItemMaker) -> None:  # noqa: F811
    item = make_item("a", "2020-08-10")
    for name, asset in item.assets.items():
        asset.href = f"https://old.example/{name}.tif"
    api.items = [item]
    glaciers, catalog = _glaciers(_glacier(WEST)), {"kind": "stac-api", "url": api.url, "collections": ["s2"]}

    def addresses(prefixes: dict[str, str]) -> tuple[int, set[str]]:
        here = _workspace(catalog | {"href_prefixes": prefixes}, tmp_path)
        said = search_items(here, YEAR, glaciers, catalog_fingerprint(here, YEAR))
        (found,) = catalog_of(here.site, YEAR).get(["a"])
        return said["searched_now"], {a.href.rsplit("/", 1)[0] for a in found.assets.values()}

    assert addresses({}) == (1, {"https://old.example"})
    assert addresses({}) == (0, {"https://old.example"})
    assert addresses({"https://old.example/": "s3://mirror/"}) == (1, {"s3://mirror"})
    assert addresses({"https://old.example/": "s3://mirror/"})[0] == 0


def test_an_item_of_two_searches_is_there_once_and_as_it_is_newest(make_item: ItemMaker, tmp_path: Path) -> None:
    old, new = make_item("a", "2020-08-10", baseline="02.14"), make_item("a", "2020-08-10", baseline="05.00")
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    write_items([new, make_item("b", "2020-08-11")], NAMES, paths[0])
    write_items([old], NAMES, paths[1])
    assert merge_items(paths, tmp_path / "all.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [(i["id"], i["properties"]["s2:processing_baseline"]) for i in lines] == [("a", "05.00"), ("b", "03.00")]
    paths[1].write_text("{ damaged")
    with pytest.raises(CatalogError, match=r"2\.jsonl can not be read .*delete it"):
        merge_items(paths, tmp_path / "all.jsonl")


def test_geoparquet_is_searched_once_for_many_too(make_item: ItemMaker, tmp_path: Path) -> None:
    items = [make_item("near", "2020-08-10"), make_item("far", "2020-08-10", west=FAR), make_item("late", "2020-12-10")]
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([json.loads(json.dumps(i.to_dict())) for i in items])
    stac_geoparquet.arrow.to_parquet(table, tmp_path / "items.parquet")
    here = _workspace({"kind": "stac-geoparquet", "path": "items.parquet"}, tmp_path)
    stamp = catalog_fingerprint(here, YEAR)
    said = search_items(here, YEAR, _glaciers(_glacier(WEST), _glacier(FAR)), stamp)
    assert said == {"searches": 2, "searched_now": 2, "items": 2}
    assert _ids(here) == ["far", "near"]
    (tmp_path / "items.parquet").touch()
    assert catalog_fingerprint(here, YEAR) != stamp, "another file, another search"


def test_progress_says_how_much_was_read() -> None:
    said: list[str] = []
    values = {"a": (None, 2_000_000, False), "b": (None, 0, True), "c": (None, 500_000, False)}
    mapper = _Reading(Mapper(workers=1), said.append)
    done = list(mapper.map(lambda key: values[key], [(k, (k,)) for k in values] + [("d", ("d",))]))
    assert [d.ok for d in done] == [True, True, True, False] and isinstance(done[0], Done)
    assert said[-1].startswith("4 of 4 glaciers (1 scored before), ") and said[-1].endswith(" a minute, 2.5 MB read")
