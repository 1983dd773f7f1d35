"""Masks on small real files, and the snow and shadow rules on real labelled pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pystac
import pytest
import torch
from affine import Affine
from odc.geo.geobox import GeoBox

from dl4gam_assets.imagery import masks, read_image
from dl4gam_assets.imagery.reading import ReadPolicy
from dl4gam_assets.imagery.scores import score_image, shadow
from dl4gam_assets.segmentation._compat import import_smp
from dl4gam_assets.settings import (
    ImagerySettings,
    OmniCloudMaskSettings,
    SelectionSettings,
    SensorSettings,
    SettingsError,
    load_region,
)
from dl4gam_assets_tests.imagery.conftest import CRS, NORTH, SIZE, WEST, ItemMaker, write_tif

SNOW = {"blue": 0.8, "green": 0.8, "red": 0.8, "nir": 0.7, "swir16": 0.04}
ICE = {"blue": 0.35, "green": 0.34, "red": 0.3, "nir": 0.24, "swir16": 0.015}
WATER_CLOUD = {"blue": 0.6, "green": 0.6, "red": 0.6, "nir": 0.6, "swir16": 0.4}


def _grid() -> GeoBox:
    return GeoBox((SIZE, SIZE), Affine(10, 0, WEST, 0, -10, NORTH), CRS)


def _settings(**sensor: Any) -> ImagerySettings:
    return ImagerySettings.model_validate(
        {"catalog": {"kind": "stac-folder", "path": "x"}, "sensor": {"scene_classification": None, **sensor}}
    )


def _layer(
    item: pystac.Item, name: str, values: np.ndarray, folder: Path, pixel: int = 20, nodata: float | None = None
) -> None:
    path = folder / f"{name}.tif"
    write_tif(path, values, pixel, nodata=nodata)
    item.add_asset(name, pystac.Asset(str(path)))


def _strips_of(*values: int, dtype: Any = np.uint8) -> np.ndarray:
    """Vertical strips of equal width at 20 m, 2 or 5."""
    return np.repeat(np.asarray(values, dtype=dtype), SIZE // 2 // len(values))[None].repeat(SIZE // 2, axis=0)


def _strips(mask: np.ndarray, n: int) -> list[float]:
    return [float(part.mean()) for part in np.split(mask, n, axis=1)]


# --------------------------------------------------------------------------------------------- scene classification
@pytest.mark.parametrize("threads", [1, 4])
def test_snow_and_ice_overrule_cloud_classes_but_no_shadow(make_item: ItemMaker, tmp_path: Path, threads: int) -> None:
    classes = _strips_of(3, 8, 9, 10, 11)
    policy = ReadPolicy(concurrent=threads)
    for name, surface, expected in (
        ("snow", SNOW, [1, 0, 0, 0, 0]),
        ("ice", ICE, [1, 0, 0, 0, 0]),
        ("cloud", WATER_CLOUD, [1, 1, 1, 1, 0]),
    ):
        item = make_item(name, "2020-08-20", **surface)
        _layer(item, "scl", classes, tmp_path / name)
        image = read_image([item], _settings(scene_classification="scl"), _grid(), policy=policy)
        assert _strips(image["cloud"].to_numpy(), 5) == expected
        taken_back = [float(8 <= c <= 10 and name != "cloud") for c in (3, 8, 9, 10, 11)]
        assert _strips(image["overruled"].to_numpy(), 5) == taken_back
        as_published = read_image([item], _settings(scene_classification="scl", snow_overrules=[]), _grid())
        assert _strips(as_published["cloud"].to_numpy(), 5) == [1, 1, 1, 1, 0]
        assert not as_published["overruled"].any()


def test_the_rule_reads_the_bands_it_needs_whatever_was_asked_for(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("snow", "2020-08-20", **SNOW)
    _layer(item, "scl", _strips_of(8, 8), tmp_path / "snow")
    image = read_image([item], _settings(scene_classification="scl"), _grid(), bands=["nir"])
    assert list(image["band"].to_numpy()) == ["nir"] and image["overruled"].all() and not image["cloud"].any()


def test_without_swir_nothing_is_overruled(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("snow", "2020-08-20", **SNOW)
    _layer(item, "scl", _strips_of(8, 4), tmp_path / "snow")
    bands = {"blue": "blue", "green": "green", "red": "red"}
    image = read_image([item], _settings(scene_classification="scl", bands=bands), _grid())
    assert _strips(image["cloud"].to_numpy(), 2) == [1, 0] and not image["overruled"].any()


def test_which_classes_count_is_a_setting(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("ground", "2020-08-20")
    _layer(item, "scl", _strips_of(2, 3, 7, 8, 10), tmp_path / "ground")
    image = read_image([item], _settings(scene_classification="scl", cloud_classes=[2, 8]), _grid())
    assert _strips(image["cloud"].to_numpy(), 5) == [1, 0, 0, 1, 0]
    with pytest.raises(SettingsError, match="cloud_classes"):
        load_region("demo", {"imagery.sensor.cloud_classes": [12]})


def test_a_cloud_probability_is_overruled_only_on_demand(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("snow", "2020-08-20", **SNOW)
    _layer(item, "cld", _strips_of(10, 90), tmp_path / "snow")
    plain = read_image([item], _settings(cloud_probability="cld"), _grid())
    # bilinear from 20 m: the border moves by less than a pixel of 20 m
    np.testing.assert_allclose(_strips(plain["cloud"].to_numpy(), 2), [0, 1], atol=0.03)
    asked = read_image([item], _settings(cloud_probability="cld", snow_overrules=["cloud_probability"]), _grid())
    assert not asked["cloud"].any() and (asked["overruled"] == plain["cloud"]).all()


def test_one_mask_that_is_not_overruled_keeps_a_pixel_cloudy(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("snow", "2020-08-20", **SNOW)
    _layer(item, "scl", _strips_of(9, 9), tmp_path / "snow")
    _layer(item, "cld", _strips_of(0, 90), tmp_path / "snow")
    image = read_image([item], _settings(scene_classification="scl", cloud_probability="cld"), _grid())
    cloud, overruled = image["cloud"].to_numpy(), image["overruled"].to_numpy()
    assert not (cloud & overruled).any() and (cloud | overruled).all()
    np.testing.assert_allclose(_strips(cloud, 2), [0, 1], atol=0.03)


# --------------------------------------------------------------------------------------------- values that are missing
GRIDS = {
    "copied": (20.0, 0.0, 50, CRS),
    "same CRS": (10.0, 0.0, 100, CRS),
    "half pixels": (10.0, 13.0, 90, CRS),
    "coarser": (60.0, 20.0, 14, CRS),
    "another CRS": (10.0, 100.0, 70, "EPSG:25832"),
}


@pytest.mark.parametrize("tag", [None, 0])
@pytest.mark.parametrize("kind", GRIDS)
def test_a_probability_of_0_is_no_cloud_whatever_the_tag(
    make_item: ItemMaker, tmp_path: Path, kind: str, tag: float | None
) -> None:
    """A few cloudy pixels among zeros stay as few: without zeros around them they would fill their ground alone."""
    pixel, shift, n, crs = GRIDS[kind]
    grid = GeoBox((n, n), Affine(pixel, 0, WEST + shift, 0, -pixel, NORTH - shift), crs)
    percent = np.zeros((SIZE // 2, SIZE // 2), np.uint8)
    percent[::7, ::7] = 39  # below the threshold, with zeros around
    percent[20:23, 20:23] = 100
    item = make_item("a", "2020-08-20")
    _layer(item, "cld", percent, tmp_path / "a", nodata=tag)
    image = read_image([item], _settings(cloud_probability="cld"), grid, ["green"])
    assert not image["missing"].any()
    area = float(image["cloud"].sum()) * pixel**2
    assert 0.5 * 60**2 <= area <= 1.5 * 60**2


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("mask", ["scl", "qa", "cld"])
def test_pixels_beyond_a_mask_are_missing_and_a_second_item_fills_them(
    make_item: ItemMaker, tmp_path: Path, mask: str, threads: int
) -> None:
    settings = {"scl": "scene_classification", "qa": "qa_pixel", "cld": "cloud_probability"}
    clean = {"scl": 5, "qa": 64, "cld": 3}[mask]
    half = np.full((SIZE // 2, SIZE // 4), clean, np.uint16)
    policy = ReadPolicy(concurrent=threads)
    first, second = make_item("a", "2020-08-20", green=0.2), make_item("b", "2020-08-20", tile="T2", green=0.4)
    _layer(first, mask, half, tmp_path / "a")
    _layer(second, mask, np.hstack([half, half]), tmp_path / "b")
    imagery = _settings(**{settings[mask]: mask})
    image = read_image([first], imagery, _grid(), policy=policy)
    assert _strips(image["missing"].to_numpy(), 2) == [0, 1] and not image["cloud"].any()
    assert np.isnan(image["reflectance"].to_numpy()[:, :, SIZE // 2 :]).all()
    everywhere = np.ones((SIZE, SIZE), bool)
    scores = score_image(image, region=everywhere, near=everywhere, glaciers=~everywhere, settings=SelectionSettings())
    assert scores["coverage"] == scores["cloud_share"] == 0.5 and scores["albedo_pixels"] == SIZE**2 // 2
    both = read_image([first, second], imagery, _grid(), policy=policy)
    assert not both["missing"].any() and both.attrs["scene_ids"] == "a+b"
    assert both["reflectance"].sel(band="green").mean().item() == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize("tag", [None, 0])
def test_a_classification_of_0_is_missing(make_item: ItemMaker, tmp_path: Path, tag: float | None) -> None:
    item = make_item("a", "2020-08-20")
    _layer(item, "scl", _strips_of(0, 4, 0, 9, 255), tmp_path / "a", nodata=tag)
    image = read_image([item], _settings(scene_classification="scl"), _grid())
    assert _strips(image["missing"].to_numpy(), 5) == [1, 0, 1, 0, 1]
    assert _strips(image["cloud"].to_numpy(), 5) == [0, 0, 0, 1, 0]


def test_an_item_whose_masks_say_nothing_gives_no_pixel(make_item: ItemMaker, tmp_path: Path) -> None:
    item = make_item("a", "2020-08-20")
    _layer(item, "scl", _strips_of(0, 0), tmp_path / "a")
    image = read_image([item], _settings(scene_classification="scl"), _grid())
    assert image["missing"].all() and image.attrs["scene_ids"] == ""


# --------------------------------------------------------------------------------------------- Landsat
def test_bits_of_qa_pixel(make_item: ItemMaker, tmp_path: Path) -> None:
    #          clear           snow and clear   cloud, high confidence   shadow          fill  cirrus, top bits set
    values = [0b01010101_01000000, 1 << 5 | 1 << 6, 1 << 3 | 3 << 8, 1 << 4 | 3 << 10, 1, 1 << 2 | 3 << 14]
    strips = np.repeat(np.asarray(values[:5], dtype=np.uint16), SIZE // 5)[None].repeat(SIZE, axis=0)
    item = make_item("l8", "2020-08-20", **WATER_CLOUD)
    _layer(item, "qa", strips, tmp_path / "l8", pixel=10)
    image = read_image([item], _settings(qa_pixel="qa"), _grid())
    assert _strips(image["cloud"].to_numpy(), 5) == [0, 0, 1, 1, 1]
    only_shadow = read_image([item], _settings(qa_pixel="qa", qa_bits=[4]), _grid())
    assert _strips(only_shadow["cloud"].to_numpy(), 5) == [0, 0, 0, 1, 0]
    on_snow = make_item("snow", "2020-08-21", **SNOW)
    _layer(on_snow, "qa", strips, tmp_path / "snow", pixel=10)
    image = read_image([on_snow], _settings(qa_pixel="qa"), _grid())
    assert _strips(image["cloud"].to_numpy(), 5) == [0, 0, 0, 1, 1]  # cloud gives way, shadow and fill do not
    assert _strips(image["overruled"].to_numpy(), 5) == [0, 0, 1, 0, 0]
    assert masks.of_bits(np.asarray(values, np.float32), [2]).tolist() == [False] * 5 + [
        True
    ]  # float32 keeps all 16 bits
    assert masks.of_bits(np.array([np.nan], np.float32), [0, 1, 2, 3, 4]).tolist() == [False]


def test_the_landsat_preset_reads_its_quality_bits() -> None:
    region = load_region("demo", {"imagery": {"preset": "planetary-computer-landsat-c2-l2"}})
    sensor = region.imagery.sensor
    assert masks.mask_assets(sensor) == ["qa_pixel"] and sensor.qa_bits == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------- saturation
def test_saturated_pixels_are_counted_and_not_masked(make_item: ItemMaker) -> None:
    bright = np.where(np.arange(SIZE)[None] < 30, 6.5535, 0.3).repeat(SIZE, axis=0)
    item = make_item("bright", "2020-08-20", red=bright)
    image = read_image([item], _settings(saturated_at=65535), _grid())
    assert float(image["saturated"].mean()) == pytest.approx(0.3) and not image["cloud"].any()
    everywhere = np.ones((SIZE, SIZE), bool)
    scores = score_image(image, region=everywhere, near=everywhere, glaciers=~everywhere, settings=SelectionSettings())
    assert scores["saturated_share"] == pytest.approx(0.3) and scores["cloud_share"] == 0.0
    plain = read_image([item], _settings(), _grid())
    assert "saturated" not in plain
    kept = score_image(plain, region=everywhere, near=everywhere, glaciers=~everywhere, settings=SelectionSettings())
    assert kept["saturated_share"] is None and kept["snow_overruled_share"] == 0.0


# --------------------------------------------------------------------------------------------- OmniCloudMask
def test_omnicloudmask_names_its_extra_where_it_is_missing(
    make_item: ItemMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "omnicloudmask", None)
    with pytest.raises(masks.MaskError, match=r"dl4gam_assets\[omnicloudmask\]"):
        read_image([make_item("a", "2020-08-20")], _settings(omnicloudmask={}), _grid())


def test_omnicloudmask_needs_its_bands() -> None:
    with pytest.raises(ValueError, match="omnicloudmask needs the bands"):
        SensorSettings(bands={"blue": "b", "nir": "n"}, omnicloudmask=OmniCloudMaskSettings())


class _BrightIsCloud(torch.nn.Module):
    """In place of the library's networks, whose weights it downloads: class 1 in the brighter half of a patch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = x[:, 0]
        return torch.stack([-bright, bright, *[torch.full_like(bright, -99.0)] * 2], dim=1)


