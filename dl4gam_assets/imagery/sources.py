"""Open image files, near or far: one pool for all threads of a process, retries, the bytes they cost.

Belongs here: opening and closing files, asking a server again, telling a passing trouble from damage, the threads that
read, counting bytes.
Does not belong here: grids, scales and masks (``reading``), catalogs of files.

What GDAL does about a failing server, and what is done here instead. GDAL (3.10, and 3.12) repeats requests by
``GDAL_HTTP_MAX_RETRY``, but never reads ``Retry-After``, does not repeat requests of several ranges at once (before
3.13, github.com/OSGeo/gdal/pull/13898), and remembers a failed answer, even a range that came in short, for the whole
process. So GDAL repeats nothing here. A failed read is diagnosed with one small request of our own, whose answer
tells the status and ``Retry-After``; what GDAL remembers of the file is dropped; then the whole window is read again.
A wait that one server asked for holds for all threads.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import json
import logging
import math
import os
import random
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import rasterio
import rasterio.errors
from rasterio._err import CPLE_BaseError  # what a warp of a damaged file raises; rasterio.errors does not export it

from dl4gam_assets.compute import TransientError
from dl4gam_assets.imagery.catalogs import local_path
from dl4gam_assets.imagery.signing import signed, unsigned

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Open files that wait to be used again, in one process. Each holds a file descriptor or a few KiB of header.
MAX_IDLE_FILES = 256


class SceneError(RuntimeError):
    """A scene that can not be used. The message names the file or item."""


class SceneUnreachableError(SceneError, TransientError):
    """A file that a server did not give, though it may do so later: the scene is not known to be bad."""


@dataclass(frozen=True)
class ReadPolicy:
    """How many files are read at once and how patiently. Never changes a value that is read.

    Parameters
    ----------
    concurrent
        files read at once by one process; 0: 16 where a file is on a network, 1 where all are local (the processes of
        the map over glaciers keep the processors busy already).
    attempts
        how often a file on a network is asked for. Where nothing points to a passing trouble, twice more at most.
    stall_s
        seconds without progress after which a request is given up.
    request_s
        seconds that one request may take.
    budget_s
        no attempt begins later than this after the first: with ``request_s``, the bound of a hanging server.
    backoff_s
        first wait between attempts; doubled each time, times a random factor from 0.5 to 1.5.
    longest_wait_s
        a server that asks (``Retry-After``) for a longer wait than this is taken as unreachable.
    """

    concurrent: int = 0
    attempts: int = 6
    stall_s: float = 20.0
    request_s: float = 120.0
    budget_s: float = 180.0
    backoff_s: float = 0.5
    longest_wait_s: float = 120.0


_POLICY: contextvars.ContextVar[ReadPolicy | None] = contextvars.ContextVar("read_policy", default=None)


def policy_in_force() -> ReadPolicy:
    """The policy of the innermost :func:`reading_with`."""
    return _POLICY.get() or ReadPolicy()


def gdal_options(policy: ReadPolicy) -> dict[str, Any]:
    """GDAL options for windows of many files: no directory listings, merged range requests, bounded time."""
    return {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
        "GDAL_HTTP_MULTIPLEX": "YES",
        "CPL_VSIL_CURL_CACHE_SIZE": 64_000_000,
        "GDAL_HTTP_MAX_RETRY": 0,  # see the module's docstring
        "GDAL_HTTP_CONNECTTIMEOUT": max(1, round(min(policy.stall_s, policy.request_s))),
        "GDAL_HTTP_LOW_SPEED_TIME": max(1, round(policy.stall_s)),
        "GDAL_HTTP_LOW_SPEED_LIMIT": 500,  # bytes a second
        "GDAL_HTTP_TIMEOUT": max(1, round(policy.request_s)),
        "CPL_VSIL_NETWORK_STATS_ENABLED": "YES",
    }


@contextlib.contextmanager
def reading_with(policy: ReadPolicy | None = None) -> Iterator[ReadPolicy]:
    """Reads in the block follow a policy (the one in force where None) and GDAL has the options for it."""
    now = policy or policy_in_force()
    token = _POLICY.set(now)
    try:
        with rasterio.Env(**gdal_options(now)):
            yield now
    finally:
        _POLICY.reset(token)


# ------------------------------------------------------------------------------------------- the pool of open files
_Key = tuple[str, tuple[int, int] | None]


class _Pool:
    """Idle open files. A file that is taken belongs to one thread alone: GDAL's data sets must not be shared."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._idle: OrderedDict[_Key, list[Any]] = OrderedDict()
        self._count = 0

    def take(self, key: _Key) -> Any | None:
        with self._lock:
            waiting = self._idle.get(key)
            if not waiting:
                return None
            source = waiting.pop()
            self._count -= 1
            if not waiting:
                del self._idle[key]
            return source

    def give(self, key: _Key, source: Any) -> None:
        surplus = []
        with self._lock:
            self._idle.setdefault(key, []).append(source)
            self._idle.move_to_end(key)
            self._count += 1
            while self._count > self.limit:
                oldest = next(iter(self._idle))
                surplus.append(self._idle[oldest].pop(0))
                self._count -= 1
                if not self._idle[oldest]:
                    del self._idle[oldest]
        for old in surplus:
            _close(old)

    def clear(self) -> None:
        with self._lock:
            everything = [source for waiting in self._idle.values() for source in waiting]
            self._idle.clear()
            self._count = 0
        for source in everything:
            _close(source)

    def abandon(self) -> None:
        """Forget the files without closing them: after a fork they belong to the parent."""
        self._lock = threading.Lock()
        self._idle = OrderedDict()
        self._count = 0


