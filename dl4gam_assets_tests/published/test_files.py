"""Wrong and mixed files are refused with the reason; right ones are read as their authors write them."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml

from dl4gam_assets.cubes import channel_stack, cube_mask, open_cube
from dl4gam_assets.published import (
    PublishedFileError,
    PublishedPatches,
    adopt,
    channels_of,
    find_checkpoints,
    find_cubes,
    from_cube,
    read_published,
    read_settings,
    read_splits,
    read_statistics,
    read_weights,
    to_cube,
    unpack_cubes,
    write_published,
    write_splits,
    write_statistics,
)
from dl4gam_assets.published.comparison import area_quality, map_quality, regional_rates
from dl4gam_assets.segmentation import build_model
from dl4gam_assets.settings import PUBLISHED_CHANNELS, ModelSettings
from dl4gam_assets.stages.published import (
    _year_of,
    match_ids,
    register_checkpoints,
    register_cubes,
    register_splits,
)
from dl4gam_assets_tests.published.files import settings_of, write_checkpoint
from dl4gam_assets_tests.small_region import Small

BUFFERS = (-20, -10, 0, 10, 20, 50)
TINY = ModelSettings(encoder="resnet18", encoder_depth=3, decoder_channels=[32, 16, 8], encoder_weights=None)


@pytest.fixture
def cube_file(small: Small, tmp_path: Path) -> tuple[Path, xr.Dataset]:
    """A cube of the small region in the published layout, and ours."""
    row = small.storage.read_table("cubes", year=2016).iloc[0]
    with open_cube(Path(str(small.storage.cube(2016, row["glacier_id"])))) as cube:
        ours = cube.load()
    path = tmp_path / "wide" / str(row["glacier_id"]) / "2016-08-14.nc"
    path.parent.mkdir(parents=True)
    write_published(from_cube(ours, 1.0), path)
    return path, ours


def _back(path: Path, ours: xr.Dataset, **options: Any) -> xr.Dataset:
    data = read_published(path, BUFFERS)
    bands = [str(b) for b in ours["band"].to_numpy()]
    return to_cube(data, path.parent.name, pd.Timestamp("2016-08-14").to_pydatetime(), bands, BUFFERS, **options)


# ------------------------------------------------------------------------------------------------------------- cubes
def test_a_file_as_rioxarray_writes_it(cube_file: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    """The published files: every layer with its own CRS by rioxarray, thirteen bands, integer and float layers."""
    rioxarray = pytest.importorskip("rioxarray")
    assert rioxarray
    path, ours = cube_file
    with xr.open_dataset(path, decode_coords="all", mask_and_scale=False) as source:
        mine = source.load()
    names = ["B1", "B", "G", "R", "B5", "B6", "B7", "NIR", "B8A", "B9", "B10", "SWIR", "B12"]
    have = list(mine["band_data"].attrs["long_name"])
    layers = [mine["band_data"].to_numpy()[have.index(n)] if n in have else np.full(mine["mask_nok"].shape, 7, np.int16)
              for n in names]  # fmt: skip
    made = xr.Dataset(coords={"x": mine["x"].to_numpy(), "y": mine["y"].to_numpy(), "band": np.arange(1, 14)})
    made["band_data"] = (("band", "y", "x"), np.stack(layers))
    made["band_data"].attrs["long_name"] = names
    made["band_data"] = made["band_data"].rio.write_nodata(-9999)
    for name in mine.data_vars:
        if name != "band_data":
            made[name] = (("y", "x"), mine[name].to_numpy())
            fill = mine[name].attrs.get("_FillValue")
            made[name].attrs["_FillValue"] = fill if fill is not None else np.int8(-1)
    crs = f"EPSG:{ours.odc.geobox.crs.epsg}"
    made = made.rio.write_crs(crs)
    for name in list(made.data_vars):
        made[name].rio.write_crs(crs, inplace=True)
    made.attrs = {"fn": "20160814_raw.tif", "glacier_area": 1.0}
    other = tmp_path / "rio" / path.parent.name / "20160814T102030_whatever.nc"
    other.parent.mkdir(parents=True)
    made.to_netcdf(other)

    found = _back(other, ours)
    assert found.odc.geobox == ours.odc.geobox
    np.testing.assert_array_equal(found["mask"].to_numpy(), ours["mask"].to_numpy())
    for a, b in zip(channel_stack(found, PUBLISHED_CHANNELS), channel_stack(ours, PUBLISHED_CHANNELS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert find_cubes(tmp_path / "rio")[0].date == pd.Timestamp("2016-08-14")


Change = Callable[[xr.Dataset], xr.Dataset]
WRONG: dict[str, tuple[Change, str]] = {
    "no bands": (lambda d: d.drop_vars("band_data"), "lacks band_data"),
    "no mask": (lambda d: d.drop_vars("mask_crt_g_b20"), "lacks mask_crt_g_b20"),
    "names of bands": (lambda d: _named(d, ["R", "G"]), "2 band names"),
    "no CRS": (lambda d: d.drop_vars("spatial_ref"), "CRS"),
    "no SWIR": (lambda d: d.isel(band=slice(0, 4)).pipe(_named, ["B", "G", "R", "NIR"]), "lacks the bands swir16"),
    "nothing on it": (lambda d: d.assign(mask_crt_g=d["mask_crt_g"] * 0), "mask_crt_g is empty"),
    "coarse": (lambda d: d.isel(x=slice(None, None, 2), y=slice(None, None, 2)), "pixels of 20 m"),
}


def _named(data: xr.Dataset, names: list[str]) -> xr.Dataset:
    out = data.copy(deep=True)
    out["band_data"].attrs["long_name"] = names
    return out


@pytest.mark.parametrize("what", sorted(WRONG))
def test_wrong_cubes_are_refused(what: str, cube_file: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    path, ours = cube_file
    change, words = WRONG[what]
    with xr.open_dataset(path, decode_coords="all", mask_and_scale=False) as source:
        data = change(source.load())
    wrong = tmp_path / "wrong" / path.parent.name / path.name
    wrong.parent.mkdir(parents=True)
    for name in data.variables:
        data[name].encoding = {}
        if name in {"x", "y"} and "spatial_ref" not in data.coords:
            data[name].attrs = {}
        if "spatial_ref" not in data.coords:
            data[name].attrs.pop("grid_mapping", None)
    data.to_netcdf(wrong)
    with pytest.raises(PublishedFileError, match=words) as raised:
        _back(wrong, ours)
    assert str(wrong) in str(raised.value)


def test_damaged_cubes_and_those_of_others_are_refused(cube_file: tuple[Path, xr.Dataset], small: Small) -> None:
    path, ours = cube_file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PublishedFileError, match="can not be read"):
        _back(path, ours)
    path.write_text("<html>")
    with pytest.raises(PublishedFileError, match="can not be read"):
        _back(path, ours)
    path.write_bytes(whole)
    glaciers = small.storage.read_table("glaciers").set_index("glacier_id").to_crs(ours.odc.geobox.crs.epsg)
    assert _back(path, ours, outline=glaciers.geometry[path.parent.name]) is not None
    other = glaciers.geometry.drop(path.parent.name)
    with pytest.raises(PublishedFileError, match="another glacier"):
        _back(path, ours, outline=other.iloc[int(other.area.argmax())])


def test_folders_of_mixed_cubes_are_refused(cube_file: tuple[Path, xr.Dataset], small: Small, tmp_path: Path) -> None:
    path, _ = cube_file
    folder = path.parents[1]
    workspace = small.copy(tmp_path / "copy").workspace()
    assert register_cubes(workspace, folder, 2016)["cubes"] == 1
    with pytest.raises(PublishedFileError, match="not of 2017 alone"):
        register_cubes(workspace, folder, 2017)
    second = path.with_name("2017-08-20.nc")
    second.write_bytes(path.read_bytes())
    with pytest.raises(PublishedFileError, match="one year at a time"):
        find_cubes(folder)
    second.rename(path.with_name("image.nc"))
    with pytest.raises(PublishedFileError, match="does not begin with a date"):
        find_cubes(folder)
    path.with_name("image.nc").unlink()
    path.parent.rename(folder / "g_9999")
    with pytest.raises(PublishedFileError, match="not in the inventory of small"):
        register_cubes(workspace, folder, 2016)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishedFileError, match="holds no cubes"):
        find_cubes(tmp_path / "empty")
    with pytest.raises(PublishedFileError, match="is no folder"):
        find_cubes(tmp_path / "nowhere")


def test_one_bad_file_is_a_row_and_loses_no_other(small: Small, tmp_path: Path) -> None:
    done = small.cli("export-published", str(tmp_path / "out"), "--year", "2015")
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out" / "glacier_wide" / "2015").rglob("*.nc"))
    files[0].write_bytes(b"CDF nonsense")
    taken = Small(tmp_path / "taken")
    done = taken.cli("import-cubes", str(tmp_path / "out" / "glacier_wide" / "2015"), "--year", "2015")
    assert taken.storage.read_table("cubes", year=2015)["glacier_id"].nunique() == len(files) - 1
    failures = taken.storage.read_table("failures")
    mine = failures[failures["glacier_id"] == files[0].parent.name]
    assert len(mine) and mine["error"].str.contains(str(files[0]), regex=False).any()


def test_archives_hold_plain_names(cube_file: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    path, ours = cube_file
    archive = tmp_path / "2016.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, f"data/glacier_wide/2016/{path.parent.name}/{path.name}")
        tar.addfile(tarfile.TarInfo("data/readme.txt"))
        link = tarfile.TarInfo("data/x/2016-08-14.nc")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    folder = unpack_cubes(archive, tmp_path / "unpacked")
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == [
        f"{path.parent.name}/{path.name}"
    ]
    np.testing.assert_array_equal(
        _back(folder / path.parent.name / path.name, ours)["mask"].to_numpy(), ours["mask"].to_numpy()
    )
    for name in ("../../evil.nc", "a/../../x/..nc", "a/b c\n/2016.nc"):
        with tarfile.open(archive, "w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
        with contextlib.suppress(PublishedFileError):
            unpack_cubes(archive, tmp_path / "evil" / "inside")
        outside = [p for p in (tmp_path / "evil").rglob("*.nc") if "inside" not in p.parts]
        assert outside == [] and not (tmp_path / "evil.nc").exists()
    archive.write_bytes(b"no archive")
    with pytest.raises(PublishedFileError, match="can not be unpacked"):
        unpack_cubes(archive, tmp_path / "none")


def test_ids_match_by_name_or_by_number() -> None:
    found, lost = match_ids(["g_0000", "g_0123", "RGI-1", "a%2Fb", "g_77"], ["0", "123", "RGI-1", "a/b"])
    assert found == {"g_0000": "0", "g_0123": "123", "RGI-1": "RGI-1", "a%2Fb": "a/b"} and lost == ["g_77"]


def test_the_year_of_a_folder() -> None:
    glaciers = pd.DataFrame({"inventory_date": pd.to_datetime(["2015-08-29", "2016-08-27", "2017-10-07"])})
    assert _year_of([2023, 2023], glaciers, 2015, Path("x")) == 2023
    assert _year_of([2015, 2016, 2017], glaciers, 2015, Path("x")) == 2015
    with pytest.raises(PublishedFileError, match="--year"):
        _year_of([2022, 2023], glaciers, 2015, Path("x"))


# ------------------------------------------------------------------------------------------------------------- tables
def test_splits_and_statistics_go_there_and_back(small: Small, tmp_path: Path) -> None:
    folds = small.storage.read_table("folds")
    write_splits(folds, tmp_path / "map.csv")
    back = read_splits(tmp_path / "map.csv", 2)
    pd.testing.assert_frame_equal(
        folds.sort_values(["fold", "glacier_id"]).reset_index(drop=True).astype({"fold": int}).astype(object),
        back[folds.columns].astype(object),
    )
    statistics = small.storage.read_table("normalization", fold=1)
    write_statistics(statistics, tmp_path / "stats.csv")
    theirs = pd.read_csv(tmp_path / "stats.csv").set_index("var_name")
    assert theirs.loc["R", "mu"] > 100 and set(theirs.columns) == {"mu", "stddev", "vmin", "vmax"}
    again = read_statistics(tmp_path / "stats.csv", statistics["channel"].tolist())
    used = statistics["standardized"].to_numpy()
    for column in ("mean", "std"):
        np.testing.assert_allclose(again[column][used], statistics[column][used], rtol=1e-14)
    assert again["standardized"].tolist() == statistics["standardized"].tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "lacks the columns entry_id"),
        ("entry_id,split_1\na,fold_test\n", "lacks the columns split_2"),
        ("entry_id,split_1,split_2,split_3\na,fold_test,fold_train,fold_train\n", "more than 2 splits"),
        ("entry_id,split_1,split_2\na,fold_test,fold_train\na,fold_train,fold_test\n", "there twice"),
        ("entry_id,split_1,split_2\na,fold_test,train\n", "'train' of a in split_2"),
        ("entry_id,split_1,split_2\na,fold_test,fold_test\n", "tested 2 times"),
        ("entry_id,split_1,split_2\na,fold_train,fold_valid\n", "tested 0 times"),
        ("\x00\x01", "can not be read|lacks the columns"),
    ],
)
def test_wrong_splits_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(PublishedFileError, match=words):
        read_splits(tmp_path / "map.csv", 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("R", 2000, 500)], r"no \(single\) row of dem"),
        ([("R", 2000, 500), ("dem", 2500, 0)], "no usable mean and deviation"),
        ([("R", 2000, 500), ("G", 0.2, 0.1), ("dem", 2500, 300)], "some in steps"),
        ([("R", 2000, 500), ("R", 2000, 500), ("dem", 2500, 300)], r"no \(single\) row of R"),
        ([("R", "x", 500), ("dem", 2500, 300)], "can not be read"),
    ],
)
def test_wrong_statistics_are_refused(rows: list[tuple[str, Any, Any]], words: str, tmp_path: Path) -> None:
    pd.DataFrame(rows, columns=["var_name", "mu", "stddev"]).to_csv(tmp_path / "s.csv", index=False)
    channels = ["red", "green", "dem"] if any(r[0] == "G" for r in rows) else ["red", "dem"]
    with pytest.raises(PublishedFileError, match=words):
        read_statistics(tmp_path / "s.csv", channels)


def test_folders_of_tables(small: Small, tmp_path: Path) -> None:
    workspace = small.copy(tmp_path / "copy").workspace()
    folder = tmp_path / "tables"
    folder.mkdir()
    with pytest.raises(PublishedFileError, match="0 files map_all_splits"):
        register_splits(workspace, folder)
    write_splits(small.storage.read_table("folds"), folder / "map_all_splits_all_folds.csv")
    write_statistics(small.storage.read_table("normalization", fold=1), folder / "stats_agg_split_1.csv")
    with pytest.raises(PublishedFileError, match=r"of splits \[1\], not of 1 to 2"):
        register_splits(workspace, folder)
    write_statistics(small.storage.read_table("normalization", fold=2), folder / "stats_agg_split_2.csv")
    assert register_splits(workspace, folder) == {"glaciers": 9, "without": 0, "normalization": 2}


# -------------------------------------------------------------------------------------------------------- checkpoints
def _weights(model: ModelSettings) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(model, pretrained=False).state_dict()


def test_a_checkpoint_of_lightning_is_read_without_running_it(tmp_path: Path) -> None:
    weights = _weights(TINY)
    path = write_checkpoint(weights, TINY, tmp_path, split=2, seed=3)
    (found,) = find_checkpoints(tmp_path)
    assert (found.split, found.seed, found.epoch, found.validation_iou) == (2, 3, 7, 0.9012) and found.path == path
    read, facts = read_weights(path)
    assert facts["pytorch-lightning_version"] and set(read) == set(weights)
    state, proof = adopt(read, read_settings(found.settings), list(PUBLISHED_CHANNELS), TINY)
    for name, values in weights.items():
        if values.is_floating_point():
            torch.testing.assert_close(state[name], values, rtol=0, atol=0)
    assert not proof["permuted"] and proof["largest_difference"] <= 1e-5 and len(proof["input_sha256"]) == 64


def test_channels_in_another_order_are_put_in_ours(tmp_path: Path) -> None:
    model = settings_of(TINY, ["NDSI", "NDVI", "NDWI"])["model"]
    order = channels_of(model)
    assert order[5:8] == ["ndsi", "ndvi", "ndwi"] and sorted(order) == sorted(PUBLISHED_CHANNELS)
    assert channels_of(settings_of(TINY)["model"]) == list(PUBLISHED_CHANNELS) == channels_of({})
    weights = _weights(TINY)
    state, proof = adopt(weights, model, order, TINY)
    assert proof["permuted"]
    first = next(k for k, v in weights.items() if v.ndim == 4)  # a state_dict is in the order of the network
    torch.testing.assert_close(state[first][:, list(PUBLISHED_CHANNELS).index("ndsi")], weights[first][:, 5])


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    weights, model = _weights(TINY), settings_of(TINY)["model"]
    with pytest.raises(PublishedFileError, match=r"Unet with resnet18, the region's is Unet with resnet34"):
        adopt(weights, model, PUBLISHED_CHANNELS, TINY.model_copy(update={"encoder": "resnet34"}))
    with pytest.raises(PublishedFileError, match="other channels"):
        adopt(weights, model, [*PUBLISHED_CHANNELS[:-1], "velocity"], TINY)
    with pytest.raises(PublishedFileError, match="inputs, its settings name 17"):
        adopt(weights, model, [*PUBLISHED_CHANNELS, "velocity"],
              TINY.model_copy(update={"channels": [*PUBLISHED_CHANNELS, "velocity"]}))  # fmt: skip
    with pytest.raises(PublishedFileError, match="do not fit"):
        adopt({k: v for k, v in weights.items() if "decoder" not in k}, model, PUBLISHED_CHANNELS, TINY)
    with pytest.raises(PublishedFileError, match="ends in 'softmax'"):
        adopt(weights, {**model, "args": {**model["args"], "activation": "softmax"}}, PUBLISHED_CHANNELS, TINY)
    path = tmp_path / "a.ckpt"
    for content, words in (
        ({"state_dict": {"encoder.x": torch.zeros(1)}}, "has no weights model.seg_model"),
        ({"weights": 1}, "no state_dict"),
        ({"state_dict": {"model.seg_model.x": torch.full((1,), torch.nan)}}, "no numbers"),
    ):
        torch.save(content, path)
        with pytest.raises(PublishedFileError, match=words):
            read_weights(path)
    path.write_bytes(b"nothing")
    with pytest.raises(PublishedFileError, match="is not read"):
        read_weights(path)


class _Opens:
    """Pickled, it would touch a file when it is read."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": _Opens(tmp_path / "proof")}, tmp_path / "evil.ckpt")
    with pytest.raises(PublishedFileError, match="could run code"):
        read_weights(tmp_path / "evil.ckpt")
    assert not (tmp_path / "proof").exists()


