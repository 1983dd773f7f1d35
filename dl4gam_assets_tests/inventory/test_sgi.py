"""Ice bodies cut into glaciers: small shapes with known answers, and the real inventory against its official
table."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import LineString, Point, box

from dl4gam_assets.inventory import _prepare, sgi
from dl4gam_assets.settings import InventorySettings, SettingsError

CRS = sgi.SWISS_CRS


def split(bodies, divides, points, **kw):
    """Call split_ice_bodies with plain shapely objects: divides as (line, a, b), points as {id: point}."""
    return sgi.split_ice_bodies(
        gpd.GeoDataFrame(geometry=bodies, crs=CRS),
        gpd.GeoDataFrame(
            {"sgi-id_a": [a for _, a, _ in divides], "sgi-id_b": [b for _, _, b in divides]},
            geometry=[line for line, _, _ in divides],
            crs=CRS,
        ),
        gpd.GeoDataFrame({"sgi-id": list(points), "name": list(points)}, geometry=list(points.values()), crs=CRS),
        **kw,
    )


def areas(glaciers: gpd.GeoDataFrame) -> dict[str | None, float]:
    ids = [None if pd.isna(i) else i for i in glaciers["glacier_id"]]
    return dict(zip(ids, (glaciers.geometry.area / 1e4).round(2), strict=True))


@settings(max_examples=15, deadline=None)
@given(
    x=st.floats(200, 800),
    gap=st.floats(0, 90),
    beyond=st.floats(0, 50),
)
def test_divide_that_stops_short_is_led_on_to_the_margin(x: float, gap: float, beyond: float) -> None:
    divide = LineString([(x, gap), (x, 500 + beyond)])
    found = split([box(0, 0, 1000, 500)], [(divide, "A", "B")], {"A": Point(10, 250), "B": Point(990, 250)})
    assert areas(found)["A"] == pytest.approx(x * 500 / 1e4, abs=0.02)
    assert found.area_km2.sum() == pytest.approx(0.5)


def test_piece_without_point_is_named_by_the_divide_not_by_the_longest_edge() -> None:
    """The right piece borders on A only, across a divide between A and C: it is C's, whose point is in
    another body."""
    bodies = [box(0, 0, 1000, 500), box(3000, 0, 3200, 200)]
    points = {"A": Point(100, 100), "C": Point(3100, 100)}
    divide = LineString([(600, -1), (600, 501)])
    assert areas(split(bodies, [(divide, "A", "C")], points)) == {"A": 30.0, "C": 24.0}
    assert areas(split(bodies, [(divide, "X", "Y")], points)) == {"A": 50.0, "C": 4.0}


def test_neck_without_divide_parts_two_glaciers_where_it_is_narrowest() -> None:
    body = shapely.union_all([box(0, 0, 400, 400), box(400, 180, 600, 220), box(600, 0, 1000, 400)])
    # A's point stands close to the margin, as label points do; the neck must still win over the point's
    # surroundings.
    found = split([body], [], {"A": Point(15, 390), "B": Point(990, 10)})
    got = areas(found)
    assert 16.0 <= got["A"] <= 16.8
    assert 16.0 <= got["B"] <= 16.8
    assert sum(got.values()) == pytest.approx(16.8 * 2 - 0.8, abs=0.1)


def test_half_a_divide_guides_the_parting() -> None:
    """A divide that leaves 150 m open on one side is too short to be led on, yet the parting follows it."""
    divide = LineString([(500, 150), (500, 400)])
    found = split([box(0, 0, 1000, 400)], [(divide, "A", "B")], {"A": Point(200, 200), "B": Point(800, 200)})
    assert areas(found)["A"] == pytest.approx(20.0, abs=1.5)


def test_detached_ice_goes_to_its_former_glacier_then_to_the_nearest_and_none_is_lost() -> None:
    bodies = [box(0, 0, 500, 500), box(1000, 0, 1500, 500), box(900, 0, 950, 100), box(9000, 0, 9100, 100)]
    points = {"A": Point(250, 250), "B": Point(1250, 250)}
    assert areas(split(bodies, [], points)) == {"A": 25.0, "B": 25.5, None: 1.0}
    former = gpd.GeoDataFrame({"SGI": ["A"]}, geometry=[box(0, 0, 960, 500)], crs=CRS)
    assert areas(split(bodies, [], points, former=former)) == {"A": 25.5, "B": 25.0, None: 1.0}


def test_point_beside_the_ice_still_names_it() -> None:
    found = split([box(0, 0, 500, 500), box(520, 0, 900, 500)], [], {"A": Point(250, 250), "B": Point(512, 250)})
    assert areas(found) == {"A": 25.0, "B": 19.0}


def test_attributes_are_joined_and_wrong_input_is_named() -> None:
    table = pd.DataFrame({"sgi-id": ["A"], "year_acq": [2016], "area_km2": [0.26]})
    row = split([box(0, 0, 500, 500)], [], {"A": Point(250, 250)}, attributes=table).iloc[0]
    assert (row.year_acq, row.stated_area_km2) == (2016, 0.26)
    body = gpd.GeoDataFrame(geometry=[box(0, 0, 1, 1)], crs="EPSG:4326")
    lines = gpd.GeoDataFrame({"sgi-id_a": [], "sgi-id_b": []}, geometry=[], crs=CRS)
    points = gpd.GeoDataFrame({"sgi-id": ["A", "A"], "name": ["", ""]}, geometry=[Point(0, 0)] * 2, crs=CRS)
    with pytest.raises(ValueError, match="projected CRS"):
        sgi.split_ice_bodies(body, lines, points)
    with pytest.raises(ValueError, match=r"twice.*A"):
        sgi.split_ice_bodies(body.to_crs(CRS), lines, points)
    with pytest.raises(ValueError, match="sgi-id_b"):
        sgi.split_ice_bodies(body.to_crs(CRS), lines.drop(columns="sgi-id_b"), points)


def test_missing_raw_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=sgi.BODIES):
        sgi.write_swiss_inventory(tmp_path, tmp_path / "out.gpkg")


@pytest.fixture(scope="module")
def swiss(real_data, tmp_path_factory):
    wish = InventorySettings(path="sgi_switzerland", prepare="sgi2016", layer="glaciers")
    out = tmp_path_factory.mktemp("swiss")
    return wish, out, _prepare.prepare_inventory(wish, real_data, out)


def test_real_inventory_agrees_with_the_official_areas(real_data, swiss) -> None:
    """1,400 glaciers, no ice lost; the bounds leave a little room around what was measured
    (docs/real-data.md)."""
    _, _, path = swiss
    glaciers = gpd.read_file(path, layer="glaciers")
    official = pd.read_csv(real_data / "sgi_switzerland" / sgi.ATTRIBUTES)
    assert len(glaciers) == 1400
    assert set(glaciers["glacier_id"]) == set(official["sgi-id"])
    assert glaciers.geometry.is_valid.all()
    assert glaciers["date"].between(2013, 2018).all()

    unnamed = gpd.read_file(path, layer="unnamed_ice").area.sum() / 1e6
    bodies = gpd.read_file(real_data / "sgi_switzerland" / sgi.BODIES)
    assert glaciers.area.sum() / 1e6 + unnamed == pytest.approx(bodies.area.sum() / 1e6, rel=1e-6)
    assert unnamed < 0.1
    assert glaciers["area_km2"].sum() == pytest.approx(official["area_km2"].sum(), rel=1e-3)

    overlap = shapely.STRtree(glaciers.geometry.to_numpy()).query(glaciers.geometry.to_numpy(), predicate="overlaps")
    shared = shapely.intersection(glaciers.geometry.to_numpy()[overlap[0]], glaciers.geometry.to_numpy()[overlap[1]])
    assert shapely.area(shared).sum() < 1.0  # square metres

    figures = sgi.compare_with_official(glaciers)
    assert figures["n_compared"] == 674
    assert figures["median_difference"] < 0.006
    assert figures["share_within_5_percent"] > 0.94
    assert figures["share_within_10_percent"] > 0.96


def test_the_file_is_made_once(real_data, swiss) -> None:
    wish, out, path = swiss
    before = path.stat().st_mtime_ns
    assert _prepare.prepare_inventory(wish, real_data, out) == path
    assert path.stat().st_mtime_ns == before
    plain = InventorySettings(path="folder/outlines.gpkg")
    assert _prepare.prepare_inventory(plain, real_data, out) == real_data / "folder" / "outlines.gpkg"


def test_only_the_ten_glaciers_with_images_are_modelled(real_data, swiss) -> None:
    glaciers = gpd.read_file(swiss[2], layer="glaciers")
    glaciers["modelled"] = glaciers["area_km2"] >= 0.1
    wish = InventorySettings(
        path="x",
        model_within=["swiss_s2_pairs/masks_*.tif", "rhone_s2_series/masks.tif"],
        model_within_share=0.7,
    )
    found = _prepare.restrict_modelled(glaciers, wish, real_data)
    assert len(found) == 1400
    assert set(found.loc[found["modelled"], "glacier_id"]) == {
        "A54l-19", "A55f-03", "B31-04", "B36-01", "B43-03", "B52-24", "B57-05", "B72-11", "B74-08", "C83-12",
    }  # fmt: skip


def test_footprint_of_a_vector_file_and_a_raster(tmp_path) -> None:
    import rasterio
    from affine import Affine

    glaciers = gpd.GeoDataFrame(
        {"modelled": [True, True, False]},
        geometry=[box(0, 0, 100, 100), box(150, 0, 250, 100), box(0, 0, 50, 50)],
        crs="EPSG:32632",
    )
    glaciers.geometry = glaciers.translate(500_000, 5_000_000)
    ground = box(500_000, 5_000_000, 500_200, 5_000_100)
    gpd.GeoDataFrame(geometry=[ground], crs="EPSG:32632").to_file(tmp_path / "ground.gpkg")
    valid = np.zeros((10, 30), dtype="uint8")
    valid[:, :20] = 1
    with rasterio.open(
        tmp_path / "scene.tif",
        "w",
        driver="GTiff",
        width=30,
        height=10,
        count=1,
        dtype="uint8",
        crs="EPSG:32632",
        transform=Affine(10, 0, 500_000, 0, -10, 5_000_100),
    ) as target:
        target.write(valid, 1)
    for pattern in ("*.gpkg", "*.tif"):
        share = _prepare.footprint_share(glaciers.to_crs(4326), [pattern], tmp_path)
        assert share.to_numpy() == pytest.approx([1.0, 0.5, 1.0], abs=0.02)
    wish = InventorySettings(path="x", model_within=["*.tif"], model_within_share=0.6)
    assert _prepare.restrict_modelled(glaciers, wish, tmp_path)["modelled"].tolist() == [True, False, False]
    with pytest.raises(SettingsError, match="no file matches"):
        _prepare.footprint_share(glaciers, ["nothing_*.tif"], tmp_path)
