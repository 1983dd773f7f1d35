"""What of a pixel counts to whom: neighbours never count ground twice, in whole and in fractional pixels."""

from __future__ import annotations

import functools

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rioxarray  # noqa: F401  (registers the accessor)
import shapely
import xarray as xr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dl4gam_assets.change import area_row, extract_outlines, fractional_shares, ground_of, whole_shares
from dl4gam_assets.change.areas import Shares, covered_share
from dl4gam_assets.cubes.build import static_layers
from dl4gam_assets.inventory import glacier_grid, glacier_zones
from dl4gam_assets.tables import TABLES

UTM = 32632
X0, Y0 = 600_000.0, 5_150_000.0
PIXEL_M = 10.0
SLOW = [HealthCheck.too_slow]


class Valley:
    """Glaciers as the tables hold them, and their cubes' masks as the real chain makes them."""

    def __init__(self, shapes: list[shapely.Geometry], debris: shapely.Geometry | None = None) -> None:
        self.shapes = shapes
        n = len(shapes)
        frame = gpd.GeoDataFrame(
            {
                "glacier_id": [f"G{i}" for i in range(n)],
                "glacier_int": np.arange(1, n + 1),
                "utm_epsg": UTM,
                "inventory_area_km2": [s.area / 1e6 for s in shapes],
            },
            geometry=shapes,
            crs=UTM,
        )
        self.glaciers = frame.to_crs(4326)
        self.zones = glacier_zones(self.glaciers, [0, 20, 50])
        self.debris = gpd.GeoDataFrame(TABLES["debris"].empty())
        if debris is not None:
            parts = [shapely.intersection(s, debris) for s in shapes]
            rows = gpd.GeoDataFrame({"glacier_id": frame["glacier_id"], "debris_km2": 0.0}, geometry=parts, crs=UTM)
            self.debris = rows[rows.area > 0].to_crs(4326)

    @functools.cached_property
    def cubes(self) -> dict[str, xr.Dataset]:
        found = {}
        for row in self.glaciers.itertuples():
            grid = glacier_grid(row.geometry, UTM, PIXEL_M, 100.0)
            found[row.glacier_id] = static_layers(
                row.glacier_id, self.glaciers, self.zones, self.debris, grid, buffers_m=[0, 20, 50]
            ).rio.write_crs(UTM)
        return found

    def shares(self, glacier_id: str, pixels: str, shared_ground: str = "each") -> Shares:
        ground = ground_of(glacier_id, self.glaciers, self.zones, self.debris, UTM, shared_ground)  # type: ignore[arg-type]
        cube = self.cubes[glacier_id]
        return fractional_shares(cube, ground) if pixels == "fractional" else whole_shares(cube, ground)

    def sum_of_shares(self, pixels: str, shared_ground: str = "each", part: str = "counted") -> pd.Series:
        """Sum over glaciers of the share that each counts, by pixel of the common grid."""
        parts = []
        for glacier_id, cube in self.cubes.items():
            share = getattr(self.shares(glacier_id, pixels, shared_ground), part).astype(float)
            rows, columns = np.nonzero(share)
            index = pd.MultiIndex.from_arrays([cube["y"].to_numpy()[rows], cube["x"].to_numpy()[columns]])
            parts.append(pd.Series(share[rows, columns], index=index))
        return pd.concat(parts).groupby(level=[0, 1]).sum()

    def row(self, glacier_id: str, pixels: str, shared_ground: str = "each") -> dict[str, float]:
        """Areas where the map is ice everywhere."""
        cube = self.cubes[glacier_id]
        ice = np.ones(cube["mask"].shape, np.float32)
        return area_row(ice, 0 * ice, cube, 0.3, shares=self.shares(glacier_id, pixels, shared_ground))


def at(*corners: tuple[float, float]) -> shapely.Polygon:
    return shapely.Polygon([(X0 + x, Y0 + y) for x, y in corners])


@st.composite
def neighbours(draw: st.DrawFn) -> list[shapely.Geometry]:
    """Two glaciers that share a crooked divide, and a third at a small distance or sharing a border too.

    Half of the draws lie on pixel corners or centres, where rounding decides.
    """
    step = draw(st.sampled_from([0.37, 5.0, 10.0]))

    def length(low: int, high: int) -> float:
        return round(draw(st.integers(low, high)) / step) * step

    divide = [(length(150, 350), y) for y in (0.0, 90.0, 180.0, 270.0)]
    divide[0] = (divide[0][0], length(0, 40))
    top = (length(150, 350), 360.0)
    left = at((0, length(0, 60)), *divide, top, (length(0, 60), 360))
    right = at(*reversed([*divide, top]), (500, length(0, 60)), (length(450, 500), 360))
    gap = draw(st.sampled_from([0.0, 5.0, 15.0, 20.0, 30.0, 45.0]))
    above = at((0, 360 + gap), (500, 360 + gap), (length(300, 500), 500 + gap), (0, 500 + gap))
    return [left, right, above]


