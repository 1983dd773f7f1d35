"""Reading a day's items onto a grid: values, scales, mosaics, masks, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from odc.geo.geobox import GeoBox

from dl4gam_assets.imagery import SceneError, read_image
from dl4gam_assets.imagery.catalogs import CatalogError
from dl4gam_assets.settings import ImagerySettings, SensorSettings, StacFolder
from dl4gam_assets_tests.imagery.conftest import CRS, IMAGERY, NORTH, SIZE, WEST, ItemMaker


def grid(west: float = WEST + 200, north: float = NORTH - 200, n: int = 60, pixel: float = 10.0) -> GeoBox:
    from odc.geo.geom import BoundingBox

    return GeoBox.from_bbox(
        BoundingBox(west, north - n * pixel, west + n * pixel, north, crs=CRS), resolution=pixel, tight=True
    )


def test_values_are_reflectance_at_their_place(make_item: ItemMaker) -> None:
    ramp = np.linspace(0.01, 0.9, SIZE)[None, :].repeat(SIZE, 0)
    image = read_image([make_item("a", "2020-08-10", green=ramp, swir16=0.05)], IMAGERY, grid())
    green = image["reflectance"].sel(band="green").to_numpy()
    assert green.shape == (60, 60)
    np.testing.assert_allclose(green[0], ramp[0, 20:80], atol=1e-4)
    np.testing.assert_allclose(image["reflectance"].sel(band="swir16"), 0.05, atol=1e-4)
    assert not image["missing"].any() and not image["cloud"].any()


def test_the_offset_of_new_processing_is_applied(make_item: ItemMaker) -> None:
    old = read_image([make_item("a", "2020-08-10", green=0.3)], IMAGERY, grid(), ["green"])
    new = read_image([make_item("b", "2023-08-10", green=0.3, offset=-0.1)], IMAGERY, grid(), ["green"])
    np.testing.assert_allclose(old["reflectance"], new["reflectance"], atol=1e-4)


def test_a_catalog_that_applied_the_offset_says_so(make_item: ItemMaker) -> None:
    item = make_item("a", "2023-08-10", green=0.3)  # digits without an offset ...
    item.assets["green"].extra_fields["raster:bands"][0]["offset"] = -0.1  # ... whose metadata still state one
    item.properties["earthsearch:boa_offset_applied"] = True
    image = read_image([item], IMAGERY, grid(), ["green"])
    np.testing.assert_allclose(image["reflectance"], 0.3, atol=1e-4)


@pytest.mark.parametrize("missing", ["scale", "offset"])
def test_an_unknown_scale_is_refused_not_guessed(make_item: ItemMaker, missing: str) -> None:
    item = make_item("a", "2020-08-10", **{missing: None})
    with pytest.raises(SceneError, match=rf"item a.*{missing}"):
        read_image([item], IMAGERY, grid())
    sensor = SensorSettings(**{missing: 1e-4 if missing == "scale" else 0.0})
    known = ImagerySettings(catalog=StacFolder(path="x"), sensor=sensor)
    assert np.isfinite(read_image([item], known, grid())["reflectance"]).all()


def test_stac_1_1_bands_are_read_too(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10", green=0.4)
    for asset in item.assets.values():
        entry = asset.extra_fields.pop("raster:bands", None)
        if entry:
            asset.extra_fields["bands"] = [{"nodata": 0, "raster:scale": 1e-4, "raster:offset": 0.0}]
    np.testing.assert_allclose(read_image([item], IMAGERY, grid(), ["green"])["reflectance"], 0.4, atol=1e-4)


def test_tiles_are_mosaicked_only_where_one_does_not_cover(make_item: ItemMaker) -> None:
    east = make_item("east", "2020-08-10", tile="T2", west=WEST + 500, green=0.8)
    west = make_item("west", "2020-08-10", tile="T1", green=0.2)
    whole = read_image([east, west], IMAGERY, grid(), ["green"])  # the western tile holds the grid alone
    np.testing.assert_allclose(whole["reflectance"], 0.2, atol=1e-4)
    both = read_image([east, west], IMAGERY, grid(west=WEST + 700), ["green"])["reflectance"].to_numpy()[0]
    np.testing.assert_allclose(both[:, 31:], 0.8, atol=1e-4)
    assert np.isfinite(both).all()


def test_missing_pixels_and_clouds_are_marked_apart(make_item: ItemMaker) -> None:
    empty = np.zeros((SIZE, SIZE), bool)
    empty[20:30] = True
    cloud = np.zeros((SIZE, SIZE), bool)
    cloud[50:60] = True
    image = read_image([make_item("a", "2020-08-10", empty=empty, cloud=cloud)], IMAGERY, grid())
    assert image["missing"].to_numpy()[:8].all() and not image["missing"].to_numpy()[14:].any()
    assert image["cloud"].to_numpy()[31:39].all() and not image["cloud"].to_numpy()[:25].any()


def test_a_grid_beyond_the_scene_is_missing(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    assert read_image([item], IMAGERY, grid(west=WEST + 5000))["missing"].all()
    half = read_image([item], IMAGERY, grid(west=WEST + 700))["missing"].to_numpy()
    assert half[:, 31:].all() and not half[:, :29].any()


def test_other_grids_are_resampled(make_item: ItemMaker) -> None:
    ramp = np.linspace(0.1, 0.9, SIZE)[:, None].repeat(SIZE, 1)
    item = make_item("a", "2020-08-10", green=ramp)
    shifted = read_image([item], IMAGERY, grid(west=WEST + 203.0, north=NORTH - 203.0), ["green"])
    exact = read_image([item], IMAGERY, grid(), ["green"])
    step = float(ramp[1, 0] - ramp[0, 0])
    difference = shifted["reflectance"].to_numpy()[0] - exact["reflectance"].to_numpy()[0]
    np.testing.assert_allclose(difference, 0.3 * step, atol=2e-4)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_that_is_no_image_is_named(make_item: ItemMaker, content: bytes) -> None:
    item = make_item("a", "2020-08-10")
    Path(item.assets["green"].href).write_bytes(content)
    with pytest.raises(SceneError, match=r"a/green\.tif"):
        read_image([item], IMAGERY, grid())


def test_a_truncated_file_is_named(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10", green=np.random.default_rng(0).uniform(0.1, 0.9, (SIZE, SIZE)))
    path = Path(item.assets["green"].href)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(SceneError, match=r"a/green\.tif"):
        read_image([item], IMAGERY, grid())


def test_a_missing_asset_is_named_with_those_there_are(make_item: ItemMaker) -> None:
    item = make_item("a", "2020-08-10")
    del item.assets["swir16"]
    with pytest.raises(CatalogError, match=r"item a has no asset 'swir16'.*green"):
        read_image([item], IMAGERY, grid())