_POOL = _Pool(MAX_IDLE_FILES)


def _close(source: Any) -> None:
    with contextlib.suppress(rasterio.errors.RasterioError, CPLE_BaseError):
        source.close()


def forget_files() -> None:
    """Close the files that no thread is using, and drop what GDAL remembers of servers."""
    _POOL.clear()
    library = _gdal()
    if library is not None:
        library.VSICurlClearCache()


@contextlib.contextmanager
def closing_files() -> Iterator[None]:
    """Close all idle files when the block ends (tests on platforms that lock open files)."""
    try:
        yield
    finally:
        forget_files()


def _open(href: str) -> Any:
    try:
        with _MUTTERINGS.refused():
            source = rasterio.open(signed(href), driver=_driver_of(href))
    except _NONSENSE as error:
        raise SceneError(_damaged(href, error)) from error
    if source.crs is None:
        source.close()
        raise SceneError(f"scene file {href} has no coordinate reference system")
    if not all(map(math.isfinite, source.transform)) or source.transform.is_degenerate:
        source.close()
        raise SceneError(f"scene file {href} has a geotransform without area: {tuple(source.transform)[:6]}")
    return source


def _driver_of(href: str) -> str | None:
    """GDAL's driver for a file on a network: GeoTIFF or JPEG 2000. Those of a local file are the user's choice (None).

    Left to GDAL, the content chooses: a server elsewhere could give a VRT or a WMS description, which lead to any file
    and any host.
    """
    if local_path(href) is not None:
        return None
    return "JP2OpenJPEG" if urlsplit(href).path.lower().endswith((".jp2", ".j2k", ".jpx")) else "GTiff"


# ----------------------------------------------------------------------------------------------------- reading a file
_TROUBLES = (rasterio.errors.RasterioError, CPLE_BaseError)
#: What a header of numbers that make no sense together leads to, in rasterio and here.
_NONSENSE = (ValueError, ArithmeticError, TypeError, KeyError)


def read(href: str, action: Callable[[Any], T]) -> T:
    """What ``action`` makes of an open file; for a file on a network, asked for again as the policy says.

    Parameters
    ----------
    href : path or URL of an image file
    action : called with the open rasterio data set, which no other thread uses meanwhile; may be called again

    Raises
    ------
    SceneUnreachableError
        if a server did not give the file in time, or asks to wait too long.
    SceneError
        if there is no such file, it is damaged, or it is no image. Both name the file.
    """
    local = local_path(href)
    if local is None:
        return _read_far(href, action)
    try:
        stat = local.stat()
    except OSError as error:
        raise SceneError(f"scene file {href} can not be opened: {error.strerror}") from error
    try:
        return _once((href, (stat.st_size, stat.st_mtime_ns)), action)
    except _TROUBLES as error:
        raise SceneError(_damaged(href, error)) from error


