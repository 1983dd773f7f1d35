"""Reading against another reader (odc-stac), and what must not go wrong with files: replaced, damaged, many threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import scipy.ndimage
from affine import Affine
from odc.geo.geobox import GeoBox

from dl4gam_assets.imagery import SceneError, read_image
from dl4gam_assets.settings import ImagerySettings, SensorSettings, StacFolder
from dl4gam_assets_tests.imagery.conftest import CRS, IMAGERY, NORTH, SIZE, WEST, ItemMaker, write_tif

BANDS = ["green", "swir16"]


def _grid(west: float = 200, top: float = 200, n: int = 60, pixel: float = 10, crs: str = CRS) -> GeoBox:
    return GeoBox((n, n), Affine(pixel, 0, WEST + west, 0, -pixel, NORTH - top), crs)


def _noisy(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 0.95, (SIZE, SIZE))


def _item(make_item: ItemMaker) -> pystac.Item:
    """A scene of noise at 10 and 20 m with a hole and a cloud."""
    empty, cloud = np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
    empty[30:40, 50:60] = True
    cloud[60:70, 21:33] = True
    noise = _noisy()
    return make_item("a", "2020-08-10", green=noise, swir16=noise[::2, ::2], empty=empty, cloud=cloud)


def _by_odc(item: pystac.Item, grid: GeoBox) -> dict[str, np.ndarray]:
    import odc.stac

    coarser = grid.resolution.x > 20

    loaded = odc.stac.load(
        [item],
        bands=[*BANDS, "scl"],
        geobox=grid,
        resampling={"scl": "mode", "*": "average"} if coarser else {"scl": "nearest", "*": "bilinear"},
        stac_cfg={"*": {"assets": {"*": {"data_type": "uint16", "nodata": 0}}}},
    )
    values = {name: loaded[name].isel(time=0).to_numpy() for name in [*BANDS, "scl"]}
    return {name: np.where(v == 0, np.nan, v * (1e-4 if name in BANDS else 1.0)) for name, v in values.items()}


@pytest.mark.parametrize(
    "grid",
    [
        _grid(),  # the pixels of the 10 m bands, whole pixels of the 20 m bands
        _grid(210, 230),  # half pixels of the 20 m bands
        _grid(-100, -200, 130),  # reaches beyond the scene on all sides
        _grid(203, 207),  # pixels of neither
        _grid(200, 200, 20, 30.0),  # coarser than the bands
        GeoBox.from_bbox((10.314, 46.940, 10.321, 46.945), crs="EPSG:4326", resolution=0.0001),  # another CRS
    ],
    ids=["aligned", "half", "beyond", "shifted", "coarser", "degrees"],
)
def test_as_odc_stac_reads_it(make_item: ItemMaker, grid: GeoBox) -> None:
    item = _item(make_item)
    ours = read_image([item], IMAGERY, grid, BANDS)
    theirs = _by_odc(item, grid)
    missing = ours["missing"].to_numpy()
    gone = ~np.isfinite(theirs[BANDS[0]]) | ~np.isfinite(theirs[BANDS[1]])
    assert (missing != gone).mean() < 0.02  # resampling may differ by one pixel at the edge of a hole or of the file
    clear = ~scipy.ndimage.binary_dilation(missing | gone, iterations=2)
    assert clear.sum() > 100
    for name in BANDS:
        values = ours["reflectance"].sel(band=name).to_numpy()
        np.testing.assert_allclose(values[clear], theirs[name][clear], atol=1.01e-4)  # one digital number
    agree = (theirs["scl"] == 9) == ours["cloud"].to_numpy()
    assert agree[~missing].mean() > 0.98


@pytest.mark.parametrize("pixel", [10, 20])
@pytest.mark.parametrize("grid", [_grid(), _grid(210, 230), _grid(203, 207)], ids=["aligned", "half", "shifted"])
def test_a_gradient_keeps_its_place(make_item: ItemMaker, pixel: int, grid: GeoBox) -> None:
    """A plane is what bilinear resampling reproduces exactly, if pixels are taken at their centres.

    Half a 20 m pixel of misplacement would be 10 m: 0.004 here, of which the test allows a fortieth.
    """
    n = SIZE * 10 // pixel
    name = {10: "green", 20: "swir16"}[pixel]
    at = (np.arange(n) + 0.5) * pixel  # metres from the upper left corner to the centres
    plane = 0.05 + 4e-4 * at[None, :] + 3e-4 * at[:, None]
    item = make_item("a", "2020-08-10", **{name: plane})
    image = read_image([item], IMAGERY, grid, [name])["reflectance"].to_numpy()[0]
    x = grid.affine.c - WEST + (np.arange(60) + 0.5) * 10
    y = NORTH - grid.affine.f + (np.arange(60) + 0.5) * 10
    np.testing.assert_allclose(image, 0.05 + 4e-4 * x[None, :] + 3e-4 * y[:, None], atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3, 6])
def test_a_coarser_grid_has_the_mean_of_its_pixels(make_item: ItemMaker, factor: int) -> None:
    noise = _noisy()
    n = 60 // factor
    grid = _grid(120, 120, n, 10.0 * factor)
    image = read_image([make_item("a", "2020-08-10", green=noise)], IMAGERY, grid, ["green"])
    mean = noise[12:72, 12:72].reshape(n, factor, n, factor).mean((1, 3))
    np.testing.assert_allclose(image["reflectance"].to_numpy()[0], mean, atol=1e-4)


def test_a_coarser_grid_takes_the_commonest_class(make_item: ItemMaker) -> None:
    cloud = np.zeros((SIZE, SIZE), bool)
    cloud[20:40, 20:33] = True
    sensor = SensorSettings(scene_classification="scl")
    imagery = ImagerySettings(catalog=StacFolder(path="x"), sensor=sensor)
    item = make_item("a", "2020-08-10", cloud=cloud)
    seen = read_image([item], imagery, _grid(180, 180, 5, 60.0), ["green"])["cloud"].to_numpy()
    share = cloud[18:48, 18:48].reshape(5, 6, 5, 6).mean((1, 3))
    np.testing.assert_array_equal(seen[np.abs(share - 0.5) > 0.1], (share > 0.5)[np.abs(share - 0.5) > 0.1])
    assert seen.any() and not seen.all()


def test_a_grid_of_another_zone_lands_at_the_same_place(make_item: ItemMaker) -> None:
    rows = np.linspace(0.1, 0.9, SIZE)[:, None].repeat(SIZE, 1)
    item = make_item("a", "2020-08-10", green=rows)
    west, south, east, north = rasterio.warp.transform_bounds(
        CRS, "EPSG:32633", WEST + 300, NORTH - 700, WEST + 700, NORTH - 300
    )
    grid = GeoBox.from_bbox((west, south, east, north), crs="EPSG:32633", resolution=10)
    image = read_image([item], IMAGERY, grid, ["green"])
    green, missing = image["reflectance"].to_numpy()[0], image["missing"].to_numpy()
    inside = ~missing
    assert inside.mean() > 0.9
    cols, lines = np.meshgrid(np.arange(grid.shape[1]) + 0.5, np.arange(grid.shape[0]) + 0.5)
    x, y = grid.affine.c + cols * grid.affine.a, grid.affine.f + lines * grid.affine.e
    _, back = rasterio.warp.transform("EPSG:32633", CRS, x[inside], y[inside])
    expected = np.interp(NORTH - np.array(back), np.arange(SIZE) * 10 + 5, rows[:, 0])
    # GDAL places pixels to an eighth of a pixel when it warps.
    np.testing.assert_allclose(green[inside], expected, atol=0.125 * (rows[1, 0] - rows[0, 0]) + 1e-4)


def test_a_replaced_file_is_read_anew(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10", green=0.2)
    assert read_image([item], IMAGERY, _grid(), ["green"])["reflectance"].max() < 0.21
    path = Path(item.assets["green"].href)
    beside = path.with_name("new.tif")
    write_tif(beside, np.full((SIZE, SIZE), 6000, np.uint16), 10)
    os.replace(beside, path)
    assert read_image([item], IMAGERY, _grid(), ["green"])["reflectance"].min() > 0.59


def test_threads_do_not_disturb_each_other(make_item: ItemMaker) -> None:
    item = _item(make_item)
    grids = [_grid(10 * i, 20 * i, 40) for i in range(8)] * 6
    alone = [read_image([item], IMAGERY, grid, BANDS)["reflectance"].to_numpy() for grid in grids[:8]]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda g: read_image([item], IMAGERY, g, BANDS)["reflectance"].to_numpy(), grids))
    for i, values in enumerate(together):
        np.testing.assert_array_equal(values, alone[i % 8])


@pytest.mark.parametrize("grid", [_grid(), _grid(203, 207)], ids=["copied", "warped"])
def test_a_file_cut_off_in_the_middle_is_named(make_item: ItemMaker, grid: GeoBox) -> None:
    item = make_item("a", "2020-08-10", green=_noisy())
    path = Path(item.assets["green"].href)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(SceneError, match=r"a/green\.tif"):
        read_image([item], IMAGERY, grid, ["green"])


def test_a_file_without_a_crs_is_refused(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    path = Path(item.assets["green"].href)
    with rasterio.open(
        path, "w", driver="GTiff", height=5, width=5, count=1, dtype="uint16", transform=Affine(1, 0, 7, 0, -1, 7)
    ) as out:
        out.write(np.ones((1, 5, 5), np.uint16))
    with pytest.raises(SceneError, match=r"green\.tif has no coordinate reference system"):
        read_image([item], IMAGERY, _grid(), ["green"])


def test_a_file_that_is_gone_is_named(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    Path(item.assets["swir16"].href).unlink()
    with pytest.raises(SceneError, match=r"a/swir16\.tif can not be opened"):
        read_image([item], IMAGERY, _grid())


def test_the_items_that_gave_pixels_are_named(make_item: ItemMaker) -> None:
    west = make_item("west", "2020-08-10", tile="T1", green=0.2)
    east = make_item("east", "2020-08-10", tile="T2", west=WEST + 500, green=0.8)
    assert read_image([east, west], IMAGERY, _grid(), ["green"]).attrs["scene_ids"] == "west"
    assert read_image([west, east], IMAGERY, _grid(200, 0, SIZE), ["green"]).attrs["scene_ids"] == "west+east"
    assert read_image([west], IMAGERY, _grid(9000), ["green"]).attrs["scene_ids"] == ""


def test_each_band_of_a_file_has_its_own_scale(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("a", "2020-08-10")
    path = tmp_path / "both.tif"
    profile = {"driver": "GTiff", "height": SIZE, "width": SIZE, "count": 2, "dtype": "int16", "crs": CRS}
    with rasterio.open(path, "w", transform=Affine(10, 0, WEST, 0, -10, NORTH), **profile) as target:
        target.write(np.stack([np.full((SIZE, SIZE), 100), np.full((SIZE, SIZE), 100)]).astype(np.int16))
    meta = [{"scale": 0.001, "offset": 0.0, "nodata": -9}, {"scale": 0.002, "offset": 0.1, "nodata": 100}]
    for name, index in (("green", 1), ("swir16", 2)):
        fields = {"raster:bands": meta, "band_index": index}
        item.assets[name] = pystac.Asset(str(path), extra_fields=fields)
    np.testing.assert_allclose(read_image([item], IMAGERY, _grid(), ["green"])["reflectance"], 0.1, atol=1e-6)
    assert read_image([item], IMAGERY, _grid(), ["swir16"])["missing"].all()
    meta[1]["nodata"] = 0
    np.testing.assert_allclose(read_image([item], IMAGERY, _grid(), ["swir16"])["reflectance"], 0.3, atol=1e-6)


def test_nodata_is_what_the_file_the_item_or_the_settings_call_so(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10", green=np.where(np.arange(SIZE)[:, None] < 50, 0.0, 0.3))

    def missing(stated: float | None, setting: float | None) -> float:
        entry = item.assets["green"].extra_fields["raster:bands"][0]
        entry.pop("nodata", None)
        if stated is not None:
            entry["nodata"] = stated
        imagery = ImagerySettings(catalog=StacFolder(path="x"), sensor=SensorSettings(nodata=setting))
        return float(read_image([item], imagery, _grid(0, 0, SIZE), ["green"])["missing"].mean())

    assert missing(None, None) == 0.5  # the file says 0
    assert missing(None, 77) == missing(77, None) == missing(77, 0) == 0.5  # whatever else is said too
    assert missing(None, 3000) == missing(3000, None) == missing(0, 3000) == 1.0  # 0.3 is missing too


@pytest.mark.parametrize(
    "grid",
    [_grid(), _grid(210, 230), _grid(203, 207), _grid(200, 200, 10, 60.0)],
    ids=["copied", "20 m", "warped", "mean"],
)
def test_a_stated_value_beside_the_tag_spoils_no_pixel_around_it(make_item: ItemMaker, grid: GeoBox) -> None:
    """A hole of a second value is missing, and not a number that interpolation spreads."""
    values = np.full((SIZE, SIZE), 0.3)
    values[40:50, 40:50] = 6.5535  # DN 65535
    item = make_item("a", "2020-08-10", green=values, swir16=values[::2, ::2])
    imagery = ImagerySettings(catalog=StacFolder(path="x"), sensor=SensorSettings(nodata=65535))
    image = read_image([item], imagery, grid, BANDS)
    seen = image["reflectance"].to_numpy()[:, ~image["missing"].to_numpy()]
    assert 0 < image["missing"].mean() < 0.2 and seen.size
    np.testing.assert_allclose(seen, 0.3, atol=1e-6)
