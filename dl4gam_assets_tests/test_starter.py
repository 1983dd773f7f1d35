"""`dl4gam new`: a first region file from an inventory."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import pytest
from shapely import Point, box
from typer.testing import CliRunner

from dl4gam_assets.cli import app
from dl4gam_assets.settings import load_region
from dl4gam_assets.starter import guess_columns

RGI7 = ["rgi_id", "o1region", "glims_id", "src_date", "cenlon", "area_km2", "glac_name", "geometry"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["RGIId", "GLIMSId", "BgnDate", "Area", "Name"], ["RGIId", "Name", None, "BgnDate", "Area"]),
        (RGI7, ["rgi_id", "glac_name", None, "src_date", "area_km2"]),
        (["sgi-id", "country_code"], ["sgi-id", None, "country_code", None, None]),
        (["fid", "what"], [None] * 5),
    ],
)
def test_columns_of_known_inventories_are_found(names: list[str], expected: list[str | None]) -> None:
    assert list(guess_columns(names).values()) == expected


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    shapes = [box(8, 46, 8.02, 46.02), box(8.1, 46, 8.1005, 46.0005), Point(8, 46)]
    frame = gpd.GeoDataFrame(
        {"rgi_id": ["A", "B", "C"], "src_date": ["2015-08-29T00:00:00"] * 3}, geometry=shapes, crs="EPSG:4326"
    )
    path = tmp_path / "outlines.geojson"
    frame.to_file(path)
    return path


def test_a_region_file_is_written_that_loads(inventory: Path, tmp_path: Path) -> None:
    file = tmp_path / "my_range.yaml"
    ran = CliRunner().invoke(
        app, ["new", str(file), "--inventory", str(inventory), "--first", "2015", "--last", "2024"]
    )
    assert ran.exit_code == 0, ran.output
    assert "2 glaciers" in ran.output and "1 of at least 0.1 km2" in " ".join(ran.output.split())
    assert "left out: C: the outline is a Point" in ran.output
    region = load_region(file)
    assert region.name == "my_range" and region.years.baseline == 2015 and region.years.last == 2024
    assert region.inventory.columns.glacier_id == "rgi_id" and region.inventory.columns.date == "src_date"
    assert region.imagery.sensor.scene_classification == "scl" and region.terrain.has_dem
    again = CliRunner().invoke(app, ["new", str(file), "--inventory", str(inventory)])
    assert again.exit_code == 1 and "exists already" in again.output


def test_what_is_wrong_is_said(inventory: Path, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        ran = CliRunner().invoke(app, ["new", str(tmp_path / "a.yaml"), *arguments])
        assert ran.exit_code == 1 and not (tmp_path / "a.yaml").exists()
        return " ".join(ran.output.split())

    assert "there is no inventory" in error("--inventory", str(tmp_path / "no.gpkg"))
    assert "did you mean 'earth-search-sentinel-2-l2a'" in error(
        "--inventory", str(inventory), "--preset", "earthsearch-sentinel-2-l2a"
    )
    assert "there is no column 'nope'" in error("--inventory", str(inventory), "--id-column", "nope")
    (tmp_path / "text.gpkg").write_text("no vectors")
    assert "can not be read as vector data" in error("--inventory", str(tmp_path / "text.gpkg"))
    bad = CliRunner().invoke(app, ["new", str(tmp_path / "My Range.yaml"), "--inventory", str(inventory)])
    assert bad.exit_code == 1 and "a region's name is lower case letters" in " ".join(bad.output.split())
