"""Presets against spec-conformant answers, replayed by a real HTTP server on this machine.

The answers are not recordings: they are written here after published items of each catalog (their asset names, raster
extension, properties), with one item of each kind that matters for scale and offset.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pystac
import pytest
import rasterio
import rasterio.warp
import shapely
import shapely.geometry

from dl4gam_assets.imagery import CatalogError, SceneError, open_catalog, read_image
from dl4gam_assets.imagery.scaling import band_metadata, reflectance_scale
from dl4gam_assets.imagery.signing import signed, unsigned
from dl4gam_assets.imagery.sources import SceneUnreachableError
from dl4gam_assets.inventory import glacier_grid
from dl4gam_assets.settings import ImagerySettings, SettingsError, StacApi, TerrainSettings, parse_region, presets
from dl4gam_assets.terrain import catalog_tiles
from dl4gam_assets_tests.imagery.range_server import serving

BOX = [7.9, 46.4, 8.1, 46.6]
RASTER = {"nodata": 0, "data_type": "uint16", "spatial_resolution": 10, "scale": 0.0001, "offset": -0.1}
LANDSAT = {"nodata": 0, "data_type": "uint16", "spatial_resolution": 30, "scale": 2.75e-05, "offset": -0.2}


def feature(name: str, properties: dict[str, Any], assets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    west, south, east, north = 7.6, 46.0, 9.0, 47.0
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "stac_extensions": [], "links": [],
        "collection": "c", "bbox": [west, south, east, north],
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"datetime": "2023-09-04T10:27:33.000Z", "eo:cloud_cover": 3.1, **properties},
        "assets": assets,
    }  # fmt: skip


def _bands(names: list[str], host: str, **fields: Any) -> dict[str, dict[str, Any]]:
    return {n: {"href": f"{host}/{n}.tif", "type": "image/tiff; application=geotiff", **fields} for n in names}


L2A = ["blue", "green", "red", "nir", "swir16", "scl"]
C1 = _bands(["blue", "green", "red", "nir", "swir16"], "https://e84.example/c1", **{"raster:bands": [RASTER]}) | _bands(
    ["scl", "cloud", "snow"], "https://e84.example/c1"
)
ANSWERS: dict[str, list[dict[str, Any]]] = {
    "earth-search-sentinel-2-c1-l2a": [
        feature("S2A_T32TMS_20230904T103633_L2A", {"s2:processing_baseline": "05.09", "grid:code": "MGRS-32TMS"}, C1)
    ],
    "earth-search-sentinel-2-l2a": [
        feature(
            "S2A_32TMS_20230904_0_L2A",
            {"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True, "grid:code": "MGRS-32TMS"},
            _bands(L2A, "https://s3.example", **{"raster:bands": [RASTER]}),
        ),
        feature(
            "S2B_32TMS_20220601_1_L2A",
            {"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": False, "grid:code": "MGRS-32TMS"},
            _bands(L2A, "https://s3.example", **{"raster:bands": [RASTER]}),
        ),
        feature(
            "S2A_32TMS_20200827_0_L2A",
            {"s2:processing_baseline": "02.14", "earthsearch:boa_offset_applied": False, "grid:code": "MGRS-32TMS"},
            _bands(L2A, "https://s3.example", **{"raster:bands": [RASTER]}),
        ),
    ],
    "planetary-computer-sentinel-2-l2a": [
        feature(
            f"S2{baseline}", {"s2:processing_baseline": baseline, "s2:mgrs_tile": "32TMS"} if baseline else {},
            _bands(["B02", "B03", "B04", "B08", "B11", "SCL"], "https://sentinel2l2a01.blob.core.windows.net/s2"),
        )
        for baseline in ("02.12", "04.00", "05.10", "")
    ],
    "planetary-computer-landsat-c2-l2": [
        feature(
            "LC08_L2SP_195028_20230904_02_T1", {"platform": "landsat-8", "landsat:wrs_path": "195"},
            _bands(["blue", "green", "red", "nir08", "swir16"], "https://landsateuwest.blob.core.windows.net/l",
                   **{"raster:bands": [LANDSAT]})
            | _bands(["qa_pixel"], "https://landsateuwest.blob.core.windows.net/l"),
        )
    ],
}  # fmt: skip
EXPECTED: dict[str, dict[str, tuple[float, float]]] = {
    "earth-search-sentinel-2-c1-l2a": {"S2A_T32TMS_20230904T103633_L2A": (1e-4, -0.1)},
    "earth-search-sentinel-2-l2a": {
        "S2A_32TMS_20230904_0_L2A": (1e-4, 0.0), "S2B_32TMS_20220601_1_L2A": (1e-4, -0.1),
        "S2A_32TMS_20200827_0_L2A": (1e-4, 0.0),
    },
    "planetary-computer-sentinel-2-l2a": {"S202.12": (1e-4, 0.0), "S204.00": (1e-4, -0.1), "S205.10": (1e-4, -0.1)},
    "planetary-computer-landsat-c2-l2": {"LC08_L2SP_195028_20230904_02_T1": (2.75e-5, -0.2)},
}  # fmt: skip


class Replay(ThreadingHTTPServer):
    """Answers every search with the same items and keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.features: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.next_pages = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Replay

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _send(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        conforms = [f"https://api.stacspec.org/v1.0.0/{c}" for c in ("core", "item-search", "item-search#query")]
        link = {"rel": "search", "href": f"{self.server.url}/search", "type": "application/geo+json", "method": "POST"}
        self._send({"type": "Catalog", "id": "api", "description": "x", "stac_version": "1.0.0",
                    "conformsTo": conforms, "links": [link]})  # fmt: skip

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        page: dict[str, Any] = {"type": "FeatureCollection", "features": self.server.features, "links": []}
        if self.server.next_pages:
            self.server.next_pages -= 1
            page["links"] = [{"rel": "next", "href": f"{self.server.url}/search", "method": "POST", "merge": True,
                              "body": {"token": str(len(self.server.asked))}}]  # fmt: skip
        self._send(page)


@pytest.fixture
def replay() -> Iterator[Replay]:
    server = Replay()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def imagery_of(preset: str, **more: Any) -> ImagerySettings:
    return ImagerySettings.model_validate({"preset": preset, **more})


@pytest.mark.parametrize("preset", sorted(presets()["imagery"]))
def test_requests_and_scales_of_each_preset(preset: str, replay: Replay) -> None:
    replay.features = json.loads(json.dumps(ANSWERS[preset]))
    imagery = imagery_of(preset, catalog={"url": replay.url})
    catalog = open_catalog(imagery.catalog, Path(), imagery.sensor)
    found = {i.id: i for i in catalog.search(BOX, dt.date(2023, 8, 1), dt.date(2023, 10, 15))}
    (asked,) = replay.asked
    assert isinstance(imagery.catalog, StacApi)
    assert asked["collections"] == presets()["imagery"][preset]["catalog"]["collections"]
    assert asked["bbox"] == BOX and asked["limit"] == 100
    assert asked["datetime"] == "2023-07-31T00:00:00Z/2023-10-16T23:59:59Z"
    assert asked["query"]["eo:cloud_cover"] == {"lt": 90}
    for item_id, wanted in EXPECTED[preset].items():
        item = found[item_id]
        for band, asset in imagery.sensor.bands.items():
            scale = reflectance_scale(item, item.assets[asset], imagery.sensor)
            assert scale == pytest.approx(wanted), (item_id, band)
        masks = (imagery.sensor.scene_classification, imagery.sensor.cloud_probability, imagery.sensor.qa_pixel)
        assert any(masks) and all(name in item.assets for name in masks if name)
        # No-data is 0 for all of them: where the item does not state it (Planetary Computer), the preset does.
        for asset in imagery.sensor.bands.values():
            assert band_metadata(item.assets[asset]).get("nodata", imagery.sensor.nodata) == 0
        assert imagery.sensor.nodata == 0


def test_a_scene_without_a_stated_scale_is_refused_never_guessed(replay: Replay) -> None:
    imagery = imagery_of("planetary-computer-sentinel-2-l2a", catalog={"url": replay.url})
    unknown = pystac.Item.from_dict(json.loads(json.dumps(ANSWERS["planetary-computer-sentinel-2-l2a"][3])))
    with pytest.raises(SceneError, match=r"item S2 does not state its processing baseline"):
        reflectance_scale(unknown, unknown.assets["B04"], imagery.sensor)
    c1 = imagery_of("earth-search-sentinel-2-c1-l2a")
    bare = pystac.Item.from_dict(json.loads(json.dumps(ANSWERS["earth-search-sentinel-2-c1-l2a"][0])))
    del bare.assets["red"].extra_fields["raster:bands"]
    with pytest.raises(SceneError, match="do not say the scale of asset"):
        reflectance_scale(bare, bare.assets["red"], c1.sensor)


def test_keys_beside_a_preset_override_it_and_wrong_names_are_explained() -> None:
    imagery = imagery_of(
        "planetary-computer-landsat-c2-l2", sensor={"pixel_m": 15, "bands": {"red": "red", "nir": "nir08"}},
        catalog={"query": {"platform": {"eq": "landsat-9"}}}, window=["07-15", "09-30"],
    )  # fmt: skip
    assert imagery.sensor.pixel_m == 15 and imagery.sensor.bands == {"red": "red", "nir": "nir08"}
    assert imagery.sensor.qa_pixel == "qa_pixel" and imagery.window == ("07-15", "09-30")
    assert isinstance(imagery.catalog, StacApi)
    assert imagery.catalog.query["platform"] == {"eq": "landsat-9"} and "eo:cloud_cover" in imagery.catalog.query
    local = imagery_of("earth-search-sentinel-2-l2a", catalog={"kind": "stac-folder", "path": "mirror/catalog.json"})
    assert local.catalog.kind == "stac-folder" and local.sensor.scene_classification == "scl"
    with pytest.raises(SettingsError, match=r"there is no preset .*mean 'earth-search-sentinel-2-l2a'"):
        parse_region(
            {"name": "x", "years": {"first": 2020, "baseline": 2020}, "inventory": {"path": "a"},
             "imagery": {"preset": "earth-search-sentinel2-l2a"}}
        )  # fmt: skip


#: DEM preset -> where its items say that a tile lies, and where it can be had.
DEM_TILES = {
    "earth-search-cop-dem-glo-30": (
        "s3://copernicus-dem-30m/Copernicus_DSM_COG_10_N46_00_E007_00_DEM/x_DEM.tif",
        "https://copernicus-dem-30m.s3.eu-central-1.amazonaws.com/Copernicus_DSM_COG_10_N46_00_E007_00_DEM/x_DEM.tif",
    ),
    "planetary-computer-cop-dem-glo-30": (
        "https://elevationeuwest.blob.core.windows.net/copernicus-dem/COP30_hh/Copernicus_N46_E007.tif",
        "https://elevationeuwest.blob.core.windows.net/copernicus-dem/COP30_hh/Copernicus_N46_E007.tif",
    ),
}


@pytest.mark.parametrize("preset", sorted(presets()["dem"]))
def test_dem_presets_are_catalogs_with_addresses_that_need_no_account(preset: str, replay: Replay) -> None:
    terrain = TerrainSettings.model_validate({"dem_catalog": {"preset": preset, "url": replay.url}})
    said, wanted = DEM_TILES[preset]
    about = {"datetime": "2021-04-22T00:00:00Z", "gsd": 30}
    replay.features = [feature("Copernicus_DSM_COG_10_N46_00_E007_00_DEM", about, {"data": {"href": said}})]
    assert isinstance(terrain.dem_catalog, StacApi) and terrain.has_dem
    found = open_catalog(terrain.dem_catalog, Path(), imagery_of("earth-search-sentinel-2-l2a").sensor).search(
        BOX, dt.date(1990, 1, 1), dt.date(2100, 1, 1)
    )
    (asked,) = replay.asked
    assert asked["collections"] == ["cop-dem-glo-30"] and not asked.get("query")
    (tile,) = catalog_tiles(found, terrain.dem_asset)
    assert tile.href == wanted and tile.box == (7.6, 46.0, 9.0, 47.0)


def test_a_landsat_scene_is_searched_and_read_on_its_own_grid(replay: Replay, tmp_path: Path) -> None:
    """From the preset's search to pixels over HTTP: scale, fill, quality bits, 30 m, and a margin of 133 pixels."""
    imagery = imagery_of("planetary-computer-landsat-c2-l2", catalog={"url": replay.url})
    assert imagery.margin_m == 3990
    n, pixel, west, north = 400, 30.0, 600_000.0, 5_200_020.0
    values = {"blue": 0.3, "green": 0.4, "red": 0.35, "nir08": 0.3, "swir16": 0.25}
    quality = np.full((n, n), 21824, np.uint16)  # clear land
    quality[:, 200:230] = 22280  # cloud
    quality[:, 230:240] = 1  # fill
    footprint = shapely.box(*rasterio.warp.transform_bounds("EPSG:32632", "EPSG:4326", west, north - n * pixel,
                                                            west + n * pixel, north))  # fmt: skip

    def write(name: str, content: np.ndarray, tag: float) -> None:
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="COG", height=n, width=n, count=1, dtype="uint16", nodata=tag,
            crs="EPSG:32632", transform=rasterio.Affine(pixel, 0, west, 0, -pixel, north),
        ) as target:  # fmt: skip
            target.write(content, 1)

    for name, value in values.items():
        digits = np.full((n, n), round((value + 0.2) / 2.75e-5), np.uint16)
        digits[:, 230:240] = 0
        write(name, digits, 0)
    write("qa_pixel", quality, 1)
    with serving(tmp_path) as files:
        said = json.loads(json.dumps(ANSWERS["planetary-computer-landsat-c2-l2"][0]))
        said |= {"bbox": list(footprint.bounds), "geometry": shapely.geometry.mapping(footprint)}
        for name, asset in said["assets"].items():
            asset["href"] = f"{files.url}/{name}.tif"
        replay.features = [said]
        outline = gpd.GeoSeries([shapely.box(west + 5800, north - 6300, west + 6200, north - 5900)], crs="EPSG:32632")
        grid = glacier_grid(outline.to_crs(4326).iloc[0], 32632, imagery.sensor.pixel_m, imagery.margin_m)
        assert min(grid.shape) >= 2 * 133 + 13
        box = rasterio.warp.transform_bounds("EPSG:32632", "EPSG:4326", *grid.boundingbox)
        catalog = open_catalog(imagery.catalog, Path(), imagery.sensor)
        items = catalog.search(box, dt.date(2023, 8, 1), dt.date(2023, 10, 15))
        image = read_image(items, imagery, grid)
    assert len(items) == 1 and files.requests
    left = round((grid.affine.c - west) / pixel)
    part = slice(left, left + grid.shape[1])
    cloud, fill = (np.zeros((1, n), bool) for _ in range(2))
    cloud[:, 200:230], fill[:, 230:240] = True, True
    np.testing.assert_array_equal(image["missing"], np.broadcast_to(fill[:, part], grid.shape))
    np.testing.assert_array_equal(image["cloud"], np.broadcast_to(cloud[:, part], grid.shape))
    clear = ~image["missing"].to_numpy()
    for band, asset in imagery.sensor.bands.items():
        np.testing.assert_allclose(image["reflectance"].sel(band=band).to_numpy()[clear], values[asset], atol=1.4e-5)


