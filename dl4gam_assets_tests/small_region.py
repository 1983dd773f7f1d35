"""The small simulated region that tests of the whole chain share: settings, a run, the command line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from dl4gam_assets.cli import app
from dl4gam_assets.compute import Mapper
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.orchestrate import materialize
from dl4gam_assets.settings import Region, load_region, override
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.region_files import packaged

YEARS = (2015, 2016, 2017)
SMALL = {
    "name": "small",
    "years": {"first": 2015, "last": 2017, "baseline": 2015},
    "folds": {"n": 2, "validation_share": 0.2},
    "training.members": 2,
    "training.epochs": 16,  # a few seconds, and maps that are worth checking
    "training.train_patches": 256,
    "training.patch_px": 64,
    "simulation.size_px": [760, 760],
    "inventory.min_area_km2": 0.1,
    "compute.workers": 1,
}


class Small:
    """A materialized small region."""

    def __init__(self, home: Path):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        raw = packaged("demo")
        override(raw, SMALL)
        self.yaml = home / "small.yaml"
        self.yaml.write_text(yaml.safe_dump(raw))
        self.region: Region = load_region(self.yaml)
        self.storage = Storage(home / "small")

    def run(self, **choice: Any) -> Any:
        os.environ |= {"DL4GAM_HOME": str(self.home), "DL4GAM_REGION": str(self.yaml)}
        os.environ.pop("DAGSTER_HOME", None)
        try:
            return materialize(build_defs(self.region), self.region, self.storage, **choice)
        finally:
            for name in ("DL4GAM_HOME", "DL4GAM_REGION", "DAGSTER_HOME"):
                os.environ.pop(name, None)

    def workspace(self) -> Workspace:
        return Workspace(self.region, self.storage, Mapper(1))

    def cli(self, *words: str) -> Any:
        region = [] if words[0] in {"regions"} else ["--region", str(self.yaml), "--home", str(self.home)]
        # The command tells its workers by the environment, which is put back afterwards.
        told = {"DL4GAM_REGION": str(self.yaml), "DL4GAM_HOME": str(self.home)}
        return CliRunner().invoke(app, [*words, *region], env=told)

    def copy(self, home: Path) -> Small:
        """The same region with a store of its own."""
        made = Small(home)
        shutil.copytree(str(self.storage.root), str(made.storage.root), dirs_exist_ok=True)
        return made

    def change(self, **settings: Any) -> None:
        """Other settings, by dotted key with ``__`` for the dots."""
        raw = yaml.safe_load(self.yaml.read_text())
        override(raw, {key.replace("__", "."): value for key, value in settings.items()})
        self.yaml.write_text(yaml.safe_dump(raw))
        self.region = load_region(self.yaml)


def leave_a_member(region: Small) -> None:
    """What is left in a store whose ensembles had one member more before ``training.members`` was lowered."""
    for fold in range(1, region.region.folds.n + 1):
        members = region.storage.read_table("members", fold=fold)
        number = int(members["member"].max()) + 1
        extra = members.head(1).drop(columns=["fold", "member"]).assign(sha256="0" * 64)
        region.storage.write_table("members", extra, {"fold": fold, "member": number})
        source, target = (Path(str(region.storage.model(fold, m))) for m in (1, number))
        shutil.copytree(source, target)
