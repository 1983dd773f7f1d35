"""A store exported in the published layout and taken over by another one: the same areas, to the pixel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file

from dl4gam_assets.cubes import cube_channels, open_cube
from dl4gam_assets.segmentation import build_model
from dl4gam_assets.settings import ModelSettings
from dl4gam_assets.stages.reproduce import reproduce
from dl4gam_assets.stages.staleness import find_stale
from dl4gam_assets_tests.published.files import write_checkpoint, write_checkpoints
from dl4gam_assets_tests.small_region import YEARS, Small


@dataclass
class Trip:
    native: Small
    taken: Small
    files: Path


@pytest.fixture(scope="module")
def trip(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trip]:
    """Cubes and tables exported, checkpoints saved by Lightning, all imported into an empty store and materialized."""
    files = tmp_path_factory.mktemp("published")
    for year in YEARS:
        done = small.cli("export-published", str(files), "--year", str(year))
        assert done.exit_code == 0, done.output
    write_checkpoints(small.storage, small.region, files / "models")
    taken = Small(tmp_path_factory.mktemp("taken"))
    wide = files / "glacier_wide"
    for words in (
        ["import-cubes", str(wide / "2016")],  # before the baseline year: registered, and converted with it
        ["import-cubes", str(wide / "2015"), "--year", "2015"],
        ["import-cubes", str(wide / "2017")],
        ["import-splits", str(files)],
        ["import-checkpoints", str(files / "models")],
        ["materialize"],
    ):
        done = taken.cli(*words)
        early = words[1:] == [str(wide / "2016")] and "now import the cubes of the baseline year" in done.output
        assert done.exit_code == 0 or early, done.output
    yield Trip(small, taken, files)


@pytest.mark.timeout(900)
def test_areas_are_the_same_to_the_pixel(trip: Trip) -> None:
    ours, theirs = (s.storage.read_table("areas") for s in (trip.native, trip.taken))
    assert len(ours) == len(theirs) > 20
    both = ours.merge(theirs, on=["glacier_id", "year", "fold"], suffixes=("", "_taken"))
    assert len(both) == len(ours)
    for name in set(ours.columns) - {"glacier_id", "year", "fold"}:
        pd.testing.assert_series_equal(both[name], both[f"{name}_taken"], check_names=False, check_exact=True)
    changes = [s.storage.read_table("changes")[["glacier_id", "year", "rate_km2_per_year", "rate_std_km2_per_year"]]
               for s in (trip.native, trip.taken)]  # fmt: skip
    pd.testing.assert_frame_equal(changes[0], changes[1])


def test_maps_cubes_and_channels_are_the_same(trip: Trip) -> None:
    for year in YEARS:
        for glacier_id in trip.native.storage.read_table("cubes", year=year)["glacier_id"]:
            stacks = []
            for one in (trip.native, trip.taken):
                with open_cube(Path(str(one.storage.cube(year, glacier_id)))) as cube:
                    assert cube.odc.geobox.crs.epsg == 32632
                    stacks.append((cube_channels(cube).load(), cube["mask"].load(), cube["glacier_index"].load()))
            np.testing.assert_array_equal(stacks[0][0].to_numpy(), stacks[1][0].to_numpy())
            assert stacks[0][1].attrs["flag_meanings"] == stacks[1][1].attrs["flag_meanings"]
            np.testing.assert_array_equal(stacks[0][1].to_numpy(), stacks[1][1].to_numpy())
            np.testing.assert_array_equal(stacks[0][2].to_numpy(), stacks[1][2].to_numpy())


def test_imports_are_partitions_like_any_others(trip: Trip) -> None:
    """They are in the instance, their state is current, and nothing is stale."""
    import dagster as dg

    found = find_stale(trip.taken.workspace())
    assert found.current and found.checked > 30, found.causes
    with dg.DagsterInstance.from_config(str(Path(str(trip.taken.storage.root)) / "dagster")) as instance:
        for asset, partition in (("glacier_cubes", "2016"), ("normalization", "fold_2"), ("elevation", None)):
            event = instance.get_latest_materialization_event(dg.AssetKey(asset))
            assert event is not None, asset
            if partition:
                assert partition in instance.get_materialized_partitions(dg.AssetKey(asset))
        assert len(instance.get_materialized_partitions(dg.AssetKey("ensemble_member"))) == 4


def test_lineage_names_the_published_files(trip: Trip) -> None:
    row = trip.taken.storage.read_table("areas", year=2016).iloc[0]
    done = trip.taken.cli("explain", str(row["glacier_id"]), "--year", "2016", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    sources = json.dumps(told)
    assert "published cube" in sources and "sha256:" in sources and "map_all_splits_all_folds.csv" in sources
    assert "stats_agg_split_" in sources and "layers of the published cube" in sources
    done = trip.taken.cli("explain", str(row["glacier_id"]), "--year", "2016")
    words = " ".join(done.output.replace("│", " ").split())
    assert "imported from split_" in words and "coverage unknown" not in words
    model = json.loads((trip.taken.storage.model(1, 1) / "model.json").read_text())
    assert model["golden"]["largest_difference"] < 1e-5 and len(model["golden"]["response"]) == 16
    assert all(value > 0 for value in model["golden"]["response"].values())
    members = trip.taken.storage.read_table("members")
    assert members["seed"].tolist() == [1, 2, 1, 2] and members["validation_iou"].tolist() == [0.9012] * 4
    assert members["encoder_weights"].str.startswith("imported from split_").all()


def test_an_estimate_is_made_again_from_the_files(trip: Trip) -> None:
    row = trip.taken.storage.read_table("areas", year=2017).iloc[0]
    found = reproduce(trip.taken.workspace(), str(row["glacier_id"]), 2017)
    assert found.verdict == "same bits", found


def test_a_changed_file_makes_its_glacier_stale(trip: Trip, tmp_path: Path) -> None:
    file = next((trip.files / "glacier_wide" / "2017").rglob("*.nc"))
    content = file.read_bytes()
    try:
        with xr.open_dataset(file, decode_coords="all") as source:
            data = source.load()
        data["mask_nok"][:5] = 1
        file.unlink()
        data.to_netcdf(file)
        found = find_stale(trip.taken.workspace()).estimates
        stale = found[found["state"] == "stale"]
        assert set(zip(stale["glacier_id"], stale["year"], strict=True)) == {(file.parent.name, 2017)}
    finally:
        file.write_bytes(content)


def test_years_of_our_own_do_not_mix_with_it(trip: Trip, tmp_path: Path) -> None:
    taken = trip.taken.copy(tmp_path / "copy")
    (taken.storage.path("imports", "cubes", "2017.json")).unlink()
    done = taken.cli("materialize", "--year", "2017", "--only", "elevation_change", "--only", "glacier_cubes")
    assert done.exit_code == 1 and "store of their own" in " ".join(done.output.split())


def _first(model: ModelSettings) -> str:
    return next(k for k, v in build_model(model, pretrained=False).state_dict().items() if v.ndim == 4)


@pytest.mark.timeout(600)
def test_checkpoints_whose_indices_come_in_another_order(trip: Trip, tmp_path: Path) -> None:
    """Their settings only say `true`: the wrong order is found out on validation glaciers, the right one is taken."""
    channels = trip.native.region.model.channels
    theirs = [*channels[:5], "ndsi", "ndvi", "ndwi", *channels[8:]]
    order = [channels.index(c) for c in theirs]
    for fold in (1, 2):
        for member in (1, 2):
            weights = load_file(str(trip.native.storage.model(fold, member) / "model.safetensors"))
            first = _first(trip.native.region.model)
            weights[first] = weights[first][:, order].contiguous()
            write_checkpoint(weights, trip.native.region.model, tmp_path / "m", split=fold, seed=member)
    taken = trip.taken.copy(tmp_path / "copy")
    done = taken.cli("import-checkpoints", str(tmp_path / "m"))
    words = " ".join(done.output.split())
    assert done.exit_code == 1 and "--indices NDSI,NDVI,NDWI" in words, words
    done = taken.cli("import-checkpoints", str(tmp_path / "m"), "--indices", "NDSI,NDVI,NDWI")
    assert done.exit_code == 0, done.output
    for fold in (1, 2):
        for member in (1, 2):
            a, b = (load_file(str(s.storage.model(fold, member) / "model.safetensors")) for s in (trip.native, taken))
            assert all(torch.equal(a[k], b[k]) for k in a if a[k].is_floating_point())