def test_omnicloudmask_gets_what_it_expects() -> None:
    import_smp()  # so that a torch without fitting torchvision serves too
    pytest.importorskip("omnicloudmask", reason="the extra omnicloudmask is not installed")
    red = np.full((96, 80), 0.1, np.float32)
    red[:, 50:] = 0.8
    red[:10] = np.nan
    settings = OmniCloudMaskSettings(device="cpu")
    found = masks.omnicloudmask(red, red.copy(), red.copy(), settings, [_BrightIsCloud()])
    expected = np.nan_to_num(red) > 0.5
    assert found.dtype == bool and found.shape == red.shape and (found == expected).all()
    none = OmniCloudMaskSettings(device="cpu", classes=[3])
    assert not masks.omnicloudmask(red, red.copy(), red.copy(), none, [_BrightIsCloud()]).any()


# --------------------------------------------------------------------------------------------- real labelled pixels
@pytest.fixture(scope="module")
def labelled(real_data: Path) -> dict[str, pd.DataFrame]:
    frame = pd.read_csv(real_data / "s2_labelled_spectra" / "Sentinel-2_SR_training_data.csv.gz")
    names = {1: "snow", 2: "shadowed snow", 3: "ice", 4: "rock", 5: "water"}
    return {name: frame[frame["class"] == number] for number, name in names.items()}


