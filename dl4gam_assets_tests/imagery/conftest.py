"""A small real STAC catalog of cloud-optimized GeoTIFFs: two overlapping tiles, several dates, several defects."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import rasterio.warp
import shapely
import shapely.geometry
from affine import Affine

from dl4gam_assets.settings import ImagerySettings, SensorSettings, StacFolder

CRS = "EPSG:32632"
WEST, NORTH, SIZE = 600_000.0, 5_200_000.0, 100  # 1 km at 10 m
BANDS = {"blue": 10, "green": 10, "red": 10, "nir": 10, "swir16": 20}

SENSOR = SensorSettings(scene_classification="scl", cloud_probability="cld")
IMAGERY = ImagerySettings(catalog=StacFolder(path="stac/catalog.json"), sensor=SENSOR)


def write_tif(path: Path, values: np.ndarray, pixel: float, west: float = WEST, nodata: float | None = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "COG", "height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype.name,
        "crs": CRS, "transform": Affine(pixel, 0, west, 0, -pixel, NORTH), "nodata": nodata,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(values, 1)


ItemMaker = Callable[..., pystac.Item]


@pytest.fixture
def make_item(tmp_path: Path) -> ItemMaker:
    """Make an item with its files: ``make_item("a", "2020-08-10", green=0.5, ...)``; reflectances are constants."""

    def make(
        name: str, day: str, *, tile: str = "T1", west: float = WEST, baseline: str = "03.00",
        offset: float | None = 0.0, scale: float | None = 1e-4,
        cloud: np.ndarray | None = None, empty: np.ndarray | None = None, **reflectance: Any,
    ) -> pystac.Item:  # fmt: skip
        bounds = (west, NORTH - SIZE * 10, west + SIZE * 10, NORTH)
        footprint = shapely.box(*rasterio.warp.transform_bounds(CRS, "EPSG:4326", *bounds))
        item = pystac.Item(
            name, shapely.geometry.mapping(footprint), list(footprint.bounds),
            dt.datetime.fromisoformat(day).replace(hour=10, tzinfo=dt.UTC),
            {"grid:code": tile, "s2:processing_baseline": baseline},
        )  # fmt: skip
        for band, pixel in BANDS.items():
            n = SIZE * 10 // pixel
            value = reflectance.get(band, 0.2)
            digits = np.round((np.broadcast_to(np.float64(value), (n, n)) - (offset or 0)) / (scale or 1e-4))
            data = digits.astype(np.uint16)
            if empty is not None:
                step = pixel // 10
                data = np.where(empty[::step, ::step], 0, data).astype(np.uint16)
            path = tmp_path / "scenes" / name / f"{band}.tif"
            write_tif(path, data, pixel, west)
            meta: dict[str, Any] = {"nodata": 0}
            if scale is not None:
                meta["scale"] = scale
            if offset is not None:
                meta["offset"] = offset
            item.add_asset(band, pystac.Asset(str(path), extra_fields={"raster:bands": [meta]}))
        cover = np.zeros((SIZE, SIZE), bool) if cloud is None else cloud
        scl = np.where(cover, 9, 5).astype(np.uint8)[::2, ::2]
        write_tif(tmp_path / "scenes" / name / "scl.tif", np.ascontiguousarray(scl), 20, west)
        item.add_asset("scl", pystac.Asset(str(tmp_path / "scenes" / name / "scl.tif")))
        probability = np.where(cover, 95, 2).astype(np.uint8)[::2, ::2]
        write_tif(tmp_path / "scenes" / name / "cld.tif", np.ascontiguousarray(probability), 20, west, nodata=None)
        item.add_asset("cld", pystac.Asset(str(tmp_path / "scenes" / name / "cld.tif")))
        return item

    return make


def save_catalog(items: list[pystac.Item], folder: Path) -> Path:
    """A self-contained catalog on disk."""
    catalog = pystac.Catalog("test", "test scenes")
    catalog.add_items(items)
    catalog.normalize_hrefs(str(folder / "stac"))
    catalog.save(pystac.CatalogType.SELF_CONTAINED)
    return folder / "stac" / "catalog.json"