class _Mutterings(logging.Handler):
    """Keeps what GDAL warns of while a thread reads.

    A part of a file's header that can not be read (a failed request, a cut file) is a warning only: the file opens
    without its georeference or its no-data value, and its pixels would be wrong in silence.
    """

    _GRAVE = re.compile(r"IO error|error fetching|read error|not enough data|short read", re.IGNORECASE)

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        grave = getattr(self.heard, "grave", None)
        if grave is not None and self._GRAVE.search(text := record.getMessage()):
            grave.append(text)

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Raise at the end of the block if something grave was said."""
        grave: list[str] = []
        self.heard.grave = grave
        try:
            yield
        finally:
            self.heard.grave = None
        if grave:
            raise rasterio.errors.RasterioIOError(grave[0])


_MUTTERINGS = _Mutterings()
logging.getLogger("rasterio._env").addHandler(_MUTTERINGS)


def _once(key: _Key, action: Callable[[Any], T]) -> T:
    source = _POOL.take(key) or _open(key[0])
    try:
        with _MUTTERINGS.refused():
            value = action(source)
    except SceneError:
        _POOL.give(key, source)  # the file is well, something about its content was refused
        raise
    except _NONSENSE as error:
        _close(source)
        raise SceneError(_damaged(key[0], error)) from error
    except BaseException:
        _close(source)
        raise
    _POOL.give(key, source)
    return value


def _damaged(href: str, error: BaseException) -> str:
    return f"scene file {href} can not be read: {_words(error)}; is it complete?"


def _words(error: BaseException) -> str:
    """The message of an error of GDAL, with the cause that rasterio hides behind it."""
    texts = [str(error)]
    cause = error.__cause__
    while cause is not None and len(texts) < 3:
        texts.append(str(cause))
        cause = cause.__cause__
    return unsigned(" / ".join(" ".join(t.split()) for t in dict.fromkeys(texts)))[:500]


# ----------------------------------------------------------------------------------------------- files on a network
@dataclass(frozen=True)
class _Answer:
    """What a server says when it is asked for one byte of a file."""

    verdict: str  # well, later, never, silent
    words: str
    wait_s: float = 0.0


_HOLDS: dict[str, float] = {}  # host -> time (monotonic) before which it asked not to be bothered
_SILENT: dict[str, float] = {}  # host -> time until which it is taken as down: one attempt for each file
_HOST_LOCK = threading.Lock()

#: Messages of GDAL and curl that point to the network rather than to the file.
_PASSING = re.compile(
    r"response code: (408|425|429|5\d\d)|CURL error|too slow|timed? ?out|connection|Range downloading not supported"
    r"|resolve host|SSL|partial file",
    re.IGNORECASE,
)
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


def _read_far(href: str, action: Callable[[Any], T]) -> T:
    rules = policy_in_force()
    host = urlsplit(href).netloc
    start = time.monotonic()
    attempts, done = rules.attempts, 0
    while True:
        _wait_for(host, href, rules)
        try:
            value = _once((href, None), action)
        except _TROUBLES as error:
            done += 1
            words = _words(error)
            forget_remote(href)
            answer = _ask(href, rules)
            if answer.verdict == "never":
                raise SceneError(f"scene file {href} can not be opened: {answer.words}") from error
            passing = answer.verdict != "well" or _PASSING.search(words)
            if not passing:
                attempts = min(attempts, 3)
            if answer.verdict == "silent" and _SILENT.get(host, 0.0) > start:
                attempts = 1  # another file found out already
            wait = rules.backoff_s * 2 ** (done - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
            wait = max(wait, answer.wait_s)
            late = time.monotonic() + wait - start > rules.budget_s
            if done >= attempts or late or answer.wait_s > rules.longest_wait_s:
                if not passing:
                    raise SceneError(f"{_damaged(href, error)} {answer.words}".strip()) from error
                if answer.verdict == "silent":
                    _SILENT[host] = time.monotonic() + 30.0
                said = answer.words or words
                asks = f"; it asks to wait {answer.wait_s:.0f} s" if answer.wait_s > rules.longest_wait_s else ""
                raise SceneUnreachableError(
                    f"scene file {href} was not to be had in {done} attempts and {time.monotonic() - start:.0f} s: "
                    f"{said}{asks}; try again later"
                ) from error
            log.info(f"{href}: {answer.words or words}; attempt {done + 1} of {attempts} in {wait:.1f} s")
            if answer.wait_s:
                with _HOST_LOCK:
                    _HOLDS[host] = max(_HOLDS.get(host, 0.0), time.monotonic() + wait)
            else:
                time.sleep(wait)
        else:
            _SILENT.pop(host, None)
            return value


def _wait_for(host: str, href: str, rules: ReadPolicy) -> None:
    """Sleep while a server wishes to be left alone."""
    while (rest := _HOLDS.get(host, 0.0) - time.monotonic()) > 0:
        if rest > rules.longest_wait_s:
            raise SceneUnreachableError(f"scene file {href}: {host} asks to wait {rest:.0f} s; try again later")
        time.sleep(min(rest, 1.0) + random.uniform(0.0, 0.05))  # noqa: S311 - not all threads at once


@functools.cache
def _session() -> Any:
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=16, max_retries=0))
    return session


def _ask(href: str, rules: ReadPolicy) -> _Answer:
    """Ask a server for the first byte of a file, to learn its status and for how long it wants to be left alone."""
    import requests
    from urllib3 import Retry

    if _HOLDS.get(urlsplit(href).netloc, 0.0) > time.monotonic():
        return _Answer("later", "the server asked another thread to wait")
    if urlsplit(href).scheme not in {"http", "https"}:
        return _Answer("later", "")  # an object store by its own protocol: GDAL's message has to do
    try:
        timeout = (min(10.0, rules.stall_s), rules.stall_s)
        with _session().get(signed(href), headers={"Range": "bytes=0-0"}, timeout=timeout, stream=True) as answer:
            status, reason = answer.status_code, answer.reason or ""
            if status in _TRANSIENT:
                asked = answer.headers.get("Retry-After")
                wait = 0.0
                if asked:
                    with contextlib.suppress(Exception):  # neither seconds nor a date
                        wait = max(0.0, Retry().parse_retry_after(asked))
                return _Answer("later", f"HTTP {status} {reason}".strip(), wait)
            if status in {401, 403}:
                return _Answer("never", f"HTTP {status} {reason}; is a signature missing or out of date?")
            if status == 416:
                return _Answer("well", "The server says that it is empty.")
            if status >= 400:
                return _Answer("never", f"HTTP {status} {reason}".strip())
            next(answer.iter_content(1), b"")  # a server that stalls sends its headers too
            kind = answer.headers.get("Content-Type", "")
            return _Answer("well", "The server answers with a web page." if kind.startswith("text/html") else "")
    except requests.RequestException as error:
        return _Answer("silent", f"{type(error).__name__}: {unsigned(' '.join(str(error).split()))[:200]}")


def forget_remote(href: str) -> None:
    """Drop everything that GDAL remembers of a file on a network: sizes, absence, ranges."""
    with contextlib.suppress(Exception):
        href = signed(href)
        path = rasterio._path._parse_path(href).as_vsi() if hasattr(rasterio, "_path") else f"/vsicurl/{href}"
        library = _gdal()
        if library is not None:
            library.VSICurlPartialClearCache(str(path).encode())
            return
        with rasterio.Env(CPL_VSIL_CURL_NON_CACHED="/vsi"), rasterio.open(href):
            pass  # closing the file drops it


# ---------------------------------------------------------------------------------------------------------- threads
_EXECUTORS: dict[tuple[str, int], ThreadPoolExecutor] = {}
_EXECUTORS_LOCK = threading.Lock()


def executor(what: str, threads: int) -> ThreadPoolExecutor:
    """Threads for one purpose, kept for the life of the process: curl keeps connections by thread."""
    with _EXECUTORS_LOCK:
        found = _EXECUTORS.get((what, threads))
        if found is None:
            found = _EXECUTORS[what, threads] = ThreadPoolExecutor(threads, thread_name_prefix=f"dl4gam-{what}")
        return found


def submit(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread with the policy and GDAL options of this one."""
    rules = policy_in_force()

    def work() -> T:
        with reading_with(rules):
            return function(*arguments)

    return pool.submit(work)


