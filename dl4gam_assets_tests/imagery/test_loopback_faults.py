"""What the platform does when a STAC API and its files fail: passing trouble is survived, the rest has a reason.

In every case, what could be read has the values of the catalog on disk, and what could not has none.
"""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dl4gam_assets.imagery import CatalogError, candidates_of_glacier, open_catalog, rank_candidates, select_scenes
from dl4gam_assets.imagery.sources import forget_files
from dl4gam_assets.stages import cubes, imagery
from dl4gam_assets_tests.stac_server import (
    EMPTY,
    HALF,
    HTML,
    LYING,
    RESET,
    Fault,
    Server,
    hang,
    serving,
    stall,
    status,
)
from dl4gam_assets_tests.stac_server.damage import cut_short, not_numbers, rewritten, silent, without_asset
from dl4gam_assets_tests.stac_server.regions import YEAR, Store, asking, differences, small_store, stated

SEASON = (dt.date(YEAR, 8, 1), dt.date(YEAR, 10, 15))
SCORES = ["coverage", "cloud_share", "ndsi", "albedo"]
PASSING = [status(429, 1), status(500), status(503), status(502), RESET, HALF, LYING, HTML, EMPTY]


def _name(fault: Any) -> str:
    return f"{fault.kind}{fault.status if fault.kind == 'status' else ''}" if isinstance(fault, Fault) else ""


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


def _box(store: Store) -> list[float]:
    return list(store.table("glaciers").total_bounds)


@pytest.fixture(scope="module")
def glacier(store: Store) -> pd.Series:
    """A glacier that four dates show, two of them on two tiles."""
    scenes = store.table("candidates", year=YEAR)
    name = scenes[scenes["scene_ids"].str.contains("+", regex=False)]["glacier_id"].iloc[-1]
    glaciers = store.table("glaciers")
    return glaciers[glaciers["glacier_id"] == name].iloc[0]


@pytest.fixture(scope="module")
def truth(store: Store, glacier: pd.Series) -> pd.DataFrame:
    """Its candidates from the catalog on disk."""
    near = open_catalog(store.region.imagery.catalog, store.inputs, store.region.imagery.sensor)
    frame = _candidates(store, near, glacier)
    assert len(frame) == 4 and frame["reason"].isna().all()
    return frame


def _candidates(store: Store, catalog: Any, glacier: pd.Series, **compute: Any) -> pd.DataFrame:
    raw = {**store.raw, "compute": {**store.raw["compute"], **compute}}
    zones = store.table("zones")
    mine = zones[zones["glacier_id"] == glacier["glacier_id"]]
    region = Store(store.folder, raw).region
    return candidates_of_glacier(glacier, store.table("glaciers"), mine, catalog, region, YEAR)


def _files(items: list[str]) -> list[str]:
    return [f"/files/scenes/{item}/{name}.tif" for item in items for name in ("green", "red", "blue", "swir16", "scl")]


# ------------------------------------------------------------------------------------------------------ passing trouble
@pytest.mark.parametrize("fault", PASSING, ids=_name)
def test_a_fault_of_the_api_passes(server: Server, store: Store, fault: Fault) -> None:
    """One bad answer to the landing page, one to the first page of a search, one to the second."""
    truth = [i.id for i in _far(server, store).search(_box(store), *SEASON)]
    landing = server.fail("/v1/", fault, times=1)
    search = server.fail("/v1/search", fault, times=1)
    second = server.fail("/v1/search", fault, skip=1, times=1)  # the second time that the first rule lets pass
    start = time.monotonic()
    found = _far(server, store, page_size=4, timeout_s=5).search(_box(store), *SEASON)
    assert [i.id for i in found] == truth
    assert (landing.struck, search.struck, second.struck) == (1, 1, 1)
    if fault.retry_after:
        assert time.monotonic() - start >= 3 * int(fault.retry_after)


def test_a_search_that_hangs_is_asked_again(server: Server, store: Store) -> None:
    truth = [i.id for i in _far(server, store).search(_box(store), *SEASON)]
    server.fail("/v1/search", hang(5), times=1)
    start = time.monotonic()
    assert [i.id for i in _far(server, store, timeout_s=0.5).search(_box(store), *SEASON)] == truth
    assert 0.5 <= time.monotonic() - start < 4


