"""The file of a cube: NetCDF-4, CF names and units, CRS inside.

Belongs here: encoding, writing, opening. Does not belong here: what the layers mean.

The files open with ``xarray.open_dataset`` alone (CF scale factors are decoded by xarray), and georeferenced in GDAL
and QGIS (``spatial_ref`` with WKT and GeoTransform).
"""

from __future__ import annotations

import hashlib
import json
import shutil
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
    "dhdt_err": ("int16", 0.002),
    "planform_curvature": ("int16", 0.005),
    "profile_curvature": ("int16", 0.005),
    "terrain_ruggedness_index": ("int16", 0.01),
    "v": ("int16", 0.25),
    "velocity": ("int16", 0.25),  # the channel made of `v`, where channels are packed
}
#: Layers that a year adds to the static ones, or changes (the bit ``not_ok`` of the mask).
YEARLY = ("reflectance", "mask", "dhdt", "dhdt_err")
_MISSING = np.int16(-32768)
_CHUNK = 512


def write_cube(cube: xr.Dataset, path: Path, base: Path | None = None) -> None:
    """Write a cube to a local path.

    Chunks are equal and at most 512 pixels long, shuffled and compressed; layers are integers with CF scale factors.
    Steps: reflectance 1e-4, elevation 0.5 m, slope 0.01 degree, aspect 0.05 degree, dh/dt and its error 0.002 m/yr,
    curvatures 0.005 (in 0.01 1/m), ruggedness 0.01 m, velocity 0.25 m/yr. A value beyond the range of its integer (for
    example a curvature over 163) is stored as the range's end. Attributes that are None are left out.

    With ``base``, a file that holds the cube's static layers already, that file is copied and only the layers of the
    year are added (``YEARLY``): the others are neither encoded nor compressed again. The result is the same.
    """
    if base is not None:
        _extend(cube, base, path)
        return
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
    clean.attrs = _plain_attributes(cube)
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


def _plain_attributes(cube: xr.Dataset) -> dict[str, Any]:
    return {
        str(key): int(value) if isinstance(value, bool) else value
        for key, value in cube.attrs.items()
        if value is not None
    }


def _extend(cube: xr.Dataset, base: Path, path: Path) -> None:
    """Copy a file of static layers and add the layers of a year."""
    import netCDF4

    shutil.copyfile(base, path)
    with netCDF4.Dataset(path, "a") as file:
        file["mask"].set_auto_maskandscale(False)
        file.createDimension("band", cube.sizes["band"])
        file.createVariable("band", str, ("band",))[:] = np.array(
            [str(b) for b in cube["band"].to_numpy()], dtype=object
        )
        for name in YEARLY:
            if name not in cube:
                continue
            layer = cube[name]
            if name == "mask":
                file["mask"][:] = layer.to_numpy()
                continue
            dtype, scale = SCALED[name]
            sizes = tuple(1 if d == "band" else _chunk(s) for d, s in zip(layer.dims, layer.shape, strict=True))
            made = file.createVariable(
                name,
                dtype,
                [str(d) for d in layer.dims],
                zlib=True,
                complevel=1,
                shuffle=True,
                chunksizes=sizes,
                fill_value=_MISSING,
            )
            made.set_auto_maskandscale(False)  # the integers are written as they are
            mapping = {"grid_mapping": "spatial_ref"} if "spatial_ref" in cube.coords else {}
            made.setncatts({**layer.attrs, "scale_factor": np.float32(scale), **mapping})
            made[:] = _integers(layer.to_numpy(), scale)
        file.setncatts(_plain_attributes(cube))


def _integers(values: np.ndarray, scale: float) -> np.ndarray:
    """Values as int16 steps of ``scale``, -32768 where missing; beyond the range: its end."""
    steps = np.rint(values / np.float32(scale))
    np.clip(steps, -32767, 32767, out=steps)  # NaN stays
    steps[np.isnan(steps)] = _MISSING
    out: np.ndarray = steps.astype(np.int16)
    return out


def content_fingerprint(cube: xr.Dataset, static: str | None = None) -> str:
    """Hash of what a cube says: its grid, its layers in the precision of the file, the image's date and items.

    Two cubes with the same hash are the same to everything that reads them, whatever they were made from. With the
    fingerprint of its static layers only the layers of the year are looked at.
    """
    digest = hashlib.sha256((static or "").encode())
    box = cube.odc.geobox
    about = [str(box.crs), list(box.shape), list(box.affine)[:6]]
    about.append([str(b) for b in cube["band"].to_numpy()] if "band" in cube else [])
    about += [str(cube.attrs.get(key, "")) for key in ("glacier_id", "image_date", "scene_ids", "sensor", "tag")]
    digest.update(json.dumps(about).encode())
    for name in sorted(str(n) for n in cube.data_vars):
        if static is not None and name not in YEARLY:
            continue
        values = cube[name].to_numpy()
        digest.update(f"{name}:{cube[name].attrs.get('flag_meanings', '')}".encode())
        if name in SCALED:
            values = _integers(values, SCALED[name][1])
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:16]


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
