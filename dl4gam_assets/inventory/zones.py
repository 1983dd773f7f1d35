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
#: An outline of more vertices is thinned by at most so many metres before it is buffered.
MANY_VERTICES, THIN_M = 100_000, 0.5


def glacier_zones(glaciers: gpd.GeoDataFrame, buffers_m: Sequence[int]) -> gpd.GeoDataFrame:
    """Outline and its surroundings up to each distance, cut halfway to the neighbours.

    For a positive distance the zone is the outline buffered by it, without the other outlines, and without what is
    nearer to another glacier: a Voronoi partition of each cluster of glaciers whose largest buffers touch (as the
    modular DL4GAM code does). For zero it is the outline, for a negative distance its inner part. The line halfway
    between two glaciers is found from points along the outlines, so it is right to about a metre in the open and to
    half of ``SPACING_M`` where outlines touch.

    A cluster is worked on in one CRS, the UTM zone that holds most of its area, so neighbours on both sides of a zone's
    border are cut along the same line. Outlines on both sides of the antimeridian are not seen as neighbours.

    Parameters
    ----------
    glaciers : the table ``glaciers`` (EPSG:4326)
    buffers_m : distances in metres

    Returns
    -------
    GeoDataFrame, EPSG:4326
        The table ``zones``, one row for each glacier and distance. Zones of different glaciers do not overlap, apart
        from the rounding of coordinates and from what their outlines themselves share. An inner zone may be empty.
    """
    if not len(glaciers):
        return TABLES["zones"].empty()
    glaciers = glaciers.reset_index(drop=True)
    largest = float(max([b for b in buffers_m if b > 0], default=0))
    reach = largest + _slack(largest)
    pairs = _neighbours(glaciers, 2.0 * reach) if largest else np.empty((0, 2), dtype=int)
    code_of = _metric_crs(glaciers, pairs)
    frames = []
    for code in np.unique(code_of):
        mine = np.flatnonzero(code_of == code)
        shapes = _valid(glaciers.geometry.iloc[mine].to_crs(int(code)).to_numpy())
        local = np.full(len(glaciers), -1)
        local[mine] = np.arange(len(mine))
        zones = _zones_of(shapes, local[pairs[code_of[pairs[:, 0]] == code]], buffers_m, largest)
        for buffer_m, geometry in zones.items():
            part = gpd.GeoDataFrame({"row": mine, "buffer_m": buffer_m}, geometry=geometry, crs=int(code))
            frames.append(part.to_crs("EPSG:4326"))
    out = gpd.GeoDataFrame(pd.concat(frames, ignore_index=True), geometry="geometry", crs="EPSG:4326")
    out["glacier_id"] = glaciers["glacier_id"].to_numpy()[out.pop("row").to_numpy()]
    return TABLES["zones"].conform(out.sort_values(["glacier_id", "buffer_m"]).reset_index(drop=True))


def _slack(largest: float) -> float:
    """How much farther than ``largest`` a point may lie from the sampled outline than from the outline itself."""
    return float(np.hypot(largest, SPACING_M / 2.0) - largest) + 1.5


def _neighbours(glaciers: gpd.GeoDataFrame, distance_m: float) -> np.ndarray:
    """Pairs of rows (n, 2), each once in both directions, whose outlines are at most ``distance_m`` apart."""
    west, south, east, north = shapely.bounds(glaciers.geometry.to_numpy()).T
    high = np.deg2rad(np.minimum(np.maximum(np.abs(south), np.abs(north)), 89.0))
    dy = distance_m / 110_000.0
    dx = dy / np.cos(high)
    boxes = shapely.box(west - dx, south - dy, east + dx, north + dy)
    tree = shapely.STRtree(boxes)
    epsg = glaciers["utm_epsg"].to_numpy(dtype=int)
    found = []
    for code in np.unique(epsg):
        mine = np.flatnonzero(epsg == code)
        around = np.unique(tree.query(boxes[mine])[1])
        shapes = glaciers.geometry.iloc[around].to_crs(int(code)).to_numpy()
        own = np.flatnonzero(epsg[around] == code)
        left, right = shapely.STRtree(shapes).query(shapes[own], predicate="dwithin", distance=distance_m)
        found.append(np.column_stack([around[own[left]], around[right]]))
    pairs = np.vstack(found)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(np.vstack([pairs, pairs[:, ::-1]]), axis=0)


def _metric_crs(glaciers: gpd.GeoDataFrame, pairs: np.ndarray) -> np.ndarray:
    """EPSG code for each glacier: the UTM zone of most of the area of its cluster of neighbours."""
    count = len(glaciers)
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, cluster = connected_components(links, directed=False)
    frame = pd.DataFrame(
        {
            "cluster": cluster,
            "epsg": glaciers["utm_epsg"].to_numpy(dtype=int),
            "area": glaciers["inventory_area_km2"].to_numpy(dtype=float),
        }
    )
    area = frame.groupby(["cluster", "epsg"], as_index=False)["area"].sum()
    most = area.sort_values(["cluster", "area", "epsg"]).drop_duplicates("cluster", keep="last")
    codes: np.ndarray = most.set_index("cluster")["epsg"].loc[cluster].to_numpy()
    return codes


