"""Catalogs of scenes: a STAC catalog on disk, a STAC API, a folder of local files. All give pystac items.

Belongs here: finding items in space and time, grouping them by day, their identity.
Does not belong here: reading pixels.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import pystac
import shapely
import shapely.geometry

from dl4gam_assets.settings import SceneFolder, SensorSettings, StacApi, StacFolder


class CatalogError(RuntimeError):
    """A catalog that can not be read. The message names it and says what to do."""


class SceneCatalog(Protocol):
    """What every catalog can do."""

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        """Items that touch a box (west, south, east, north in degrees; west > east crosses the antimeridian) and whose
        solar day is from ``start`` to ``end``, both included; sorted by id."""
        ...

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        """Items by id, in the order of the ids; raises CatalogError naming one that is gone."""
        ...


def open_catalog(catalog: StacFolder | StacApi | SceneFolder, data_root: Path, sensor: SensorSettings) -> SceneCatalog:
    """The catalog that the settings name.

    Raises
    ------
    CatalogError
        if it is absent or can not be read.
    """
    if isinstance(catalog, StacFolder):
        return _Items(_read_stac(data_root / catalog.path), str(data_root / catalog.path))
    if isinstance(catalog, SceneFolder):
        return _Items(_items_of_folder(catalog, data_root / catalog.path, sensor), str(data_root / catalog.path))
    return _Api(catalog)


class _Items:
    """Items in memory, searched by a spatial index."""

    def __init__(self, items: Sequence[pystac.Item], where: str):
        self.where = where
        self._items = sorted(items, key=lambda i: i.id)
        self._by_id = {item.id: item for item in self._items}
        if len(self._by_id) < len(self._items):
            twice = next(a.id for a, b in zip(self._items, self._items[1:], strict=False) if a.id == b.id)
            raise CatalogError(f"{where} has two items with the id {twice!r}")
        self._days = [solar_day(item) for item in self._items]
        self._tree = shapely.STRtree([footprint(item) for item in self._items])

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        hits = self._tree.query(lonlat_box(bbox), predicate="intersects")
        return [self._items[i] for i in sorted(hits) if start <= self._days[i] <= end]

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        gone = [i for i in item_ids if i not in self._by_id]
        if gone:
            raise CatalogError(f"{self.where} has no item {gone[0]!r} any more; materialize scene_candidates again")
        return [self._by_id[i] for i in item_ids]


class _Api:
    """A STAC API behind pystac-client."""

    def __init__(self, settings: StacApi):
        import pystac_client
        from pystac_client.stac_api_io import StacApiIO
        from urllib3 import Retry

        self.settings = settings
        # Transient answers are asked again after 1, 2, 4 ... seconds, or as Retry-After says.
        retry = Retry(total=5, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
        try:
            self._client = pystac_client.Client.open(settings.url, stac_io=StacApiIO(max_retries=retry, timeout=60))
        except Exception as error:
            raise CatalogError(f"STAC API {settings.url} does not answer: {error}") from error

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        day = dt.timedelta(days=1)  # a solar day begins in the evening before, or ends in the morning after, in UTC
        try:
            found = self._client.search(
                collections=self.settings.collections,
                bbox=list(bbox),
                datetime=f"{start - day}T00:00:00Z/{end + day}T23:59:59Z",
                query=self.settings.query or None,
                limit=100,
            )
            items = sorted(found.items(), key=lambda i: i.id)
        except Exception as error:
            raise CatalogError(f"search in {self.settings.url} failed: {error}") from error
        return [item for item in items if start <= solar_day(item) <= end]

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        try:
            search = self._client.search(collections=self.settings.collections, ids=list(item_ids))
            found = {item.id: item for item in search.items()}
        except Exception as error:
            raise CatalogError(f"{self.settings.url} failed to give items by id: {error}") from error
        gone = [i for i in item_ids if i not in found]
        if gone:
            raise CatalogError(
                f"{self.settings.url} has no item {gone[0]!r} any more; materialize scene_candidates again"
            )
        return [found[i] for i in item_ids]


def _read_stac(path: Path) -> list[pystac.Item]:
    if not path.is_file():
        raise CatalogError(f"STAC catalog {path} does not exist (imagery.catalog.path)")
    items: list[pystac.Item] = []
    where = str(path)
    try:
        root = pystac.Catalog.from_file(where)
        for folder, _, _ in root.walk():
            for link in folder.get_item_links():
                where = link.get_absolute_href() or link.href
                item = link.resolve_stac_object(root).target
                if isinstance(item, pystac.Item):
                    items.append(item)
            where = folder.get_self_href() or str(path)
    except Exception as error:
        raise CatalogError(f"STAC file {where} of the catalog {path} can not be read: {error}") from error
    for item in items:
        item.make_asset_hrefs_absolute()
    return items


def _items_of_folder(catalog: SceneFolder, folder: Path, sensor: SensorSettings) -> list[pystac.Item]:
    """One item a scene from the headers of local ``.tif`` files; one asset a band, with the band's index in its file.

    A file whose header can not be read still gives an item, over the ground of all others, so that every glacier there
    hears of it when the item is read.
    """
    if not folder.is_dir():
        raise CatalogError(f"scene folder {folder} does not exist (imagery.catalog.path)")
    pattern = re.compile(catalog.pattern)
    scenes: dict[tuple[str, str], list[tuple[Path, list[str]]]] = {}
    for path in sorted(folder.rglob("*.tif")):
        match = pattern.search(path.relative_to(folder).as_posix())
        if match is None:
            continue
        groups = match.groupdict()
        order = catalog.band_order.get(groups.get("suffix") or "")
        if order is not None:
            scenes.setdefault((groups.get("scene") or path.stem, groups["date"]), []).append((path, order))
    if not scenes:
        raise CatalogError(f"no file in {folder} matches imagery.catalog.pattern {catalog.pattern!r}")
    boxes = {path: _bounds(path, order) for files in scenes.values() for path, order in files}
    known = [box for box in boxes.values() if box is not None]
    if not known:
        raise CatalogError(f"no scene file in {folder} can be read; the first is {next(iter(boxes))}")
    everywhere = shapely.union_all(known)
    items = []
    for (scene, date), files in sorted(scenes.items()):
        outline, assets = shapely.Polygon(), dict[str, pystac.Asset]()
        for path, order in files:
            box = boxes[path]
            outline = shapely.union(outline, everywhere if box is None else box)
            for band, name in enumerate(order, start=1):
                if name in assets:
                    raise CatalogError(
                        f"{assets[name].href} and {path} both give the band {name} of scene {scene}, {date}; "
                        "tell them apart by the group scene or suffix of imagery.catalog.pattern"
                    )
                assets[name] = pystac.Asset(href=str(path), extra_fields={"band_index": band})
        try:
            day = dt.datetime.strptime(date, catalog.date_format)
        except ValueError as error:
            raise CatalogError(
                f"{files[0][0]}: {date!r} is no date of imagery.catalog.date_format {catalog.date_format!r}"
            ) from error
        # The hour is not known: local noon, so that the solar day is the day in the name everywhere on Earth.
        noon = day.replace(hour=12, tzinfo=dt.UTC) - dt.timedelta(hours=outline.centroid.x / 15)
        item = pystac.Item(
            id=f"{scene}_{day:%Y%m%d}",
            geometry=shapely.geometry.mapping(outline),
            bbox=list(outline.bounds),
            datetime=noon,
            properties={"platform": sensor.name, "grid:code": scene},
        )
        for name, asset in assets.items():
            item.add_asset(name, asset)
        items.append(item)
    return items


def _bounds(path: Path, order: Sequence[str]) -> shapely.Geometry | None:
    """Box of a file in degrees, or None where its header can not be read."""
    import rasterio
    import rasterio.warp

    try:
        with rasterio.open(path) as source:
            if source.crs is None:
                raise CatalogError(f"scene file {path} has no coordinate reference system")
            if source.count < len(order):
                raise CatalogError(f"{path} has {source.count} bands, imagery.catalog.band_order names {len(order)}")
            return lonlat_box(rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds))
    except rasterio.errors.RasterioIOError:
        return None


def lonlat_box(bbox: Sequence[float]) -> shapely.Geometry:
    """A box (west, south, east, north in degrees) as a polygon; two where it crosses the antimeridian."""
    west, south, east, north = (bbox[0], bbox[1], bbox[-2], bbox[-1]) if len(bbox) == 4 else (*bbox[:2], *bbox[3:5])
    if west <= east:
        return shapely.box(west, south, east, north)
    return shapely.MultiPolygon([shapely.box(west, south, 180.0, north), shapely.box(-180.0, south, east, north)])


def footprint(item: pystac.Item) -> shapely.Geometry:
    """An item's footprint, valid, EPSG:4326; its box where it has no geometry."""
    if item.geometry is not None:
        return shapely.make_valid(shapely.geometry.shape(item.geometry))
    if item.bbox is not None:
        return lonlat_box(item.bbox)
    raise CatalogError(f"item {item.id} has neither geometry nor bbox")


