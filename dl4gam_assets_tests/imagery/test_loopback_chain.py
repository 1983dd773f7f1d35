"""A whole small region from the command line, its scenes behind a STAC API in a process of its own.

Everything is as a user has it: the server's command writes the region file, ``dl4gam materialize`` does the rest, and
nothing but HTTP leads from one to the other.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xarray as xr
import yaml
from typer.testing import CliRunner

from dl4gam_assets.cli import app
from dl4gam_assets.compute import close_clusters
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.stac_server.__main__ import main
from dl4gam_assets_tests.stac_server.regions import BASELINE, YEAR, Store, differences, small_settings, small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a region file that asks a server, which runs."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "small.yaml").write_text(yaml.safe_dump(small_settings(), sort_keys=False))  # bands in their order
    words = ["--store", str(folder / "through-http"), "--port", "0", "--region", str(folder / "small.yaml")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dl4gam_assets_tests.stac_server", *words, "--write-region", str(folder / "http.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    command = process.stdout.readline()
    assert "dl4gam materialize" in command, process.communicate()[1]
    assert "no items yet" in process.stdout.readline()
    yield folder
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=15)
    assert process.returncode == 0, complaints
    asked = re.search(r"(\d+) requests, ([\d.]+) MB", said)
    assert asked is not None and int(asked[1]) > 100 and float(asked[2]) > 1, said


@pytest.fixture(scope="module")
def through_http(home: Path) -> Iterator[Storage]:
    """The region, materialized as a user does it."""
    done = CliRunner().invoke(app, ["materialize", "--region", str(home / "http.yaml"), "--home", str(home)])
    assert done.exit_code == 0, done.output
    yield Storage(home / "through-http")
    close_clusters()
    for name in ("DL4GAM_HOME", "DL4GAM_REGION", "DAGSTER_HOME"):
        os.environ.pop(name, None)


def test_every_table_has_rows_and_nothing_failed(through_http: Storage) -> None:
    assert not len(through_http.read_table("failures"))
    candidates = through_http.read_table("candidates")
    assert candidates["hrefs"].str.contains("http://127.0.0.1").all()
    for name in ("scenes", "cubes", "predictions", "areas", "changes", "regional_changes"):
        assert name in TABLES and len(through_http.read_table(name)), name
    assert set(through_http.read_table("areas")["year"]) == {BASELINE, YEAR}
    assert through_http.path("results.duckdb").exists()


def test_candidates_scenes_and_cubes_are_those_of_the_catalog_on_disk(
    through_http: Storage, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--store", str(through_http.root), "--compare", str(store.folder)]
    assert main(words) == 0, capsys.readouterr().out
    cubes = through_http.read_table("cubes")
    assert f"{len(cubes)} cubes" in capsys.readouterr().out and len(cubes) == 12


def test_a_comparison_can_fail(through_http: Storage, store: Store, tmp_path: Path) -> None:
    """One pixel of one cube, one score of one candidate."""
    other = Store(tmp_path / "other", store.raw)
    shutil.copytree(store.folder, other.folder)
    storage = other.ws.storage
    glacier = str(other.table("cubes", year=YEAR)["glacier_id"].iloc[0])
    path = Path(str(storage.cube(YEAR, glacier)))
    with xr.open_dataset(path, decode_cf=False) as cube:
        changed = cube.load()
    changed["reflectance"].values[0, 5, 5] += 1
    changed.to_netcdf(path)
    candidates = other.table("candidates", year=YEAR)
    candidates.loc[0, "ndsi"] += 1e-3
    storage.write_table("candidates", candidates.drop(columns="year"), {"year": YEAR})
    found = differences(through_http, storage, [YEAR])
    assert [line.split(":")[0] for line in found] == [f"candidates {YEAR}", f"cube {glacier} {YEAR}"]
    assert "ndsi" in found[0] and found[1].endswith("reflectance")
