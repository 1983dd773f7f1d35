"""Map files: probability and spread of a glacier as a cloud-optimized GeoTIFF.

Belongs here: writing and reading predictions. Does not belong here: where they lie (``storage``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from rasterio.shutil import copy as rio_copy

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

SCALE = 1.0 / 50000.0
_BANDS = ("glacier probability (ensemble mean)", "standard deviation between members")


def write_prediction(path: Path, mean: np.ndarray, std: np.ndarray, geobox: GeoBox, tags: Mapping[str, str]) -> None:
    """Write mean and standard deviation (H, W) as uint16 with a scale of 2e-5 and nodata 65535 (COG, deflate).

    ``tags`` go into the file's metadata (glacier, year, fingerprint).
    """
    profile = {
        "driver": "GTiff", "height": geobox.shape[0], "width": geobox.shape[1], "count": 2, "dtype": "uint16",
        "crs": str(geobox.crs), "transform": geobox.affine, "nodata": 65535,
    }  # fmt: skip
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as target:
            for band, (layer, name) in enumerate(zip((mean, std), _BANDS, strict=True), start=1):
                finite = np.isfinite(layer)
                digits = np.where(finite, np.round(np.clip(np.nan_to_num(layer), 0, 1) / SCALE), 65535)
                target.write(digits.astype(np.uint16), band)
                target.set_band_description(band, name)
            target.scales = (SCALE, SCALE)
            target.update_tags(**{k: str(v) for k, v in tags.items()})
        with memory.open() as source:
            rio_copy(source, path, driver="COG", compress="deflate", predictor=2, blocksize=256, overviews="AUTO")


def read_prediction(path: Path) -> dict[str, np.ndarray]:
    """``mean`` and ``std`` as float32 arrays (H, W), NaN where nothing was predicted."""
    with rasterio.open(path) as source:
        digits = source.read()
        scales = source.scales
    out = digits.astype(np.float32) * np.asarray(scales, dtype=np.float32)[:, None, None]
    out[digits == 65535] = np.nan
    return {"mean": out[0], "std": out[1]}


def read_prediction_tags(path: Path) -> dict[str, str]:
    """Metadata of a map file; empty where it can not be read."""
    try:
        with rasterio.open(path) as source:
            return dict(source.tags())
    except rasterio.errors.RasterioIOError:
        return {}
