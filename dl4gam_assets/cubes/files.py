"""The file of a cube: NetCDF-4, CF names and units, CRS inside.

Belongs here: encoding, writing, opening. Does not belong here: what the layers mean.

The files open with ``xarray.open_dataset`` alone (CF scale factors are decoded by xarray), and georeferenced in GDAL
and QGIS (``spatial_ref`` with WKT and GeoTransform).
"""

from __future__ import annotations

import hashlib
import itertools
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

    Files are plain NetCDF-4 with the deflate filter. The chunks are deflated by ISA-L where it is installed (the same
    format, several times faster than zlib at the same size) and put into the file as they are.
    """
    import h5py
    import netCDF4

    if base is not None:
        shutil.copyfile(base, path)
    layers = {str(n): v for n, v in cube.data_vars.items() if base is None or n in YEARLY}
    written: dict[str, np.ndarray] = {}
    with netCDF4.Dataset(path, "w" if base is None else "a") as file:
        for name, size in cube.sizes.items():
            if name not in file.dimensions:
                file.createDimension(str(name), size)
        for name, coordinate in cube.coords.items():
            if name not in file.variables:
                _add_small(file, str(name), coordinate)
        for name, layer in layers.items():
            if layer.ndim < 2:
                _add_small(file, name, layer)
                continue
            written[name], attributes, missing = _encoded(name, layer)
            if name in file.variables:  # the mask, whose bit `not_ok` is the year's
                continue
            sizes = tuple(1 if d == "band" else _chunk(s) for d, s in zip(layer.dims, layer.shape, strict=True))
            made = file.createVariable(
                name, written[name].dtype, [str(d) for d in layer.dims], zlib=True, complevel=1, shuffle=True,
                chunksizes=sizes, fill_value=missing,
            )  # fmt: skip
            made.setncatts(attributes | ({"grid_mapping": "spatial_ref"} if "spatial_ref" in cube.coords else {}))
        file.setncatts(_plain_attributes(cube))
    with h5py.File(path, "r+") as file:
        for name, values in written.items():
            _put_chunks(file[name], values)


def _add_small(file: Any, name: str, variable: xr.DataArray) -> None:
    """A coordinate or a scalar: as it is, without a fill value (CF allows no missing coordinates)."""
    values = variable.to_numpy()
    if values.dtype.kind in "OUT":
        made = file.createVariable(name, str, [str(d) for d in variable.dims])
        made[:] = np.array([str(v) for v in values.ravel()], dtype=object).reshape(values.shape)
    else:
        made = file.createVariable(name, values.dtype, [str(d) for d in variable.dims], fill_value=False)
        made[...] = values
    made.setncatts({k: v for k, v in variable.attrs.items() if v is not None})


def _encoded(name: str, layer: xr.DataArray) -> tuple[np.ndarray, dict[str, Any], Any]:
    """Values as they stand in the file, attributes, and the fill value (False: none)."""
    attributes = {k: v for k, v in layer.attrs.items() if k != "grid_mapping"}
    values = layer.to_numpy()
    if name in SCALED:
        scale = SCALED[name][1]
        return _integers(values, scale), attributes | {"scale_factor": np.float32(scale)}, _MISSING
    if np.issubdtype(values.dtype, np.floating):
        return values.astype(np.float32), attributes, np.float32(np.nan)
    return values, attributes, False


def _put_chunks(variable: Any, values: np.ndarray) -> None:
    """Shuffle and deflate the chunks of an empty or former HDF5 dataset, whose filters are these two in this order."""
    try:
        from isal.isal_zlib import compress
    except ImportError:  # no wheel for this machine
        from zlib import compress

    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    sizes = variable.chunks
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(values.shape, sizes, strict=True))):
        chunk = values[tuple(slice(k, k + c) for k, c in zip(corner, sizes, strict=True))]
        if chunk.shape != sizes:  # at the far edges: chunks are whole in the file
            chunk = np.pad(chunk, [(0, c - n) for n, c in zip(chunk.shape, sizes, strict=True)])
        shuffled = np.ascontiguousarray(chunk).view(np.uint8).reshape(-1, values.itemsize).T.tobytes()
        variable.id.write_direct_chunk(corner, compress(shuffled, 1))


def _plain_attributes(cube: xr.Dataset) -> dict[str, Any]:
    return {
        str(key): int(value) if isinstance(value, bool) else value
        for key, value in cube.attrs.items()
        if value is not None
    }


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
