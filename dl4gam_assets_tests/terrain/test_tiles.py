"""Tiles: which are found, which are opened, and that their borders leave no trace."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from odc.geo.geom import BoundingBox
from pyproj import Transformer

from dl4gam_assets.imagery import CatalogError
from dl4gam_assets.settings import ElevationChangePeriod
from dl4gam_assets.terrain import (
    TileError,
    TileIndex,
    catalog_tiles,
    find_tiles,
    grid_box,
    period_tiles,
    read_elevation,
    read_elevation_change,
    read_mosaic,
    read_velocity,
    search_blocks,
    tiles,
)

SECOND = 1 / 3600


def hills(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """A smooth steep surface over longitude and latitude, continuous across the antimeridian."""
    east = ((np.asarray(lon) + 360.0) % 360.0) * 1200.0
    return (2000 + 300 * np.sin(east / 3) + 400 * np.cos(np.asarray(lat) * 400.0)).astype(np.float32)


def write(path: Path, values: np.ndarray, transform: rasterio.Affine, crs: str = "EPSG:4326", **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"driver": "GTiff", "count": 1, "dtype": values.dtype.name, "tiled": True, "compress": "deflate"} | more
    with rasterio.open(
        path, "w", height=values.shape[0], width=values.shape[1], crs=crs, transform=transform, **options
    ) as target:
        target.write(values, 1)
    return path


def copernicus_name(lat: int, lon: int) -> str:
    return tiles.fill_template("Copernicus_DSM_COG_10_{lat}_00_{lon}_00_DEM.tif", lat, lon)


def copernicus(folder: Path, lat: int, lon: int, rows: slice, columns: slice, across: float = SECOND) -> Path:
    """A part of a GLO-30 tile with its real geometry: centres of the first row and column on whole degrees.

    ``across`` is the pixel's width: 1 arc second below 50 degrees, 1.5 from 50 to 60.
    """
    row, column = np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop)
    x, y = lon + column * across, lat + 1 - row * SECOND
    values = hills(*np.meshgrid(x, y))
    corner = rasterio.Affine(across, 0, x[0] - across / 2, 0, -SECOND, y[0] + SECOND / 2)
    return write(folder / copernicus_name(lat, lon), values, corner)


def grid_at(lon: float, lat: float, epsg: int, half_m: float = 600.0, pixel_m: float = 10.0) -> GeoBox:
    x, y = Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)
    x, y = round(x, -1), round(y, -1)
    box = BoundingBox(x - half_m, y - half_m, x + half_m, y + half_m, crs=f"EPSG:{epsg}")
    return GeoBox.from_bbox(box, resolution=pixel_m)


def places(grid: GeoBox) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of a grid's pixel centres."""
    columns, rows = np.meshgrid(np.arange(grid.shape[1]) + 0.5, np.arange(grid.shape[0]) + 0.5)
    a = grid.affine
    lon, lat = Transformer.from_crs(grid.crs.epsg, 4326, always_xy=True).transform(
        a.c + a.a * columns, a.f + a.e * rows
    )
    return np.asarray(lon), np.asarray(lat)


