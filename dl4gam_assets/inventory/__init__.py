"""Glacier inventories: reading, cleaning, ids, UTM zones, debris, zones around outlines, geographic folds, grids.

Belongs here: everything that is known of a glacier before any image is looked at.
Does not belong here: Dagster, imagery, elevation.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "read_inventory": "reading",
    "dated": "reading",
    "read_date": "reading",
    "outline_mask": "reading",
    "utm_epsg_of": "reading",
    "read_debris": "debris",
    "glacier_zones": "zones",
    "geographic_folds": "folds",
    "glacier_grid": "grid",
    "double_counted_km2": "overlap",
    "prepare_inventory": "_prepare",
    "restrict_modelled": "_prepare",
    "split_ice_bodies": "sgi",
    "write_swiss_inventory": "sgi",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
