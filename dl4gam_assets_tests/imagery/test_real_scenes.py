"""The choice of an image on real scenes: Rhonegletscher (Sentinel-2, no SWIR, no cloud mask) and Khumbu (Landsat 7)."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio

from dl4gam_assets.imagery import (
    candidates_of_glacier,
    open_catalog,
    rank_candidates,
    read_image,
    select_scenes,
)
from dl4gam_assets.inventory import glacier_grid, glacier_zones
from dl4gam_assets.settings import Region, load_region
from dl4gam_assets.tables import TABLES


@pytest.fixture(scope="module")
def rhone(real_data: Path) -> gpd.GeoDataFrame:
    outlines = gpd.read_file(real_data / "rhone_s2_series" / "outlines.gpkg", layer="sgi2010").to_crs(4326)
    shape = outlines[outlines["SGI"] == "B43-03"].union_all()  # several rows
    point = shape.representative_point()
    return TABLES["glaciers"].conform(
        gpd.GeoDataFrame(
            {"glacier_id": ["rhone"], "glacier_int": [1], "inventory_area_km2": [14.6], "lon": [point.x],
             "lat": [point.y], "utm_epsg": [32632], "modelled": [True]},
            geometry=[shape], crs=4326,
        )
    )  # fmt: skip


def _region(monkeypatch: pytest.MonkeyPatch, data: Path, **selection: Any) -> Region:
    monkeypatch.setenv("DL4GAM_REAL_DATA", str(data))
    return load_region("swiss", {f"imagery.selection.{key}": value for key, value in selection.items()})


def _scenes(glaciers: gpd.GeoDataFrame, region: Region, data: Path, year: int) -> pd.DataFrame:
    catalog = open_catalog(region.imagery.catalog, data, region.imagery.sensor)
    zones = glacier_zones(glaciers, [50])
    found = candidates_of_glacier(glaciers.iloc[0], glaciers, zones, catalog, region, year)
    scenes = select_scenes(rank_candidates(found, region.imagery.selection), year)
    TABLES["scenes"].conform(scenes, {"year": year})
    return scenes.set_index(scenes["date"].dt.strftime("%Y-%m-%d"))


#: What a person sees on the 15 dates.
UNUSABLE = {"2017-05-17", "2016-07-01", "2018-06-09", "2018-08-05", "2018-09-17"}  # full snow, cloud, cloud shadow
LATE_SUMMER = {
    2015: {"2015-09-08"},
    2016: {"2016-08-03", "2016-08-13", "2016-09-02", "2016-09-09"},
    2017: {"2017-08-15", "2017-08-23"},
    2018: {"2018-09-09"},
}


@pytest.mark.parametrize("window", [["08-01", "10-15"], ["01-01", "12-31"]], ids=["window", "all dates"])
@pytest.mark.parametrize("ranking", ["rank_positions", "min_max"])
def test_an_acceptable_late_summer_date_is_chosen_each_year(
    real_data: Path, rhone: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch, ranking: str, window: list[str]
) -> None:
    monkeypatch.setenv("DL4GAM_REAL_DATA", str(real_data))
    region = load_region(
        "swiss",
        {
            "years.baseline": 2018, "imagery.baseline": {"mode": "inventory_date"},  # every year has its window
            "imagery.window": window, "imagery.selection.ranking": ranking,
        },
    )  # fmt: skip
    seen, chosen = 0, {}
    for year in LATE_SUMMER:
        scenes = _scenes(rhone, region, real_data, year)
        seen += len(scenes)
        chosen[year] = scenes.index[scenes["selected"].astype(bool)].tolist()
        assert not scenes["reason"].str.contains("override").any()
        assert (scenes["snow_score"] == "brightness").all() and scenes["ndsi"].isna().all()
    assert seen == (15 if window[0] == "01-01" else 11)
    for year, days in chosen.items():
        assert len(days) == 1 and days[0] in LATE_SUMMER[year] and days[0] not in UNUSABLE
    assert chosen == {2015: ["2015-09-08"], 2016: ["2016-09-02"], 2017: ["2017-08-23"], 2018: ["2018-09-09"]}


def test_brightness_orders_dates_as_hand_drawn_snow_does(
    real_data: Path, rhone: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without SWIR brightness stands for snow: 14 of the 15 dates have snow cover that a person drew."""
    monkeypatch.setenv("DL4GAM_REAL_DATA", str(real_data))
    region = load_region(
        "swiss",
        {"years.baseline": 2018, "imagery.baseline": {"mode": "inventory_date"}, "imagery.window": ["01-01", "12-31"]},
    )
    scenes = pd.concat([_scenes(rhone, region, real_data, year) for year in LATE_SUMMER])
    drawn = gpd.read_file(real_data / "rhone_s2_series" / "manual_snow_polygons.gpkg").to_crs(32632)
    outline = rhone.to_crs(32632).geometry.iloc[0]
    days = pd.to_datetime(drawn["date"].astype(str)).dt.strftime("%Y-%m-%d").to_numpy()
    snow = pd.Series(drawn.make_valid().intersection(outline).area.to_numpy() / outline.area, index=days)
    both = scenes.assign(snow=snow.reindex(scenes.index)).dropna(subset="snow")
    assert len(both) == 14
    assert both["albedo"].corr(both["snow"], method="spearman") == pytest.approx(0.83, abs=0.03)
    # The chosen date has the least snow, or hardly more, of those that a person would use.
    usable = both.drop(index=list(UNUSABLE & set(both.index)))
    for _, mine in usable.groupby(usable["date"].dt.year):
        chosen = mine[mine["selected"].astype(bool)]
        assert len(chosen) == 1 and chosen["snow"].iloc[0] < mine["snow"].min() + 0.06


