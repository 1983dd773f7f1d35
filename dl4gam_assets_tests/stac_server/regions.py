"""A small simulated region to serve, and how a region is told to ask the server.

Belongs here: settings of the small region, its store, comparing the results of two stores.
Does not belong here: assertions (tests).
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from dl4gam_assets.compute import Mapper
from dl4gam_assets.settings import Region, parse_region
from dl4gam_assets.stages import cubes, imagery, inventory, simulation, terrain
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.region_files import packaged

Json = dict[str, Any]

#: Six glaciers of 0.03 to 0.25 km2 under two tiles; nine dates in two years, some cloudy, some on one tile only.
BASELINE, YEAR = 2015, 2016
_SMALL: Json = {
    "name": "loopback",
    "years": {"first": BASELINE, "last": YEAR, "baseline": BASELINE},
    "simulation": {"kind": "demo", "seed": 1, "size_px": [400, 400]},
    "folds": {"n": 2, "validation_share": 0.3},
}
#: Network and ensemble of the small region, where its whole chain is run.
_TINY: Json = {"members": 1, "epochs": 1, "train_patches": 24, "patch_px": 64}


def small_settings() -> Json:
    """Settings of the small region, as a mapping like that of a region file: the demo's, smaller."""
    raw: Json = packaged("demo")
    raw |= copy.deepcopy(_SMALL)
    raw["training"] |= _TINY
    raw["baseline"] = {"random_forest": False}
    raw["inventory"]["min_area_km2"] = 0.03
    raw["imagery"]["margin_m"] = 300
    raw["compute"] |= {"workers": 1, "read_attempts": 3, "read_stall_s": 1}
    return raw


def asking(raw: Json, url: str, collections: Sequence[str], **catalog: Any) -> Json:
    """The settings of a region with its scenes behind a STAC API."""
    out = copy.deepcopy(raw)
    out["imagery"]["catalog"] = {"kind": "stac-api", "url": url, "collections": list(collections), **catalog}
    return out


class Store:
    """A region's settings and the folder of its results."""

    def __init__(self, folder: Path, raw: Json):
        self.folder, self.raw = folder, raw

    @property
    def region(self) -> Region:
        """The settings, checked."""
        return parse_region(self.raw)

    @property
    def ws(self) -> Workspace:
        """A workspace that works in this process."""
        return Workspace(self.region, Storage(self.folder), Mapper(1))

    @property
    def inputs(self) -> Path:
        """Folder of the region's inputs."""
        return self.folder / "inputs"

    def table(self, name: str, **where: Any) -> pd.DataFrame:
        """A table of the store."""
        return self.ws.storage.read_table(name, **where)

    def prepare(self) -> None:
        """Everything before imagery, and the terrain."""
        ws = self.ws
        simulation.simulated_inputs(ws)
        inventory.inventory_outlines(ws)
        inventory.debris_outlines(ws)
        inventory.glacier_zones(ws)
        terrain.elevation(ws)
        for year in self.region.years.all():
            terrain.elevation_change(ws, year)

    def run(self, year: int) -> dict[str, Json]:
        """From candidates to cubes; returns what the stages say."""
        ws = self.ws
        return {
            "scene_candidates": imagery.scene_candidates(ws, year).metadata,
            "selected_scenes": imagery.selected_scenes(ws, year).metadata,
            "glacier_cubes": cubes.glacier_cubes(ws, year).metadata,
        }

    def copy(self, folder: Path, raw: Json, *, scenes: bool = False) -> Store:
        """The same store with other settings in another folder, by default without catalog and scenes in its inputs,
        and always without anything that was made of them."""
        without = {"candidates", "scenes", "cubes", "items", "previews"}
        if not scenes:
            without |= {"stac"}

        def ignore(where: str, names: list[str]) -> set[str]:
            inside = Path(where).relative_to(self.folder).as_posix()
            if inside == "." or inside == "tables":
                return without & set(names)
            if inside == "state":
                return {"scene_candidates", "selected_scenes", "glacier_cubes"} & set(names)
            if inside == "inputs" and not scenes:
                return {"stac", "scenes"} & set(names)
            return set()

        shutil.copytree(self.folder, folder, ignore=ignore)
        return Store(folder, raw)


@functools.cache
def small_store(folder: Path) -> Store:
    """The small region with its catalog on disk, run up to its cubes; made once a process."""
    store = Store(folder / "small", small_settings())
    store.prepare()
    for year in store.region.years.all():
        store.run(year)
    return store


# ------------------------------------------------------------------------------------------------- comparing stores
def differences(one: Storage, other: Storage, years: Sequence[int]) -> list[str]:
    """What differs between two stores of a region, from the candidates to the cubes' pixels, but for addresses.

    Empty where nothing does. Each line names the table or file.
    """
    out = []
    for year in years:
        for table in ("candidates", "scenes", "cubes"):
            a, b = (_comparable(storage.read_table(table, year=year)) for storage in (one, other))
            try:
                pd.testing.assert_frame_equal(a, b)
            except AssertionError as error:
                out.append(f"{table} {year}: {' '.join(str(error).split())[:300]}")
        for glacier in sorted(set(one.read_table("cubes", year=year)["glacier_id"])):
            a_path, b_path = (Path(str(storage.cube(year, glacier))) for storage in (one, other))
            if not b_path.exists():
                out.append(f"cube {glacier} {year}: only in one")
                continue
            with xr.open_dataset(a_path, decode_cf=False) as a_cube, xr.open_dataset(b_path, decode_cf=False) as b_cube:
                names = set(a_cube.variables) | set(b_cube.variables)
                out += [
                    f"cube {glacier} {year}: {name}"
                    for name in sorted(map(str, names))
                    if name not in a_cube
                    or name not in b_cube
                    or not np.array_equal(a_cube[name].values, b_cube[name].values)
                ]
    return out


def _comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table in a fixed order, without addresses and sizes of files."""
    plain = stated(frame.drop(columns=[c for c in ("hrefs", "size_bytes") if c in frame]))
    keys = [c for c in ("glacier_id", "date", "scene_ids") if c in plain]
    return plain.sort_values(keys).reset_index(drop=True)


def stated(frame: pd.DataFrame) -> pd.DataFrame:
    """A table with the checksums as items state them: files on disk have their own identity behind it."""
    if "checksums" not in frame:
        return frame
    return frame.assign(checksums=frame["checksums"].str.replace(r" \d+:[0-9a-f]{16}", "", regex=True))
