"""Zones around the outlines: buffers that do not overlap between neighbours.

Belongs here: the table ``zones``. Does not belong here: rasterizing it (``cubes``).
"""

from __future__ import annotations

from collections.abc import Sequence

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dl4gam_assets.tables import TABLES

#: Spacing of the points along outlines from which the Voronoi cells are made, in metres.
SPACING_M = 10.0


def glacier_zones(glaciers: gpd.GeoDataFrame, buffers_m: Sequence[int]) -> gpd.GeoDataFrame:
    """Outline and its surroundings up to each distance, cut halfway to the neighbours.

    For a positive distance the zone is the outline buffered by it, without the other outlines, and without what is
    nearer to another glacier: a Voronoi partition of the cluster of glaciers whose largest buffers touch (as the
    modular DL4GAM code does). For zero it is the outline, for a negative distance its inner part.

    Parameters
    ----------
    glaciers : the table ``glaciers`` (EPSG:4326)
    buffers_m : distances in metres

    Returns
    -------
    GeoDataFrame, EPSG:4326
        The table ``zones``, one row for each glacier and distance. Zones of different glaciers do not overlap by more
        than the rounding of coordinates. An inner zone may be empty.
    """
    if not len(glaciers):
        return TABLES["zones"].empty()
    largest = max([b for b in buffers_m if b > 0], default=0)
    frames = []
    epsg = glaciers["utm_epsg"].to_numpy(dtype=int)
    for code in np.unique(epsg):
        mine = np.flatnonzero(epsg == code)
        # Neighbours over the border of the zone count too.
        metric = glaciers.geometry.to_crs(int(code)) if len(np.unique(epsg)) > 1 else glaciers.to_crs(int(code)).geometry
        shapes = metric.to_numpy()
        near = _near(shapes, mine, largest)
        zones = _zones_of(shapes, mine, near, buffers_m, largest)
        frames.append(gpd.GeoDataFrame(zones, geometry="geometry", crs=int(code)).to_crs("EPSG:4326"))
    out = gpd.GeoDataFrame(pd.concat(frames, ignore_index=True), geometry="geometry", crs="EPSG:4326")
    out["glacier_id"] = glaciers["glacier_id"].to_numpy()[out.pop("row").to_numpy()]
    return TABLES["zones"].conform(out.sort_values(["glacier_id", "buffer_m"]).reset_index(drop=True))


def _near(shapes: np.ndarray, mine: np.ndarray, largest: float) -> dict[int, np.ndarray]:
    """For each glacier of ``mine``: the others whose largest buffer touches its own."""
    tree = shapely.STRtree(shapes)
    left, right = tree.query(shapes[mine], predicate="dwithin", distance=2.0 * largest)
    found: dict[int, list[int]] = {int(i): [] for i in mine}
    for a, b in zip(mine[left], right, strict=True):
        if a != b:
            found[int(a)].append(int(b))
    return {k: np.array(sorted(v), dtype=int) for k, v in found.items()}


def _zones_of(
    shapes: np.ndarray, mine: np.ndarray, near: dict[int, np.ndarray], buffers_m: Sequence[int], largest: float
) -> dict[str, list[object]]:
    cells = _cells(shapes, mine, near, largest)
    rows: dict[str, list[object]] = {"row": [], "buffer_m": [], "geometry": []}
    for index in mine:
        outline = shapes[index]
        others = shapely.union_all(shapes[near[index]]) if len(near[index]) else None
        for distance in buffers_m:
            if distance == 0:
                zone = outline
            elif distance < 0:
                zone = shapely.buffer(outline, distance)
            else:
                ring = shapely.buffer(outline, distance)
                if others is not None:
                    ring = shapely.difference(ring, others)
                    ring = shapely.intersection(ring, cells[index])
                zone = shapely.union(ring, outline) if others is not None else ring
            rows["row"].append(int(index))
            rows["buffer_m"].append(int(distance))
            rows["geometry"].append(_polygonal(zone))
    return rows


def _cells(shapes: np.ndarray, mine: np.ndarray, near: dict[int, np.ndarray], largest: float) -> dict[int, object]:
    """Voronoi cell of each glacier that has near neighbours, a cluster of touching glaciers at a time."""
    members = sorted({int(i) for i in mine if len(near[i])} | {int(j) for i in mine for j in near[i]})
    if not members:
        return {}
    position = {m: k for k, m in enumerate(members)}
    pairs = [(position[int(i)], position[int(j)]) for i in mine for j in near[i]]
    a, b = np.array(pairs).T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(members), len(members)))
    _, labels = connected_components(graph, directed=False)
    cells: dict[int, object] = {}
    for label in np.unique(labels):
        cluster = [members[k] for k in np.flatnonzero(labels == label)]
        cells |= _voronoi(shapes, cluster, largest)
    return cells


def _voronoi(shapes: np.ndarray, cluster: Sequence[int], largest: float) -> dict[int, object]:
    """Cells of the glaciers of one cluster from points along the parts of their outlines that face a neighbour.

    Points where two outlines meet would belong to both; a thin inner buffer keeps each glacier's points its own.
    """
    outlines = shapes[list(cluster)]
    inner = shapely.buffer(outlines, -0.5)
    inner = np.where(shapely.is_empty(inner), outlines, inner)
    edges = shapely.segmentize(shapely.boundary(inner), SPACING_M)
    points, owner = shapely.get_coordinates(edges, return_index=True)
    # Overlapping outlines would give points micrometres apart, whose cells can not be joined.
    points, first = np.unique(np.round(points * 4) / 4, axis=0, return_index=True)
    owner = owner[first]
    frame = shapely.buffer(shapely.box(*shapely.total_bounds(outlines)), 3 * largest + 100)
    polygons = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(points), extend_to=frame))
    tree = shapely.STRtree(polygons)
    of_point, of_cell = tree.query(shapely.points(points), predicate="intersects")
    cell_owner = np.full(len(polygons), -1)
    cell_owner[of_cell] = owner[of_point]
    return {k: _joined(polygons[cell_owner == i]) for i, k in enumerate(cluster)}


def _joined(polygons: np.ndarray) -> shapely.Geometry:
    """Union of Voronoi polygons; where their edges are not exactly noded, after widening them by a millimetre."""
    try:
        return shapely.union_all(polygons)
    except shapely.GEOSException:
        return shapely.union_all(shapely.buffer(polygons, 0.001, join_style="mitre"))


def _polygonal(shape: shapely.Geometry) -> shapely.Geometry:
    """Only the polygons of a geometry (lines and points are left over where shapes touch)."""
    if shape.geom_type in {"Polygon", "MultiPolygon"}:
        return shape
    parts = [p for p in shapely.get_parts(shape) if p.geom_type == "Polygon"]
    return shapely.MultiPolygon(parts)
