"""Debris merged from several sources, and the grid of a glacier."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from dl4gam_assets.inventory import glacier_grid, read_debris, read_inventory, utm_epsg_of
from dl4gam_assets.settings import DebrisSource, InventoryColumns, InventorySettings, SettingsError

UTM = 32632
X0, Y0 = 600_000.0, 5_150_000.0


@pytest.fixture
def glaciers(tmp_path: Path) -> gpd.GeoDataFrame:
    boxes = [shapely.box(X0, Y0, X0 + 1000, Y0 + 1000), shapely.box(X0 + 3000, Y0, X0 + 4000, Y0 + 1000)]
    path = tmp_path / "inventory.gpkg"
    gpd.GeoDataFrame({"glacier_id": ["a", "b"]}, geometry=boxes, crs=UTM).to_file(path)
    found, _ = read_inventory(path, InventorySettings(path="unused"))
    return found


def test_sources_are_merged_and_cut_at_the_outline(tmp_path: Path, glaciers: gpd.GeoDataFrame) -> None:
    vector = gpd.GeoDataFrame(
        geometry=[
            shapely.box(X0 - 500, Y0, X0 + 300, Y0 + 1000),  # reaches out of the glacier
            shapely.box(X0 + 200, Y0, X0 + 400, Y0 + 1000),  # overlaps the first
            shapely.Polygon([(X0, Y0), (X0 + 9, Y0 + 9), (X0 + 9, Y0), (X0, Y0 + 9)]),  # crosses itself
        ],
        crs=UTM,
    )
    vector.to_file(tmp_path / "debris.gpkg", layer="supraglacial")
    surface = np.full((50, 50), 1, np.uint8)
    surface[:, 20:25] = 2
    with rasterio.open(
        tmp_path / "surface.tif", "w", driver="GTiff", height=50, width=50, count=1, dtype="uint8", crs=f"EPSG:{UTM}",
        transform=rasterio.Affine(20, 0, X0, 0, -20, Y0 + 1000),
    ) as target:  # fmt: skip
        target.write(surface, 1)
    sources = [DebrisSource(path="debris.gpkg", layer="supraglacial"), DebrisSource(path="surface.tif", raster_value=2)]
    debris = read_debris(sources, tmp_path, glaciers)
    assert debris["glacier_id"].tolist() == ["a"]
    assert debris["debris_km2"].iloc[0] == pytest.approx(0.4 + 0.1, rel=1e-3)
    only = read_debris(sources[1:], tmp_path, glaciers)
    assert only["debris_km2"].tolist() == pytest.approx([0.1], rel=1e-3)


def test_sources_in_other_systems_overlap_and_count_once(tmp_path: Path, glaciers: gpd.GeoDataFrame) -> None:
    """A shapefile in LAEA Europe, a self-crossing outline in degrees, a raster in the next UTM zone: one union."""
    west = shapely.segmentize(shapely.box(X0 - 100, Y0 - 100, X0 + 300, Y0 + 1100), 50.0)
    bow = shapely.Polygon([(X0 + 200, Y0), (X0 + 400, Y0 + 1000), (X0 + 400, Y0), (X0 + 200, Y0 + 1000)])
    far = shapely.box(X0 + 200_000, Y0, X0 + 201_000, Y0 + 1000)
    gpd.GeoDataFrame(geometry=[west, far], crs=UTM).to_crs(3035).to_file(tmp_path / "laea.shp")
    gpd.GeoDataFrame(geometry=[bow], crs=UTM).to_crs(4326).to_file(tmp_path / "degrees.geojson")
    block = gpd.GeoSeries([shapely.box(X0 + 250, Y0 + 200, X0 + 650, Y0 + 600)], crs=UTM).to_crs(32633)
    left, bottom, right, top = (round(v, -1) for v in block.buffer(200).total_bounds)
    transform = rasterio.Affine(10, 0, left, 0, -10, top)
    shape = (int((top - bottom) / 10), int((right - left) / 10))
    burnt = rasterio.features.rasterize(block, out_shape=shape, transform=transform, default_value=7, dtype="uint8")
    with rasterio.open(
        tmp_path / "types.tif", "w", driver="GTiff", height=shape[0], width=shape[1], count=1, dtype="uint8",
        crs="EPSG:32633", transform=transform,
    ) as target:  # fmt: skip
        target.write(burnt, 1)
    sources = [
        DebrisSource(path="laea.shp"),
        DebrisSource(path="degrees.geojson"),
        DebrisSource(path="types.tif", raster_value=7),
    ]
    truth = shapely.union_all([west, shapely.make_valid(bow), shapely.box(X0 + 250, Y0 + 200, X0 + 650, Y0 + 600)])
    truth = truth.intersection(shapely.box(X0, Y0, X0 + 1000, Y0 + 1000))
    debris = read_debris(sources, tmp_path, glaciers)
    assert debris["glacier_id"].tolist() == ["a"]
    assert debris["debris_km2"].iloc[0] == pytest.approx(truth.area / 1e6, rel=5e-3)  # the raster's staircase
    wrong = debris.to_crs(UTM).geometry.iloc[0].symmetric_difference(truth).area
    assert wrong < 0.02 * truth.area
    alone = [read_debris([source], tmp_path, glaciers)["debris_km2"].iloc[0] for source in sources]
    assert sum(alone) > 1.2 * debris["debris_km2"].iloc[0]  # they do overlap


def test_no_source_or_none_nearby_gives_an_empty_table(tmp_path: Path, glaciers: gpd.GeoDataFrame) -> None:
    assert len(read_debris([], tmp_path, glaciers)) == 0
    with rasterio.open(
        tmp_path / "far.tif", "w", driver="GTiff", height=5, width=5, count=1, dtype="uint8", crs=f"EPSG:{UTM}",
        transform=rasterio.Affine(20, 0, X0 + 90_000, 0, -20, Y0),
    ) as target:  # fmt: skip
        target.write(np.full((1, 5, 5), 2, np.uint8))
    assert len(read_debris([DebrisSource(path="far.tif", raster_value=2)], tmp_path, glaciers)) == 0


def test_absent_and_unplaced_sources_are_named(tmp_path: Path, glaciers: gpd.GeoDataFrame) -> None:
    with pytest.raises(SettingsError, match=r"absent\.shp does not exist"):
        read_debris([DebrisSource(path="absent.shp")], tmp_path, glaciers)
    gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)]).to_file(tmp_path / "nowhere.gpkg")
    with pytest.raises(SettingsError, match=r"nowhere\.gpkg has no coordinate reference system"):
        read_debris([DebrisSource(path="nowhere.gpkg")], tmp_path, glaciers)
    (tmp_path / "broken.gpkg").write_bytes(b"no database")
    with pytest.raises(SettingsError, match=r"broken\.gpkg can not be read"):
        read_debris([DebrisSource(path="broken.gpkg")], tmp_path, glaciers)


def test_swiss_debris(real_data: Path) -> None:
    inventory = InventorySettings(path="unused", columns=InventoryColumns(glacier_id="SGI"))
    glaciers, _ = read_inventory(real_data / "sgi_switzerland" / "sgi2010_outlines.gpkg", inventory)
    large = glaciers.nlargest(5, "inventory_area_km2")
    source = DebrisSource(path="sgi_switzerland/sgi2016_surfacetype_20m.tif", raster_value=2)
    debris = read_debris([source], real_data, large)
    assert len(debris) == 5
    share = debris.set_index("glacier_id")["debris_km2"] / large.set_index("glacier_id")["inventory_area_km2"]
    assert share.between(0.001, 0.4).all()  # 11% in all of Switzerland


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-179, 179), st.floats(-75, 80), st.sampled_from([10.0, 20.0, 30.0]), st.floats(0, 2000),
)  # fmt: skip
def test_grids_share_their_pixels_and_cover_glacier_and_margin(
    lon: float, lat: float, pixel_m: float, margin_m: float
) -> None:
    shape = shapely.box(lon, lat, lon + 0.01, lat + 0.004)
    epsg = utm_epsg_of(lon, lat)
    grid = glacier_grid(shape, epsg, pixel_m, margin_m)
    assert grid.crs.epsg == epsg
    assert (grid.affine.a, grid.affine.e, grid.affine.b, grid.affine.d) == (pixel_m, -pixel_m, 0.0, 0.0)
    assert grid.affine.c % pixel_m == 0 and grid.affine.f % pixel_m == 0
    west, south, east, north = gpd.GeoSeries([shape], crs=4326).to_crs(epsg).total_bounds
    box = grid.boundingbox
    for inner, outer in ((box.left, west - margin_m), (box.bottom, south - margin_m)):
        assert outer - pixel_m - 1e-4 <= inner <= outer + 1e-4
    for inner, outer in ((box.right, east + margin_m), (box.top, north + margin_m)):
        assert outer - 1e-4 <= inner <= outer + pixel_m + 1e-4
