"""What the server finds: STAC items in memory, searched as the STAC API specification says.

Belongs here: search by box, time, ids, collections, geometry, query and filter; pages; lies that a catalog can tell.
Does not belong here: HTTP (``server``), failing requests (``faults``).

Filters are CQL2, evaluated by the library cql2; the query extension is translated to CQL2. Results are ordered as
pgstac orders them: newest first, then by id downwards.
"""

from __future__ import annotations

import copy
import datetime as dt
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode, urljoin

import attr
import cql2
import pystac
import shapely
import shapely.geometry
from fastapi import HTTPException
from stac_fastapi.types.core import AsyncBaseCoreClient
from stac_fastapi.types.errors import NotFoundError
from stac_fastapi.types.links import CollectionLinks, ItemLinks
from stac_fastapi.types.requests import get_base_url
from stac_fastapi.types.rfc3339 import str_to_interval

Json = dict[str, Any]

_OPERATORS = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "in": "in"}


class Backend:
    """Collections and items as JSON, which tests may change at any time.

    Attributes
    ----------
    collections, items
        by id, and by collection and id
    lies
        what is wrong with the answers: ``bbox`` (the box of a search is not looked at), ``datetime`` (nor its time),
        ``repeat`` (each page begins with the last item of the one before), ``gaps`` (an empty page before each)
    endless
        pages without an end: ``same`` (always the first one), ``new`` (items under ever new ids) or ``empty``
    """

    def __init__(self) -> None:
        self.collections: dict[str, Json] = {}
        self.items: dict[tuple[str, str], Json] = {}
        self.lies: set[Literal["bbox", "datetime", "repeat", "gaps"]] = set()
        self.endless: Literal["same", "new", "empty"] | None = None
        self._lock = threading.Lock()
        self._stamp: tuple[float, float] | None = None
        self._original: tuple[dict[str, Json], dict[tuple[str, str], Json]] = ({}, {})

    # ------------------------------------------------------------------------------------------------ content
    def load(self, folder: Path, files_url: str) -> bool:
        """Read ``stac/catalog.json`` below a region's folder of inputs, unless that is what was read last.

        Addresses of files below the folder become addresses below ``files_url``; checksums and all else stay. Without
        a catalog there is nothing to be found, until there is one. Returns whether anything was read.
        """
        catalog = folder / "stac" / "catalog.json"
        try:
            stat = catalog.stat()
        except FileNotFoundError:
            return False
        with self._lock:
            if self._stamp == (stat.st_mtime, stat.st_ino):
                return False
            root = pystac.Catalog.from_file(str(catalog))
            collections = {c.id: _without_links(c.to_dict()) for c in root.get_all_collections()}
            items = {}
            for item in root.get_items(recursive=True):
                item.make_asset_hrefs_absolute()
                for asset in item.assets.values():
                    inside = os.path.relpath(asset.href, folder.resolve())
                    if inside.startswith(".."):
                        inside = os.path.relpath(asset.href, folder)
                    asset.href = urljoin(files_url, Path(inside).as_posix())
                found = _without_links(item.to_dict(include_self_link=False, transform_hrefs=False))
                items[str(item.collection_id), item.id] = found
            self._original = (collections, items)
            self._stamp = (stat.st_mtime, stat.st_ino)
            self._restore()
        return True

    def restore(self) -> None:
        """Forget all changes of content and all lies."""
        with self._lock:
            self._restore()

    def _restore(self) -> None:
        self.collections, self.items = copy.deepcopy(self._original)
        self.lies, self.endless = set(), None

    def put(self, item: Json) -> None:
        """Add an item, or replace the one of this id."""
        with self._lock:
            self.items[str(item["collection"]), str(item["id"])] = item

    def drop(self, item_id: str) -> None:
        """Remove an item."""
        with self._lock:
            self.items = {key: item for key, item in self.items.items() if key[1] != item_id}

    def item(self, item_id: str) -> Json:
        """The item that is served now, to be changed in place; the only one of this id."""
        return next(item for (_, name), item in self.items.items() if name == item_id)

    # ------------------------------------------------------------------------------------------------ search
    def search(
        self,
        *,
        ids: Sequence[str] | None = None,
        collections: Sequence[str] | None = None,
        bbox: Sequence[float] | None = None,
        intersects: Mapping[str, Any] | None = None,
        datetime: str | None = None,
        filter: str | Mapping[str, Any] | None = None,
        query: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[Json]:
        """Items that fulfil all conditions, newest first.

        Raises
        ------
        HTTPException
            400 where a condition is no valid one.
        """
        conditions = [c for c in (_expression(filter), _expression(_as_cql2(query))) if c is not None]
        area = None
        if intersects is not None:
            area = shapely.geometry.shape(intersects)
        elif bbox is not None and "bbox" not in self.lies:
            area = _polygon(bbox)
        period = None if "datetime" in self.lies else _period(datetime)
        with self._lock:
            items = list(self.items.values())
        found = [
            item
            for item in items
            if (ids is None or item["id"] in ids)
            and (collections is None or item["collection"] in collections)
            and (area is None or shapely.intersects(area, shapely.geometry.shape(item["geometry"])))
            and (period is None or _overlaps(item, period))
            and all(_holds(c, item) for c in conditions)
        ]
        return sorted(found, key=lambda i: (str(i["properties"]["datetime"]), str(i["id"])), reverse=True)

    def page(self, limit: int, token: str | None, **conditions: Any) -> tuple[list[Json], str | None, int]:
        """A page of a search, the token of the next one, and how many items match.

        Raises
        ------
        HTTPException
            400 where a condition or the token is no valid one.
        """
        try:
            first = int((token or "0").rstrip("+"))
        except ValueError as error:
            raise HTTPException(400, f"token {token!r} is none of ours") from error
        found = self.search(**conditions)
        if self.endless == "empty":
            return [], str(first + limit), len(found)
        if self.endless == "same":
            return found[:limit], str(first + limit), len(found)
        if self.endless == "new":
            names = [f"{item['id']}_{first + n}" for n, item in enumerate(found[:limit])]
            return [item | {"id": n} for item, n in zip(found, names, strict=False)], str(first + limit), len(found)
        if "gaps" in self.lies and not str(token).endswith("+"):
            return [], f"{first}+", len(found)
        start = max(0, first - 1) if "repeat" in self.lies else first
        following = str(first + limit) if first + limit < len(found) else None
        return found[start : first + limit], following, len(found)


def _without_links(found: Json) -> Json:
    return found | {"links": []}


def _polygon(bbox: Sequence[float]) -> shapely.Geometry:
    if len(bbox) not in (4, 6):
        raise HTTPException(400, f"bbox has {len(bbox)} numbers")
    half = len(bbox) // 2
    west, south, east, north = bbox[0], bbox[1], bbox[half], bbox[half + 1]
    if west <= east:
        return shapely.box(west, south, east, north)
    return shapely.union(shapely.box(west, south, 180, north), shapely.box(-180, south, east, north))


def _period(text: str | None) -> tuple[dt.datetime | None, dt.datetime | None] | None:
    parsed = str_to_interval(text)
    return parsed if parsed is None or isinstance(parsed, tuple) else (parsed, parsed)


def _overlaps(item: Json, period: tuple[dt.datetime | None, dt.datetime | None]) -> bool:
    properties = item["properties"]
    start, end = (
        dt.datetime.fromisoformat(properties.get(f"{which}_datetime") or properties["datetime"])
        for which in ("start", "end")
    )
    return (period[0] is None or end >= period[0]) and (period[1] is None or start <= period[1])


def _as_cql2(query: Mapping[str, Mapping[str, Any]] | None) -> Json | None:
    """The query extension's conditions in CQL2."""
    parts: list[Json] = []
    for name, conditions in (query or {}).items():
        for operator, value in conditions.items():
            if operator in _OPERATORS:
                parts.append({"op": _OPERATORS[operator], "args": [{"property": name}, value]})
            elif operator in {"startsWith", "endsWith", "contains"}:
                pattern = ("" if operator == "startsWith" else "%") + value + ("" if operator == "endsWith" else "%")
                parts.append({"op": "like", "args": [{"property": name}, pattern]})
            else:
                raise HTTPException(400, f"query: there is no operator {operator!r}")
    return None if not parts else parts[0] if len(parts) == 1 else {"op": "and", "args": parts}


def _expression(text: str | Mapping[str, Any] | None) -> cql2.Expr | None:
    if text is None:
        return None
    try:
        return cql2.Expr(text if isinstance(text, str) else dict(text))
    except Exception as error:  # the library raises several kinds
        raise HTTPException(400, f"filter: {error}") from error


def _holds(condition: cql2.Expr, item: Json) -> bool:
    try:
        return bool(condition.matches(item))
    except Exception:  # a property that the item lacks: unknown, as NULL in SQL
        return False


# ------------------------------------------------------------------------------------------------- the API's client
@attr.s
class MemoryClient(AsyncBaseCoreClient):  # type: ignore[misc]
    """What stac-fastapi asks of a backend."""

    backend: Backend = attr.ib(kw_only=True)

    async def all_collections(self, **kwargs: Any) -> Any:
        base = get_base_url(kwargs["request"])
        found = [self._collection(name, base) for name in sorted(self.backend.collections)]
        links = [{"rel": "root", "type": "application/json", "href": base}]
        return {"collections": found, "links": links, "numberMatched": len(found), "numberReturned": len(found)}

    async def get_collection(self, collection_id: str, **kwargs: Any) -> Any:
        return self._collection(collection_id, get_base_url(kwargs["request"]))

    def _collection(self, name: str, base: str) -> Json:
        if name not in self.backend.collections:
            raise NotFoundError(f"Collection {name} does not exist.")
        links = CollectionLinks(collection_id=name, base_url=base).create_links()
        return self.backend.collections[name] | {"links": links}

    async def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> Any:
        item = self.backend.items.get((collection_id, item_id))
        if item is None:
            raise NotFoundError(f"Item {item_id} in Collection {collection_id} does not exist.")
        return _linked(item, get_base_url(kwargs["request"]))

    async def item_collection(
        self,
        collection_id: str,
        bbox: Any = None,
        datetime: Any = None,
        limit: int | None = 10,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        request = kwargs["request"]
        self._collection(collection_id, get_base_url(request))
        asked = {"bbox": bbox, "datetime": datetime, "collections": [collection_id]}
        page, following, matched = self.backend.page(limit or 10, token, **asked)
        return _answer(request, page, matched, _get_link(request, following))

    async def get_search(
        self,
        collections: Any = None,
        ids: Any = None,
        bbox: Any = None,
        intersects: Any = None,
        datetime: Any = None,
        limit: int | None = 10,
        query: str | None = None,
        filter_expr: str | None = None,
        filter_lang: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        request = kwargs["request"]
        condition: Any = filter_expr
        if filter_expr and filter_lang == "cql2-json":
            condition = json.loads(filter_expr)
        page, following, matched = self.backend.page(
            limit or 10,
            token,
            ids=ids,
            collections=collections,
            bbox=bbox,
            intersects=json.loads(intersects) if intersects else None,
            datetime=datetime,
            filter=condition,
            query=json.loads(query) if query else None,
        )
        return _answer(request, page, matched, _get_link(request, following))

    async def post_search(self, search_request: Any, **kwargs: Any) -> Any:
        request, asked = kwargs["request"], search_request
        page, following, matched = self.backend.page(
            asked.limit or 10,
            asked.token,
            ids=asked.ids,
            collections=asked.collections,
            bbox=asked.bbox,
            intersects=None if asked.intersects is None else asked.intersects.model_dump(mode="json"),
            datetime=asked.datetime,
            filter=asked.filter_expr,
            query=asked.query,
        )
        link: Json | None = None
        if following is not None:
            href = urljoin(get_base_url(request), "search")
            link = {"rel": "next", "type": "application/geo+json", "method": "POST", "href": href}
            link |= {"merge": True, "body": {"token": following}}
        return _answer(request, page, matched, link)


def _get_link(request: Any, token: str | None) -> Json | None:
    if token is None:
        return None
    asked = dict(request.query_params) | {"token": token}
    href = f"{str(request.url).split('?')[0]}?{urlencode(asked)}"
    return {"rel": "next", "type": "application/geo+json", "method": "GET", "href": href}


def _answer(request: Any, page: Sequence[Json], matched: int, following: Json | None) -> Json:
    base = get_base_url(request)
    links: list[Json] = [{"rel": "root", "type": "application/json", "href": base}]
    if following is not None:
        links.append(following)
    return {
        "type": "FeatureCollection",
        "features": [_linked(item, base) for item in page],
        "links": links,
        "numberMatched": matched,
        "numberReturned": len(page),
    }


def _linked(item: Json, base: str) -> Json:
    links = ItemLinks(collection_id=item["collection"], item_id=item["id"], base_url=base).create_links()
    return item | {"links": links}


def items_of(features: Sequence[Json]) -> Iterator[pystac.Item]:
    """pystac's view of items."""
    for feature in features:
        yield pystac.Item.from_dict(copy.deepcopy(feature))
