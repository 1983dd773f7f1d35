"""A small HTTP server of files with byte ranges on loopback, which can be told to misbehave.

Belongs here: what an object store does with GET, HEAD and Range, and the ways in which one fails.
Does not belong here: STAC (``stac_server``), and what a reader makes of it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: What to do with a request: its path, and how many requests for that path came before. None: answer well.
Trouble = Callable[[str, int], str | None]


@dataclass
class RangeServer:
    """Serves ``folder`` below ``url``; ``trouble`` may be set at any time.

    Troubles are named by words: ``503``, any other status, ``429 after 2`` (with Retry-After), ``reset`` (the
    connection is cut before an answer), ``short`` (half of the promised bytes, then the connection is cut),
    ``lying`` (half of the bytes, the header says so too), ``hang`` (no answer for ``hang_s`` seconds), ``stall`` (the
    header and some bytes, then nothing for ``hang_s`` seconds), ``html`` (a page with status 200) and ``whole``
    (the range is ignored).
    """

    folder: Path
    latency_s: float = 0.0
    hang_s: float = 30.0
    trouble: Trouble | None = None
    requests: list[tuple[str, str, str | None, float]] = field(default_factory=list)  # method, path, range, time
    sent: int = 0
    busy: int = 0
    most_busy: int = 0
    url: str = ""
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[str, int] = field(default_factory=dict)

    def forget(self) -> None:
        """Start counting anew."""
        with self.lock:
            self.requests, self.counts, self.sent, self.most_busy = [], {}, 0, 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    state: RangeServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        state = self.server.state
        path = self.path.split("?")[0].lstrip("/")
        with state.lock:
            before = state.counts.get(path, 0)
            state.counts[path] = before + 1
            state.requests.append((self.command, path, self.headers.get("Range"), time.monotonic()))
            state.busy += 1
            state.most_busy = max(state.most_busy, state.busy)
        try:
            if state.latency_s:
                time.sleep(state.latency_s)
            trouble = state.trouble(path, before) if state.trouble else None
            self._answer(state, path, body, trouble)
        finally:
            with state.lock:
                state.busy -= 1

    def _answer(self, state: RangeServer, path: str, body: bool, trouble: str | None) -> None:
        if trouble == "hang":
            state.stopping.wait(state.hang_s)
            self.close_connection = True
            return
        if trouble == "reset":
            self._cut()
            return
        if trouble and (status := re.fullmatch(r"(\d{3})(?: after (.+))?", trouble)):
            self._send(int(status[1]), b"no", body, {"Retry-After": status[2]} if status[2] else {})
            return
        if trouble == "html":
            self._send(200, b"<html><body>Please sign in</body></html>", body, {"Content-Type": "text/html"})
            return
        file = state.folder / path
        if not file.is_file():
            self._send(404, b"not found", body, {})
            return
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or trouble == "whole":
            self._send(200, file.read_bytes(), body, {"Accept-Ranges": "bytes"})
            return
        first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        if first >= size:
            self._send(416, b"", body, {"Content-Range": f"bytes */{size}"})
            return
        with file.open("rb") as handle:
            handle.seek(first)
            content = handle.read(last - first + 1)
        if trouble == "lying":
            content = content[: len(content) // 2]
            last = first + len(content) - 1
        headers = {"Content-Range": f"bytes {first}-{last}/{size}", "Accept-Ranges": "bytes"}
        self._send(206, content, body, headers, trouble)

    def _send(
        self, status: int, content: bytes, body: bool, headers: dict[str, str], trouble: str | None = None
    ) -> None:
        state = self.server.state
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        if trouble in {"short", "stall"}:
            content = content[: len(content) // 2]
        with state.lock:
            state.sent += len(content)
        self.wfile.write(content)
        self.wfile.flush()
        if trouble == "stall":
            state.stopping.wait(state.hang_s)
        if trouble in {"short", "stall"}:
            self._cut()

    def _cut(self) -> None:
        """Reset the connection instead of closing it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


@contextlib.contextmanager
def serving(folder: Path, latency_s: float = 0.0) -> Iterator[RangeServer]:
    """A running server of ``folder`` on a free port of loopback."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = RangeServer(folder, latency_s=latency_s)
    server.state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.state.stopping.set()
        server.shutdown()
        server.server_close()
