"""What the authors of DL4GAM published, read and written: cubes, splits, normalization tables, checkpoints.

Belongs here: the layout of their files, checks of each file, conversion to ours and back. The layout is that of the
data set and the models of Diaconu et al. 2025 (doi:10.1029/2025EA004197), described in docs/reproduce.md.
Does not belong here: Dagster, the store (``stages``), what is made from the files.

Names are loaded on first use, so that importing the room costs nothing; torch is imported only by ``checkpoints``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "PublishedFileError": "layout",
    "BAND_NAMES": "layout",
    "PublishedCube": "cubes",
    "find_cubes": "cubes",
    "unpack_cubes": "cubes",
    "trouble_with": "cubes",
    "read_published": "cubes",
    "read_ground": "cubes",
    "to_cube": "cubes",
    "from_cube": "cubes",
    "write_published": "cubes",
    "read_splits": "splits",
    "write_splits": "splits",
    "read_statistics": "splits",
    "write_statistics": "splits",
    "PublishedCheckpoint": "checkpoints",
    "find_checkpoints": "checkpoints",
    "read_weights": "checkpoints",
    "read_settings": "checkpoints",
    "channels_of": "checkpoints",
    "adopt": "checkpoints",
    "PublishedPatches": "dataset",
    "regional_rates": "comparison",
    "map_quality": "comparison",
    "area_quality": "comparison",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
