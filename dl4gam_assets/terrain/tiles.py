"""Tiles of elevation, elevation change and velocity: where they are, and which of them touch a glacier.

Belongs here: turning what the settings name (files, folders, globs, templates of 1 x 1 degree tiles, STAC items) into
an index of tiles, its spatial search, the identity of files. Does not belong here: reading pixels (``reading``).

An index is built once, from the headers of the files or, for a template, from the names of the tiles; it is plain JSON,
so that worker processes need not look at any file again to know which few of them to open.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import rasterio.errors
import rasterio.warp
import shapely

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

#: Metres around a grid in which tiles are looked for: two pixels of the coarsest common data set (ITS_LIVE, 240 m).
MARGIN_M = 500.0
_BLOCK = 64 * 1024
_EVERYWHERE = (-180.0, -90.0, 180.0, 90.0)
_CELL = re.compile(r"(?<![A-Za-z])([NS])(\d{2})(?:_00_)?([EW])(\d{3})")
_HUGONNET = re.compile(r"_(\d{4})-\d\d-\d\d_(\d{4})-\d\d-\d\d_(dhdt(?:_err)?)\.tiff?$")


class TileError(OSError):
    """A tile, or the setting that names tiles, can not be used. The message names it and says what to do."""


@dataclass(frozen=True)
class Tile:
    """One raster file.

    Attributes
    ----------
    href : path, URL, or GDAL's virtual path
    box : west, south, east, north in degrees (west > east crosses the antimeridian)
    identity : changes when the content does; goes into fingerprints
    optional : it may be absent (a tile of a template over the sea)
    """

    href: str
    box: tuple[float, float, float, float] = _EVERYWHERE
    identity: str = ""
    optional: bool = False


class TileIndex:
    """Tiles and templates of tiles with a spatial index.

    Parameters
    ----------
    tiles : in the order of mosaicking, the first that has a value wins
    templates : addresses with ``{lat}`` and ``{lon}`` of tiles of 1 x 1 degree; they come after the tiles
    """

    def __init__(self, tiles: Sequence[Tile] = (), templates: Sequence[str] = ()):
        self.tiles = list(tiles)
        self.templates = list(templates)
        self._tree = shapely.STRtree([boxes(tile.box) for tile in self.tiles])

    def touching(self, geobox: GeoBox) -> list[Tile]:
        """Tiles that may hold pixels of a grid or of its surroundings of 500 m, in order.

        A tile of a template on disk is only named if it exists; one at a URL is ``optional``.
        """
        window = grid_box(geobox)
        hits = self._tree.query(boxes(window), predicate="intersects") if self.tiles else []
        found = [self.tiles[i] for i in sorted(hits)]
        for template in self.templates:
            for lat, lon in degree_cells(window):
                href = fill_template(template, lat, lon)
                if is_url(href):
                    found.append(Tile(href, (lon, lat, lon + 1, lat + 1), href, optional=True))
                elif Path(href).is_file():
                    found.append(Tile(href, (lon, lat, lon + 1, lat + 1), file_identity(Path(href))))
        return found

    @property
    def signature(self) -> str:
        """Hash of everything in the index."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The index as text, stable."""
        return json.dumps(
            {"tiles": [dataclasses.astuple(t) for t in self.tiles], "templates": self.templates}, sort_keys=True
        )

    @classmethod
    def from_json(cls, text: str) -> TileIndex:
        """Inverse of :meth:`to_json`."""
        raw = json.loads(text)
        return cls([Tile(t[0], tuple(t[1]), *t[2:]) for t in raw["tiles"]], raw["templates"])