def test_folders_of_mixed_checkpoints_are_refused(small: Small, tmp_path: Path) -> None:
    workspace = small.copy(tmp_path / "copy").workspace()
    with pytest.raises(PublishedFileError, match="holds no split_"):
        find_checkpoints(tmp_path)
    place = tmp_path / "m" / "split_1" / "seed_1" / "version_0"
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / "ckpt-epoch=01.ckpt").write_bytes(b"x")
    with pytest.raises(PublishedFileError, match="split_1 has 1 checkpoints, the region has 2 members"):
        register_checkpoints(workspace, tmp_path / "m")
    (place / "checkpoints" / "ckpt-epoch=02.ckpt").write_bytes(b"y")
    with pytest.raises(PublishedFileError, match="several checkpoints"):
        find_checkpoints(tmp_path / "m")
    (place / "checkpoints" / "ckpt-epoch=02.ckpt").unlink()
    (place / "settings.yaml").write_text(yaml.safe_dump({"task": 1}))
    with pytest.raises(PublishedFileError, match="no part `model`"):
        read_settings(place / "settings.yaml")
    (place / "settings.yaml").write_text("model: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(PublishedFileError, match="can not be read"):
        read_settings(place / "settings.yaml")
    with pytest.raises(PublishedFileError, match="bands_input"):
        channels_of({"inputs": {"dem": True}})


# ---------------------------------------------------------------------------------------------------- tables, patches
def test_patches_of_the_published_layout(small: Small, tmp_path: Path) -> None:
    assert small.cli("export-published", str(tmp_path), "--year", "2015").exit_code == 0
    splits = tmp_path / "cv_split_outlines" / "map_all_splits_all_folds.csv"
    wide, table = tmp_path / "glacier_wide" / "2015", tmp_path / "norm_stats" / "stats_agg_split_1.csv"
    patches = PublishedPatches(wide, splits, 1, "train", statistics=table, size=64, n_folds=2)
    assert len(patches) > 10
    sample = patches[0]
    assert sample["image"].shape == (16, 64, 64) and sample["image"].dtype == torch.float32
    assert torch.isfinite(sample["image"]).all() and set(sample["mask"].unique().tolist()) <= {0, 1}
    loader = torch.utils.data.DataLoader(patches, batch_size=4)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 16, 64, 64) and len(batch["glacier_id"]) == 4
    folds = small.storage.read_table("folds")
    tested = set(folds.loc[(folds["fold"] == 1) & (folds["role"] == "test"), "glacier_id"])
    assert tested.isdisjoint({patches[i]["glacier_id"] for i in range(0, len(patches), 7)})
    doubled = PublishedPatches(
        wide, splits, 1, "train", size=64, n_folds=2, transforms=lambda s: {**s, "image": s["image"] * 2}
    )
    plain = PublishedPatches(wide, splits, 1, "train", size=64, n_folds=2)
    torch.testing.assert_close(doubled[0]["image"], plain[0]["image"] * 2)
    with pytest.raises(PublishedFileError, match="lacks the columns split_3"):
        PublishedPatches(wide, splits, 1, "train")


