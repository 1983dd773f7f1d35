"""Catalogs of scenes: STAC on disk, as GeoParquet or behind an API, or a folder of local files. All give pystac items.

Belongs here: finding items in space and time, one search for many glaciers, grouping items by day, their identity.
Does not belong here: reading pixels, scales (``scaling``), signatures (``signing``).
"""

from __future__ import annotations

import datetime as dt
import functools
import glob
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
import time
import unicodedata
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin, urlparse, urlsplit

import pystac
import shapely
import shapely.geometry

from dl4gam_assets.compute import TransientError
from dl4gam_assets.settings import (
    SceneFolder,
    SensorSettings,
    StacApi,
    StacFolder,
    StacGeoparquet,
    fingerprint,
    without_secrets,
)

if TYPE_CHECKING:
    import pyarrow.dataset
    import requests

log = logging.getLogger(__name__)

#: Fields of an item that are kept in an item index, besides those of its assets.
_KEPT = (
    "datetime", "start_datetime", "end_datetime", "created", "updated", "platform", "grid:code", "s2:mgrs_tile",
    "s2:processing_baseline", "processing:version", "s2:generation_time", "earthsearch:boa_offset_applied",
    "eo:cloud_cover", "proj:epsg", "proj:code", "landsat:wrs_path", "landsat:wrs_row",
)  # fmt: skip

#: Properties that decide how digital numbers become reflectance (``scaling``).
_SCALING = ("s2:processing_baseline", "processing:version", "earthsearch:boa_offset_applied")


class CatalogError(RuntimeError):
    """A catalog that can not be read. The message names it and says what to do."""


class CatalogUnreachableError(CatalogError, TransientError):
    """A catalog that does not answer now, though it may do so later."""


class SceneCatalog(Protocol):
    """What every catalog can do."""

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        """Items that touch a box (west, south, east, north in degrees; west > east crosses the antimeridian) and whose
        solar day is from ``start`` to ``end``, both included; sorted by id."""
        ...

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        """Items by id, in the order of the ids; raises CatalogError naming one that is gone."""
        ...


def open_catalog(
    catalog: StacFolder | StacApi | SceneFolder | StacGeoparquet, data_root: Path, sensor: SensorSettings
) -> SceneCatalog:
    """The catalog that the settings name.

    Raises
    ------
    CatalogError
        if it is absent or can not be read.
    """
    if isinstance(catalog, StacFolder):
        return _Items(_read_stac(data_root / catalog.path), str(data_root / catalog.path))
    if isinstance(catalog, StacGeoparquet):
        return _Parquet(data_root / catalog.path)
    if isinstance(catalog, SceneFolder):
        return _Items(_items_of_folder(catalog, data_root / catalog.path, sensor), str(data_root / catalog.path))
    return _Api(catalog)


class _Items:
    """Items in memory, searched by a spatial index."""

    def __init__(self, items: Iterable[pystac.Item], where: str):
        self.where = where
        self._items: list[pystac.Item] = []
        for item in sorted(items, key=lambda i: (i.id, _processing(i), i.get_self_href() or "")):
            if self._items and self._items[-1].id == item.id:
                log.warning("%s has two items with the id %r: the newest is used", where, item.id)
                self._items.pop()
            self._items.append(item)
        self._by_id = {item.id: item for item in self._items}
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


#: An API may give empty pages between others (it filters after cutting pages); so many in a row are the end.
_EMPTY_PAGES = 10


