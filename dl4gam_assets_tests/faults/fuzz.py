"""Parsers of what comes from outside, given nonsense.

Belongs here: for each parser the bytes of a valid input and a call that may end well, or in the error that it promises.
Does not belong here: what makes the nonsense (``test_fuzz`` by hypothesis, ``guided`` by atheris).
"""

from __future__ import annotations

import datetime as dt
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import rasterio
import shapely
import torch
from odc.geo.geobox import GeoBox

from dl4gam_assets.imagery.catalogs import CatalogError, _item, open_catalog, read_items
from dl4gam_assets.imagery.ranking import read_overrides
from dl4gam_assets.imagery.reading import read_image
from dl4gam_assets.imagery.sources import SceneError, forget_files
from dl4gam_assets.inventory import read_inventory, sgi
from dl4gam_assets.inventory.debris import read_debris
from dl4gam_assets.inventory.reading import outline_mask, read_date
from dl4gam_assets.published import (
    PublishedFileError,
    channels_of,
    read_settings,
    read_splits,
    read_statistics,
    read_weights,
    unpack_cubes,
)
from dl4gam_assets.segmentation.files import ModelFileError, load_member
from dl4gam_assets.settings import (
    DebrisSource,
    ImagerySettings,
    InventoryColumns,
    InventorySettings,
    SensorSettings,
    SettingsError,
    StacApi,
    StacFolder,
    StacGeoparquet,
    load_region,
)
from dl4gam_assets.storage import DamagedFileError, Storage, StoreFormatError
from dl4gam_assets.terrain import read_elevation, read_mosaic, read_velocity
from dl4gam_assets.terrain.tiles import Tile, describe

SENSOR = SensorSettings(bands={"red": "red"}, scale=0.0001, offset=0.0, nodata=0)
CATALOG = {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "description": "d", "links": []}
GEOBOX = GeoBox((40, 40), rasterio.Affine(10, 0, 6.001e5, 0, -10, 4.9999e6), "EPSG:32632")
GLACIERS = pd.DataFrame({"glacier_id": ["a", "b"], "modelled": [True, True]})


@dataclass(frozen=True)
class Parser:
    """A valid input, the file name that it gets, and the reader of that file."""

    valid: bytes
    name: str
    read: Callable[[Path], Any]
    promised: tuple[type[Exception], ...]


def _inventory_file(folder: Path, suffix: str) -> bytes:
    boxes = [shapely.box(8, 46, 8.01, 46.01), shapely.box(9, 46, 9.01, 46.01)]
    frame = gpd.GeoDataFrame({"id": ["a", "b"], "date": ["20150829", "2016"]}, geometry=boxes, crs=4326)
    path = folder / f"valid{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        drivers = {".geojson": "GeoJSON", ".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".kml": "KML", ".gml": "GML"}
        frame.to_file(path, driver=drivers[suffix])
    return path.read_bytes()


def _checkpoint() -> bytes:
    weights = {f"model.seg_model.layer{i}.weight": torch.arange(6.0).reshape(2, 3) for i in range(3)}
    content = io.BytesIO()
    torch.save({"state_dict": weights, "epoch": 3, "pytorch-lightning_version": "2.4.0"}, content)
    return content.getvalue()


def _items_file(item: dict[str, Any], folder: Path) -> bytes:
    """A stac-geoparquet file of one item."""
    shape = shapely.geometry.shape(item["geometry"])
    row = {
        "id": item["id"], "geometry": shape.wkb, "assets": {"red": {"href": item["assets"]["red"]["href"]}},
        "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(float, item["bbox"]), strict=True)),
        "datetime": dt.datetime(2016, 8, 14, 10, 20, 30, tzinfo=dt.UTC),
    }  # fmt: skip
    path = folder / "items.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert len(_read_geoparquet(path)) == 1
    return path.read_bytes()


def _tif(folder: Path) -> bytes:
    path = folder / "valid.tif"
    data = np.arange(64 * 64, dtype="uint16").reshape(1, 64, 64)
    with rasterio.open(
        path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16", crs="EPSG:32632", compress="deflate",
        transform=rasterio.Affine(10, 0, 6e5, 0, -10, 5e6),
    ) as target:  # fmt: skip
        target.write(data)
    return path.read_bytes()


def _read_inventory(path: Path) -> Any:
    columns = InventoryColumns(glacier_id="id", date="date")
    return read_inventory(path, InventorySettings(path="unused", columns=columns))


def _read_item(path: Path) -> Any:
    """As a server would give it: what is no JSON object never gets this far."""
    try:
        feature = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    settings = StacApi(url="https://example.org", collections=["c"])
    return _item(feature, settings) if isinstance(feature, dict) else None