def test_a_storm_changes_no_score(server: Server, store: Store, glacier: pd.Series, truth: pd.DataFrame) -> None:
    """Every file fails once, in one way or another, at its first request or at its second."""
    faults = [*PASSING, stall(3)]
    files = _files(truth["scene_ids"].str.split("+").explode().tolist())
    rules = [server.fail(f, faults[k % len(faults)], skip=k % 2, times=1) for k, f in enumerate(files)]
    found = _candidates(store, _far(server, store), glacier, read_attempts=6)
    pd.testing.assert_frame_equal(stated(found.drop(columns="hrefs")), stated(truth.drop(columns="hrefs")))
    struck = {rule.fault for rule in rules if rule.struck}
    assert struck == set(faults) and sum(rule.struck for rule in rules) > len(rules) / 2


@pytest.mark.parametrize("what", ["/v1/search", "/files/*"])
def test_retry_after_is_respected(
    server: Server, store: Store, glacier: pd.Series, truth: pd.DataFrame, what: str
) -> None:
    """A server that asks for a while is left alone for as long, by the search and by all readers of files."""
    far = _far(server, store)
    server.fail(what, status(429, 2), for_s=1)
    found = _candidates(store, far, glacier)
    pd.testing.assert_frame_equal(found[SCORES], truth[SCORES])
    asked = server.asked(what.rstrip("*"))
    first, last = min(r.at for r in asked if r.fault), max(r.at for r in asked if r.fault)
    assert last - first < 0.6, "the server was asked again although it had said when"
    assert min(r.at for r in asked if not r.fault) - first > 1.9


# ---------------------------------------------------------------------------------------------------- lasting trouble
@pytest.mark.parametrize(
    ("fault", "words"),
    [(status(400), "400"), (status(401), "401"), (status(404), "404"), (hang(30), "(?i)time"), (HTML, "")],
    ids=_name,
)
def test_a_search_that_keeps_failing_is_an_error_never_a_part(
    server: Server, store: Store, fault: Fault, words: str
) -> None:
    """The first page is there, the second never comes: no search that found half of the scenes."""
    far = _far(server, store, page_size=2, timeout_s=0.2)
    server.fail("/v1/search", fault, skip=1)
    with pytest.raises(CatalogError, match=server.url) as caught:
        far.search(_box(store), *SEASON)
    assert re.search(words, str(caught.value)), caught.value


@pytest.mark.parametrize("fault", [status(404), HTML], ids=_name)
def test_an_api_that_is_none(server: Server, store: Store, fault: Fault) -> None:
    server.fail("/v1/*", fault)
    with pytest.raises(CatalogError, match=server.url):
        _far(server, store)


def _only_these(found: pd.DataFrame, truth: pd.DataFrame, items: list[str], words: str) -> None:
    """The rows with one of the items have no scores and say why; the others have the values of the catalog on disk."""
    pd.testing.assert_series_equal(found["date"], truth["date"])
    hit = truth["scene_ids"].str.contains("|".join(items))
    assert 0 < hit.sum() < len(hit)
    pd.testing.assert_frame_equal(found.loc[~hit, SCORES], truth.loc[~hit, SCORES])
    assert found.loc[~hit, "reason"].isna().all()
    assert found.loc[hit, ["ndsi", "albedo"]].isna().all(axis=None), found.loc[hit]
    assert found.loc[hit, "reason"].str.contains(words).all(), found.loc[hit, "reason"].tolist()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(404), "HTTP 404"),
        (status(403), "HTTP 403"),
        (status(500), "HTTP 500.*try again later"),
        (status(429, 3600), "asks to wait 3600 s"),
        (RESET, "try again later"),
        (HTML, "web page"),
        (EMPTY, "can not be read"),
        (HALF, "can not be read|try again later"),
        (LYING, "can not be read|try again later"),
        (hang(20), "try again later"),
    ],
    ids=_name,
)
def test_a_file_that_keeps_failing_costs_one_candidate(
    server: Server, store: Store, glacier: pd.Series, truth: pd.DataFrame, fault: Fault, words: str
) -> None:
    item = truth["scene_ids"].iloc[1].split("+")[0]
    server.fail(f"/files/scenes/{item}/green.tif", fault)
    start = time.monotonic()
    attempts = 1 if fault.kind == "hang" else 2
    found = _candidates(store, _far(server, store), glacier, read_attempts=attempts)
    _only_these(found, truth, [item], rf"{item}/green\.tif.*(?:{words})")
    assert time.monotonic() - start < 12


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_truncated_file_gives_the_right_score_or_none(
    server: Server, store: Store, glacier: pd.Series, truth: pd.DataFrame, tmp_path: Path, share: float
) -> None:
    """Where the window's blocks are in the part that is left, the score is right; otherwise there is none."""
    item = truth["scene_ids"].iloc[1].split("+")[0]
    name = f"scenes/{item}/green.tif"
    server.replaced[name] = cut_short(store.inputs / name, tmp_path / "green.tif", share)
    found = _candidates(store, _far(server, store), glacier, read_attempts=2)
    whole = found["reason"].isna()
    pd.testing.assert_frame_equal(found.loc[whole, SCORES], truth.loc[whole, SCORES])
    if not whole.all() or share < 0.2:
        _only_these(found, truth, [item], rf"{item}/green\.tif can not be read")


