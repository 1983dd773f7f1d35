"""Elevation and elevation change on a glacier's grid.

Belongs here: reading DEM and dh/dt mosaics, terrain derivatives, matching dh/dt periods to years.
Does not belong here: Dagster, imagery, the file format of cubes.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "read_elevation": "reading",
    "read_elevation_change": "reading",
    "match_period": "reading",
    "terrain_derivatives": "derivatives",
    "DERIVATIVES": "derivatives",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
