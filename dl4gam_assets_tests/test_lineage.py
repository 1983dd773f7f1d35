"""Where a number comes from: the tree and its page, one estimate made again, two runs compared."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from dl4gam_assets.lineage import LineageError, compare, explain, explanation_page, open_results
from dl4gam_assets.stages import areas as area_stages
from dl4gam_assets.stages.base import UpstreamError
from dl4gam_assets.stages.reproduce import reproduce
from dl4gam_assets_tests.small_region import Small

KINDS = {
    "scene", "glacier cube", "static layers", "elevation", "elevation change", "inventory", "zones", "folds",
    "normalization", "weights", "calibration", "taus", "prediction", "settings", "code", "package", "hardware",
    "materialization",
}  # fmt: skip


@pytest.fixture
def copy(small: Small, tmp_path: Path) -> Small:
    return small.copy(tmp_path)


def _example(region: Small, year: int = 2016) -> str:
    areas = region.storage.read_table("areas", year=year)
    return str(areas.nlargest(1, "area_km2")["glacier_id"].iloc[0])


# --------------------------------------------------------------------------------------------- explain
def test_every_estimate_names_every_kind_of_input(small: Small) -> None:
    lineage = small.storage.read_table("lineage")
    assert len(lineage) == len(small.storage.read_table("areas"))
    for row in lineage.groupby(["year", "fold"]).head(1).itertuples():
        story = explain(small.storage, small.region, str(row.glacier_id), int(row.year))
        kinds = {record.kind for record in story.inputs}
        assert kinds >= KINDS, KINDS - kinds
        scenes = [r for r in story.inputs if r.kind == "scene"]
        assert {r.name.split("/")[0] for r in scenes} == set(story.provenance.scene_ids.split("+"))
        assert all(r.checksum for r in scenes)
        weights = {r.checksum for r in story.inputs if r.kind == "weights"}
        assert weights == set(story.provenance.member_sha256.split(","))
        assert all(r.run_id for r in story.inputs if r.kind in {"calibration", "weights", "glacier cube"})


def test_the_view_of_the_database_names_the_same_inputs(small: Small) -> None:
    import duckdb

    glacier = _example(small)
    story = explain(small.storage, small.region, glacier, 2016)
    with duckdb.connect(str(small.storage.path("results.duckdb")), read_only=True) as db:
        rows = db.execute("select kind, name from lineage_inputs where glacier_id = ? and year = 2016", [glacier]).df()
    wanted = {(r.kind, r.name) for r in story.inputs if r.kind not in {"glacier cube", "prediction", "static layers"}}
    assert wanted <= set(map(tuple, rows.to_numpy()))
    assert {"glacier cube", "prediction", "static layers"} <= set(rows["kind"])


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(v) for k, v in attrs if k in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_tells_all_and_needs_nothing(small: Small, tmp_path: Path) -> None:
    glacier = _example(small)
    story = explain(small.storage, small.region, glacier, 2016)
    page = _Text()
    page.feed(explanation_page(story, "Small & <other>"))
    text = " ".join(" ".join(page.words).split())
    assert "Small & <other>" in text and f"{story.estimate['area_km2']:.4f}" in text
    for _, line in story.lines():
        assert " ".join(line.split()) in text
    assert all((record.checksum or "") in text for record in story.inputs)
    assert not page.links and "script" not in page.tags
    done = small.cli("explain", glacier, "--year", "2016", "--html", str(tmp_path / "page.html"))
    assert done.exit_code == 0 and (tmp_path / "page.html").read_text().count(glacier) > 2


# --------------------------------------------------------------------------------------------- reproduce
def test_an_estimate_made_again_has_the_same_bits(small: Small, tmp_path: Path) -> None:
    glacier = _example(small)
    done = small.cli("reproduce", glacier, "--year", "2016", "--json", "--keep", str(tmp_path / "again"))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["verdict"] == "same bits" and {s["step"] for s in found["steps"]} >= {
        "masks and terrain", "glacier cube", "map (mean and deviation)", "area (km2)", "upper (km2)",
    }  # fmt: skip
    assert len(list((tmp_path / "again").rglob("*.nc"))) == 2  # the cube and its static layers
    with pytest.raises(FileExistsError, match="is not empty"):
        reproduce(small.workspace(), glacier, 2016, tmp_path / "again")


def test_another_file_of_the_scene_shows_in_the_cube_and_after(copy: Small) -> None:
    import rasterio

    glacier = _example(copy)
    lineage = copy.storage.read_table("lineage", year=2016).set_index("glacier_id")
    item = str(lineage.loc[glacier, "scene_ids"]).split("+")[0]
    scenes = copy.storage.read_table("scenes", year=2016)
    hrefs = json.loads(scenes[(scenes["glacier_id"] == glacier) & scenes["selected"].astype(bool)]["hrefs"].iloc[0])
    # Scenes are named by where they lay when they were searched: in the region that this one is a copy of.
    moved = {i: {a: h.replace(str(Path(h).parents[2]), str(copy.storage.inputs())) for a, h in f.items()}
             for i, f in hrefs.items()}  # fmt: skip
    file = next(f for f in Path(str(copy.storage.inputs())).rglob("*.tif") if item in str(f) and "red" in f.name)
    with rasterio.open(file) as source:
        profile, values = source.profile, source.read()
    with rasterio.open(file, "w", **profile) as target:
        target.write((values * 0.4).astype(values.dtype))
    chosen = (scenes["glacier_id"] == glacier) & scenes["selected"].astype(bool)
    scenes.loc[chosen, "hrefs"] = json.dumps(moved)
    copy.storage.write_table("scenes", scenes.drop(columns="year"), {"year": 2016})
    found = reproduce(copy.workspace(), glacier, 2016)
    same = {step.step: step.same for step in found.steps}
    assert found.verdict == "different"
    assert same["masks and terrain"] and not same["glacier cube"] and not same["map (mean and deviation)"]
    assert any("is another file than it was" in note for note in found.notes)


def test_weights_that_are_gone_can_not_be_reproduced(copy: Small) -> None:
    glacier = _example(copy)
    fold = int(copy.storage.read_table("areas", year=2016).set_index("glacier_id").loc[glacier, "fold"])
    calibration = copy.storage.read_table("calibration", fold=fold).drop(columns="fold")
    copy.storage.write_table("calibration", calibration.assign(sha256=["other"] * len(calibration)), {"fold": fold})
    with pytest.raises(LineageError, match="was trained again"):
        reproduce(copy.workspace(), glacier, 2016)
    with pytest.raises(LineageError, match="there is no estimate of nobody in 2016"):
        reproduce(copy.workspace(), "nobody", 2016)


# --------------------------------------------------------------------------------------------- expectations
def test_no_area_from_weights_that_the_calibration_never_saw(copy: Small) -> None:
    predictions = copy.storage.read_table("predictions", year=2016, fold=1).drop(columns=["year", "fold"])
    wrong = predictions.assign(member_sha256="other,weights")
    copy.storage.write_table("predictions", wrong, {"year": 2016, "fold": 1})
    with pytest.raises(UpstreamError, match="made with other weights than the calibration of fold 1 saw"):
        area_stages.glacier_areas(copy.workspace(), 2016, 1, force=True)


# --------------------------------------------------------------------------------------------- diff
def test_a_store_and_its_copy_or_database_are_the_same(small: Small, copy: Small) -> None:
    for other in (str(copy.storage.root), str(small.storage.path("results.duckdb"))):
        found = compare(open_results(str(small.storage.root)), open_results(other))
        assert found.same and found.totals and not found.settings
    done = small.cli("status")
    assert done.exit_code == 0 and "partitions match their inputs" in done.stdout


def test_a_difference_goes_with_its_reason(small: Small, copy: Small, tmp_path: Path) -> None:
    scenes = copy.storage.read_table("scenes", year=2016)
    ranked = scenes[scenes["rank"].notna()]
    glacier = ranked.groupby("glacier_id").size().idxmax()
    second = ranked[ranked["glacier_id"] == glacier].sort_values("rank").iloc[1]
    (Path(str(copy.storage.inputs())) / "overrides.csv").write_text(
        f"glacier_id,year,date\n{glacier},2016,{second['date']:%Y-%m-%d}\n"
    )
    copy.change(imagery__selection__overrides="overrides.csv")
    assert copy.run(years=[2016]).failed == []
    found = compare(open_results(str(small.storage.root)), open_results(str(copy.storage.root)))
    assert [(e["glacier_id"], e["year"]) for e in found.estimates] == [(glacier, 2016)]
    assert found.estimates[0]["reasons"] == ["image"] and found.estimates[0]["image_b"] == second["scene_ids"]
    total = next(t for t in found.totals if t.year == 2016)
    assert sum(s.difference_km2 for s in found.shares if s.year == 2016) == pytest.approx(total.difference_km2)
    table = tmp_path / "diff.csv"
    from typer.testing import CliRunner

    from dl4gam_assets.cli import app

    done = CliRunner().invoke(app, ["diff", str(small.storage.root), str(copy.storage.root), "--file", str(table)])
    assert done.exit_code == 0 and "another image was chosen" in done.stdout
    assert pd.read_csv(table)["reasons"].tolist() == ["image"]


def test_what_is_no_store_is_named(small: Small, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="is no store"):
        open_results(str(tmp_path))
    assert open_results(f"{small.home}@2016").year == 2016  # the only store in a folder