@settings(max_examples=12, deadline=None, suppress_health_check=SLOW)
@given(neighbours())
def test_neighbours_that_share_a_divide_never_count_ground_twice(shapes: list[shapely.Geometry]) -> None:
    valley = Valley(shapes)
    union_km2 = shapely.union_all(shapely.buffer(shapes, 20.0)).area / 1e6
    outlines_km2 = shapely.union_all(shapes).area / 1e6
    pixel_km2 = PIXEL_M**2 / 1e6
    # No pixel is in two outline masks, nor counted by two, and fractional shares never exceed the pixel.
    assert valley.sum_of_shares("whole", part="outline").max() == 1.0
    assert valley.sum_of_shares("whole", "once").max() == 1.0
    assert valley.sum_of_shares("fractional").max() <= 1.0 + 1e-6
    # So sums of areas stay below the area of the union.
    fractional = sum(valley.row(g, "fractional")["area_km2"] for g in valley.cubes)
    assert fractional <= union_km2 + 1e-9
    assert fractional >= 0.98 * union_km2  # the halfway line between two glaciers is cut, nothing else is lost
    assert sum(valley.row(g, "fractional")["inventory_area_km2"] for g in valley.cubes) == pytest.approx(outlines_km2)
    # Whole pixels can not exceed the pixels whose centre is in the union.
    counted = valley.sum_of_shares("whole", "once")
    centres = shapely.points(counted.index.get_level_values(1), counted.index.get_level_values(0))
    assert shapely.distance(centres, shapely.union_all(shapes)).max() <= 20.0 + 1e-3
    whole = sum(valley.row(g, "whole", "once")["area_km2"] for g in valley.cubes)
    assert whole == pytest.approx(len(counted) * pixel_km2)


#: Outlines along pixels: kept in degrees, their corners come back 1e-10 m beside the pixels' corners, where
#: exactextract 0.3 loses whole pixels unless corners are rounded first.
ALONG_PIXELS = [
    at((0, 0), (150, 0), (150, 90), (150, 180), (200, 270), (150, 360), (0, 360)),
    at((150, 360), (200, 270), (150, 180), (150, 90), (150, 0), (500, 0), (500, 360)),
    at((0, 360), (500, 360), (300, 500), (0, 500)),
]


@settings(max_examples=10, deadline=None, suppress_health_check=SLOW)
@example(ALONG_PIXELS)
@given(neighbours())
def test_an_all_ice_map_has_the_area_of_the_polygons(shapes: list[shapely.Geometry]) -> None:
    valley = Valley(shapes, debris=shapely.box(X0, Y0 + 100, X0 + 300, Y0 + 203))
    zones = valley.zones[valley.zones["buffer_m"] == 20].set_index("glacier_id").to_crs(UTM).area / 1e6
    for shape, glacier_id in zip(shapes, valley.cubes, strict=True):
        row = valley.row(glacier_id, "fractional")
        assert row["area_km2"] == pytest.approx(zones[glacier_id], rel=1e-6)
        assert row["lower_km2"] == row["area_km2"] == row["upper_km2"]
        assert row["inventory_area_km2"] == pytest.approx(shape.area / 1e6, rel=1e-6)
        rocks = shapely.intersection(shape, shapely.box(X0, Y0 + 100, X0 + 300, Y0 + 203)).area / 1e6
        assert row["debris_km2"] == pytest.approx(rocks, rel=1e-6, abs=1e-9) == row["debris_area_km2"]
        assert row["recall"] == pytest.approx(1.0)


def test_a_pixel_on_the_outer_edge_of_the_outline_is_whole_and_one_on_a_divide_is_split() -> None:
    # The divide cuts the pixels of one column at 3 of 10 m, the left edge cuts others at 4 of 10.
    left = at((4, 0), (203, 0), (203, 300), (4, 300))
    right = at((203, 0), (400, 0), (400, 300), (203, 300))
    valley = Valley([left, right])
    own, other = (valley.shares(g, "fractional") for g in ("G0", "G1"))
    cube, there = valley.cubes["G0"], valley.cubes["G1"]
    middle = int(np.abs(cube["y"].to_numpy() - (Y0 + 155)).argmin())
    beside = int(np.abs(there["y"].to_numpy() - (Y0 + 155)).argmin())

    def column(data: xr.Dataset, x: float) -> int:
        return int(np.abs(data["x"].to_numpy() - (X0 + x)).argmin())

    assert own.outline[middle, column(cube, 5)] == pytest.approx(0.6, abs=1e-6)
    assert own.counted[middle, column(cube, 5)] == pytest.approx(1.0, abs=1e-6)
    assert own.counted[middle, column(cube, -15)] == pytest.approx(0.6, abs=1e-6)  # the zone ends at -16
    assert own.counted[middle, column(cube, 205)] == pytest.approx(0.3, abs=1e-5)
    assert other.counted[beside, column(there, 205)] == pytest.approx(0.7, abs=1e-5)
    assert whole_shares(cube).counted[middle, column(cube, 205)] == 0


