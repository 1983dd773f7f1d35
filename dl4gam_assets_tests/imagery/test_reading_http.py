"""Reading over HTTP from a real range server: the same values as from disk, whatever the server does, or an error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import rasterio.warp
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from dl4gam_assets.imagery import SceneError, candidates_of_glacier, read_image, read_images
from dl4gam_assets.imagery.reading import ReadPolicy, SceneUnreachableError, bytes_read, forget_files
from dl4gam_assets.settings import ComputeSettings, ImagerySettings, SensorSettings, StacFolder, parse_region
from dl4gam_assets_tests.imagery.conftest import CRS, IMAGERY, NORTH, SIZE, WEST, ItemMaker
from dl4gam_assets_tests.imagery.range_server import RangeServer, serving

QUICK = ReadPolicy(concurrent=1, attempts=4, stall_s=1, request_s=2, budget_s=6, backoff_s=0.01)
PLAIN = ImagerySettings(catalog=StacFolder(path="x"), sensor=SensorSettings(scale=1e-4, offset=0.0))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    forget_files()
    with serving(tmp_path) as running:
        yield running
    forget_files()


def _grid(west: float = 200, top: float = 200, n: int = 60, pixel: float = 10, crs: str = CRS) -> GeoBox:
    return GeoBox((n, n), Affine(pixel, 0, WEST + west, 0, -pixel, NORTH - top), crs)


GRIDS = {"aligned": _grid(), "half": _grid(210, 230), "shifted": _grid(203, 207), "coarser": _grid(200, 200, 20, 30.0)}


def _served(item: pystac.Item, server: RangeServer) -> pystac.Item:
    """The item with the addresses that its files have on the server."""
    far = item.clone()
    for asset in far.assets.values():
        asset.href = f"{server.url}/{Path(asset.href).relative_to(server.folder).as_posix()}"
    return far


def _noise(make_item: ItemMaker, name: str = "a", day: str = "2020-08-10", seed: int = 0) -> pystac.Item:
    rng = np.random.default_rng(seed)
    empty, cloud = np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
    empty[30:40, 50:60], cloud[60:70, 21:33] = True, True
    bands = {"green": rng.uniform(0.05, 0.95, (SIZE, SIZE)), "swir16": rng.uniform(0.05, 0.95, (SIZE // 2, SIZE // 2))}
    return make_item(name, day, empty=empty, cloud=cloud, **bands)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("concurrent", [1, 5])
def test_the_same_as_from_disk(make_item: ItemMaker, server: RangeServer, grid: GeoBox, concurrent: int) -> None:
    item = _noise(make_item)
    near = read_image([item], IMAGERY, grid)
    far = read_image([_served(item, server)], IMAGERY, grid, policy=ReadPolicy(concurrent=concurrent))
    xr.testing.assert_identical(near, far)
    assert near["cloud"].any() and near["missing"].any() and server.requests
    assert server.most_busy <= concurrent


# ------------------------------------------------------------------------------------------- every request in turn
def _big(folder: Path, blocksize: int) -> np.ndarray:
    """A file whose table of blocks is far from its header, so that it takes several requests; its pixels."""
    n = 1024
    values = np.random.default_rng(1).integers(1, 9999, (n, n)).astype(np.uint16)
    values[500:520, 500:520] = 0
    profile = {"driver": "GTiff", "height": n, "width": n, "count": 1, "dtype": "uint16", "nodata": 0, "crs": CRS}
    profile |= {"tiled": True, "blockxsize": blocksize, "blockysize": blocksize, "compress": "deflate"}
    with rasterio.open(folder / "big.tif", "w", transform=Affine(10, 0, WEST, 0, -10, NORTH), **profile) as target:
        target.write(values, 1)
    return values


def _one_file(server: RangeServer, name: str) -> pystac.Item:
    (server.folder / name).symlink_to(server.folder / "big.tif")  # a name that GDAL has not heard of
    item = pystac.Item(name, None, [10, 46, 11, 47], pd.Timestamp("2020-08-10").to_pydatetime(), {})
    item.add_asset("green", pystac.Asset(f"{server.url}/{name}"))
    return item


@pytest.mark.parametrize("trouble", ["503", "429 after 0", "404", "reset", "short", "lying", "html", "whole"])
@pytest.mark.parametrize("grid", [_grid(4000, 4000, 120), _grid(4003, 4007, 120)], ids=["copied", "warped"])
def test_one_failing_request_never_changes_a_pixel(server: RangeServer, grid: GeoBox, trouble: str) -> None:
    _big(server.folder, 16)
    truth = read_image([_one_file(server, "good.tif")], PLAIN, grid, ["green"], QUICK)
    requests = len(server.requests)
    assert requests >= 4 and truth["missing"].any() and not truth["missing"].all()
    for failing in range(min(requests, 7)):
        name = f"{trouble.split()[0]}_{failing}.tif"
        item = _one_file(server, name)
        server.trouble = lambda path, before, name=name, failing=failing: (
            trouble if path == name and before == failing else None
        )
        image = read_image([item], PLAIN, grid, ["green"], QUICK)
        np.testing.assert_array_equal(image["reflectance"], truth["reflectance"], err_msg=f"request {failing}")
        assert server.counts[name] > failing, "the trouble never came"


@pytest.mark.parametrize("trouble", ["stall", "hang"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_stalled_request_is_given_up_and_repeated(server: RangeServer, trouble: str, failing: int) -> None:
    values = _big(server.folder, 64)
    server.trouble = lambda path, before: trouble if before == failing else None
    image = read_image([_one_file(server, f"{trouble}_{failing}.tif")], PLAIN, _grid(0, 0, 60), ["green"], QUICK)
    np.testing.assert_allclose(image["reflectance"].to_numpy()[0], values[:60, :60] * 1e-4, rtol=1e-6)


# ----------------------------------------------------------------------------------------------- lasting troubles
@pytest.mark.parametrize("trouble", ["503", "500", "429", "reset", "hang", "stall"])
def test_a_lasting_trouble_ends_in_bounded_time_and_names_the_file(
    make_item: ItemMaker, server: RangeServer, trouble: str
) -> None:
    item = _served(_noise(make_item), server)
    server.trouble = lambda path, before: trouble if path.endswith("green.tif") else None
    start = time.monotonic()
    with pytest.raises(SceneUnreachableError, match=r"http://127.*a/green\.tif was not to be had.*try again later"):
        read_image([item], IMAGERY, _grid(), ["green"], replace(QUICK, budget_s=2.5))
    assert time.monotonic() - start < 2.5 + QUICK.request_s + QUICK.stall_s + 2
    if trouble in {"503", "500", "429"}:
        assert server.counts["scenes/a/green.tif"] == 2 * QUICK.attempts  # each with the question why


@pytest.mark.parametrize(("trouble", "words"), [("404", "HTTP 404"), ("403", "HTTP 403.*signature"), ("410", "410")])
def test_what_will_not_pass_is_not_repeated(
    make_item: ItemMaker, server: RangeServer, trouble: str, words: str
) -> None:
    server.trouble = lambda path, before: trouble
    with pytest.raises(SceneError, match=rf"a/green\.tif can not be opened: .*{words}") as caught:
        read_image([_served(_noise(make_item), server)], IMAGERY, _grid(), ["green"], QUICK)
    assert not isinstance(caught.value, SceneUnreachableError)
    assert len(server.requests) == 2


def test_a_server_that_is_gone(make_item: ItemMaker, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        item = _served(_noise(make_item), server)
    with pytest.raises(SceneUnreachableError, match=r"a/green\.tif"):
        read_image([item], IMAGERY, _grid(), ["green"], QUICK)


@pytest.mark.parametrize("damage", ["zero bytes", "truncated", "a web page", "no image", "bad block"])
def test_damage_is_an_error_never_missing_pixels(make_item: ItemMaker, server: RangeServer, damage: str) -> None:
    item = _noise(make_item)
    path = Path(item.assets["green"].href)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "zero bytes": b"",
            "truncated": content[:half],
            "a web page": b"<html><body>sign in</body></html>",
            "no image": b"II*\0" + bytes(5000),
            "bad block": content[:half] + bytes(3000) + content[half + 3000 :],
        }[damage]
    )
    for href in (str(path), f"{server.url}/scenes/a/green.tif"):
        item.assets["green"].href = href
        with pytest.raises(SceneError, match=r"a/green\.tif can not be read") as caught:
            read_image([item], IMAGERY, _grid(0, 0, SIZE), ["green"], QUICK)
        assert not isinstance(caught.value, SceneUnreachableError), "asking again would not help"
    assert server.counts["scenes/a/green.tif"] < 30


def test_what_failed_once_is_asked_for_again_later(make_item: ItemMaker, server: RangeServer) -> None:
    item = _noise(make_item)
    path = Path(item.assets["green"].href)
    content = path.read_bytes()
    far = _served(item, server)
    for wrong in (None, b"", content[: len(content) // 3]):  # absent, empty, still being written
        path.unlink() if wrong is None else path.write_bytes(wrong)
        with pytest.raises(SceneError):
            read_image([far], IMAGERY, _grid(0, 0, SIZE), ["green"], QUICK)
    path.write_bytes(content)
    good = read_image([far], IMAGERY, _grid(0, 0, SIZE), ["green"], QUICK)
    xr.testing.assert_identical(good, read_image([item], IMAGERY, _grid(0, 0, SIZE), ["green"]))


# ------------------------------------------------------------------------------------------------------ Retry-After
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected_by_all_threads(make_item: ItemMaker, server: RangeServer, form: str) -> None:
    until = time.time() + 2.5
    after = "1" if form == "seconds" else formatdate(until, usegmt=True)  # dates have whole seconds
    far = _served(_noise(make_item), server)
    first: list[float] = []

    def trouble(path: str, before: int) -> str | None:
        first.append(time.monotonic())
        return f"429 after {after}" if first[-1] - first[0] < 0.7 else None

    server.trouble = trouble
    image = read_image([far], IMAGERY, _grid(), policy=ReadPolicy(concurrent=3, backoff_s=0.01))
    assert not image["missing"].all()
    waited = [when - first[0] for *_, when in server.requests]
    between = [when for when in waited if 0.3 < when < (0.95 if form == "seconds" else 1.3)]
    assert not between and max(waited) > 0.95, waited
    assert sum(when < 0.3 for when in waited) <= 3 * 2 + 1  # each thread once, one or two questions why


def test_a_wait_that_is_too_long_ends_it_at_once(make_item: ItemMaker, server: RangeServer) -> None:
    server.trouble = lambda path, before: "503 after 3600"
    start = time.monotonic()
    with pytest.raises(SceneUnreachableError, match="asks to wait 3600 s"):
        read_image([_served(_noise(make_item), server)], IMAGERY, _grid(), ["green"], QUICK)
    assert time.monotonic() - start < 1 and len(server.requests) == 2


# --------------------------------------------------------------------------------------------------- many candidates
def _season(make_item: ItemMaker, n: int) -> list[pystac.Item]:
    return [_noise(make_item, f"d{k:02d}", f"2020-08-{k + 1:02d}", seed=k) for k in range(n)]


def test_days_read_at_once_are_those_read_one_by_one(make_item: ItemMaker, server: RangeServer) -> None:
    items = _season(make_item, 5)
    Path(items[3].assets["red"].href).write_bytes(b"")
    days = [[_served(i, server)] for i in items]
    one_by_one = dict(read_images(days, IMAGERY, _grid(), None, QUICK))
    forget_files()
    server.forget()
    at_once = dict(read_images(days, IMAGERY, _grid(), None, ReadPolicy(concurrent=8, backoff_s=0.01)))
    assert sorted(at_once) == sorted(one_by_one) == list(range(5))
    assert 2 < server.most_busy <= 8
    for index, image in one_by_one.items():
        other = at_once[index]
        if index == 3:
            assert isinstance(image, SceneError) and isinstance(other, SceneError) and "red.tif" in str(other)
        else:
            assert isinstance(image, xr.Dataset) and isinstance(other, xr.Dataset)
            xr.testing.assert_identical(image, other)


def test_few_days_are_held_whatever_their_number(make_item: ItemMaker, server: RangeServer) -> None:
    days = [[_served(i, server)] for i in _season(make_item, 9)]
    images = read_images(days, IMAGERY, _grid(), ["green"], ReadPolicy(concurrent=2))
    for _ in range(2):
        next(images)
    time.sleep(0.3)  # it would go on reading if nothing held it back
    asked = {path.split("/")[1] for _, path, *_ in server.requests}
    assert len(asked) <= 2 + 3
    assert len(list(images)) == 7


def test_only_the_window_is_downloaded_and_every_byte_of_it_counted(server: RangeServer) -> None:
    _big(server.folder, 64)
    size = (server.folder / "big.tif").stat().st_size
    item = _one_file(server, "window.tif")
    before = bytes_read()
    read_image([item], PLAIN, _grid(4000, 4000, 100), ["green"], QUICK)
    counted = bytes_read() - before
    assert counted == server.sent
    assert 100 * 100 * 1.5 < counted < 0.1 * size
    read_image([item], PLAIN, _grid(4000, 4000, 100), ["green"], QUICK)
    assert bytes_read() - before == counted  # the open file still has the blocks


def test_bytes_of_local_files_are_the_blocks_under_the_window(tmp_path: Path) -> None:
    _big(tmp_path, 64)
    item = pystac.Item("a", None, [10, 46, 11, 47], pd.Timestamp("2020-08-10").to_pydatetime(), {})
    item.add_asset("green", pystac.Asset(str(tmp_path / "big.tif")))
    before = bytes_read()
    read_image([item], PLAIN, _grid(640, 640, 64), ["green"])  # the block in row 1 and column 1
    one = bytes_read() - before
    assert 0.5 * 64 * 64 * 2 < one < 1.2 * 64 * 64 * 2
    read_image([item], PLAIN, _grid(630, 640, 64), ["green"])  # its neighbour too
    both = bytes_read() - before
    assert 1.8 * one < both < 2.2 * one
    forget_files()
    read_image([item], PLAIN, _grid(640, 640, 64), ["green"])
    assert bytes_read() - before == both + one


# ------------------------------------------------------------------------------------------------ a glacier's season
def test_the_candidates_of_a_glacier_are_those_from_disk(make_item: ItemMaker, server: RangeServer) -> None:
    region = parse_region(
        {
            "name": "x",
            "years": {"first": 2020, "last": 2020, "baseline": 2020},
            "inventory": {"path": "x"},
            "imagery": IMAGERY.model_dump(mode="json") | {"margin_m": 100},
            "model": {"channels": ["red", "green"]},
        }
    )
    x, y = rasterio.warp.transform(CRS, "EPSG:4326", [WEST + 350, WEST + 600], [NORTH - 600, NORTH - 350])
    glaciers = gpd.GeoDataFrame(
        {"glacier_id": ["g"], "utm_epsg": [32632], "inventory_date": [pd.Timestamp("2020-08-03")]},
        geometry=[shapely.box(min(x), min(y), max(x), max(y))],
        crs="EPSG:4326",
    )
    zones = gpd.GeoDataFrame({"buffer_m": [0]}, geometry=glaciers.geometry, crs="EPSG:4326")
    items = _season(make_item, 5)

    def candidates(found: list[pystac.Item], **reading: float) -> pd.DataFrame:
        forget_files()
        chosen = region.model_copy(update={"compute": ComputeSettings(**reading)})
        return candidates_of_glacier(glaciers.iloc[0], glaciers, zones, _Found(found), chosen, 2020)

    near = candidates(items)
    assert len(near) == 5 and near["ndsi"].notna().all() and near["reason"].isna().all()
    assert near.attrs["bytes_read"] > 0 and near.attrs["unreachable"] == 0
    far = [_served(i, server) for i in items]
    at_once, serial = candidates(far), candidates(far, concurrent_reads=1)
    pd.testing.assert_frame_equal(at_once, serial)
    different = ["hrefs", "checksums"]
    pd.testing.assert_frame_equal(at_once.drop(columns=different), near.drop(columns=different))
    assert 0 < at_once.attrs["bytes_read"] <= server.sent

    def trouble(path: str, before: int) -> str | None:
        return {"scenes/d01/green.tif": "500", "scenes/d03/scl.tif": "html"}.get(path)

    server.trouble = trouble
    partly = candidates(far, read_attempts=2)
    assert partly.attrs["unreachable"] == 1
    assert partly["reason"].notna().tolist() == [False, True, False, True, False]
    assert "d01/green.tif was not to be had" in partly["reason"][1] and "d03/scl.tif" in partly["reason"][3]
    scores = ["coverage", "cloud_share", "ndsi", "albedo"]
    pd.testing.assert_frame_equal(partly.loc[[0, 2, 4], scores], near.loc[[0, 2, 4], scores])
    assert partly.loc[[1, 3], scores].isna().all(axis=None)


class _Found:
    """A catalog that finds the same items everywhere."""

    def __init__(self, items: list[pystac.Item]):
        self.items = items

    def search(self, bbox: object, start: object, end: object) -> list[pystac.Item]:
        return self.items

    def get(self, item_ids: object) -> list[pystac.Item]:
        raise NotImplementedError
