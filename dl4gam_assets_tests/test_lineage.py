"""Where a number comes from: the tree and its page, one estimate made again, two runs compared."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import pandas as pd
import pytest

from dl4gam_assets.lineage import LineageError, compare, explain, explanation_page, open_results
from dl4gam_assets.lineage.records import InputRecord, PartitionRecord
from dl4gam_assets.orchestrate import instance
from dl4gam_assets.stages import areas as area_stages
from dl4gam_assets.stages import predictions as prediction_stages
from dl4gam_assets.stages.base import UpstreamError
from dl4gam_assets.stages.reproduce import Compared, _number, reproduce, verdict
from dl4gam_assets_tests.small_region import Small, leave_a_member

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
    names = list(InputRecord.model_fields)
    with duckdb.connect(str(small.storage.path("results.duckdb")), read_only=True) as db:
        rows = db.execute(
            f"select {', '.join(map(json.dumps, names))} from lineage_inputs where glacier_id = ? and year = 2016",
            [glacier],
        ).fetchall()
    found = [InputRecord.model_validate(dict(zip(names, row, strict=True))) for row in rows]
    order = operator.attrgetter("kind", "name")
    assert sorted(found, key=order) == sorted(story.inputs, key=order)
    made = [r for r in found if r.asset is not None]
    assert all(r.run_id and r.materialization_id and r.time and r.settings_fingerprint and r.hardware for r in made)


def test_an_estimates_partition_leads_to_all_that_it_was_made_from(small: Small) -> None:
    """The event in Dagster: its record is valid, and each of its links leads to a partition that there is."""
    with instance(small.storage) as opened:
        key = dg.MultiPartitionKey({"year": "2016", "fold": "fold_1"})
        wanted = dg.AssetRecordsFilter(dg.AssetKey("glacier_areas"), asset_partitions=[str(key)])
        (event,) = opened.fetch_materializations(wanted, limit=1).records
        assert event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        record = PartitionRecord.model_validate(metadata["lineage"].value)
        links = re.findall(r"^- \[([^ \]]+)(?: \[([^\]]+)\])?\]\(([^)]+)\)$", str(metadata["made_from"].value), re.M)
        assets = {asset for asset, _, _ in links}
        assert {"selected_scenes", "glacier_cubes", "ensemble_member", "calibration", "glacier_predictions"} <= assets
        assert assets == {m.asset for m in record.made_from}
        there = {asset: opened.get_materialized_partitions(dg.AssetKey(asset)) for asset in assets}
        for asset, label, address in links:
            assert small.storage.read_state(asset, label or "all") is not None
            named = parse_qs(urlsplit(address).query).get("partition", [])
            assert urlsplit(address).path == f"/assets/{asset}" and bool(named) == bool(label)
            assert set(named) <= set(there[asset])
    members = [m for m in record.made_from if m.asset == "ensemble_member"]
    assert [m.output for m in members] == record.weights and all(m.hardware and m.settings_fingerprint for m in members)


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


def test_a_larger_ensemble_of_before_leaves_no_trace_in_the_story(copy: Small) -> None:
    leave_a_member(copy)
    story = explain(copy.storage, copy.region, _example(copy), 2016)
    assert len(story.model["members"]) == 2 and not any("STALE" in note for note in story.notes)


def test_an_image_that_is_no_candidate_any_more_is_told_from_the_record(copy: Small) -> None:
    glacier = _example(copy)
    scenes = copy.storage.read_table("scenes", year=2016)
    before = explain(copy.storage, copy.region, glacier, 2016).provenance
    gone = (scenes["glacier_id"] == glacier) & scenes["selected"].astype(bool)
    copy.storage.write_table("scenes", scenes[~gone].drop(columns="year"), {"year": 2016})
    story = explain(copy.storage, copy.region, glacier, 2016)
    assert story.image["scene_ids"] == before.scene_ids and story.image["date"] == before.image_date
    assert any("no image is selected" in note for note in story.notes)
    assert any("no candidate any more" in note for note in story.notes)
    assert before.scene_ids in " ".join(line for _, line in story.lines())
    other = scenes[(scenes["glacier_id"] == glacier) & ~gone & scenes["rank"].notna()].head(1).index
    scenes.loc[other, "selected"] = True
    copy.storage.write_table("scenes", scenes[~gone].drop(columns="year"), {"year": 2016})
    story = explain(copy.storage, copy.region, glacier, 2016)
    assert story.image["scene_ids"] == before.scene_ids
    assert any("another image is selected now" in note for note in story.notes)


def test_the_rule_of_the_interval_is_told_with_its_aim(small: Small) -> None:
    story = explain(small.storage, small.region, _example(small), 2016)
    (line,) = [text for _, text in story.lines() if text.startswith("interval, to hold")]
    assert f"{small.region.calibration.coverage:.0%}" in line and "published rule" in line
    of_group = {"intervals": "conformal", "conformal_n": 7, "conformal_scope": "folds", "conformal_group": "small"}
    other = story.model_copy(update={"calibration": story.calibration | of_group})
    (line,) = [text for _, text in other.lines() if text.startswith("interval, to hold")]
    assert "conformal rule on 7 validation glaciers of all folds that do not test it (group small)" in line


def test_folds_that_there_are_no_more_are_not_read(copy: Small) -> None:
    """With fewer folds a glacier is tested by another one, and the former's files are still in the store."""
    areas = copy.storage.read_table("areas")
    for name in ("areas", "lineage"):
        rows = copy.storage.read_table(name, year=2016, fold=1).drop(columns=["year", "fold"])
        copy.storage.write_table(name, rows, {"year": 2016, "fold": 3})
    assert len(copy.storage.read_table("areas")) == len(areas)
    assert explain(copy.storage, copy.region, _example(copy), 2016).estimate["year"] == 2016