def _read_catalog(path: Path) -> Any:
    catalog = open_catalog(StacFolder(path=path.name), path.parent, SENSOR)
    return catalog.search((8, 46, 9, 47), dt.date(2016, 7, 1), dt.date(2016, 9, 30))


def _read_linked_item(path: Path) -> Any:
    """An item of a catalog on disk."""
    link = {"rel": "item", "href": f"./{path.name}", "type": "application/geo+json"}
    catalog = path.parent / "catalog.json"
    catalog.write_text(json.dumps({**CATALOG, "links": [link]}))
    return _read_catalog(catalog)


def _read_geoparquet(path: Path) -> Any:
    catalog = open_catalog(StacGeoparquet(path=path.name), path.parent, SENSOR)
    return catalog.search((8, 46, 9, 47), dt.date(2016, 7, 1), dt.date(2016, 9, 30))


def _read_scene(path: Path) -> Any:
    item = pystac.Item("scene", None, [8, 46, 9, 47], dt.datetime(2016, 8, 14, tzinfo=dt.UTC), {})
    item.add_asset("red", pystac.Asset(str(path)))
    return read_image([item], ImagerySettings(sensor=SENSOR, catalog=StacFolder(path="unused")), GEOBOX)


def _read_index(path: Path) -> Any:
    """A stored search: JSON, an item a line."""
    return read_items(path).search((8, 46, 9, 47), dt.date(2016, 7, 1), dt.date(2016, 9, 30))


def _read_tile(reader: Callable[[list[Tile], GeoBox], Any]) -> Callable[[Path], Any]:
    """A tile of a DEM, of dh/dt or of velocities on a glacier's grid."""
    return lambda path: reader([describe(str(path))], GEOBOX)


def _outlines() -> gpd.GeoDataFrame:
    box = shapely.box(8.001, 46.001, 8.009, 46.009)
    return gpd.GeoDataFrame({"glacier_id": ["a"], "utm_epsg": [32632]}, geometry=[box], crs=4326)


def _read_debris(value: int | None) -> Callable[[Path], Any]:
    return lambda path: read_debris([DebrisSource(path=path.name, raster_value=value)], path.parent, _outlines())


def _read_archive(path: Path) -> Any:
    """An archive of cubes; nothing may appear beside the folder that it is unpacked to."""
    before = set(path.parent.iterdir())
    try:
        return unpack_cubes(path, path.parent / "unpacked")
    finally:
        shutil.rmtree(path.parent / "unpacked", ignore_errors=True)
        assert set(path.parent.iterdir()) == before, "written outside"


def _archive() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("cubes/a/2016-08-14.nc", "cubes/b/2016-08-14.nc"):
            entry = tarfile.TarInfo(name)
            entry.size = 600
            tar.addfile(entry, io.BytesIO(bytes(range(200)) * 3))
    return content.getvalue()


def _read_swiss(path: Path) -> Any:
    """The table of the Swiss inventory, beside its other raw files."""
    return sgi.read_raw(path.parent)


def _swiss_file(name: str, folder: Path) -> bytes:
    """One of the raw files of the Swiss inventory; all of them are made in the folder."""
    frame = gpd.GeoDataFrame({"sgi-id": ["A1"], "name": ["a"]}, geometry=[shapely.box(0, 0, 9, 9)], crs=2056)
    for file in (sgi.BODIES, sgi.DIVIDES, sgi.LOCATIONS):
        frame.to_file(folder / file, driver="GPKG")
    (folder / sgi.ATTRIBUTES).write_text("sgi-id,name,year_acq,area_km2\nA1,a,2016,1.5\n")
    return (folder / name).read_bytes()


def _read_member(path: Path) -> Any:
    return load_member(Storage(path.parent), Storage(path.parent).root)