def test_the_margin_follows_the_pixel_unless_it_is_stated() -> None:
    assert imagery_of("earth-search-sentinel-2-l2a").margin_m == 1330
    assert imagery_of("planetary-computer-landsat-c2-l2", margin_m=600).margin_m == 600
    assert imagery_of("planetary-computer-landsat-c2-l2", sensor={"pixel_m": 15}).margin_m == 1995
    again = ImagerySettings.model_validate(imagery_of("planetary-computer-landsat-c2-l2").model_dump(mode="json"))
    assert again.margin_m == 3990


def test_a_catalog_that_pages_for_ever_is_stopped(replay: Replay) -> None:
    replay.features = json.loads(json.dumps(ANSWERS["earth-search-sentinel-2-l2a"]))
    replay.next_pages = 1000
    imagery = imagery_of("earth-search-sentinel-2-l2a", catalog={"url": replay.url})
    catalog = open_catalog(imagery.catalog, Path(), imagery.sensor)
    with pytest.raises(CatalogError, match="the same page of items again and again"):
        catalog.search(BOX, dt.date(2023, 8, 1), dt.date(2023, 10, 15))
    assert len(replay.asked) == 2
    few = imagery_of("earth-search-sentinel-2-l2a", catalog={"url": replay.url, "max_items": 1})
    with pytest.raises(CatalogError, match="more than 1 items: narrow"):
        open_catalog(few.catalog, Path(), few.sensor).search(BOX, dt.date(2023, 8, 1), dt.date(2023, 10, 15))


