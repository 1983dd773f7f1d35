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
NODATA = 65535
_BANDS = ("glacier probability (ensemble mean)", "standard deviation between members")


def digits_of(layer: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as the integers of a map file: uint16 in steps of 2e-5, 65535 where there is none (NaN)."""
    finite = np.isfinite(layer)
    steps = np.where(finite, np.round(np.clip(np.nan_to_num(layer), 0, 1) / SCALE), NODATA)
    out: np.ndarray = steps.astype(np.uint16)
    return out


def write_prediction(
    path: Path, mean: np.ndarray, std: np.ndarray, geobox: GeoBox, tags: Mapping[str, str],
    members: Mapping[int, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Write mean and standard deviation (H, W) as uint16 with a scale of 2e-5 and nodata 65535 (COG, deflate).

    ``tags`` go into the file's metadata (glacier, year, fingerprint). ``members``: by number, each member's
    probabilities as :func:`digits_of` makes them, kept as further bands (``inference.keep_members``).
    """
    kept = dict(members or {})
    names = [*_BANDS, *(f"glacier probability (member {number:02d}, before filling)" for number in kept)]
    profile = {
        "driver": "GTiff", "height": geobox.shape[0], "width": geobox.shape[1], "count": len(names), "dtype": "uint16",
        "crs": str(geobox.crs), "transform": geobox.affine, "nodata": NODATA,
    }  # fmt: skip
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as target:
            layers = (digits_of(mean), digits_of(std), *kept.values())
            for band, (digits, name) in enumerate(zip(layers, names, strict=True), start=1):
                target.write(digits, band)
                target.set_band_description(band, name)
            target.scales = (SCALE,) * len(names)
            target.update_tags(**{k: str(v) for k, v in tags.items()})
        with memory.open() as source, rasterio.MemoryFile() as finished:
            options = {"compress": "deflate", "predictor": 2, "blocksize": 256, "overviews": "AUTO"}
            rio_copy(source, finished.name, driver="COG", **options)
            # GDAL says nothing when a disk fills up while it closes a file; writing its bytes does.
            path.write_bytes(finished.read())


def read_prediction(path: Path) -> dict[str, np.ndarray]:
    """``mean`` and ``std`` as float32 arrays (H, W), NaN where nothing was predicted."""
    return dict(zip(("mean", "std"), _layers(path, [1, 2]), strict=True))


def read_members(path: Path) -> np.ndarray:
    """Probabilities of the members (M, H, W) float32 as they were before gaps were filled; M is 0 where none were kept
    (``inference.keep_members``)."""
    with rasterio.open(path) as source:
        bands = list(range(3, source.count + 1))
        shape = source.shape
    return _layers(path, bands) if bands else np.empty((0, *shape), dtype=np.float32)


def _layers(path: Path, bands: list[int]) -> np.ndarray:
    with rasterio.open(path) as source:
        try:
            digits = source.read(bands)
        except rasterio.errors.RasterioIOError as error:
            raise OSError(f"map {path} is damaged: remove it and materialize glacier_predictions again") from error
        scales = np.asarray([source.scales[band - 1] for band in bands], dtype=np.float32)
    out: np.ndarray = digits.astype(np.float32) * scales[:, None, None]
    out[digits == NODATA] = np.nan
    return out


def read_prediction_tags(path: Path) -> dict[str, str]:
    """Metadata of a map file; empty where it can not be read."""
    try:
        with rasterio.open(path) as source:
            return dict(source.tags())
    except rasterio.errors.RasterioIOError:
        return {}
