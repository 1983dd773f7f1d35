"""Glacier-wide cubes as published: one NetCDF a glacier, ``<entry_id>/<date>.nc``.

Belongs here: finding, checking, converting to our cubes and back. Does not belong here: the store, tables.
"""

from __future__ import annotations

import datetime as dt
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.features
import shapely
import xarray as xr

from dl4gam_assets.cubes import build_cube, cube_mask
from dl4gam_assets.cubes.build import glacier_masks, grid_dataset, terrain_attributes
from dl4gam_assets.cubes.masks import pack_masks, zone_name
from dl4gam_assets.published.layout import (
    BAND_NAMES,
    LAYERS,
    NODATA,
    PUBLISHED_BAND,
    STEP,
    PublishedFileError,
    date_of,
    mask_name,
)

#: A file's glacier mask and the inventory's outline must share this much of their union.
SAME_OUTLINE = 0.8
_NAME = re.compile(r"[\w.\- ]{1,200}")


@dataclass(frozen=True)
class PublishedCube:
    """A file of a folder of published cubes."""

    glacier_id: str
    date: dt.datetime
    path: Path


# ---------------------------------------------------------------------------------------------------------- finding
def find_cubes(folder: Path) -> list[PublishedCube]:
    """The cubes below a folder, by glacier: the folder of a file is its entry id, the begin of its name its date.

    Raises
    ------
    PublishedFileError
        if there is none, a name has no date, or a glacier has several (years mixed in one folder).
    """
    if not folder.is_dir():
        raise PublishedFileError(f"{folder} is no folder: name the one that holds <entry_id>/<date>.nc, or the archive")
    found = []
    for path in sorted(folder.rglob("*.nc")):
        date = date_of(path.stem)
        if date is None:
            raise PublishedFileError(f"{path}: its name does not begin with a date such as 2023-08-21")
        found.append(PublishedCube(path.parent.name, date, path))
    if not found:
        raise PublishedFileError(f"{folder} holds no cubes (<entry_id>/<date>.nc)")
    often = [(g, n) for g, n in Counter(cube.glacier_id for cube in found).items() if n > 1]
    if often:
        files = ", ".join(c.path.name for c in found if c.glacier_id == often[0][0])
        raise PublishedFileError(
            f"{folder}: {len(often)} glaciers have several cubes ({often[0][0]}: {files}): import one year at a time"
        )
    return found


