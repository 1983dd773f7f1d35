"""Wrong and mixed files are refused with the reason; right ones are read as their authors write them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
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
from dl4gam_assets.published.checkpoints import _stand_ins
from dl4gam_assets.published.comparison import area_quality, map_quality, regional_rates
from dl4gam_assets.published.layout import date_of, dates_in
from dl4gam_assets.segmentation import build_model
from dl4gam_assets.settings import PUBLISHED_CHANNELS, AreaSettings, ModelSettings
from dl4gam_assets.stages.published import (
    _tried_orders,
    _year_of,
    cubes_import,
    match_ids,
    member_import,
    register_checkpoints,
    register_cubes,
    register_splits,
    statistics_import,
)
from dl4gam_assets_tests.published.files import settings_of, write_as_rioxarray, write_checkpoint
from dl4gam_assets_tests.small_region import Small

BUFFERS = (-20, -10, 0, 10, 20, 50)
TINY = ModelSettings(encoder="resnet18", encoder_depth=3, decoder_channels=[32, 16, 8], encoder_weights=None)


@pytest.fixture
def cube_file(small: Small, tmp_path: Path) -> tuple[Path, xr.Dataset]:
    """A cube of the small region in the published layout, and ours."""
    cubes = small.storage.read_table("cubes", year=2016)
    row = cubes[cubes["image_date"] == "2016-08-14"].iloc[0]
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
@pytest.mark.parametrize("plain", [False, True])
def test_a_file_as_rioxarray_writes_it(plain: bool, cube_file: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    """The published files: every layer with its own CRS by rioxarray, thirteen bands, integer and float layers."""
    pytest.importorskip("rioxarray")
    path, ours = cube_file
    other = tmp_path / "rio" / path.parent.name / "20160814T102030_whatever.nc"
    write_as_rioxarray(path, other, plain=plain)

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
    "no slope": (lambda d: d.drop_vars("slope"), "lacks slope"),
    "no debris": (lambda d: d.drop_vars("mask_debris"), "lacks mask_debris"),
    "an axis too many": (lambda d: d.assign(slope=d["slope"].expand_dims("time")), "slope lies over time, y, x"),
    "a band twice": (
        lambda d: _named(d, ["B", "G", "R", "B4", *d["band_data"].attrs["long_name"][4:]]),
        "several bands red",
    ),
    "fractions": (
        lambda d: d.assign(band_data=_attrs(d, d["band_data"].where(d["band_data"] < 0, 0.25))),
        "everywhere",
    ),
    "reflectance": (lambda d: d.assign(band_data=_attrs(d, d["band_data"] * 1e-4)), "no reflectance in steps"),
    "a band that is no image": (lambda d: d.assign(band_data=_flat(d)), "band swir16 is 40 everywhere"),
    "classes": (lambda d: d.assign(mask_nok=d["mask_nok"] + 3), "mask_nok holds [34], and not only 0 and 1"),
    "another date": (lambda d: d.assign_attrs(fn="20160906T102559_raw.tif"), "2016-08-14, but was made from 20160906"),
    "ids": (lambda d: d.assign(mask_all_g_id=d["mask_all_g_id"] + 1e12), "no ids of glaciers"),
}


def _attrs(data: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    kept = {k: v for k, v in data["band_data"].attrs.items() if k != "_FillValue"}
    return values.astype(np.float32).assign_attrs(kept)


def _flat(data: xr.Dataset) -> xr.DataArray:
    values = data["band_data"].copy(deep=True)
    values[data["band_data"].attrs["long_name"].index("SWIR")] = 40
    return values


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


@pytest.mark.timeout(1200)
def test_one_bad_file_is_a_row_and_loses_no_other(small: Small, tmp_path: Path) -> None:
    """And what follows: it is repaired, another is corrected, the folder moves, and then all files are garbage."""
    done = small.cli("export-published", str(tmp_path / "out"), "--year", "2015")
    assert done.exit_code == 0, done.output
    wide = tmp_path / "out" / "glacier_wide" / "2015"
    files = sorted(wide.rglob("*.nc"))
    whole = files[0].read_bytes()
    files[0].write_bytes(b"CDF nonsense")
    taken = Small(tmp_path / "taken")

    def take(folder: Path) -> Any:
        return taken.cli("import-cubes", str(folder), "--year", "2015")

    done = take(wide)
    assert done.exit_code == 0 and f"2015: {len(files) - 1} cubes converted, 1 refused" in done.output, done.output
    assert f"cube {files[0]} can not be read" in done.output
    assert taken.storage.read_table("cubes", year=2015)["glacier_id"].nunique() == len(files) - 1
    failures = taken.storage.read_table("failures")
    mine = failures[failures["glacier_id"] == files[0].parent.name]
    assert len(mine) and mine["error"].str.contains(str(files[0]), regex=False).any()

    files[0].write_bytes(whole)
    before = taken.storage.read_table("elevations").set_index("glacier_id")
    with xr.open_dataset(files[1], decode_coords="all", mask_and_scale=False) as source:
        data = source.load()
    size = files[1].stat().st_size
    data["dem"] += 100  # a corrected file
    files[1].unlink()
    data.to_netcdf(files[1])
    assert files[1].stat().st_size != size
    shutil.move(wide, tmp_path / "moved")
    done = take(tmp_path / "moved")
    assert done.exit_code == 0 and "refused" not in done.output, done.output
    after = taken.storage.read_table("elevations").set_index("glacier_id")
    moved = after["elevation_mean_m"] - before["elevation_mean_m"].reindex(after.index)
    assert moved[files[1].parent.name] == pytest.approx(100, abs=0.5) and moved.drop(files[1].parent.name).max() == 0
    hrefs = taken.storage.read_table("candidates", year=2015)["hrefs"]
    assert len(hrefs) == len(files) and hrefs.str.contains(str(tmp_path / "moved"), regex=False).all()

    cubes = taken.storage.read_table("cubes", year=2015)
    for file in (tmp_path / "moved").rglob("*.nc"):  # they open, and are no cubes of glaciers
        with xr.open_dataset(file, decode_coords="all", mask_and_scale=False) as source:
            data = source.load()
        file.unlink()
        data.drop_vars("mask_nok").to_netcdf(file)
    done = take(tmp_path / "moved")
    assert done.exit_code == 1, done.output
    assert f"none of the {len(files)} published cubes of 2015" in " ".join(done.output.split())
    for file in (tmp_path / "moved").rglob("*.nc"):
        file.write_bytes(b"garbage")
    done = take(tmp_path / "moved")
    assert done.exit_code == 1 and f"none of its {len(files)} files can be read" in " ".join(done.output.split())
    pd.testing.assert_frame_equal(taken.storage.read_table("cubes", year=2015), cubes)
    assert len(taken.storage.read_table("elevations")) == len(after)


def _archive(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w:xz" if path.name.endswith("xz") else "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def _within(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_archives_hold_plain_names(cube_file: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    path, ours = cube_file
    archive = tmp_path / "2016.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, f"data/glacier_wide/2016/{path.parent.name}/{path.name}")
        tar.addfile(tarfile.TarInfo("data/readme.txt"))
        tar.addfile(tarfile.TarInfo(f"data/glacier_wide/2016/{path.parent.name}/._{path.name}"))  # of macOS
        link = tarfile.TarInfo("data/x/2016-08-14.nc")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    folder = unpack_cubes(archive, tmp_path / "unpacked")
    assert _within(folder) == [f"{path.parent.name}/{path.name}"]
    np.testing.assert_array_equal(
        _back(folder / path.parent.name / path.name, ours)["mask"].to_numpy(), ours["mask"].to_numpy()
    )
    for name in ("../../evil.nc", "a/../../x/..nc", "a/b c\n/2016.nc", ".x/2016-08-14.nc", "2016-08-14.nc"):
        with pytest.raises(PublishedFileError, match=r"is no <entry_id>/<date>\.nc"):
            unpack_cubes(_archive(archive, [(name, b"x")]), tmp_path / "evil" / "inside")
        assert _within(tmp_path / "evil") == [] and not (tmp_path / "evil.nc").exists()
    with pytest.raises(PublishedFileError, match=r"g_1/2016-08-14.nc twice"):
        unpack_cubes(_archive(archive, [(f"{a}/g_1/2016-08-14.nc", b"x") for a in "ab"]), tmp_path / "evil")
    with pytest.raises(PublishedFileError, match="holds no cubes"):
        unpack_cubes(_archive(archive, [("readme.txt", b"x")]), tmp_path / "evil")
    assert list((tmp_path / "evil").iterdir()) == [tmp_path / "evil" / "inside"]


@pytest.mark.parametrize("kind", ["no archive", "checksum", "cut", "flipped", "cut plain", "end mark", "flipped xz"])
def test_damaged_archives_leave_nothing(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = [(f"inv/g_{i}/2015-08-29.nc", rng.bytes(30_000)) for i in range(3)]
    whole = _archive(
        tmp_path / f"a.tar{'.xz' if 'xz' in kind else '' if kind in {'cut plain', 'end mark'} else '.gz'}", members
    )
    content = bytearray(whole.read_bytes())
    if kind == "no archive":
        content = bytearray(b"no archive")
    elif kind == "checksum":  # the last eight bytes of gzip, behind all that tar reads
        content[-8] ^= 1
    elif kind == "cut":
        del content[-20_000:]
    elif kind in {"flipped", "flipped xz"}:
        content[len(content) // 2] ^= 0xFF
    elif kind == "cut plain":  # at the begin of the third header: the standard library takes it for the end
        del content[2 * (512 + 30_208) :]
    else:  # a header that is nonsense, too
        content[2 * (512 + 30_208) + 100] ^= 0xFF
    whole.write_bytes(bytes(content))
    with pytest.raises(PublishedFileError, match="can not be unpacked, it is damaged"):
        unpack_cubes(whole, tmp_path / "unpacked")
    assert list((tmp_path / "unpacked").iterdir()) == []
    folder = unpack_cubes(_archive(whole, members), tmp_path / "unpacked")  # the same name, whole
    assert len(_within(folder)) == 3 and unpack_cubes(whole, tmp_path / "unpacked") == folder


def test_a_corrected_archive_is_another_one(tmp_path: Path) -> None:
    """Files of the same size and name: what counts is what is in them."""
    archive = tmp_path / "2016.tar.gz"
    folders = [
        unpack_cubes(_archive(archive, [("2016/g_1/2016-08-14.nc", text)]), tmp_path / "unpacked")
        for text in (b"old", b"new")
    ]
    assert folders[0] != folders[1]
    assert [(f / "g_1" / "2016-08-14.nc").read_bytes() for f in folders] == [b"old", b"new"]


def _bare(small: Small, home: Path, **glaciers: Any) -> Small:
    """A store that has the inventory, and nothing else."""
    made = Small(home)
    table = small.storage.read_table("glaciers")
    made.storage.write_table("glaciers", table.assign(**glaciers))
    return made


def test_a_refused_archive_stands_in_nobodys_way(
    cube_file: tuple[Path, xr.Dataset], small: Small, tmp_path: Path
) -> None:
    path, _ = cube_file
    store, archive, content = _bare(small, tmp_path / "home"), tmp_path / "2016.tar.gz", path.read_bytes()
    workspace, unpacked = store.workspace(), Path(str(store.storage.path("imports", "unpacked")))
    with pytest.raises(PublishedFileError, match=r"2016.tar.gz: 1 of 1 glaciers are not in the inventory"):
        register_cubes(workspace, _archive(archive, [("x/g_9999/2016-08-14.nc", content)]))
    assert list(unpacked.iterdir()) == []
    mine = f"x/{path.parent.name}/2016-08-14.nc"
    assert register_cubes(workspace, _archive(archive, [(mine, content)]))["year"] == 2016
    first = cubes_import(store.storage, 2016)
    register_cubes(workspace, _archive(archive, [(mine, content + b"more")]))
    second = cubes_import(store.storage, 2016)
    assert first is not None and second is not None and first["path"] != second["path"]
    assert [str(p) for p in unpacked.iterdir()] == [second["path"]]  # the former is gone
    with pytest.raises(PublishedFileError, match="none of its 1 files can be read"):
        register_cubes(workspace, _archive(archive, [(mine, b"nonsense")]))
    assert cubes_import(store.storage, 2016) == second and Path(second["path"]).is_dir()


def test_the_baseline_has_images_of_the_inventory(
    cube_file: tuple[Path, xr.Dataset], small: Small, tmp_path: Path
) -> None:
    path, _ = cube_file
    store = _bare(small, tmp_path / "home")
    with pytest.raises(PublishedFileError, match=r"images are of 2016, not of the inventory's years \(2015\)"):
        register_cubes(store.workspace(), path.parents[1], 2015)
    dates = pd.to_datetime(["2015-08-29"] * 17 + ["2016-08-27"])
    store = _bare(small, tmp_path / "other", inventory_date=dates)
    assert register_cubes(store.workspace(), path.parents[1], 2015)["year"] == 2015
    with pytest.raises(PublishedFileError, match="registered as those of 2015"):
        register_cubes(store.workspace(), path.parents[1], 2016)
    shutil.copytree(path.parents[1], tmp_path / "copied")
    with pytest.raises(PublishedFileError, match="registered as those of 2015"):
        register_cubes(store.workspace(), tmp_path / "copied", 2016)


def test_pixels_that_nobody_calls_good_are_not(cube_file: tuple[Path, xr.Dataset]) -> None:
    path, ours = cube_file
    with xr.open_dataset(path, decode_coords="all", mask_and_scale=False) as source:
        data = source.load()
    data["mask_nok"][:] = 0
    data["mask_nok"][:2], data["mask_nok"][2:4] = -1, 1
    data["band_data"][0, 4:6], data["dem"][6:8] = -9999, -9999
    data["mask_all_g_id"] = data["mask_all_g_id"].where(data["mask_all_g_id"] >= 0, -9999)
    for name in data.data_vars:  # nothing names the missing values
        data[name].attrs.pop("_FillValue", None)
        data[name].encoding = {"_FillValue": None}
    path.unlink()
    data.to_netcdf(path)
    found = _back(path, ours)
    assert cube_mask(found, "not_ok")[:6].all() and not cube_mask(found, "not_ok")[6:].any()
    missing = np.isnan(found["reflectance"].to_numpy())
    assert missing[:, 4:6].any(axis=0).all() and not missing[:, :4].any() and not missing[:, 6:].any()
    assert (
        np.isnan(found["dem"].to_numpy()[6:8]).all() and np.isnan(found["dem"].to_numpy()).sum() == 2 * found.sizes["x"]
    )
    index = found["glacier_index"].to_numpy()
    assert index.min() == -1 and ((index >= 0) == (ours["glacier_index"].to_numpy() >= 0)).all()


def test_what_a_file_says_of_its_glacier(cube_file: tuple[Path, xr.Dataset]) -> None:
    path, ours = cube_file  # it says 1 km2
    assert _back(path, ours, area_km2=1.9) is not None
    for other in (0.4, 2.1):
        with pytest.raises(PublishedFileError, match=r"of a glacier of 1 km2 \(glacier_area\)"):
            _back(path, ours, area_km2=other)


def test_bands_by_number(cube_file: tuple[Path, xr.Dataset], tmp_path: Path) -> None:
    path, ours = cube_file
    numbers = {"B": "B2", "G": "B3", "R": "B04", "NIR": "B8", "SWIR": "B11"}
    with xr.open_dataset(path, decode_coords="all", mask_and_scale=False) as source:
        data = source.load()
    data["band_data"].attrs["long_name"] = [numbers.get(n, n) for n in data["band_data"].attrs["long_name"]]
    path.unlink()
    data.to_netcdf(path)
    np.testing.assert_array_equal(_back(path, ours)["reflectance"].to_numpy(), ours["reflectance"].to_numpy())
    pd.DataFrame({"var_name": ["B4", "dem"], "mu": [2000, 2500], "stddev": [500, 300]}).to_csv(tmp_path / "s.csv")
    assert read_statistics(tmp_path / "s.csv", ["red", "dem"])["mean"].tolist() == pytest.approx([0.2, 2500])


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("2023-08-21", "2023-08-21"), ("20230821", "2023-08-21"), ("20230821T102559_x", "2023-08-21"),
        ("20230821102559", "2023-08-21"), ("2023-08-21_S2A", "2023-08-21"), ("20231321", None), ("2023-0821", None),
        ("2023-08-211", None), ("12340821", None), ("S2A_20230821", None),
    ],
)  # fmt: skip
def test_dates_of_names(name: str, date: str | None) -> None:
    assert date_of(name) == (None if date is None else pd.Timestamp(date))


def test_dates_within_names() -> None:
    raw = "S2A_MSIL1C_20230821T102601_N0509_R065_T32TLS_20230822T141421.SAFE"
    assert sorted(map(str, dates_in(raw))) == ["2023-08-21", "2023-08-22"]
    assert dates_in("RGI60-11.00001_20231399") == set()


def test_ids_match_by_name_or_by_number() -> None:
    found, lost = match_ids(["g_0000", "g_0123", "RGI-1", "a%2Fb", "g_77"], ["0", "123", "RGI-1", "a/b"])
    assert found == {"g_0000": "0", "g_0123": "123", "RGI-1": "RGI-1", "a%2Fb": "a/b"} and lost == ["g_77"]
    for entries in (["g_0001", "1"], ["g_1", "g_0001"], ["a%2Fb", "a/b"]):
        with pytest.raises(PublishedFileError, match=f"{entries[0]} and {entries[1]} are both glacier"):
            match_ids(entries, ["1", "a/b"])


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
        np.testing.assert_allclose(again[column][used], statistics[column][used], rtol=1e-12)
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
    assert register_splits(workspace, folder) == {"glaciers": 9, "without": 0, "normalization": 2, "removed": 0}
    table = folder / "map_all_splits_all_folds.csv"
    assert register_splits(workspace, table)["removed"] == 0  # the same map: the tables are of it
    assert statistics_import(workspace.storage, 2) is not None
    wide = pd.read_csv(table)
    wide.loc[wide["split_1"] == "fold_train", "split_1"] = "fold_valid"
    wide.loc[wide.index[wide["split_1"] == "fold_valid"][0], "split_1"] = "fold_train"
    wide.to_csv(table, index=False)
    assert register_splits(workspace, table)["removed"] == 2
    assert statistics_import(workspace.storage, 1) is None and statistics_import(workspace.storage, 2) is None
    wide.loc[wide["split_2"] == "fold_valid", "split_2"] = "fold_train"
    wide.to_csv(table, index=False)
    with pytest.raises(PublishedFileError, match="split_2 has no modelled glacier that is fold_valid"):
        register_splits(workspace, table)


# -------------------------------------------------------------------------------------------------------- checkpoints
def _weights(model: ModelSettings) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(model, pretrained=False).state_dict()


def test_a_checkpoint_of_lightning_is_read_without_running_it(tmp_path: Path) -> None:
    weights = _weights(TINY)
    path = write_checkpoint(weights, TINY, tmp_path, split=2, seed=3, epoch=2)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, "last.ckpt"]
    (found,) = find_checkpoints(tmp_path)
    assert (found.split, found.seed, found.epoch, found.validation_iou) == (2, 3, 2, 0.9012) and found.path == path
    with pytest.raises(pickle.UnpicklingError, match=r"PosixPath|numpy"):  # what Lightning keeps with the arguments
        torch.load(path, weights_only=True)
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


def test_arguments_become_plain_paths_and_numbers(tmp_path: Path) -> None:
    """What stands in for numpy and pathlib, seen through the loader itself."""
    values = {
        "a": Path("/x/y.csv"),
        "b": np.float32(0.25),
        "c": np.int64(-7),
        "d": np.bool_(True),
        "e": np.float64(1e-4),
    }
    torch.save(values, tmp_path / "a.ckpt")
    with torch.serialization.safe_globals(_stand_ins()):
        found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert isinstance(found["a"], PurePosixPath) and not isinstance(found["a"], Path) and str(found["a"]) == "/x/y.csv"
    assert {k: v for k, v in found.items() if k != "a"} == {"b": 0.25, "c": -7, "d": True, "e": 1e-4}
    assert [type(found[k]) for k in "bcde"] == [float, int, bool, float]
    for other in (np.str_("x"), np.datetime64("2023-08-21"), np.zeros(2), yaml.safe_load):
        torch.save({"state_dict": {}, "extra": other}, tmp_path / "b.ckpt")
        with pytest.raises(PublishedFileError, match="is not read"):
            read_weights(tmp_path / "b.ckpt")


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
    second = place / "checkpoints" / "ckpt-epoch=02.ckpt"
    second.write_bytes(b"y")
    with pytest.raises(PublishedFileError, match="has several checkpoints"):
        find_checkpoints(tmp_path / "m")
    (place / "checkpoints" / "ckpt-epoch=01.ckpt").unlink()
    score = "w_JaccardIndex_val_epoch_avg_per_g"
    second.rename(place / "checkpoints" / f"ckpt-epoch=02-{score}=0.8100.ckpt")
    best = place / "checkpoints" / f"ckpt-epoch=01-{score}=0.9000.ckpt"
    best.write_bytes(b"z")
    (place / "checkpoints" / f"._ckpt-epoch=01-{score}=0.9500.ckpt").write_bytes(b"of macOS")
    (found,) = find_checkpoints(tmp_path / "m")
    assert found.path == best and found.set_aside == 1
    other = tmp_path / "m" / "split_1" / "seed_1" / "version_1" / "checkpoints" / f"ckpt-epoch=09-{score}=0.9000.ckpt"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"z")
    with pytest.raises(PublishedFileError, match="do not say which one is the best"):
        find_checkpoints(tmp_path / "m")
    (place / "settings.yaml").write_text(yaml.safe_dump({"task": 1}))
    with pytest.raises(PublishedFileError, match="no part `model`"):
        read_settings(place / "settings.yaml")
    (place / "settings.yaml").write_text(yaml.safe_dump(settings_of(TINY)))
    assert read_settings(place / "settings.yaml", split=1, seed=1)["name"] == "Unet"
    for other_place, words in (
        ({"split": 2, "seed": 1}, "data.split split_1"),
        ({"split": 1, "seed": 3}, "task.seed 1"),
    ):
        with pytest.raises(PublishedFileError, match=words):
            read_settings(place / "settings.yaml", **other_place)
    (place / "settings.yaml").write_text("model: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(PublishedFileError, match="can not be read"):
        read_settings(place / "settings.yaml")
    with pytest.raises(PublishedFileError, match="bands_input"):
        channels_of({"inputs": {"dem": True}})


@pytest.mark.timeout(1200)
def test_checkpoints_are_taken_all_or_none(small: Small, tmp_path: Path) -> None:
    store = small.copy(tmp_path / "copy")
    workspace = store.workspace()
    model = small.region.model
    for split in (1, 2):
        for seed in (1, 2):
            torch.manual_seed(10 * split + seed)
            weights = build_model(model, pretrained=False).state_dict()
            write_checkpoint(weights, model, tmp_path / "m", split=split, seed=seed, epoch=0)
    told = register_checkpoints(workspace, tmp_path / "m")
    assert told == {"folds": [1, 2], "members": 2, "checkpoints": 4, "set_aside": 0, "removed": []}
    before = [member_import(store.storage, *at) for at in ((1, 1), (1, 2), (2, 1), (2, 2))]

    def checkpoint(split: int, seed: int) -> Path:
        (one,) = (c.path for c in find_checkpoints(tmp_path / "m") if (c.split, c.seed) == (split, seed))
        return one

    whole = checkpoint(2, 2).read_bytes()
    for content, words in (
        (checkpoint(2, 1).read_bytes(), "is the same file as"),
        (whole[: len(whole) // 2], "is not read"),
    ):
        checkpoint(2, 2).write_bytes(content)
        with pytest.raises(PublishedFileError, match=words):
            register_checkpoints(workspace, tmp_path / "m")
    checkpoint(2, 2).write_bytes(whole)
    other = settings_of(model) | {"data": {"split": "split_1"}, "task": {"seed": 2}}
    file = checkpoint(2, 2).parents[1] / "settings.yaml"
    kept = file.read_text()
    file.write_text(yaml.safe_dump(other))
    with pytest.raises(PublishedFileError, match=r"are of data.split split_1, its folder is of split 2"):
        register_checkpoints(workspace, tmp_path / "m")
    file.write_text(kept)
    assert before == [member_import(store.storage, *at) for at in ((1, 1), (1, 2), (2, 1), (2, 2))]

    # A network that finds nothing, whatever the order of its indices, is not the one of its name.
    weights, _ = read_weights(checkpoint(1, 1))
    bias = next(k for k in weights if k.startswith("segmentation_head") and k.endswith("bias"))
    weights[bias] = torch.full_like(weights[bias], -50.0)
    entry = before[0]
    assert entry is not None
    with pytest.raises(PublishedFileError, match=r"its IoU is 0.000 at best, and 0.901 by its name"):
        _tried_orders(workspace.site, 1, weights, entry)

    shutil.rmtree(tmp_path / "m" / "unet" / "split_2")
    assert register_checkpoints(workspace, tmp_path / "m")["removed"] == [2]
    assert member_import(store.storage, 2, 1) is None and member_import(store.storage, 1, 2) == before[1]


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
    fewer = PublishedPatches(wide, splits, 1, "train", size=64, n_folds=2, extremes=False)
    assert set(fewer._places) < set(plain._places)
    # Listing reads masks alone, and cubes stay in memory as long as they are among the last ones.
    assert not fewer._kept
    shuffled = PublishedPatches(wide, splits, 1, "train", size=64, n_folds=2, keep=2)
    first = {number: i for i, (number, _, _) in reversed(list(enumerate(shuffled._places)))}
    for number in sorted(first)[:3]:
        torch.testing.assert_close(shuffled[first[number]]["image"], plain[first[number]]["image"])
    assert list(shuffled._kept) == sorted(first)[1:3]


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


def test_one_glacier_without_an_interval_takes_no_line_away(small: Small) -> None:
    read = small.storage.read_table
    baseline, areas, glaciers = read("baseline_areas"), read("areas", year=2017), read("glaciers")
    lost = areas["glacier_id"].iloc[0]
    holes = areas.assign(upper_published_km2=areas["upper_published_km2"].where(areas["glacier_id"] != lost))
    found, without = (
        regional_rates(b, a, glaciers, small.region.change, 2017, 2015)
        for b, a in (
            (baseline, holes),
            (baseline[baseline["glacier_id"] != lost], areas[areas["glacier_id"] != lost]),
        )
    )
    mine, theirs = (t[(t["step"] == "as published") & (t["method"] == "measured")].iloc[0] for t in (found, without))
    assert mine["left_out"] == 1 and theirs["left_out"] == 0 and mine["n_glaciers"] == len(areas) - 1
    for name in ("rate_km2_per_year", "rate_std_pct_per_year", "baseline_area_km2"):
        assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-12)
    own = found[(found["step"].str.startswith("all together")) & (found["method"] == "measured")].iloc[0]
    assert own["left_out"] == 0 and own["n_glaciers"] == len(areas)
    none = areas.assign(upper_published_km2=np.nan)
    assert "as published" not in set(regional_rates(baseline, none, glaciers, small.region.change, 2017, 2015)["step"])
    sums = area_quality(holes).iloc[0]
    assert sums["without_interval"] == 1 and sums["n_glaciers"] == len(areas)
    assert sums["area_km2"] == pytest.approx(areas["area_km2"].sum())


def test_other_areas_are_not_called_published(small: Small) -> None:
    read = small.storage.read_table
    tables = read("baseline_areas"), read("areas", year=2017), read("glaciers"), small.region.change, 2017, 2015
    for measured, name in (
        (AreaSettings(), "as published"),
        (AreaSettings(pixels="fractional"), "as published, but with fractional pixels"),
        (AreaSettings(pixels="fractional", shared_ground="once"),
         "as published, but with fractional pixels and shared ground counted once"),
    ):  # fmt: skip
        table = regional_rates(*tables, measured)
        assert table["step"].iloc[0] == name and table["moves_rate"].iloc[0] == 0


def test_debris_recall_is_of_glaciers_with_debris() -> None:
    rows = [
        {"glacier_id": f"g{i}", "role": "test", "method": "ensemble", "scope": scope, "iou": 0.8, "precision": 0.9,
         "recall": recall if scope == "debris" else 0.9, "f1": 0.9, "inventory_area_km2": 1.0, "debris_share": share}
        for i, (share, recall) in enumerate([(0.005, 1.0), (0.01, 1.0), (0.02, 0.4), (0.5, 0.2), (None, 1.0)])
        for scope in ("ring", "scene", "debris")
    ]  # fmt: skip
    table = map_quality(pd.DataFrame(rows))
    assert table["debris_recall"].tolist() == pytest.approx([0.3, 0.3])


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
    done = small.cli("compare-published", "--year", "2017", "--json", "--file", str(tmp_path / "tables"))
    told = json.loads(done.output)
    assert told["paper"]["rate_std_pct_per_year"] == 1.26 and told["paper"]["earlier_rate_std_pct_per_year"] == 0.71
    assert told["areas_as_published"] is True and len(told["rates"]) > 15
    tables = {f.stem: pd.read_csv(f) for f in (tmp_path / "tables").iterdir()}
    assert set(tables) == {"maps", "areas", "rates"}
    assert set(tables["maps"]["scope"]) >= {"ring", "scene"} and tables["maps"]["glacier_id"].nunique() == 9
    areas = small.storage.read_table("areas", year=2017)
    assert tables["areas"].groupby("year").size().to_dict() == {2015: 9, 2017: len(areas)}

    # A row computed again, from the areas alone: no filter, whole years, intervals as published, dependent errors.
    both = small.storage.read_table("baseline_areas").merge(areas, on="glacier_id", suffixes=("_0", "_1"))
    years = both["image_date_1"].dt.year - both["image_date_0"].dt.year
    rate = ((both["area_km2_1"] - both["area_km2_0"]) / years).sum()
    half = [((both[f"upper_published_km2_{i}"] - both[f"lower_published_km2_{i}"]) / 2 / years).sum() for i in (0, 1)]
    row = next(r for r in told["rates"] if (r["step"], r["method"]) == ("no quality filter", "measured"))
    assert row["rate_km2_per_year"] == pytest.approx(rate, rel=1e-9) and row["n_glaciers"] == len(both)
    assert row["rate_pct_per_year"] == pytest.approx(100 * rate / both["area_km2_0"].sum(), rel=1e-9)
    assert row["rate_std_pct_per_year"] == pytest.approx(100 * np.hypot(*half) / both["area_km2_0"].sum(), rel=1e-9)

    small = small.copy(tmp_path / "copy")
    small.change(areas__pixels="fractional")
    done = small.cli("compare-published", "--year", "2017")
    assert "This region measures areas with fractional pixels" in " ".join(done.output.split())