def solar_day(item: pystac.Item) -> dt.date:
    """The day of an item by local solar time, so that one overpass is one day everywhere."""
    if item.bbox is not None:
        west, east = item.bbox[0], item.bbox[len(item.bbox) // 2]
        centre = (west + east + (360.0 if west > east else 0.0)) / 2
    else:
        centre = footprint(item).centroid.x
    return (_time(item) + dt.timedelta(hours=centre / 15)).date()


def group_by_day(items: Iterable[pystac.Item]) -> dict[dt.date, list[pystac.Item]]:
    """Items by local solar day, days in order; newest processing baseline first.

    Of a tile (``grid:code``, ``s2:mgrs_tile``) only the newest processing is kept, with those others that show at least
    1% more of it: a tile may come in two parts (data strips) on one day.
    """
    days: dict[dt.date, list[pystac.Item]] = {}
    for item in sorted(items, key=_processing, reverse=True):
        days.setdefault(solar_day(item), []).append(item)
    out: dict[dt.date, list[pystac.Item]] = {}
    for day in sorted(days):
        seen: dict[str, shapely.Geometry] = {}
        out[day] = []
        for item in days[day]:
            tile = str(item.properties.get("grid:code") or item.properties.get("s2:mgrs_tile") or item.id)
            shown = footprint(item)
            if tile in seen:
                if shapely.difference(shown, seen[tile]).area < 0.01 * shown.area:
                    continue
                shown = shapely.union(shown, seen[tile])
            seen[tile] = shown
            out[day].append(item)
    return out


def _processing(item: pystac.Item) -> tuple[tuple[int, ...], str, str]:
    p = item.properties
    baseline = str(p.get("s2:processing_baseline") or p.get("processing:version") or "")
    made = str(p.get("s2:generation_time") or p.get("created") or p.get("updated") or "")
    return tuple(int(n) for n in re.findall(r"\d+", baseline)), made, item.id


def _time(item: pystac.Item) -> dt.datetime:
    moment = item.datetime or item.common_metadata.start_datetime
    if moment is None:
        raise CatalogError(f"item {item.id} has no datetime")
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def item_checksums(item: pystac.Item, assets: Iterable[str]) -> dict[str, str]:
    """Identity of an item's files: the catalog's checksum (file extension) where it has one, size and time of a local
    file, otherwise the item's own time of change."""
    out: dict[str, str] = {}
    for name in assets:
        asset = item.assets.get(name)
        if asset is None:
            continue
        stated = asset.extra_fields.get("file:checksum")
        local = local_path(asset.href)
        if stated:
            out[name] = f"multihash:{stated}"
        elif local is not None and local.is_file():
            stat = local.stat()
            out[name] = f"{stat.st_size}:{stat.st_mtime_ns}"
        else:
            changed = item.properties.get("updated") or item.properties.get("created") or ""
            out[name] = f"item:{changed}"
    return out


def local_path(href: str) -> Path | None:
    """The path of a local file, None for any other address."""
    parts = urlparse(href)
    if parts.scheme in ("", "file"):
        return Path(parts.path)
    return None


def asset_of(item: pystac.Item, name: str) -> pystac.Asset:
    """An asset by name; raises CatalogError naming those there are."""
    if name not in item.assets:
        have = ", ".join(sorted(item.assets)) or "none"
        raise CatalogError(f"item {item.id} has no asset {name!r} (imagery.sensor.bands); it has {have}")
    return item.assets[name]


def band_metadata(asset: pystac.Asset, index: int = 1) -> dict[str, Any]:
    """Scale, offset and nodata of an asset's band (1 is the first), where the item states them.

    Read are STAC 1.1 ``bands`` and the raster extension: ``raster:bands`` (version 1) or ``raster:scale`` and
    ``raster:offset`` (version 2) of the band or, for all bands, of the asset itself. The band's own word wins.
    """
    fields = asset.extra_fields
    merged: dict[str, Any] = {}
    entries = [fields]
    for key in ("raster:bands", "bands"):
        of_bands = fields.get(key) or []
        if len(of_bands) >= index:
            entries.append(of_bands[index - 1])
    for entry in entries:
        for key, names in {
            "scale": ("scale", "raster:scale"), "offset": ("offset", "raster:offset"), "nodata": ("nodata",),
        }.items():  # fmt: skip
            for name in names:
                if entry.get(name) is not None:
                    merged[key] = entry[name]
    return merged