class _Api:
    """A STAC API behind pystac-client."""

    def __init__(self, settings: StacApi):
        import pystac_client
        from urllib3 import Retry

        from dl4gam_assets.imagery.signing import PLANETARY_COMPUTER, signing_library

        self.settings = settings
        if urlparse(settings.url).netloc == PLANETARY_COMPUTER:
            signing_library()  # better now than in thousands of scenes that can not be read
        # Passing trouble is asked again at once, then after 2, 4, 8 and 16 seconds, or as Retry-After says (at most two
        # minutes); a silent server twice.
        retry = Retry(
            total=5, connect=2, read=2, backoff_factor=1, backoff_jitter=0.5, backoff_max=60, retry_after_max=120,
            status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None,
        )  # fmt: skip
        try:
            # GDAL and pystac-client share nothing; connections are kept for all searches of this catalog.
            self._io = _api_io(retry, settings.url)
            self._client = pystac_client.Client.open(
                settings.url,
                stac_io=self._io,
                timeout=settings.timeout_s,  # here: open() overwrites that of stac_io
            )
        except Exception as error:
            raise _refusal(error)(f"STAC API {settings.url} does not answer: {_words(error)}") from error

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        day = dt.timedelta(days=1)  # a solar day begins in the evening before, or ends in the morning after, in UTC
        period = f"{start - day}T00:00:00Z/{end + day}T23:59:59Z"
        found: dict[str, pystac.Item] = {}
        for box in _halves(bbox):
            asked = {"bbox": list(box), "datetime": period, "query": self.settings.query or None}
            found |= {item.id: item for item in self._ask(**asked)}
        return _Items(found.values(), self.settings.url).search(bbox, start, end)

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        found = {item.id: item for item in self._ask(ids=list(item_ids))}
        gone = [i for i in item_ids if i not in found]
        if gone:
            raise CatalogError(
                f"{self.settings.url} has no item {gone[0]!r} any more; materialize scene_candidates again"
            )
        return [found[i] for i in item_ids]

    def _ask(self, **asked: Any) -> list[pystac.Item]:
        """All pages of a search, duplicates dropped (the newest version of an id stays)."""
        settings = self.settings
        found: dict[str, pystac.Item] = {}
        seen: set[str] = set()
        empty = 0
        try:
            search = self._client.search(collections=settings.collections, limit=settings.page_size, **asked)
            # The pages of pystac-client's own methods end at the first empty one.
            for page in self._io.get_pages(search.url, search.method, search.get_parameters()):
                features = page.get("features") or []
                empty = 0 if features else empty + 1
                if empty > _EMPTY_PAGES:
                    matched = page.get("numberMatched") or (page.get("context") or {}).get("matched") or 0
                    if int(matched) > len(seen):
                        raise CatalogUnreachableError(
                            f"{settings.url} gives empty pages again and again: it says that {matched} match, and gave "
                            f"{len(seen)}; try again later"
                        )
                    break
                before = len(seen)
                seen |= {str(feature.get("id")) for feature in features}
                for feature in features:
                    item = _item(feature, settings)
                    if item is None:
                        continue
                    old = found.get(item.id)
                    if old is None or _processing(item) > _processing(old):
                        found[item.id] = item
                if features and len(seen) == before:
                    raise CatalogError(f"{settings.url} gives the same page of items again and again: search stopped")
                if len(seen) > settings.max_items:
                    raise CatalogError(
                        f"a search in {settings.url} gives more than {settings.max_items} items: narrow "
                        "imagery.window or imagery.catalog.query, or raise imagery.catalog.max_items"
                    )
        except CatalogError:
            raise
        except Exception as error:
            raise _refusal(error)(f"search in {settings.url} failed: {_words(error)}") from error
        return sorted(found.values(), key=lambda i: i.id)