def find_tiles(
    sources: Iterable[str],
    data_root: Path,
    *,
    setting: str,
    period: tuple[int, int] | None = None,
    error_layer: bool = False,
) -> TileIndex:
    """Index of the tiles that settings name.

    Parameters
    ----------
    sources : each a file, a folder (searched with its subfolders for ``.tif``), a glob pattern, or an address with
        ``{lat}`` and ``{lon}``, which stand for the lower left corner of a tile of 1 x 1 degree as in ``N46`` and
        ``E007``; paths are relative to ``data_root``; addresses may be URLs or GDAL's virtual paths. ``{start}`` and
        ``{end}`` stand for the years of ``period``.
    setting : its key, for messages
    period : years of a dh/dt period. Of files that are named as Hugonnet et al. (2021) name theirs
        (``N46E007_2010-01-01_2015-01-01_dhdt.tif``), folders and globs give only those of the period.
    error_layer : take the files of errors (``..._dhdt_err.tif``) instead of those of values

    Folders and globs leave out what lies beside the data in the usual downloads: masks of Copernicus DEM tiles,
    components and errors of ITS_LIVE velocities.

    Raises
    ------
    TileError
        if a file is absent, or a folder or pattern holds no raster.
    """

    def keep(name: str) -> bool:
        return _is_data(name, period, error_layer)

    tiles: list[Tile] = []
    templates: list[str] = []
    seen: set[str] = set()
    for source in sources:
        text = source
        if period is not None:
            text = text.replace("{start}", str(period[0])).replace("{end}", str(period[1]))
        where = text if is_url(text) else str(data_root / text)
        if "{lat}" in where and "{lon}" in where:
            templates.append(where)
            continue
        paths = [where] if is_url(where) else [str(p) for p in _expand(where, keep, setting)]
        for path in paths:
            if path not in seen:
                seen.add(path)
                tiles.append(describe(path))
    return TileIndex(tiles, templates)


def _expand(where: str, keep: Callable[[str], bool], setting: str) -> list[Path]:
    path = Path(where)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in {".tif", ".tiff"} and keep(p.name))
        if not found:
            raise TileError(f"folder {path} ({setting}) holds no .tif that belongs there; download the tiles into it")
        return found
    if glob.has_magic(where):
        found = sorted(p for p in map(Path, glob.glob(where, recursive=True)) if p.is_file() and keep(p.name))
        if not found:
            raise TileError(f"no file matches {where} ({setting}); correct the pattern or download the files")
        return found
    raise TileError(f"input file {path} ({setting}) does not exist; correct the path, or remove it from the settings")


def _is_data(name: str, period: tuple[int, int] | None, error_layer: bool) -> bool:
    """Whether a file of a folder is one of the layer that is wanted, as far as well-known names tell."""
    hugonnet = _HUGONNET.search(name)
    if hugonnet:
        start, end, kind = hugonnet.groups()
        return (kind == "dhdt_err") == error_layer and (period is None or (int(start), int(end)) == period)
    if name.startswith("Copernicus_DSM_"):
        return Path(name).stem.endswith("_DEM")
    if name.startswith("ITS_LIVE_velocity"):
        return Path(name).stem.endswith("_v")
    return True


def describe(href: str) -> Tile:
    """A tile with its box, from its header; a broken file is taken to lie where its name says, or everywhere."""
    identity = href if is_url(href) else file_identity(Path(href))
    return Tile(href, _box(href, identity), identity)


@functools.lru_cache(maxsize=65536)
def _box(href: str, identity: str) -> tuple[float, float, float, float]:
    boxes_read: list[tuple[float, float, float, float]] = []
    try:
        with_tile(Tile(href), lambda source: boxes_read.append(_bounds(source)))
        return boxes_read[-1]
    except TileError:
        cell = _CELL.search(Path(href).name)
        if cell is None:
            return _EVERYWHERE
        lat = int(cell[2]) * (1 if cell[1] == "N" else -1)
        lon = int(cell[4]) * (1 if cell[3] == "E" else -1)
        return (lon, lat, lon + 1, lat + 1)


def _bounds(source: Any) -> tuple[float, float, float, float]:
    """Box of an open file in degrees."""
    west, south, east, north = source.bounds
    if not source.crs.is_geographic:
        found = rasterio.warp.transform_bounds(source.crs, "EPSG:4326", west, south, east, north)
        return (found[0], found[1], found[2], found[3])
    width = east - west
    if width >= 359:
        return (-180.0, south, 180.0, north)
    # Tiles may reach half a pixel over the antimeridian, and some files count longitudes from 0 to 360.
    west = (west + 180.0) % 360.0 - 180.0
    east = west + width
    return (west, south, east - 360.0 if east > 180.0 else east, north)


def with_tile(tile: Tile, action: Callable[[Any], None]) -> bool:
    """Call ``action`` with the open file (rasterio) of a tile; files on a network are asked for again if that may help.

    Returns
    -------
    False if the tile is optional and does not exist.

    Raises
    ------
    FileNotFoundError
        if a local file is absent.
    TileError
        if it can not be read. Both name it.
    """
    from dl4gam_assets.imagery.sources import SceneError, read

    if not is_url(tile.href) and not Path(tile.href).exists():
        raise FileNotFoundError(f"tile {tile.href} does not exist; see terrain in the region's settings")
    try:
        read(tile.href, action)
    except SceneError as error:
        text = str(error).replace("scene file ", "")
        if tile.optional and "HTTP 404" in text:
            return False
        raise TileError(f"elevation tile {text}; download it again, or take it out of terrain's settings") from error
    return True


