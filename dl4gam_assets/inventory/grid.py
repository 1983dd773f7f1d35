"""The grid of a glacier's cube.

Belongs here: where the pixels of a glacier lie. Does not belong here: reading anything onto it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import geopandas as gpd
import shapely

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


def glacier_grid(geometry: shapely.Geometry, utm_epsg: int, pixel_m: float, margin_m: float) -> GeoBox:
    """Grid that covers a glacier and a margin around its box.

    Parameters
    ----------
    geometry : polygon, EPSG:4326
    utm_epsg : EPSG code of the grid
    pixel_m : pixel size in metres; corners lie on multiples of it, so grids of one zone share their pixels
    margin_m : distance added on each side (published: 128 + 5 pixels of 10 m)

    Returns
    -------
    odc.geo.geobox.GeoBox, north up
    """
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import BoundingBox

    west, south, east, north = gpd.GeoSeries([geometry], crs="EPSG:4326").to_crs(utm_epsg).total_bounds
    box = BoundingBox(west - margin_m, south - margin_m, east + margin_m, north + margin_m, crs=f"EPSG:{utm_epsg}")
    return GeoBox.from_bbox(box, resolution=pixel_m, tol=1e-6)