def test_a_box_over_the_antimeridian_is_asked_for_in_two_parts(replay: Replay) -> None:
    imagery = imagery_of("earth-search-sentinel-2-l2a", catalog={"url": replay.url})
    open_catalog(imagery.catalog, Path(), imagery.sensor).search(
        [179.5, -20, -179.5, -19], dt.date(2023, 8, 1), dt.date(2023, 8, 2)
    )
    assert [a["bbox"] for a in replay.asked] == [[179.5, -20, 180.0, -19], [-180.0, -20, -179.5, -19]]


def test_what_a_lying_catalog_gives_from_elsewhere_is_left_out(replay: Replay) -> None:
    here, there, later, broken = (json.loads(json.dumps(ANSWERS["earth-search-sentinel-2-l2a"][0])) for _ in range(4))
    there |= {"id": "there", "bbox": [20, 46, 21, 47], "geometry": None}
    later["id"], later["properties"]["datetime"] = "later", "2024-09-04T10:27:33.000Z"
    broken |= {"id": "broken", "geometry": None, "bbox": None}
    older = json.loads(json.dumps(here)) | {"assets": {}}
    older["properties"]["s2:processing_baseline"] = "03.00"
    replay.features = [older, here, there, later, broken]
    imagery = imagery_of("earth-search-sentinel-2-l2a", catalog={"url": replay.url})
    found = open_catalog(imagery.catalog, Path(), imagery.sensor).search(
        BOX, dt.date(2023, 8, 1), dt.date(2023, 10, 15)
    )
    assert [i.id for i in found] == [here["id"]]
    assert set(found[0].assets) == set(here["assets"])  # of two versions of an item the newest processing