def _api_io(retry: Any, catalog: str) -> Any:
    """pystac-client's requests, which come again too where an answer breaks off or is no JSON (the page of a proxy).

    urllib3 repeats only what fails before the content. What the server at the address ``catalog`` links to, redirects
    to or names as its search is asked only where :func:`is_inside` allows it.
    """
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO
    from requests.exceptions import ChunkedEncodingError, ConnectionError, ContentDecodingError
    from urllib3.exceptions import ReadTimeoutError

    class Io(StacApiIO):
        def get_pages(
            self, url: str, method: str | None = None, parameters: dict[str, Any] | None = None
        ) -> Iterator[dict[str, Any]]:
            """All pages up to the one without a next, empty ones too."""
            page = self.read_json(url, method=method, parameters=parameters)
            while True:
                yield page
                following = next((link for link in page.get("links", []) if link["rel"] == "next"), None)
                if following is None:
                    return
                if (host := host_of(str(following.get("href")))) != host_of(url):
                    raise CatalogError(f"the next page of {url} is said to be on another host, {host}: search stopped")
                page = self.read_json(pystac.Link.from_dict(following), parameters=parameters)

        def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
            if not isinstance(source, pystac.Link):  # what is no address of the web would be opened as a file
                _expect_allowed(str(source), catalog, host_of(catalog))
            return super().read_text(source, *args, **kwargs)

        def request(self, href: str, *args: Any, **kwargs: Any) -> str:
            _expect_allowed(href, catalog, host_of(catalog))
            for pause in (0.5, 1.0, None):
                try:
                    text = super().request(href, *args, **kwargs)
                    json.loads(text)
                    return text
                except json.JSONDecodeError as error:
                    if pause is None:
                        raise APIError(f"an answer is no JSON, but {' '.join(text.split())[:60]!r}") from error
                except APIError as error:
                    cause = error.__context__
                    if isinstance(cause, CatalogError):  # a redirect that is not followed
                        raise cause from None
                    broken = isinstance(cause, ChunkedEncodingError | ContentDecodingError)
                    stalled = isinstance(cause, ConnectionError) and isinstance(
                        next(iter(cause.args), 0), ReadTimeoutError
                    )
                    if pause is None or not (broken or stalled):
                        raise
                time.sleep(pause)
            raise AssertionError("the last attempt returns or raises")

    def follow(answer: requests.Response, *args: Any, **kwargs: Any) -> None:
        """Called with each answer before its redirect is followed."""
        if answer.is_redirect:
            _expect_allowed(urljoin(answer.url, answer.headers["location"]), catalog, host_of(catalog))

    made = Io(max_retries=retry)
    made.session.hooks["response"].append(follow)
    return made


def _item(feature: Mapping[str, Any], settings: StacApi) -> pystac.Item | None:
    """An item of an answer, with the wished addresses; None (and a warning) where it can not be used."""
    try:
        item = pystac.Item.from_dict(dict(feature), preserve_dict=False)
        _assert_usable(item)
    except Exception as error:
        log.warning(f"{settings.url}: item {str(feature.get('id', '?'))[:100]} is left out: {_words(error)}")
        return None
    for asset in item.assets.values():
        asset.href = without_secrets(asset.href)
        for prefix, replacement in settings.href_prefixes.items():
            if asset.href.startswith(prefix):
                asset.href = replacement + asset.href.removeprefix(prefix)
    for name, asset in list(item.assets.items()):
        if (why := stranger(asset.href, settings)) is not None:
            log.warning(f"{settings.url}: asset {name!r} of item {item.id} is left out: {why}")
            del item.assets[name]
    return item


def stranger(href: str, settings: StacApi) -> str | None:
    """Why an address that a catalog's server gave is not opened; None where it may be.

    A server elsewhere has no say over files of this machine or hosts of its network: ``file:///etc/passwd``,
    ``/vsizip/...``, ``http://169.254.169.254/``. Addresses that ``href_prefixes`` made are the user's own, and a
    server on this machine (loopback) may name what it likes.
    """
    if any(made and href.startswith(made) for made in settings.href_prefixes.values()):
        return None
    here = host_of(settings.url)
    try:
        parts = urlsplit(href)
    except ValueError as error:
        return f"{href[:80]!r} is no address: {error}"
    if re.search(r"[\\\s]", href) and parts.scheme:
        return f"{href[:80]!r} is no address: clients do not agree on which host it names"
    if parts.scheme not in {"http", "https", "s3", "gs", "az", "abfs"}:
        return None if is_inside(here, loopback=True) and local_path(href) else f"{href[:80]} is no address on the web"
    return _inner_host(href, here) if parts.scheme in {"http", "https"} else None


def _inner_host(href: str, here: str) -> str | None:
    """Why an address of the web is not asked for a catalog on the host ``here``; None where it may be."""
    host = host_of(href)
    if is_inside(host) and (not here or not is_inside(here)):
        return f"{host or href[:80]} is a host of this network, which a catalog elsewhere does not choose"
    return None


def _expect_allowed(href: str, catalog: str, here: str) -> None:
    """Refuse an address that a catalog (on the host ``here``, empty for one on disk) may not name; CatalogError."""
    if not re.match(r"https?://[^\\\s]+$", href, re.IGNORECASE):
        raise CatalogError(f"{catalog} leads to {without_secrets(href)[:80]}, which is no address on the web")
    if (why := _inner_host(href, here)) is not None:
        raise CatalogError(f"{catalog} leads to {without_secrets(href)[:80]}: {why}")


