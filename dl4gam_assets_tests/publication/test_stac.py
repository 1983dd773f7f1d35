from __future__ import annotations

import json
import shutil
from pathlib import Path

import geopandas as gpd
import pystac
import pytest
import rasterio
import shapely

from dl4gam_assets.publication import write_stac
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.publication.conftest import fill


@pytest.fixture(scope="module")
def own(region: Region, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = fill(Storage(tmp_path_factory.mktemp("stac")), region)
    assert write_stac(storage, region, 2023, storage.path("stac", "year=2023")) == 9
    return storage


def read(storage: Storage) -> pystac.Catalog:
    return pystac.Catalog.from_file(str(storage.path("stac", "year=2023", "catalog.json")))


def test_the_catalog_opens_with_pystac_and_leads_to_every_map(own: Storage) -> None:
    catalog = read(own)
    items = list(catalog.get_items(recursive=True))
    assert len(items) == 9 and len({i.id for i in items}) == 9
    collection = next(iter(catalog.get_children()))
    outlines = gpd.read_parquet(collection.assets["outlines"].get_absolute_href())
    assert set(outlines["bound"]) == {"best", "lower", "upper"}
    for item in items:
        assert item.get_collection().id == collection.id and item.get_root().id == catalog.id
        with rasterio.open(item.assets["prediction"].get_absolute_href()) as source:
            assert item.properties["proj:code"] == f"EPSG:{source.crs.to_epsg()}"
            assert item.properties["proj:shape"] == [source.height, source.width]
            assert item.properties["proj:transform"] == list(source.transform)[:6]
            box = rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds)
        assert shapely.box(*box).buffer(1e-6).contains(shapely.geometry.shape(item.geometry))
        assert item.bbox == pytest.approx(shapely.geometry.shape(item.geometry).bounds, abs=1e-6)
        assert item.datetime.date().isoformat() == "2023-08-25"
        p = item.properties
        assert p["dl4gam:lower_km2"] <= p["dl4gam:area_km2"] <= p["dl4gam:upper_km2"]
        assert p["dl4gam:tag"] == "simulated"


def test_every_link_is_relative_so_that_the_store_can_move(own: Storage, tmp_path: Path) -> None:
    folder = Path(str(own.path("stac", "year=2023")))
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        hrefs = [link["href"] for link in content["links"]] + [a["href"] for a in content.get("assets", {}).values()]
        assert hrefs and all(h.startswith(("./", "../")) for h in hrefs), (file.name, hrefs)
        assert str(own.root) not in file.read_text()
    moved = tmp_path / "moved"
    shutil.copytree(str(own.root), moved)
    items = list(read(Storage(moved)).get_items(recursive=True))
    assert all(Path(i.assets["prediction"].get_absolute_href()).is_relative_to(moved) for i in items)
    assert all(Path(i.assets["prediction"].get_absolute_href()).is_file() for i in items)


def test_documents_fit_the_stac_schemas_that_pystac_ships(own: Storage) -> None:
    pytest.importorskip("jsonschema", reason="validation needs jsonschema (pip install pystac[validation])")
    from pystac.validation.stac_validator import JsonSchemaSTACValidator

    folder = Path(str(own.path("stac", "year=2023")))
    validator = JsonSchemaSTACValidator()
    kinds = {"Feature": pystac.STACObjectType.ITEM, "Collection": pystac.STACObjectType.COLLECTION,
             "Catalog": pystac.STACObjectType.CATALOG}  # fmt: skip
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        validator.validate_core(content, kinds[content["type"]], content["stac_version"])
        assert content["stac_version"] == "1.1.0"
    broken = json.loads(next((folder / "items").glob("*.json")).read_text())
    del broken["properties"]["datetime"]
    with pytest.raises(pystac.errors.STACValidationError):
        validator.validate_core(broken, pystac.STACObjectType.ITEM, "1.1.0")


def test_writing_again_drops_items_of_maps_that_are_gone_and_names_missing_ones(own: Storage, region: Region) -> None:
    folder = own.path("stac", "again")
    write_stac(own, region, 2023, folder)
    before = {f.name: f.read_text() for f in Path(str(folder)).rglob("*.json")}
    (folder / "items" / "stale.json").write_text("{}")
    write_stac(own, region, 2023, folder)
    assert {f.name: f.read_text() for f in Path(str(folder)).rglob("*.json")} == before
    path = Path(str(own.prediction(2023, "G05/a")))
    hidden = path.rename(path.with_suffix(".hidden"))
    try:
        with pytest.raises(FileNotFoundError, match="G05"):
            write_stac(own, region, 2023, folder)
    finally:
        hidden.rename(path)