def test_a_patch_is_the_cube_around_its_centre(small: Small, tmp_path: Path) -> None:
    assert small.cli("export-published", str(tmp_path), "--year", "2015").exit_code == 0
    patches = PublishedPatches(
        tmp_path / "glacier_wide" / "2015", tmp_path / "cv_split_outlines" / "map_all_splits_all_folds.csv", 1, "test",
        size=32, n_folds=2,
    )  # fmt: skip
    number, row, column = patches._places[0]
    with open_cube(Path(str(small.storage.cube(2015, patches._files[number].glacier_id)))) as cube:
        stack, _ = channel_stack(cube, PUBLISHED_CHANNELS)
        glacier = cube_mask(cube, "any_glacier")
    square = np.s_[row - 16 : row + 16, column - 16 : column + 16]
    np.testing.assert_array_equal(patches[0]["mask"].numpy() == 1, glacier[square])
    np.testing.assert_array_equal(patches[0]["image"].numpy(), np.nan_to_num(stack)[:, *square])


def test_what_each_correction_moves(small: Small) -> None:
    read = small.storage.read_table
    table = regional_rates(
        read("baseline_areas"), read("areas", year=2017), read("glaciers"), small.region.change, 2017, 2015
    )
    steps = table["step"].drop_duplicates().tolist()
    assert steps[0] == "as published" and steps[-1].startswith("all together") and len(steps) >= 7
    measured = table[table["method"] == "measured"].set_index("step")
    first = measured.loc["as published"]
    assert first["moves_rate"] == 0 and first["moves_std"] == 0
    # Independent errors give a smaller deviation and the same rate, by definition.
    independent = measured.loc["errors of glaciers independent"]
    assert independent["moves_std"] < 0 and abs(independent["moves_rate"]) < 1e-12
    own = read("regional_changes", year=2017)
    own = own[(own["grouping"] == "region") & (own["method"] == "measured")].iloc[0]
    last = measured.iloc[-1]
    assert float(last["rate_pct_per_year"]) == pytest.approx(float(own["rate_pct_per_year"]))
    assert float(last["rate_std_pct_per_year"]) == pytest.approx(float(own["rate_std_pct_per_year"]))
    # Whole years, published intervals, both filters: the definition of the paper by hand.
    baseline = read("baseline_areas").set_index("glacier_id")
    areas = read("areas", year=2017).set_index("glacier_id").reindex(baseline.index)
    years = areas["image_date"].dt.year - baseline["image_date"].dt.year
    rate = float(((areas["area_km2"] - baseline["area_km2"]) / years).sum())
    assert float(first["rate_km2_per_year"]) == pytest.approx(rate)


