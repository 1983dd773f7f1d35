"""Vector files from outside, read as what their name says and nothing else.

Belongs here: opening inventories, debris, reference outlines and footprints by pyogrio. Does not belong here: what
their columns mean.

GDAL chooses a driver by the content of a file. ``inventory.gpkg`` may hold a description (OGR VRT, WFS and the like)
that leads to any other file of this machine, or to any host. So a file's beginning has to be that of its suffix's
format before GDAL sees it, and the driver that opened it one of that format.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import geopandas as gpd

#: Suffix -> beginnings that its files have (empty: see ``_TEXT``), and drivers that may read them.
_FORMATS: dict[str, tuple[tuple[bytes, ...], frozenset[str]]] = {
    ".gpkg": ((b"SQLite format 3\0",), frozenset({"GPKG"})),
    ".sqlite": ((b"SQLite format 3\0",), frozenset({"SQLite", "GPKG"})),
    ".shp": ((b"\x00\x00\x27\x0a",), frozenset({"ESRI Shapefile"})),
    ".fgb": ((b"fgb",), frozenset({"FlatGeobuf"})),
    ".zip": ((b"PK",), frozenset({"ESRI Shapefile", "GPKG", "GeoJSON", "FlatGeobuf", "OpenFileGDB", "KML", "LIBKML"})),
    ".kmz": ((b"PK",), frozenset({"LIBKML"})),
    ".geojson": ((b"{",), frozenset({"GeoJSON", "GeoJSONSeq"})),
    ".geojsonl": ((b"{", b"\x1e"), frozenset({"GeoJSONSeq", "GeoJSON"})),
    ".json": ((b"{",), frozenset({"GeoJSON", "GeoJSONSeq", "TopoJSON", "ESRIJSON"})),
    ".kml": ((b"<",), frozenset({"KML", "LIBKML"})),
    ".gml": ((b"<",), frozenset({"GML"})),
    ".gdb": ((), frozenset({"OpenFileGDB"})),
}
#: Formats of text, which may begin with blanks or a mark of their encoding.
_TEXT = frozenset({".geojson", ".geojsonl", ".json", ".kml", ".gml"})
#: Elements of the descriptions that lead elsewhere, as GDAL looks for them.
_LEADS = re.compile(rb"<ogr[a-z_]|<vrt|<gdal_wms|<wfs_|networklink", re.IGNORECASE)
_BEGINNING = 1 << 16


class VectorFormatError(ValueError):
    """A file that is not what its suffix says. The message names it and the formats that are read."""


def vector_info(path: Path, **options: Any) -> dict[str, Any]:
    """``pyogrio.read_info`` of a file that is what its suffix says.

    Raises
    ------
    VectorFormatError
        if it is not.
    """
    import pyogrio

    _expect_beginning(path)
    found: dict[str, Any] = pyogrio.read_info(path, **options)
    drivers = _FORMATS[path.suffix.lower()][1]
    if found["driver"] not in drivers:
        raise VectorFormatError(f"{path} is a file of {found['driver']}, not of {' or '.join(sorted(drivers))}")
    return found


def read_vector(path: Path, **options: Any) -> gpd.GeoDataFrame:
    """``geopandas.read_file`` of a file that is what its suffix says; raises VectorFormatError where it is not."""
    vector_info(path, **{key: value for key, value in options.items() if key == "layer" and value is not None})
    frame: gpd.GeoDataFrame = gpd.read_file(path, **options)
    return frame


def _expect_beginning(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join([*sorted(_FORMATS), ".parquet"])
        raise VectorFormatError(f"{path}: files named {suffix or 'without a suffix'} are not read; known are {known}")
    if path.is_dir():  # a geodatabase
        if suffix != ".gdb":
            raise VectorFormatError(f"{path} is a folder, not a file")
        return
    with open(path, "rb") as file:
        beginning = file.read(_BEGINNING)
    plain = beginning.removeprefix(b"\xef\xbb\xbf").lstrip() if suffix in _TEXT else beginning
    if not plain.startswith(_FORMATS[suffix][0]) or (plain.startswith(b"<") and _LEADS.search(beginning)):
        raise VectorFormatError(f"{path} does not begin as a file named {suffix} does: is it another format?")
