"""Bad scenes: files and items that are not what they should be.

Belongs here: damaging scenes of the simulated region, and comparing what is made from them with the undisturbed store.
Does not belong here: catalogs that fail as servers (``catalogs``).

Every damaged scene is a copy of the best one of the year, a few days apart. Its pixels are those of the best scene, so
whichever is chosen, a cube must hold the undisturbed pixels: a scene that is left out, or read right, changes none.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import Affine

from dl4gam_assets.cubes import open_cube
from dl4gam_assets.stages import cubes as cube_stages
from dl4gam_assets.stages import imagery
from dl4gam_assets_tests.faults.table import Bench, Outcome, fault
from dl4gam_assets_tests.small_region import Small

YEAR = 2016
BANDS = ("blue", "green", "red", "nir", "swir16")
#: Pixels and rasterio profile of a file -> those that are written instead.
Change = Callable[[np.ndarray, dict[str, Any]], tuple[np.ndarray, dict[str, Any]]]


@dataclass
class Scene:
    """A copy of a scene: its item and the folder of its files."""

    item: dict[str, Any]
    folder: Path

    def file(self, band: str) -> Path:
        return self.folder / f"{band}.tif"

    def rewrite(self, band: str, change: Change) -> None:
        with rasterio.open(self.file(band)) as source:
            values, profile = source.read(), dict(source.profile)
        values, profile = change(values, profile)
        self.file(band).unlink()
        with rasterio.open(self.file(band), "w", **profile) as target:
            target.write(values)


def _truncated(scene: Scene) -> None:
    for band in BANDS:
        content = scene.file(band).read_bytes()
        scene.file(band).write_bytes(content[: len(content) // 3])


def _zero_bytes(scene: Scene) -> None:
    scene.file("red").write_bytes(b"")


def _html(scene: Scene) -> None:
    scene.file("nir").write_text("<html><body>503 Service Unavailable</body></html>")


def _noise(scene: Scene) -> None:
    """The directory of the TIFF is whole, the pixels are not."""
    content = bytearray(scene.file("green").read_bytes())
    begin = len(content) // 4
    content[begin:-begin] = np.random.default_rng(1).bytes(len(content) - 2 * begin)
    scene.file("green").write_bytes(bytes(content))


def _dead_link(scene: Scene) -> None:
    scene.file("swir16").unlink()


def _missing_band(scene: Scene) -> None:
    del scene.item["assets"]["swir16"]


def _wrong_crs(scene: Scene) -> None:
    """All files, and the item, claim a zone that is not theirs: the ground is thousands of kilometres away."""
    for band in (*BANDS, "scl", "cloud_probability"):
        scene.rewrite(band, lambda values, profile: (values, profile | {"crs": "EPSG:32655"}))
    scene.item["properties"]["proj:code"] = "EPSG:32655"


def _no_crs(scene: Scene) -> None:
    scene.rewrite("blue", lambda values, profile: (values, profile | {"crs": None}))


def _wrong_extent(scene: Scene) -> None:
    """The item promises the glaciers, the files lie 50 km away."""
    for band in (*BANDS, "scl", "cloud_probability"):
        scene.rewrite(
            band,
            lambda values, profile: (
                values,
                profile | {"transform": Affine.translation(50_000, 0) @ profile["transform"]},
            ),
        )


def _all_cloud(scene: Scene) -> None:
    scene.rewrite("scl", lambda values, profile: (np.full_like(values, 9), profile))
    scene.rewrite("cloud_probability", lambda values, profile: (np.full_like(values, 100), profile))
    for band in BANDS:
        scene.rewrite(band, lambda values, profile: (np.full_like(values, 7000), profile))


def _all_nodata(scene: Scene) -> None:
    for band in (*BANDS, "scl"):
        scene.rewrite(band, lambda values, profile: (np.zeros_like(values), profile))


def _nan(scene: Scene) -> None:
    for band in BANDS:
        scene.rewrite(
            band,
            lambda values, profile: (
                np.full(values.shape, np.nan, "float32"),
                profile | {"dtype": "float32", "nodata": None, "predictor": 3},
            ),
        )
        scene.item["assets"][band].pop("raster:bands")
        scene.item["assets"][band]["raster:bands"] = [{"data_type": "float32", "scale": 1.0, "offset": 0.0}]


def _swapped_scale(scene: Scene) -> None:
    """The item says that the stored numbers are reflectance as they are: everything would be 10,000 times brighter."""
    for band in BANDS:
        scene.item["assets"][band]["raster:bands"][0]["scale"] = 1.0


def _inverse_scale(scene: Scene) -> None:
    """Scale and its inverse swapped, as some writers do."""
    for band in BANDS:
        scene.item["assets"][band]["raster:bands"][0]["scale"] = 10_000.0


def _no_scale(scene: Scene) -> None:
    for band in BANDS:
        scene.item["assets"][band]["raster:bands"][0].pop("scale")


def _one_band_darker(scene: Scene) -> None:
    """One band with another scale: its ratio to the others would be wrong everywhere."""
    scene.item["assets"]["swir16"]["raster:bands"][0]["scale"] = 1e-8


def _two_crs(scene: Scene) -> None:
    """One band lies elsewhere than the others."""
    scene.rewrite("red", lambda values, profile: (values, profile | {"crs": "EPSG:32655"}))


#: Name -> damage, and words of the reason that its candidates are told; None: the scene may be scored (and is whole).
DAMAGES: dict[str, tuple[Callable[[Scene], None], tuple[str, ...] | None]] = {
    "truncated files": (_truncated, ("S2", ".tif")),
    "a file of zero bytes": (_zero_bytes, ("red.tif",)),
    "HTML instead of a TIFF": (_html, ("nir.tif",)),
    "noise instead of pixels": (_noise, ("green.tif",)),
    "a link that is dead": (_dead_link, ("swir16.tif",)),
    "a band is missing": (_missing_band, ("swir16",)),
    "wrong CRS": (_wrong_crs, ()),
    "no CRS": (_no_crs, ("blue.tif",)),
    "wrong extent": (_wrong_extent, ()),
    "one band elsewhere": (_two_crs, ()),
    "all cloud": (_all_cloud, ()),
    "all nodata": (_all_nodata, ()),
    "NaN": (_nan, ()),
    "swapped scale": (_swapped_scale, ("scale",)),
    "inverse scale": (_inverse_scale, ("scale",)),
    "no scale": (_no_scale, ("scale",)),
    "one band with another scale": (_one_band_darker, ("scale",)),
}


def best_scene(small: Small) -> str:
    """Id of the scene that most glaciers of the year take, the only one of its day."""
    scenes = small.storage.read_table("scenes", year=YEAR)
    taken = scenes[scenes["selected"].astype(bool)]["scene_ids"].dropna()
    return str(taken[~taken.str.contains("[;,]")].mode().iloc[0])


def copy_scene(small: Small, scene: str, days: int) -> Scene:
    """A copy of a scene in the catalog, ``days`` later."""
    inputs = Path(str(small.storage.inputs()))
    (source,) = inputs.glob(f"stac/*/{scene}/{scene}.json")
    item = json.loads(source.read_text())
    when = dt.datetime.fromisoformat(item["properties"]["datetime"].replace("Z", "+00:00")) + dt.timedelta(days=days)
    name = scene.replace(scene.split("_")[2], when.strftime("%Y%m%d"))
    assert name != scene
    item = json.loads(json.dumps(item).replace(scene, name))
    item["properties"]["datetime"] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    for asset in item["assets"].values():
        asset.pop("file:checksum", None)
        asset.pop("file:size", None)
    folder = inputs / "scenes" / name
    shutil.copytree(inputs / "scenes" / scene, folder)
    return Scene(item, folder)


def add_item(small: Small, item: dict[str, Any], name: str | None = None) -> None:
    """Put an item into the collection, in a file of its own."""
    (index,) = Path(str(small.storage.inputs())).glob("stac/*/collection.json")
    target = index.parent / (name or item["id"]) / f"{name or item['id']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(item))
    content = json.loads(index.read_text())
    content["links"].append(
        {"rel": "item", "href": f"./{target.relative_to(index.parent)}", "type": "application/json"}
    )
    index.write_text(json.dumps(content))


def choose_and_build(small: Small) -> None:
    """Candidates, choice and cubes of the year anew, with the scenes that are there now."""
    ready = small.region.model_copy(update={"simulation": None, "data_root": str(small.storage.inputs())})
    ws = small.workspace()
    ws.region = ready
    for stage in (imagery.scene_candidates, imagery.selected_scenes, cube_stages.glacier_cubes):
        stage(ws, YEAR, force=True)


def differing_cubes(small: Small, truth: Small) -> dict[str, str]:
    """Glaciers whose cube holds other pixels than the undisturbed one ("another red"), or is "missing"."""
    wrong = {}
    for glacier in truth.storage.read_table("cubes", year=YEAR)["glacier_id"]:
        if glacier not in set(small.storage.read_table("cubes", year=YEAR)["glacier_id"]):
            wrong[glacier] = "missing"
            continue
        mine, theirs = (open_cube(s.storage.cube(YEAR, glacier)) for s in (small, truth))
        with mine, theirs:
            for name in theirs.data_vars:
                if not np.array_equal(mine[name].values, theirs[name].values, equal_nan=theirs[name].dtype.kind == "f"):
                    wrong[glacier] = f"another {name}"
                    break
    return wrong


@fault("bad scenes", "damaged copies of the best scene")
def damaged(bench: Bench) -> dict[str, Outcome]:
    """All damages at once, each in a scene of its own."""
    small = bench.copy(without=("predictions", "reports", "stac", "candidates", "models", "packed"))
    best = best_scene(bench.small)
    names = {}
    for number, (label, (damage, _)) in enumerate(DAMAGES.items()):
        scene = copy_scene(small, best, number - len(DAMAGES) // 2 or 40)
        damage(scene)
        add_item(small, scene.item)
        names[label] = scene.item["id"]
    duplicate = copy_scene(small, best, 25)
    for suffix in ("", "_again"):  # of the same tile and day twice, one of them twice under the same id
        add_item(small, duplicate.item | {"id": duplicate.item["id"] + suffix})
    add_item(small, duplicate.item, name="copied")
    names["duplicate items"] = duplicate.item["id"]
    choose_and_build(small)
    candidates = small.storage.read_table("candidates", year=YEAR)
    scenes = small.storage.read_table("scenes", year=YEAR)
    failures = small.storage.read_table("failures", stage="glacier_cubes", partition=str(YEAR)).set_index("glacier_id")
    undisturbed = bench.small.storage.read_table("scenes", year=YEAR)
    whole = undisturbed[undisturbed["selected"].astype(bool) & (undisturbed["scene_ids"] == best)]["glacier_id"]
    differing = differing_cubes(small, bench.small)
    outcomes = {}
    for label, name in names.items():
        mine, ranked, taken = (
            frame[frame["scene_ids"].fillna("").str.contains(name) & frame["glacier_id"].isin(whole)]
            for frame in (candidates, scenes, scenes[scenes["selected"].astype(bool)])
        )
        reasons = [*mine["reason"].dropna(), *ranked["reason"].dropna()]
        lost = [g for g in taken["glacier_id"] if g in failures.index]
        outcome = Outcome(str(failures.loc[lost[0], "error"]) if lost else reasons[0] if reasons else "")
        for words in DAMAGES.get(label, (None, None))[1:]:
            outcome.names(*(words or ()))
        outcome.expect(len(mine) == len(whole), "not every glacier has a candidate row that tells of it")
        if lost:  # no image of that year, and a row that says so and what to do
            outcome.names(name, "next best image is of 2016-", "imagery.overrides")
        outcomes[label] = outcome
    for glacier, what in differing.items():
        for outcome in outcomes.values():
            outcome.expect(what == "missing" and glacier in failures.index, f"cube of {glacier}: {what}")
    return outcomes