# --------------------------------------------------------------------------------------------- reproduce
def _step(same: bool, within: bool) -> Compared:
    return Compared(step="area", recorded="1", again="1", same=same, within=within)


def test_where_nothing_explains_other_bits_only_the_same_ones_pass() -> None:
    assert verdict([_step(True, True)], exact=True) == verdict([_step(True, True)], exact=False) == "same bits"
    close = [_step(True, True), _step(False, True)]
    assert verdict(close, exact=True) == "different" and verdict(close, exact=False) == "same within tolerances"
    assert verdict([_step(False, False)], exact=False) == "different"
    assert _number("area", 0.0, 0.0004).within and not _number("area", 0.0, 0.0006).within
    assert _number("area", 10.0, 10.019).within and not _number("area", 10.0, 10.021).within


def test_another_machine_is_allowed_its_rounding(copy: Small) -> None:
    """The record is of other hardware, and one weight differs in its last bits: the result is within the tolerance."""
    glacier = _example(copy)
    fold = int(copy.storage.read_table("areas", year=2016).set_index("glacier_id").loc[glacier, "fold"])
    areas = copy.storage.read_table("areas", year=2016, fold=fold).drop(columns=["year", "fold"])
    areas.loc[areas["glacier_id"] == glacier, "area_km2"] *= 1.0005
    copy.storage.write_table("areas", areas, {"year": 2016, "fold": fold})
    assert reproduce(copy.workspace(), glacier, 2016).verdict == "different"
    sources = copy.storage.read_table("lineage_sources", year=2016, fold=fold).drop(columns=["year", "fold"])
    sources.loc[sources["kind"] == "hardware", "name"] = "sparc64 vis3"
    copy.storage.write_table("lineage_sources", sources, {"year": 2016, "fold": fold})
    found = reproduce(copy.workspace(), glacier, 2016)
    assert found.verdict == "same within tolerances" and any("sparc64" in note for note in found.notes)


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


def _other_weights(region: Small) -> None:
    """Maps of the inventory year were made with other weights than the calibration of fold 1 saw."""
    rows = region.storage.read_table("predictions", year=2015, fold=1).drop(columns=["year", "fold"])
    region.storage.write_table("predictions", rows.assign(member_sha256="other"), {"year": 2015, "fold": 1})


def _other_cubes(region: Small) -> None:
    """Cubes of the inventory year were built again since they were mapped."""
    rows = region.storage.read_table("cubes", year=2015).drop(columns="year")
    region.storage.write_table("cubes", rows.assign(fingerprint="other"), {"year": 2015})


def _other_calibration(region: Small) -> None:
    """Fold 1 was calibrated again since its maps were made."""
    state = region.storage.read_state("calibration", "fold_1")
    assert state is not None
    region.storage.write_state("calibration", "fold_1", state | {"output": "other"})


@pytest.mark.parametrize("reader", [area_stages.interval_taus, prediction_stages.evaluation])
@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_other_weights, "made with other weights than the calibration of fold 1 saw"),
        (_other_cubes, "maps are older than their cubes"),
        (_other_calibration, "glacier_predictions .* was made before the present calibration"),
    ],
)
def test_taus_and_evaluation_refuse_maps_of_before(
    copy: Small, reader: Callable[..., object], break_it: Callable[[Small], None], words: str
) -> None:
    break_it(copy)
    with pytest.raises(UpstreamError, match=words):
        reader(copy.workspace(), 1, force=True)


def test_evaluation_refuses_a_map_file_that_the_table_does_not_name(copy: Small) -> None:
    rows = copy.storage.read_table("predictions", year=2015, fold=1).drop(columns=["year", "fold"])
    copy.storage.write_table("predictions", rows.assign(fingerprint="other"), {"year": 2015, "fold": 1})
    prediction_stages.evaluation(copy.workspace(), 1, force=True)
    failures = copy.storage.read_table("failures")
    mine = failures[(failures["stage"] == "evaluation") & (failures["partition"] == "fold_1")]
    assert len(mine) == len(rows) and mine["error"].str.contains("is not the one that the table predictions").all()