def test_ground_in_two_outlines_goes_to_the_first_of_them_where_asked() -> None:
    first = at((0, 0), (220, 0), (220, 300), (0, 300))
    second = at((185, 0), (400, 0), (400, 300), (185, 300))
    valley = Valley([first, second])
    union_km2 = shapely.union(first, second).area / 1e6
    for pixels in ("whole", "fractional"):
        each = [valley.row(g, pixels) for g in valley.cubes]
        once = [valley.row(g, pixels, "once") for g in valley.cubes]
        # As published, both count the overlap of 35 x 300 m.
        assert sum(r["inventory_area_km2"] for r in each) > union_km2 + 0.0089
        assert sum(r["inventory_area_km2"] for r in once) == pytest.approx(union_km2, rel=0.02)
        assert once[0] == each[0]
        assert once[1]["area_km2"] < each[1]["area_km2"] - 0.0089
        assert valley.sum_of_shares(pixels, "each").max() == pytest.approx(2.0)
        assert valley.sum_of_shares(pixels, "once").max() <= 1.0 + 1e-6
        assert once[1]["recall"] == pytest.approx(1.0)


def test_a_glacier_inside_another_loses_all_its_ground_and_is_named() -> None:
    valley = Valley([at((0, 0), (300, 0), (300, 300), (0, 300)), at((100, 100), (200, 100), (200, 200), (100, 200))])
    assert valley.row("G1", "whole")["area_km2"] == pytest.approx(0.01)
    for pixels in ("whole", "fractional"):
        with pytest.raises(ValueError, match=r"G1.*shared_ground"):
            valley.row("G1", pixels, "once")


def test_the_order_of_the_tables_changes_no_share() -> None:
    shapes = [at((0, 0), (220, 0), (220, 300), (0, 300)), at((185, 0), (400, 0), (400, 300), (185, 300))]
    valley = Valley([*shapes, at((0, 310), (300, 310), (300, 400), (0, 400))])
    rng = np.random.default_rng(4)
    expected = {g: valley.shares(g, "fractional", "once").counted for g in valley.cubes}
    valley.glaciers = valley.glaciers.iloc[rng.permutation(3)]
    valley.zones = valley.zones.iloc[rng.permutation(len(valley.zones))]
    for glacier_id, share in expected.items():
        assert np.array_equal(valley.shares(glacier_id, "fractional", "once").counted, share)
    with pytest.raises(KeyError, match="nobody"):
        valley.shares_of = ground_of("nobody", valley.glaciers, valley.zones, valley.debris, UTM)  # type: ignore[attr-defined]


@settings(max_examples=25, deadline=None)
@given(
    st.floats(5, 180), st.floats(-30, 30), st.floats(-30, 30), st.integers(3, 40),
    st.sampled_from([1.0, 7.5, 10.0, 30.0]),
)  # fmt: skip
def test_covered_shares_add_up_to_the_polygon(radius: float, dx: float, dy: float, corners: int, pixel: float) -> None:
    from affine import Affine

    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    ring = np.column_stack([X0 + 250 + dx + radius * np.cos(angle), Y0 - 240 + dy + 0.7 * radius * np.sin(angle)])
    polygon = shapely.Polygon(ring)
    shape = (int(480 / pixel), int(510 / pixel))
    share = covered_share(polygon, shape, Affine(pixel, 0, X0, 0, -pixel, Y0))
    assert share.shape == shape and share.min() >= 0 and share.max() <= 1
    assert share.sum() * pixel**2 == pytest.approx(polygon.area, rel=1e-5, abs=0.01)


def test_covered_shares_of_nothing_and_of_a_turned_grid() -> None:
    from affine import Affine

    north_up = Affine(10, 0, X0, 0, -10, Y0)
    assert covered_share(shapely.Polygon(), (4, 5), north_up).sum() == 0
    assert covered_share(shapely.box(0, 0, 1, 1), (4, 5), north_up).sum() == 0
    with pytest.raises(ValueError, match="north-up"):
        covered_share(shapely.box(X0, Y0 - 20, X0 + 5, Y0), (4, 5), Affine.rotation(20) @ north_up)


