"""The server: stac-fastapi's application beside one for files with byte ranges, run by uvicorn in a thread.

Belongs here: putting the applications together, starting and stopping. Does not belong here: what is found
(``backend``), how requests fail (``faults``).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import APIRouter
from stac_fastapi.api.app import StacApi
from stac_fastapi.api.models import (
    ItemCollectionUri,
    create_get_request_model,
    create_post_request_model,
    create_request_model,
)
from stac_fastapi.extensions import QueryExtension, SearchFilterExtension, TokenPaginationExtension
from stac_fastapi.types.config import ApiSettings
from stac_fastapi.types.search import APIRequest
from starlette.responses import FileResponse, PlainTextResponse

from dl4gam_assets_tests.stac_server.backend import Backend, MemoryClient
from dl4gam_assets_tests.stac_server.faults import Books, Fault, FaultLayer, Request, Rule

#: Beginning of the API's paths, as most real ones have it, and of those of files.
API, FILES = "/v1", "/files"


def stac_app(backend: Backend) -> Any:
    """stac-fastapi's application over a backend: core, item search, query, filter (CQL2), pages by token."""
    pages = TokenPaginationExtension()
    extensions = [QueryExtension(), SearchFilterExtension(), pages]
    items = create_request_model(
        "ItemCollectionUri", base_model=ItemCollectionUri, extensions=[pages], request_type="GET"
    )
    settings = ApiSettings(
        stac_fastapi_title="Simulated scenes on loopback",
        stac_fastapi_description="For tests. Nothing in here was measured.",
        stac_fastapi_landing_id="loopback",
        stac_fastapi_version="1",
    )
    return StacApi(
        settings=settings,
        client=MemoryClient(backend=backend),
        extensions=extensions,
        router=APIRouter(prefix=API),
        items_get_request_model=cast(type[APIRequest], items),
        search_get_request_model=create_get_request_model(extensions),
        search_post_request_model=create_post_request_model(extensions),
    ).app


class Server:
    """A running server of one region's inputs, and all that a test may want to know of it or do to it.

    Attributes
    ----------
    url
        of the API
    backend
        what it finds; may be changed
    books
        the requests so far
    replaced
        files served in place of others, by path below the region's inputs (``scenes/ITEM/green.tif``); None: gone

    Parameters
    ----------
    folder
        the region's inputs, which hold ``stac/catalog.json``, or will
    port
        0: any free one
    api
        another ASGI application that answers below ``/v1``, in place of stac-fastapi's over ``backend``
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0, api: Any = None):
        self.folder = Path(folder)
        self.backend, self.books = Backend(), Books()
        self.replaced: dict[str, Path | None] = {}
        self._socket = socket.create_server((host, port), backlog=128)
        # asyncio sets it only on sockets that name their protocol; without it each answer waits 40 ms.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.root = f"http://{host}:{self._socket.getsockname()[1]}"
        self.url, self.files_url = f"{self.root}{API}", f"{self.root}{FILES}/"
        self._api = stac_app(self.backend) if api is None else api
        self.layer = FaultLayer(self._dispatch, self.books, lambda: self._uvicorn.server_state.connections)
        # h11: one implementation whatever else is installed.
        config = uvicorn.Config(
            self.layer, http="h11", loop="asyncio", lifespan="on", log_level="critical", access_log=False,
            timeout_graceful_shutdown=1, timeout_keep_alive=30,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._socket],), daemon=True)
        self.backend.load(self.folder, self.files_url)

    @property
    def collections(self) -> list[str]:
        """Ids of the collections."""
        return sorted(self.backend.collections)

    # ------------------------------------------------------------------------------------------------ applications
    async def _dispatch(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")  # none at the start and at the end of the server's life
        if not path.startswith(f"{FILES}/"):
            self.backend.load(self.folder, self.files_url)
            await self._api(scope, receive, send)
            return
        name = path.removeprefix(f"{FILES}/")
        file = self.replaced[name] if name in self.replaced else self.folder / name
        inside = file is not None and (name in self.replaced or file.resolve().is_relative_to(self.folder.resolve()))
        answer: Any
        if scope["method"] not in {"GET", "HEAD"}:
            answer = PlainTextResponse("only GET and HEAD", 405, {"allow": "GET, HEAD"})
        elif file is None or not inside or not file.is_file():
            answer = PlainTextResponse(f"there is no {name}", 404)
        else:
            answer = FileResponse(file, media_type="image/tiff" if file.suffix == ".tif" else None)
        await answer(scope, receive, send)

    # ------------------------------------------------------------------------------------------------ for tests
    def fail(
        self,
        pattern: str,
        fault: Fault,
        *,
        skip: int = 0,
        times: int | None = None,
        method: str | None = None,
        for_s: float | None = None,
    ) -> Rule:
        """Let requests whose path matches a pattern (``*/green.tif``, ``/v1/search``) fail; see :class:`Rule`.

        Rules are asked in turn; one that strikes hides the request from those after it.
        """
        rule = Rule(pattern, fault, skip, times, method, for_s)
        with self.books.lock:
            self.books.rules.append(rule)
        return rule

    def forget(self) -> None:
        """Start the books anew."""
        with self.books.lock:
            self.books.requests, self.books.most_busy = [], 0

    def restore(self) -> None:
        """All well again: no faults, the region's own items and files, empty books."""
        with self.books.lock:
            self.books.rules = []
        self.replaced.clear()
        self.layer.latency_s = 0.0
        self.backend.restore()
        self.forget()

    def asked(self, part: str = "") -> list[Request]:
        """Requests so far whose path has ``part`` in it."""
        with self.books.lock:
            return [r for r in self.books.requests if part in r.path]

    @property
    def bytes_sent(self) -> int:
        """Bytes of files that were sent so far."""
        return sum(r.sent for r in self.asked(f"{FILES}/"))

    # ------------------------------------------------------------------------------------------------ life
    def start(self) -> None:
        """Serve, in a thread of its own.

        Raises
        ------
        RuntimeError
            if it does not answer within ten seconds.
        """
        logging.getLogger("stac_fastapi").setLevel(logging.ERROR)
        self._thread.start()
        until = time.monotonic() + 10
        while not self._uvicorn.started:
            if time.monotonic() > until or not self._thread.is_alive():
                raise RuntimeError(f"the server on {self.root} did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Serve no more; open connections are cut."""
        self.layer.stopping = True
        self._uvicorn.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def wait(self) -> None:
        """Return when the server ends."""
        while self._thread.is_alive():
            self._thread.join(0.5)


@contextlib.contextmanager
def serving(folder: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[Server]:
    """A running server of a region's inputs (the folder that holds ``stac/catalog.json``), on a free port."""
    server = Server(folder, host, port)
    server.start()
    try:
        yield server
    finally:
        server.stop()
