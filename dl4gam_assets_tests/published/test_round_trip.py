"""A store exported in the published layout and taken over by another one: the same areas, to the pixel."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
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
from dl4gam_assets.stages.base import fold_member_label
from dl4gam_assets.stages.published import cubes_import
from dl4gam_assets.stages.reproduce import reproduce
from dl4gam_assets.stages.staleness import find_stale
from dl4gam_assets_tests.published.files import write_as_rioxarray, write_checkpoint, write_checkpoints
from dl4gam_assets_tests.small_region import YEARS, Small


@dataclass
class Trip:
    native: Small
    taken: Small
    files: Path


@pytest.fixture(scope="module")
def trip(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trip]:
    """Cubes and tables exported, checkpoints saved by Lightning, all imported into an empty store and materialized.

    2015 comes as a folder, 2016 as an archive, 2017 with thirteen bands and nothing that names its missing values.
    """
    files = tmp_path_factory.mktemp("published")
    for year in YEARS:
        done = small.cli("export-published", str(files), "--year", str(year))
        assert done.exit_code == 0, done.output
    write_checkpoints(small.storage, small.region, files / "models")
    wide = files / "glacier_wide"
    with tarfile.open(files / "2016.tar.gz", "w:gz") as tar:
        tar.add(wide / "2016", "data/glacier_wide/2016")
    for file in sorted((wide / "2017").rglob("*.nc")):
        write_as_rioxarray(file, files / "again" / file.parent.name / file.name, plain=True)
    shutil.rmtree(wide / "2017")
    shutil.move(files / "again", wide / "2017")
    taken = Small(tmp_path_factory.mktemp("taken"))
    first = ["import-cubes", str(files / "2016.tar.gz")]
    for words in (
        first,  # before the baseline year: registered, and converted with it
        ["import-cubes", str(wide / "2015"), "--year", "2015"],
        ["import-cubes", str(wide / "2017")],
        ["import-splits", str(files)],
        ["import-checkpoints", str(files / "models")],
        ["materialize"],
    ):
        done = taken.cli(*words)
        early = words is first and "now import the cubes of the baseline year" in done.output
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


def test_the_comparison_is_the_same(trip: Trip) -> None:
    told = []
    for one in (trip.native, trip.taken):
        done = one.cli("compare-published", "--year", "2017", "--json")
        assert done.exit_code == 0, done.output
        told.append(json.loads(done.output))
    for what in ("paper", "areas", "rates", "areas_as_published"):
        assert told[0][what] == told[1][what], what
    ours, theirs = ([r for r in t["maps"] if r["method"] == "ensemble"] for t in told)
    assert len(ours) == 2 and ours == theirs


def test_an_archive_is_unpacked_into_the_store(trip: Trip) -> None:
    manifest = cubes_import(trip.taken.storage, 2016)
    assert manifest is not None
    folder = Path(manifest["path"])
    checksum = hashlib.sha256((trip.files / "2016.tar.gz").read_bytes()).hexdigest()
    assert folder == Path(str(trip.taken.storage.path("imports", "unpacked"))) / checksum[:16]
    assert len(list(folder.rglob("*.nc"))) == len(manifest["glaciers"]) == 9


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
    sources = trip.taken.storage.read_table("lineage_sources", year=2016, fold=1)
    name = f"split_1/seed_1/{Path(model['imported']['name']).name}"
    told = sources[sources["kind"] == "imported"].set_index("name")["checksum"]
    assert told[f"{name}: golden input"] == f"sha256:{model['golden']['input_sha256']}"
    assert told[f"{name}: golden output"] == f"sha256:{model['golden']['output_sha256']}"
    assert told[f"{name}: mean of the golden output"] == str(model["golden"]["output_mean"])
    assert told[f"{name}: order of channels"].split(",") == trip.native.region.model.channels
    assert json.loads(told[f"{name}: response to each channel"]) == model["golden"]["response"]
    state = trip.taken.storage.read_state("ensemble_member", fold_member_label(1, 1))
    assert state is not None
    metadata = state["metadata"]
    assert metadata["golden_input_sha256"] == model["golden"]["input_sha256"]
    assert metadata["golden_output_sha256"] == model["golden"]["output_sha256"]
    assert metadata["golden_output_mean"] == model["golden"]["output_mean"]
    assert metadata["published_channel_order"] == ", ".join(trip.native.region.model.channels)
    assert {r["channel"]: r["response"] for r in metadata["golden_response"]} == model["golden"]["response"]
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


@pytest.mark.timeout(1200)
def test_a_baseline_with_images_of_several_years(trip: Trip, tmp_path: Path) -> None:
    """As the published inventory cubes: rates go from each image's own date."""
    taken, wide = trip.taken.copy(tmp_path / "copy"), tmp_path / "inv"
    shutil.copytree(trip.files / "glacier_wide" / "2015", wide)
    dates = {}
    for file, day in zip(sorted(wide.rglob("*.nc")), ("2016-08-27", "2017-02-07"), strict=False):
        with xr.open_dataset(file, decode_coords="all", mask_and_scale=False) as source:
            data = source.load()
        data.attrs["fn"] = f"{day}_raw.tif"
        file.unlink()
        data.to_netcdf(file.with_name(f"{day}.nc"))
        dates[file.parent.name] = pd.Timestamp(day)
    glaciers = taken.storage.read_table("glaciers")
    acquired = [dates.get(g, day) for g, day in zip(glaciers["glacier_id"], glaciers["inventory_date"], strict=True)]
    taken.storage.write_table("glaciers", glaciers.assign(inventory_date=pd.to_datetime(acquired)))
    before = taken.storage.read_table("changes", year=2017).set_index("glacier_id")
    done = taken.cli("import-cubes", str(wide))
    assert done.exit_code == 0 and "9 cubes of 2015" in done.output, done.output
    done = taken.cli("materialize", "--year", "2015", "--year", "2017")
    assert done.exit_code == 0, done.output
    cubes = taken.storage.read_table("cubes", year=2015).set_index("glacier_id")
    assert {g: cubes.at[g, "image_date"] for g in dates} == dates
    assert (
        taken.storage.read_table("baseline_areas").set_index("glacier_id")["image_date"][list(dates)].to_dict() == dates
    )
    changes = taken.storage.read_table("changes", year=2017).set_index("glacier_id")
    assert set(changes.index) == set(before.index)
    for one, day in dates.items():
        row = changes.loc[one]
        years = (pd.Timestamp(row["image_date"]) - day).days / 365.25
        assert row["baseline_date"] == day and row["years"] == pytest.approx(years, abs=0.005)
        assert row["area_km2"] == before.at[one, "area_km2"] and 0.5 < row["years"] < 1.0 < before.at[one, "years"]
        assert row["rate_km2_per_year"] == pytest.approx((row["area_km2"] - row["baseline_area_km2"]) / row["years"])
    others = changes.index.difference(list(dates))
    pd.testing.assert_series_equal(changes.loc[others, "rate_km2_per_year"], before.loc[others, "rate_km2_per_year"])


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
