"""How requests fail: what happens to which request, by path and by turn.

Belongs here: the faults, their rules, the ASGI layer that applies them and keeps the books of all requests.
Does not belong here: wrong content that is served well (``damage``, ``backend``).
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["status", "hang", "stall", "half", "lying", "empty", "html", "reset"]


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    ``status``: that answer, with ``Retry-After`` where ``retry_after`` is set. ``hang``: nothing for ``seconds``, then
    a reset. ``stall``: the header and half of the content, then nothing for ``seconds``. ``half``: half of the promised
    content, then a reset. ``lying``: half of the content, and the header says that this is all. ``empty``: well, but
    zero bytes. ``html``: a web page with status 200. ``reset``: the connection is reset before an answer.
    """

    kind: Kind
    status: int = 200
    retry_after: int | str | None = None
    seconds: float = 0.0


def status(code: int, retry_after: int | str | None = None) -> Fault:
    """An answer with this status; ``retry_after`` in seconds or as a date of HTTP."""
    return Fault("status", code, retry_after)


def hang(seconds: float = 30.0) -> Fault:
    """No answer at all."""
    return Fault("hang", seconds=seconds)


def stall(seconds: float = 30.0) -> Fault:
    """An answer that stops half-way."""
    return Fault("stall", seconds=seconds)


HALF, LYING, EMPTY, HTML, RESET = Fault("half"), Fault("lying"), Fault("empty"), Fault("html"), Fault("reset")


@dataclass
class Rule:
    """A fault for requests whose path matches a pattern: ``times`` of them (None: all), after ``skip`` good ones, and
    only in the ``for_s`` seconds after the first (None: always)."""

    pattern: str
    fault: Fault
    skip: int = 0
    times: int | None = None
    method: str | None = None
    for_s: float | None = None
    seen: int = 0
    struck: int = 0  # how often it came about
    since: float = 0.0  # when for the first time

    def strikes(self, method: str, path: str, now: float) -> bool:
        """Whether a request fails by this rule, which counts it."""
        if not fnmatch.fnmatchcase(path, self.pattern) or self.method not in (None, method):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.seen > self.skip + self.times):
            return False
        self.since = self.since or now
        if self.for_s is not None and now > self.since + self.for_s:
            return False
        self.struck += 1
        return True


@dataclass
class Request:
    """One line of the books."""

    method: str
    path: str
    query: str
    range: str | None
    at: float  # time.monotonic()
    fault: Fault | None = None
    status: int = 0
    sent: int = 0  # bytes of content


@dataclass
class Books:
    """All requests so far, and the rules."""

    requests: list[Request] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, method: str, path: str, query: str, range_: str | None) -> Request:
        with self.lock:
            request = Request(method, path, query, range_, time.monotonic())
            self.requests.append(request)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            request.fault = next((r.fault for r in self.rules if r.strikes(method, path, request.at)), None)
            return request

    def end(self) -> None:
        with self.lock:
            self.busy -= 1


class FaultLayer:
    """ASGI layer around an application. ``connections`` gives uvicorn's open connections, to reset them."""

    def __init__(self, app: Any, books: Books, connections: Callable[[], Iterable[Any]]):
        self.app, self.books, self.connections = app, books, connections
        self.latency_s = 0.0
        self.stopping = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        query = scope["query_string"].decode()
        request = self.books.begin(scope["method"], scope["path"], query, headers.get(b"range"))
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            await self._answer(scope, receive, self._counting(send, request), request.fault)
        finally:
            self.books.end()

    @staticmethod
    def _counting(send: Any, request: Request) -> Any:
        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            elif message["type"] == "http.response.body" and request.method != "HEAD":
                request.sent += len(message.get("body", b""))
            await send(message)

        return counting

    async def _answer(self, scope: Any, receive: Any, send: Any, fault: Fault | None) -> None:
        if fault is None:
            await self.app(scope, receive, send)
        elif fault.kind == "status":
            more = {} if fault.retry_after is None else {"retry-after": str(fault.retry_after)}
            await _plain(send, fault.status, b'{"code": "fault", "description": "as asked"}', "application/json", more)
        elif fault.kind == "html":
            await _plain(send, 200, b"<html><body>Please sign in</body></html>", "text/html", {})
        elif fault.kind == "empty":
            await _plain(send, 200, b"", "application/octet-stream", {"accept-ranges": "bytes"})
        elif fault.kind in {"hang", "reset"}:
            await self._pause(fault.seconds)
            self._reset(scope)
        else:
            await self._partly(scope, receive, send, fault)

    async def _partly(self, scope: Any, receive: Any, send: Any, fault: Fault) -> None:
        """Let the application answer, and pass on half of it."""
        messages: list[Any] = []

        async def keep(message: Any) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        start = messages[0]
        content = b"".join(m.get("body", b"") for m in messages[1:])
        half = content[: len(content) // 2]
        if fault.kind == "lying":
            await send({**start, "headers": _shortened(start["headers"], len(half))})
            await send({"type": "http.response.body", "body": half})
            return
        await send(start)
        await send({"type": "http.response.body", "body": half, "more_body": True})
        await asyncio.sleep(0.05)  # so that the half is on its way before the reset
        await self._pause(fault.seconds)
        self._reset(scope)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stopping:
            await asyncio.sleep(min(0.05, seconds))

    def _reset(self, scope: Any) -> None:
        """End a connection by RST, as a crashed server or a full firewall does."""
        for connection in list(self.connections()):
            if connection.client == tuple(scope["client"]):
                plug = connection.transport.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.transport.abort()


async def _plain(send: Any, code: int, content: bytes, media: str, more: dict[str, str]) -> None:
    headers = {"content-type": media, "content-length": str(len(content)), **more}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": code, "headers": raw})
    await send({"type": "http.response.body", "body": content})


def _shortened(headers: Iterable[tuple[bytes, bytes]], size: int) -> list[tuple[bytes, bytes]]:
    """Headers that promise ``size`` bytes."""
    out = []
    for name, value in headers:
        if name.lower() == b"content-length":
            value = str(size).encode()
        elif name.lower() == b"content-range":
            unit, rest = value.split(b" ", 1)
            first, total = rest.split(b"-", 1)[0], rest.split(b"/", 1)[1]
            value = b"%s %s-%d/%s" % (unit, first, int(first) + size - 1, total)
        out.append((name, value))
    return out