# ------------------------------------------------------------------------------------------------------------ bytes
_BYTES = 0
_BYTES_LOCK = threading.Lock()


def bytes_read() -> int:
    """Bytes of image files that this process has read so far.

    Local files: the compressed blocks under the windows that were read, without headers. Large blocks count whole,
    because they are read whole; a block counts once as long as its file stays open (see ``MAX_IDLE_FILES``), for GDAL
    then has it in memory, though it may have dropped it.

    Files on a network: the bytes that GDAL downloaded, headers and repeated attempts included, as GDAL itself counts
    them (``VSINetworkStats``). Where its library can not be asked, blocks under the windows as for local files.
    """
    global _BYTES
    library = _gdal()
    with _BYTES_LOCK:
        if library is not None:
            pointer = library.VSINetworkStatsGetAsSerializedJSON(None)
            if pointer:
                try:
                    stats = json.loads(ctypes.string_at(pointer) or b"{}")
                finally:
                    library.VSIFree(pointer)
                fetched = sum(int(m.get("downloaded_bytes", 0)) for m in stats.get("methods", {}).values())
                if fetched:
                    library.VSINetworkStatsReset()  # it keeps a record of each file, which would grow for ever
                    _BYTES += fetched
        return _BYTES


def count_window(source: Any, band: int, window: Any, href: str) -> None:
    """Count the blocks of a file under a window (see :func:`bytes_read`)."""
    global _BYTES
    if local_path(href) is None and _gdal() is not None:
        return
    height, width = source.block_shapes[band - 1]
    top, left = max(int(window.row_off), 0) // height, max(int(window.col_off), 0) // width
    bottom = -(-min(int(window.row_off + window.height + 0.999), source.height) // height)
    right = -(-min(int(window.col_off + window.width + 0.999), source.width) // width)
    seen = _SEEN.setdefault(source, set())
    fresh = [k for row in range(top, bottom) for col in range(left, right) if (k := (band, row, col)) not in seen]
    if not fresh:
        return
    seen.update(fresh)
    if len(fresh) > 64:  # many small blocks: by the size of the one in the middle
        found = len(fresh) * _block_size(source, *fresh[len(fresh) // 2])
    else:
        found = sum(_block_size(source, *block) for block in fresh)
    with _BYTES_LOCK:
        _BYTES += found


#: Blocks of each open file that were counted.
_SEEN: weakref.WeakKeyDictionary[Any, set[tuple[int, int, int]]] = weakref.WeakKeyDictionary()


def _block_size(source: Any, band: int, row: int, col: int) -> int:
    """Compressed bytes of a block of a TIFF, 0 where it is not stored; of other formats the bytes it has unpacked."""
    if source.driver not in {"GTiff", "COG"}:
        height, width = source.block_shapes[band - 1]
        return int(height * width * np.dtype(source.dtypes[band - 1]).itemsize)
    return int(source.get_tag_item(f"BLOCK_SIZE_{col}_{row}", "TIFF", bidx=band) or 0)


@functools.cache
def _gdal() -> Any | None:
    """GDAL's C library behind rasterio, for documented functions that rasterio does not offer; None without them."""
    import rasterio._env

    try:
        library = ctypes.CDLL(rasterio._env.__file__)  # finds the symbols of the libraries that it is linked to
        library.VSINetworkStatsGetAsSerializedJSON.restype = ctypes.c_void_p
        library.VSINetworkStatsGetAsSerializedJSON.argtypes = [ctypes.c_void_p]
        library.VSIFree.argtypes = [ctypes.c_void_p]
        library.VSINetworkStatsReset.restype = None
        library.VSICurlPartialClearCache.argtypes = [ctypes.c_char_p]
        library.VSICurlPartialClearCache.restype = None
        library.VSICurlClearCache.restype = None
    except (OSError, AttributeError):
        return None
    return library


def _after_fork() -> None:
    global _HOST_LOCK, _BYTES_LOCK, _EXECUTORS_LOCK
    _POOL.abandon()
    _EXECUTORS.clear()
    _HOST_LOCK, _BYTES_LOCK, _EXECUTORS_LOCK = threading.Lock(), threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
