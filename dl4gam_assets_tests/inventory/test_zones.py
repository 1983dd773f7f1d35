"""Zones around outlines: they never overlap, are cut halfway, and reach as far as they say."""

from __future__ import annotations

import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dl4gam_assets.inventory import glacier_zones, read_inventory, utm_epsg_of
from dl4gam_assets.settings import InventoryColumns, InventorySettings

BUFFERS = [-20, -10, 0, 10, 20, 50]
UTM = 32632
X0, Y0 = 600_000.0, 5_150_000.0


def table(shapes: list[shapely.Geometry], crs: int = UTM) -> gpd.GeoDataFrame:
    """Rows that zones are made from, from outlines in metres."""
    frame = gpd.GeoDataFrame(
        {
            "glacier_id": [f"G{i}" for i in range(len(shapes))],
            "inventory_area_km2": [s.area / 1e6 for s in shapes],
        },
        geometry=shapes,
        crs=crs,
    ).to_crs("EPSG:4326")
    points = frame.geometry.representative_point()
    frame["utm_epsg"] = [utm_epsg_of(p.x, p.y) for p in points]
    return frame


def metric(zones: gpd.GeoDataFrame, buffer_m: int, crs: int = UTM) -> np.ndarray:
    """Zones of one distance in metres, in the order of the ids."""
    found: np.ndarray = zones[zones["buffer_m"] == buffer_m].to_crs(crs).geometry.make_valid().to_numpy()
    return found


def overlaps(zones: np.ndarray) -> float:
    """Largest area (m2) that two zones share."""
    left, right = shapely.STRtree(zones).query(zones, predicate="intersects")
    pairs = left < right
    shared = shapely.area(shapely.intersection(zones[left[pairs]], zones[right[pairs]]))
    return float(shared.max(initial=0.0))