def parsers(folder: Path, member: Path | None = None) -> dict[str, Parser]:
    """All parsers, with valid inputs that are made in ``folder``."""
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": "scene", "collection": "c", "links": [],
        "geometry": shapely.geometry.mapping(shapely.box(8, 46, 9, 47)), "bbox": [8, 46, 9, 47],
        "properties": {"datetime": "2016-08-14T10:20:30Z", "proj:code": "EPSG:32632"},
        "assets": {"red": {"href": "https://example.org/a.tif", "raster:bands": [{"scale": 0.0001, "offset": 0}]}},
    }  # fmt: skip
    region = Path(__file__).parents[2] / "dl4gam_assets" / "regions" / "oetztal.yaml"
    overrides = "glacier_id,year,date,remark\na,2016,2016-08-14,clear\nb,2016,reject,snow\n"
    found = {
        f"inventory{suffix}": Parser(_inventory_file(folder, suffix), f"i{suffix}", _read_inventory, (SettingsError,))
        for suffix in (".parquet", ".geojson", ".gpkg", ".fgb", ".kml", ".gml")
    }
    found |= {
        "date": Parser(b"2015-08-29", "d.txt", lambda p: read_date(p.read_bytes().decode("latin-1")), ()),
        "overrides.csv": Parser(
            overrides.encode(), "o.csv", lambda p: read_overrides(p, GLACIERS, [2015, 2016], 2015), (SettingsError,)
        ),
        "region.yaml": Parser(region.read_bytes(), "r.yaml", load_region, (SettingsError,)),
        "item.json": Parser(json.dumps(item).encode(), "i.json", _read_item, ()),
        "catalog.json": Parser(json.dumps(CATALOG).encode(), "c.json", _read_catalog, (CatalogError,)),
        "linked-item.json": Parser(json.dumps(item).encode(), "l.json", _read_linked_item, (CatalogError,)),
        "items.parquet": Parser(_items_file(item, folder), "i.parquet", _read_geoparquet, (CatalogError,)),
        "state.json": Parser(
            b'{"input": "a", "output": "b"}', "s.json", lambda p: Storage(p.parent).read_json(Storage(p).root),
            (DamagedFileError,),
        ),
        "store.json": Parser(
            b'{"format": 1, "written_by": "0.1.0"}', "store.json", lambda p: Storage(p.parent).check_format(),
            (StoreFormatError,),
        ),
        "scene.tif": Parser(_tif(folder), "scene.tif", _read_scene, (SceneError,)),
        "splits.csv": Parser(
            b"entry_id,split_1,split_2\na,fold_test,fold_train\nb,fold_valid,fold_test\n", "m.csv",
            lambda p: read_splits(p, 2), (PublishedFileError,),
        ),
        "statistics.csv": Parser(
            b"var_name,mu,stddev,vmin,vmax\nR,2000.5,510.25,0,9000\ndem,2500,300,1000,4000\n", "s.csv",
            lambda p: read_statistics(p, ["red", "dem", "ndsi"]), (PublishedFileError,),
        ),
        "settings.yaml": Parser(
            b"model:\n  name: Unet\n  inputs: {bands_input: [R, G], dem: true, optical_indices: [NDSI]}\n", "s.yaml",
            lambda p: channels_of(read_settings(p)), (PublishedFileError,),
        ),
        "checkpoint.ckpt": Parser(_checkpoint(), "c.ckpt", read_weights, (PublishedFileError,)),
    }  # fmt: skip
    found |= {
        "items.jsonl": Parser(json.dumps(item).encode() + b"\n", "i.jsonl", _read_index, (CatalogError,)),
        "dem.tif": Parser(_tif(folder), "dem.tif", _read_tile(read_elevation), (OSError,)),
        "dhdt.tif": Parser(_tif(folder), "dhdt.tif", _read_tile(read_mosaic), (OSError,)),
        "velocity.tif": Parser(_tif(folder), "v.tif", _read_tile(read_velocity), (OSError,)),
        "debris.gpkg": Parser(_inventory_file(folder, ".gpkg"), "d.gpkg", _read_debris(None), (SettingsError,)),
        "debris.tif": Parser(_tif(folder), "d.tif", _read_debris(7), (SettingsError,)),
        "reference.gpkg": Parser(
            _inventory_file(folder, ".gpkg"), "r.gpkg", lambda p: outline_mask(p, None, GEOBOX), (SettingsError,)
        ),
        "cubes.tar": Parser(_archive(), "c.tar", _read_archive, (PublishedFileError,)),
        "swiss.csv": Parser(_swiss_file(sgi.ATTRIBUTES, folder), sgi.ATTRIBUTES, _read_swiss, (SettingsError,)),
        "swiss.gpkg": Parser(_swiss_file(sgi.DIVIDES, folder), sgi.DIVIDES, _read_swiss, (SettingsError,)),
    }  # fmt: skip
    if member is not None:
        for name in ("model.json", "model.safetensors"):
            found[name] = Parser((member / name).read_bytes(), name, _read_member, (ModelFileError,))
    return found


def attempt(parser: Parser, content: bytes, folder: Path) -> None:
    """Read ``content``; raises what the parser does not promise."""
    path = folder / parser.name
    path.write_bytes(content)
    try:
        parser.read(path)
    except parser.promised as error:
        assert str(error).strip(), "an error without words"
    finally:
        forget_files()
