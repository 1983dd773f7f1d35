"""The STAC API catalog against a real server on this machine: search, pages, refusals, items by id."""

from __future__ import annotations

import datetime as dt
import json
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pystac
import pytest
import shapely
import shapely.geometry

from dl4gam_assets.imagery import CatalogError, open_catalog
from dl4gam_assets.settings import SensorSettings, StacApi
from dl4gam_assets_tests.imagery.conftest import ItemMaker

CONFORMS = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/item-search",
    "https://api.stacspec.org/v1.0.0/item-search#query",
]


class Api(ThreadingHTTPServer):
    """A STAC API with item search, two items a page, that can refuse the next requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.items: list[pystac.Item] = []
        self.refuse: list[int] = []
        self.retry_after: str | None = None
        self.hang_s: list[float] = []
        self.times: list[float] = []
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _send(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200 and self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        links = [
            {"rel": "root", "href": self.server.url, "type": "application/json"},
            {"rel": "search", "href": f"{self.server.url}/search", "type": "application/geo+json", "method": "POST"},
        ]
        self._send(
            {"type": "Catalog", "id": "api", "description": "x", "stac_version": "1.0.0", "conformsTo": CONFORMS,
             "links": links}
        )  # fmt: skip

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.times.append(time.monotonic())
        if self.server.hang_s:
            time.sleep(self.server.hang_s.pop(0))
            self.close_connection = True
            return
        if self.server.refuse:
            self._send({"code": "slow down"}, self.server.refuse.pop(0))
            return
        self.server.asked.append(asked)
        found = [item for item in self.server.items if _matches(item, asked)]
        first = int(asked.get("token", 0))
        page: dict[str, Any] = {
            "type": "FeatureCollection",
            "features": [item.to_dict() for item in found[first : first + 2]],
            "links": [],
        }
        if first + 2 < len(found):
            page["links"] = [
                {"rel": "next", "href": f"{self.server.url}/search", "method": "POST", "merge": True,
                 "body": {"token": first + 2}}
            ]  # fmt: skip
        self._send(page)


def _matches(item: pystac.Item, asked: dict[str, Any]) -> bool:
    if "ids" in asked:
        return item.id in asked["ids"]
    first, last = (dt.datetime.fromisoformat(t) for t in asked["datetime"].split("/"))
    assert item.datetime is not None
    here = shapely.geometry.shape(item.geometry).intersects(shapely.box(*asked["bbox"]))
    clear = item.properties.get("eo:cloud_cover", 0) < asked.get("query", {}).get("eo:cloud_cover", {}).get("lt", 101)
    return first <= item.datetime <= last and here and clear


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _open(api: Api, **more: Any) -> Any:
    return open_catalog(StacApi(url=api.url, collections=["s2"], **more), Path(), SensorSettings())


def test_a_search_reads_all_pages_and_keeps_the_solar_days_asked_for(api: Api, make_item: ItemMaker) -> None:
    days = ["2020-07-31", "2020-08-01", "2020-08-20", "2020-09-10", "2020-10-15", "2020-10-16"]
    api.items = [make_item(day, day) for day in reversed(days)]
    box = api.items[0].bbox
    assert box is not None
    found = _open(api).search(box, dt.date(2020, 8, 1), dt.date(2020, 10, 15))
    assert [i.id for i in found] == days[1:5]
    assert len(api.asked) == 3 and api.asked[0]["collections"] == ["s2"]
    assert not _open(api).search([0, 0, 1, 1], dt.date(2020, 8, 1), dt.date(2020, 10, 15))


def test_the_query_of_the_settings_is_sent(api: Api, make_item: ItemMaker) -> None:
    api.items = [make_item("clear", "2020-08-10"), make_item("overcast", "2020-08-12")]
    api.items[1].properties["eo:cloud_cover"] = 95
    box = api.items[0].bbox
    catalog = _open(api, query={"eo:cloud_cover": {"lt": 80}})
    assert [i.id for i in catalog.search(box, dt.date(2020, 8, 1), dt.date(2020, 8, 30))] == ["clear"]


def test_a_busy_server_is_asked_again(api: Api, make_item: ItemMaker) -> None:
    api.items = [make_item("a", "2020-08-10")]
    catalog = _open(api)
    api.refuse = [429]
    assert [i.id for i in catalog.search(api.items[0].bbox, dt.date(2020, 8, 1), dt.date(2020, 8, 30))] == ["a"]
    assert not api.refuse


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_respected(api: Api, make_item: ItemMaker, as_date: bool) -> None:
    """In seconds, and as a date of HTTP (which counts whole seconds); without it the first repetition is at once."""
    api.items = [make_item("a", "2020-08-10")]
    catalog = _open(api)
    api.refuse = [503]
    api.retry_after = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    assert len(catalog.search(api.items[0].bbox, dt.date(2020, 8, 1), dt.date(2020, 8, 30))) == 1
    first, second = api.times
    assert 0.9 <= second - first < 3.5


def test_waits_grow(api: Api, make_item: ItemMaker) -> None:
    api.items = [make_item("a", "2020-08-10")]
    catalog = _open(api)
    api.refuse = [500, 502, 429]
    assert len(catalog.search(api.items[0].bbox, dt.date(2020, 8, 1), dt.date(2020, 8, 30))) == 1
    waits = [b - a for a, b in zip(api.times, api.times[1:], strict=False)]
    assert waits[0] < 0.8 and 2.0 <= waits[1] < 3.5 and 4.0 <= waits[2] < 6.0


def test_a_silent_server_is_asked_again_and_then_given_up(api: Api, make_item: ItemMaker) -> None:
    api.items = [make_item("a", "2020-08-10")]
    catalog = _open(api, timeout_s=0.2)
    api.hang_s = [0.6]
    assert len(catalog.search(api.items[0].bbox, dt.date(2020, 8, 1), dt.date(2020, 8, 30))) == 1
    api.hang_s = [0.6] * 3
    start = time.monotonic()
    with pytest.raises(CatalogError, match=rf"search in {api.url} failed: .*[Tt]imed? ?out"):
        catalog.search(api.items[0].bbox, dt.date(2020, 8, 1), dt.date(2020, 8, 30))
    assert not api.hang_s and time.monotonic() - start < 6


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as listener:  # a port that nobody else gets meanwhile, and that does not answer
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(CatalogError, match=rf"STAC API {url} does not answer: .*refused"):
            open_catalog(StacApi(url=url, collections=["s2"]), Path(), SensorSettings())


def test_a_refusal_names_the_address(api: Api, make_item: ItemMaker) -> None:
    catalog = _open(api)
    api.refuse = [400]
    with pytest.raises(CatalogError, match=rf"search in {api.url} failed"):
        catalog.search([0, 0, 1, 1], dt.date(2020, 8, 1), dt.date(2020, 8, 30))


def test_items_come_back_by_id_in_the_order_asked_for(api: Api, make_item: ItemMaker) -> None:
    api.items = [make_item(name, "2020-08-10") for name in ("a", "b", "c")]
    catalog = _open(api)
    assert [i.id for i in catalog.get(["c", "a", "b"])] == ["c", "a", "b"]
    with pytest.raises(CatalogError, match="no item 'gone'"):
        catalog.get(["a", "gone"])
