"""Wrong content that is served well: items that lie about their scenes, files that are damaged or say nothing.

Belongs here: copies of items and files with one thing changed. Does not belong here: failing requests (``faults``),
searches that lie (``Backend.lies``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
import shapely.affinity
import shapely.geometry

from dl4gam_assets_tests.stac_server.backend import Json


def without_asset(item: Json, name: str) -> Json:
    """The item without one of its assets."""
    out = copy.deepcopy(item)
    del out["assets"][name]
    return out


def reprocessed(item: Json, baseline: str, made: str = "2030-01-01T00:00:00Z", suffix: str = "_again") -> Json:
    """The same tile and day from another processing: an item of its own with the same files."""
    out = copy.deepcopy(item)
    out["id"] = f"{item['id']}{suffix}"
    out["properties"] |= {"s2:processing_baseline": baseline, "s2:generation_time": made, "updated": made}
    return out


def moved(item: Json, east: float = 0.0, north: float = 0.0) -> Json:
    """The item with its footprint elsewhere (degrees); its files stay where they are."""
    out = copy.deepcopy(item)
    shape = shapely.affinity.translate(shapely.geometry.shape(item["geometry"]), east, north)
    out["geometry"], out["bbox"] = shapely.geometry.mapping(shape), list(shape.bounds)
    return out


def cut_short(source: Path, target: Path, share: float = 0.5) -> Path:
    """The first part of a file, as an upload that broke off leaves it."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    **profile: Any,
) -> Path:
    """A cloud-optimized GeoTIFF with other pixels (``change`` of the whole band) or another header (``crs=None``)."""
    with rasterio.open(source) as file:
        values = change(file.read(1))
        header = {"crs": file.crs, "transform": file.transform, "nodata": file.nodata, **profile}
    with rasterio.open(
        target, "w", driver="COG", height=values.shape[0], width=values.shape[1], count=1, dtype=values.dtype.name,
        compress="DEFLATE", blocksize=128, **{k: v for k, v in header.items() if v is not None},
    ) as file:  # fmt: skip
        file.write(values, 1)
    return target


def silent(values: np.ndarray) -> np.ndarray:
    """No data everywhere (of files whose no-data value is 0)."""
    return np.zeros_like(values)


def not_numbers(values: np.ndarray) -> np.ndarray:
    """NaN everywhere."""
    return np.full(values.shape, np.nan, dtype=np.float32)