def file_identity(path: Path) -> str:
    """Name, size and hash of a file; of a file over 2 MiB, of blocks at its ends and spread over it.

    Of a GDAL virtual mosaic (.vrt) the files behind it count too.
    """
    stat = path.stat()
    return _identity(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _identity(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        if size <= 32 * _BLOCK:
            digest.update(handle.read())
        else:
            for start in np.linspace(0, size - _BLOCK, 6).astype(int):
                handle.seek(int(start))
                digest.update(handle.read(_BLOCK))
    if path.lower().endswith(".vrt"):
        try:
            with rasterio.open(path) as source:
                behind = [f for f in source.files if os.path.abspath(f) != os.path.abspath(path)]
        except rasterio.errors.RasterioIOError:  # the tile says so when it is read
            behind = []
        for name in sorted(behind):
            digest.update(file_identity(Path(name)).encode() if Path(name).is_file() else name.encode())
    return f"{Path(path).name}:{size}:{digest.hexdigest()[:16]}"


# --------------------------------------------------------------------------------------------- STAC
def catalog_tiles(items: Iterable[Any], asset: str) -> list[Tile]:
    """Tiles from the items of a STAC catalog (pystac), one asset each, sorted by id.

    Raises
    ------
    CatalogError
        if an item lacks the asset.
    """
    from dl4gam_assets.imagery.catalogs import asset_of, footprint, item_checksums

    out = []
    for item in sorted(items, key=lambda i: i.id):
        found = asset_of(item, asset)
        box = tuple(footprint(item).bounds) if item.bbox is None else tuple(item.bbox)
        if len(box) == 6:
            box = (box[0], box[1], box[3], box[4])
        identity = f"{item.id}:{item_checksums(item, [asset]).get(asset, '')}"
        out.append(Tile(found.get_absolute_href() or found.href, box, identity))  # type: ignore[arg-type]
    return out


def search_blocks(windows: Iterable[Sequence[float]], size: int = 5) -> list[tuple[float, float, float, float]]:
    """Boxes (west, south, east, north in degrees) that cover all windows, at most ``size`` degrees on a side.

    One search for each serves thousands of glaciers.
    """
    cells = {cell for window in windows for cell in degree_cells(window)}
    blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for lat, lon in cells:
        blocks.setdefault((lat // size, lon // size), []).append((lat, lon))
    out = []
    for _, members in sorted(blocks.items()):
        lats, lons = [m[0] for m in members], [m[1] for m in members]
        out.append((float(min(lons)), float(min(lats)), float(max(lons) + 1), float(max(lats) + 1)))
    return out


# --------------------------------------------------------------------------------------------- places
def grid_box(geobox: GeoBox, margin_m: float = MARGIN_M) -> tuple[float, float, float, float]:
    """Box of a grid and a margin: west, south, east, north in degrees; west > east crosses the antimeridian."""
    box = geobox.boundingbox
    found = rasterio.warp.transform_bounds(
        str(geobox.crs), "EPSG:4326",
        box.left - margin_m, box.bottom - margin_m, box.right + margin_m, box.top + margin_m,
    )  # fmt: skip
    return (found[0], found[1], found[2], found[3])


def boxes(box: Sequence[float]) -> shapely.Geometry:
    """A box in degrees as a polygon; two where it crosses the antimeridian."""
    west, south, east, north = box
    if west <= east:
        return shapely.box(west, south, east, north)
    return shapely.MultiPolygon([shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)])


def degree_cells(box: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Lower left corners (lat, lon) of the 1 x 1 degree cells that a box touches, from north to south."""
    west, south, east, north = box
    end = east + 360.0 if west > east else east
    for lat in range(math.floor(north), math.floor(south) - 1, -1):
        for lon in range(math.floor(west), math.floor(end) + 1):
            yield lat, (lon + 180) % 360 - 180


def fill_template(template: str, lat: int, lon: int) -> str:
    """Address of the tile whose lower left corner is at ``lat``, ``lon``: ``{lat}`` -> N46, ``{lon}`` -> E007."""
    north = f"{'N' if lat >= 0 else 'S'}{abs(lat):02d}"
    east = f"{'E' if lon >= 0 else 'W'}{abs(lon):03d}"
    return template.replace("{lat}", north).replace("{lon}", east)


def is_url(text: str) -> bool:
    """Whether an address is no local path: a URL, or GDAL's virtual path."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|/vsi", text))
