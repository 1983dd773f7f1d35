"""Glacier-wide cubes as published: one NetCDF a glacier, ``<entry_id>/<date>.nc``.

Belongs here: finding, checking, converting to our cubes and back. Does not belong here: the store, tables.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import lzma
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netCDF4
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
    channel_name,
    date_of,
    dates_in,
    layers_of,
    mask_name,
)
from dl4gam_assets.settings import PUBLISHED_CHANNELS

#: A file's glacier mask and the inventory's outline must share this much of their union.
SAME_OUTLINE = 0.8
#: Medians of bands in steps of 1e-4 that no image of the ground has: reflectance as fractions, and above 2.
PLAUSIBLE_STEPS = (2.0, 20000.0)
#: The area that a file states and the inventory's may differ by this factor.
SAME_AREA = 2.0
_NAME = re.compile(r"[\w.\- ]{1,200}")
_HIDDEN = re.compile(r"\.\w")
_NO_END = (tarfile.InvalidHeaderError, tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


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
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # hidden: of macOS, or not finished
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


class _Member(tarfile.TarInfo):
    """A member of an archive that must be whole: the standard library takes a header that is damaged or cut off, after
    the first one, as the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except _NO_END as error:
            raise tarfile.ReadError(f"{error or 'it ends'} at byte {archive.offset}, before its end mark") from error


