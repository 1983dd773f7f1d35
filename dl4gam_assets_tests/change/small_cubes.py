"""Small cubes for tests of this room: the layers that areas, outlines and evaluation read, in the cube's encoding."""

from __future__ import annotations

import numpy as np
import rioxarray  # noqa: F401
import xarray as xr
from affine import Affine
from scipy.ndimage import distance_transform_edt

NAMES = ("not_ok", "glacier", "any_glacier", "debris", "zone_m20", "zone_m10", "zone_0", "zone_10", "zone_20",
         "zone_50", "cell")  # fmt: skip
PIXEL_M = 10.0


def make_cube(
    glacier: np.ndarray,
    others: np.ndarray | None = None,
    debris: np.ndarray | None = None,
    not_ok: np.ndarray | None = None,
    dem: np.ndarray | None = None,
    glacier_id: str = "G1",
    origin: tuple[float, float] = (600_000.0, 5_100_000.0),
) -> xr.Dataset:
    """Cube of one glacier from masks (H, W); zones are distances on the grid, cut at other glaciers."""
    none = np.zeros(glacier.shape, bool)
    others = none if others is None else others
    away = distance_transform_edt(~glacier) * PIXEL_M
    inside = distance_transform_edt(glacier) * PIXEL_M
    to_others = distance_transform_edt(~others) * PIXEL_M if others.any() else np.full(glacier.shape, np.inf)
    layers = {
        "not_ok": none if not_ok is None else not_ok,
        "glacier": glacier,
        "any_glacier": glacier | others,
        "debris": none if debris is None else debris,
        "zone_m20": inside > 20,
        "zone_m10": inside > 10,
        "zone_0": glacier,
        "zone_10": (away <= 10) & ~others,
        "zone_20": (away <= 20) & ~others,
        "zone_50": (away <= 50) & ~others,
        "cell": away <= to_others,
    }
    bits = np.zeros(glacier.shape, np.uint16)
    for i, name in enumerate(NAMES):
        bits |= layers[name].astype(np.uint16) << i
    height, width = glacier.shape
    transform = Affine(PIXEL_M, 0, origin[0], 0, -PIXEL_M, origin[1])
    cube = xr.Dataset(
        {
            "mask": (("y", "x"), bits, {
                "flag_masks": np.array([1 << i for i in range(len(NAMES))], np.uint16),
                "flag_meanings": " ".join(NAMES),
            }),
        },
        coords={
            "x": origin[0] + PIXEL_M * (np.arange(width) + 0.5),
            "y": origin[1] - PIXEL_M * (np.arange(height) + 0.5),
        },
        attrs={"glacier_id": glacier_id},
    )  # fmt: skip
    if dem is not None:
        cube["dem"] = (("y", "x"), dem.astype(np.float32))
    return cube.rio.write_crs("EPSG:32632").rio.write_transform(transform)


def box(shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """Mask (H, W) that is true in a rectangle of pixels."""
    mask = np.zeros(shape, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask
