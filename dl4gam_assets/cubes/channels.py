"""The channels of the models, derived from a cube.

Belongs here: bands, indices, terrain terms as the networks see them, before normalization.
Does not belong here: normalization (``segmentation``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from dl4gam_assets.cubes.masks import cube_mask
from dl4gam_assets.imagery.indices import normalized_difference
from dl4gam_assets.settings import PUBLISHED_CHANNELS

#: Channel -> layer, where missing values are 0.
_ZERO = {"dhdt": "dhdt", "velocity": "v"}
_PAIRS = {"ndvi": ("nir", "red"), "ndwi": ("green", "nir"), "ndsi": ("green", "swir16")}


def channel_stack(cube: xr.Dataset, channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Raw channels of a cube and where its image is usable.

    Bands are reflectance; NDVI, NDWI and NDSI are normalized differences, where reflectance below zero counts as 0 and
    a denominator of zero as 1 (so that black is 0, as in the published code); slope is divided by 90; aspect enters as
    sine and cosine; missing dh/dt and velocity are 0 (Diaconu et al. 2025, section 3).

    Parameters
    ----------
    cube : Dataset
    channels : names, for example ``settings.PUBLISHED_CHANNELS``

    Returns
    -------
    stack : float32 array (C, H, W), NaN where missing
    valid : bool array (H, W), false on cloudy, missing or bad pixels

    Raises
    ------
    KeyError
        if the cube lacks a layer that a channel needs.
    """
    present = [str(b) for b in cube["band"].to_numpy()]
    wanted = {b for c in channels for b in (_PAIRS.get(c) or (c,)) if b in present}
    bands = {b: cube["reflectance"].isel(band=present.index(b)).to_numpy().astype(np.float32) for b in sorted(wanted)}
    height, width = cube["mask"].shape
    out = np.empty((len(channels), height, width), dtype=np.float32)
    for i, name in enumerate(channels):
        out[i] = _channel(cube, bands, name)
    return out, ~cube_mask(cube, "not_ok")


def cube_channels(cube: xr.Dataset, channels: Sequence[str] = PUBLISHED_CHANNELS) -> xr.DataArray:
    """The channels of a model with their names and places, from a cube alone.

    Parameters
    ----------
    cube : as ``xarray.open_dataset(path, decode_coords="all")`` gives it
    channels : names in order; the 16 of the published models by default

    Returns
    -------
    DataArray float32 (channel, y, x), NaN where missing, before standardization, with the cube's ``x``, ``y`` and CRS
    (``spatial_ref``), and ``usable`` (y, x): false on cloudy, missing or bad pixels.

    Raises
    ------
    KeyError
        if the cube lacks a layer that a channel needs.
    """
    stack, valid = channel_stack(cube, channels)
    coords = {name: cube.coords[name] for name in ("y", "x", "spatial_ref") if name in cube.coords}
    out = xr.DataArray(stack, dims=("channel", "y", "x"), coords=coords, name="channels")
    return out.assign_coords(channel=list(channels), usable=(("y", "x"), valid))


def _channel(cube: xr.Dataset, bands: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name in bands:
        return bands[name]
    if name in _PAIRS:
        first, second = (_need(bands, b, name) for b in _PAIRS[name])
        return normalized_difference(first, second)
    if name in {"sin_aspect", "cos_aspect"}:
        radians = np.deg2rad(_layer(cube, "aspect", name))
        return np.sin(radians) if name == "sin_aspect" else np.cos(radians)
    if name == "slope":
        return _layer(cube, "slope", name) / np.float32(90.0)
    if name in _ZERO:
        layer = _ZERO[name]
        return np.nan_to_num(_layer(cube, layer, name), nan=0.0) if layer in cube else np.zeros(cube["mask"].shape)
    return _layer(cube, name, name)


def _need(bands: dict[str, np.ndarray], band: str, channel: str) -> np.ndarray:
    if band not in bands:
        raise KeyError(f"channel {channel} needs the band {band}, which the cube lacks")
    return bands[band]


def _layer(cube: xr.Dataset, layer: str, channel: str) -> np.ndarray:
    if layer not in cube:
        have = ", ".join([*map(str, cube["band"].to_numpy()), *map(str, cube.data_vars)])
        raise KeyError(f"channel {channel} needs the layer {layer}, which the cube lacks; it has {have}")
    values: np.ndarray = cube[layer].to_numpy().astype(np.float32)
    return values
