"""Making a cube: static layers of a glacier once, then the image and dh/dt of a year.

Belongs here: rasterized masks, layers with names and units.
Does not belong here: files (``files``), the channels of models (``channels``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import rasterio.features
import shapely
import xarray as xr
from scipy import ndimage

from dl4gam_assets.cubes.masks import cube_mask, pack_masks, zone_name
from dl4gam_assets.tables import rows_of
from dl4gam_assets.terrain import (
    DERIVATIVES,
    boxes,
    grid_box,
    read_elevation,
    read_velocity,
    terrain_derivatives,
)

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

    from dl4gam_assets.terrain import Tile

_LONG_NAMES = {
    "slope": "surface slope",
    "aspect": "aspect, clockwise from north",
    "planform_curvature": "planform curvature",
    "profile_curvature": "profile curvature",
    "terrain_ruggedness_index": "terrain ruggedness index",
}


def static_layers(
    glacier_id: str,
    glaciers: gpd.GeoDataFrame,
    zones: gpd.GeoDataFrame,
    debris: gpd.GeoDataFrame,
    geobox: GeoBox,
    *,
    dem_paths: Sequence[Tile | Path | str] | None = None,
    dem_nodata: float | None = None,
    velocity_paths: Sequence[Tile | Path | str] | None = None,
    smoothing_sigma: float = 1.0,
    buffers_m: Sequence[int] = (-20, -10, 0, 10, 20, 50),
) -> xr.Dataset:
    """Masks and terrain of one glacier: what does not change from year to year.

    Pixels belong to a polygon if their centre does. ``mask`` holds, as bits: ``not_ok`` (all false here), ``glacier``
    (this one), ``any_glacier``, ``debris`` (on any glacier), one ``zone_*`` for each buffer, and ``cell``: pixels
    nearer to this glacier than to any other that meets the grid. Positive zones are free of other glaciers' pixels.
    ``glacier_index`` holds the integer ids of glaciers, -1 elsewhere.

    Parameters
    ----------
    glaciers, zones, debris : the tables, EPSG:4326; all glaciers, also those that are not modelled
    geobox : grid of the glacier
    dem_paths : DEM tiles; None: the terrain layers are absent. An empty list gives layers that are missing everywhere.
    velocity_paths : tiles of surface speed in m/yr, in the same way

    Returns
    -------
    Dataset (y, x) with ``mask`` uint16, ``glacier_index`` int32, and float32 ``dem`` (m) with its derivatives,
    and ``v`` (m/yr).

    Raises
    ------
    KeyError
        if the glacier is not in the table.
    ValueError
        if its outline holds no pixel centre of the grid, or a zone is missing.
    """
    own = rows_of(glaciers, glacier_id)
    if not len(own):
        raise KeyError(f"glacier {glacier_id!r} is not in the inventory")
    window = boxes(grid_box(geobox))
    around = glaciers.iloc[glaciers.sindex.query(window, predicate="intersects")]
    crs = str(geobox.crs)

    def burn(shapes: Sequence[shapely.Geometry], values: Sequence[int], fill: int) -> np.ndarray:
        pairs = [(s, v) for s, v in zip(shapes, values, strict=True) if s is not None and not s.is_empty]
        if not pairs:
            return np.full(geobox.shape, fill, dtype=np.int32)
        burnt: np.ndarray = rasterio.features.rasterize(
            pairs, out_shape=geobox.shape, transform=geobox.affine, fill=fill, dtype="int32"
        )
        return burnt

    index = burn(around.geometry.to_crs(crs), around["glacier_int"].astype(int).tolist(), -1)
    me = int(own["glacier_int"].iloc[0])
    # Where outlines overlap, the glacier of this cube keeps its pixels.
    index[burn(own.geometry.to_crs(crs), [1], 0) == 1] = me
    glacier = index == me
    if not glacier.any():
        raise ValueError(f"glacier {glacier_id}: its outline holds no pixel centre at {geobox.resolution.x} m")
    covered = np.zeros(geobox.shape, dtype=bool)
    if len(debris):
        near = debris.iloc[debris.sindex.query(window, predicate="intersects")]
        if len(near):
            covered = (burn(near.geometry.to_crs(crs), [1] * len(near), 0) == 1) & (index >= 0)
    own_zones = rows_of(zones, glacier_id).set_index("buffer_m")
    lacking = set(buffers_m) - set(own_zones.index)
    if lacking:
        raise ValueError(
            f"glacier {glacier_id} has no zones of {sorted(lacking)} m; materialize glacier_zones with these buffers"
        )
    burnt = {b: burn(own_zones.geometry.loc[[b]].to_crs(crs), [1], 0) == 1 for b in buffers_m}
    out = grid_dataset(geobox)
    out["mask"] = pack_masks(glacier_masks(index, me, covered, burnt))
    out["glacier_index"] = (("y", "x"), index, {"long_name": "integer id of the glacier, -1 elsewhere"})
    if dem_paths is not None:
        dem = read_elevation(dem_paths, geobox, dem_nodata)
        out["dem"] = (("y", "x"), dem, terrain_attributes("dem"))
        pixel = abs(float(geobox.resolution.x))
        for name, values in terrain_derivatives(dem, pixel, smoothing_sigma).items():
            out[name] = (("y", "x"), values, terrain_attributes(name))
    if velocity_paths is not None:
        speed = read_velocity(velocity_paths, geobox)
        out["v"] = (("y", "x"), speed, terrain_attributes("v"))
    out.attrs |= {"glacier_id": glacier_id, "Conventions": "CF-1.11"}
    return out


def grid_dataset(geobox: GeoBox) -> xr.Dataset:
    """An empty Dataset with the coordinates and the CRS of a grid."""
    from odc.geo.xr import xr_coords

    out = xr.Dataset(coords=xr_coords(geobox))
    for axis in ("x", "y"):
        out[axis].attrs |= {"standard_name": f"projection_{axis}_coordinate", "units": "m", "axis": axis.upper()}
    return out


def terrain_attributes(name: str) -> dict[str, str]:
    """Attributes of a layer of terrain or velocity."""
    if name == "dem":
        return {"standard_name": "surface_altitude", "units": "m"}
    if name == "v":
        return {"long_name": "surface speed of the ice", "units": "m year-1"}
    return {"long_name": _LONG_NAMES[name], "units": DERIVATIVES[name]}


def glacier_masks(
    index: np.ndarray, me: int, debris: np.ndarray, zones: Mapping[int, np.ndarray]
) -> dict[str, np.ndarray]:
    """The masks of a cube, each bool (H, W), in the order of their bits.

    Parameters
    ----------
    index : int array (H, W): integer ids of glaciers, -1 elsewhere
    me : integer id of this glacier
    debris : bool (H, W), on any glacier
    zones : buffer in metres -> bool (H, W), as drawn; positive ones lose other glaciers' pixels here
    """
    glacier = index == me
    masks = {
        "not_ok": np.zeros(index.shape, dtype=bool), "glacier": glacier, "any_glacier": index >= 0, "debris": debris,
    }  # fmt: skip
    for buffer_m in sorted(zones):
        zone = zones[buffer_m]
        masks[zone_name(buffer_m)] = (zone & (glacier | (index < 0))) if buffer_m > 0 else zone & glacier
        if buffer_m >= 0:
            masks[zone_name(buffer_m)] |= glacier
    nearest = ndimage.distance_transform_edt(index < 0, return_distances=False, return_indices=True)
    masks["cell"] = index[tuple(nearest)] == me
    return masks


def build_cube(
    static: xr.Dataset,
    image: xr.Dataset,
    *,
    dhdt: np.ndarray | None = None,
    dhdt_error: np.ndarray | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Add an image and elevation change to a glacier's static layers.

    Parameters
    ----------
    static : from :func:`static_layers`
    image : from ``imagery.read_image`` on the same grid: ``reflectance`` (band, y, x), ``cloud`` and ``missing`` (y, x)
    dhdt : float array (H, W) in m/yr, NaN where missing
    dhdt_error : its standard error, in the same way: the layer ``dhdt_err``
    attrs : global attributes (glacier_id, image_date, scene_ids, fingerprint, ...)

    Returns
    -------
    Dataset as in the module ``files``; the bit ``not_ok`` marks cloudy, missing or bad pixels.

    Raises
    ------
    ValueError
        if the image is on another grid.
    """
    reflectance = image["reflectance"]
    if reflectance.shape[1:] != static["mask"].shape:
        raise ValueError(
            f"glacier {static.attrs.get('glacier_id')}: image of {reflectance.shape[1:]} pixels on a grid of "
            f"{static['mask'].shape}"
        )
    out = static.copy(deep=False)
    values = np.asarray(reflectance.to_numpy(), dtype=np.float32)
    out = out.assign_coords(band=("band", [str(b) for b in reflectance["band"].to_numpy()]))
    out["reflectance"] = (
        ("band", "y", "x"), values, {"long_name": "reflectance", "units": "1"},
    )  # fmt: skip
    bad = image["cloud"].to_numpy() | image["missing"].to_numpy() | ~np.isfinite(values).all(axis=0)
    names = str(static["mask"].attrs["flag_meanings"]).split()
    masks = {name: cube_mask(static, name) for name in names}
    masks["not_ok"] = bad
    out["mask"] = pack_masks(masks)
    if dhdt is not None:
        out["dhdt"] = (
            ("y", "x"), np.asarray(dhdt, dtype=np.float32),
            {"long_name": "rate of surface elevation change", "units": "m year-1"},
        )  # fmt: skip
    if dhdt_error is not None:
        out["dhdt_err"] = (
            ("y", "x"), np.asarray(dhdt_error, dtype=np.float32),
            {"long_name": "standard error of the rate of surface elevation change", "units": "m year-1"},
        )  # fmt: skip
    out.attrs = {**static.attrs, **(attrs or {})}
    return out