@pytest.mark.parametrize(
    ("asset", "label"), [("selected_scenes", "2016"), ("glacier_cubes", "2016"), ("ensemble", "fold_1"),
                         ("cross_validation_folds", "all"), ("elevation", "all")],
)  # fmt: skip
def test_no_area_where_a_partition_of_the_chain_was_made_again_since(copy: Small, asset: str, label: str) -> None:
    state = copy.storage.read_state(asset, label)
    assert state is not None
    copy.storage.write_state(asset, label, state | {"output": "other"})
    with pytest.raises(UpstreamError, match=rf"was made before the present {asset} \[{label}\]"):
        area_stages.glacier_areas(copy.workspace(), 2016, 1, force=True)


def test_lineage_names_the_image_that_is_in_the_cube(copy: Small) -> None:
    """Not the one that is selected now, and members by the hash of their weights."""
    before = copy.storage.read_table("lineage", year=2016).set_index("glacier_id")
    scenes = copy.storage.read_table("scenes", year=2016)
    chosen = scenes["selected"].astype(bool)
    second = scenes[~chosen].groupby("glacier_id").head(1).index
    scenes["selected"] = scenes.index.isin(second)
    copy.storage.write_table("scenes", scenes.drop(columns="year"), {"year": 2016})
    leave_a_member(copy)
    area_stages.glacier_areas(copy.workspace(), 2016, 1, force=True)
    lineage = copy.storage.read_table("lineage", year=2016, fold=1).set_index("glacier_id")
    assert lineage["checksums"].to_dict() == before.loc[lineage.index, "checksums"].to_dict()
    sources = copy.storage.read_table("lineage_sources", year=2016, fold=1)
    images = sources[sources["kind"] == "scene"]
    assert set(images["scope_key"]) == set(lineage["scene_ids"]) and images["checksum"].notna().all()
    weights = sources.loc[sources["kind"] == "weights", "checksum"]
    assert ",".join(weights) == lineage["member_sha256"].iloc[0]


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


def test_pixels_that_are_counted_otherwise_are_a_reason(small: Small, copy: Small) -> None:
    copy.change(areas__pixels="fractional" if small.region.areas.pixels == "whole" else "whole")
    for year in (2015, 2016):
        for fold in (1, 2):
            area_stages.glacier_areas(copy.workspace(), year, fold)
    found = compare(open_results(str(small.storage.root)), open_results(f"{copy.storage.root}@2016"))
    assert {t.year for t in found.totals} == {2016} and found.estimates
    assert {tuple(e["reasons"]) for e in found.estimates} == {("pixels",)}


def test_a_rate_can_differ_by_its_baseline_alone(small: Small, copy: Small) -> None:
    glacier = _example(copy)
    changes = copy.storage.read_table("changes", year=2016).drop(columns="year")
    mine = changes["glacier_id"] == glacier
    changes.loc[mine, ["baseline_area_km2", "rate_km2_per_year"]] += [0.1, -0.1]
    copy.storage.write_table("changes", changes, {"year": 2016})
    areas = copy.storage.read_table("areas", year=2015)
    fold = int(areas.set_index("glacier_id").loc[glacier, "fold"])
    for name, change in (("areas", {"area_km2": 0.1, "upper_km2": 0.1}), ("lineage", {})):
        rows = copy.storage.read_table(name, year=2015, fold=fold).drop(columns=["year", "fold"])
        own = rows["glacier_id"] == glacier
        for column, more in change.items():
            rows.loc[own, column] += more
        if name == "lineage":
            rows.loc[own, ["cube_fingerprint", "scene_ids"]] = ["other", "another"]
        copy.storage.write_table(name, rows, {"year": 2015, "fold": fold})
    for years in ("", "@2016"):
        found = compare(open_results(f"{small.storage.root}{years}"), open_results(f"{copy.storage.root}{years}"))
        (share,) = [s for s in found.rate_shares if s.year == 2016]
        assert share.reasons == ["baseline: image"] and share.glaciers == 1
        assert share.difference_km2_per_year == pytest.approx(-0.1) and not found.same
        assert not [e for e in found.estimates if e["year"] == 2016]


def test_a_store_may_be_named_like_a_year(small: Small, tmp_path: Path) -> None:
    made = small.copy(tmp_path / "home")
    folder = Path(str(made.storage.root)).rename(tmp_path / "store@2016")
    assert open_results(str(folder)).year is None and open_results(f"{folder}@2017").year == 2017


def test_what_is_no_store_is_named(small: Small, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="is no store"):
        open_results(str(tmp_path))
    assert open_results(f"{small.home}@2016").year == 2016  # the only store in a folder
