"""The file of a cube: NetCDF-4, CF names and units, CRS inside.

Belongs here: encoding, writing, opening. Does not belong here: what the layers mean.

The files open with ``xarray.open_dataset`` alone (CF scale factors are decoded by xarray), and georeferenced in GDAL
and QGIS (``spatial_ref`` with WKT and GeoTransform).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

#: Integer encodings: variable -> (dtype, scale). The precision of a stored value is half the scale.
SCALED: dict[str, tuple[str, float]] = {
    "reflectance": ("int16", 1e-4),
    "dem": ("int16", 0.5),
    "slope": ("int16", 0.01),
    "aspect": ("int16", 0.05),
    "dhdt": ("int16", 0.002),
    "planform_curvature": ("int16", 0.005),
    "profile_curvature": ("int16", 0.005),
    "terrain_ruggedness_index": ("int16", 0.01),
}
_MISSING = np.int16(-32768)
_CHUNK = 512


def write_cube(cube: xr.Dataset, path: Path) -> None:
    """Write a cube to a local path.

    Chunks are equal and at most 512 pixels long, shuffled and compressed; layers are integers with CF scale factors.
    Steps: reflectance 1e-4, elevation 0.5 m, slope 0.01 degree, aspect 0.05 degree, dh/dt 0.002 m/yr, curvatures 0.005
    (in 0.01 1/m), ruggedness 0.01 m. A value beyond the range of its integer (for example a curvature over 163) is
    stored as the range's end. Attributes that are None are left out.
    """
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in cube.data_vars.items():
        if variable.ndim < 2:
            continue
        shape = tuple(1 if d == "band" else _chunk(s) for d, s in zip(variable.dims, variable.shape, strict=True))
        entry: dict[str, Any] = {"zlib": True, "complevel": 1, "shuffle": True, "chunksizes": shape}
        if name in SCALED:
            dtype, scale = SCALED[str(name)]
            entry |= {"dtype": dtype, "scale_factor": np.float32(scale), "_FillValue": _MISSING}
        elif np.issubdtype(variable.dtype, np.floating):
            entry |= {"dtype": "float32", "_FillValue": np.float32(np.nan)}
        else:
            entry |= {"_FillValue": None}
        encoding[str(name)] = entry
    for name in ("x", "y"):
        encoding[name] = {"_FillValue": None}  # CF allows no missing coordinates
    clean = cube.copy(deep=False)
    clean.attrs = {
        key: int(value) if isinstance(value, bool) else value for key, value in cube.attrs.items() if value is not None
    }
    for name in SCALED:
        if name in clean:
            low, high = -32767 * SCALED[name][1], 32767 * SCALED[name][1]
            clean[name] = clean[name].clip(low, high)
    for layer in clean.variables.values():
        layer.encoding = {}
    if "spatial_ref" in clean.coords:
        for name in clean.data_vars:
            if clean[name].ndim >= 2:
                clean[name].attrs.pop("grid_mapping", None)
                clean[name].encoding["grid_mapping"] = "spatial_ref"
                encoding[str(name)]["grid_mapping"] = "spatial_ref"
    clean.to_netcdf(path, engine="netcdf4", encoding=encoding)


def _chunk(size: int) -> int:
    """Length of equal chunks of at most ``_CHUNK``: padded rests would be compressed for nothing."""
    return -(-size // -(-size // _CHUNK))


def open_cube(path: Path) -> xr.Dataset:
    """Open a cube lazily; close it, or use it in a ``with`` block. ``.odc.geobox`` gives its grid.

    Raises
    ------
    FileNotFoundError, OSError
        if the file is absent or damaged; the message names it.
    """
    import odc.geo.xr  # noqa: F401  registers the accessor `.odc`

    try:
        return xr.open_dataset(path, engine="netcdf4", decode_coords="all")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"cube {path} is damaged ({error}); delete it and materialize its partition again") from error
