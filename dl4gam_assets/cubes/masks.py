"""Masks of a cube as bits of one integer layer.

Belongs here: names of the bits, packing and reading them (CF flag_masks and flag_meanings).
Does not belong here: how a mask is made (``build``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr


def zone_name(buffer_m: int) -> str:
    """Name of the bit of a zone: ``zone_20``, ``zone_0``, ``zone_m10``."""
    return f"zone_m{-buffer_m}" if buffer_m < 0 else f"zone_{buffer_m}"


def pack_masks(masks: Mapping[str, np.ndarray]) -> xr.DataArray:
    """One uint16 layer (y, x) from boolean masks; bit k is the k-th mask.

    Raises
    ------
    ValueError
        if there are more than 16 masks.
    """
    if len(masks) > 16:
        raise ValueError(f"a cube holds at most 16 masks, not {len(masks)}: use fewer inventory.buffers_m")
    shape = next(iter(masks.values())).shape
    packed = np.zeros(shape, dtype=np.uint16)
    for bit, mask in enumerate(masks.values()):
        packed |= np.asarray(mask, dtype=bool).astype(np.uint16) << np.uint16(bit)
    return xr.DataArray(
        packed,
        dims=("y", "x"),
        attrs={
            "long_name": "masks, one a bit",
            "flag_masks": np.array([1 << bit for bit in range(len(masks))], dtype=np.uint16),
            "flag_meanings": " ".join(masks),
        },
    )


def cube_mask(cube: xr.Dataset, name: str) -> np.ndarray:
    """A mask of a cube as a boolean array (H, W).

    Raises
    ------
    KeyError
        naming the masks there are.
    """
    layer = cube["mask"]
    names = str(layer.attrs["flag_meanings"]).split()
    if name not in names:
        raise KeyError(f"the cube has no mask {name!r}; it has {', '.join(names)}")
    bit = np.uint16(1 << names.index(name))
    found: np.ndarray = (layer.to_numpy().astype(np.uint16) & bit) != 0
    return found
