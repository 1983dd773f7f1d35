"""The whole chain on a small simulated region, through Dagster, the command line, and after faults.

One region is materialized once for this module (a minute); the tests then look at it from all sides.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from pathlib import Path

import duckdb
import pandas as pd
import pytest
import rasterio
import yaml
from PIL import Image

from dl4gam_assets.compute import Mapper
from dl4gam_assets.lineage import LineageError, explain
from dl4gam_assets.orchestrate import instance
from dl4gam_assets.settings import load_region
from dl4gam_assets.stages import areas as area_stages
from dl4gam_assets.stages import imagery as imagery_stages
from dl4gam_assets.stages.base import UpstreamError, Workspace
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.small_region import Small


def test_every_table_has_rows(small: Small) -> None:
    empty = [name for name in TABLES if name != "failures" and not len(small.storage.read_table(name))]
    assert empty == []


def test_dagster_holds_a_materialization_of_every_partition(small: Small) -> None:
    import dagster as dg

    os.environ["DAGSTER_HOME"] = str(small.storage.path("dagster"))
    try:
        with instance(small.storage) as opened:
            for asset, count in {
                "inventory_outlines": None, "glacier_cubes": 3, "ensemble_member": 4, "glacier_predictions": 6,
                "glacier_areas": 6, "regional_change": 3, "results_database": None,
            }.items():  # fmt: skip
                key = dg.AssetKey(asset)
                event = opened.get_latest_materialization_event(key)
                assert event is not None and event.asset_materialization.metadata
                run = opened.get_run_by_id(event.run_id)
                assert run is not None and run.asset_selection is not None and key in run.asset_selection
                assert len(run.asset_selection) < 8  # the UI shows what a run makes
                if count:
                    assert len(opened.get_materialized_partitions(key)) == count, asset
                if asset == "ensemble_member":  # its page shows the curves
                    shown = event.asset_materialization.metadata["training curves"]
                    assert isinstance(shown, dg.MarkdownMetadataValue)
                    kind, _, content = str(shown.value).removesuffix(")").partition(";base64,")
                    assert kind == "![training curves](data:image/png"
                    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
                        picture.load()
                        assert min(picture.size) > 100 and len(set(picture.convert("L").get_flattened_data())) > 10
    finally:
        os.environ.pop("DAGSTER_HOME", None)


def test_each_glacier_is_mapped_by_the_models_that_never_saw_it(small: Small) -> None:
    folds = small.storage.read_table("folds")
    predictions = small.storage.read_table("predictions")
    roles = predictions.merge(folds, on=["glacier_id", "fold"])
    assert len(roles) == len(predictions) and set(roles["role"]) == {"test"}
    assert not predictions.duplicated(["glacier_id", "year"]).any()


def test_every_area_has_its_lineage(small: Small) -> None:
    areas, lineage = small.storage.read_table("areas"), small.storage.read_table("lineage")
    joined = areas.merge(lineage, on=["glacier_id", "year", "fold"])
    assert len(joined) == len(areas) == len(lineage) > 0
    runs = joined["run_ids"].map(json.loads)
    assert all(set(r) >= {"glacier_cubes", "calibration", "glacier_predictions", "glacier_areas"} for r in runs)
    assert all(all(v for v in r.values()) for r in runs)


def test_the_database_says_the_same_as_the_tables(small: Small) -> None:
    with duckdb.connect(str(small.storage.path("results.duckdb")), read_only=True) as db:
        for name in ("areas", "changes", "regional_changes", "scenes", "lineage"):
            rows = db.execute(f"select count(*) from {name}").fetchone()
            assert rows == (len(small.storage.read_table(name)),), name
        total = db.execute("select sum(area_km2) from areas where year = 2017").fetchone()
    assert total[0] == pytest.approx(small.storage.read_table("areas", year=2017)["area_km2"].sum())


def test_maps_are_georeferenced_like_their_cubes(small: Small) -> None:
    row = small.storage.read_table("predictions", year=2016).iloc[0]
    cube = small.storage.read_table("cubes", year=2016).set_index("glacier_id").loc[row["glacier_id"]]
    with rasterio.open(str(small.storage.prediction(2016, row["glacier_id"]))) as source:
        assert source.crs.to_epsg() == cube["utm_epsg"]
        assert source.shape == (cube["height_px"], cube["width_px"])


def test_explain_tells_the_story_of_a_number(small: Small) -> None:
    area = small.storage.read_table("areas", year=2017).iloc[0]
    story = explain(small.storage, small.region, area["glacier_id"], 2017)
    text = "\n".join(line for _, line in story.lines())
    assert f"{area['area_km2']:.4f} km2" in text
    assert story.provenance.scene_ids in text and "which never saw this glacier" in text
    assert "STALE" not in text and "simulated" in text
    assert len(story.model["members"]) == 2
    for member in story.model["members"]:
        assert f"encoder from none (random), initial weights {member['initial_sha256'][:12]}" in text
    with pytest.raises(LineageError, match="for example"):
        explain(small.storage, small.region, "no-such-glacier", 2017)
    tiny = small.storage.read_table("glaciers").query("not modelled").iloc[0]["glacier_id"]
    with pytest.raises(LineageError, match="below min_area_km2"):
        explain(small.storage, small.region, tiny, 2017)


def test_command_line_answers(small: Small) -> None:
    done = small.cli(
        "query", "select year, rate_pct_per_year from regional_changes where grouping = 'region'", "-o", "csv"
    )
    assert done.exit_code == 0 and done.stdout.startswith("year,rate_pct_per_year")
    glacier = small.storage.read_table("areas", year=2016)["glacier_id"].iloc[0]
    done = small.cli("explain", glacier, "--year", "2016", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["provenance"]["glacier_id"] == glacier
    assert small.cli("explain", glacier, "--year", "2016").exit_code == 0
    done = small.cli("status")
    assert done.exit_code == 0 and "glacier_predictions" in done.stdout
    bad = small.cli("query", "select * from no_such_table")
    assert bad.exit_code == 1 and "no_such_table" in bad.stderr
    assert small.cli("materialize", "--year", "1999").exit_code == 1


def test_queries_can_not_write_or_read_files(small: Small) -> None:
    for sql in (
        "drop table areas",
        "create table x as select 1",
        "select * from read_csv('/etc/hosts')",
        "attach 'x.db'",
    ):
        assert small.cli("query", sql).exit_code == 1, sql


# --------------------------------------------------------------------------------------------- runs again
def _stamps(storage: Storage, *folders: str) -> dict[str, int]:
    return {
        str(f): f.stat().st_mtime_ns
        for folder in folders
        for f in Path(str(storage.path(folder))).rglob("*")
        if f.is_file()
    }


def test_a_second_run_changes_nothing(small: Small) -> None:
    folders = ("inputs", "static", "dhdt", "cubes", "models", "predictions", "tables", "reports")
    before = _stamps(small.storage, *folders)
    outcome = small.run()
    assert outcome.failed == []
    assert _stamps(small.storage, *folders) == before


def test_a_rejected_scene_rebuilds_only_what_depends_on_it(small: Small, tmp_path: Path) -> None:
    """An override for one glacier and year makes that glacier's cube, map and area new, and no other."""
    copy = Small(tmp_path)
    shutil.copytree(str(small.storage.root), str(copy.storage.root), dirs_exist_ok=True)
    scenes = copy.storage.read_table("scenes", year=2016)
    ranked = scenes[scenes["rank"].notna()]
    glacier = ranked.groupby("glacier_id").size().idxmax()
    mine = ranked[ranked["glacier_id"] == glacier].sort_values("rank")
    if len(mine) < 2:
        pytest.skip("the small region has no glacier with two acceptable scenes in 2016")
    second = mine.iloc[1]
    (Path(str(copy.storage.inputs())) / "overrides.csv").write_text(
        f"glacier_id,year,date\n{glacier},2016,{second['date']:%Y-%m-%d}\n"
    )
    raw = yaml.safe_load(copy.yaml.read_text())
    raw["imagery"]["selection"] = {"overrides": "overrides.csv"}
    copy.yaml.write_text(yaml.safe_dump(raw))
    copy.region = load_region(copy.yaml)
    before = _stamps(copy.storage, "cubes", "predictions", "models")
    assert copy.run(years=[2016]).failed == []
    after = _stamps(copy.storage, "cubes", "predictions", "models")
    changed = {Path(f).stem for f in after if after[f] != before.get(f)}
    assert changed == {Path(str(copy.storage.cube(2016, glacier))).stem}
    row = copy.storage.read_table("scenes", year=2016).query("glacier_id == @glacier and selected").iloc[0]
    assert row["date"] == second["date"] and "override" in row["reason"]


