"""A STAC API and its files on loopback, on stac-fastapi's own framework, that can be told to fail.

    with serving(region_folder) as server:
        StacApi(url=server.url, collections=server.collections)
        server.fail("*/green.tif", status(429, retry_after=1), times=2)

Belongs here: the server (``server``), what it finds (``backend``), how it fails (``faults``), wrong content
(``damage``), and a small simulated region to serve (``regions``). ``python -m dl4gam_assets_tests.stac_server --help``
serves a whole region, so that ``dl4gam materialize`` runs through it.
Does not belong here: tests (``imagery/test_loopback*.py``), a server of files without an API
(``imagery/range_server.py``, which tests reading alone).
"""

from __future__ import annotations

from dl4gam_assets_tests.stac_server.backend import Backend
from dl4gam_assets_tests.stac_server.faults import (
    EMPTY,
    HALF,
    HTML,
    LYING,
    RESET,
    Fault,
    hang,
    stall,
    status,
)
from dl4gam_assets_tests.stac_server.server import Server, serving

__all__ = [
    "EMPTY",
    "HALF",
    "HTML",
    "LYING",
    "RESET",
    "Backend",
    "Fault",
    "Server",
    "hang",
    "serving",
    "stall",
    "status",
]
