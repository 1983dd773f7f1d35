"""Elevation and elevation change on a glacier's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox

from dl4gam_assets.inventory import glacier_grid, read_inventory
from dl4gam_assets.settings import ElevationChangePeriod, InventoryColumns, InventorySettings
from dl4gam_assets.terrain import match_period, read_elevation, read_elevation_change

X0, Y0 = 600_000.0, 5_150_000.0
GRID = GeoBox.from_bbox(BoundingBox(X0, Y0, X0 + 400, Y0 + 300, crs="EPSG:32632"), resolution=10.0)


def dem_file(path: Path, values: np.ndarray, west: float, north: float, pixel: float, **profile: object) -> Path:
    options = {"driver": "GTiff", "count": 1, "crs": "EPSG:32632", "dtype": values.dtype.name} | profile
    with rasterio.open(
        path, "w", height=values.shape[0], width=values.shape[1],
        transform=rasterio.Affine(pixel, 0, west, 0, -pixel, north), **options,
    ) as target:  # fmt: skip
        target.write(values, 1)
    return path


def ramp(west: float, north: float, shape: tuple[int, int], pixel: float) -> np.ndarray:
    """Elevation that rises 0.1 m a metre to the east and 0.2 m a metre to the north."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    x, y = west + (columns + 0.5) * pixel, north - (rows + 0.5) * pixel
    return (1000 + 0.1 * (x - X0) + 0.2 * (y - Y0)).astype(np.float32)


def test_bilinear_keeps_a_ramp(tmp_path: Path) -> None:
    coarse = ramp(X0 - 300, Y0 + 600, (30, 40), 30.0)
    path = dem_file(tmp_path / "dem.tif", coarse, X0 - 300, Y0 + 600, 30.0)
    found = read_elevation([path], GRID)
    assert found.dtype == np.float32 and found.shape == (30, 40)
    assert found == pytest.approx(ramp(X0, Y0 + 300, (30, 40), 10.0), abs=0.01)


def test_files_are_mosaicked_in_order_and_voids_are_filled_by_the_next(tmp_path: Path) -> None:
    first = np.full((30, 20), 1500, np.int16)
    first[10:20, 5:10] = -32768  # a void without a no-data tag, as in raw SRTM
    second = np.full((30, 30), 2000.0, np.float32)
    second[:5, :] = -9999.0
    paths = [
        dem_file(tmp_path / "first.tif", first, X0, Y0 + 300, 10.0),
        dem_file(tmp_path / "second.tif", second, X0 + 50, Y0 + 300, 10.0, nodata=-9999.0),
    ]
    found = read_elevation(paths, GRID)
    assert (found[:10, :18] == 1500).all()
    assert (found[11:19, 6:9] == 2000).all()
    assert (found[6:, 21:34] == 2000).all()
    assert np.isnan(found[:5, 21:]).all() and np.isnan(found[:, 36:]).all()
    assert set(np.unique(found[np.isfinite(found)])) == {1500.0, 2000.0}


def test_impossible_elevations_are_missing(tmp_path: Path) -> None:
    values = np.full((30, 40), 2500.0, np.float32)
    values[:, 20:] = 1e20
    path = dem_file(tmp_path / "dem.tif", values, X0, Y0 + 300, 10.0)
    found = read_elevation([path], GRID)
    assert (found[:, :19] == 2500).all() and np.isnan(found[:, 21:]).all()


def test_no_file_covers_the_grid(tmp_path: Path) -> None:
    path = dem_file(tmp_path / "far.tif", np.ones((5, 5), np.float32), X0 + 90_000, Y0, 10.0)
    assert np.isnan(read_elevation([path], GRID)).all()
    assert np.isnan(read_elevation([], GRID)).all()


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.tif"):
        read_elevation([tmp_path / "absent.tif"], GRID)
    (tmp_path / "broken.tif").write_bytes(b"no raster")
    with pytest.raises(OSError, match=r"broken\.tif"):
        read_elevation([tmp_path / "broken.tif"], GRID)


def period(start: int, end: int, path: str = "x.tif") -> ElevationChangePeriod:
    return ElevationChangePeriod(path=path, start=start, end=end)


@pytest.mark.parametrize(
    ("year", "expected"),
    [(2015, (2010, 2015)), (2016, (2010, 2015)), (2019, (2010, 2015)), (2020, (2015, 2020)), (2023, (2015, 2020)),
     (2012, (2000, 2005)), (1999, (2000, 2005))],
)  # fmt: skip
def test_period_of_a_year(year: int, expected: tuple[int, int]) -> None:
    periods = [period(2015, 2020), period(2000, 2005), period(2010, 2015)]
    found = match_period(periods, year)
    assert found is not None and (found.start, found.end) == expected


def test_elevation_change_of_a_year(tmp_path: Path) -> None:
    values = np.full((6, 6), -1.5, np.float32)
    values[0] = -9999
    path = dem_file(tmp_path / "dhdt.tif", values, X0, Y0 + 300, 100.0, nodata=-9999.0)
    found, chosen = read_elevation_change([period(2010, 2015, str(path))], 2023, GRID)
    assert chosen is not None and chosen.end == 2015
    assert np.isnan(found[:4]).all() and (found[16:] == np.float32(-1.5)).all()
    nothing, none = read_elevation_change([], 2023, GRID)
    assert none is None and nothing.shape == (30, 40) and np.isnan(nothing).all()


def test_real_srtm_on_a_glacier(real_data: Path) -> None:
    settings = InventorySettings(
        path="unused", layer="rgi6_hintereisferner", columns=InventoryColumns(glacier_id="RGIId", date="BgnDate")
    )
    glaciers, _ = read_inventory(real_data / "oetztal" / "outlines.gpkg", settings)
    row = glaciers.iloc[0]
    grid = glacier_grid(row["geometry"], int(row["utm_epsg"]), 10.0, 500.0)
    found = read_elevation([real_data / "oetztal" / "srtm_oetztal_90m.tif"], grid)
    assert np.isfinite(found).all()
    assert 2000 < found.min() < 2500 and 3500 < found.max() < 3800  # Weisskugel: 3738 m
