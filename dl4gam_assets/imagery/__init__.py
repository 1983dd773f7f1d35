"""The best image for each glacier: catalogs, reading to a grid, scores, ranking, choice.

Belongs here: everything between a catalog and the chosen pixels (METHOD of Diaconu et al. 2025, section on imagery).
Does not belong here: Dagster, terrain, the file format of cubes.

Names are loaded on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "open_catalog": "catalogs",
    "SceneCatalog": "catalogs",
    "CatalogError": "catalogs",
    "group_by_day": "catalogs",
    "item_checksums": "catalogs",
    "read_image": "reading",
    "read_images": "reading",
    "SceneError": "reading",
    "score_image": "scores",
    "search_periods": "candidates",
    "candidates_of_glacier": "candidates",
    "items_from_row": "candidates",
    "items_of_glacier": "candidates",
    "search_window": "candidates",
    "assets_of": "candidates",
    "search_plan": "catalogs",
    "write_items": "catalogs",
    "read_items": "catalogs",
    "merge_items": "catalogs",
    "policy_of": "candidates",
    "implausible": "scaling",
    "rank_candidates": "ranking",
    "select_scenes": "ranking",
    "read_overrides": "ranking",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