def test_a_page_of_items_that_can_not_be_used_is_no_loop(replay: Replay) -> None:
    broken = [json.loads(json.dumps(ANSWERS["earth-search-sentinel-2-l2a"][0])) for _ in range(2)]
    for number, one in enumerate(broken):
        one |= {"id": f"broken-{number}", "geometry": None, "bbox": None}
    replay.features = broken
    imagery = imagery_of("earth-search-sentinel-2-l2a", catalog={"url": replay.url})
    catalog = open_catalog(imagery.catalog, Path(), imagery.sensor)
    assert catalog.search(BOX, dt.date(2023, 8, 1), dt.date(2023, 10, 15)) == []


def test_the_name_of_a_preset_is_in_no_fingerprint() -> None:
    """What it expands to is: the same settings written out are the same region."""
    base = {
        "name": "x",
        "years": {"first": 2020, "baseline": 2020},
        "inventory": {"path": "a"},
        "terrain": {"dem": ["d"]},
    }
    named = parse_region({**base, "imagery": {"preset": "earth-search-sentinel-2-c1-l2a"}})
    written = named.imagery.model_dump(mode="json", exclude={"preset"})
    assert parse_region({**base, "imagery": written}).fingerprint() == named.fingerprint()
    other = parse_region({**base, "imagery": {"preset": "earth-search-sentinel-2-l2a"}})
    assert other.fingerprint() != named.fingerprint()


