"""Real images from outlines to answers: ten Swiss glaciers with one member of one epoch, and every command about them.

Its maps are worth nothing (an epoch is no training); what is checked is that lineage, staleness and publication answer
for a region whose scenes are plain files in a folder. The 1,400 outlines alone take more than a minute, so it runs only
where it is asked for: ``DL4GAM_REAL_CHAIN=1``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import rasterio
import yaml
from typer.testing import CliRunner

from dl4gam_assets.cli import app
from dl4gam_assets.compute import Mapper, close_clusters
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.lineage import compare, explain, open_results
from dl4gam_assets.orchestrate import materialize
from dl4gam_assets.settings import Region, load_region, override
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.stages.staleness import find_stale
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.region_files import packaged

pytestmark = pytest.mark.skipif(not os.environ.get("DL4GAM_REAL_CHAIN"), reason="minutes: set DL4GAM_REAL_CHAIN=1")
GLACIER, YEAR = "B43-03", 2018
FEW = {
    "folds.n": 2, "training.members": 1, "training.epochs": 1, "training.train_patches": 16, "baseline.random_forest":
    False, "compute.workers": 1,
}  # fmt: skip


class Swiss:
    """The region in a store of its own, over scenes that a test may change."""

    def __init__(self, home: Path, data: Path):
        self.home, self.data, self.yaml = home, home / "data", home / "swiss.yaml"
        self.data.mkdir()
        for folder in data.iterdir():
            if folder.name in {"swiss_s2_pairs", "rhone_s2_series"}:
                shutil.copytree(folder, self.data / folder.name)
            else:
                (self.data / folder.name).symlink_to(folder)
        raw = packaged("swiss")
        override(raw, {"data_root": str(self.data), **FEW})
        self.yaml.write_text(yaml.safe_dump(raw))
        self.region: Region = load_region(self.yaml)
        self.storage = Storage(home / "swiss")

    def workspace(self) -> Workspace:
        return Workspace(self.region, self.storage, Mapper(1))

    def cli(self, *words: str) -> Any:
        return CliRunner().invoke(app, [*words, "--region", str(self.yaml), "--home", str(self.home)])


@pytest.fixture(scope="module")
def swiss(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Swiss(tmp_path_factory.mktemp("swiss"), real_data)
    os.environ |= {"DL4GAM_HOME": str(made.home), "DL4GAM_REGION": str(made.yaml)}
    try:
        done = materialize(build_defs(made.region), made.region, made.storage, years=[2015, YEAR])
        assert done.failed == []
    finally:
        for name in ("DL4GAM_HOME", "DL4GAM_REGION", "DAGSTER_HOME"):
            os.environ.pop(name, None)
    yield made
    close_clusters()


def test_an_estimate_is_explained_and_made_again(swiss: Swiss) -> None:
    story = explain(swiss.storage, swiss.region, GLACIER, YEAR)
    assert story.provenance.dem_source is None and all(r.checksum for r in story.inputs if r.kind == "scene")
    done = swiss.cli("explain", GLACIER, "--year", str(YEAR))
    assert done.exit_code == 0 and story.provenance.scene_ids in done.output
    done = swiss.cli("reproduce", GLACIER, "--year", str(YEAR), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "same bits"


def test_the_year_is_exported(swiss: Swiss, tmp_path: Path) -> None:
    done = swiss.cli("export", str(tmp_path / "out"), "--year", str(YEAR))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / f"report_{YEAR}.html").is_file() and (tmp_path / "out" / "results.duckdb").is_file()


def test_the_store_and_its_database_agree(swiss: Swiss) -> None:
    assert compare(open_results(str(swiss.storage.root)), open_results(f"{swiss.storage.root}/results.duckdb")).same


def test_files_of_a_scene_folder_are_followed_one_by_one(swiss: Swiss) -> None:
    """Touched files are the same; another file of a scene concerns the glaciers whose image it is, and no other."""
    files = sorted((swiss.data / "swiss_s2_pairs").glob("S2_*.tif"))
    for file in files:
        file.touch()
    found = find_stale(swiss.workspace())
    assert found.current and not len(found.estimates)
    done = swiss.cli("status")
    assert done.exit_code == 0 and "partitions match their inputs" in done.output
    scenes = swiss.storage.read_table("scenes", year=YEAR)
    chosen = scenes[scenes["selected"].astype(bool) & (scenes["glacier_id"] != GLACIER)].iloc[0]
    (address,) = {h for f in json.loads(chosen["hrefs"]).values() for h in f.values()}
    with rasterio.open(address) as source:
        profile, values = source.profile, source.read()
    with rasterio.open(address, "w", **profile) as target:
        target.write((values * 0.9).astype(values.dtype))
    holding = scenes[scenes["scene_ids"] == chosen["scene_ids"]]
    using = set(holding.loc[holding["selected"].astype(bool), "glacier_id"])
    found = find_stale(swiss.workspace())
    assert set(zip(found.estimates["glacier_id"], found.estimates["year"], strict=True)) == {
        (g, YEAR) for g in holding["glacier_id"]
    }
    assert set(found.estimates.loc[found.estimates["state"] == "stale", "glacier_id"]) == using
    # Beside another scene of the folder, which may give any glacier another image.
    name = Path(address).name
    shutil.copy(address, Path(address).with_name(name.replace(name.split("_")[-1], f"{YEAR}0930.tif")))
    found = find_stale(swiss.workspace())
    mine = found.estimates[found.estimates["year"] == YEAR]
    assert set(mine.loc[mine["state"] == "stale", "glacier_id"]) == using
    assert set(mine["glacier_id"]) == set(swiss.storage.read_table("areas", year=YEAR)["glacier_id"])
