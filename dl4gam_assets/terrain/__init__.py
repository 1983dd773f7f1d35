"""Elevation and elevation change on a glacier's grid.

Belongs here: finding and mosaicking tiles of elevation, dh/dt and velocity, terrain derivatives, matching dh/dt periods
to years.
Does not belong here: Dagster, imagery, the file format of cubes.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "read_mosaic": "reading",
    "read_elevation": "reading",
    "read_velocity": "reading",
    "read_dhdt": "reading",
    "read_elevation_change": "reading",
    "match_period": "reading",
    "period_tiles": "reading",
    "mean_aspect": "derivatives",
    "Tile": "tiles",
    "TileIndex": "tiles",
    "TileError": "tiles",
    "find_tiles": "tiles",
    "catalog_tiles": "tiles",
    "search_blocks": "tiles",
    "grid_box": "tiles",
    "boxes": "tiles",
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