DAMAGES: dict[str, tuple[str, Callable[[Path, Path], Path], str]] = {
    "no CRS": ("green", lambda a, b: rewritten(a, b, crs=None), "no coordinate reference system"),
    "another zone": ("green", lambda a, b: rewritten(a, b, crs="EPSG:32631"), ""),
    "no data": ("green", lambda a, b: rewritten(a, b, silent), ""),
    "NaN": ("green", lambda a, b: rewritten(a, b, not_numbers), ""),
    "infinite": ("green", lambda a, b: rewritten(a, b, lambda v: np.full(v.shape, np.inf, np.float32)), ""),
    "reflectance 0 to 1": (
        "green",
        lambda a, b: rewritten(a, b, lambda v: (v / 1e4).astype(np.float32)),
        "seems to be applied in the file",
    ),
    "all cloud": ("scl", lambda a, b: rewritten(a, b, lambda v: np.full_like(v, 9)), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_say_nothing_are_never_chosen(
    server: Server, store: Store, glacier: pd.Series, truth: pd.DataFrame, tmp_path: Path, damage: str
) -> None:
    """Well served, and wrong: no score of such a file counts, and the reason says what is wrong."""
    band, make, words = DAMAGES[damage]
    items = truth["scene_ids"].iloc[1].split("+")
    for item in items:
        name = f"scenes/{item}/{band}.tif"
        server.replaced[name] = make(store.inputs / name, tmp_path / f"{item}.tif")
    found = _candidates(store, _far(server, store), glacier)
    others = [0, 2, 3]
    pd.testing.assert_frame_equal(found.loc[others, SCORES], truth.loc[others, SCORES])
    selection = store.region.imagery.selection
    scenes = select_scenes(rank_candidates(found.assign(year=YEAR), selection), YEAR).set_index("date")
    judged = scenes.loc[found["date"][1]]
    assert pd.isna(judged["rank"]) and not judged["selected"] and scenes["selected"].any(), judged
    assert isinstance(judged["reason"], str) and judged["reason"]
    if words:
        assert items[0] in found["reason"][1] and words in found["reason"][1]
        assert found[SCORES].iloc[1].isna().all()


def test_an_item_without_a_band_costs_one_candidate(
    server: Server, store: Store, glacier: pd.Series, truth: pd.DataFrame
) -> None:
    item = truth["scene_ids"].iloc[2].split("+")[0]
    server.backend.put(without_asset(server.backend.item(item), "swir16"))
    found = _candidates(store, _far(server, store), glacier)
    _only_these(found, truth, [item], f"item {item} has no asset 'swir16'")


@pytest.mark.parametrize(
    "wrong",
    [
        {"geometry": None, "bbox": None},
        {"geometry": {"type": "Polygon", "coordinates": [[]]}},
        {"properties": {"datetime": "yesterday"}},
        {"assets": None},
        {"stac_version": None, "assets": {"green": {"title": "no address"}}},
    ],
    ids=["no place", "empty place", "no time", "no assets", "no address"],
)
def test_a_senseless_item_is_left_out(server: Server, store: Store, wrong: dict[str, Any]) -> None:
    """One item that can not be understood does not take the others with it."""
    truth = [i.id for i in _far(server, store).search(_box(store), *SEASON)]
    item = server.backend.item(truth[0])
    original, search = dict(item), server.backend.search

    def with_it(**asked: Any) -> list[dict[str, Any]]:
        return [{**i, **wrong} if i["id"] == original["id"] else i for i in search(**asked)]

    server.backend.search = with_it  # type: ignore[method-assign]
    try:
        found = [i.id for i in _far(server, store).search(_box(store), *SEASON)]
    finally:
        del server.backend.search
    assert found in (truth[1:], truth) and (found == truth[1:] or "assets" in wrong)


# ------------------------------------------------------------------------------------------------------------- stages
def test_a_run_with_trouble_is_completed_by_the_next(server: Server, store: Store, tmp_path: Path) -> None:
    """Half of the files of a date are unreachable: their candidates wait, all else is done; then the server is well."""
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections))
    far.raw["compute"]["read_attempts"] = 1
    chosen = store.table("scenes", year=YEAR).query("selected")
    items = sorted(chosen["scene_ids"].str.split("+").explode())
    item = items[0]
    server.fail(f"/files/scenes/{item}/*", status(503))
    said = far.run(YEAR)
    affected = store.table("candidates", year=YEAR)
    affected = affected[affected["scene_ids"].str.contains(item)]
    failures = far.table("failures")
    waiting = failures[failures["stage"] == "scene_candidates"]
    assert set(waiting["glacier_id"]) <= set(affected["glacier_id"]) and len(waiting)
    rows = far.table("candidates", year=YEAR).merge(affected[["glacier_id", "date"]], on=["glacier_id", "date"])
    told = rows[rows["reason"].notna()]
    assert len(told) == len(waiting) and told["reason"].str.contains(f"{item}/.*try again later").all()
    assert said["glacier_cubes"]["glaciers"] >= 5 and said["glacier_cubes"]["failed_glaciers"] == 0

    server.restore()
    said = far.run(YEAR)
    assert said["scene_candidates"]["scored_now"] == len(waiting), "only what was missing is scored"
    assert differences(store.ws.storage, far.ws.storage, [YEAR]) == []
    failures = far.table("failures")
    assert not len(failures[failures["stage"] == "scene_candidates"])


