"""Map files keep probabilities to 1e-5, say where they are, and are cloud-optimized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

from dl4gam_assets.ensemble import digits_of, read_members, read_prediction, read_prediction_tags, write_prediction


def _grid(shape: tuple[int, int]) -> GeoBox:
    return GeoBox(shape, Affine(10, 0, 600_000, 0, -10, 5_150_000), "EPSG:32632")


@pytest.mark.parametrize("shape", [(5, 7), (300, 517)])
def test_maps_come_back(tmp_path: Path, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.random(shape).astype(np.float32), rng.uniform(0, 0.5, shape).astype(np.float32)
    mean[0, :3], std[0, :3] = (0.0, 0.5, 1.0), 0.0
    mean[-1, -1] = std[-1, -1] = np.nan
    path = tmp_path / "map.tif"
    write_prediction(path, mean, std, _grid(shape), {"glacier_id": "RGI60-11.00001", "year": "2023", "row": '{"a": 1}'})
    got = read_prediction(path)
    for name, layer in (("mean", mean), ("std", std)):
        assert got[name].dtype == np.float32 and np.isnan(got[name][-1, -1])
        np.testing.assert_allclose(got[name], layer, atol=1.1e-5, equal_nan=True)
    np.testing.assert_array_equal(got["mean"][0, :3], np.array([0.0, 0.5, 1.0], np.float32))
    tags = read_prediction_tags(path)
    assert (tags["glacier_id"], tags["year"], tags["row"]) == ("RGI60-11.00001", "2023", '{"a": 1}')
    with rasterio.open(path) as source:
        assert source.crs.to_epsg() == 32632 and source.transform == _grid(shape).affine
        assert source.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
        assert source.dtypes == ("uint16", "uint16") and source.nodata == 65535
        assert all(source.descriptions) and source.scales == (2e-5, 2e-5)


def test_members_are_further_bands_that_maps_do_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    members = rng.random((3, 40, 50)).astype(np.float32)
    members[:, 0, 0] = np.nan
    mean, std = members.mean(axis=0), members.std(axis=0)
    kept = {number: digits_of(layer) for number, layer in enumerate(members, start=1)}
    write_prediction(tmp_path / "kept.tif", mean, std, _grid((40, 50)), {}, kept)
    write_prediction(tmp_path / "plain.tif", mean, std, _grid((40, 50)), {})
    np.testing.assert_allclose(read_members(tmp_path / "kept.tif"), members, atol=1.1e-5, equal_nan=True)
    assert read_members(tmp_path / "plain.tif").shape == (0, 40, 50)
    one, two = (read_prediction(tmp_path / f"{name}.tif") for name in ("kept", "plain"))
    for name in ("mean", "std"):
        np.testing.assert_array_equal(one[name], two[name])
    with rasterio.open(tmp_path / "kept.tif") as source:
        assert source.descriptions[4] == "glacier probability (member 03, before filling)"


def test_what_is_no_map_has_no_tags(tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_bytes(b"II*\x00half")
    assert read_prediction_tags(tmp_path / "broken.tif") == {}
    assert read_prediction_tags(tmp_path / "absent.tif") == {}


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    mean = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    for name in ("a.tif", "b.tif"):
        write_prediction(tmp_path / name, mean, mean / 2, _grid((64, 64)), {"fingerprint": "x"})
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
