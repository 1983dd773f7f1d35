"""Debris-covered ice: merging sources, cutting at the outlines.

Belongs here: the table ``debris``. Does not belong here: rasterizing it (``cubes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from dl4gam_assets.inventory.vector import read_vector, vector_info
from dl4gam_assets.settings import DebrisSource, SettingsError
from dl4gam_assets.tables import TABLES


def read_debris(sources: Sequence[DebrisSource], data_root: Path, glaciers: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Debris-covered part of each outline, the union of all sources.

    Parameters
    ----------
    sources
        Vector files of debris outlines, or rasters of surface types with the value that means debris.
    glaciers
        The table ``glaciers`` (EPSG:4326).

    Returns
    -------
    GeoDataFrame, EPSG:4326
        The table ``debris``: one row a glacier that has some; ``debris_km2`` is planar in the glacier's UTM zone.

    Raises
    ------
    SettingsError
        if a source is absent or can not be read.
    """
    shapes = [s for source in sources for s in _shapes(source, data_root, glaciers)]
    if not shapes or not len(glaciers):
        return TABLES["debris"].empty()
    tree = shapely.STRtree(shapes)
    outlines = glaciers.geometry.to_numpy()
    of_glacier, of_debris = tree.query(outlines, predicate="intersects")
    rows = []
    for index in np.unique(of_glacier):
        parts = [shapes[i] for i in of_debris[of_glacier == index]]
        covered = shapely.intersection(shapely.union_all(parts), outlines[index])
        parts = shapely.get_parts(shapely.get_parts(covered))  # twice: a collection may hold multipolygons
        polygons = [p for p in parts if p.geom_type == "Polygon" and p.area > 0]
        if polygons:
            rows.append((index, shapely.MultiPolygon(polygons)))
    if not rows:
        return TABLES["debris"].empty()
    picked = glaciers.iloc[[i for i, _ in rows]]
    found = gpd.GeoDataFrame(
        {"glacier_id": picked["glacier_id"].to_numpy()}, geometry=[s for _, s in rows], crs="EPSG:4326"
    )
    epsg = picked["utm_epsg"].to_numpy(dtype=int)
    area = np.zeros(len(found))
    for code in np.unique(epsg):
        area[epsg == code] = found.geometry[epsg == code].to_crs(int(code)).area / 1e6
    found["debris_km2"] = area
    return TABLES["debris"].conform(found)


def _shapes(source: DebrisSource, data_root: Path, glaciers: gpd.GeoDataFrame) -> list[shapely.Geometry]:
    path = data_root / source.path
    if not path.exists():
        raise SettingsError(f"debris source {path} does not exist (inventory.debris)")
    try:
        if source.raster_value is not None:
            frame = _from_raster(path, source.raster_value, glaciers)
        else:
            frame = _from_vector(path, source.layer, glaciers)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(f"debris source {path} can not be read: {error}") from error
    if frame.crs is None:
        raise SettingsError(f"debris source {path} has no coordinate reference system; assign one")
    shapes = frame.geometry.to_crs("EPSG:4326")
    shapes = shapes[~(shapes.isna() | shapes.is_empty)]
    return list(shapely.make_valid(shapely.force_2d(shapes.to_numpy())))


def _from_vector(path: Path, layer: str | None, glaciers: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Shapes of a file, read only in the box of the glaciers: global data sets hold millions."""
    options = {"layer": layer} if layer else {}
    crs = vector_info(path, **options)["crs"]
    if crs is None or not len(glaciers):
        return read_vector(path, rows=slice(0, 0), **options)
    west, south, east, north = glaciers.to_crs(crs).total_bounds
    rim = 1e-3 * max(east - west, north - south)
    return read_vector(path, bbox=(west - rim, south - rim, east + rim, north + rim), **options)


def _from_raster(path: Path, value: int, glaciers: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Polygons of one value of a raster, read only where the glaciers are."""
    import rasterio
    import rasterio.features
    import rasterio.windows

    with rasterio.open(path) as source:
        bounds = glaciers.to_crs(source.crs).total_bounds
        near = rasterio.windows.from_bounds(*bounds, transform=source.transform)
        window = rasterio.windows.Window(
            int(near.col_off) - 1, int(near.row_off) - 1, int(near.width) + 3, int(near.height) + 3
        )
        whole = rasterio.windows.Window(0, 0, source.width, source.height)
        if not rasterio.windows.intersect(window, whole):
            return gpd.GeoDataFrame(geometry=[], crs=source.crs)
        window = rasterio.windows.intersection(window, whole)
        mask = source.read(1, window=window) == value
        transform = source.window_transform(window)
        shapes = [
            shapely.geometry.shape(s)
            for s, v in rasterio.features.shapes(mask.astype(np.uint8), mask=mask, transform=transform)
            if v == 1
        ]
        return gpd.GeoDataFrame(pd.DataFrame(index=range(len(shapes))), geometry=shapes, crs=source.crs)
