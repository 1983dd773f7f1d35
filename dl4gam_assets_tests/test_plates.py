"""Plates: what they show, and what they say when there is nothing to show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from dl4gam_assets.cli import app
from dl4gam_assets.compute import Mapper
from dl4gam_assets.settings import parse_region
from dl4gam_assets.stages import imagery, inventory, plates, simulation
from dl4gam_assets.stages.base import UpstreamError, Workspace
from dl4gam_assets.storage import Storage

YEAR = 2016
GREEN = np.array(plates._CHOSEN)


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = yaml.safe_load((Path(plates.__file__).parents[1] / "regions" / "demo.yaml").read_text())
    raw |= {"name": "plates", "years": {"first": 2015, "last": YEAR, "baseline": 2015}}
    raw["simulation"]["size_px"] = [640, 640]
    path = tmp_path_factory.mktemp("region") / "plates.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def ws(settings_file: Path) -> Workspace:
    raw = yaml.safe_load(settings_file.read_text())
    made = Workspace(parse_region(raw), Storage(settings_file.parent / "home" / "plates"), Mapper(1))
    simulation.simulated_inputs(made)
    inventory.inventory_outlines(made)
    inventory.glacier_zones(made)
    imagery.scene_candidates(made, YEAR)
    imagery.selected_scenes(made, YEAR)
    return made


def _pixels(jpeg: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(jpeg))
    assert picture.format == "JPEG"
    return np.asarray(picture.convert("RGB")).astype(int)


def _framed(pixels: np.ndarray) -> float:
    """Share of the sheet in the colour of the frame of the chosen."""
    return float((np.abs(pixels - GREEN).max(axis=-1) < 30).mean())


def test_the_chosen_candidate_is_framed_and_only_that(ws: Workspace) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    counts = scenes.groupby("glacier_id").agg(n=("date", "size"), chosen=("selected", "sum"))
    glacier = counts[(counts["chosen"] == 1) & (counts["n"] > 1)].index[0]
    pixels = _pixels(plates.plate(ws.site, YEAR, glacier))
    assert _framed(pixels) > 0.005
    nothing = scenes.assign(selected=False)
    ws.storage.write_table("scenes", nothing, {"year": YEAR})
    try:
        assert _framed(_pixels(plates.plate(ws.site, YEAR, glacier))) < 0.001
    finally:
        ws.storage.write_table("scenes", scenes, {"year": YEAR})


def test_words_tell_why_an_image_was_not_taken(ws: Workspace) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    for _, mine in scenes.groupby("glacier_id"):
        best = mine[mine["selected"].astype(bool)]
        if not len(best):
            continue
        for _, row in mine.iterrows():
            date, verdict, figures, why = plates._words(row, best.iloc[0], len(mine))
            assert date == f"{row['date']:%Y-%m-%d}" and f"cloud or missing {row['cloud_share']:.1%}" in figures[0]
            if row["selected"]:
                assert verdict == "chosen, rank 1" and why == ""
            elif row["rank"] is None or str(row["rank"]) == "<NA>":
                assert verdict == "not acceptable" and why == row["reason"]
            else:
                assert why.startswith("against the chosen: cloud ")


def test_clouds_are_hatched_where_the_mask_says_so(ws: Workspace) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    cloudy = scenes.sort_values("cloud_share").iloc[-1]
    clear = scenes.sort_values("cloud_share").iloc[0]
    assert cloudy["cloud_share"] > 0.2 > clear["cloud_share"]

    def magenta(row: object) -> float:
        single = scenes.loc[[row.name]]  # type: ignore[attr-defined]
        glacier = ws.storage.read_table("glaciers").set_index("glacier_id", drop=False).loc[row["glacier_id"]]  # type: ignore[index]
        grid = plates._coarse_grid(glacier, ws.site, 200)
        bands = plates._bands(ws.site, "natural")
        image = plates._images(ws.site, YEAR, single, grid, "natural")
        top = plates._brightest(image, bands)
        pixels = np.asarray(plates._picture(image[0], bands, top, (200, 200), ws.site)).astype(int)
        return float(((pixels[..., 0] - pixels[..., 1] > 90) & (pixels[..., 2] - pixels[..., 1] > 40)).mean())

    assert magenta(cloudy) > 0.03 and magenta(cloudy) > 4 * magenta(clear)


def test_candidates_whose_files_are_gone_are_still_on_the_plate(ws: Workspace) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    glacier = scenes["glacier_id"].iloc[0]
    mine = scenes[scenes["glacier_id"] == glacier]
    lost = scenes.assign(scene_ids=np.where(scenes.index == mine.index[0], "S2_gone", scenes["scene_ids"]))
    whole = _pixels(plates.plate(ws.site, YEAR, glacier))
    ws.storage.write_table("scenes", lost, {"year": YEAR})
    try:
        assert _pixels(plates.plate(ws.site, YEAR, glacier)).shape == whole.shape
    finally:
        ws.storage.write_table("scenes", scenes, {"year": YEAR})


def test_more_candidates_than_fit(ws: Workspace) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    mine = scenes[scenes["glacier_id"] == scenes["glacier_id"].value_counts().index[0]]
    shown, left_out = plates._shown(mine, 1)
    assert len(shown) == 1 and left_out == len(mine) - 1
    assert bool(shown["selected"].iloc[0]) or not mine["selected"].any()


def test_previews_of_a_year(ws: Workspace) -> None:
    made = plates.plates_of_year(ws, YEAR)
    assert 1 <= len(made) <= 3 and next(iter(made)).startswith("largest glacier: ")
    assert all(len(jpeg) < 120_000 and _pixels(jpeg).size for jpeg in made.values())
    assert plates.plates_of_year(ws, 2015) == {}  # nothing was chosen there


def test_the_command(ws: Workspace, settings_file: Path, tmp_path: Path) -> None:
    glacier = ws.storage.read_table("scenes", year=YEAR).query("selected")["glacier_id"].iloc[0]
    common = ["--region", str(settings_file), "--home", str(settings_file.parent / "home")]
    target = tmp_path / "made" / "p.jpg"
    done = CliRunner().invoke(
        app, ["plate", glacier, "--year", str(YEAR), "-o", str(target), "--colours", "swir", *common]
    )
    assert done.exit_code == 0, done.output
    assert _framed(_pixels(target.read_bytes())) > 0.005
    wrong = CliRunner().invoke(app, ["plate", glacier[:-1], "--year", str(YEAR), *common])
    assert wrong.exit_code == 1 and "did you mean" in wrong.output
    early = CliRunner().invoke(app, ["plate", glacier, "--year", "2015", *common])
    assert early.exit_code == 1 and "materialize" in early.output


def test_errors_say_what_to_do(ws: Workspace) -> None:
    glaciers = ws.storage.read_table("glaciers")
    small = glaciers.loc[~glaciers["modelled"].astype(bool), "glacier_id"]
    assert len(small)
    with pytest.raises(UpstreamError, match="is not modelled"):
        plates.plate(ws.site, YEAR, small.iloc[0])