def test_a_broken_scene_costs_one_candidate_and_no_other(small: Small, tmp_path: Path) -> None:
    """A truncated file is a reason on its candidate row; the year still has its glaciers."""
    copy = Small(tmp_path)
    shutil.copytree(str(small.storage.root), str(copy.storage.root), dirs_exist_ok=True)
    row = copy.storage.read_table("scenes", year=2017).query("selected").iloc[0]
    item = row["scene_ids"].split("+")[0]
    broken = next(f for f in Path(str(copy.storage.inputs())).rglob("*.tif") if item in str(f) and "green" in f.name)
    broken.write_bytes(broken.read_bytes()[:200])
    ws = copy.workspace()
    imagery_stages.scene_candidates(ws, 2017, force=True)
    imagery_stages.selected_scenes(ws, 2017)
    scenes = copy.storage.read_table("scenes", year=2017)
    hit = scenes[scenes["scene_ids"].str.contains(item, regex=False)]
    assert len(hit) and not hit["selected"].any()
    assert len(scenes[~scenes["scene_ids"].str.contains(item, regex=False)])


def test_scoring_goes_on_where_it_stopped_and_other_thresholds_score_nothing_again(
    small: Small, tmp_path: Path
) -> None:
    copy = Small(tmp_path)
    shutil.copytree(str(small.storage.root), str(copy.storage.root), dirs_exist_ok=True)
    ws = copy.workspace()
    before = copy.storage.read_table("candidates", year=2016)
    copy.storage.path("state", "scene_candidates", "2016.json").unlink()  # as if killed before the end
    rows = sorted(copy.storage.path("candidates", "year=2016").glob("*.parquet"))
    rows[0].unlink()
    rows[1].write_bytes(rows[1].read_bytes()[:100])  # a damaged file is scored again
    again = imagery_stages.scene_candidates(ws, 2016)
    assert not again.unchanged and again.metadata["scored_now"] == 2
    after = copy.storage.read_table("candidates", year=2016)
    pd.testing.assert_frame_equal(after.drop(columns="hrefs"), before.drop(columns="hrefs"))  # the copy lies elsewhere
    selection = copy.region.imagery.selection.model_copy(update={"ranking": "min_max", "cloud_max": 0.2})
    imagery = copy.region.imagery.model_copy(update={"selection": selection})
    copy.region = copy.region.model_copy(update={"imagery": imagery})
    assert imagery_stages.scene_candidates(copy.workspace(), 2016).unchanged
    former = copy.storage.path("previews", "selected_scenes", "2016--a former plate.img")
    former.write_bytes(b"\x89PNG")
    chosen = imagery_stages.selected_scenes(copy.workspace(), 2016)
    assert not chosen.unchanged and chosen.previews and not former.exists()
    assert imagery_stages.selected_scenes(copy.workspace(), 2016).previews == chosen.previews


