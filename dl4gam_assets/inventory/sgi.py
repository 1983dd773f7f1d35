"""The Swiss Glacier Inventory 2016 made into glaciers: ice bodies cut at the ice divides and labelled by
points.

Belongs here: everything that is particular to the published files of SGI2016
(doi:10.18750/inventory.sgi2016.r2020, Linsbauer et al. 2021, doi:10.3389/feart.2021.704189): their column
names, the cutting, the comparison with the official table of areas.
Does not belong here: reading of an inventory in our schema, zones, folds, imagery.

Why it is needed: the ice is distributed as connected bodies (here vectorized from the 20 m raster of surface
types), the divides as lines and the glaciers as points. All that touches is one body, the Aletsch massif for
example.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from dl4gam_assets.inventory.vector import read_vector
from dl4gam_assets.settings import SettingsError

log = logging.getLogger("dl4gam_assets")

#: Swiss LV95, the CRS of all SGI files; metres, equal-area enough for areas (scale error below 1e-4 in
#: Switzerland).
SWISS_CRS = "EPSG:2056"

BODIES = "sgi2016_ice_bodies_20m.gpkg"
DIVIDES = "sgi2016_icedivides.gpkg"
LOCATIONS = "sgi2016_locations.gpkg"
ATTRIBUTES = "sgi2016_attributes.csv"
FORMER = "sgi2010_outlines.gpkg"

#: Raised whenever the cutting changes its result, so that a file made before counts as stale.
METHOD_VERSION = 1

#: A divide's end farther from the margin than this is wrong data, not the stair of the 20 m raster.
EXTEND_M = 100.0
#: A location point this far outside the ice still names it (they stand at most 15 m outside the raster).
POINT_TOLERANCE_M = 40.0
#: A detached body this far from every glacier stays without a name.
DETACHED_M = 1000.0


@dataclass(frozen=True)
class _Faces:
    """Pieces of ice after cutting, and the row of the body that each comes from."""

    geometry: np.ndarray
    body: np.ndarray


def split_ice_bodies(
    bodies: gpd.GeoDataFrame,
    divides: gpd.GeoDataFrame,
    locations: gpd.GeoDataFrame,
    attributes: pd.DataFrame | None = None,
    former: gpd.GeoDataFrame | None = None,
    *,
    extend_m: float = EXTEND_M,
    point_tolerance_m: float = POINT_TOLERANCE_M,
    detached_m: float = DETACHED_M,
) -> gpd.GeoDataFrame:
    """Cut ice bodies at the ice divides into glaciers named by their location points.

    1. Every divide is led on at its loose ends to the nearest margin or other divide (at most ``extend_m``),
       because the bodies' margins are stairs of the raster; then the bodies are cut along all lines.
    2. A piece that holds a glacier's location point is that glacier's. Where a piece still holds several
       points (the 20 m raster has closed a rock rib, or a divide stops short), it is parted at the narrowest
       necks between them: each pixel goes to the point that it reaches by the widest path of ice, divides
       being no ice.
    3. A piece without a point that borders on glacier ``a`` across a divide between ``a`` and ``b`` is
       ``b``'s. Where the divides do not tell, it joins the named piece with which it shares the longest edge.
    4. A detached body without a point belongs to a glacier too (the official areas add up to all ice): to the
       one whose ``former`` outline covers most of it, otherwise to the nearest within ``detached_m``.
    5. What is left stays in the result with an empty ``glacier_id``, so that no area is lost.

    Parameters
    ----------
    bodies
        (Multi)polygons of ice, any projected CRS in metres.
    divides
        Lines, columns ``sgi-id_a`` and ``sgi-id_b``: the glaciers on both sides.
    locations
        Points, columns ``sgi-id`` and ``name``.
    attributes
        Optional table with ``sgi-id``, ``year_acq`` and ``area_km2``, joined to the result.
    former
        Optional older outlines with a column ``SGI`` (SGI2010), used in step 4.

    Returns
    -------
    GeoDataFrame in the CRS of ``bodies``, sorted by glacier_id: glacier_id (text; null for unnamed ice),
    name, year_acq, stated_area_km2 (null without ``attributes``), area_km2 (planimetric), pieces, geometry.

    Raises
    ------
    ValueError
        if a CRS is missing or geographic, a column is missing, or two points bear the same id.
    """
    _require(bodies, (), "ice bodies")
    _require(divides, ("sgi-id_a", "sgi-id_b"), "ice divides")
    _require(locations, ("sgi-id", "name"), "locations")
    if bodies.crs is None or not bodies.crs.is_projected:
        raise ValueError("ice bodies need a projected CRS in metres (SGI2016: EPSG:2056)")
    if locations["sgi-id"].duplicated().any():
        twice = sorted(locations.loc[locations["sgi-id"].duplicated(), "sgi-id"].astype(str))[:3]
        raise ValueError(f"locations: glacier ids occur twice: {twice}")
    divides, locations = divides.to_crs(bodies.crs), locations.to_crs(bodies.crs)

    lines = _extended(divides, bodies, extend_m)
    faces = _cut(bodies, lines)
    points = _points_of_faces(faces, locations, point_tolerance_m)
    faces, names = _separate(faces, points, lines)
    _across_divides(faces, names, lines)
    if former is not None:
        former = former.to_crs(bodies.crs)
    _detached(faces, names, former, set(locations["sgi-id"].astype(str)), detached_m)
    return _dissolved(faces, names, locations, attributes, bodies.crs)


# ---------------------------------------------------------------------------- steps
def _require(frame: gpd.GeoDataFrame, columns: Iterable[str], what: str) -> None:
    lacking = [c for c in columns if c not in frame.columns]
    if lacking:
        raise ValueError(f"{what}: columns {lacking} are missing; there are {list(frame.columns)}")
    if frame.crs is None:
        raise ValueError(f"{what}: no CRS in the file (SGI2016 is {SWISS_CRS})")


def _extended(divides: gpd.GeoDataFrame, bodies: gpd.GeoDataFrame, extend_m: float) -> gpd.GeoDataFrame:
    """The divides, each loose end led to the nearest margin or other divide; columns a, b, geometry."""
    lines = divides.explode(index_parts=False, ignore_index=True)
    # To the millimetre: an end that misses the margin by a rounding error would seem to touch it and not cut.
    lines.geometry = shapely.transform(lines.geometry.to_numpy(), lambda xy: np.round(xy, 3))
    geometry = lines.geometry.to_numpy()
    polygons = shapely.get_parts(bodies.geometry.to_numpy())
    margins = shapely.boundary(polygons)
    ice, margin_tree, line_tree = (
        shapely.STRtree(polygons),
        shapely.STRtree(margins),
        shapely.STRtree(geometry),
    )
    out, too_far = [], 0
    for i, line in enumerate(geometry):
        parts = [line]
        for end in (shapely.get_point(line, 0), shapely.get_point(line, -1)):
            if not len(ice.query(end, predicate="within")):
                continue  # The end lies on rock: the line has crossed the margin already.
            others = [j for j in line_tree.query(end, predicate="dwithin", distance=extend_m) if j != i]
            near = [margins[j] for j in margin_tree.query(end, predicate="dwithin", distance=extend_m)]
            near += [geometry[j] for j in others]
            if not near:
                too_far += 1
                continue
            parts.append(_link(end, near[int(np.argmin(shapely.distance(end, near)))]))
        out.append(shapely.union_all(parts))
    if too_far:
        log.warning(f"{too_far} ends of ice divides lie more than {extend_m:.0f} m from any margin; they may not cut")
    columns = {"a": lines["sgi-id_a"].to_numpy(), "b": lines["sgi-id_b"].to_numpy()}
    return gpd.GeoDataFrame(columns, geometry=out, crs=divides.crs)


def _link(end: BaseGeometry, target: BaseGeometry) -> BaseGeometry:
    """Segment from ``end`` to the nearest point of ``target``, 5 cm beyond it so that the two really
    cross."""
    x0, y0 = shapely.get_coordinates(end)[0]
    x1, y1 = shapely.get_coordinates(shapely.shortest_line(end, target))[-1]
    length = float(np.hypot(x1 - x0, y1 - y0))
    if length == 0:
        return end
    factor = (length + 0.05) / length
    return shapely.LineString([(x0, y0), (x0 + factor * (x1 - x0), y0 + factor * (y1 - y0))])


def _cut(bodies: gpd.GeoDataFrame, lines: gpd.GeoDataFrame) -> _Faces:
    polygons, body = shapely.get_parts(bodies.geometry.to_numpy(), return_index=True)
    cutters = defaultdict(list)
    for k, j in zip(*shapely.STRtree(lines.geometry.to_numpy()).query(polygons, predicate="intersects"), strict=True):
        cutters[k].append(lines.geometry.iloc[j])
    faces, owners = [], []
    for k, polygon in enumerate(polygons):
        pieces = [polygon]
        if k in cutters:
            net = shapely.union_all([polygon.boundary, *cutters[k]])
            shapely.prepare(polygon)
            found = shapely.get_parts(shapely.polygonize(shapely.get_parts(net)))
            pieces = [f for f in found if polygon.contains(shapely.point_on_surface(f))]
        faces += pieces
        owners += [body[k]] * len(pieces)
    return _Faces(np.array(faces, dtype=object), np.array(owners))


def _points_of_faces(
    faces: _Faces, locations: gpd.GeoDataFrame, tolerance_m: float
) -> dict[int, list[tuple[str, BaseGeometry]]]:
    """The location points of each face that has some."""
    found: dict[int, list[tuple[str, BaseGeometry]]] = defaultdict(list)
    tree = shapely.STRtree(faces.geometry)
    homeless = []
    for name, point in zip(locations["sgi-id"].astype(str), locations.geometry, strict=True):
        inside = tree.query(point, predicate="intersects")
        if len(inside):
            found[int(inside[0])].append((name, point))
        else:
            homeless.append((name, point))
    lost = []
    for name, point in homeless:
        near = [int(f) for f in tree.query(point, predicate="dwithin", distance=tolerance_m)]
        near = [f for f in near if f not in found] or near
        if near:
            found[near[int(np.argmin(shapely.distance(point, faces.geometry[near])))]].append((name, point))
        else:
            lost.append(name)
    if lost:
        log.warning(f"{len(lost)} location points stand on no ice: {lost[:10]}")
    return dict(found)


def _separate(
    faces: _Faces,
    points: dict[int, list[tuple[str, BaseGeometry]]],
    lines: gpd.GeoDataFrame,
    pixel_m: float = 10.0,
) -> tuple[_Faces, np.ndarray]:
    """Faces of one point at most, and their names (None where there is no point)."""
    tree = shapely.STRtree(lines.geometry.to_numpy())
    between = (lines["a"] != lines["b"]).to_numpy()
    geometry, body, names = [], [], []
    for f, (polygon, owner) in enumerate(zip(faces.geometry, faces.body, strict=True)):
        here = points.get(f, [])
        if len(here) < 2:
            pieces = [(polygon, here[0][0] if here else None)]
        else:
            near = [lines.geometry.iloc[j] for j in tree.query(polygon, predicate="intersects") if between[j]]
            pieces = _part_at_necks(polygon, here, near, pixel_m)
        geometry += [piece for piece, _ in pieces]
        names += [name for _, name in pieces]
        body += [owner] * len(pieces)
    return _Faces(np.array(geometry, dtype=object), np.array(body)), np.array(names, dtype=object)


def _part_at_necks(
    polygon: BaseGeometry, points: list[tuple[str, BaseGeometry]], divides: list[BaseGeometry], pixel_m: float
) -> list[tuple[BaseGeometry, str | None]]:
    """Part a polygon between points: a watershed of the distance to the margin, as a minimum spanning forest.

    The minimum spanning forest rooted in the points, with the negative distance to the margin as the height
    of each pixel, joins every pixel to the point that it reaches by the widest path (Cousty et al. 2009,
    doi:10.1109/TPAMI.2008.173).
    """
    from affine import Affine
    from rasterio.features import rasterize, shapes
    from scipy import ndimage
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

    west, south, east, north = polygon.bounds
    west, north = np.floor(west / pixel_m) * pixel_m - pixel_m, np.ceil(north / pixel_m) * pixel_m + pixel_m
    shape = (int(np.ceil((north - south) / pixel_m)) + 1, int(np.ceil((east - west) / pixel_m)) + 1)
    transform = Affine(pixel_m, 0, west, 0, -pixel_m, north)
    ice = rasterize([polygon], shape, transform=transform, dtype="uint8").astype(bool)
    open_ice = ice
    if divides:
        open_ice = ice & ~rasterize(divides, shape, transform=transform, all_touched=True, dtype="uint8").astype(bool)
    width = ndimage.distance_transform_edt(open_ice)

    index = np.full(shape, -1)
    index[open_ice] = np.arange(open_ice.sum())
    height = width.max() - width + 1.0
    ends, costs = [], []
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        both = open_ice[a] & open_ice[b]
        ends.append(np.stack([index[a][both], index[b][both]]))
        costs.append(np.maximum(height[a], height[b])[both])
    count, roots = int(open_ice.sum()), []
    for _, point in points:
        x, y = shapely.get_coordinates(point)[0]
        roots.append(index[_widest_near((y - north) / -pixel_m, (x - west) / pixel_m, width, round(100 / pixel_m))])
    root_ends = np.stack([np.array(roots), np.full(len(roots), count)])
    link = np.concatenate([*ends, root_ends], axis=1)
    cost = np.concatenate([*costs, np.full(len(roots), 1e-6)])
    forest = minimum_spanning_tree(coo_array((cost, (link[0], link[1])), shape=(count + 1, count + 1))).tocoo()
    keep = (forest.row != count) & (forest.col != count)
    graph = coo_array((np.ones(keep.sum()), (forest.row[keep], forest.col[keep])), shape=(count, count))
    component = connected_components(graph, directed=False)[1]
    label = np.zeros(shape, dtype="int32")
    number = np.zeros(component.max() + 1, dtype="int32")
    number[component[roots]] = np.arange(1, len(roots) + 1)
    label[open_ice] = number[component]
    # Divide pixels, and ice that divides shut off, go to the nearest part.
    nearest = ndimage.distance_transform_edt(label == 0, return_distances=False, return_indices=True)
    label = label[tuple(nearest)]

    out: list[tuple[BaseGeometry, str | None]] = []
    for outline, value in shapes(label, mask=ndimage.binary_dilation(ice, iterations=2), transform=transform):
        piece = shapely.intersection(polygon, shapely.geometry.shape(outline))
        out += [(p, points[int(value) - 1][0]) for p in shapely.get_parts(piece) if p.geom_type == "Polygon" and p.area]
    return out


def _widest_near(row: float, column: float, width: np.ndarray, reach: int) -> tuple[int, int]:
    """The pixel farthest from the margin within ``reach`` pixels and within the point's own ice, climbing
    from it."""
    from scipy import ndimage

    r = min(max(int(row), 0), width.shape[0] - 1)
    c = min(max(int(column), 0), width.shape[1] - 1)
    if width[r, c] == 0:
        near = ndimage.distance_transform_edt(width == 0, return_distances=False, return_indices=True)
        r, c = int(near[0, r, c]), int(near[1, r, c])
    start = (r, c)
    while True:
        top, left = max(r - 1, 0), max(c - 1, 0)
        window = width[top : r + 2, left : c + 2]
        dr, dc = np.unravel_index(int(window.argmax()), window.shape)
        if window[dr, dc] <= width[r, c] or np.hypot(top + dr - start[0], left + dc - start[1]) > reach:
            return r, c
        r, c = int(top + dr), int(left + dc)


def _across_divides(faces: _Faces, names: np.ndarray, lines: gpd.GeoDataFrame) -> None:
    """Name the remaining faces of bodies that have some name, from their neighbours (in place)."""
    edges = _edges(faces, lines)
    open_faces = {f for f in edges if names[f] is None}
    while open_faces:
        ballots: dict[int, dict[str, float]] = {f: defaultdict(float) for f in open_faces}
        plain: dict[int, dict[str, float]] = {f: defaultdict(float) for f in open_faces}
        for f in open_faces:
            for neighbour, length, sides in edges[f]:
                known = names[neighbour]
                if known is None:
                    continue
                if known in sides:
                    ballots[f][next(iter(sides - {known}), known)] += length
                plain[f][known] += length
        decided = {f: _most(votes) for f, votes in ballots.items() if votes}
        if not decided:
            told = {f: votes for f, votes in plain.items() if votes}
            if not told:
                return
            first = max(told, key=lambda f: max(told[f].values()))
            decided = {first: _most(told[first])}
        for f, name in decided.items():
            names[f] = name
        open_faces -= set(decided)


def _most(votes: dict[str, float]) -> str:
    return max(sorted(votes), key=lambda name: votes[name])


def _edges(faces: _Faces, lines: gpd.GeoDataFrame) -> dict[int, list[tuple[int, float, frozenset[str]]]]:
    """Neighbours of each face in its body: (face, shared length in m, ids of the divide between them)."""
    geometry = faces.geometry
    several = np.bincount(faces.body)[faces.body] > 1
    index = np.flatnonzero(several)
    left, right = shapely.STRtree(geometry[index]).query(geometry[index], predicate="intersects")
    left, right = index[left], index[right]
    keep = (left < right) & (faces.body[left] == faces.body[right])
    left, right = left[keep], right[keep]
    shared = shapely.intersection(shapely.boundary(geometry[left]), shapely.boundary(geometry[right]))
    length = shapely.length(shared)
    tree = shapely.STRtree(lines.geometry.to_numpy())
    sides = list(zip(lines["a"], lines["b"], strict=True))
    edges: dict[int, list[tuple[int, float, frozenset[str]]]] = {int(f): [] for f in index}
    for f, g, edge, metres in zip(left, right, shared, length, strict=True):
        between: frozenset[str] = frozenset()
        if metres > 0:
            near = tree.query(edge, predicate="dwithin", distance=0.01)
            zone = shapely.buffer(edge, 0.01)
            along = {j: shapely.length(shapely.intersection(lines.geometry.iloc[j], zone)) for j in near}
            if along:
                between = frozenset(map(str, sides[max(along, key=lambda j: along[j])]))
        # Pieces that touch in a corner only (diagonal neighbours of the raster) count as joined by 1 mm.
        edges[int(f)].append((int(g), max(float(metres), 1e-3), between))
        edges[int(g)].append((int(f), max(float(metres), 1e-3), between))
    return edges


def _detached(
    faces: _Faces, names: np.ndarray, former: gpd.GeoDataFrame | None, known: set[str], reach_m: float
) -> None:
    """Name faces of bodies without any location point (in place)."""
    rest = np.flatnonzero([name is None for name in names])
    if not len(rest):
        return
    named = np.flatnonzero([name is not None for name in names])
    tree = shapely.STRtree(faces.geometry[named])
    found: dict[int, str] = {}
    if former is not None:
        old = former[former["SGI"].isin(known)]
        old_geometry, old_ids = shapely.make_valid(old.geometry.to_numpy()), old["SGI"].to_numpy()
        cover: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        pairs = shapely.STRtree(old_geometry).query(faces.geometry[rest], predicate="intersects")
        overlap = shapely.area(shapely.intersection(faces.geometry[rest[pairs[0]]], old_geometry[pairs[1]]))
        for f, j, area in zip(rest[pairs[0]], pairs[1], overlap, strict=True):
            cover[int(f)][old_ids[j]] += float(area)
        found = {f: _most(votes) for f, votes in cover.items() if max(votes.values()) > 0}
    for f in rest:
        if f in found:
            continue
        near = tree.query_nearest(faces.geometry[f], max_distance=reach_m)
        if len(near):
            found[int(f)] = names[named[near[0]]]
    for f, name in found.items():
        names[f] = name


def _dissolved(
    faces: _Faces, names: np.ndarray, locations: gpd.GeoDataFrame, attributes: pd.DataFrame | None, crs: Any
) -> gpd.GeoDataFrame:
    groups: dict[tuple[str | None, int], list[int]] = defaultdict(list)
    for f, name in enumerate(names):
        groups[(name, -1 if name is not None else int(faces.body[f]))].append(f)
    rows = [
        {
            "glacier_id": name,
            "pieces": len(members),
            "geometry": shapely.union_all(faces.geometry[members]),
        }
        for (name, _), members in groups.items()
    ]
    out = gpd.GeoDataFrame(rows, geometry="geometry", crs=crs)
    out["area_km2"] = out.geometry.area / 1e6
    labels = dict(zip(locations["sgi-id"].astype(str), locations["name"], strict=True))
    out["name"] = out["glacier_id"].map(labels)
    if attributes is not None:
        table = attributes.drop_duplicates("sgi-id").set_index("sgi-id")
        out["year_acq"] = out["glacier_id"].map(table["year_acq"]).astype("Int64")
        out["stated_area_km2"] = out["glacier_id"].map(table["area_km2"]).astype(float)
    else:
        out["year_acq"] = pd.array([pd.NA] * len(out), dtype="Int64")
        out["stated_area_km2"] = np.nan
    columns = ["glacier_id", "name", "year_acq", "stated_area_km2", "area_km2", "pieces", "geometry"]
    return out[columns].sort_values("glacier_id", na_position="last", ignore_index=True)


# ---------------------------------------------------------------------------- from files to a file
def write_swiss_inventory(folder: Path, out: Path) -> dict[str, Any]:
    """Make the glaciers of SGI2016 from its raw files and write them as a GeoPackage in our inventory's
    columns.

    Layer ``glaciers`` (EPSG:2056): glacier_id, name, country ``CH``, date (year of the aerial image),
    stated_area_km2 (official), area_km2, pieces, geometry. Ice that could not be named is the layer
    ``unnamed_ice``. The file appears under its name only when it is complete.

    Parameters
    ----------
    folder
        Folder with the files ``sgi2016_ice_bodies_20m.gpkg``, ``sgi2016_icedivides.gpkg``,
        ``sgi2016_locations.gpkg`` and ``sgi2016_attributes.csv``; ``sgi2010_outlines.gpkg`` is used where
        present.

    Returns
    -------
    The figures of :func:`compare_with_official`.

    Raises
    ------
    FileNotFoundError
        naming the raw file that is missing.
    SettingsError
        naming one that can not be read.
    """
    _check_files(folder)
    glaciers = split_ice_bodies(*read_raw(folder))
    unnamed = glaciers["glacier_id"].isna()
    named = glaciers[~unnamed].rename(columns={"year_acq": "date"})
    named.insert(2, "country", "CH")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}")
    temporary.unlink(missing_ok=True)
    try:
        named.to_file(temporary, layer="glaciers", driver="GPKG")
        if unnamed.any():
            glaciers.loc[unnamed, ["area_km2", "pieces", "geometry"]].to_file(
                temporary, layer="unnamed_ice", driver="GPKG"
            )
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return compare_with_official(glaciers)


def read_raw(folder: Path) -> tuple[gpd.GeoDataFrame, gpd.GeoDataFrame, gpd.GeoDataFrame, pd.DataFrame, Any]:
    """The raw files: ice bodies, divides, locations, attributes, and the outlines of 2010 where they are (or None).

    Raises
    ------
    SettingsError
        naming the file that can not be read.
    """
    frames: list[Any] = []
    for name in (BODIES, DIVIDES, LOCATIONS, ATTRIBUTES, FORMER):
        path = folder / name
        if name == FORMER and not path.is_file():
            frames.append(None)
            continue
        try:
            frames.append(pd.read_csv(path) if path.suffix == ".csv" else read_vector(path))
        except Exception as error:  # pandas, GDAL and shapely each have their own
            raise SettingsError(f"{path} can not be read: {' '.join(str(error).split())[:300]}") from error
    bodies, divides, locations, attributes, former = frames
    return bodies, divides, locations, attributes, former


def _check_files(folder: Path) -> None:
    for name in (BODIES, DIVIDES, LOCATIONS, ATTRIBUTES):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: put the SGI2016 files (see docs/real-data.md) there")


def source_hash(folder: Path) -> str:
    """SHA-256 over the content of the raw files that :func:`write_swiss_inventory` reads."""
    _check_files(folder)
    digest = hashlib.sha256()
    for name in (BODIES, DIVIDES, LOCATIONS, ATTRIBUTES, FORMER):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def compare_with_official(glaciers: gpd.GeoDataFrame, min_area_km2: float = 0.1) -> dict[str, Any]:
    """Areas of :func:`split_ice_bodies` against the official table, glacier by glacier.

    Relative differences are ours / official - 1, over glaciers of at least ``min_area_km2`` (official) for
    the shares.
    """
    named = glaciers[glaciers["glacier_id"].notna() & glaciers["stated_area_km2"].notna()]
    large = named[named["stated_area_km2"] >= min_area_km2]
    difference = (large["area_km2"] / large["stated_area_km2"] - 1).abs()
    worst = difference.sort_values(ascending=False).head(5)
    return {
        "n_glaciers": len(named),
        "area_km2": float(named["area_km2"].sum()),
        "official_area_km2": float(named["stated_area_km2"].sum()),
        "unnamed_km2": float(glaciers.loc[glaciers["glacier_id"].isna(), "area_km2"].sum()),
        "n_compared": len(large),
        "median_difference": float(difference.median()),
        "share_within_5_percent": float((difference < 0.05).mean()),
        "share_within_10_percent": float((difference < 0.10).mean()),
        "worst": {str(large.loc[i, "glacier_id"]): round(float(v), 3) for i, v in worst.items()},
    }