# ------------------------------------------------------------------------------------------ seams
@pytest.fixture(scope="module")
def four_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corner of four tiles at 46 N, 8 E."""
    folder = tmp_path_factory.mktemp("glo30")
    low, high = slice(0, 90), slice(3510, 3600)
    copernicus(folder, 46, 7, high, high)
    copernicus(folder, 46, 8, high, low)
    copernicus(folder, 45, 7, low, high)
    copernicus(folder, 45, 8, low, low)
    return folder


def test_a_dem_cut_into_tiles_is_the_whole_dem(four_tiles: Path, tmp_path: Path) -> None:
    grid = grid_at(8.0, 46.0, 32632)
    x, y = 7 + np.arange(3510, 3690) * SECOND, 47 - np.arange(3510, 3690) * SECOND
    whole = write(
        tmp_path / "whole.tif",
        hills(*np.meshgrid(x, y)),
        rasterio.Affine(SECOND, 0, x[0] - SECOND / 2, 0, -SECOND, y[0] + SECOND / 2),
    )
    index = find_tiles(["."], four_tiles, setting="terrain.dem")
    parts = index.touching(grid)
    assert len(parts) == 4
    for order in (parts, parts[::-1]):
        found = read_elevation(order, grid)
        assert np.isfinite(found).all()
        assert np.abs(found - read_elevation([whole], grid)).max() < 1e-3
    # Each tile alone leaves the rest missing, which is what the seam would be made of.
    alone = read_elevation(parts[:1], grid)
    assert 0.2 < np.isnan(alone).mean() < 0.8


def test_tiles_with_other_pixel_widths_meet_without_a_step(tmp_path: Path) -> None:
    """Copernicus tiles have 1.5 arc seconds columns from 50 degrees: two lattices in one glacier."""
    copernicus(tmp_path, 50, 7, slice(3510, 3600), slice(1000, 1090), across=1.5 * SECOND)
    copernicus(tmp_path, 49, 7, slice(0, 90), slice(1500, 1635))
    centre = 7 + 1045 * 1.5 * SECOND
    grid = grid_at(centre, 50.0, 32632)
    found = read_elevation(find_tiles(["*.tif"], tmp_path, setting="terrain.dem").touching(grid), grid)
    assert np.isfinite(found).all()
    truth = hills(*places(grid))
    error = found - truth
    row = int(np.argmin(np.abs(places(grid)[1][:, 60] - 50.0)))
    seam, away = np.abs(error[row - 6 : row + 6]).max(), np.abs(np.r_[error[10:40], error[-40:-10]]).max()
    assert seam < 1.3 * away  # what bilinear weights miss of the curved surface, there as elsewhere
    # The same without values of the neighbour around each part: half a pixel is repeated on both sides.
    parts = [read_elevation([p], grid) for p in sorted(tmp_path.glob("*.tif"))]
    naive = np.where(np.isnan(parts[0]), parts[1], parts[0])
    assert np.nanmax(np.abs(naive - truth)[row - 6 : row + 6]) > 2 * seam


def test_across_utm_zones_and_the_antimeridian(tmp_path: Path) -> None:
    low, high = slice(0, 90), slice(3510, 3600)
    for lat, rows in ((-18, high), (-19, low)):
        copernicus(tmp_path, lat, 179, rows, high)
        copernicus(tmp_path, lat, -180, rows, low)
    index = find_tiles(
        [copernicus_name(-18, 179).replace("S18", "{lat}").replace("E179", "{lon}")], tmp_path, setting="x"
    )
    for lon, epsg in ((180.0, 32701), (-179.999, 32701), (179.999, 32760)):
        grid = grid_at(lon, -18.0, epsg)
        west, _, east, _ = grid_box(grid)
        assert west > 179 and east < -179
        found = read_elevation(index.touching(grid), grid)
        assert np.isfinite(found).all(), epsg
        assert np.abs(found - hills(*places(grid))).max() < 2.5
    indexed = find_tiles(["."], tmp_path, setting="x")
    grid = grid_at(180.0, -18.0, 32760)
    assert len(indexed.touching(grid)) == 4
    assert np.array_equal(read_elevation(indexed.touching(grid), grid), read_elevation(index.touching(grid), grid))


def test_dhdt_tiles_in_two_utm_zones(tmp_path: Path) -> None:
    """Hugonnet's tiles are in the UTM zone of each; a glacier at 12 E touches tiles of zones 32 and 33."""
    for lon, epsg in ((11, 32632), (12, 32633)):
        grid = grid_at(12.0, 46.8, epsg, half_m=3000, pixel_m=100)
        x, _ = places(grid)
        values = (-1.0 - 20 * (x - 12.0)).astype(np.float32)
        inside = (x >= lon - 0.01) & (x <= lon + 1.01)  # the tiles overlap a little, as the real ones do
        values[~inside] = -9999
        name = tiles.fill_template("{lat}{lon}_2010-01-01_2015-01-01_dhdt.tif", 46, lon)
        write(tmp_path / name, values, grid.affine, f"EPSG:{epsg}", nodata=-9999)
    period = ElevationChangePeriod(path=".", start=2010, end=2015)
    grid = grid_at(12.0, 46.8, 32633)
    found, chosen = read_elevation_change([period], 2015, grid, data_root=tmp_path)
    assert chosen == period and np.isfinite(found).all()
    assert np.abs(found - (-1.0 - 20 * (places(grid)[0] - 12.0))).max() < 0.002


def test_voids_are_filled_from_other_lattices_and_none_is_invented(tmp_path: Path) -> None:
    grid = grid_at(8.0, 46.0, 32632, half_m=300)
    a = grid.affine
    first = np.full((60, 60), 100.0, np.float32)
    first[20:40, 20:40] = -9999
    second = np.full((70, 35), 200.0, np.float32)
    paths = [
        write(tmp_path / "a.tif", first, a, "EPSG:32632", nodata=-9999),
        write(tmp_path / "b.tif", second, rasterio.Affine(10, 0, a.c - 3, 0, -10, a.f + 4), "EPSG:32632"),
    ]
    found = read_mosaic(paths, grid)
    assert (found[:20] == 100).all() and (found[21:39, 21:33] == 200).all()
    assert np.isnan(found[20:40, 35:40]).all() and np.isfinite(found[20:40, 40:]).all()


