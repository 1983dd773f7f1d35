"""Each check passes on what the demo made, and fails when those tables are tampered with."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

from dl4gam_assets import checks
from dl4gam_assets.change import area_changes, regional_changes
from dl4gam_assets.checks import CHECKS, Check, Part, dimensions_of
from dl4gam_assets.definitions import build_assets, build_defs
from dl4gam_assets.resources import ComputeResource, DeviceResource, RegionResource, WorkspaceResource
from dl4gam_assets.settings import Region
from dl4gam_assets.storage import Storage
from dl4gam_assets.tables import TABLES
from dl4gam_assets_tests.small_region import YEARS, Small

#: Checks that the small region fails with good reason: small glaciers that are found badly, and a Random Forest that
#: maps its simple pixels better than its small networks.
HONEST = {
    ("baseline_areas", "recall_of_inventory"),
    ("evaluation", "better_than_a_threshold"),
}
#: A rate over one year is noise, near or beyond what is plausible.
CHANCE = {("regional_change", "rate_plausible")}


@pytest.fixture(scope="module")
def region(small: Small) -> Region:
    return small.region


@pytest.fixture(scope="module")
def partitions(region: Region) -> dict[str, dg.PartitionsDefinition | None]:
    return {spec.key.to_user_string(): spec.partitions_def for asset in build_assets(region) for spec in asset.specs}


@pytest.fixture
def store(tmp_path: Path, untouched: Storage) -> Storage:
    shutil.copytree(str(untouched.root), tmp_path / "small", symlinks=True)
    return Storage(tmp_path / "small")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, small: Small) -> Storage:
    """The small region with tables and database of its own; all other files are those of the small region."""
    storage = Storage(tmp_path_factory.mktemp("home") / "small")
    shutil.copytree(str(small.storage.path("tables")), str(storage.path("tables")))
    shutil.copyfile(str(small.storage.path("results.duckdb")), str(storage.path("results.duckdb")))
    for folder in ("state", "inputs", "models", "reports", "stac"):
        Path(str(storage.path(folder))).symlink_to(Path(str(small.storage.path(folder))), target_is_directory=True)
    return storage


def _check(asset: str, name: str) -> Check:
    return next(c for c in CHECKS if (c.asset, c.name) == (asset, name))


def _parts(check: Check, partitions: dict[str, dg.PartitionsDefinition | None]) -> list[Part]:
    """The partitions of an asset that the small tables hold."""
    definition = partitions[check.asset]
    dimensions = dimensions_of(definition)
    keys = definition.get_partition_keys() if definition else [None]
    found = [Part.of(key, dimensions) for key in keys]
    return [part for part in found if part.year is None or part.year in YEARS]


def test_names_are_unique_and_every_check_says_what_to_do() -> None:
    names = [(c.asset, c.name) for c in CHECKS]
    assert len(set(names)) == len(names)
    assert all(len(c.what_to_do) > 20 and c.description.endswith(".") for c in CHECKS)
    assert {c.asset for c in CHECKS if c.name == "schema"} == set(checks.TABLE_OF)
    assert {(c.asset, c.name) for c in CHECKS} == set(TAMPER)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: f"{c.asset}.{c.name}")
def test_the_demo_passes(
    check: Check, untouched: Storage, region: Region, partitions: dict[str, dg.PartitionsDefinition | None]
) -> None:
    results = [check(untouched, region, part) for part in _parts(check, partitions)]
    assert results
    for part, result in zip(_parts(check, partitions), results):
        _BEFORE[check.asset, check.name, part] = _wrong(result)
    wrong = [r.metadata["rows"].value for r in results if not r.passed]
    key = (check.asset, check.name)
    assert key in CHANCE or bool(wrong) == (key in HONEST), wrong
    severity = dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN
    assert {r.severity for r in results} == {severity}


#: Wrong rows before the tampering, from the test above where it ran.
_BEFORE: dict[tuple[str, str, Part], int] = {}


def _wrong_before(check: Check, storage: Storage, region: Region, part: Part) -> int:
    key = (check.asset, check.name, part)
    if key not in _BEFORE:
        _BEFORE[key] = _wrong(check(storage, region, part))
    return _BEFORE[key]


# --------------------------------------------------------------------------------------------- tampering
Tamper = Callable[[Storage], None]


def _edit(table: str, change: Callable[[pd.DataFrame], pd.DataFrame], **where: int) -> Tamper:
    """Rewrite one partition's file behind the platform's back."""

    def tamper(storage: Storage) -> None:
        partition = {k: where[k] for k in TABLES[table].partitioned_by}
        path = storage.table(table, partition)
        if TABLES[table].geometry:
            import geopandas as gpd

            frame = gpd.read_parquet(str(path))
        else:
            frame = pd.read_parquet(str(path), partitioning=None)
        changed = change(frame.copy())
        assert not changed.equals(frame), "the tampering changed nothing"
        changed.to_parquet(str(path), index=False)

    return tamper


def _set(column: str, value: object, rows: int | slice = 0) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        picked = frame.index[rows] if isinstance(rows, slice) else frame.index[[rows]]
        frame.loc[picked, column] = value
        return frame

    return change


def _times(column: str, factor: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.assign(**{column: frame[column] * factor})


def _twice(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame, frame.iloc[[0]]], ignore_index=True)


def _all(*steps: Tamper) -> Tamper:
    def tamper(storage: Storage) -> None:
        for step in steps:
            step(storage)

    return tamper


def _selected(column: str, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Change the first selected scene."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        first = frame.index[frame["selected"].astype(bool)][0]
        frame.loc[first, column] = value
        return frame

    return change


def _second_choice(frame: pd.DataFrame) -> pd.DataFrame:
    glacier = frame["glacier_id"].value_counts().index[0]
    frame.loc[frame["glacier_id"] == glacier, "selected"] = True
    return frame


def _share_of_failures(stage: str, partition: str) -> Tamper:
    def tamper(storage: Storage) -> None:
        ids = storage.read_table("glaciers").query("modelled")["glacier_id"].head(8)
        frame = pd.DataFrame({"glacier_id": ids, "error": "the file is damaged", "kind": "OSError"})
        frame["time"] = pd.Timestamp("2026-01-01")
        storage.write_table("failures", frame, {"stage": stage, "partition": partition})

    return tamper


def _grown(share: slice) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[frame.index[share], "rate_km2_per_year"] = 5 * frame["rate_std_km2_per_year"].max()
        return frame

    return change


def _lose_areas(storage: Storage) -> None:
    for fold in (1, 2):
        Path(str(storage.table("areas", {"year": 2017, "fold": fold}))).unlink()


def _in_one_place(frame: pd.DataFrame) -> pd.DataFrame:
    """All glaciers where the first one is."""
    return frame.assign(geometry=[frame.geometry.iloc[0]] * len(frame))


_AREAS = {"year": 2017, "fold": 1}

#: (asset, check) -> what makes it fail. Schemas: each in another way.
TAMPER: dict[tuple[str, str], Tamper] = {
    ("inventory_outlines", "schema"): _edit("glaciers", _twice),
    ("debris_outlines", "schema"): _edit("debris", _set("debris_km2", -1.0)),
    ("glacier_zones", "schema"): _edit("zones", _set("geometry", None)),
    ("cross_validation_folds", "schema"): _edit("folds", lambda f: f.drop(columns="role")),
    ("elevation", "schema"): _edit("elevations", _set("missing_share", 1.5)),
    ("scene_candidates", "schema"): _edit("candidates", _set("coverage", 7.0), year=2017),
    ("selected_scenes", "schema"): _edit("scenes", _set("rank", 0), year=2017),
    ("elevation_change", "schema"): _edit("elevation_changes", _set("fingerprint", None), year=2017),
    ("glacier_cubes", "schema"): _edit("cubes", _set("image_date", pd.NaT), year=2017),
    ("normalization", "schema"): _edit("normalization", lambda f: f.assign(mean="bright"), fold=1),
    ("ensemble_member", "schema"): _edit("members", lambda f: f.assign(surprise=1), fold=1, member=1),
    ("calibration", "schema"): _edit("calibration", _set("temperature", None), fold=1),
    ("band_ratio_baseline", "schema"): _edit("baseline", _twice, fold=1),
    ("glacier_predictions", "schema"): _edit("predictions", _set("epistemic_std", float("inf")), **_AREAS),
    ("interval_taus", "schema"): _edit("taus", _set("tau", 0.9), fold=1),
    ("glacier_areas", "schema"): _edit("areas", _set("recall", 1.2), **_AREAS),
    ("baseline_areas", "schema"): _edit("baseline_areas", _set("glacier_id", None)),
    ("evaluation", "schema"): _edit("evaluation", _set("iou", -0.1), fold=1),
    ("glacier_outlines", "schema"): _edit("outlines", _twice, year=2017),
    ("area_change", "schema"): _edit("changes", _set("rate_km2_per_year", None), year=2017),
    ("regional_change", "schema"): _edit("regional_changes", _set("n_glaciers", -3), year=2017),
    ("area_trends", "schema"): _edit("trends", _set("n_years", 1)),
    **{
        (stage, "failed_glaciers"): _share_of_failures(
            stage,
            {"inventory_outlines": "all", "elevation": "all", "glacier_predictions": "2017.fold_1",
             "glacier_areas": "2017.fold_1"}.get(stage, "2017"),
        )
        for stage in checks.GLACIER_STAGES
    },
    ("inventory_outlines", "outlines_have_area"): _edit("glaciers", _set("inventory_area_km2", 0.0)),
    ("inventory_outlines", "areas_as_stated"): _edit("glaciers", _times("stated_area_km2", 100.0)),
    ("cross_validation_folds", "tested_once"): _edit("folds", lambda f: f[f["role"] != "test"].copy()),
    ("cross_validation_folds", "spatially_separate"): _edit("glaciers", _in_one_place),
    ("elevation", "elevations_plausible"): _edit("elevations", _set("elevation_min_m", -9999.0)),
    ("elevation_change", "dhdt_plausible"): _edit("elevation_changes", _set("dhdt_mean_m_per_year", -99.0), year=2017),
    ("scene_candidates", "glaciers_seen"): _edit("candidates", lambda f: f.head(9), year=2017),
    ("selected_scenes", "thresholds"): _edit("scenes", _selected("cloud_share", 0.8), year=2017),
    ("selected_scenes", "one_image"): _edit("scenes", _second_choice, year=2017),
    ("selected_scenes", "glaciers_with_image"): _edit("scenes", _set("selected", False, slice(0, 40)), year=2017),
    ("selected_scenes", "in_season"): _edit("scenes", _selected("date", pd.Timestamp("2017-02-01")), year=2017),
    ("glacier_cubes", "selected_image"): _edit("cubes", _set("scene_ids", "another"), year=2017),
    ("glacier_cubes", "glacier_visible"): _edit("cubes", _set("not_ok_share", 0.9), year=2017),
    ("normalization", "channels_vary"): _edit("normalization", _set("std", 0.0), fold=1),
    ("ensemble_member", "learned"): _edit("members", _set("validation_iou", 0.02), fold=1, member=1),
    ("ensemble", "complete"): lambda s: shutil.rmtree(str(s.path("tables", "members", "fold=1", "member=2"))),
    ("calibration", "calibration_error"): _edit("calibration", _set("ece_after", 0.3), fold=1),
    ("glacier_predictions", "held_out"): _edit("folds", lambda f: f.assign(role=f["role"].replace("test", "train"))),
    ("evaluation", "better_than_a_threshold"): _edit(
        "evaluation", lambda f: f.assign(false_negative=f["false_negative"] + 10_000 * (f["method"] == "ensemble")),
        fold=1),
    ("glacier_areas", "area_inside_interval"): _edit("areas", lambda f: f.assign(lower_km2=f["area_km2"] + 0.1),
                                                     **_AREAS),
    ("glacier_areas", "area_below_zone"): _edit("areas", _times("upper_km2", 50.0), **_AREAS),
    ("glacier_areas", "ice_left"): _edit("areas", _set("area_km2", 0.0), **_AREAS),
    ("baseline_areas", "recall_of_inventory"): _edit("baseline_areas", _set("recall", 0.1, slice(0, 20))),
    ("baseline_areas", "intervals_cover"): _edit("baseline_areas", _times("inventory_area_km2", 50.0)),
    ("baseline_areas", "complete"): _edit("baseline_areas", lambda f: f.head(2)),
    ("glacier_outlines", "area_of_outlines"): _edit("outlines", _times("area_km2", 2.0), year=2017),
    ("area_change", "growth_is_flagged"): _edit("changes", _grown(slice(0, 1)), year=2017),
    ("area_change", "little_growth"): _edit("changes", _set("flag_growth", True, slice(0, 9)), year=2017),
    ("area_change", "no_jumps"): _edit("areas", _times("area_km2", 0.4), **_AREAS),
    ("regional_change", "totals_add_up"): _edit("regional_changes", _times("area_km2", 1.01), year=2017),
    ("regional_change", "rate_plausible"): _edit("regional_changes", _times("rate_pct_per_year", 30.0), year=2017),
    ("regional_change", "mostly_measured"): _lose_areas,
    ("area_trends", "no_odd_year"): _edit("trends", lambda f: f.assign(odd_year=2017, odd_residual=9.0)),
    ("results_database", "holds_the_tables"): _edit("changes", lambda f: f.head(3), year=2017),
    ("results_database", "matches_inputs"): _edit("cubes", _set("fingerprint", "another", slice(0, 9)), year=2015),
    ("results_database", "newest_year"): lambda s: shutil.rmtree(
        str(s.path("tables", "regional_changes", "year=2017"))),
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(TAMPER), ids=".".join)
def test_tampered_tables_fail(
    key: tuple[str, str], store: Storage, untouched: Storage, region: Region,
    partitions: dict[str, dg.PartitionsDefinition | None],
) -> None:  # fmt: skip
    check = _check(*key)
    parts = _parts(check, partitions)
    wrong_before = {p.label: _wrong_before(check, untouched, region, p) for p in parts}
    TAMPER[key](store)
    results = {p.label: check(store, region, p) for p in parts}
    worse = {label for label, result in results.items() if _wrong(result) > wrong_before[label]}
    assert worse, "tampered, and the check saw nothing"
    failed = results[sorted(worse)[0]]
    assert not failed.passed and failed.metadata["what_to_do"].value == check.what_to_do
    if partitions[check.asset] is not None and key not in {("glacier_predictions", "held_out")}:
        assert len(worse) < len(parts), "only the tampered partitions fail"


def _wrong(result: dg.AssetCheckResult) -> int:
    value = result.metadata["wrong_rows"].value
    assert isinstance(value, int)
    return value


def test_totals_add_up_where_images_of_two_years_are_one(store: Storage, region: Region) -> None:
    """Inventories are dated over years, so a baseline image may be this year's own, or weeks away from it: such a
    glacier has an area and no rate. That is no error; a total that holds it all the same, or lacks another, is one."""
    baseline = store.read_table("baseline_areas")
    now = store.read_table("areas", year=2017).set_index("glacier_id")["image_date"]
    same, near, other = baseline["glacier_id"][baseline["glacier_id"].isin(now.index)].head(3)
    baseline.loc[baseline["glacier_id"] == same, "image_date"] = now[same]
    baseline.loc[baseline["glacier_id"] == near, "image_date"] = now[near] - pd.Timedelta(days=30)
    store.write_table("baseline_areas", baseline)
    areas = store.read_table("areas", year=2017)

    def totals(rated: pd.DataFrame) -> None:
        glaciers = store.read_table("glaciers")
        store.write_table("regional_changes", regional_changes(rated, glaciers, areas, region.change, 2017, 2015),
                          {"year": 2017})  # fmt: skip

    changes, excluded = area_changes(baseline, areas, region.change)
    assert {same: "same_date", near: "short_time"}.items() <= dict(excluded.to_numpy().tolist()).items()
    store.write_table("changes", changes, {"year": 2017})
    totals(changes)
    check = _check("regional_change", "totals_add_up")
    assert check(store, region, Part(year=2017)).passed
    assert check(store, region, Part(year=2015)).passed  # the baseline year has no rates: all its areas count
    totals(changes[changes["glacier_id"] != other])
    assert not check(store, region, Part(year=2017)).passed
    totals(changes)
    store.write_table("changes", changes.head(0), {"year": 2017})
    assert not check(store, region, Part(year=2017)).passed


def test_the_newest_year_is_due_in_december(untouched: Storage, region: Region) -> None:
    endless = region.model_copy(update={"years": region.years.model_copy(update={"last": None})})
    assert checks.due_year(endless, dt.date(2026, 12, 14)) == 2025
    assert checks.due_year(endless, dt.date(2026, 12, 15)) == 2026
    assert checks.due_year(region, dt.date(2031, 1, 1)) == 2017
    stale = checks.newest_year_missing(untouched, endless, Part(), dt.date(2019, 1, 10))
    assert stale.rows.to_dict("records") == [{"newest_year_in_results": 2017, "due": 2018}]
    assert not len(checks.newest_year_missing(untouched, endless, Part(), dt.date(2018, 12, 1)).rows)


# --------------------------------------------------------------------------------------------- inside Dagster
@pytest.mark.parametrize("as_range", [False, True], ids=["one by one", "one run over the range"])
def test_a_failed_year_is_marked_and_no_other(small: Small, store: Storage, as_range: bool) -> None:
    """Evaluations belong to partitions, also where one run takes many of them."""
    TAMPER["regional_change", "totals_add_up"](store)
    workspace = WorkspaceResource(
        region=RegionResource(region=str(small.yaml), home=str(store.root.parent)),
        compute=ComputeResource(workers=1, scheduler=""),
        device=DeviceResource(device="cpu"),
    )
    defs = build_defs(str(small.yaml), {"workspace": workspace})
    key = dg.AssetKey("regional_change")
    check_key = dg.AssetCheckKey(key, "totals_add_up")
    job = defs.resolve_implicit_global_asset_job_def().get_subset(
        asset_selection=set(), asset_check_selection={check_key}
    )
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        for year in (2016, 2017):
            instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=str(year)))
        if as_range:
            name = "dagster/asset_partition_range"
            runs = {"both": {f"{name}_start": "2016", f"{name}_end": "2017"}}
        else:
            runs = {year: {"dagster/partition": year} for year in ("2016", "2017")}
        done = {
            name: job.execute_in_process(instance=instance, tags=tags, raise_on_error=False, run_config=quiet).success
            for name, tags in runs.items()
        }
        assert done == ({"both": False} if as_range else {"2016": True, "2017": False})
        years = defs.resolve_asset_graph().get(key).partitions_def
        state = instance.event_log_storage.get_asset_check_state([(check_key, years)])[check_key]
        found = {s.value: set(v.value.get_partition_keys()) for s, v in state.subsets.items() if v.value}
    assert found == {"SUCCEEDED": {"2016"}, "FAILED": {"2017"}}
