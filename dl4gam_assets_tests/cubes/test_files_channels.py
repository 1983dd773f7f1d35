"""The file of a cube, and the channels that models see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rasterio
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dl4gam_assets.cubes import build_cube, channel_stack, content_fingerprint, cube_mask, open_cube, write_cube
from dl4gam_assets.settings import PUBLISHED_CHANNELS

from .conftest import BANDS

if TYPE_CHECKING:
    from .conftest import Place

#: Half a step of the stored integers, and what float32 adds to it.
TOLERANCE = {
    "reflectance": 5.1e-5, "dem": 0.251, "slope": 0.0051, "aspect": 0.0251, "planform_curvature": 0.00251,
    "profile_curvature": 0.00251, "terrain_ruggedness_index": 0.00501, "dhdt": 0.00101,
}  # fmt: skip


@pytest.fixture(scope="module")
def written(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.Dataset, Path]:
    cube = place.cube()
    path = tmp_path_factory.mktemp("cubes") / "A.nc"
    write_cube(cube, path)
    return cube, path


def test_round_trip_within_the_stated_precision(written: tuple[xr.Dataset, Path]) -> None:
    cube, path = written
    with open_cube(path) as again:
        assert set(again.data_vars) == set(cube.data_vars)
        for name, tolerance in TOLERANCE.items():
            before, after = cube[name].to_numpy(), again[name].to_numpy()
            assert after.dtype == np.float32, name
            assert (np.isnan(before) == np.isnan(after)).all(), name
            assert np.nanmax(np.abs(before - after)) <= tolerance, name
        for name in ("mask", "glacier_index"):
            assert (cube[name].to_numpy() == again[name].to_numpy()).all() and again[name].dtype == cube[name].dtype
        assert again["band"].to_numpy().tolist() == BANDS
        assert again.attrs["glacier_id"] == "A" and "tag" not in again.attrs
        assert again["dem"].attrs["units"] == "m"


def test_opens_with_plain_xarray(written: tuple[xr.Dataset, Path]) -> None:
    cube, path = written
    with xr.open_dataset(path) as plain:
        assert (cube_mask(plain, "zone_20") == cube_mask(cube, "zone_20")).all()
        assert float(abs(plain["reflectance"] - cube["reflectance"]).max()) <= TOLERANCE["reflectance"]
        assert plain["spatial_ref"].attrs["grid_mapping_name"] == "transverse_mercator"
        assert plain["reflectance"].attrs["grid_mapping"] == "spatial_ref"
        assert plain["x"].attrs["standard_name"] == "projection_x_coordinate"
        flags = plain["mask"].attrs
        assert len(flags["flag_masks"]) == len(flags["flag_meanings"].split()) == 11


@pytest.mark.parametrize("layer", ["dem", "mask", "reflectance"])
def test_opens_georeferenced_in_gdal(written: tuple[xr.Dataset, Path], place: Place, layer: str) -> None:
    cube, path = written
    with rasterio.open(f"netcdf:{path}:{layer}") as source:
        assert source.crs.to_epsg() == 32632
        assert source.transform == place.grid.affine
        values = source.read(1)
        if layer == "mask":
            assert (values == cube["mask"].to_numpy()).all()
        if layer == "reflectance":
            assert source.count == len(BANDS) and source.nodata == -32768


def test_the_grid_is_known_to_the_accessors(written: tuple[xr.Dataset, Path], place: Place) -> None:
    import rioxarray  # noqa: F401

    cube, path = written
    assert cube.odc.geobox == place.grid
    with open_cube(path) as again:
        assert again.odc.geobox == place.grid
        assert again.rio.crs.to_epsg() == 32632
        assert again["dem"].rio.transform() == place.grid.affine


def test_static_layers_survive_a_file_and_become_the_same_cube(place: Place, tmp_path: Path) -> None:
    from dl4gam_assets.cubes import build_cube

    write_cube(place.static(), tmp_path / "static.nc")
    with open_cube(tmp_path / "static.nc") as opened:
        static = opened.load()
    write_cube(build_cube(static, place.image(), attrs={"year": 2016}), tmp_path / "cube.nc")
    with open_cube(tmp_path / "cube.nc") as cube:
        assert (cube["dem"].to_numpy() == static["dem"].to_numpy()).all()  # stored twice, rounded once
        assert cube.odc.geobox == place.grid
        assert cube.attrs["year"] == 2016
        assert (cube_mask(cube, "glacier") == cube_mask(place.static(), "glacier")).all()


def test_a_file_made_from_the_static_one_is_the_same(place: Place, tmp_path: Path) -> None:
    static = place.static(velocity_paths=[])
    static.attrs["fingerprint"] = content_fingerprint(static)
    write_cube(static, tmp_path / "static.nc")
    noise = np.random.default_rng(0).normal(0, 30, place.grid.shape).astype(np.float32)
    noise[3] = np.nan
    about = {"year": 2016, "image_date": "2016-08-20", "scene_ids": "S2A", "tag": None}
    whole = build_cube(static, place.image(), dhdt=noise, dhdt_error=noise / 7, attrs=about)
    write_cube(whole, tmp_path / "whole.nc")
    with open_cube(tmp_path / "static.nc") as opened:
        cube = build_cube(opened, place.image(), dhdt=noise, dhdt_error=noise / 7, attrs=about)
        assert content_fingerprint(cube, "x") == content_fingerprint(whole, "x") != content_fingerprint(cube, "y")
        write_cube(cube, tmp_path / "added.nc", tmp_path / "static.nc")
    with open_cube(tmp_path / "whole.nc") as one, open_cube(tmp_path / "added.nc") as two:
        assert set(one.variables) == set(two.variables)
        for name in one.variables:
            assert one[name].dims == two[name].dims, name
            assert np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f"), name
            assert str(one[name].attrs) == str(two[name].attrs), name
            assert one[name].encoding.get("grid_mapping") == two[name].encoding.get("grid_mapping"), name
        assert one.odc.geobox == two.odc.geobox == place.grid
        assert {k: str(v) for k, v in one.attrs.items()} == {k: str(v) for k, v in two.attrs.items()}
    with rasterio.open(f"netcdf:{tmp_path / 'added.nc'}:reflectance") as source:
        assert source.crs.to_epsg() == 32632 and source.transform == place.grid.affine and source.count == len(BANDS)


def test_pixels_lie_where_the_utm_grid_says(written: tuple[xr.Dataset, Path], place: Place) -> None:
    """Plain xarray, rioxarray, odc-geo and GDAL agree with the corner that the grid was made from, to the pixel."""
    import rioxarray  # noqa: F401

    _, path = written
    # Glacier A begins 3 m east and ends 4 m north of X0, Y0 + 500; 200 m margin, snapped outwards to 10 m.
    west, north = 600_000.0 - 200, 5_150_000.0 + 510 + 200
    with xr.open_dataset(path, decode_coords="all") as plain:
        assert float(plain["x"][0]) == west + 5 and float(plain["y"][0]) == north - 5
        assert np.unique(np.diff(plain["x"])).tolist() == [10.0] and np.unique(np.diff(plain["y"])).tolist() == [-10.0]
        assert "spatial_ref" in plain.coords and plain.rio.crs.to_epsg() == 32632
        assert plain["dem"].rio.transform() == rasterio.Affine(10, 0, west, 0, -10, north)
        assert plain["reflectance"].rio.crs.to_epsg() == 32632
        assert {str(plain[n].attrs.get("units")) for n in ("dem", "slope", "dhdt", "reflectance")} == {
            "m", "degree", "m year-1", "1",
        }  # fmt: skip
        there = plain["dem"].sel(x=600_103, y=5_150_103, method="nearest")
        assert float(there) == plain["dem"].to_numpy()[int((north - 5_150_103) // 10), int((600_103 - west) // 10)]
    with rasterio.open(f'NETCDF:"{path}":dem') as source:
        assert source.crs.to_epsg() == 32632 and source.xy(0, 0) == (west + 5, north - 5)
        assert source.index(600_105, 5_150_105) == (int((north - 5_150_105) // 10), int((600_105 - west) // 10))


def test_values_beyond_the_integers_stop_at_the_end_of_the_range(place: Place, tmp_path: Path) -> None:
    cube = place.cube()
    cube["reflectance"].to_numpy()[0, 20, 20] = 9.0
    cube["dhdt"].to_numpy()[20, 20] = -500.0
    write_cube(cube, tmp_path / "cube.nc")
    with open_cube(tmp_path / "cube.nc") as again:
        assert float(again["reflectance"][0, 20, 20]) == pytest.approx(3.2767)
        assert float(again["dhdt"][20, 20]) == pytest.approx(-65.534)


def test_damaged_and_absent_files_are_named(written: tuple[xr.Dataset, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.nc"):
        open_cube(tmp_path / "absent.nc")
    half = tmp_path / "half.nc"
    half.write_bytes(written[1].read_bytes()[:5000])
    with pytest.raises(OSError, match=r"half\.nc is damaged.*materialize"):
        open_cube(half)


# ------------------------------------------------------------------------------------------ channels
def test_published_channels_in_their_order(written: tuple[xr.Dataset, Path]) -> None:
    _, path = written
    with open_cube(path) as cube:
        stack, valid = channel_stack(cube, PUBLISHED_CHANNELS)
        layer = dict(zip(PUBLISHED_CHANNELS, stack, strict=True))
        assert stack.dtype == np.float32 and stack.shape == (16, *cube["mask"].shape)
        assert (valid == ~cube_mask(cube, "not_ok")).all() and not valid.all()
        for i, band in enumerate(["red", "green", "blue", "nir", "swir16"]):
            assert np.array_equal(stack[i], cube["reflectance"].sel(band=band), equal_nan=True)
        red, green, nir, swir = (cube["reflectance"].sel(band=b).to_numpy() for b in ("red", "green", "nir", "swir16"))
        for name, first, second in (("ndvi", nir, red), ("ndwi", green, nir), ("ndsi", green, swir)):
            expected = (first - second) / (first + second)
            assert layer[name] == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert layer["slope"] == pytest.approx(cube["slope"].to_numpy() / 90)
        aspect = np.deg2rad(cube["aspect"].to_numpy())
        assert layer["sin_aspect"] == pytest.approx(np.sin(aspect), abs=1e-6)
        assert layer["cos_aspect"] == pytest.approx(np.cos(aspect), abs=1e-6)
        for name in ("dem", "planform_curvature", "profile_curvature", "terrain_ruggedness_index"):
            assert np.array_equal(layer[name], cube[name])
        assert (layer["dhdt"][:, :5] == 0).all() and not np.isnan(layer["dhdt"]).any()
        assert np.isnan(layer["red"][-4:]).all() and np.isnan(layer["ndvi"][-4:]).all()


def test_any_order_and_subset(place: Place) -> None:
    cube = place.cube()
    whole, _ = channel_stack(cube, ["dem", "ndsi", "blue"])
    turned, _ = channel_stack(cube, ["blue", "dem", "ndsi"])
    assert np.array_equal(whole[[2, 0, 1]], turned, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(st.floats(-0.125, 1.5, width=32), st.floats(-0.125, 1.5, width=32))
@example(0.0, 0.0)
@example(0.0625, -0.0625)
def test_indices_stay_in_range_and_a_zero_denominator_counts_as_one(green: float, swir: float) -> None:
    reflectance = np.array([green, swir], np.float32)[:, None, None]
    cube = xr.Dataset(
        {"reflectance": (("band", "y", "x"), reflectance),
         "mask": (("y", "x"), np.zeros((1, 1), np.uint16), {"flag_meanings": "not_ok", "flag_masks": [1]})},
        coords={"band": ["green", "swir16"]},
    )  # fmt: skip
    stack, valid = channel_stack(cube, ["ndsi"])
    assert valid.all() and -1 <= stack[0, 0, 0] <= 1
    lit = [max(green, 0.0), max(swir, 0.0)]
    assert stack[0, 0, 0] == pytest.approx((lit[0] - lit[1]) / (sum(lit) or 1.0), abs=1e-6)
    assert np.sign(stack[0, 0, 0]) == np.sign(lit[0] - lit[1])  # noise below zero does not turn the sign


def test_lacking_layers_are_named(place: Place) -> None:
    from dl4gam_assets.cubes import build_cube

    bare = build_cube(place.static(dem_paths=None), place.image().sel(band=["red", "green", "blue"]))
    with pytest.raises(KeyError, match="ndsi needs the band swir16"):
        channel_stack(bare, ["ndsi"])
    with pytest.raises(KeyError, match=r"slope needs the layer slope.*red, green, blue"):
        channel_stack(bare, ["slope"])
    stack, _ = channel_stack(bare, ["dhdt"])
    assert (stack == 0).all()