def unpack_cubes(archive: Path, folder: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Unpack the cubes of a tar archive to ``folder/<begin of its SHA-256>/<entry_id>/<file>``; returns that folder.

    The folder appears when the whole archive was read and its checksums hold, so a damaged one leaves nothing behind,
    a corrected one is another folder, and one that was unpacked before is not read again. Only regular files whose last
    two parts are plain names are taken; links, devices, and hidden files (as macOS adds) are not.

    Raises
    ------
    PublishedFileError
        if it is no tar archive, damaged or cut off, holds a name that is not plain, a file twice, or no cube.
    """
    with open(archive, "rb") as handle:
        target = folder / hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    if target.is_dir():
        return target
    temporary = folder / f".tmp-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        _unpack(archive, temporary, say)
        temporary.replace(target)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the disk's, not the archive's
        raise PublishedFileError(f"{archive} can not be unpacked, it is damaged: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unpack(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    taken: set[tuple[str, str]] = set()
    with tarfile.open(archive, tarinfo=_Member) as tar:
        for entry in tar:
            parts = tuple(entry.name.replace("\\", "/").split("/")[-2:])
            if not entry.isfile() or not entry.name.endswith(".nc") or _HIDDEN.match(parts[-1]):
                continue
            if len(parts) != 2 or not all(_NAME.fullmatch(p) and p.strip(". ") and p[0] != "." for p in parts):
                raise PublishedFileError(f"{archive}: {entry.name[:200]!r} is no <entry_id>/<date>.nc")
            if parts in taken:
                raise PublishedFileError(f"{archive} holds {'/'.join(parts)} twice: which one is it?")
            taken.add(parts)
            place = folder / parts[0] / parts[1]
            place.parent.mkdir(exist_ok=True)
            source = tar.extractfile(entry)
            assert source is not None, "a regular file"
            with source, open(place, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            if len(taken) % 100 == 0:
                say(f"{len(taken)} cubes unpacked")
        # The checksum of a compressed stream is at its very end, which tar does not read.
        assert tar.fileobj is not None
        while tar.fileobj.read(1 << 20):
            pass
    if not taken:
        raise PublishedFileError(f"{archive} holds no cubes (<entry_id>/<date>.nc)")


def trouble_with(path: Path) -> str | None:
    """Why a file is no cube at all, from its header alone; None where it may be one."""
    try:
        with netCDF4.Dataset(path) as file:
            return None if "band_data" in file.variables else "it has no band_data"
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------------------- reading
def read_published(
    path: Path, buffers_m: Sequence[int], channels: Sequence[str] = PUBLISHED_CHANNELS, *, masks_only: bool = False
) -> xr.Dataset:
    """A published cube in memory, checked.

    Parameters
    ----------
    buffers_m : buffers in metres whose masks must be there
    channels : our names of the channels whose layers must be there
    masks_only : leave bands and layers in the file

    Returns
    -------
    Dataset (band, y, x) as in the file: ``band_data`` float32 in steps of 1e-4 reflectance, NaN where missing, with our
    names of its bands as the coordinate ``band``; masks as float (0, 1, NaN where missing), layers float32.

    Raises
    ------
    PublishedFileError
        if it can not be read, lacks a layer, band names, square pixels or a CRS, a layer is of another shape, a band is
        there twice, or a mask holds anything but 0 and 1; names the file.
    """
    import odc.geo.xr  # noqa: F401  registers the accessor `.odc`

    try:
        with xr.open_dataset(path, engine="netcdf4", decode_coords="all") as source:
            if masks_only:
                source = source[[str(n) for n in source.data_vars if str(n).startswith("mask")]]
            data = source.load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise PublishedFileError(f"cube {path} can not be read: {' '.join(str(error).split())[:200]}") from error
    layers = [] if masks_only else layers_of(channels)
    masks = ["mask_nok", "mask_debris", *dict.fromkeys(mask_name(b) for b in sorted(buffers_m))]
    needed = [*([] if masks_only else ["band_data"]), "mask_all_g_id", *masks, *layers]
    lacking = [name for name in needed if name not in data]
    if lacking:
        raise PublishedFileError(f"cube {path} lacks {', '.join(lacking)}: is it of the published data set?")
    flat = [name for name in dict.fromkeys([*needed, *LAYERS]) if name in data and name != "band_data"]
    wrong = {name: tuple(data[name].dims) for name in flat if data[name].dims != ("y", "x")}
    if wrong:
        name, dims = next(iter(wrong.items()))
        raise PublishedFileError(
            f"cube {path}: {name} lies over {', '.join(map(str, dims)) or 'nothing'}, not over y, x"
        )
    if not masks_only:
        data = data.assign_coords(band=_bands(data["band_data"], path))
    for name in masks:
        values = data[name].to_numpy()
        strange = values[~(np.isin(values, (0, 1, -1, NODATA)) | np.isnan(values))]
        if strange.size:
            raise PublishedFileError(f"cube {path}: {name} holds {strange[0]:g}, and not only 0 and 1")
    try:
        box = data.odc.geobox
        usable = box is not None and box.crs is not None and box.crs.projected
        square = usable and np.isclose(abs(box.resolution.x), abs(box.resolution.y))
    except Exception as error:  # a library's own errors for coordinates that make no grid
        raise PublishedFileError(f"cube {path}: its coordinates make no grid: {error}") from error
    if not usable or not square:
        raise PublishedFileError(f"cube {path} has no grid of square pixels in a projected CRS (spatial_ref)")
    return data


def _bands(values: xr.DataArray, path: Path) -> list[str]:
    """Our names of a file's bands, checked."""
    names = values.attrs.get("long_name")
    names = [names] if isinstance(names, str) else [str(n) for n in (names if names is not None else [])]
    if values.dims != ("band", "y", "x") or len(names) != values.sizes["band"]:
        raise PublishedFileError(
            f"cube {path}: band_data {values.shape} has {len(names)} band names in its attribute long_name"
        )
    ours = [channel_name(name) for name in names]
    twice = [name for name, n in Counter(ours).items() if n > 1]
    if twice:
        raise PublishedFileError(f"cube {path} has several bands {twice[0]}: {', '.join(names)}")
    return ours


def to_cube(
    data: xr.Dataset,
    glacier_id: str,
    date: dt.datetime,
    bands: Sequence[str],
    buffers_m: Sequence[int],
    *,
    pixel_m: float = 10.0,
    outline: shapely.Geometry | None = None,
    area_km2: float | None = None,
    attrs: dict[str, Any] | None = None,
) -> xr.Dataset:
    """Our cube from a published one.

    Reflectance keeps its steps of 1e-4. Masks are taken as they are; positive zones lose other glaciers' pixels, as
    ours do. A pixel is good where ``mask_nok`` is 0, and nowhere else. ``cell`` is the ground nearest to this glacier.
    Layers that the file lacks are absent.

    Parameters
    ----------
    data : from :func:`read_published`
    bands : our names of the bands to keep
    buffers_m : buffers in metres of the zones
    outline : the inventory's outline in the cube's CRS, which the glacier's mask must be
    area_km2 : the inventory's area, which the file's own ``glacier_area`` must be near to

    Raises
    ------
    PublishedFileError
        if a band lacks or holds no reflectance in steps of 1e-4, the pixels have another size, the raw image's name
        (``fn``) has another date, the area is another, or the glacier's mask is empty or is not the outline.
    """
    path = data.encoding.get("source", glacier_id)
    box = data.odc.geobox
    if not np.isclose(abs(box.resolution.x), pixel_m):
        raise PublishedFileError(
            f"cube {path} has pixels of {abs(box.resolution.x):g} m, the region's are {pixel_m:g} m"
        )
    have = [str(n) for n in data["band"].to_numpy()]
    lacking = [b for b in bands if b not in have]
    if lacking:
        raise PublishedFileError(f"cube {path} lacks the bands {', '.join(lacking)}; it has {', '.join(have)}")
    _assert_told(data, date, area_km2, path)
    steps = data["band_data"].sel(band=list(bands)).to_numpy().astype(np.float32)
    steps[steps == NODATA] = np.nan
    _assert_reflectance(steps, bands, path)
    static, nok = _ground(data, glacier_id, buffers_m, outline, path)
    for name in LAYERS:
        if name in data and name != "dhdt":
            static[name] = (("y", "x"), _layer(data, name), terrain_attributes(name))
    reflectance = xr.DataArray(
        steps * np.float32(STEP), dims=("band", "y", "x"), coords={"band": list(bands)}, name="reflectance"
    )
    image = xr.Dataset({"reflectance": reflectance})
    image["cloud"] = (("y", "x"), nok)
    image["missing"] = (("y", "x"), np.isnan(steps).any(axis=0))
    return build_cube(
        static, image, dhdt=_layer(data, "dhdt") if "dhdt" in data else None,
        attrs={"image_date": date.isoformat(), **(attrs or {})},
    )  # fmt: skip


def read_ground(path: Path, buffers_m: Sequence[int]) -> xr.Dataset:
    """The masks of a published cube as ours, and nothing else of it: bands and layers are not read.

    Returns
    -------
    Dataset with ``mask`` and ``glacier_index`` as in our cubes

    Raises
    ------
    PublishedFileError
        as :func:`read_published` and :func:`to_cube`, as far as masks are concerned.
    """
    return _ground(read_published(path, buffers_m, masks_only=True), path.parent.name, buffers_m, None, path)[0]


def _ground(
    data: xr.Dataset, glacier_id: str, buffers_m: Sequence[int], outline: shapely.Geometry | None, path: Any
) -> tuple[xr.Dataset, np.ndarray]:
    """The masks of a file as ours, and where its image is not usable."""
    box = data.odc.geobox

    def mask(name: str) -> np.ndarray:
        return np.asarray(data[name].to_numpy() == 1)

    glacier = mask("mask_crt_g")
    ids = np.nan_to_num(data["mask_all_g_id"].to_numpy().astype(np.float64), nan=-1.0)
    if (np.abs(ids) > np.iinfo(np.int32).max - 1).any():
        raise PublishedFileError(f"cube {path}: its mask_all_g_id holds no ids of glaciers, but {np.abs(ids).max():g}")
    index = np.maximum(ids, -1).astype(np.int32)  # -9999 is none either
    if not glacier.any():
        raise PublishedFileError(f"cube {path}: its mask_crt_g is empty")
    mine = index[glacier & (index >= 0)]
    me = int(np.bincount(mine).argmax()) if mine.size else int(index.max()) + 1
    index[glacier] = me
    index[(index == me) & ~glacier] = -1
    if outline is not None:
        _assert_same(glacier, outline, box, path)
    zones = {b: mask(mask_name(b)) for b in buffers_m}
    static = grid_dataset(box)
    static["mask"] = pack_masks(glacier_masks(index, me, mask("mask_debris") & (index >= 0), zones))
    static["glacier_index"] = (("y", "x"), index, {"long_name": "integer id of the glacier, -1 elsewhere"})
    static.attrs |= {"glacier_id": glacier_id, "Conventions": "CF-1.11"}
    return static, ~np.asarray(data["mask_nok"].to_numpy() == 0)


def _assert_told(data: xr.Dataset, date: dt.datetime, area_km2: float | None, path: Any) -> None:
    """What a file says of itself must fit its name and its glacier."""
    raw = str(data.attrs.get("fn", ""))
    dates = dates_in(raw)
    if dates and date.date() not in dates:  # names of products also hold the day of their processing
        raise PublishedFileError(
            f"cube {path} is named after {date:%Y-%m-%d}, but was made from {raw[:200]} of {min(dates)}: is it renamed?"
        )
    try:
        stated = float(data.attrs.get("glacier_area", "nan"))
    except (TypeError, ValueError):
        stated = float("nan")
    if area_km2 and not np.isnan(stated) and not 1 / SAME_AREA <= stated / area_km2 <= SAME_AREA:
        raise PublishedFileError(
            f"cube {path} is of a glacier of {stated:.3g} km2 (glacier_area), the inventory's has {area_km2:.3g} km2"
        )


def _assert_reflectance(steps: np.ndarray, bands: Sequence[str], path: Any) -> None:
    """Bands must be reflectance in steps of 1e-4 of a real image: not fractions, not a number everywhere."""
    for band, values in zip(bands, steps, strict=True):
        valid = values[np.isfinite(values)]
        if valid.size > 1 and valid.min() == valid.max():
            raise PublishedFileError(f"cube {path}: band {band} is {valid[0]:g} everywhere: that is no image")
    valid = steps[np.isfinite(steps)]
    if valid.size and not PLAUSIBLE_STEPS[0] < float(np.median(valid)) <= PLAUSIBLE_STEPS[1]:
        raise PublishedFileError(
            f"cube {path}: the median of its bands is {float(np.median(valid)):g}, no reflectance in steps of 1e-4"
        )


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
