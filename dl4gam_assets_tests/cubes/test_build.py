"""Masks and layers of a cube."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import xarray as xr

from dl4gam_assets.cubes import build_cube, cube_mask, pack_masks, static_layers, zone_name
from dl4gam_assets.inventory import glacier_grid, glacier_zones, read_debris, read_inventory
from dl4gam_assets.settings import DebrisSource, InventoryColumns, InventorySettings
from dl4gam_assets.terrain import find_tiles

if TYPE_CHECKING:
    from .conftest import Place

ZONES = ["zone_m20", "zone_m10", "zone_0", "zone_10", "zone_20", "zone_50"]


def centres_in(place: Place, shape: shapely.Geometry) -> np.ndarray:
    """Pixels (H, W) whose centre lies in a shape (EPSG:4326), point by point."""
    a = place.grid.affine
    height, width = place.grid.shape
    x = a.c + a.a * (np.arange(width) + 0.5)
    y = a.f + a.e * (np.arange(height) + 0.5)
    metric = gpd.GeoSeries([shape], crs=4326).to_crs(32632).iloc[0]
    inside: np.ndarray = shapely.contains_xy(metric, *np.meshgrid(x, y))
    return inside


def test_masks_are_the_pixels_whose_centre_is_inside(place: Place) -> None:
    static = place.static()
    rows = place.glaciers.set_index("glacier_id")
    zones = place.zones.set_index(["glacier_id", "buffer_m"]).geometry
    assert (cube_mask(static, "glacier") == centres_in(place, rows.geometry["A"])).all()
    everyone = np.any([centres_in(place, g) for g in rows.geometry], axis=0)
    assert (cube_mask(static, "any_glacier") == everyone).all()
    for buffer_m in (-20, -10, 0, 10, 20, 50):
        assert (cube_mask(static, zone_name(buffer_m)) == centres_in(place, zones["A", buffer_m])).all(), buffer_m
    index = static["glacier_index"].to_numpy()
    for glacier_id in ("A", "B", "small"):
        expected = centres_in(place, rows.geometry[glacier_id])
        assert expected.any()
        assert ((index == rows["glacier_int"][glacier_id]) == expected).all()
    assert set(np.unique(index)) == {-1, 1, 2, 3}
    assert cube_mask(static, "glacier").sum() == 60 * 50


def test_masks_keep_their_relations(place: Place) -> None:
    static = place.static()
    masks = {name: cube_mask(static, name) for name in static["mask"].attrs["flag_meanings"].split()}
    assert list(masks) == ["not_ok", "glacier", "any_glacier", "debris", *ZONES, "cell"]
    for inner, outer in pairwise(ZONES):
        assert not (masks[inner] & ~masks[outer]).any()
    assert (masks["zone_0"] == masks["glacier"]).all()
    others = masks["any_glacier"] & ~masks["glacier"]
    assert not (masks["zone_50"] & others).any()
    assert not masks["not_ok"].any()
    assert masks["debris"].sum() == 20 * 50


def test_cell_is_what_lies_nearer_to_this_glacier(place: Place) -> None:
    static = place.static()
    index, cell = static["glacier_index"].to_numpy(), cube_mask(static, "cell")
    own = int(place.glaciers.set_index("glacier_id")["glacier_int"]["A"])
    away = {k: np.argwhere(index == v) for k, v in (("own", own), ("b", own + 1), ("small", own + 2))}
    for row, column in np.random.default_rng(0).integers(0, index.shape, (200, 2)):
        distance = {k: np.hypot(*(p - (row, column)).T).min() for k, p in away.items()}
        nearest_other = min(distance["b"], distance["small"])
        if distance["own"] != nearest_other:
            assert cell[row, column] == (distance["own"] < nearest_other)
    assert not (cell & cube_mask(static, "any_glacier") & ~cube_mask(static, "glacier")).any()


def test_grids_of_neighbours_agree_on_every_pixel(place: Place) -> None:
    other = place.glaciers.set_index("glacier_id").geometry["B"]
    second = static_layers(
        "B", place.glaciers, place.zones, place.debris, glacier_grid(other, 32632, 10.0, 200.0), dem_paths=[place.dem]
    )
    both = xr.align(place.static(), second, join="inner")
    assert both[0].sizes["x"] > 20
    for name in ("glacier_index", "dem"):
        assert (both[0][name].to_numpy() == both[1][name].to_numpy()).all(), name
    for name in ZONES:
        assert not (cube_mask(both[0], name) & cube_mask(both[1], name)).any(), name


def test_without_a_dem_or_debris_the_layers_are_absent_or_empty(place: Place) -> None:
    static = static_layers("A", place.glaciers, place.zones, place.debris.iloc[:0], place.grid)
    assert "dem" not in static and "slope" not in static
    assert not cube_mask(static, "debris").any()
    cube = build_cube(static, place.image())
    assert "dhdt" not in cube and "reflectance" in cube


def test_terrain_is_that_of_the_dem(place: Place) -> None:
    static = place.static()
    assert static["dem"].dtype == np.float32 and static["dem"].attrs["units"] == "m"
    assert 2500 < float(static["dem"].mean()) < 3100
    assert np.isfinite(static["slope"]).all()


def test_not_ok_is_cloud_missing_or_bad(place: Place) -> None:
    cube = place.cube()
    bad = np.zeros(place.grid.shape, bool)
    bad[:3] = bad[-4:] = bad[50, 60] = True
    assert (cube_mask(cube, "not_ok") == bad).all()
    assert not cube_mask(place.static(), "not_ok").any()  # the static layers are left alone
    for name in ("glacier", "zone_50", "cell"):
        assert (cube_mask(cube, name) == cube_mask(place.static(), name)).all()


def test_mistakes_are_named(place: Place) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        place.static("nowhere")
    with pytest.raises(ValueError, match="far: its outline holds no pixel"):
        place.static("far")
    with pytest.raises(ValueError, match=r"no zones of \[100\] m"):
        place.static(buffers_m=[0, 20, 50, 100])
    with pytest.raises(ValueError, match="A: image of"):
        build_cube(place.static(), place.image().isel(x=slice(1, None)))
    with pytest.raises(KeyError, match="no mask 'zone_30'; it has not_ok, glacier"):
        cube_mask(place.static(), "zone_30")
    with pytest.raises(ValueError, match="at most 16 masks"):
        pack_masks({f"m{i}": np.zeros((2, 2), bool) for i in range(17)})


def test_packing_is_reversible() -> None:
    rng = np.random.default_rng(0)
    masks = {f"m{i}": rng.random((5, 7)) < 0.5 for i in range(16)}
    packed = pack_masks(masks)
    assert packed.dtype == np.uint16
    for name, mask in masks.items():
        assert (cube_mask(xr.Dataset({"mask": packed}), name) == mask).all()


def test_real_glaciers_in_a_crowd(real_data: Path) -> None:
    inventory = InventorySettings(path="unused", columns=InventoryColumns(glacier_id="SGI"))
    glaciers, _ = read_inventory(real_data / "sgi_switzerland" / "sgi2010_outlines.gpkg", inventory)
    aletsch = glaciers.loc[glaciers["inventory_area_km2"].idxmax()]
    near = glaciers[glaciers.to_crs(32632).dwithin(gpd.GeoSeries([aletsch.geometry], crs=4326).to_crs(32632)[0], 4000)]
    near = near.reset_index(drop=True)
    zones = glacier_zones(near, inventory.buffers_m)
    source = DebrisSource(path="sgi_switzerland/sgi2016_surfacetype_20m.tif", raster_value=2)
    debris = read_debris([source], real_data, near)
    own = near[near["inventory_area_km2"] > 2].sort_values("inventory_area_km2").iloc[0]
    grid = glacier_grid(own["geometry"], int(own["utm_epsg"]), 10.0, 1330.0)
    static = static_layers(own["glacier_id"], near, zones, debris, grid)
    start = time.perf_counter()
    static = static_layers(own["glacier_id"], near, zones, debris, grid)
    assert time.perf_counter() - start < 2.0  # 0.05 s on one core that is free
    area = cube_mask(static, "glacier").sum() * 1e-4
    assert area == pytest.approx(own["inventory_area_km2"], rel=0.01)
    assert len(np.unique(static["glacier_index"])) > 3
    ring = cube_mask(static, "zone_50") & ~cube_mask(static, "glacier")
    assert not (ring & cube_mask(static, "any_glacier")).any() and ring.any()


def test_a_glacier_across_the_antimeridian(tmp_path: Path) -> None:
    """Its outline is in two parts at both ends of the longitudes, its DEM in two tiles."""
    south, north = -18.010, -18.004
    halves = shapely.MultiPolygon([shapely.box(179.995, south, 180, north), shapely.box(-180, south, -179.995, north)])
    gpd.GeoDataFrame(
        {"glacier_id": ["across", "elsewhere"]}, geometry=[halves, shapely.box(0.0, south, 0.01, north)], crs=4326
    ).to_file(tmp_path / "inventory.gpkg")
    inventory = InventorySettings(path="unused")
    glaciers, _ = read_inventory(tmp_path / "inventory.gpkg", inventory)
    own = glaciers.set_index("glacier_id").loc["across"]
    grid = glacier_grid(own["geometry"], int(own["utm_epsg"]), 10.0, 300.0)
    assert grid.shape[1] < 300  # about 1.06 km and the margins, not the circumference of the Earth
    second = 1 / 3600
    for lon, columns in ((179.0, np.arange(3500, 3600)), (-180.0, np.arange(0, 100))):
        x, y = lon + columns * second, -18 - np.arange(0, 100) * second
        tile = np.add.outer(-2e4 * (y + 18), 5000 * ((x + 360) % 360 - 180)).astype(np.float32) + 1000
        name = tmp_path / f"S19{'E' if lon > 0 else 'W'}{abs(int(lon)):03d}.tif"
        with rasterio.open(
            name, "w", driver="GTiff", width=100, height=100, count=1, dtype="float32", crs="EPSG:4326",
            transform=rasterio.Affine(second, 0, x[0] - second / 2, 0, -second, y[0] + second / 2),
        ) as target:  # fmt: skip
            target.write(tile, 1)
    tiles = find_tiles(["{lat}{lon}.tif"], tmp_path, setting="terrain.dem").touching(grid)
    assert len(tiles) == 2
    zones = glacier_zones(glaciers, inventory.buffers_m)
    static = static_layers("across", glaciers, zones, zones.iloc[:0], grid, dem_paths=tiles)
    area = cube_mask(static, "glacier").sum() * 1e-4
    assert area == pytest.approx(own["inventory_area_km2"], rel=0.01) and 0.6 < area < 0.8
    dem = static["dem"].to_numpy()
    assert np.isfinite(dem).all()
    along = np.diff(dem[dem.shape[0] // 2])
    assert along.std() < 0.02 * abs(along.mean())  # one slope, no step at the antimeridian
    assert float(static["slope"].max()) < 15