def blob(x: float, y: float, radius: float, wobble: int) -> shapely.Polygon:
    """A star-shaped outline."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    r = radius * (1 + 0.3 * np.sin(wobble * angle))
    return shapely.Polygon(np.column_stack([X0 + x + r * np.cos(angle), Y0 + y + r * np.sin(angle)]))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(30, 250), st.integers(0, 5)),
        min_size=1, max_size=7,
    )
)  # fmt: skip
def test_zones_of_neighbours_never_overlap(seeds: list[tuple[int, int, int, int]]) -> None:
    shapes: list[shapely.Geometry] = []
    for seed in seeds:  # outlines of an inventory share borders, not ground
        rest = blob(*seed)
        for other in shapes:
            rest = shapely.difference(rest, other)
        parts = [p for p in shapely.get_parts(rest) if p.geom_type == "Polygon" and p.area > 500]
        if parts:
            shapes.append(max(parts, key=lambda p: p.area))
    frame = table(shapes)
    zones = glacier_zones(frame, BUFFERS)
    assert len(zones) == len(shapes) * len(BUFFERS)
    outlines = frame.to_crs(UTM).geometry.make_valid().to_numpy()
    previous = None
    for buffer_m in BUFFERS:
        now = metric(zones, buffer_m)
        assert overlaps(now) < 0.01
        if previous is not None:  # each zone lies in the next larger one
            assert shapely.area(shapely.difference(previous, now)).max() < 0.01
        previous = now
        if buffer_m > 0:
            together = shapely.union_all(shapely.buffer(outlines, buffer_m))
            lost = shapely.difference(together, shapely.union_all(now)).area
            assert lost < 0.002 * together.area  # what no glacier gets: slivers between sampled lines
        # GEOS simplifies an outline by up to 1% of the distance before it buffers it.
        reach = shapely.buffer(outlines, 1.01 * max(buffer_m, 0) + 0.01, quad_segs=32)
        assert shapely.area(shapely.difference(now, reach)).max() < 0.1


def test_a_gap_is_cut_in_the_middle() -> None:
    left = shapely.box(X0, Y0, X0 + 200, Y0 + 400)
    right = shapely.box(X0 + 230, Y0, X0 + 500, Y0 + 400)
    zones = glacier_zones(table([left, right]), BUFFERS)
    west, east = metric(zones, 50)
    middle = shapely.box(X0 + 200, Y0 + 50, X0 + 230, Y0 + 350)
    assert shapely.intersection(west, middle).area == pytest.approx(15 * 300, rel=0.02)
    assert shapely.intersection(east, middle).area == pytest.approx(15 * 300, rel=0.02)
    # 10 m zones do not meet across 30 m: they are plain buffers
    assert metric(zones, 10)[0].area == pytest.approx(shapely.buffer(left, 10).area, rel=1e-4)


def test_zones_stop_at_a_shared_divide() -> None:
    left, right = shapely.box(X0, Y0, X0 + 300, Y0 + 400), shapely.box(X0 + 300, Y0, X0 + 600, Y0 + 400)
    zones = glacier_zones(table([left, right]), BUFFERS)
    west, east = metric(zones, 20)
    assert shapely.intersection(west, right).area < 0.1
    assert shapely.intersection(east, left).area < 0.1
    assert west.area == pytest.approx(left.area + 20 * (400 + 2 * 300) + np.pi * 20**2 / 2, rel=0.002)


def test_overlapping_outlines_share_no_more_than_their_overlap() -> None:
    a, b = blob(0, 0, 200, 3), blob(150, 30, 200, 4)
    zones = glacier_zones(table([a, b]), BUFFERS)
    shared = shapely.intersection(a, b).area
    for buffer_m in (0, 10, 20, 50):
        assert overlaps(metric(zones, buffer_m)) == pytest.approx(shared, abs=0.1)


def test_alone_in_the_world_and_too_small_for_an_inner_zone() -> None:
    small = shapely.box(X0, Y0, X0 + 30, Y0 + 30)
    zones = glacier_zones(table([small]), BUFFERS)
    assert metric(zones, -20)[0].is_empty
    assert metric(zones, -10)[0].area == pytest.approx(100, rel=1e-3)
    assert metric(zones, 50)[0].area == pytest.approx(shapely.buffer(small, 50).area, rel=1e-3)
    assert len(glacier_zones(table([small]).iloc[:0], BUFFERS)) == 0


def test_neighbours_in_two_utm_zones_are_cut_along_one_line() -> None:
    # 12 degrees east is the border of zones 32 and 33.
    border = gpd.GeoSeries([shapely.Point(12.0, 46.5)], crs=4326).to_crs(UTM).iloc[0]
    left = shapely.box(border.x - 320, border.y, border.x - 15, border.y + 300)
    right = shapely.box(border.x + 15, border.y, border.x + 320, border.y + 300)
    frame = table([left, right])
    assert frame["utm_epsg"].tolist() == [32632, 32633]
    zones = glacier_zones(frame, BUFFERS)
    assert overlaps(metric(zones, 50)) < 0.01
    gap = shapely.box(border.x - 15, border.y + 20, border.x + 15, border.y + 280)
    assert shapely.difference(gap, shapely.union_all(metric(zones, 50))).area < 0.5


def test_far_apart_regions_do_not_disturb_each_other() -> None:
    alps = table([blob(0, 0, 300, 2)])
    andes = table([shapely.box(600_000, 4_500_000, 600_500, 4_500_500)], crs=32718)
    andes["glacier_id"] = "S"
    both = gpd.GeoDataFrame(gpd.pd.concat([alps, andes], ignore_index=True), crs=4326)
    zones = glacier_zones(both, BUFFERS)
    south = zones[(zones["glacier_id"] == "S") & (zones["buffer_m"] == 50)].to_crs(32718).geometry.iloc[0]
    assert south.area == pytest.approx(600 * 600 - (4 - np.pi) * 50**2, rel=1e-3)


def test_swiss_inventory_in_seconds(real_data: Path) -> None:
    inventory = InventorySettings(path="unused", columns=InventoryColumns(glacier_id="SGI"))
    glaciers, _ = read_inventory(real_data / "sgi_switzerland" / "sgi2010_outlines.gpkg", inventory)
    largest = glaciers.nlargest(80, "inventory_area_km2").reset_index(drop=True)
    start = time.perf_counter()
    zones = glacier_zones(largest, BUFFERS)
    assert time.perf_counter() - start < 30.0
    assert len(zones) == len(largest) * len(BUFFERS)
    outlines = metric(zones, 0)
    left, right = shapely.STRtree(outlines).query(outlines, predicate="intersects")
    pairs = left < right
    own = shapely.area(shapely.intersection(outlines[left[pairs]], outlines[right[pairs]]))
    for buffer_m in (20, 50):
        now = metric(zones, buffer_m)
        shared = shapely.area(shapely.intersection(now[left[pairs]], now[right[pairs]]))
        assert (shared - own).max() < 0.1
        assert overlaps(now) <= own.max(initial=0.0) + 0.1