def test_quality_of_maps_and_areas(small: Small) -> None:
    evaluation = small.storage.read_table("evaluation")
    table = map_quality(evaluation).set_index(["method", "definition"])
    ours = evaluation[(evaluation["role"] == "test") & (evaluation["method"] == "ensemble")]
    ring = ours[ours["scope"] == "ring"]
    row = table.loc[("ensemble", "paper")]
    assert row["iou"] == pytest.approx(ring["iou"].astype(float).mean()) and row["n_glaciers"] == len(ring)
    assert row["precision"] >= table.loc[("ensemble", "whole image"), "precision"]
    areas = small.storage.read_table("baseline_areas")
    sums = area_quality(areas).iloc[0]
    assert sums["area_km2"] == pytest.approx(areas["area_km2"].sum()) and 0 <= sums["inside"] <= 1
    assert sums["area_std_km2"] == pytest.approx(
        ((areas["upper_published_km2"] - areas["lower_published_km2"]) / 2).sum()
    )


def test_the_comparison_is_printed_and_written(small: Small, tmp_path: Path) -> None:
    done = small.cli("compare-published", "--year", "2017", "--file", str(tmp_path / "rates.csv"))
    assert done.exit_code == 0 and "Change 2015 to 2017, one correction at a time" in done.output
    assert len(pd.read_csv(tmp_path / "rates.csv")) > 15
    done = small.cli("compare-published", "--year", "2017", "--json")
    assert '"rates"' in done.output