def _looks_like_snow(pixels: pd.DataFrame) -> float:
    sensor = SensorSettings()
    found = masks.looks_like_snow(
        pixels["B3"].to_numpy(), pixels["B11"].to_numpy(), sensor.snow_ndsi_min, sensor.snow_swir_max
    )
    return float(found.mean())


def test_the_snow_rule_on_labelled_pixels(labelled: dict[str, pd.DataFrame]) -> None:
    assert {name: len(pixels) for name, pixels in labelled.items()} == {
        "snow": 5750, "shadowed snow": 461, "ice": 1432, "rock": 3937, "water": 149,
    }  # fmt: skip
    share = {name: _looks_like_snow(pixels) for name, pixels in labelled.items()}
    # docs/image-selection.md has the figures
    assert share["snow"] > 0.92 and share["ice"] > 0.94 and share["shadowed snow"] > 0.86
    assert share["rock"] < 0.002  # a cloud over rock is never taken for snow because of the rock
    assert 0.6 < share["water"] < 0.8  # looks alike, but is no cloud


def test_the_snow_rule_on_separate_check_points(real_data: Path) -> None:
    points = pd.read_csv(real_data / "s2_labelled_spectra" / "Sentinel-2_SR_manually_classified_points.csv.gz")
    snow = points[points["class"] == 1]  # the others are ice, rock and water together
    assert len(snow) == 1518 and _looks_like_snow(snow) > 0.98


def test_ndsi_tells_snow_from_ground_on_labelled_pixels(labelled: dict[str, pd.DataFrame]) -> None:
    middle = {name: float(((p["B3"] - p["B11"]) / (p["B3"] + p["B11"])).median()) for name, p in labelled.items()}
    assert middle["snow"] > 0.94 and middle["ice"] > 0.9 and middle["rock"] < -0.2


def test_the_shadow_rule_on_labelled_pixels(labelled: dict[str, pd.DataFrame]) -> None:
    settings = SelectionSettings(shadow_nir_max=0.12)
    share = {n: float(shadow(p["B2"].to_numpy(), p["B8"].to_numpy(), settings).mean()) for n, p in labelled.items()}
    assert max(share["snow"], share["ice"], share["rock"]) < 0.003
    assert 0.1 < share["shadowed snow"] < 0.2  # surface reflectance: only the darkest of it; L1C shadow is bluer
    assert share["water"] > 0.95  # lakes look like shadow, on every date
