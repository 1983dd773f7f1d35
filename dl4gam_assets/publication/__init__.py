"""What is handed on: the results database, the report of a year, the STAC catalog of the maps.

Belongs here: turning tables and maps that exist into forms for readers: SQL (:mod:`.database`), people
(:mod:`.report`, :mod:`.figures`), catalogs (:mod:`.stac`).
Does not belong here: Dagster, and any number that is not already in a table: nothing is estimated here.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "build_database": "database",
    "query_database": "database",
    "write_report": "report",
    "write_stac": "stac",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