@pytest.mark.parametrize("ranking", ["rank_positions", "min_max"])
def test_cloud_shadow_is_not_taken_for_bare_ice(
    real_data: Path, rhone: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch, ranking: str
) -> None:
    plain = _scenes(rhone, _region(monkeypatch, real_data, ranking=ranking, shadow_nir_max=None), real_data, 2018)
    assert list(plain.index) == ["2018-08-05", "2018-09-09", "2018-09-17"]  # 9 June is out of the window
    assert plain["cloud_share"].nunique() == 1  # only missing pixels count: nothing tells shadow
    assert plain.loc["2018-09-17", "selected"]  # the darkest, because of its shadow
    assert plain["shadow_share"].isna().all()
    aware = _scenes(rhone, _region(monkeypatch, real_data, ranking=ranking), real_data, 2018)
    shadow = aware["shadow_share"]
    assert shadow["2018-08-05"] > 0.05 and shadow["2018-09-17"] > 0.03 and shadow["2018-09-09"] < 0.015
    np.testing.assert_allclose(aware["cloud_share"] - plain["cloud_share"], shadow, atol=1e-12)
    assert aware.loc["2018-09-09", "selected"] and aware["selected"].sum() == 1
    assert aware.loc["2018-09-09", "reason"].startswith("selected: rank 1 of 3 (cloud 0.13, brightness 0.4")


def test_snow_covered_dates_are_not_chosen(
    real_data: Path, rhone: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = _region(monkeypatch, real_data)
    in_season = _scenes(rhone, region, real_data, 2017)
    assert "2017-05-17" not in in_season.index
    assert in_season["rank"].to_dict() == {"2017-08-23": 1, "2017-08-15": 2, "2017-10-14": 3}  # October has new snow
    # Even where the window lets the full snow of May in, it loses against any date of summer.
    wide = load_region("swiss", {"imagery.window": ["05-01", "10-15"]})
    everything = _scenes(rhone, wide, real_data, 2017)
    assert everything.loc["2017-05-17", "rank"] == 4 and everything.loc["2017-10-14", "rank"] == 5


def test_a_pixel_more_of_dark_ice_does_not_outweigh_snow(
    real_data: Path, rhone: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why cloud shares that are close count as equal without NDSI: 0.0849 and 0.0851 round to different positions."""
    strict = _scenes(rhone, _region(monkeypatch, real_data, fallback_cloud_tolerance=0.0), real_data, 2017)
    clouds = strict["cloud_share"]
    assert 0 < clouds["2017-08-23"] - clouds["2017-08-15"] < 0.002
    assert strict["albedo"]["2017-08-15"] - strict["albedo"]["2017-08-23"] > 0.1


def test_values_of_a_crs_without_a_code_land_where_they_are(real_data: Path, rhone: gpd.GeoDataFrame) -> None:
    region = load_region("swiss")
    catalog = open_catalog(region.imagery.catalog, real_data, region.imagery.sensor)
    grid = glacier_grid(rhone.geometry.iloc[0], 32632, 10, 300)
    item = next(i for i in catalog.search((8, 46, 9, 47), dt.date(2018, 9, 9), dt.date(2018, 9, 9)) if "rhone" in i.id)
    image = read_image([item], region.imagery, grid)
    assert list(image["band"].to_numpy()) == ["blue", "nir_narrow", "nir"]
    with rasterio.open(item.assets["B02"].href) as source:
        assert source.crs.to_epsg() is None
        blue = source.read(1)
    ours = image["reflectance"].sel(band="blue").to_numpy()
    assert np.nanmean(ours) == pytest.approx(blue[blue > 0].mean() / 1e4, rel=0.01)
    assert np.isfinite(ours).sum() == pytest.approx((blue > 0).sum(), rel=0.02)
    inside = rasterio.features.geometry_mask(
        rhone.to_crs(32632).geometry, grid.shape, grid.affine, invert=True
    )  # fmt: skip
    assert (~image["missing"].to_numpy())[inside].mean() > 0.94  # crop and outline agree, so it lies at its place


def test_a_landsat_scene_in_two_files_is_one_item(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DL4GAM_REAL_DATA", str(real_data))
    region = load_region("khumbu")
    catalog = open_catalog(region.imagery.catalog, real_data, region.imagery.sensor)
    found = catalog.search((86, 27, 88, 29), dt.date(2000, 10, 30), dt.date(2000, 10, 30))
    assert len(found) == 1 and set(found[0].assets) == {"red", "green", "blue", "nir"}
    assert {name: a.extra_fields["band_index"] for name, a in found[0].assets.items()} == {
        "red": 1, "green": 2, "blue": 3, "nir": 1,
    }  # fmt: skip
    with rasterio.open(found[0].assets["nir"].href) as source:
        window = source.read(1)[100:200, 300:420]
        corner = source.xy(100, 300, offset="ul")
    from odc.geo.geobox import GeoBox

    grid = GeoBox((100, 120), rasterio.Affine(30, 0, corner[0], 0, -30, corner[1]), "EPSG:32645")
    image = read_image(found, region.imagery, grid)
    np.testing.assert_array_equal(
        np.round(image["reflectance"].sel(band="nir").to_numpy() * 255).astype(np.uint8), window
    )