# ---------------------------------------------------------------------------------------------------------- signatures
class Tokens(ThreadingHTTPServer):
    """The token service of Planetary Computer: a new token for each request, or a refusal."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TokenHandler)
        self.asked: list[str] = []
        self.lasts_s = 3600.0
        self.status = 200
        self.silent = threading.Event()


class _TokenHandler(BaseHTTPRequestHandler):
    server: Tokens

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.silent.is_set():
            while self.server.silent.is_set():
                time.sleep(0.02)
            return
        until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.server.lasts_s)
        token = f"se=2099&sp=rl&sr=c&sig=secret{len(self.server.asked)}"
        body = json.dumps({"msft:expiry": until.isoformat(), "token": token}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokens]:
    """The real library, which asks a service on this machine."""
    from planetary_computer import sas
    from planetary_computer.settings import Settings

    server = Tokens()
    monkeypatch.setattr(Settings.get(), "sas_url", f"http://127.0.0.1:{server.server_port}/token")
    monkeypatch.setattr(sas, "TOKEN_CACHE", {})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SIGNED_HOST = "https://sentinel2l2a01.blob.core.windows.net"


def test_addresses_are_signed_only_for_the_hosts_that_want_it(tokens: Tokens) -> None:
    plain = "https://sentinel-cogs.s3.us-west-2.amazonaws.com/a/B04.tif"
    assert signed(plain) == plain and signed("/data/x.tif") == "/data/x.tif"
    already = f"{SIGNED_HOST}/c/x.tif?se=1&sig=abc"
    assert signed(already) == already and not tokens.asked
    assert signed(f"{SIGNED_HOST}/sentinel2-l2/32/T/x.tif").startswith(f"{SIGNED_HOST}/sentinel2-l2/32/T/x.tif?se=")
    assert tokens.asked == ["/token/sentinel2l2a01/sentinel2-l2"]


def test_a_token_is_asked_for_once_and_renewed_before_it_ends(tokens: Tokens) -> None:
    href = f"{SIGNED_HOST}/sentinel2-l2/x.tif"
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(signed, [href] * 64))) == 1
    assert len(tokens.asked) == 1
    tokens.lasts_s = 30.0
    other = f"{SIGNED_HOST}/other/x.tif"
    first, second = signed(other), signed(other)  # less than a minute is left
    assert first != second and len(tokens.asked) == 3


def test_a_token_that_is_not_given_makes_no_scene_bad(tokens: Tokens) -> None:
    tokens.status = 403
    with pytest.raises(SceneUnreachableError, match=r"gave no token for https://sentinel2l2a01.*try again later"):
        signed(f"{SIGNED_HOST}/c/x.tif")


def test_a_service_that_never_answers_holds_nothing_up(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dl4gam_assets.imagery.signing._TOKEN_S", 0.3)
    tokens.silent.set()
    try:
        with pytest.raises(SceneUnreachableError, match=r"no answer within 0\.3 s; try again later"):
            signed(f"{SIGNED_HOST}/c/x.tif")
    finally:
        tokens.silent.clear()
    assert "sig=secret" in signed(f"{SIGNED_HOST}/c/x.tif")


def test_without_the_library_the_extra_is_named_before_anything_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "planetary_computer", None)
    imagery = imagery_of("planetary-computer-sentinel-2-l2a")
    with pytest.raises(CatalogError, match=r"pip install 'dl4gam_assets\[planetary-computer\]'"):
        open_catalog(imagery.catalog, Path(), imagery.sensor)
    with pytest.raises(SceneUnreachableError, match=r"dl4gam_assets\[planetary-computer\]"):
        signed(f"{SIGNED_HOST}/c/x.tif")


def test_tokens_are_taken_out_of_texts() -> None:
    secret = "st=1&se=2026-01-01T00%3A00%3A00Z&sp=rl&sv=2024&sr=c&sig=a%2Bb%3D"
    for text, plain in (
        (f"{SIGNED_HOST}/c/x.tif?{secret}", f"{SIGNED_HOST}/c/x.tif"),
        (
            f"'/vsicurl/{SIGNED_HOST}/c/x.tif?{secret}' not recognized",
            f"'/vsicurl/{SIGNED_HOST}/c/x.tif' not recognized",
        ),
        (
            f"Max retries exceeded with url: /c/x.tif?{secret} (Caused by",
            "Max retries exceeded with url: /c/x.tif (Caused by",
        ),
        ("is it complete? yes", "is it complete? yes"),
        (f"{SIGNED_HOST}/c/x.tif?version=2", f"{SIGNED_HOST}/c/x.tif?version=2"),
    ):
        assert unsigned(text) == plain