def host_of(href: str) -> str:
    """The host of an address as a resolver would read it: lower case, plain digits and letters, no dot at the end."""
    try:
        name = urlsplit(href).hostname or ""
    except ValueError:  # no valid number between brackets
        return ""
    return unicodedata.normalize("NFKC", name).replace("\u3002", ".").rstrip(".").lower()


#: Names that are never on the public web, whatever a resolver says.
_INNER_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home.arpa")
#: Prefixes of IPv6 addresses that hold one of IPv4, and where it stands (bits from the right).
_MAPPED = ((ipaddress.IPv6Network("64:ff9b::/96"), 0), (ipaddress.IPv6Network("2002::/16"), 80),
           (ipaddress.IPv6Network("::/96"), 0), (ipaddress.IPv6Network("::ffff:0:0/96"), 0))  # fmt: skip


def is_inside(host: str, *, loopback: bool = False) -> bool:
    """Whether a host (:func:`host_of`) is this machine, or one of its network (without ``loopback``).

    Every way to write a number counts (``127.1``, ``0x7f.0.0.1``, ``[64:ff9b::7f00:1]``), and a name is asked of the
    resolver: one of its addresses that is not public is enough. A name that can not be resolved here (a proxy may do
    it) is judged by its ending.
    """
    if not host:
        return True
    numbers = _numbers(host)
    if not numbers:
        inner = "." not in host or any(host == n or host.endswith(f".{n}") for n in _INNER_NAMES)
        return host == "localhost" or host.endswith(".localhost") if loopback else inner
    if loopback:
        return all(n.is_loopback for n in numbers)
    return any(not n.is_global or n.is_multicast for n in numbers)


@functools.lru_cache(maxsize=4096)
def _resolved(host: str, minute: int) -> tuple[str, ...]:
    try:
        return tuple(sorted({str(answer[4][0]) for answer in socket.getaddrinfo(host, None)}))
    except (OSError, UnicodeError, ValueError):
        return ()


