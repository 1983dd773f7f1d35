"""Before an inventory is read: making it from raw published files, and after: which glaciers have imagery.

Belongs here: the dispatch of ``inventory.prepare``, and the footprint test of ``inventory.model_within``.
Does not belong here: what is particular to one published inventory (see ``sgi``), reading into our schema.
"""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from dl4gam_assets.inventory.vector import read_vector
from dl4gam_assets.settings import InventorySettings, SettingsError
from dl4gam_assets.storage import Storage


def prepare_inventory(settings: InventorySettings, data_root: Path, out: Path) -> Path:
    """Path of the vector file that the settings mean, made in the folder ``out`` first where it has to be.

    Without ``settings.prepare`` this is ``data_root / settings.path``. With ``prepare: sgi2016``,
    ``settings.path`` is the folder of the raw SGI2016 files, and the result is ``out /
    sgi2016_glaciers.gpkg``. It is made once: a JSON file beside it holds the hash of the raw files, the
    version of the method and the comparison with the official areas.

    Raises
    ------
    FileNotFoundError
        naming the file that is missing.
    """
    if settings.prepare is None:
        return data_root / settings.path
    from dl4gam_assets.inventory import sgi

    folder, path = data_root / settings.path, out / "sgi2016_glaciers.gpkg"
    note = path.with_suffix(".json")
    wanted = {"sources": sgi.source_hash(folder), "method": sgi.METHOD_VERSION}
    if path.is_file() and note.is_file():
        try:
            made = json.loads(note.read_text(encoding="utf-8"))
            if {key: made.get(key) for key in wanted} == wanted:
                return path
        except (ValueError, AttributeError, RecursionError):
            pass  # cut short, or another's: as good as none
    note.unlink(missing_ok=True)
    figures = sgi.write_swiss_inventory(folder, path)
    storage = Storage(out)
    storage.write_text(storage.path(note.name), json.dumps({**wanted, "figures": figures}, indent=1))
    return path


def restrict_modelled(glaciers: gpd.GeoDataFrame, settings: InventorySettings, data_root: Path) -> gpd.GeoDataFrame:
    """The "glaciers" table with ``modelled`` false where the glacier lies outside the imagery's footprint.

    A glacier stays modelled if at least ``settings.model_within_share`` of its outline lies on valid ground
    of one of the files of ``settings.model_within``. The others remain rows: their ice stays in the masks of
    their neighbours, and the regional extrapolation covers them. Without ``model_within`` nothing changes.

    Raises
    ------
    SettingsError
        if a pattern matches no file, or if no glacier is left to model.
    """
    if not settings.model_within or not len(glaciers):
        return glaciers
    share = footprint_share(glaciers, settings.model_within, data_root)
    out = glaciers.copy()
    out["modelled"] = (out["modelled"].astype(bool) & (share >= settings.model_within_share)).astype("boolean")
    if not out["modelled"].any():
        raise SettingsError(
            f"inventory.model_within: no glacier of at least {settings.min_area_km2} km2 has "
            f"{settings.model_within_share:.0%} of its outline on {settings.model_within} "
            f"(largest share: {share.max():.0%})"
        )
    return out


def footprint_share(glaciers: gpd.GeoDataFrame, patterns: list[str], data_root: Path) -> pd.Series:
    """Largest share (0 to 1) of each outline that lies on valid ground of any one file, indexed like
    ``glaciers``.

    Valid ground is the union of a vector file's polygons, or a raster's pixels whose first band is neither 0
    nor the file's no-data value. Shares are by area (vector) or by pixels whose centre is inside (raster), in
    the file's CRS.
    """
    best = pd.Series(0.0, index=glaciers.index)
    for pattern in patterns:
        files = sorted(data_root.glob(pattern))
        if not files:
            raise SettingsError(f"inventory.model_within: no file matches {pattern!r} below {data_root}")
        for file in files:
            raster = file.suffix.lower() in {".tif", ".tiff", ".vrt", ".jp2"}
            share = _raster_share(glaciers, file) if raster else _vector_share(glaciers, file)
            best = best.where(best >= share, share)
    return best


def _raster_share(glaciers: gpd.GeoDataFrame, file: Path) -> pd.Series:
    import rasterio
    from rasterio import windows
    from rasterio.features import rasterize

    with rasterio.open(file) as source:
        band = source.read(1)
        transform, crs, bounds = source.transform, source.crs, shapely.box(*source.bounds)
        valid = (band != 0) if source.nodata is None else (band != 0) & (band != source.nodata)
    outlines = glaciers.geometry.to_crs(crs)
    share = pd.Series(0.0, index=glaciers.index)
    near = outlines[outlines.intersects(bounds)]
    if not len(near):
        return share
    rows, columns = valid.shape
    for index, outline in near.items():
        box = windows.from_bounds(*outline.bounds, transform=transform)
        r0, r1 = max(int(box.row_off), 0), min(int(box.row_off + box.height) + 1, rows)
        c0, c1 = max(int(box.col_off), 0), min(int(box.col_off + box.width) + 1, columns)
        if r0 >= r1 or c0 >= c1:
            continue
        corner = windows.transform(windows.Window(c0, r0, c1 - c0, r1 - r0), transform)
        inside = rasterize([outline], (r1 - r0, c1 - c0), transform=corner, dtype="uint8").astype(bool)
        pixels = np.count_nonzero(inside & valid[r0:r1, c0:c1])
        share.loc[index] = pixels * abs(transform.determinant) / outline.area
    return share.clip(upper=1.0)


def _vector_share(glaciers: gpd.GeoDataFrame, file: Path) -> pd.Series:
    ground = read_vector(file)
    crs = glaciers.estimate_utm_crs()
    union = ground.geometry.make_valid().to_crs(crs).union_all()
    outlines = glaciers.geometry.to_crs(crs)
    return (outlines.intersection(union).area / outlines.area).fillna(0.0)