def test_a_finer_dem_is_averaged(tmp_path: Path) -> None:
    grid = grid_at(8.0, 46.0, 32632, half_m=100)
    a = grid.affine
    noise = np.random.default_rng(0).normal(1000, 50, (200, 200)).astype(np.float32)
    path = write(tmp_path / "fine.tif", noise, rasterio.Affine(2, 0, a.c - 100, 0, -2, a.f + 100), "EPSG:32632")
    found = read_elevation([path], grid)
    assert np.isfinite(found).all()
    assert found.std() < 20 and found.mean() == pytest.approx(1000, abs=5)


def test_scale_and_offset_of_a_file_are_applied(tmp_path: Path) -> None:
    grid = grid_at(8.0, 46.0, 32632, half_m=50)
    path = write(tmp_path / "v.tif", np.full((10, 10), 25, np.int16), grid.affine, "EPSG:32632")
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (0.1,), (1.0,)
    assert read_velocity([path], grid) == pytest.approx(3.5)
    write(path, np.full((10, 10), -3.0, np.float32), grid.affine, "EPSG:32632")
    assert np.isnan(read_velocity([path], grid)).all()  # no speed is negative


# ------------------------------------------------------------------------------------------ finding
def test_only_tiles_that_touch_the_grid_are_opened(four_tiles: Path, tmp_path: Path) -> None:
    """A far tile is garbage: opening it would fail."""
    for path in four_tiles.glob("*.tif"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / copernicus_name(46, 9)
    broken.write_bytes(b"no raster")
    index = find_tiles(["."], tmp_path, setting="terrain.dem")
    inside_one = grid_at(7.99, 46.01, 32632, half_m=100)
    assert [Path(t.href).name for t in index.touching(inside_one)] == [copernicus_name(46, 7)]
    assert np.isfinite(read_elevation(index.touching(grid_at(8.0, 46.0, 32632)), grid_at(8.0, 46.0, 32632))).all()
    there = grid_at(9.5, 46.5, 32632)
    with pytest.raises(TileError, match=copernicus_name(46, 9)):
        read_elevation(index.touching(there), there)
    again = TileIndex.from_json(index.to_json())
    assert again.tiles == index.tiles and again.signature == index.signature


def test_folders_leave_out_what_is_no_data(tmp_path: Path) -> None:
    grid = grid_at(8.0, 46.0, 32632)
    names = {
        "Copernicus_DSM_COG_10_N46_00_E007_00_DEM.tif": True,
        "Copernicus_DSM_COG_10_N46_00_E007_00_WBM.tif": False,
        "ITS_LIVE_velocity_120m_RGI11A_0000_v02_v.tif": True,
        "ITS_LIVE_velocity_120m_RGI11A_0000_v02_vx.tif": False,
        "ITS_LIVE_velocity_120m_RGI11A_0000_v02_v_error.tif": False,
        "sub/N46E007_2010-01-01_2015-01-01_dhdt.tif": True,
        "sub/N46E007_2015-01-01_2020-01-01_dhdt.tif": False,
        "sub/N46E007_2010-01-01_2015-01-01_dhdt_err.tif": False,
        "other.TIF": True,
        "notes.txt": False,
    }
    for name in names:
        write(tmp_path / name, np.ones((3, 3), np.float32), grid.affine, "EPSG:32632", driver="GTiff")
    found = find_tiles(["."], tmp_path, setting="x", period=(2010, 2015))
    assert sorted(str(Path(t.href).relative_to(tmp_path)) for t in found.tiles) == sorted(
        k for k, v in names.items() if v
    )
    period = ElevationChangePeriod(path="sub", error_path="sub/*.tif", start=2010, end=2015)
    (errors,) = period_tiles(period, tmp_path, error_layer=True).tiles
    assert errors.href.endswith("N46E007_2010-01-01_2015-01-01_dhdt_err.tif")
    assert period_tiles(ElevationChangePeriod(path="sub", start=2010, end=2015), tmp_path, error_layer=True).tiles == []
    template = ElevationChangePeriod(path="sub/{lat}{lon}_{start}-01-01_{end}-01-01_dhdt.tif", start=2010, end=2015)
    touching = period_tiles(template, tmp_path).touching(grid)  # 46.0 N, 8.0 E: of four cells one has a tile
    assert [Path(t.href).name for t in touching] == ["N46E007_2010-01-01_2015-01-01_dhdt.tif"]


def test_settings_that_name_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in (("empty", "holds no .tif"), ("*.tif", "no file matches"), ("dem.tif", "does not exist")):
        with pytest.raises(TileError, match=message):
            find_tiles([source], tmp_path, setting="terrain.dem")
    write(
        tmp_path / "rotated.tif", np.ones((9, 9), np.float32), rasterio.Affine(10, 2, 6e5, 2, -10, 5.1e6), "EPSG:32632"
    )
    with pytest.raises(TileError, match=r"rotated\.tif is rotated"):
        read_mosaic([tmp_path / "rotated.tif"], grid_at(10.3, 46.0, 32632))


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    content = bytearray(np.random.default_rng(0).bytes(3_000_000))
    path.write_bytes(content)
    before = tiles.file_identity(path)
    path.touch()
    assert tiles.file_identity(path) == before
    content[-10] ^= 1
    path.write_bytes(content)
    assert tiles.file_identity(path) != before


def test_a_virtual_mosaic_changes_with_its_files(tmp_path: Path) -> None:
    grid = grid_at(8.0, 46.0, 32632, half_m=50)
    part = write(tmp_path / "part.tif", np.ones((10, 10), np.float32), grid.affine, "EPSG:32632")
    vrt = tmp_path / "all.vrt"
    vrt.write_text(
        f'<VRTDataset rasterXSize="10" rasterYSize="10"><SRS>EPSG:32632</SRS>'
        f"<GeoTransform>{', '.join(map(str, grid.affine.to_gdal()))}</GeoTransform>"
        f'<VRTRasterBand dataType="Float32" band="1"><SimpleSource><SourceFilename relativeToVRT="1">part.tif'
        f"</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert (read_elevation([vrt], grid) == 1).all()
    before = tiles.file_identity(vrt)
    write(part, np.full((10, 10), 7, np.float32), grid.affine, "EPSG:32632")
    tiles._identity.cache_clear()
    assert tiles.file_identity(vrt) != before


def test_search_blocks_cover_and_are_few() -> None:
    windows = [(6.9, 45.9, 7.1, 46.1), (9.5, 46.2, 9.6, 46.3), (179.9, -18.1, -179.9, -17.9)]
    blocks = search_blocks(windows)
    assert (5.0, 45.0, 10.0, 47.0) not in blocks and (6.0, 45.0, 10.0, 47.0) in blocks
    assert {(b[0], b[2]) for b in blocks if b[1] < 0} == {(179.0, 180.0), (-180.0, -179.0)}
    assert len(blocks) == 3


def test_items_of_a_catalog_become_tiles(four_tiles: Path) -> None:
    import datetime as dt

    items = []
    for path in sorted(four_tiles.glob("*.tif"), reverse=True):
        with rasterio.open(path) as source:
            box = list(source.bounds)
        item = pystac.Item(path.stem, None, box, dt.datetime(2021, 4, 22, tzinfo=dt.UTC), {})
        item.add_asset("data", pystac.Asset(str(path)))
        items.append(item)
    found = catalog_tiles(items, "data")
    assert [Path(t.href).stem for t in found] == sorted(path.stem for path in four_tiles.glob("*.tif"))
    with pytest.raises(CatalogError, match="no asset 'elevation'"):
        catalog_tiles(items, "elevation")
    grid = grid_at(8.0, 46.0, 32632)
    assert np.array_equal(
        read_elevation(TileIndex(found).touching(grid), grid),
        read_elevation(find_tiles(["."], four_tiles, setting="x").touching(grid), grid),
    )


# ------------------------------------------------------------------------------------------ over HTTP
@pytest.fixture(scope="module")
def served(four_tiles: Path) -> Iterator[tuple[str, list[str]]]:
    """The tiles over HTTP, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(four_tiles)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_url_template_reads_what_exists_and_leaves_out_the_sea(
    served: tuple[str, list[str]], four_tiles: Path, tmp_path: Path
) -> None:
    url, asked = served
    template = url + "/Copernicus_DSM_COG_10_{lat}_00_{lon}_00_DEM.tif"
    index = find_tiles([template], tmp_path, setting="terrain.dem")
    grid = grid_at(8.0, 46.0, 32632)
    found = read_elevation(index.touching(grid), grid)
    assert np.array_equal(found, read_elevation(find_tiles(["."], four_tiles, setting="x").touching(grid), grid))
    sea = grid_at(8.5, 40.5, 32632)
    (tile,) = index.touching(sea)
    assert tile.optional and np.isnan(read_elevation([tile], sea)).all()
    assert {Path(p).name for p in asked} == {p.name for p in four_tiles.glob("*.tif")} | {copernicus_name(40, 8)}
    with pytest.raises(TileError, match=copernicus_name(40, 8)):
        read_elevation([tile.href], sea)  # named by the user: it must exist
