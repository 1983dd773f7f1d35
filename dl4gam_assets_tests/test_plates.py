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
from dl4gam_assets_tests.region_files import packaged

YEAR = 2016
GREEN = np.array(plates._CHOSEN)


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = packaged("demo")
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
    kept = ws.storage.path("plates", f"year={YEAR}", f"{glacier}.swir.jpg")
    assert not kept.exists()
    stored = CliRunner().invoke(app, ["plate", glacier, "--year", str(YEAR), "--colours", "swir", *common])
    assert stored.exit_code == 0 and f"{glacier}.swir.jpg" in stored.output
    assert (_pixels(kept.read_bytes()) == _pixels(target.read_bytes())).all()
    both = CliRunner().invoke(app, ["plate", glacier, "--all", "--year", str(YEAR), *common])
    assert both.exit_code == 1 and "name one glacier, or give --all" in both.output
    wrong = CliRunner().invoke(app, ["plate", glacier[:-1], "--year", str(YEAR), *common])
    assert wrong.exit_code == 1 and "did you mean" in wrong.output
    early = CliRunner().invoke(app, ["plate", glacier, "--year", "2015", *common])
    assert early.exit_code == 1 and "materialize" in early.output


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_a_plate_in_the_store_is_drawn_again_only_when_it_would_look_different(ws: Workspace) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    glacier = scenes.loc[scenes["selected"].astype(bool), "glacier_id"].iloc[-1]
    path = Path(str(plates.stored_plate(ws.site, YEAR, glacier)))
    assert path == Path(str(ws.storage.path("plates", f"year={YEAR}", f"{glacier}.jpg")))
    first, drawn = _age(path), path.read_bytes()
    assert (_pixels(drawn) == _pixels(plates.plate(ws.site, YEAR, glacier))).all()
    assert _age(Path(str(plates.stored_plate(ws.site, YEAR, glacier)))) == first
    path.write_bytes(drawn[:5])  # damaged
    assert _pixels(Path(str(plates.stored_plate(ws.site, YEAR, glacier))).read_bytes()).size
    second = _age(path)
    try:
        ws.storage.write_table("scenes", scenes.assign(selected=False), {"year": YEAR})
        plates.stored_plate(ws.site, YEAR, glacier)
        assert _framed(_pixels(path.read_bytes())) < 0.001 and _age(path) > second
        # A picture that is lacking is asked for again the next time.
        ws.storage.write_table("scenes", scenes.assign(scene_ids="S2_gone"), {"year": YEAR})
        third = _age(Path(str(plates.stored_plate(ws.site, YEAR, glacier))))
        assert _age(Path(str(plates.stored_plate(ws.site, YEAR, glacier)))) > third
    finally:
        ws.storage.write_table("scenes", scenes, {"year": YEAR})


def test_plates_of_all_glaciers(ws: Workspace, settings_file: Path) -> None:
    scenes = ws.storage.read_table("scenes", year=YEAR)
    ids = sorted(scenes["glacier_id"].unique())
    made = sorted(plates.stored_plates(ws.site, Mapper(1), YEAR, limit=2), key=lambda done: done.key)
    assert [done.key for done in made] == ids and all(done.ok for done in made)
    assert all(Path(done.value).stat().st_size < 200_000 for done in made)
    with pytest.raises(UpstreamError, match="materialize"):
        plates.stored_plates(ws.site, Mapper(1), 2015)
    common = ["--region", str(settings_file), "--home", str(settings_file.parent / "home")]
    done = CliRunner().invoke(app, ["plate", "--all", "--limit", "2", "--year", str(YEAR), *common])
    assert done.exit_code == 0 and f"{len(ids)} plates in" in done.output


def test_a_glacier_without_an_image_is_a_row_that_says_why(ws: Workspace) -> None:
    """An override to a day without a scene, and one that rejects; with the thresholds as they are and out of reach."""
    scenes = ws.storage.read_table("scenes", year=YEAR)
    one, two = scenes.loc[scenes["selected"].astype(bool), "glacier_id"].iloc[:2]
    overrides = ws.site.data_root / "o.csv"
    overrides.write_text(f"glacier_id,year,date\n{one},{YEAR},{YEAR}-12-24\n{two},{YEAR},reject\n")

    def failures(**selection: object) -> dict[str, str]:
        imagery_settings = ws.region.imagery
        changed = imagery_settings.selection.model_copy(update=selection)
        region = ws.region.model_copy(update={"imagery": imagery_settings.model_copy(update={"selection": changed})})
        imagery.selected_scenes(Workspace(region, ws.storage, ws.mapper), YEAR)
        frame = ws.storage.read_table("failures", stage="selected_scenes", partition=str(YEAR))
        return dict(zip(frame["glacier_id"], frame["error"], strict=True))

    try:
        said = failures(overrides="o.csv")
        assert f"{YEAR}-12-24 was asked for, but no scene of that day was found" in said[one]
        assert "as a line of imagery.selection.overrides says" in said[two] and "add an override" not in said[two]
        said = failures(cloud_max=0.0, coverage_min=1.0)
        assert set(said) and all("is acceptable" in words and "above 0.00" in words for words in said.values())
    finally:
        imagery.selected_scenes(ws, YEAR)
        assert (ws.storage.read_table("scenes", year=YEAR)["selected"] == scenes["selected"]).all()


def test_errors_say_what_to_do(ws: Workspace) -> None:
    glaciers = ws.storage.read_table("glaciers")
    small = glaciers.loc[~glaciers["modelled"].astype(bool), "glacier_id"]
    assert len(small)
    with pytest.raises(UpstreamError, match="is not modelled"):
        plates.plate(ws.site, YEAR, small.iloc[0])
