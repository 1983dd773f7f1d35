"""From digital number to reflectance: every way an item can state it, every rule, and the refusals."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pystac
import pytest

from dl4gam_assets.imagery import SceneError
from dl4gam_assets.imagery.scaling import band_metadata, implausible, processing_baseline, reflectance_scale
from dl4gam_assets.settings import SensorSettings

SENSOR = SensorSettings()


def _item(asset: dict[str, Any], **properties: Any) -> tuple[pystac.Item, pystac.Asset]:
    item = pystac.Item("scene", None, None, dt.datetime(2020, 8, 1, tzinfo=dt.UTC), properties)
    item.add_asset("red", pystac.Asset("https://example.org/B04.tif", extra_fields=asset))
    return item, item.assets["red"]


@pytest.mark.parametrize(
    "stated",
    [
        {"raster:bands": [{"scale": 2e-4, "offset": -0.3, "nodata": 7}]},  # raster extension 1
        {"raster:scale": 2e-4, "raster:offset": -0.3, "nodata": 7},  # raster extension 2, of all bands
        {"bands": [{"raster:scale": 2e-4, "raster:offset": -0.3, "nodata": 7}]},  # STAC 1.1
        {"raster:scale": 9.0, "nodata": 7, "bands": [{"raster:scale": 2e-4, "raster:offset": -0.3}]},  # the band wins
    ],
)
def test_scale_offset_and_nodata_from_each_way_of_metadata(stated: dict[str, Any]) -> None:
    item, asset = _item(stated)
    assert band_metadata(asset) == {"scale": 2e-4, "offset": -0.3, "nodata": 7}
    assert reflectance_scale(item, asset, SENSOR) == (2e-4, -0.3)


def test_items_keep_their_scale_through_json_of_both_versions() -> None:
    """pystac migrates what it reads: neither raster:bands of STAC 1.0 nor bands of 1.1 may get lost."""
    for version, asset in (
        ("1.0.0", {"raster:bands": [{"scale": 2e-4, "offset": -0.3}]}),
        ("1.1.0", {"bands": [{"name": "B04", "raster:scale": 2e-4, "raster:offset": -0.3}]}),
    ):
        item, _ = _item({})
        written = item.to_dict() | {"stac_version": version, "assets": {"red": {"href": "a.tif", **asset}}}
        read = pystac.Item.from_dict(written)
        assert reflectance_scale(read, read.assets["red"], SENSOR) == (2e-4, -0.3)


def test_each_band_of_a_file_has_its_own() -> None:
    item, asset = _item({"raster:bands": [{"scale": 1.0, "offset": 0}, {"scale": 3.0, "offset": 0}], "band_index": 2})
    assert reflectance_scale(item, asset, SENSOR) == (3.0, 0.0)


APPLIED = "earthsearch:boa_offset_applied"
MINUS = {"raster:bands": [{"scale": 1e-4, "offset": -0.1}]}


@pytest.mark.parametrize(
    ("properties", "offset"),
    [
        ({"s2:processing_baseline": "05.09", APPLIED: True}, 0.0),  # taken off: what is stated would be the second time
        ({"s2:processing_baseline": "04.00", APPLIED: False}, -0.1),  # not taken off (some of 2022)
        ({"s2:processing_baseline": "02.14", APPLIED: False}, 0.0),  # never had one, though the item states it
        ({"s2:processing_baseline": "03.01", APPLIED: False}, 0.0),
        ({"s2:processing_baseline": "05.11"}, -0.1),  # Collection 1 has no flag: what is stated holds
        ({"s2:processing_baseline": "03.01"}, -0.1),  # another catalog's own product: its word counts
    ],
)
def test_the_offset_that_earth_search_states_for_every_item(properties: dict[str, Any], offset: float) -> None:
    item, asset = _item(MINUS, **properties)
    assert reflectance_scale(item, asset, SENSOR) == (1e-4, offset)


def test_a_flag_without_a_baseline_decides_nothing() -> None:
    item, asset = _item(MINUS, **{APPLIED: False})
    with pytest.raises(SceneError, match="item scene does not state its processing baseline"):
        reflectance_scale(item, asset, SENSOR)


def test_the_rule_of_the_baseline_and_numbers_of_the_settings() -> None:
    rule = SensorSettings(scale=1e-4, offset="sentinel-2-baseline")
    for baseline, offset in (("02.12", 0.0), ("03.99", 0.0), ("04.00", -0.1), ("05.10", -0.1), ("10.00", -0.1)):
        item, asset = _item({}, **{"s2:processing_baseline": baseline})
        assert reflectance_scale(item, asset, rule) == pytest.approx((1e-4, offset)), baseline
    item, asset = _item(MINUS)
    assert reflectance_scale(item, asset, SensorSettings(scale=0.5, offset=0.25)) == (0.5, 0.25)
    item.properties["processing:version"] = "05.00"
    assert processing_baseline(item) == (5, 0)


@pytest.mark.parametrize("stated", [{}, {"raster:bands": [{"offset": -0.1}]}, {"raster:bands": [{"scale": 1e-4}]}])
def test_what_nothing_says_is_refused_by_name(stated: dict[str, Any]) -> None:
    item, asset = _item(stated, **{"s2:processing_baseline": "05.00"})
    with pytest.raises(SceneError, match=r"item scene: its metadata do not say the (scale|offset) of asset"):
        reflectance_scale(item, asset, SENSOR)


def test_ice_shows_an_offset_that_was_taken_off_twice() -> None:
    """Even where all is bright: ice and snow are dark at 1.6 micrometres."""
    rng = np.random.default_rng(0)
    snow = np.stack([rng.normal(0.85, 0.05, (40, 40)), np.abs(rng.normal(0.03, 0.02, (40, 40)))])
    assert implausible(snow, ["green", "swir16"]) is None
    words = implausible(snow - 0.1, ["green", "swir16"])
    assert words is not None and "swir16" in words


@pytest.mark.parametrize("factor", [1e4, 1e8])
def test_a_scale_that_was_not_applied_shows(factor: float) -> None:
    ground = np.random.default_rng(0).uniform(0.02, 1.4, (2, 40, 40))  # fresh snow and glint in it
    assert implausible(ground, ["blue", "red"]) is None
    words = implausible(ground * factor, ["blue", "red"])
    assert words is not None and "half of its blue pixels are above" in words and "scale" in words
