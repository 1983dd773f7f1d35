"""The demo region as files: complete, deterministic, and with the truth that it claims."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import shapely

from dl4gam_assets.synthetic import SimulationSummary, write_demo_region
from dl4gam_assets.synthetic.spectra import BANDS

SIZE, YEARS = (480, 520), (2015, 2022)


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimulationSummary]:
    folder = tmp_path_factory.mktemp("synthetic") / "demo"
    return folder, write_demo_region(folder, seed=3, years=YEARS, size_px=SIZE, workers=2)


def _content(folder: Path) -> dict[str, str]:
    """Hash of every file; GeoPackages and Parquet by their rows (their containers hold times and versions)."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".gpkg":
            frame = gpd.read_file(path)
            data = frame.to_wkb().to_csv(index=False).encode()
        elif path.suffix == ".parquet":
            data = pd.read_parquet(path).to_csv(index=False).encode()
        elif name == "simulation.json":
            stamp = json.loads(path.read_text(encoding="utf-8"))
            for key in ("seconds", "bytes"):
                stamp["summary"].pop(key)
            data = json.dumps(stamp, sort_keys=True).encode()
        else:
            data = path.read_bytes()
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def test_equal_seeds_give_equal_files_whatever_the_workers(
    region: tuple[Path, SimulationSummary], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    write_demo_region(again, seed=3, years=YEARS, size_px=SIZE, workers=1)
    assert _content(again) == _content(region[0])
    other = tmp_path / "other"
    write_demo_region(other, seed=8, years=(2015,), size_px=(400, 400))
    with rasterio.open(other / "dem.tif") as a, rasterio.open(region[0] / "dem.tif") as b:
        assert not np.array_equal(a.read(1), b.read(1))


def test_a_finished_folder_is_left_alone_and_a_foreign_one_refused(
    region: tuple[Path, SimulationSummary], tmp_path: Path
) -> None:
    folder, summary = region
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert write_demo_region(folder, seed=3, years=YEARS, size_px=SIZE) == summary
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == stamps
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds no simulation"):
        write_demo_region(tmp_path, seed=3, years=YEARS, size_px=SIZE)
    with pytest.raises(ValueError, match="baseline"):
        write_demo_region(tmp_path / "x", years=(2014, 2015), size_px=SIZE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]


def test_the_catalog_is_self_contained_and_its_items_say_what_the_files_are(
    region: tuple[Path, SimulationSummary],
) -> None:
    folder, summary = region
    catalog = pystac.Catalog.from_file(str(folder / "stac" / "catalog.json"))
    items = list(catalog.get_items(recursive=True))
    assert len(items) == summary.n_items == len({i.id for i in items})
    for item in items:
        raw = json.loads(Path(item.get_self_href()).read_text(encoding="utf-8"))
        assert all(not a["href"].startswith("/") for a in raw["assets"].values())
        assert all(not link["href"].startswith(("/", "http")) for link in raw["links"])
        p = item.properties
        assert p["simulated"] is True
        assert set(item.assets) == {*BANDS, "scl", "cloud_probability"}
        offset = -0.1 if item.datetime.year >= 2022 else 0.0
        item.make_asset_hrefs_absolute()
        valid = None
        for name, asset in item.assets.items():
            with rasterio.open(asset.href) as source:
                band = asset.extra_fields["raster:bands"][0]
                assert source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
                assert source.is_tiled and source.nodata == band["nodata"] and source.dtypes[0] == band["data_type"]
                assert list(source.shape) == asset.extra_fields["proj:shape"]
                assert list(source.transform)[:6] == asset.extra_fields["proj:transform"]
                assert source.crs.to_string() == p["proj:code"] == "EPSG:32632"
                if name in BANDS:
                    assert band["scale"] == 0.0001 and band["offset"] == offset
                if name == "red":
                    data = source.read(1)
                    valid = (data != 0).mean()
                    values = data[data != 0] * band["scale"] + band["offset"]
                    assert 0.02 < np.median(values) < 1.2
        assert valid is not None and abs((1 - valid) * 100 - p["s2:nodata_pixel_percentage"]) < 0.5
        footprint = shapely.from_geojson(json.dumps(item.geometry))
        ground = gpd.GeoSeries([footprint], crs=4326).to_crs(32632).area.iloc[0]
        assert ground == pytest.approx(valid * np.prod(p["proj:shape"]) * 100, rel=0.03)


def test_inventory_and_truth(region: tuple[Path, SimulationSummary]) -> None:
    folder, summary = region
    inventory = gpd.read_file(folder / "inventory.gpkg", layer="glaciers")
    assert inventory.crs.to_epsg() == 4326 and inventory.is_valid.all() and inventory.glacier_id.is_unique
    assert len(inventory) == summary.n_glaciers and inventory.area_km2.min() >= 0.01
    assert set(inventory.country) <= {"XN", "XS"}
    dates = {
        i.datetime.date().isoformat()
        for i in pystac.Catalog.from_file(str(folder / "stac/catalog.json")).get_items(recursive=True)
    }
    assert set(inventory.date) <= dates and all(d.startswith("2015-") for d in inventory.date)
    truth = {y: gpd.read_file(folder / "truth" / f"outlines_{y}.gpkg") for y in YEARS}
    for frame in (inventory.to_crs(32632), *truth.values()):
        overlap = frame.area.sum() - shapely.union_all(frame.geometry.to_numpy()).area
        assert abs(overlap) < 1.0, "outlines overlap"
    # A third of a pixel of digitizing noise, not more: areas agree to a few percent, shapes to 0.95.
    both = inventory.to_crs(32632).set_index("glacier_id").geometry
    true = truth[2015].set_index("glacier_id").geometry
    big = true.index[true.area > 5e4]
    iou = both[big].intersection(true[big]).area / both[big].union(true[big]).area
    assert iou.min() > 0.9 and iou.median() < 0.999
    areas = pd.read_parquet(folder / "truth" / "areas.parquet").pivot(
        index="glacier_id", columns="year", values="area_km2"
    )
    assert (areas[2022] < areas[2015]).all()
    assert areas.sum().to_dict() == pytest.approx(summary.area_km2, abs=1e-3)
    regional = json.loads((folder / "truth" / "regional.json").read_text(encoding="utf-8"))
    assert regional["rates"]["2022"]["rate_pct_per_year"] == pytest.approx(-1.9, abs=0.2)
    loss = 1 - areas[2022] / areas[2015]
    assert np.corrcoef(np.log(areas[2015]), loss)[0, 1] < -0.4, "small glaciers must lose relatively more"


def test_terrain_and_elevation_change(region: tuple[Path, SimulationSummary]) -> None:
    folder, _ = region
    glaciers = gpd.read_file(folder / "inventory.gpkg").to_crs(32632)
    for name in ("dhdt_2010_2015", "dhdt_2015_2020", "dhdt_2020_2025"):
        with rasterio.open(folder / f"{name}.tif") as source:
            assert source.nodata == -9999 and source.res == (100.0, 100.0) and source.crs.to_epsg() == 32632
            data = source.read(1, masked=True)
            ice = rasterio.features.geometry_mask(glaciers.geometry, data.shape, source.transform, invert=True)
        assert np.ma.mean(data[ice]) < -0.3 and abs(np.ma.mean(data[~ice])) < 0.15
    with rasterio.open(folder / "dem.tif") as source:
        assert source.crs.to_epsg() == 4326 and source.nodata == -9999
        assert source.res == pytest.approx((1 / 3600, 1 / 3600))
        dem = source.read(1, masked=True)
        assert dem.mask.mean() < 0.2 and 500 < dem.min() < dem.max() < 4500
        frame = glaciers.to_crs(4326)
        ice = rasterio.features.geometry_mask(frame.geometry, dem.shape, source.transform, invert=True)
        assert np.ma.median(dem[ice]) > np.ma.median(dem[~ice])
    debris = [gpd.read_file(folder / f"debris_{k}.gpkg") for k in "ab"]
    a, b = (shapely.union_all(d.to_crs(32632).geometry.to_numpy()) for d in debris)
    assert 0 < a.intersection(b).area < max(a.area, b.area), "two sources, partly overlapping"
