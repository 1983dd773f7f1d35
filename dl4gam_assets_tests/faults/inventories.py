"""Bad inventories: outlines, ids, names, dates and files that are not what they should be.

Belongs here: damaged rows beside whole ones, and damaged files; what becomes of both.
Does not belong here: images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import yaml
from shapely.affinity import translate

from dl4gam_assets.compute import Mapper
from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import inventory
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage, safe_name
from dl4gam_assets_tests.faults.table import Bench, Outcome, fault

LON, LAT = 12.0, 46.9  # far from the simulated glaciers, so that nobody's zones change


def square(number: int = 0, size: float = 0.01, lon: float = LON, lat: float = LAT) -> shapely.Polygon:
    west = lon + 0.05 * number
    return shapely.box(west, lat, west + size, lat + size)


def _bow_tie(n: int) -> Any:
    x = LON + 0.05 * n
    return shapely.Polygon([(x, LAT), (x + 0.02, LAT + 0.02), (x + 0.02, LAT), (x, LAT + 0.02)])


def _self_touching(n: int) -> Any:
    """A hole that touches the edge in one point, drawn as one ring."""
    x = LON + 0.05 * n
    ring = [(0, 0), (2, 0), (2, 2), (1, 2), (1.5, 1), (0.5, 1), (1, 2), (0, 2), (0, 0)]
    return shapely.Polygon([(x + 0.01 * a, LAT + 0.01 * b) for a, b in ring])


def _with_hole(n: int) -> Any:
    return square(n, 0.02).difference(shapely.box(*square(n, 0.02).buffer(-0.005).bounds))


def _many_vertices(n: int) -> Any:
    angle = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    radius = 0.01 * (1 + 0.02 * np.sin(200 * angle))
    centre = square(n).centroid
    return shapely.Polygon(np.column_stack([centre.x + radius * np.cos(angle), centre.y + radius * np.sin(angle)]))


#: Name -> the row (id, geometry, other columns), and the words of its failure; None: it is a glacier like any other.
ROWS: dict[str, tuple[str | None, Callable[[int], Any], dict[str, Any], tuple[str, ...] | None]] = {
    "null geometry": ("null", lambda n: None, {}, ("empty",)),
    "empty geometry": ("empty", lambda n: shapely.Polygon(), {}, ("empty",)),
    "a line": ("line", lambda n: shapely.LineString([(LON, LAT), (LON + 1, LAT)]), {}, ("LineString", "polygon")),
    "a point": ("point", lambda n: shapely.Point(LON, LAT), {}, ("Point", "polygon")),
    "an outline without area": ("flat", lambda n: shapely.Polygon([(12, 46), (12.1, 46), (12.2, 46), (12, 46)]), {},
                                ("area",)),
    "coordinates in metres": ("metres", lambda n: shapely.box(6e5, 5e6, 6.1e5, 5.1e6), {}, ("outside", "CRS")),
    "no id": (None, square, {}, ("no id",)),
    "a repeated id": ("SYN-01.00001", square, {}, ("occurs again",)),
    "an id of 10 MB": ("x" * 10_000_000, square, {}, ("characters",)),
    "an id that is too long as a file": ("\u96ea" * 100, square, {}, ("characters",)),
    "a bow tie": ("bow tie", _bow_tie, {}, None),
    "a ring that touches itself": ("touching", _self_touching, {}, None),
    "a hole": ("hole", _with_hole, {}, None),
    "a million vertices": ("vertices", _many_vertices, {}, None),
    "an id with slashes": ("a/b\\c", square, {}, None),
    "an id that leads elsewhere": ("../../../etc/passwd", square, {}, None),
    "an id of two dots": ("..", square, {}, None),
    "an id with quotes": ("o'\"; drop table glaciers; --", square, {}, None),
    "an id with a newline": ("two\nlines", square, {}, None),
    "an id with markup": ("<script>alert(1)</script>", square, {}, None),
    "a name of 10 MB": ("long name", square, {"name": "N" * 10_000_000}, None),
    "a date with 99 months": ("date 99", square, {"date": "20159999"}, None),
    "a date of no calendar": ("date none", square, {"date": "20151341"}, None),
    "the year 0": ("date 0", square, {"date": "0000"}, None),
    "a date of -9999999": ("date -9", square, {"date": "-9999999"}, None),
}  # fmt: skip


def _region(bench: Bench, frame: gpd.GeoDataFrame | None, **changes: Any) -> Workspace:
    """A region whose inventory is ``frame``, and an empty store."""
    source = Path(str(bench.small.storage.inputs()))
    data = bench.folder / "data"
    data.mkdir(exist_ok=True)
    raw = yaml.safe_load(bench.small.yaml.read_text())
    raw |= {"simulation": None, "data_root": str(data)}
    raw["inventory"] |= {"path": "inventory.parquet", "debris": [], "transfer": None} | changes
    raw["inventory"] = {k: v for k, v in raw["inventory"].items() if k != "transfer"}
    if frame is not None:
        frame.to_parquet(data / "inventory.parquet")
    path = bench.folder / "region.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert source.exists()
    return Workspace(load_region(path), Storage(bench.folder / "store"), Mapper(1))


def _inventory(bench: Bench) -> gpd.GeoDataFrame:
    return gpd.read_file(Path(str(bench.small.storage.inputs())) / "inventory.gpkg")


def _said(work: Callable[[], Any]) -> str:
    """The error of some work, in the words that a user sees."""
    try:
        work()
    except Exception as error:
        return " ".join(str(error).split())
    return ""


@fault("bad inventories", "bad rows beside whole ones")
def bad_rows(bench: Bench) -> dict[str, Outcome]:
    """All at once: each has its failure, or is a glacier; and the whole rows are what they are without them."""
    whole = _inventory(bench)
    columns = bench.small.region.inventory.columns
    extra = []
    for number, (glacier_id, shape, others, _) in enumerate(ROWS.values()):
        row = {columns.glacier_id: glacier_id, "geometry": shape(number)}
        names = {"name": columns.name, "date": columns.date}
        extra.append(row | {names[k]: v for k, v in others.items() if names[k]})
    frame = pd.concat([whole.astype({columns.date: "string"}), gpd.GeoDataFrame(extra, crs=whole.crs)])
    begin = time.monotonic()
    ws = _region(bench, gpd.GeoDataFrame(frame, crs=whole.crs))
    for stage in (inventory.inventory_outlines, inventory.glacier_zones, inventory.cross_validation_folds):
        stage(ws)
    seconds = time.monotonic() - begin
    glaciers = ws.storage.read_table("glaciers").set_index("glacier_id")
    failures = ws.storage.read_table("failures").set_index("glacier_id")
    zones = ws.storage.read_table("zones")
    truth = bench.small.storage.read_table("glaciers").set_index("glacier_id")
    differing = [
        g for g in truth.index
        if g not in glaciers.index or not glaciers.loc[g, "geometry"].equals(truth.loc[g, "geometry"])
        or glaciers.loc[g, "inventory_area_km2"] != truth.loc[g, "inventory_area_km2"]
    ]  # fmt: skip
    outside = [p for p in bench.folder.parent.rglob("passwd*")]
    outcomes = {}
    for number, (label, (glacier_id, shape, _, words)) in enumerate(ROWS.items()):
        key = glacier_id if glacier_id is not None else f"row {len(whole) + number + 1}"
        if words is not None:
            found = [str(e) for g, e in failures["error"].items() if str(g)[:30] == str(key)[:30]]
            outcome = Outcome(found[0] if found else "")
            outcome.names(*words)
            outcome.expect(key == "SYN-01.00001" or key not in glaciers.index, "is a glacier all the same")
        else:
            outcome = Outcome("taken")
            outcome.expect(key in glaciers.index, "is no glacier")
            outcome.expect(key in set(zones["glacier_id"]), "has no zones")
            if key in glaciers.index:
                mine = glaciers.loc[key]
                made = shapely.make_valid(shape(number))
                outcome.expect(mine["geometry"].is_valid, "an invalid outline")
                outcome.expect(abs(mine["geometry"].area / made.area - 1) < 1e-6, "another area")
                outcome.expect(len(str(mine["name"])) < 1000, "a name of megabytes goes on")
                cube = ws.storage.cube(2015, str(key))
                outcome.expect(cube.parent == ws.storage.path("cubes", "year=2015"), f"its cube would lie in {cube}")
                outcome.expect("/" not in safe_name(str(key)) and "\n" not in safe_name(str(key)), "an unsafe name")
        outcome.expect(not differing, f"changes {differing}")
        outcome.expect(not outside, f"wrote {outside}")
        outcome.expect(seconds < 60, f"took {seconds:.0f} s")
        outcomes[label] = outcome
    return outcomes


def _whole_file(name: str, *words: str) -> Callable[[Callable[[Bench, gpd.GeoDataFrame], Any]], Any]:
    """Register a fault of the whole file: a clear error, failures where rows were looked at, and nothing written."""

    def register(make: Callable[[Bench, gpd.GeoDataFrame], Workspace]) -> Any:
        def attempt(bench: Bench) -> Outcome:
            ws = make(bench, _inventory(bench))
            outcome = Outcome(_said(lambda: (inventory.inventory_outlines(ws), inventory.cross_validation_folds(ws))))
            outcome.names(*words)
            outcome.expect(ws.storage.read_state("cross_validation_folds") is None, "folds were recorded")
            return outcome

        fault("bad inventories", name)(attempt)
        return make

    return register


@_whole_file("no CRS", "inventory.parquet", "coordinate reference system")
def _no_crs(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    return _region(bench, whole.set_crs(None, allow_override=True))


@_whole_file("no id column", "inventory.parquet", "inventory.columns.glacier_id")
def _no_id(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    return _region(bench, whole.drop(columns=bench.small.region.inventory.columns.glacier_id))


@_whole_file("no row", "inventory.parquet", "no usable outline")
def _no_row(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    return _region(bench, whole.iloc[:0])


@_whole_file("only lines", "inventory.parquet", "no usable outline", "failures")
def _only_lines(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    return _region(bench, whole.set_geometry(whole.geometry.boundary))


@fault("bad inventories", "only lines, each told")
def _lines_told(bench: Bench) -> Outcome:
    whole = _inventory(bench)
    ws = _region(bench, whole.set_geometry(whole.geometry.boundary))
    _said(lambda: inventory.inventory_outlines(ws))
    rows = ws.storage.read_table("failures")
    outcome = Outcome(str(rows["error"].iloc[0]) if len(rows) else "")
    outcome.names("LineString", "polygon")
    outcome.expect(len(rows) == len(whole), f"{len(rows)} of {len(whole)} rows are told")
    return outcome


@_whole_file("the file is no vector file", "inventory.parquet", "can not be read")
def _no_vector(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    ws = _region(bench, whole)
    (bench.folder / "data" / "inventory.parquet").write_bytes(b"PAR1 and nothing else")
    return ws


@_whole_file("the file is gone", "inventory.parquet", "does not exist")
def _gone(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    return _region(bench, None)


@_whole_file("no glacier above the threshold", "min_area_km2", "inventory.parquet")
def _all_small(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    return _region(bench, whole, min_area_km2=1000.0)


@_whole_file("one glacier only", "folds.n", "1 glacier")
def _one(bench: Bench, whole: gpd.GeoDataFrame) -> Workspace:
    largest = whole.to_crs(3035).area.idxmax()
    return _region(bench, whole.loc[[largest]])


@fault("bad inventories", "across UTM zones and the antimeridian")
def elsewhere(bench: Bench) -> Outcome:
    """Moved onto the border of two zones and onto 180 degrees: same areas, zones, folds; one side cut at 180."""
    whole = _inventory(bench).to_crs(4326)
    outcome = Outcome("taken")
    centre = shapely.union_all(whole.geometry.to_numpy()).centroid
    for lon in (12.0, 180.0):
        moved = whole.copy()
        shapes = []
        for shape in whole.geometry:
            there = translate(shape, lon - centre.x)
            east = shapely.intersection(there, shapely.box(-180, -90, 180, 90))
            west = translate(shapely.intersection(there, shapely.box(180, -90, 540, 90)), -360)
            shapes.append(shapely.union_all([east, west]))
        moved = moved.set_geometry(gpd.GeoSeries(shapes, index=whole.index, crs=4326))
        (bench.folder / str(lon)).mkdir()
        ws = _region(Bench(bench.small, bench.folder / str(lon)), moved)
        for stage in (inventory.inventory_outlines, inventory.glacier_zones, inventory.cross_validation_folds):
            stage(ws)
        mine = ws.storage.read_table("glaciers").set_index("glacier_id")["inventory_area_km2"]
        truth = bench.small.storage.read_table("glaciers").set_index("glacier_id")["inventory_area_km2"]
        zones = ws.storage.read_table("zones")
        outcome.expect(len(mine) == len(truth), f"{len(mine)} of {len(truth)} glaciers at {lon}")
        outcome.expect(bool(((mine / truth - 1).abs() < 2e-3).all()), f"other areas at {lon}")
        outcome.expect(set(zones["glacier_id"]) == set(mine.index), f"zones are missing at {lon}")
        outcome.expect(not len(ws.storage.read_table("failures")), f"failures at {lon}")
    return outcome