def _numbers(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """All addresses behind a host; those of IPv4 that are written as IPv6 as what they are."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for text in _resolved(host, int(time.monotonic() // 60)):
        number = ipaddress.ip_address(text.partition("%")[0])
        if isinstance(number, ipaddress.IPv6Address):
            for network, shift in _MAPPED:
                if number in network and int(number) > 1:  # not :: and ::1
                    number = ipaddress.IPv4Address((int(number) >> shift) & 0xFFFFFFFF)
                    break
        found.append(number)
    return found


def _halves(bbox: Sequence[float]) -> list[tuple[float, ...]]:
    """A box that crosses the antimeridian as two: not every server understands west > east."""
    west, south, east, north = _box(bbox)
    if west <= east:
        return [(west, south, east, north)]
    return [(west, south, 180.0, north), (-180.0, south, east, north)]


def _refusal(error: BaseException) -> type[CatalogError]:
    """The kind of a failed request: a server that says that the request itself is wrong will say so again."""
    status = getattr(error, "status_code", None)
    wrong = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return CatalogError if wrong else CatalogUnreachableError


def _words(error: BaseException) -> str:
    status = getattr(error, "status_code", None)  # of pystac-client's APIError
    text = without_secrets(" ".join(str(error).split()))[:500] or type(error).__name__
    return text if status is None else f"HTTP {status}: {text}"


# ---------------------------------------------------------------------------------------------- many glaciers at once
Window = tuple[tuple[float, float, float, float], Sequence[tuple[dt.date, dt.date]]]


def search_plan(
    windows: Iterable[Window], cell_deg: float = 1.0, gap_days: int = 30
) -> list[tuple[tuple[float, float, float, float], dt.date, dt.date]]:
    """Few searches that cover many glaciers: one a cell of the globe and season.

    Parameters
    ----------
    windows : for each glacier its box (west, south, east, north in degrees; west > east crosses the antimeridian) and
        its search periods (first and last day)
    cell_deg : glaciers whose boxes' centres share a cell of this size are searched together
    gap_days : periods of a cell that are nearer to each other than this become one

    Returns
    -------
    Boxes with first and last day, in a fixed order.
    """
    cells: dict[tuple[int, int], list[Window]] = {}
    for box, periods in windows:
        for part in _halves(box):
            key = (int((part[0] + part[2]) / 2 // cell_deg), int((part[1] + part[3]) / 2 // cell_deg))
            cells.setdefault(key, []).append(((part[0], part[1], part[2], part[3]), periods))
    out = []
    for key in sorted(cells):
        boxes, lists = zip(*cells[key], strict=True)
        west, south, east, north = zip(*boxes, strict=True)
        bounds = (min(west), min(south), max(east), max(north))
        merged: list[list[dt.date]] = []
        for start, end in sorted(period for periods in lists for period in periods):
            if merged and start <= merged[-1][1] + dt.timedelta(days=gap_days):
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        out += [(bounds, start, end) for start, end in merged]
    return out


def write_items(items: Iterable[pystac.Item], assets: Sequence[str], path: Path) -> int:
    """Write items as lines of JSON with the given assets and the properties that matter here; returns their number."""
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for item in sorted(items, key=lambda i: i.id):
            slim = item.to_dict(include_self_link=False, transform_hrefs=False)
            slim["links"] = []
            slim["assets"] = {name: slim["assets"][name] for name in assets if name in slim["assets"]}
            slim["properties"] = {k: v for k, v in slim["properties"].items() if k in _KEPT}
            slim["stac_extensions"] = []
            for asset in slim["assets"].values():  # a server may add tokens, which are nobody else's and soon of no use
                asset["href"] = without_secrets(asset["href"])
            file.write(json.dumps(slim, separators=(",", ":"), default=str) + "\n")
            count += 1
    return count


def merge_items(paths: Iterable[Path], target: Path) -> int:
    """Join files of :func:`write_items`; of items with the same id the newest processing stays. Returns their number.

    Raises
    ------
    CatalogError
        naming a file that can not be read.
    """
    kept: dict[str, tuple[tuple[Any, ...], str]] = {}
    for path in paths:
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                item = json.loads(line)
                rank = _rank(item["id"], item["properties"])
                if item["id"] not in kept or rank > kept[item["id"]][0]:
                    kept[item["id"]] = rank, line
        except (OSError, ValueError, KeyError) as error:
            raise CatalogError(f"stored search {path} can not be read ({_words(error)}): delete it") from error
    target.write_text("".join(f"{line}\n" for _, (_, line) in sorted(kept.items())), encoding="utf-8")
    return len(kept)


def read_items(path: Path) -> SceneCatalog:
    """The catalog of a file of :func:`write_items`.

    Raises
    ------
    CatalogError
        if it can not be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            items = [pystac.Item.from_dict(json.loads(line), preserve_dict=False) for line in file if line.strip()]
        for item in items:
            _assert_usable(item)
    except Exception as error:  # pystac's and shapely's own errors for nonsense where an item should be
        raise CatalogError(
            f"item index {path} can not be read ({_words(error)}): delete it and search again"
        ) from error
    return _Items(items, f"item index {path}")


# ----------------------------------------------------------------------------------------------------- stac-geoparquet
class _Parquet:
    """A stac-geoparquet collection: only the rows near in space and time are read and become items."""

    def __init__(self, where: Path):
        import pyarrow
        import pyarrow.dataset

        self.where = str(where)
        files = [self.where] if where.exists() else sorted(glob.glob(self.where, recursive=True))
        if not files:
            raise CatalogError(f"stac-geoparquet {where} does not exist (imagery.catalog.path)")
        try:
            self._data: pyarrow.dataset.Dataset = pyarrow.dataset.dataset(
                files if len(files) > 1 else files[0], format="parquet"
            )
        except (pyarrow.ArrowException, OSError) as error:
            raise CatalogError(f"stac-geoparquet {where} can not be read: {_words(error)}") from error
        lacking = {"id", "geometry", "bbox", "assets", "datetime"} - set(self._data.schema.names)
        if lacking:
            raise CatalogError(f"{where} is no stac-geoparquet: it lacks the columns {', '.join(sorted(lacking))}")
        self._folder = os.path.dirname(os.path.abspath(files[0]))

    def search(self, bbox: Sequence[float], start: dt.date, end: dt.date) -> list[pystac.Item]:
        import pyarrow as pa
        import pyarrow.compute as pc

        west, south, east, north = _box(bbox)
        field = pc.field
        kind = self._data.schema.field("datetime").type
        zone = dt.UTC if getattr(kind, "tz", None) else None
        first, last = (
            pa.scalar(dt.datetime.combine(day, dt.time(), tzinfo=zone), kind)
            for day in (start - dt.timedelta(days=1), end + dt.timedelta(days=2))
        )
        near = (field("bbox", "ymin") <= north) & (field("bbox", "ymax") >= south)
        # An item over the antimeridian has xmin > xmax; boxes are compared precisely below.
        over = field("bbox", "xmin") > field("bbox", "xmax")
        if west <= east:
            near &= over | ((field("bbox", "xmin") <= east) & (field("bbox", "xmax") >= west))
        else:
            near &= over | (field("bbox", "xmax") >= west) | (field("bbox", "xmin") <= east)
        # Items without a datetime have a start; they are few enough to be looked at one by one.
        when = ((field("datetime") >= first) & (field("datetime") < last)) | field("datetime").is_null()
        return _Items(self._items(near & when), self.where).search(bbox, start, end)

    def get(self, item_ids: Sequence[str]) -> list[pystac.Item]:
        import pyarrow.compute as pc

        return _Items(self._items(pc.field("id").isin(list(item_ids))), self.where).get(item_ids)

    def _items(self, condition: Any) -> Iterator[pystac.Item]:
        import pyarrow

        try:
            rows = self._data.to_table(filter=condition).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise CatalogError(f"stac-geoparquet {self.where} can not be read: {_words(error)}") from error
        for row in rows:
            try:
                item = self._item(row)
                _assert_usable(item)
            except Exception as error:
                raise CatalogError(
                    f"stac-geoparquet {self.where}: item {str(row.get('id'))[:100]} can not be read: {_words(error)}"
                ) from error
            yield item

    def _item(self, row: dict[str, Any]) -> pystac.Item:
        """An item from a row: properties are columns of their own, assets a struct with nulls for those that lack."""
        about = {"type", "stac_version", "stac_extensions", "links", "collection"}
        plain = {k: v for k, v in _without_nulls(row).items() if k not in about}
        box, shape = plain.pop("bbox"), shapely.from_wkb(plain.pop("geometry"))
        assets, when = plain.pop("assets"), plain.pop("datetime", None)
        item = pystac.Item(
            id=str(plain.pop("id")),
            geometry=shapely.geometry.mapping(shape),
            bbox=[box[k] for k in ("xmin", "ymin", "xmax", "ymax")],
            datetime=when if when is None or when.tzinfo else when.replace(tzinfo=dt.UTC),
            properties=plain,
            start_datetime=plain.get("start_datetime"),
            end_datetime=plain.get("end_datetime"),
        )
        for name, asset in assets.items():
            href = str(asset.pop("href"))
            if local_path(href) is not None and not os.path.isabs(str(local_path(href))):
                href = os.path.join(self._folder, href)
            known = {k: asset.pop(k) for k in ("title", "description", "roles") if k in asset}
            media = asset.pop("type", None)
            item.add_asset(name, pystac.Asset(href=href, media_type=media, extra_fields=asset, **known))
        return item


def _without_nulls(value: Any) -> Any:
    """Structs without the fields that are null: Parquet has one schema for all rows."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


class _StaticIo(pystac.stac_io.DefaultStacIO):
    """Files of a catalog on disk, and what it links to on the public web; nothing else that this machine can reach."""

    def read_text_from_href(self, href: str) -> str:
        if urlsplit(href).scheme in {"", "file"}:
            return super().read_text_from_href(href)
        _expect_allowed(href, "the catalog on disk", "")
        with _OPENER.open(href, timeout=60) as answer:
            return str(answer.read().decode("utf-8"))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _expect_allowed(newurl, f"the catalog on disk, by {without_secrets(req.full_url)},", "")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def _read_stac(path: Path) -> list[pystac.Item]:
    if not path.is_file():
        raise CatalogError(f"STAC catalog {path} does not exist (imagery.catalog.path)")
    items: list[pystac.Item] = []
    where = str(path)
    try:
        root = pystac.Catalog.from_file(where, stac_io=_StaticIo())
        for folder, _, _ in root.walk():
            for link in folder.get_item_links():
                where = link.get_absolute_href() or link.href
                item = link.resolve_stac_object(root).target
                if isinstance(item, pystac.Item):
                    item.make_asset_hrefs_absolute()
                    _assert_usable(item)
                    items.append(item)
            where = folder.get_self_href() or str(path)
    except Exception as error:
        why = error.__cause__ if isinstance(error.__cause__, CatalogError) else error
        raise CatalogError(
            f"STAC file {without_secrets(where)} of the catalog {path} can not be read: {_words(why)}"
        ) from error
    return items


def _assert_usable(item: pystac.Item) -> None:
    """Raise whatever is wrong with an item's ground, time or addresses."""
    footprint(item)
    solar_day(item)
    for asset in item.assets.values():
        local_path(asset.href)


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
    west, south, east, north = _box(bbox)
    if west <= east:
        return shapely.box(west, south, east, north)
    return shapely.MultiPolygon([shapely.box(west, south, 180.0, north), shapely.box(-180.0, south, east, north)])


def _box(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """West, south, east, north of a box of four or (with heights) six numbers."""
    west, south, east, north = bbox if len(bbox) == 4 else (*bbox[:2], *bbox[3:5])
    return float(west), float(south), float(east), float(north)


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
    return _rank(item.id, item.properties)


def _rank(item_id: str, p: Mapping[str, Any]) -> tuple[tuple[int, ...], str, str]:
    """Sorts versions of a scene: by processing baseline, then by the time it was made."""
    baseline = str(p.get("s2:processing_baseline") or p.get("processing:version") or "")
    made = str(p.get("s2:generation_time") or p.get("created") or p.get("updated") or "")
    return tuple(int(n) for n in re.findall(r"\d+", baseline)), made, item_id


def _time(item: pystac.Item) -> dt.datetime:
    moment = item.datetime or item.common_metadata.start_datetime
    if moment is None:
        raise CatalogError(f"item {item.id} has no datetime")
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def item_checksums(item: pystac.Item, assets: Iterable[str]) -> dict[str, str]:
    """Identity of an item's files: the catalog's checksum (file extension) where it has one, size and time of a local
    file, otherwise the item's own time of change and the address. A local file with a checksum counts with its size and
    a hash of samples of it too, since the catalog does not notice when the file is replaced.

    Behind ``as:`` stands a hash of what the item says about reading the file, where it says anything: scale, offset,
    no-data and the band's place in the file, the processing baseline and the flag of Earth Search. So an item that is
    corrected is another item."""
    from dl4gam_assets.imagery.scaling import band_index, band_metadata  # these know of catalogs
    from dl4gam_assets.imagery.signing import unsigned

    told = [item.properties.get(name) for name in _SCALING]
    out: dict[str, str] = {}
    for name in assets:
        asset = item.assets.get(name)
        if asset is None:
            continue
        stated = asset.extra_fields.get("file:checksum")
        local = local_path(asset.href)
        there = local is not None and local.is_file()
        if stated:
            out[name] = f"multihash:{stated}"
            if local is not None and there:
                out[name] += f" {file_identity(local)}"
        elif local is not None and there:
            stat = local.stat()
            out[name] = f"{stat.st_size}:{stat.st_mtime_ns}"
        else:
            changed = item.properties.get("updated") or item.properties.get("created") or ""
            out[name] = f"item:{changed} {fingerprint(unsigned(asset.href))[:8]}"
        band = band_index(asset)
        said = [band, band_metadata(asset, band), *told]
        if said != [1, {}, *[None] * len(_SCALING)]:
            out[name] += f" as:{fingerprint(said)[:8]}"
    return out


def file_identity(path: Path) -> str:
    """Size of a file and a hash of blocks at its ends and spread over it (of all of it up to 2 MiB)."""
    stat = path.stat()
    return f"{stat.st_size}:{_sampled(str(path), stat.st_size, stat.st_mtime_ns)}"


@functools.lru_cache(maxsize=65536)
def _sampled(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    block = 64 * 1024
    with open(path, "rb") as handle:
        if size <= 32 * block:
            digest.update(handle.read())
        else:
            for i in range(6):
                handle.seek((size - block) * i // 5)
                digest.update(handle.read(block))
    return digest.hexdigest()[:16]


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