def test_areas_refuse_maps_that_are_older_than_their_cubes(small: Small, tmp_path: Path) -> None:
    copy = Small(tmp_path)
    shutil.copytree(str(small.storage.root), str(copy.storage.root), dirs_exist_ok=True)
    cubes = copy.storage.read_table("cubes", year=2016)
    copy.storage.write_table("cubes", cubes.assign(fingerprint="another").drop(columns="year"), {"year": 2016})
    with pytest.raises(UpstreamError, match="materialize glacier_predictions"):
        area_stages.glacier_areas(copy.workspace(), 2016, 1, force=True)


def test_a_missing_upstream_is_named(tmp_path: Path) -> None:
    fresh = Small(tmp_path)
    with pytest.raises(UpstreamError, match=r"simulated_inputs \[all\] is not there yet"):
        imagery_stages.scene_candidates(Workspace(fresh.region, fresh.storage, Mapper(1)), 2016)


def test_changes_have_no_baseline_year_and_totals_have_it(small: Small) -> None:
    assert set(small.storage.read_table("changes")["year"]) == {2016, 2017}
    totals = small.storage.read_table("regional_changes")
    baseline = totals[totals["year"] == 2015]
    assert len(baseline) and baseline["rate_pct_per_year"].isna().all()
    assert pd.notna(totals[totals["year"] == 2017]["rate_pct_per_year"]).any()


def test_coverage_counts_the_intervals_that_hold(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "coverage.csv"
    done = small.cli("coverage", "--file", str(file), "--plots", str(tmp_path))
    assert done.exit_code == 0, done.output
    told = pd.read_csv(file).set_index(["judge", "rule", "group"])
    areas = small.storage.read_table("areas")
    truth = pd.read_parquet(Path(str(small.storage.inputs())) / "truth" / "areas.parquet")
    true = truth.set_index(["glacier_id", "year"])["area_km2"].reindex(
        pd.MultiIndex.from_arrays([areas["glacier_id"], areas["year"]])
    )
    first = areas[areas["year"] == 2015]
    for judge, rows, right in (
        ("truth of the simulation, 2015 to 2017", areas, true.to_numpy()),
        ("inventory outlines, 2015", first, first["inventory_area_km2"].to_numpy()),
    ):
        for rule in ("published", "conformal"):
            held = (rows[f"lower_{rule}_km2"] <= right) & (right <= rows[f"upper_{rule}_km2"])
            row = told.loc[(judge, rule, "all glaciers")]
            assert row["n"] == len(rows) and row["coverage"] == pytest.approx(held.mean())
    assert len(list(tmp_path.glob("*.png"))) == 2
    taus = small.storage.read_table("taus")
    one = taus["tau_published"].equals(taus["tau_conformal"])
    assert ("same tau" in done.output) == one
    page = small.cli("coverage", "--markdown", "--year", "2015")
    assert page.exit_code == 0 and "| published |" in page.output and "same tau" not in page.output
    assert small.cli("coverage", "--year", "1900").exit_code != 0
