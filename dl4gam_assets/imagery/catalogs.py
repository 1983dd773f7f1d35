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
        """Items that touch a box (west, south, east, north in degrees) from ``start`` to ``end``, both included."""
        ...

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        """Items by id, in the order of the ids; raises CatalogError naming one that is gone."""
        ...


def open_catalog(
    catalog: StacFolder | StacApi | SceneFolder, data_root: Path, sensor: SensorSettings
) -> SceneCatalog:
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
        self._tree = shapely.STRtree([shapely.geometry.shape(item.geometry) for item in self._items])

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        hits = self._tree.query(shapely.box(*bbox), predicate="intersects")
        return [self._items[i] for i in sorted(hits) if start <= _time(self._items[i]).date() <= end]

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
        try:
            found = self._client.search(
                collections=self.settings.collections,
                bbox=list(bbox),
                datetime=f"{start}T00:00:00Z/{end}T23:59:59Z",
                query=self.settings.query or None,
                limit=100,
            )
            return sorted(found.items(), key=lambda i: i.id)
        except Exception as error:
            raise CatalogError(f"search in {self.settings.url} failed: {error}") from error

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        try:
            found = {i.id: i for i in self._client.search(collections=self.settings.collections, ids=list(item_ids)).items()}
        except Exception as error:
            raise CatalogError(f"{self.settings.url} failed to give items by id: {error}") from error
        gone = [i for i in item_ids if i not in found]
        if gone:
            raise CatalogError(f"{self.settings.url} has no item {gone[0]!r} any more; materialize scene_candidates again")
        return [found[i] for i in item_ids]


def _read_stac(path: Path) -> list[pystac.Item]:
    if not path.is_file():
        raise CatalogError(f"STAC catalog {path} does not exist (imagery.catalog.path)")
    try:
        items = list(pystac.Catalog.from_file(str(path)).get_items(recursive=True))
    except Exception as error:
        raise CatalogError(f"STAC catalog {path} can not be read: {error}") from error
    for item in items:
        item.make_asset_hrefs_absolute()
    return items


def _items_of_folder(catalog: SceneFolder, folder: Path, sensor: SensorSettings) -> list[pystac.Item]:
    """One item a scene from the headers of local files; one asset a band, with the band's index in its file."""
    import rasterio
    import rasterio.warp

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
            scene = groups.get("scene") or path.stem
            scenes.setdefault((scene, groups["date"]), []).append((path, order))
    if not scenes:
        raise CatalogError(f"no file in {folder} matches imagery.catalog.pattern {catalog.pattern!r}")
    items = []
    for (scene, date), files in sorted(scenes.items()):
        footprint, assets = shapely.Polygon(), {}
        for path, order in files:
            try:
                with rasterio.open(path) as source:
                    if source.count < len(order):
                        raise CatalogError(f"{path} has {source.count} bands, imagery.catalog.band_order names {len(order)}")
                    box = shapely.box(*rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds))
            except rasterio.errors.RasterioIOError as error:
                raise CatalogError(f"scene file {path} can not be read: {error}") from error
            footprint = shapely.union(footprint, box)
            for band, name in enumerate(order, start=1):
                assets[name] = pystac.Asset(href=str(path), extra_fields={"band_index": band})
        moment = dt.datetime.strptime(date, catalog.date_format).replace(hour=10, tzinfo=dt.UTC)
        item = pystac.Item(
            id=f"{scene}_{moment:%Y%m%d}",
            geometry=shapely.geometry.mapping(footprint),
            bbox=list(footprint.bounds),
            datetime=moment,
            properties={"platform": sensor.name, "grid:code": scene},
        )
        for name, asset in assets.items():
            item.add_asset(name, asset)
        items.append(item)
    return items


def group_by_day(items: Iterable[pystac.Item]) -> dict[dt.date, list[pystac.Item]]:
    """Items by local solar day. Of each tile only the newest processing is kept; newest processing first."""
    days: dict[dt.date, dict[str, pystac.Item]] = {}
    for item in items:
        box = item.bbox or [0.0, 0.0, 0.0, 0.0]
        solar = _time(item) + dt.timedelta(hours=(box[0] + box[2]) / 2 / 15)
        tiles = days.setdefault(solar.date(), {})
        tile = str(item.properties.get("grid:code") or item.properties.get("s2:mgrs_tile") or item.id)
        kept = tiles.get(tile)
        if kept is None or _processing(item) > _processing(kept):
            tiles[tile] = item
    return {day: sorted(days[day].values(), key=_processing, reverse=True) for day in sorted(days)}


def _processing(item: pystac.Item) -> tuple[str, str, str]:
    p = item.properties
    baseline = str(p.get("s2:processing_baseline") or p.get("processing:version") or "")
    return baseline, str(p.get("s2:generation_time") or p.get("created") or p.get("updated") or ""), item.id


def _time(item: pystac.Item) -> dt.datetime:
    moment = item.datetime or item.common_metadata.start_datetime
    if moment is None:
        raise CatalogError(f"item {item.id} has no datetime")
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def item_checksums(item: pystac.Item, assets: Iterable[str]) -> dict[str, str]:
    """Identity of an item's files: the catalog's checksum (file extension) where it has one, size and time of a local
    file, otherwise the item's own time of change."""
    out = {}
    for name in assets:
        asset = item.assets.get(name)
        if asset is None:
            continue
        stated = asset.extra_fields.get("file:checksum")
        local = _local(asset.href)
        if stated:
            out[name] = f"multihash:{stated}"
        elif local is not None and local.is_file():
            stat = local.stat()
            out[name] = f"{stat.st_size}:{stat.st_mtime_ns}"
        else:
            changed = item.properties.get("updated") or item.properties.get("created") or ""
            out[name] = f"item:{changed}"
    return out


def _local(href: str) -> Path | None:
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


def band_metadata(asset: pystac.Asset) -> dict[str, Any]:
    """Scale, offset and nodata of an asset's first band: STAC 1.1 ``bands``, or the raster extension's ``raster:bands``."""
    fields = asset.extra_fields
    merged: dict[str, Any] = {}
    for entry in [(fields.get("raster:bands") or [{}])[0], (fields.get("bands") or [{}])[0], fields]:
        for key, names in {
            "scale": ("scale", "raster:scale"), "offset": ("offset", "raster:offset"), "nodata": ("nodata",),
        }.items():  # fmt: skip
            for name in names:
                if entry.get(name) is not None:
                    merged[key] = entry[name]
    return merged
