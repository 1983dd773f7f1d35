"""Addresses that must be signed before they are opened (Planetary Computer).

Belongs here: which hosts want a signature, getting it from their own library, taking it out of texts. Addresses are
signed when they are opened, never when they are stored: tables, checksums and lineage stay the same, and no token
lands in them. Does not belong here: opening files (``sources``).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from dl4gam_assets.imagery.catalogs import CatalogError
from dl4gam_assets.settings import without_secrets

#: Host of the catalog whose files must be signed.
PLANETARY_COMPUTER = "planetarycomputer.microsoft.com"
#: Storage of the collections in the presets: Sentinel-2 L2A, Landsat Collection 2, Copernicus GLO-30.
PLANETARY_COMPUTER_HOSTS = frozenset(
    {
        "sentinel2l2a01.blob.core.windows.net",
        "landsateuwest.blob.core.windows.net",
        "elevationeuwest.blob.core.windows.net",
    }
)
#: The library asks for a token this often (waiting 0, 1.6, 3.2, 6.4 s); its own 10 times would take seven minutes.
_TOKEN_RETRIES = 4
#: All these attempts together, seconds.
_TOKEN_S = 90.0
_LOCK = threading.Lock()


def signing_library() -> Any:
    """The module ``planetary_computer.sas``.

    Raises
    ------
    CatalogError
        if it is not installed; names the extra that brings it.
    """
    try:
        from planetary_computer import sas
    except ImportError as error:
        raise CatalogError(
            "files of Planetary Computer must be signed by its own library: "
            "pip install 'dl4gam_assets[planetary-computer]'"
        ) from error
    return sas


def signed(href: str) -> str:
    """The address to open: with a token for the hosts of Planetary Computer, unchanged for all others.

    The library keeps a token until a minute before it expires, so this is cheap.

    Raises
    ------
    SceneUnreachableError
        if there is no token now, or the library is not installed: the scene itself is not known to be bad, so it is
        asked for again by the next run.
    """
    parts = urlsplit(href)
    if parts.netloc not in PLANETARY_COMPUTER_HOSTS or "sig=" in parts.query:
        return href
    from dl4gam_assets.imagery.sources import SceneUnreachableError  # which imports this module

    try:
        sas = signing_library()
        with _LOCK:  # one request for a token, not one a thread
            token = _within(
                _TOKEN_S,
                sas.get_token,
                parts.netloc.split(".")[0],
                parts.path.split("/")[1],
                retry_total=_TOKEN_RETRIES,
            )
        return str(token.sign(href).href)
    except CatalogError as error:
        raise SceneUnreachableError(str(error)) from error
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise SceneUnreachableError(f"Planetary Computer gave no token for {href}: {words}; try again later") from error


def _within(seconds: float, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The function's result; TimeoutError after so many seconds: the library waits for a silent service for ever.

    What hangs is left behind in a daemon thread, which ends with the process at the latest.
    """
    answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def ask() -> None:
        try:
            answer.put((function(*args, **options), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=ask, daemon=True, name="token").start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def unsigned(text: str) -> str:
    """A text (an address, a message of GDAL or requests) without tokens, keys, names and passwords in it."""
    return without_secrets(text)


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