def _zones_of(
    shapes: np.ndarray, pairs: np.ndarray, buffers_m: Sequence[int], largest: float
) -> dict[int, list[shapely.Geometry]]:
    """Zones of outlines in metres: for each distance a list in the order of ``shapes``."""
    crowded = np.unique(pairs[:, 0])
    light = _lighter(shapes)
    lost: dict[int, shapely.Geometry] = {}
    if len(crowded):
        claims = _claims(shapes, pairs, largest)
        near = np.split(pairs[:, 1], np.flatnonzero(np.diff(pairs[:, 0])) + 1)
        for index, others in zip(crowded, near, strict=True):
            lost[int(index)] = _union(np.concatenate([shapes[others], [claims[int(o)] for o in others]]))
    taken = np.array([lost[int(i)] for i in crowded], dtype=object)
    zones: dict[int, list[shapely.Geometry]] = {}
    for buffer_m in buffers_m:
        zone = shapes.copy() if buffer_m == 0 else shapely.buffer(light, float(buffer_m))
        if buffer_m > 0 and len(crowded):
            zone[crowded] = shapely.union(shapely.difference(zone[crowded], taken), shapes[crowded])
        zones[int(buffer_m)] = [_polygonal(z) for z in zone]
    return zones


def _lighter(shapes: np.ndarray) -> np.ndarray:
    """Outlines for buffering: those of very many vertices are thinned by at most THIN_M, far below a pixel.

    The time of a buffer grows faster than the number of vertices: a million take 11 s. The largest outline of the Swiss
    inventory has 29,000.
    """
    many = shapely.get_num_coordinates(shapes) > MANY_VERTICES
    if not many.any():
        return shapes
    out = shapes.copy()
    out[many] = shapely.simplify(shapes[many], THIN_M)
    return out


def _claims(shapes: np.ndarray, pairs: np.ndarray, largest: float) -> dict[int, shapely.Geometry]:
    """For each outline with neighbours: the ground within ``largest`` that is nearer to it than to another.

    Only right where buffers meet, which is all that is asked for: of an outline only the stretch that lies near a
    neighbour enters the Voronoi diagram.
    """
    count = len(shapes)
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, label = connected_components(links, directed=False)
    crowded = np.unique(pairs[:, 0])
    reach = largest + _slack(largest)
    claims: dict[int, shapely.Geometry] = {}
    for cluster in np.split(crowded[order := np.argsort(label[crowded], kind="stable")],
                            np.flatnonzero(np.diff(label[crowded][order])) + 1):  # fmt: skip
        cells = _voronoi(shapes[cluster], 2.0 * reach + SPACING_M, 3.0 * reach + 100.0)
        within = shapely.buffer(_lighter(shapes[cluster]), reach)
        for index, cell, ground in zip(cluster, cells, within, strict=True):
            claims[int(index)] = shapely.intersection(cell, ground)
    return claims


def _voronoi(outlines: np.ndarray, near_m: float, frame_m: float) -> list[shapely.Geometry]:
    """Voronoi cells of outlines, from points along the stretches at most ``near_m`` from another outline.

    Points where two outlines meet would belong to both; a thin inner buffer keeps each glacier's points its own.
    """
    inner = shapely.buffer(outlines, -0.5)
    inner = np.where(shapely.is_empty(inner), outlines, inner)
    edges = shapely.segmentize(shapely.boundary(inner), SPACING_M)
    points, owner = shapely.get_coordinates(edges, return_index=True)
    of_outline, of_point = shapely.STRtree(shapely.points(points)).query(outlines, predicate="dwithin", distance=near_m)
    keep = np.unique(of_point[of_outline != owner[of_point]])
    points, owner = points[keep], owner[keep]
    # Overlapping outlines would give points micrometres apart, whose cells can not be joined.
    points, first = np.unique(np.round(points * 4) / 4, axis=0, return_index=True)
    owner = owner[first]
    frame = shapely.buffer(shapely.box(*shapely.total_bounds(outlines)), frame_m)
    polygons = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(points), extend_to=frame))
    of_site, of_cell = shapely.STRtree(polygons).query(shapely.points(points), predicate="intersects")
    cell_owner = np.full(len(polygons), -1)
    cell_owner[of_cell] = owner[of_site]
    return [_union(polygons[cell_owner == k]) for k in range(len(outlines))]


def _union(polygons: np.ndarray) -> shapely.Geometry:
    """Union of polygons; where their edges are not exactly noded, after widening them by a millimetre."""
    try:
        return shapely.union_all(polygons)
    except shapely.GEOSException:
        return shapely.union_all(shapely.buffer(polygons, 0.001, join_style="mitre"))


def _valid(shapes: np.ndarray) -> np.ndarray:
    """Outlines that a change of CRS made cross themselves (at cusps, by rounding) are repaired."""
    shapes = shapes.copy()
    for k in np.flatnonzero(~shapely.is_valid(shapes)):
        shapes[k] = _polygonal(shapely.make_valid(shapes[k]))
    return shapes


def _polygonal(shape: shapely.Geometry) -> shapely.Geometry:
    """Only the polygons of a geometry (lines and points are left over where shapes touch)."""
    if shape.geom_type in {"Polygon", "MultiPolygon"}:
        return shape
    parts = [p for p in shapely.get_parts(shapely.get_parts(shape)) if p.geom_type == "Polygon"]
    return shapely.MultiPolygon(parts)