@settings(max_examples=12, deadline=None, suppress_health_check=SLOW)
@given(
    shapes=neighbours(), seed=st.integers(0, 2**32 - 1), tau=st.floats(0, 0.5), threshold=st.floats(0.05, 0.95),
    sieve=st.sampled_from([0, 4, 10]), simplify=st.sampled_from([0.0, 8.0, 15.0, 40.0]),
)  # fmt: skip
def test_lower_area_and_upper_are_nested_as_numbers_and_as_polygons_in_both_kinds_of_pixels(
    shapes: list[shapely.Geometry], seed: int, tau: float, threshold: float, sieve: int, simplify: float
) -> None:
    from scipy.ndimage import gaussian_filter

    valley = Valley(shapes[:2])
    rng = np.random.default_rng(seed)
    for pixels in ("whole", "fractional"):
        best = {}
        for glacier_id, cube in valley.cubes.items():
            smooth = gaussian_filter(rng.standard_normal(cube["mask"].shape), 3.0)
            mean = (1 / (1 + np.exp(-12 * smooth / smooth.std() * rng.uniform(0.1, 1) - 1))).astype(np.float32)
            std = (0.3 * rng.random() * np.sqrt(mean * (1 - mean))).astype(np.float32)
            shares = valley.shares(glacier_id, pixels)
            row = area_row(mean, std, cube, tau, threshold, shares)
            assert row["lower_km2"] <= row["area_km2"] <= row["upper_km2"]
            assert row["debris_area_km2"] <= row["debris_km2"] + 1e-12 and 0 <= row["recall"] <= 1
            rows = extract_outlines(mean, std, cube, tau, threshold, sieve, shares, simplify).set_index("bound")
            assert rows.geometry.is_valid.all()
            assert set(rows.geom_type) <= {"Polygon", "MultiPolygon"}
            metric = rows.to_crs(UTM).geometry
            for inner, outer in (("lower", "best"), ("best", "upper")):
                if inner in metric.index:
                    assert metric[inner].difference(metric[outer]).area < 0.1  # m2: rounding of degrees
                    assert rows.loc[inner, "area_km2"] <= rows.loc[outer, "area_km2"] + 1e-9
            if sieve == simplify == 0 and "best" in rows.index:
                assert rows.loc["best", "area_km2"] == pytest.approx(row["area_km2"], abs=1e-7)
            if "best" in metric.index:
                best[glacier_id] = metric["best"]
        if len(best) == 2:  # outlines of neighbours do not overlap either, simplified or not
            assert best["G0"].intersection(best["G1"]).area < 0.5


def test_simplified_outlines_have_fewer_corners_and_nearly_the_same_area() -> None:
    circle = shapely.Point(X0 + 400, Y0 + 400).buffer(300)
    valley = Valley([circle])
    cube = valley.cubes["G0"]
    share = covered_share(circle, cube["mask"].shape, cube.rio.transform()).astype(np.float32)
    std = np.full_like(share, 0.2)
    steps = extract_outlines(share, std, cube, 0.3).set_index("bound")
    smooth = extract_outlines(share, std, cube, 0.3, simplify_m=15.0).set_index("bound")
    for bound in ("lower", "best", "upper"):
        before, after = (shapely.get_num_coordinates(f.geometry[bound]) for f in (steps, smooth))
        assert after < 0.5 * before
        assert smooth.loc[bound, "area_km2"] == pytest.approx(steps.loc[bound, "area_km2"], rel=0.01)
    away = shapely.hausdorff_distance(*(f.to_crs(UTM).geometry["best"] for f in (steps, smooth)))
    assert 0 < away < 20


def test_the_terminus_is_a_predicted_pixel_also_between_two_tongues() -> None:
    bent = at((0, 0), (60, 0), (60, 150), (240, 150), (240, 0), (300, 0), (300, 300), (0, 300))
    valley = Valley([bent])
    cube = valley.cubes["G0"]
    northing = np.broadcast_to(cube["y"].to_numpy()[:, None], cube["mask"].shape)
    cube["dem"] = (("y", "x"), (3000 + 0.5 * (northing - Y0)).astype(np.float32))
    share = whole_shares(cube)
    mean = share.outline.astype(np.float32)
    row = area_row(mean, 0 * mean, cube, 0.3)
    point = gpd.GeoSeries.from_xy([row["terminus_lon"]], [row["terminus_lat"]], crs=4326).to_crs(UTM).iloc[0]
    column = int((point.x - float(cube["x"][0]) + 5) // 10)
    line = int((float(cube["y"][0]) + 5 - point.y) // 10)
    assert mean[line, column] == 1.0
    assert point.y - Y0 < 30  # one of the lowest rows
    assert row["terminus_m"] == pytest.approx(float(cube["dem"].to_numpy()[line, column]), abs=10.0)
    bare = area_row(mean, 0 * mean, cube.drop_vars("dem"), 0.3)
    assert bare["terminus_m"] is bare["terminus_lon"] is bare["terminus_lat"] is None
    none = area_row(0 * mean, 0 * mean, cube, 0.3)
    assert none["terminus_lon"] is None and none["area_km2"] == 0