def unpack_cubes(archive: Path, folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Unpack the cubes of a tar archive to ``folder/<entry_id>/<file>``; those that are there already are kept.

    Only regular files whose last two parts are plain names are taken; links, devices and paths are not.

    Raises
    ------
    PublishedFileError
        if it is no tar archive, damaged, or holds a name that is not plain.
    """
    count = 0
    try:
        with tarfile.open(archive) as tar:
            for entry in tar:
                if not entry.isfile() or not entry.name.endswith(".nc"):
                    continue
                parts = entry.name.replace("\\", "/").split("/")[-2:]
                if len(parts) != 2 or not all(_NAME.fullmatch(p) and p.strip(". ") for p in parts):
                    raise PublishedFileError(f"{archive}: {entry.name[:200]!r} is no <entry_id>/<date>.nc")
                target = folder / parts[0] / parts[1]
                if target.exists() and target.stat().st_size == entry.size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".tmp-{target.name}")
                source = tar.extractfile(entry)
                assert source is not None, "a regular file"
                with source, open(temporary, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                temporary.replace(target)
                count += 1
                if count % 100 == 0:
                    say(f"{count} cubes unpacked")
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise PublishedFileError(f"{archive} can not be unpacked: {error}") from error
    return folder


# ---------------------------------------------------------------------------------------------------------- reading
def read_published(path: Path, buffers_m: Sequence[int]) -> xr.Dataset:
    """A published cube in memory, checked.

    Parameters
    ----------
    buffers_m : buffers in metres whose masks must be there

    Returns
    -------
    Dataset (band, y, x) as in the file: ``band_data`` float32 in steps of 1e-4 reflectance, NaN where missing, with its
    band names as the coordinate ``band``; masks as float, layers float32.

    Raises
    ------
    PublishedFileError
        if it can not be read, or lacks a layer, band names, square pixels or a CRS; names the file.
    """
    import odc.geo.xr  # noqa: F401  registers the accessor `.odc`

    try:
        with xr.open_dataset(path, engine="netcdf4", decode_coords="all") as source:
            data = source.load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise PublishedFileError(f"cube {path} can not be read: {' '.join(str(error).split())[:200]}") from error
    needed = ["band_data", "mask_nok", "mask_all_g_id", *(mask_name(b) for b in sorted(buffers_m))]
    lacking = [name for name in dict.fromkeys(needed) if name not in data]
    if lacking:
        raise PublishedFileError(f"cube {path} lacks {', '.join(lacking)}: is it of the published data set?")
    names = data["band_data"].attrs.get("long_name")
    names = [names] if isinstance(names, str) else [str(n) for n in (names if names is not None else [])]
    if data["band_data"].dims != ("band", "y", "x") or len(names) != data.sizes["band"]:
        raise PublishedFileError(
            f"cube {path}: band_data {data['band_data'].shape} has {len(names)} band names in its attribute long_name"
        )
    grids = {name: data[name].shape for name in needed[1:] if data[name].shape != data["band_data"].shape[1:]}
    if grids:
        raise PublishedFileError(f"cube {path}: layers of other sizes than its bands: {grids}")
    try:
        box = data.odc.geobox
        usable = box is not None and box.crs is not None and box.crs.projected
        square = usable and np.isclose(abs(box.resolution.x), abs(box.resolution.y))
    except Exception as error:  # a library's own errors for coordinates that make no grid
        raise PublishedFileError(f"cube {path}: its coordinates make no grid: {error}") from error
    if not usable or not square:
        raise PublishedFileError(f"cube {path} has no grid of square pixels in a projected CRS (spatial_ref)")
    return data.assign_coords(band=names)


def to_cube(
    data: xr.Dataset,
    glacier_id: str,
    date: dt.datetime,
    bands: Sequence[str],
    buffers_m: Sequence[int],
    *,
    pixel_m: float = 10.0,
    outline: shapely.Geometry | None = None,
    attrs: dict[str, Any] | None = None,
) -> xr.Dataset:
    """Our cube from a published one.

    Reflectance keeps its steps of 1e-4. Masks are taken as they are; positive zones lose other glaciers' pixels, as
    ours do. ``cell`` is the ground nearest to this glacier. Layers that the file lacks are absent.

    Parameters
    ----------
    data : from :func:`read_published`
    bands : our names of the bands to keep
    buffers_m : buffers in metres of the zones
    outline : the inventory's outline in the cube's CRS, which the glacier's mask must be

    Raises
    ------
    PublishedFileError
        if a band lacks, the pixels have another size, the glacier's mask is empty or is not the outline.
    """
    path = data.encoding.get("source", glacier_id)
    box = data.odc.geobox
    if not np.isclose(abs(box.resolution.x), pixel_m):
        raise PublishedFileError(
            f"cube {path} has pixels of {abs(box.resolution.x):g} m, the region's are {pixel_m:g} m"
        )
    have = [str(n) for n in data["band"].to_numpy()]
    lacking = [b for b in bands if PUBLISHED_BAND.get(b) not in have]
    if lacking:
        raise PublishedFileError(f"cube {path} lacks the bands {', '.join(lacking)}; it has {', '.join(have)}")

    def mask(name: str) -> np.ndarray:
        values = data[name].to_numpy()
        return np.asarray(values == 1)

    glacier = mask("mask_crt_g")
    index = np.nan_to_num(data["mask_all_g_id"].to_numpy().astype(np.float64), nan=-1.0).astype(np.int32)
    if not glacier.any():
        raise PublishedFileError(f"cube {path}: its mask_crt_g is empty")
    mine = index[glacier & (index >= 0)]
    me = int(np.bincount(mine).argmax()) if mine.size else int(index.max()) + 1
    index[glacier] = me
    index[(index == me) & ~glacier] = -1
    if outline is not None:
        _assert_same(glacier, outline, box, path)
    zones = {b: mask(mask_name(b)) for b in buffers_m}
    debris = mask("mask_debris") if "mask_debris" in data else np.zeros(glacier.shape, dtype=bool)

    static = grid_dataset(box)
    static["mask"] = pack_masks(glacier_masks(index, me, debris & (index >= 0), zones))
    static["glacier_index"] = (("y", "x"), index, {"long_name": "integer id of the glacier, -1 elsewhere"})
    for name in LAYERS:
        if name in data and name != "dhdt":
            static[name] = (("y", "x"), _layer(data, name), terrain_attributes(name))
    static.attrs |= {"glacier_id": glacier_id, "Conventions": "CF-1.11"}
    steps = data["band_data"].sel(band=[PUBLISHED_BAND[b] for b in bands]).to_numpy().astype(np.float32)
    steps[steps == NODATA] = np.nan
    reflectance = xr.DataArray(
        steps * np.float32(STEP), dims=("band", "y", "x"), coords={"band": list(bands)}, name="reflectance"
    )
    image = xr.Dataset({"reflectance": reflectance})
    image["cloud"] = (("y", "x"), mask("mask_nok"))
    image["missing"] = (("y", "x"), np.isnan(steps).any(axis=0))
    return build_cube(
        static, image, dhdt=_layer(data, "dhdt") if "dhdt" in data else None,
        attrs={"image_date": date.isoformat(), **(attrs or {})},
    )  # fmt: skip


def _layer(data: xr.Dataset, name: str) -> np.ndarray:
    values = data[name].to_numpy().astype(np.float32)
    values[values == NODATA] = np.nan
    return values


def _assert_same(glacier: np.ndarray, outline: shapely.Geometry, box: Any, path: Any) -> None:
    """The file's mask must be the glacier of the inventory: files get renamed, and inventories have versions."""
    burnt = rasterio.features.rasterize([(outline, 1)], out_shape=glacier.shape, transform=box.affine, dtype="uint8")
    wanted = burnt == 1
    union = (wanted | glacier).sum()
    share = float((wanted & glacier).sum() / union) if union else 0.0
    outside = wanted.sum() * abs(box.resolution.x * box.resolution.y) < SAME_OUTLINE * outline.area
    if share < SAME_OUTLINE or outside:
        raise PublishedFileError(
            f"cube {path}: its glacier mask and the inventory's outline share {share:.0%} of their union: is it of "
            "another glacier, or of another inventory?"
        )


# ---------------------------------------------------------------------------------------------------------- writing
def from_cube(cube: xr.Dataset, area_km2: float) -> xr.Dataset:
    """A cube of ours in the published layout, for their code and for others that read it.

    Bands keep their published names; those that our cube does not have are absent, and ``long_name`` says which there
    are. Masks are int8 with -1 as fill value, ``mask_all_g_id`` holds our integer ids.
    """
    out = xr.Dataset(coords={name: cube.coords[name] for name in ("y", "x", "spatial_ref")})
    ours = [str(b) for b in cube["band"].to_numpy()]
    order = sorted((b for b in ours if b in PUBLISHED_BAND), key=lambda b: BAND_NAMES.index(PUBLISHED_BAND[b]))
    values = cube["reflectance"].sel(band=order).to_numpy()
    steps = np.rint(values / np.float32(STEP))
    steps[~np.isfinite(steps)] = NODATA
    where = {"grid_mapping": "spatial_ref"}
    out["band_data"] = (
        ("band", "y", "x"), np.clip(steps, NODATA, 32767).astype(np.int16),
        {"long_name": [PUBLISHED_BAND[b] for b in order], "_FillValue": np.int16(NODATA), **where},
    )  # fmt: skip
    out = out.assign_coords(band=np.arange(1, len(order) + 1))
    flag = {"_FillValue": np.int8(-1), **where}
    names = str(cube["mask"].attrs["flag_meanings"]).split()
    out["mask_nok"] = (("y", "x"), cube_mask(cube, "not_ok").astype(np.int8), dict(flag))
    out["mask_all_g_id"] = (
        ("y", "x"), cube["glacier_index"].to_numpy().astype(np.int32), {"_FillValue": np.int32(-1), **where}
    )  # fmt: skip
    for name in names:
        if name.startswith("zone_"):
            text = name.removeprefix("zone_")
            buffer_m = -int(text[1:]) if text.startswith("m") else int(text)
            bits = cube_mask(cube, "glacier" if buffer_m == 0 else name)
            out[mask_name(buffer_m)] = (("y", "x"), bits.astype(np.int8), dict(flag))
    assert zone_name(0) in names, "region.inventory.buffers_m always has 0"
    out["mask_debris"] = (("y", "x"), cube_mask(cube, "debris").astype(np.int8), dict(flag))
    for name in LAYERS:
        if name in cube:
            layer = np.nan_to_num(cube[name].to_numpy().astype(np.float32), nan=NODATA)
            out[name] = (("y", "x"), layer, {"_FillValue": np.float32(NODATA), **where})
    out.attrs = {
        "fn": str(cube.attrs.get("scene_ids", "")), "glacier_area": float(area_km2),
        "made_by": "dl4gam_assets", "sensor": str(cube.attrs.get("sensor", "")),
    }  # fmt: skip
    return out


def write_published(data: xr.Dataset, path: Path) -> None:
    """Write a dataset of :func:`from_cube` as NetCDF-4, compressed."""
    data = data.copy(deep=False)
    encoding: dict[str, dict[str, Any]] = {}
    for name in data.data_vars:
        attrs = dict(data[name].attrs)
        encoding[str(name)] = {"zlib": True, "complevel": 1, "_FillValue": attrs.pop("_FillValue")}
        encoding[str(name)]["grid_mapping"] = attrs.pop("grid_mapping")
        data[name].attrs = attrs
    data.to_netcdf(path, engine="netcdf4", encoding=encoding)
