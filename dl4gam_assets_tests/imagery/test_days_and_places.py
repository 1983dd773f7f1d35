"""Days by the sun, data strips of a tile, the antimeridian, and folders of files with defects."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import rasterio.warp
import shapely
import shapely.geometry
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.imagery import CatalogError, SceneError, group_by_day, open_catalog, read_image
from dl4gam_assets.imagery.catalogs import lonlat_box, solar_day
from dl4gam_assets.settings import (
    ImagerySettings,
    SceneFolder,
    SensorSettings,
    SettingsError,
    StacFolder,
    parse_region,
)
from dl4gam_assets_tests.imagery.conftest import CRS, NORTH, WEST, ItemMaker, save_catalog


def _item(name: str, when: str, bounds: tuple[float, float, float, float], **properties: str) -> pystac.Item:
    shape = lonlat_box(bounds)
    moment = dt.datetime.fromisoformat(when).replace(tzinfo=dt.UTC)
    return pystac.Item(name, shapely.geometry.mapping(shape), list(bounds), moment, properties)


def test_one_overpass_is_one_day_wherever_the_date_changes() -> None:
    # Over New Zealand's Alps (170 E) the morning overpass is on the evening before in UTC.
    before, after = (
        _item("a", "2020-08-09T22:30", (169, -44, 170, -43)),
        _item("b", "2020-08-10T22:30", (169, -44, 170, -43)),
    )
    assert {d.isoformat(): [i.id for i in g] for d, g in group_by_day([after, before]).items()} == {
        "2020-08-10": ["a"],
        "2020-08-11": ["b"],
    }


def test_a_search_goes_by_the_solar_day(tmp_path: Path) -> None:
    items = [_item("a", "2020-07-31T22:30", (169, -44, 170, -43)), _item("b", "2020-08-31T22:30", (169, -44, 170, -43))]
    save_catalog(items, tmp_path)
    catalog = open_catalog(StacFolder(path="stac/catalog.json"), tmp_path, SensorSettings())
    assert [i.id for i in catalog.search((169, -44, 170, -43), dt.date(2020, 8, 1), dt.date(2020, 8, 31))] == ["a"]


def test_a_box_across_the_antimeridian(tmp_path: Path) -> None:
    items = [
        _item("east", "2020-08-10T00:00", (178.5, 66, 179.9, 67)),
        _item("west", "2020-08-10T00:00", (-179.9, 66, -178.5, 67)),
        _item("both", "2020-08-10T00:00", (179.0, 66, -179.0, 67)),
        _item("europe", "2020-08-10T10:00", (7, 66, 8, 67)),
    ]
    save_catalog(items, tmp_path)
    catalog = open_catalog(StacFolder(path="stac/catalog.json"), tmp_path, SensorSettings())
    found = catalog.search((179.0, 66, -179.0, 67), dt.date(2020, 8, 1), dt.date(2020, 8, 31))
    assert [i.id for i in found] == ["both", "east", "west"]
    assert solar_day(items[2]) == dt.date(2020, 8, 10)  # at 180 degrees solar time is UTC + 12 h: still the 10th


@settings(max_examples=50, deadline=None)
@given(st.floats(-179, 178), st.dates(dt.date(2000, 1, 1), dt.date(2030, 1, 1)))
def test_local_noon_is_on_its_day_everywhere(west: float, day: dt.date) -> None:
    noon = dt.datetime.combine(day, dt.time(12)) - dt.timedelta(hours=(west + 0.5) / 15)
    assert solar_day(_item("a", noon.isoformat(), (west, 40, west + 1, 41))) == day


def test_two_strips_of_a_tile_are_both_kept() -> None:
    north = _item(
        "north", "2020-08-10T10:00", (7, 46.5, 8, 47), **{"grid:code": "T", "s2:processing_baseline": "05.00"}
    )
    south = _item(
        "south", "2020-08-10T10:00", (7, 46, 8, 46.5), **{"grid:code": "T", "s2:processing_baseline": "05.00"}
    )
    older = _item(
        "older", "2020-08-10T10:00", (7, 46.5, 8, 47), **{"grid:code": "T", "s2:processing_baseline": "02.14"}
    )
    (group,) = group_by_day([older, north, south]).values()
    assert sorted(i.id for i in group) == ["north", "south"]


def test_baselines_are_compared_as_numbers() -> None:
    old = _item("z", "2020-08-10T10:00", (7, 46, 8, 47), **{"grid:code": "T", "s2:processing_baseline": "2.14"})
    new = _item("a", "2020-08-10T10:00", (7, 46, 8, 47), **{"grid:code": "T", "s2:processing_baseline": "05.00"})
    newest = _item("b", "2020-08-10T10:00", (7, 46, 8, 47), **{"grid:code": "T", "s2:processing_baseline": "10.00"})
    (group,) = group_by_day([old, newest, new]).values()
    assert [i.id for i in group] == ["b"]


def test_a_damaged_item_file_is_named(make_item: ItemMaker, tmp_path: Path) -> None:
    save_catalog([make_item("a", "2020-08-10"), make_item("b", "2020-08-11")], tmp_path)
    (path,) = tmp_path.glob("stac/**/b.json")
    path.write_text("{")
    with pytest.raises(CatalogError, match=r"b\.json"):
        open_catalog(StacFolder(path="stac/catalog.json"), tmp_path, SensorSettings())


# ------------------------------------------------------------------------------------- zones, tiles, the antimeridian
def _latitudes(path: Path, crs: str, west: float, north: float, n: int = 240) -> tuple[float, float, float, float]:
    """A tile whose digital number tells the latitude, 1 for each 1e-5 degrees above 66.3; its bounds in degrees."""
    transform = Affine(20, 0, west, 0, -20, north)
    col, row = np.meshgrid(np.arange(n) + 0.5, np.arange(n) + 0.5)
    x, y = transform * (col.ravel(), row.ravel())
    _, lat = rasterio.warp.transform(crs, "EPSG:4326", x, y)
    values = np.round((np.array(lat).reshape(n, n) - 66.3) * 1e5).astype(np.uint16)
    with rasterio.open(
        path, "w", driver="GTiff", height=n, width=n, count=1, dtype="uint16", nodata=0, crs=crs, transform=transform
    ) as target:
        target.write(values, 1)
    return rasterio.warp.transform_bounds(crs, "EPSG:4326", west, north - 20 * n, west + 20 * n, north)


@pytest.mark.parametrize("meridian", [180, 12], ids=["antimeridian", "zones 32 and 33"])
def test_a_glacier_on_the_border_of_zones_is_mosaicked_from_both(tmp_path: Path, meridian: int) -> None:
    """Tiles of two UTM zones that meet at a meridian, a glacier on it, found by box and read in the eastern zone."""
    from odc.geo.geobox import GeoBox

    left, right = ("EPSG:32660", "EPSG:32601") if meridian == 180 else ("EPSG:32632", "EPSG:32633")
    lon, lat = float(meridian), 66.35
    (x_left,), (y_left,) = rasterio.warp.transform("EPSG:4326", left, [lon - 1e-9], [lat])
    (x_right,), (y_right,) = rasterio.warp.transform("EPSG:4326", right, [-180.0 if meridian == 180 else lon], [lat])
    # The western tile ends 100 m east of the meridian, the eastern one begins 100 m west of it.
    tiles = {
        "west": (left, round(x_left, -1) + 100 - 4800, round(y_left, -1) + 2400),
        "east": (right, round(x_right, -1) - 100, round(y_right, -1) + 2400),
    }
    items = []
    for name, (crs, west, north) in tiles.items():
        bounds = _latitudes(tmp_path / f"{name}.tif", crs, west, north)
        item = _item(name, "2020-08-10T00:30", bounds, **{"grid:code": name})
        item.add_asset("green", pystac.Asset(str(tmp_path / f"{name}.tif")))
        items.append(item)
    save_catalog(items, tmp_path)
    catalog = open_catalog(StacFolder(path="stac/catalog.json"), tmp_path, SensorSettings())
    grid = GeoBox((100, 100), Affine(10, 0, round(x_right, -1) - 600, 0, -10, round(y_right, -1) + 500), right)
    box = rasterio.warp.transform_bounds(right, "EPSG:4326", *grid.boundingbox)
    found = catalog.search(box, dt.date(2020, 8, 9), dt.date(2020, 8, 11))
    (day,) = group_by_day(found).values()
    assert sorted(i.id for i in day) == ["east", "west"]
    sensor = SensorSettings(bands={"green": "green"}, scale=1e-5, offset=0.0)
    imagery = ImagerySettings(catalog=StacFolder(path="x"), sensor=sensor)
    image = read_image(day, imagery, grid)
    assert set(image.attrs["scene_ids"].split("+")) == {"east", "west"}
    assert not image["missing"].any()
    col, row = np.meshgrid(np.arange(100) + 0.5, np.arange(100) + 0.5)
    x, y = grid.affine * (col.ravel(), row.ravel())
    _, truth = rasterio.warp.transform(right, "EPSG:4326", x, y)
    metres = (image["reflectance"].to_numpy()[0].ravel() + 66.3 - np.array(truth)) * 111_000
    # Rounding of the numbers (0.6 m), and GDAL's eighth of a 20 m pixel when it warps.
    assert np.abs(metres).max() < 0.6 + 20 / 8 + 0.5
    assert np.abs(metres.mean()) < 0.5  # half a pixel of misplacement would be 5 to 10 m


# --------------------------------------------------------------------------------------------- folders of files
PATTERN = r"^(?P<scene>\w+?)_(?P<date>\d+)_(?P<suffix>RGB|NIR)\.tif$"
ORDER = {"RGB": ["red", "green", "blue"], "NIR": ["nir"]}


def _file(path: Path, count: int, crs: str | None = CRS, west: float = WEST) -> None:
    values = np.stack([np.full((20, 20), 50 * (band + 1), np.uint8) for band in range(count)])
    profile = {"driver": "GTiff", "height": 20, "width": 20, "count": count, "dtype": "uint8", "crs": crs}
    with rasterio.open(path, "w", transform=Affine(30, 0, west, 0, -30, NORTH), **profile) as target:
        target.write(values)


def _folder(tmp_path: Path, **more: str) -> list[pystac.Item]:
    made = SceneFolder(**({"pattern": PATTERN, "band_order": ORDER} | more))
    return open_catalog(made, tmp_path, SensorSettings()).search(
        (-180, -90, 180, 90), dt.date(1990, 1, 1), dt.date(2030, 1, 1)
    )


def test_files_of_a_scene_become_one_item_with_an_asset_a_band(tmp_path: Path) -> None:
    for scene, date in (("L7", "2000304"), ("L7", "2000305")):
        _file(tmp_path / f"{scene}_{date}_RGB.tif", 3)
        _file(tmp_path / f"{scene}_{date}_NIR.tif", 1)
    first, second = _folder(tmp_path, date_format="%Y%j")
    assert (first.id, solar_day(first)) == ("L7_20001030", dt.date(2000, 10, 30))
    assert second.id == "L7_20001031" and set(first.assets) == {"red", "green", "blue", "nir"}
    sensor = SensorSettings(bands={"nir": "nir", "blue": "blue", "red": "red"}, scale=0.01, offset=0.0, pixel_m=30)
    imagery = ImagerySettings(catalog=StacFolder(path="x"), sensor=sensor)
    from odc.geo.geobox import GeoBox

    image = read_image([first], imagery, GeoBox((10, 10), Affine(30, 0, WEST, 0, -30, NORTH), CRS))
    assert image["reflectance"].mean(("y", "x")).to_numpy() == pytest.approx([0.5, 1.5, 0.5])


def test_a_damaged_file_of_a_folder_is_heard_of_when_it_is_read(tmp_path: Path) -> None:
    _file(tmp_path / "a_20200810_RGB.tif", 3)
    (tmp_path / "b_20200811_RGB.tif").write_bytes(b"II*\0 cut off")
    good, bad = _folder(tmp_path)
    assert shapely.geometry.shape(bad.geometry).equals(shapely.geometry.shape(good.geometry))
    imagery = ImagerySettings(
        catalog=StacFolder(path="x"), sensor=SensorSettings(bands={"red": "red"}, scale=1.0, offset=0.0)
    )
    from odc.geo.geobox import GeoBox

    grid = GeoBox((5, 5), Affine(30, 0, WEST, 0, -30, NORTH), CRS)
    assert not read_image([good], imagery, grid)["missing"].any()
    with pytest.raises(SceneError, match=r"b_20200811_RGB\.tif"):
        read_image([bad], imagery, grid)
    (tmp_path / "a_20200810_RGB.tif").unlink()
    with pytest.raises(CatalogError, match="no scene file"):
        _folder(tmp_path)


def test_two_files_for_one_band_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    _file(tmp_path / "x" / "a_20200810_NIR.tif", 1)
    _file(tmp_path / "y" / "a_20200810_NIR.tif", 1)
    with pytest.raises(CatalogError, match=r"x.a_20200810_NIR\.tif and .*both give the band nir"):
        _folder(tmp_path, pattern=PATTERN.replace("^", "/"))


def test_a_date_that_is_none_and_too_few_bands_are_named(tmp_path: Path) -> None:
    _file(tmp_path / "a_20201399_NIR.tif", 1)
    with pytest.raises(CatalogError, match=r"a_20201399_NIR\.tif: '20201399' is no date"):
        _folder(tmp_path)
    (tmp_path / "a_20201399_NIR.tif").unlink()
    _file(tmp_path / "a_20200810_RGB.tif", 1)
    with pytest.raises(CatalogError, match="has 1 bands"):
        _folder(tmp_path)
    _file(tmp_path / "a_20200810_RGB.tif", 3, crs=None)
    with pytest.raises(CatalogError, match="no coordinate reference system"):
        _folder(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(?P<date>\d+", "no regular expression"),
        (r"\d{8}", "needs a named group"),
        (r"(?P<date>\d+)(?P<tile>x)", "unknown groups"),
        (r"(?P<date>\d+)", "one key ''"),
    ],
)
def test_a_pattern_is_checked_with_the_settings(pattern: str, words: str) -> None:
    raw = {
        "name": "x",
        "imagery": {"catalog": {"kind": "scene-folder", "pattern": pattern, "band_order": ORDER}},
    }
    with pytest.raises(SettingsError, match=words):
        parse_region(raw)


def test_shadow_needs_its_bands() -> None:
    raw = {
        "name": "x",
        "imagery": {
            "catalog": {"kind": "stac-folder", "path": "x"},
            "sensor": {"bands": {"green": "green"}},
            "selection": {"shadow_nir_max": 0.12},
        },
    }
    with pytest.raises(SettingsError, match=r"shadow_nir_max needs the bands \['blue', 'nir'\]"):
        parse_region(raw)
