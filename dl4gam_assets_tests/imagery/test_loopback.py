"""The platform through a real STAC API and COGs over HTTP: the same as from the catalog on disk, and no more requests.

The server is ``dl4gam_assets_tests.stac_server``; the scenes are those of a small demo region.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pystac
import pystac_client
import pytest
import requests
import shapely
import shapely.geometry
import xarray as xr
from stac_pydantic.api import ItemCollection

from dl4gam_assets.imagery import CatalogError, candidates_of_glacier, open_catalog, read_image, search_window
from dl4gam_assets.imagery.sources import forget_files
from dl4gam_assets.inventory import glacier_grid
from dl4gam_assets.stages import imagery
from dl4gam_assets_tests.stac_server import Server, serving
from dl4gam_assets_tests.stac_server.checks import check_search, plain
from dl4gam_assets_tests.stac_server.damage import moved, reprocessed
from dl4gam_assets_tests.stac_server.regions import BASELINE, YEAR, Store, asking, differences, small_store

SEASON = (dt.date(YEAR, 8, 1), dt.date(YEAR, 10, 15))
SCORES = ["coverage", "cloud_share", "ndsi", "albedo"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def running(store: Store) -> Iterator[Server]:
    with serving(store.inputs) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.restore()
    forget_files()
    yield running
    running.restore()
    forget_files()


def _far(server: Server, store: Store, **catalog: Any) -> Any:
    region = Store(store.folder, asking(store.raw, server.url, server.collections, **catalog)).region
    return open_catalog(region.imagery.catalog, Path(), region.imagery.sensor)


def _near(store: Store) -> Any:
    return open_catalog(store.region.imagery.catalog, store.inputs, store.region.imagery.sensor)


def _box(store: Store) -> list[float]:
    return list(store.table("glaciers").total_bounds)


# --------------------------------------------------------------------------------------------------- the server itself
def test_the_server_speaks_stac(server: Server) -> None:
    client = pystac_client.Client.open(server.url)
    for what in ("CORE", "ITEM_SEARCH", "QUERY", "FILTER"):
        assert client.conforms_to(what), what
    collection = client.get_collection(server.collections[0])
    assert collection is not None and len(list(collection.get_items())) == len(server.backend.items) == 16
    item = client.search(method="GET", max_items=1).item_collection()[0]
    answer = requests.get(f"{server.url}/search", timeout=5).json()
    assert len(ItemCollection.model_validate(answer).features) == 10
    assert pystac.Item.from_file(str(item.get_self_href())).to_dict()["assets"] == item.to_dict()["assets"]
    for path in ("/collections/none", f"/collections/{collection.id}/items/none"):
        assert requests.get(server.url + path, timeout=5).status_code == 404
    for wrong in ({"bbox": [1, 2]}, {"datetime": "now"}, {"filter": {"op": "?"}}, {"query": {"a": {"?": 1}}}):
        assert requests.post(f"{server.url}/search", json=wrong, timeout=5).status_code == 400, wrong


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_each_condition_of_a_search(server: Server, method: str) -> None:
    check_search(server.url, list(server.backend.items.values()), method)


def test_files_have_ranges(server: Server, store: Store) -> None:
    name = next(iter(server.backend.items.values()))["assets"]["green"]["href"]
    content = (store.inputs / name.removeprefix(server.files_url)).read_bytes()
    size = len(content)

    def get(method: str = "GET", **headers: str) -> requests.Response:
        names = {k.replace("_", "-"): v for k, v in headers.items()}
        return requests.request(method, name, headers=names | {"Accept-Encoding": "identity"}, timeout=5)

    head = get("HEAD")
    assert head.status_code == 200 and head.headers["Accept-Ranges"] == "bytes" and not head.content
    assert int(head.headers["Content-Length"]) == size
    assert get().content == content
    for asked, first, last in (("0-9", 0, 9), ("100-", 100, size - 1), ("-7", size - 7, size - 1)):
        part = get(Range=f"bytes={asked}")
        assert part.status_code == 206 and part.content == content[first : last + 1]
        assert part.headers["Content-Range"] == f"bytes {first}-{last}/{size}"
    assert get(Range=f"bytes={size}-").status_code == 416
    assert get(Range="bytes=0-9", If_Range=head.headers["ETag"]).status_code == 206
    assert get(Range="bytes=0-9", If_Range='"another"').content == content
    assert requests.get(f"{server.files_url}%2e%2e/small.yaml", timeout=5).status_code == 404
    sent = [r.sent for r in server.asked("green.tif") if r.range == "bytes=0-9"]
    assert sent == [10, 10, size] and server.bytes_sent == sum(r.sent for r in server.asked())


# ------------------------------------------------------------------------------------------------------- the same items
@pytest.mark.parametrize("page_size", [1, 4, 100])
def test_a_search_finds_what_the_folder_holds(server: Server, store: Store, page_size: int) -> None:
    far = _far(server, store, page_size=page_size).search(_box(store), *SEASON)
    near = _near(store).search(_box(store), *SEASON)
    assert [plain(i) for i in far] == [plain(i) for i in near] and len(far) == 7
    pages = len(server.asked("/search"))
    assert pages >= -(-len(far) // page_size) and (page_size < 100 or pages == 1)
    assert not _far(server, store).search([0, 0, 1, 1], *SEASON)


def test_each_glacier_finds_the_same(server: Server, store: Store) -> None:
    far, near = _far(server, store), _near(store)
    for _, glacier in store.table("glaciers").iterrows():
        for year in (BASELINE, YEAR):
            box, periods = search_window(glacier, store.region, year)
            for period in periods:
                assert [i.id for i in far.search(box, *period)] == [i.id for i in near.search(box, *period)]


def test_items_by_id(server: Server, store: Store) -> None:
    names = [i.id for i in _near(store).search(_box(store), *SEASON)][::-1]
    assert [i.id for i in _far(server, store, page_size=2).get(names)] == names
    server.backend.drop(names[1])
    with pytest.raises(CatalogError, match=f"no item '{names[1]}'"):
        _far(server, store).get(names)


def test_the_query_of_the_settings(server: Server, store: Store) -> None:
    found = _far(server, store, query={"eo:cloud_cover": {"lt": 5}}).search(_box(store), *SEASON)
    everything = _near(store).search(_box(store), *SEASON)
    assert {i.id for i in found} == {i.id for i in everything if i.properties["eo:cloud_cover"] < 5}
    assert 0 < len(found) < len(everything)


# --------------------------------------------------------------------------------------------- catalogs that misbehave
@pytest.mark.parametrize("lie", ["repeat", "bbox", "datetime", "gaps"])
def test_a_lie_of_the_catalog_changes_nothing(server: Server, store: Store, lie: Any) -> None:
    truth = [i.id for i in _near(store).search(_box(store), *SEASON)]
    server.backend.lies = {lie}
    assert [i.id for i in _far(server, store, page_size=3).search(_box(store), *SEASON)] == truth
    assert not _far(server, store).search([0, 0, 1, 1], *SEASON)


@pytest.mark.parametrize("endless", ["same", "new"])
@pytest.mark.timeout(30)
def test_pages_without_end_are_refused(server: Server, store: Store, endless: Any) -> None:
    server.backend.endless = endless
    with pytest.raises(CatalogError, match=server.url):
        _far(server, store, page_size=5, max_items=50).search(_box(store), *SEASON)
    assert len(server.asked("/search")) < 50


@pytest.mark.timeout(30)
def test_empty_pages_without_end_are_refused_where_items_are_promised(server: Server, store: Store) -> None:
    server.backend.endless = "empty"
    with pytest.raises(CatalogError, match=r"empty pages.*says that [1-9]\d* match, and gave 0"):
        _far(server, store).search(_box(store), *SEASON)
    assert len(server.asked("/search")) <= 2 * 11
    assert _far(server, store).search([0, 0, 1, 1], *SEASON) == []  # none is promised: the end


def _candidates(store: Store, catalog: Any, glacier_id: str, year: int = YEAR) -> pd.DataFrame:
    glaciers, zones = store.table("glaciers"), store.table("zones")
    glacier = glaciers[glaciers["glacier_id"] == glacier_id].iloc[0]
    mine = zones[zones["glacier_id"] == glacier_id]
    return candidates_of_glacier(glacier, glaciers, mine, catalog, store.region, year)


def _both_tiles(store: Store) -> str:
    """A glacier that takes both tiles of a day."""
    scenes = store.table("candidates", year=YEAR)
    return str(scenes[scenes["scene_ids"].str.contains("+", regex=False)]["glacier_id"].iloc[-1])


def test_of_two_processings_the_newer_is_taken(server: Server, store: Store) -> None:
    glacier = _both_tiles(store)
    truth = _candidates(store, _near(store), glacier)
    for item in list(server.backend.items.values()):
        server.backend.put(reprocessed(item, "99.99"))
        server.backend.put(reprocessed(item, "00.01", suffix="_before"))
    found = _candidates(store, _far(server, store, page_size=3), glacier)
    pd.testing.assert_frame_equal(found[SCORES], truth[SCORES])
    names = found["scene_ids"].str.split("+").explode()
    assert names.str.endswith("_again").all() and len(names) == truth["scene_ids"].str.split("+").map(len).sum()


def test_an_item_of_another_place_is_no_candidate(server: Server, store: Store) -> None:
    """A footprint that misses the glacier: its files would show nothing of it."""
    glacier = _both_tiles(store)
    truth = _candidates(store, _near(store), glacier)
    gone = truth["scene_ids"].iloc[-1].split("+")
    for name in gone:
        server.backend.put(moved(server.backend.item(name), east=1.0))
    server.backend.lies = {"bbox"}
    found = _candidates(store, _far(server, store), glacier)
    assert not found["scene_ids"].str.contains("|".join(gone)).any() and len(found) == len(truth) - 1
    pd.testing.assert_frame_equal(found[SCORES], truth[SCORES].iloc[:-1])


def test_a_footprint_that_claims_too_much_gives_no_score(server: Server, store: Store) -> None:
    """Items that say they show a glacier, whose files lie elsewhere: nothing is seen, and so nothing is scored."""
    glaciers = store.table("glaciers")
    glacier = glaciers[glaciers["glacier_id"] == _both_tiles(store)].iloc[0]
    everywhere = shapely.geometry.mapping(shapely.box(5, 40, 15, 50))
    for item in list(server.backend.items.values()):
        server.backend.put(item | {"geometry": everywhere, "bbox": [5, 40, 15, 50]})
    far_away = glacier.copy()
    far_away["geometry"] = shapely.transform(glacier["geometry"], lambda xy: xy + np.array([0.3, 0.1]))
    zones = store.table("zones")
    mine = zones[zones["glacier_id"] == glacier["glacier_id"]]
    found = candidates_of_glacier(far_away, glaciers, mine, _far(server, store), store.region, YEAR)
    assert len(found) == 4 and (found["coverage"] == 0).all() and found[["ndsi", "albedo"]].isna().all(axis=None)


# ------------------------------------------------------------------------------------------------------ the same pixels
def test_images_are_equal_pixel_for_pixel(server: Server, store: Store) -> None:
    glaciers = store.table("glaciers")
    glacier = glaciers[glaciers["glacier_id"] == _both_tiles(store)].iloc[0]
    settings = store.region.imagery
    grid = glacier_grid(glacier["geometry"], int(glacier["utm_epsg"]), settings.sensor.pixel_m, settings.margin_m)
    scenes = store.table("candidates", year=YEAR)
    names = scenes[scenes["scene_ids"].str.contains("+", regex=False)]["scene_ids"].iloc[0].split("+")
    near = read_image(_near(store).get(names), settings, grid)
    far = read_image(_far(server, store).get(names), settings, grid)
    xr.testing.assert_identical(near, far)
    assert np.isfinite(near["reflectance"]).mean() > 0.5
    windows = [r for r in server.asked(".tif") if r.method == "GET"]
    assert windows and all(r.range for r in windows), "whole files were read"


def test_stages_from_candidates_to_cubes(server: Server, store: Store, tmp_path: Path) -> None:
    """All glaciers and years through the stages, without any scene on disk; then again with nothing to do."""
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections, page_size=3))
    assert not list(far.folder.rglob("scenes")) and not (far.inputs / "stac").exists()
    for year in (BASELINE, YEAR):
        said = far.run(year)
        assert said["scene_candidates"]["failed_glaciers"] == said["glacier_cubes"]["failed_glaciers"] == 0
        assert said["scene_candidates"]["searches"] == 1, "glaciers that are neighbours are searched together"
    assert differences(store.ws.storage, far.ws.storage, [BASELINE, YEAR]) == []
    assert len(far.table("cubes")) == 2 * len(store.table("glaciers")) == 12
    hrefs = far.table("candidates")["hrefs"]
    assert hrefs.str.contains(server.files_url, regex=False).all() and not hrefs.str.contains(str(store.folder)).any()
    of_scenes = sum(f.stat().st_size for f in (store.inputs / "scenes").rglob("*.tif"))
    assert 0 < server.bytes_sent < 3 * of_scenes, "six glaciers, each reading its own windows"
    requests_so_far = len(server.asked())
    for year in (BASELINE, YEAR):
        assert all(said.get("unchanged") for said in far.run(year).values())
    assert len(server.asked()) == requests_so_far, "nothing changed, and yet the server was asked"


def test_what_is_counted_is_what_was_sent(server: Server, store: Store, tmp_path: Path) -> None:
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections))
    said = imagery.scene_candidates(far.ws, YEAR).metadata
    assert said["megabytes_read"] * 1e6 == pytest.approx(server.bytes_sent, rel=0.02)
    assert said["items"] == 7 and said["candidates"] == len(store.table("candidates", year=YEAR))


def test_a_catalog_that_grew(server: Server, store: Store, tmp_path: Path) -> None:
    """A new item is one more candidate; where nothing is new, no file is asked for again."""
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections))
    newest = max(server.backend.items.values(), key=lambda i: i["properties"]["datetime"])
    server.backend.drop(newest["id"])
    imagery.scene_candidates(far.ws, YEAR)
    assert not far.table("candidates", year=YEAR)["scene_ids"].str.contains(newest["id"]).any()
    server.restore()
    columns = ["glacier_id", "date", "scene_ids", *SCORES]
    truth = store.table("candidates", year=YEAR)[columns]
    for most, again in ((100, True), (101, False)):  # conditions that all fulfil, so that the catalog is asked again
        server.forget()
        far.raw["imagery"]["catalog"]["query"] = {"eo:cloud_cover": {"lte": most}}
        said = imagery.scene_candidates(far.ws, YEAR).metadata
        pd.testing.assert_frame_equal(far.table("candidates", year=YEAR)[columns], truth)
        assert server.asked("/search") and bool(server.asked("/files/")) == bool(said["scored_now"]) == again
