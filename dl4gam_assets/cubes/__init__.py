"""The glacier cube: everything a model sees of a glacier in a year, in one georeferenced file.

Belongs here: layers and masks of a cube, its file format, the channels of the models.
Does not belong here: Dagster, where images and terrain come from, normalization.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "static_layers": "build",
    "build_cube": "build",
    "zone_name": "masks",
    "pack_masks": "masks",
    "cube_mask": "masks",
    "open_cube": "files",
    "write_cube": "files",
    "content_fingerprint": "files",
    "cube_channels": "channels",
    "channel_stack": "channels",
    "true_colour": "pictures",
    "white_point": "pictures",
    "shown_bands": "pictures",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