def test_a_scene_that_goes_after_the_choice_costs_one_cube(server: Server, store: Store, tmp_path: Path) -> None:
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections))
    far.raw["compute"]["read_attempts"] = 1
    imagery.scene_candidates(far.ws, YEAR)
    imagery.selected_scenes(far.ws, YEAR)
    forget_files()
    chosen = far.table("scenes", year=YEAR).query("selected")
    item = chosen["scene_ids"].iloc[0]
    hit = set(chosen[chosen["scene_ids"].str.contains(item, regex=False)]["glacier_id"])
    name = f"scenes/{item}/nir.tif"
    server.replaced[name] = None
    said = cubes.glacier_cubes(far.ws, YEAR).metadata
    assert said["failed_glaciers"] == len(hit) and said["glaciers"] == len(chosen) - len(hit) > 0
    failures = far.table("failures").query("stage == 'glacier_cubes'")
    assert set(failures["glacier_id"]) == hit and failures["error"].str.contains(f"{item}/nir.tif").all()
    server.restore()
    cubes.glacier_cubes(far.ws, YEAR)
    assert differences(store.ws.storage, far.ws.storage, [YEAR]) == []


def test_a_dead_api_ends_the_stage_and_leaves_what_was_there(server: Server, store: Store, tmp_path: Path) -> None:
    far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections))
    imagery.scene_candidates(far.ws, YEAR)
    before = far.table("candidates", year=YEAR)
    far.raw["imagery"]["catalog"]["query"] = {"eo:cloud_cover": {"lt": 95}}  # so that it is asked again
    server.fail("/v1/search", status(404))
    with pytest.raises(CatalogError, match=server.url):
        imagery.scene_candidates(far.ws, YEAR)
    pd.testing.assert_frame_equal(far.table("candidates", year=YEAR), before)


def test_a_server_that_is_gone_is_named(store: Store, tmp_path: Path) -> None:
    with serving(store.inputs) as server:
        far = store.copy(tmp_path / "far", asking(store.raw, server.url, server.collections, timeout_s=0.5))
    with pytest.raises(CatalogError, match=server.url):
        imagery.scene_candidates(far.ws, YEAR)
