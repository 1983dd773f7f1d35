"""Reading an inventory: what is kept, repaired, refused, and what is computed from the outlines."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pytest
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Geod
from shapely import Polygon, box

from dl4gam_assets.inventory import dated, outline_mask, read_date, read_inventory, utm_epsg_of
from dl4gam_assets.settings import InventoryColumns, InventorySettings, SettingsError

SETTINGS = InventorySettings(path="unused", columns=InventoryColumns(glacier_id="id", date="date", area_km2="area"))


def square(lon: float, lat: float, size: float = 0.01) -> shapely.Polygon:
    return shapely.box(lon, lat, lon + size, lat + size)


def written(folder: Path, rows: list[dict[str, Any]], crs: Any = "EPSG:4326") -> Path:
    path = folder / "inventory.geojson" if crs == "EPSG:4326" else folder / "inventory.gpkg"
    gpd.GeoDataFrame(rows, geometry="geometry", crs=crs).to_file(path)
    return path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2003-09", (2003, 9, 15)),
        ("20030899", (2003, 8, 15)),
        (20039999.0, (2003, 8, 15)),
        ("20030813", (2003, 8, 13)),
        (20030813, (2003, 8, 13)),
        ("2003-99-99", (2003, 8, 15)),
        (2016, (2016, 8, 15)),
        ("2016.0", (2016, 8, 15)),
        ("2015-08-29", (2015, 8, 29)),
        ("2015/08/29", (2015, 8, 29)),
        ("2015-08-29T10:30:00", (2015, 8, 29)),
        (pd.Timestamp("2015-08-29", tz="UTC"), (2015, 8, 29)),
        (dt.date(2015, 8, 29), (2015, 8, 29)),
        (-9999999, None),
        ("-9999999", None),
        ("", None),
        (None, None),
        (float("nan"), None),
        ("20151332", None),
        ("unknown", None),
    ],
)
def test_dates_are_read_as_inventories_write_them(value: Any, expected: tuple[int, int, int] | None) -> None:
    found = read_date(value)
    assert (None if found is None else (found.year, found.month, found.day)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2016, "year"),
        ("2016.0", "year"),
        (20169999, "year"),
        ("2016-99-99", "year"),
        ("20160899", "month"),
        ("2016/08/00", "month"),
        ("2016-08", "month"),
        ("20160815", "day"),
        ("2016-08-15T10:30:00", "day"),
        (pd.Timestamp("2016-08-15"), "day"),
    ],
)
def test_how_much_of_a_date_is_stated(value: Any, expected: str) -> None:
    assert dated(value) == (read_date(value), expected)
    assert read_date(value) is not None


def test_the_table_says_how_much_of_a_date_is_stated(tmp_path: Path) -> None:
    dates = ["2016", "20160899", "20160820", None]
    rows = [{"id": str(i), "date": d, "area": 1.0, "geometry": square(8 + i / 10, 46)} for i, d in enumerate(dates)]
    glaciers, _ = read_inventory(written(tmp_path, rows), SETTINGS)
    assert glaciers["inventory_date_precision"].fillna("").tolist() == ["year", "month", "day", ""]
    settings = SETTINGS.model_copy(update={"default_date": dt.date(2005, 11, 1)})
    assert read_inventory(written(tmp_path, rows), settings)[0]["inventory_date_precision"].iloc[3] == "day"


@pytest.mark.parametrize(
    ("lon", "lat", "expected"),
    [
        (8.0, 46.5, 32632),
        (6.0, 46.0, 32632),
        (5.999, 46.0, 32631),
        (-179.9, 66.0, 32601),
        (179.9, 66.0, 32660),
        (-73.1, -49.0, 32718),
        (86.9, 27.9, 32645),
        (170.1, -43.6, 32759),
        (190.0, 66.0, 32602),
    ],
)
def test_utm_zone_of_a_point(lon: float, lat: float, expected: int) -> None:
    assert utm_epsg_of(lon, lat) == expected


def test_one_bad_outline_never_stops_the_others(tmp_path: Path) -> None:
    bow_tie = shapely.Polygon([(8, 46), (8.02, 46.02), (8.02, 46), (8, 46.02)])
    path = written(
        tmp_path,
        [
            {"id": "good", "date": "20150829", "area": 0.8, "geometry": square(8.1, 46)},
            {"id": "bow-tie", "date": None, "area": None, "geometry": bow_tie},
            {"id": "good", "date": None, "area": None, "geometry": square(8.3, 46)},
            {"id": "none", "date": None, "area": None, "geometry": None},
            {"id": "empty", "date": None, "area": None, "geometry": shapely.Polygon()},
            {"id": "line", "date": None, "area": None, "geometry": shapely.LineString([(8, 46), (8.1, 46)])},
            {"id": "metres", "date": None, "area": None, "geometry": shapely.box(6e5, 5e6, 6.1e5, 5.1e6)},
            {"id": None, "date": None, "area": None, "geometry": square(8.4, 46)},
            {"id": "parts", "date": None, "area": None,
             "geometry": shapely.MultiPolygon([square(8.5, 46), square(8.6, 46, 0.0005)])},
        ],
    )  # fmt: skip
    glaciers, rejected = read_inventory(path, SETTINGS)
    assert glaciers["glacier_id"].tolist() == ["good", "bow-tie", "parts"]
    assert glaciers["glacier_int"].tolist() == [1, 2, 3]
    assert glaciers.geometry.is_valid.all()
    assert set(glaciers.geom_type) <= {"Polygon", "MultiPolygon"}
    assert shapely.area(glaciers.geometry.iloc[1]) == pytest.approx(0.02 * 0.02 / 2)
    why = rejected.set_index("glacier_id")["kind"].to_dict()
    assert why == {
        "good": "DuplicateId", "none": "EmptyGeometry", "empty": "EmptyGeometry", "line": "NotAPolygon",
        "metres": "BadCoordinates", "row 8": "NoId",
    }  # fmt: skip
    assert glaciers["stated_area_km2"].iloc[0] == 0.8
    assert glaciers["inventory_date"].iloc[0] == pd.Timestamp("2015-08-29")
    assert glaciers["inventory_date"].isna().tolist() == [False, True, True]


@pytest.mark.parametrize(("lon", "lat"), [(8.0, 46.5), (-73.2, -49.5), (86.9, 28.0), (-45.0, 70.0)])
def test_area_is_that_on_the_ellipsoid(tmp_path: Path, lon: float, lat: float) -> None:
    path = written(tmp_path, [{"id": 12.0, "geometry": square(lon, lat, 0.05)}])
    glaciers, rejected = read_inventory(path, SETTINGS)
    assert not len(rejected)
    row = glaciers.iloc[0]
    true_km2 = abs(Geod(ellps="WGS84").geometry_area_perimeter(square(lon, lat, 0.05))[0]) / 1e6
    assert row["inventory_area_km2"] == pytest.approx(true_km2, rel=2e-3)  # UTM's scale is 0.9996 to 1.0010
    assert row["glacier_id"] == "12"
    assert row["geometry"].contains(shapely.Point(row["lon"], row["lat"]))
    assert bool(row["modelled"])


def test_point_and_zone_are_those_of_the_ice_not_of_its_box(tmp_path: Path) -> None:
    ring = shapely.box(8, 46, 8.2, 46.2).difference(shapely.box(8.02, 46.02, 8.18, 46.18))
    glaciers, _ = read_inventory(written(tmp_path, [{"id": "ring", "geometry": ring}]), SETTINGS)
    row = glaciers.iloc[0]
    assert ring.contains(shapely.Point(row["lon"], row["lat"]))


def test_projected_files_and_small_glaciers(tmp_path: Path) -> None:
    shapes = [shapely.box(2_600_000, 1_150_000, 2_600_000 + a, 1_150_000 + 1000) for a in (99, 101)]
    path = written(tmp_path, [{"id": i, "geometry": s} for i, s in enumerate(shapes)], crs="EPSG:2056")
    glaciers, _ = read_inventory(path, SETTINGS)
    assert glaciers.crs == "EPSG:4326"
    assert glaciers["modelled"].tolist() == [False, True]
    assert glaciers["inventory_area_km2"].to_numpy() == pytest.approx([0.099, 0.101], rel=2e-3)


def test_defaults_fill_what_the_file_lacks(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"default_country": "NP", "default_date": dt.date(2005, 11, 1)})
    glaciers, _ = read_inventory(written(tmp_path, [{"id": "a", "geometry": square(86, 28)}]), settings)
    assert glaciers["country"].tolist() == ["NP"]
    assert glaciers["inventory_date"].tolist() == [pd.Timestamp("2005-11-01")]


def test_a_file_without_usable_outlines_gives_an_empty_table(tmp_path: Path) -> None:
    path = written(tmp_path, [{"id": "line", "geometry": shapely.LineString([(8, 46), (9, 46)])}])
    glaciers, rejected = read_inventory(path, SETTINGS)
    assert len(glaciers) == 0 and rejected["glacier_id"].tolist() == ["line"]


def test_files_that_can_not_be_used_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.gpkg does not exist"):
        read_inventory(tmp_path / "absent.gpkg", SETTINGS)
    (tmp_path / "broken.gpkg").write_bytes(b"no database")
    with pytest.raises(SettingsError, match=r"broken\.gpkg can not be read"):
        read_inventory(tmp_path / "broken.gpkg", SETTINGS)
    path = written(tmp_path, [{"RGIId": "a", "geometry": square(8, 46)}])
    with pytest.raises(SettingsError, match=r"no column 'id'.*the file has.*RGIId"):
        read_inventory(path, SETTINGS)
    with pytest.warns(UserWarning, match="crs"):
        path = written(tmp_path, [{"id": "a", "geometry": square(8, 46)}], crs=None)
    with pytest.raises(SettingsError, match="no coordinate reference system"):
        read_inventory(path, SETTINGS)


def test_real_rgi_outlines(real_data: Path) -> None:
    columns = InventoryColumns(glacier_id="rgi_id", date="src_date", area_km2="area_km2")
    settings = InventorySettings(path="unused", layer="rgi7_hef_complex", columns=columns)
    glaciers, rejected = read_inventory(real_data / "oetztal" / "outlines.gpkg", settings)
    assert len(glaciers) == 23 and not len(rejected)
    assert set(glaciers["utm_epsg"]) == {32632}
    assert glaciers["inventory_area_km2"].to_numpy() == pytest.approx(glaciers["stated_area_km2"].to_numpy(), rel=2e-3)
    assert glaciers["inventory_date"].dt.year.eq(2003).all()


def test_rows_of_one_glacier_are_united_where_the_settings_say_so(tmp_path: Path) -> None:
    """SGI2010 names 349 glaciers on several rows: parts that lie apart, or touch."""
    parts = [box(8.0, 46.0, 8.01, 46.01), box(8.01, 46.0, 8.02, 46.01), box(8.1, 46.0, 8.11, 46.02), None]
    frame = gpd.GeoDataFrame(
        {"glacier_id": ["A", "A", "B", "A"], "name": ["small", "large", "b", "none"], "geometry": parts},
        crs="EPSG:4326",
    )
    frame.loc[1, "geometry"] = box(8.01, 46.0, 8.03, 46.01)
    path = tmp_path / "parts.gpkg"
    frame.to_file(path)
    settings = InventorySettings(path="parts.gpkg")
    apart, rejected = read_inventory(path, settings)
    assert rejected["kind"].tolist() == ["DuplicateId", "DuplicateId"] and "merge_parts" in rejected["error"].iloc[0]
    merged, rejected = read_inventory(path, settings.model_copy(update={"merge_parts": True}))
    assert not len(rejected) and merged["glacier_id"].tolist() == ["A", "B"]
    a = merged.set_index("glacier_id").loc["A"]
    assert a["name"] == "large" and a["geometry"].equals(box(8.0, 46.0, 8.03, 46.01))
    both = apart.set_index("glacier_id").loc["A", "inventory_area_km2"]
    assert a["inventory_area_km2"] == pytest.approx(3 * both, rel=1e-3)


def test_outlines_of_a_second_inventory_are_burnt_onto_a_grid(tmp_path: Path) -> None:
    grid = GeoBox.from_bbox((400000, 5100000, 400400, 5100300), crs="EPSG:32632", resolution=10)
    near = box(400100, 5100100, 400200, 5100200)
    bow = Polygon([(400300, 5100000), (400400, 5100100), (400300, 5100100), (400400, 5100000)])  # touches itself
    far = box(500000, 5200000, 500100, 5200100)
    path = tmp_path / "second.gpkg"
    gpd.GeoDataFrame(geometry=[near, bow, far], crs="EPSG:32632").to_crs("EPSG:2056").to_file(path, layer="all")
    mask = outline_mask(path, "all", grid)
    assert mask.shape == (30, 40) and abs(mask[10:20, 10:20].sum() - 100) <= 2
    assert 40 <= mask[20:, 30:].sum() <= 60 and mask.sum() == mask[10:20, 10:20].sum() + mask[20:, 30:].sum()
    with pytest.raises(SettingsError, match=r"nothing\.gpkg does not exist"):
        outline_mask(tmp_path / "nothing.gpkg", None, grid)
