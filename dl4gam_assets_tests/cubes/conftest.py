"""A small region of three glaciers, one of them below the modelled size, with a DEM."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import xarray as xr
from odc.geo.geobox import GeoBox

from dl4gam_assets.cubes import build_cube, static_layers
from dl4gam_assets.inventory import glacier_grid, glacier_zones, read_inventory
from dl4gam_assets.settings import InventorySettings
from dl4gam_assets.tables import TABLES

X0, Y0 = 600_000.0, 5_150_000.0
BANDS = ["red", "green", "blue", "nir", "swir16"]


class Place(NamedTuple):
    """Tables and grid of the small region."""

    glaciers: gpd.GeoDataFrame
    zones: gpd.GeoDataFrame
    debris: gpd.GeoDataFrame
    grid: GeoBox
    dem: Path

    def static(self, glacier_id: str = "A", **other: object) -> xr.Dataset:
        options = {"dem_paths": [self.dem]} | other
        return static_layers(glacier_id, self.glaciers, self.zones, self.debris, self.grid, **options)  # type: ignore[arg-type]

    def image(self, seed: int = 0) -> xr.Dataset:
        """An image with clouds in the first rows, missing pixels in the last, and one bad pixel."""
        shape = self.grid.shape
        reflectance = np.random.default_rng(seed).uniform(0.02, 1.1, (len(BANDS), *shape)).astype(np.float32)
        reflectance[:, -4:] = np.nan
        reflectance[2, 50, 60] = np.nan
        cloud, missing = np.zeros(shape, bool), np.zeros(shape, bool)
        cloud[:3] = True
        missing[-4:] = True
        return xr.Dataset(
            {"reflectance": (("band", "y", "x"), reflectance), "cloud": (("y", "x"), cloud),
             "missing": (("y", "x"), missing)},
            coords={"band": BANDS},
        )  # fmt: skip

    def cube(self, seed: int = 0, **attrs: object) -> xr.Dataset:
        dhdt = np.random.default_rng(seed + 1).normal(-1, 1, self.grid.shape).astype(np.float32)
        dhdt[:, :5] = np.nan
        known = {"glacier_id": "A", "image_date": "2016-08-20", "scene_ids": "S2A", "fingerprint": "0", "tag": None}
        return build_cube(self.static(), self.image(seed), dhdt=dhdt, attrs=known | attrs)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    outlines = {
        "A": shapely.box(X0 + 3, Y0 + 4, X0 + 603, Y0 + 504),
        "B": shapely.box(X0 + 603, Y0 + 4, X0 + 1003, Y0 + 504),  # shares a divide with A
        "small": shapely.box(X0 + 100, Y0 + 534, X0 + 200, Y0 + 584),  # 30 m north of A, 0.005 km2
        "far": shapely.box(X0 + 20_000, Y0, X0 + 21_000, Y0 + 1000),
    }
    path = folder / "inventory.gpkg"
    gpd.GeoDataFrame({"glacier_id": list(outlines)}, geometry=list(outlines.values()), crs=32632).to_file(path)
    settings = InventorySettings(path="unused")
    glaciers, _ = read_inventory(path, settings)
    debris = gpd.GeoDataFrame(
        {"glacier_id": ["A"], "debris_km2": [0.1]},
        geometry=[shapely.box(X0 + 3, Y0 + 4, X0 + 203, Y0 + 504)],
        crs=32632,
    ).to_crs(4326)
    grid = glacier_grid(glaciers.geometry.iloc[0], 32632, 10.0, 200.0)
    rows, columns = np.mgrid[0:200, 0:200]
    dem = (2500 + 3.0 * rows + 20 * np.sin(columns / 9)).astype(np.float32)
    with rasterio.open(
        folder / "dem.tif", "w", driver="GTiff", height=200, width=200, count=1, dtype="float32", crs="EPSG:32632",
        transform=rasterio.Affine(10, 0, X0 - 500, 0, -10, Y0 + 1500),
    ) as target:  # fmt: skip
        target.write(dem, 1)
    return Place(
        glaciers,
        glacier_zones(glaciers, settings.buffers_m),
        TABLES["debris"].conform(debris),
        grid,
        folder / "dem.tif",
    )
