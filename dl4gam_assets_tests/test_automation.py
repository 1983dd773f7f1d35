"""The November schedule, the conditions that carry a year downstream, and the sensors: with an advanced clock."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dl4gam_assets import automation
from dl4gam_assets.automation import (
    CONDITIONS,
    JOBS,
    LOOKS,
    Notice,
    failed_checks,
    new_inputs,
    not_ready,
    report_failure,
    trained_here,
    year_request,
)
from dl4gam_assets.checks import CHECKS, _newest
from dl4gam_assets.compute import Mapper
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.notify import Failure, NotifyError, checks_text, send
from dl4gam_assets.partitions import Partitions
from dl4gam_assets.resources import ComputeResource, DeviceResource, RegionResource, WebhookResource, WorkspaceResource
from dl4gam_assets.settings import Region, load_region, parse_region
from dl4gam_assets.stages.base import Workspace
from dl4gam_assets.stages.imagery import selected_scenes
from dl4gam_assets.stages.watch import look_outside
from dl4gam_assets.storage import Storage
from dl4gam_assets_tests.small_region import Small


def _november(year: int) -> dt.datetime:
    return dt.datetime(year, 11, 15, 6, tzinfo=dt.UTC)


class Clock:
    """A deployment whose runs take no time: requests are answered with materializations and passed checks."""

    def __init__(self, region: str, home: Path) -> None:
        self.workspace = WorkspaceResource(
            region=RegionResource(region=region, home=str(home)), compute=ComputeResource(workers=1),
            device=DeviceResource(device="cpu"),
        )  # fmt: skip
        self.region = load_region(region)
        self.partitions = Partitions(self.region)
        self.defs = build_defs(region)
        self.graph = self.defs.resolve_asset_graph()
        self.instance = dg.DagsterInstance.ephemeral()
        self.cursor: Any = None
        self.results: dict[tuple[str, str | None], int] = {}
        self.now = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)

    def made(
        self, asset: str, partition: str | None = None, failed_check: str | None = None, *, unchanged: bool = False
    ) -> None:
        """A materialization with another result than before, or with the same."""
        self.results[asset, partition] = self.results.get((asset, partition), 0) + (not unchanged)
        tags = {"dagster/data_version": str(self.results[asset, partition])}
        event = dg.AssetMaterialization(dg.AssetKey(asset), partition=partition, tags=tags)
        self.instance.report_runless_asset_event(event)
        if failed_check:
            self.check(asset, failed_check, partition, passed=False)

    def check(self, asset: str, name: str, partition: str | None, *, passed: bool) -> None:
        """An evaluation as a run records it."""
        evaluation = dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(asset), check_name=name, passed=passed, blocking=True, partition=partition,
            target_materialization_data=_newest(self.instance, asset, partition),
        )  # fmt: skip
        event = dg.DagsterEvent(
            event_type_value=dg.DagsterEventType.ASSET_CHECK_EVALUATION.value, job_name="checks",
            event_specific_data=evaluation,
        )  # fmt: skip
        self.instance.report_dagster_event(event, run_id=str(uuid.uuid4()))

    def everything(self, but_year: int | None = None) -> None:
        """Make all partitions up to the clock's year (but one), in the order of the graph."""
        for key in self.graph.toposorted_asset_keys:
            for partition in self.keys(key.to_user_string()):
                if partition is None or but_year is None or str(but_year) not in partition:
                    self.made(key.to_user_string(), partition)

    def keys(self, asset: str) -> list[str | None]:
        definition = self.graph.get(dg.AssetKey(asset)).partitions_def
        if definition is None:
            return [None]
        from dagster._core.definitions.partitions.context import partition_loading_context

        with partition_loading_context(effective_dt=self.now, dynamic_partitions_store=self.instance):
            return [str(k) for k in definition.get_partition_keys()]

    def tick(self) -> dict[str, set[str | None]]:
        """One evaluation of the conditions: what it requests."""
        self.now += dt.timedelta(minutes=1)
        result = dg.evaluate_automation_conditions(
            self.defs, self.instance, cursor=self.cursor, evaluation_time=self.now
        )
        self.cursor = result.cursor
        requested: dict[str, set[str | None]] = {}
        for evaluated in result.results:
            asset = evaluated.key.to_user_string()
            if isinstance(evaluated.key, dg.AssetKey) and evaluated.true_subset.size:
                subset = evaluated.true_subset
                keyed = self.graph.get(evaluated.key).partitions_def is not None
                requested[asset] = {str(k) for k in subset.expensively_compute_partition_keys()} if keyed else {None}
        return requested

    def settle(
        self, fail: tuple[str, str, str] | None = None, *, unchanged: bool = False
    ) -> dict[str, list[str | None]]:
        """Tick and run what is asked for until nothing is; all that was made, by asset, in order. ``unchanged``: with
        the same results as before."""
        made: dict[str, list[str | None]] = {}
        for _ in range(25):
            wanted = self.tick()
            if not wanted:
                return made
            for key in self.graph.toposorted_asset_keys:
                asset = key.to_user_string()
                for partition in sorted(wanted.get(asset, ()), key=str):
                    failed = fail[2] if fail and fail[:2] == (asset, partition) else None
                    self.made(asset, partition, failed, unchanged=unchanged)
                    made.setdefault(asset, []).append(partition)
        raise AssertionError("the graph never settles")

    def november(self, year: int) -> Any:
        """The schedule's tick of a November."""
        self.now = _november(year)
        schedule = self.defs.resolve_schedule_def("november")
        with dg.build_schedule_context(
            instance=self.instance,
            scheduled_execution_time=self.now,
            repository_def=self.defs.get_repository_def(),
            resources={"workspace": self.workspace},
        ) as context:
            return schedule.evaluate_tick(context)


@pytest.fixture(scope="module")
def grown_up(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """The Alps with everything made up to 2025, whose conditions have been looked at once."""
    clock = Clock("alps", tmp_path_factory.mktemp("home"))
    clock.everything(but_year=2026)
    assert clock.settle() == {}
    return clock


def _prepared(clock: Clock) -> None:
    """The store says that region and folds are ready for a year."""
    storage, state = clock.workspace.region.storage(), {"input": "x", "output": "x", "time": "", "metadata": {}}
    for asset in ("inventory_outlines", "glacier_zones", "cross_validation_folds", "elevation"):
        storage.write_state(asset, "all", state)
    for fold in range(1, clock.region.folds.n + 1):
        storage.write_state("calibration", f"fold_{fold}", state)


def test_five_novembers_pass_untouched(grown_up: Clock) -> None:
    """In one of them the run fails, and is made good in January; in another the daemon was down until December."""
    clock = grown_up
    folds = [f"fold_{f}" for f in range(1, 6)]
    keys = []

    def added(year: int) -> None:
        for asset in JOBS["add_a_year"].assets:
            clock.made(asset, str(year))
        made = clock.settle()
        assert made.pop("area_trends") == [None] and set(made.pop("results_database")) == {None}
        assert {asset: sorted(map(str, parts)) for asset, parts in made.items()} == {
            **{asset: [f"{fold}|{year}" for fold in folds] for asset in ("glacier_predictions", "glacier_areas")},
            **{
                asset: [str(year)]
                for asset in ("glacier_outlines", "area_change", "regional_change", "report", "stac_catalog")
            },
        }, year

    (skipped,) = [clock.november(2026).skip_message]
    assert "run the job prepare_region" in str(skipped), "a store without an inventory is begun by people"
    _prepared(clock)
    for year in range(2026, 2031):
        data = clock.november(year)
        (request,) = data.run_requests
        assert request.partition_key == str(year)
        keys.append(request.run_key)
        again = clock.november(year)
        assert [r.run_key for r in again.run_requests] == [request.run_key], "a repeated tick asks for the same run"
        if year == 2027:
            clock.made("scene_candidates", "2027")  # and then the run failed
            assert set(clock.settle()) <= {"selected_scenes", "glacier_cubes"}
            clock.now = dt.datetime(2028, 1, 20, tzinfo=dt.UTC)
        if year == 2029:
            clock.now = dt.datetime(2029, 12, 20, tzinfo=dt.UTC)
        added(year)
        clock.now = dt.datetime(year + 1, 1, 23, tzinfo=dt.UTC)
        assert clock.settle() == {}, "the new calendar year begins nothing by itself"
    assert len(set(keys)) == 5


def test_a_store_that_was_never_trained_is_not_begun_by_november(demo: Clock) -> None:
    ws = demo.workspace.plain()
    assert "no inventory_outlines, glacier_zones" in str(not_ready(ws))
    _prepared(demo)
    assert not_ready(ws) is None
    Path(str(ws.storage.state_path("calibration", "fold_3"))).unlink()
    assert str(not_ready(ws)).startswith("fold_3 of the region 'demo' are not trained and calibrated yet")


def test_a_year_outside_the_region_is_skipped_with_the_reason() -> None:
    skipped = year_request(Partitions(load_region("demo")), _november(2026))
    assert isinstance(skipped, dg.SkipReason) and "2015 to 2024" in str(skipped.skip_message)


def test_everything_is_off_until_it_is_turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def states() -> set[bool]:
        repository = build_defs("demo").get_repository_def()
        running = {dg.DefaultScheduleStatus.RUNNING, dg.DefaultSensorStatus.RUNNING}
        switched = [*repository.schedule_defs, *repository.sensor_defs]
        return {s.default_status in running for s in switched if s.name != "find_lost_runs"}  # which starts nothing

    monkeypatch.delenv("DL4GAM_AUTOMATION", raising=False)
    assert states() == {False}
    monkeypatch.setenv("DL4GAM_AUTOMATION", "on")
    assert states() == {True}


@pytest.mark.parametrize("job", sorted(JOBS))
def test_jobs_keep_to_one_family_of_partitions(job: str) -> None:
    definition = build_defs("demo").resolve_job_def(job)
    assert definition.description


def test_every_asset_has_a_way_to_be_made() -> None:
    """By a condition, or by a job for people."""
    graph = build_defs("demo").resolve_asset_graph()
    by_job = {asset for job in JOBS.values() for asset in job.assets} | {"simulated_inputs"}
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == by_job | set(CONDITIONS)


# --------------------------------------------------------------------------------------------- conditions
@pytest.fixture
def demo(tmp_path: Path) -> Clock:
    clock = Clock("demo", tmp_path)
    clock.everything()
    assert clock.settle() == {}
    return clock


def test_another_image_of_an_old_year_is_carried_on(demo: Clock) -> None:
    demo.made("selected_scenes", "2019")
    made = demo.settle()
    assert made["glacier_cubes"] == ["2019"]
    assert made["glacier_areas"] == [f"fold_{f}|2019" for f in range(1, 6)]
    assert made["area_change"] == made["report"] == ["2019"]
    assert not {"ensemble_member", "calibration", "evaluation", "scene_candidates"} & set(made)


def test_a_failed_blocking_check_holds_back_its_partition_only(demo: Clock) -> None:
    for year in ("2019", "2020"):
        demo.made("glacier_cubes", year, "selected_image" if year == "2019" else None)
    made = demo.settle()
    assert made["glacier_predictions"] == [f"fold_{f}|2020" for f in range(1, 6)]
    assert made["area_change"] == made["report"] == ["2020"]
    assert demo.settle() == {}, "held back for as long as it fails"
    demo.check("glacier_cubes", "selected_image", "2019", passed=True)
    made = demo.settle()
    assert made["area_change"] == made["report"] == ["2019"], "and carried on when it passes"


def test_a_failed_fold_keeps_its_year_from_change_and_publication(demo: Clock) -> None:
    demo.made("glacier_predictions", "fold_2|2021")
    made = demo.settle(fail=("glacier_areas", "fold_2|2021", "area_inside_interval"))
    assert made["glacier_areas"] == ["fold_2|2021"]
    assert not {"glacier_outlines", "area_change", "regional_change", "area_trends", "report"} & set(made)


def test_a_new_inventory_renews_what_exists_and_trains_nothing(demo: Clock) -> None:
    demo.made("inventory_outlines")
    made = demo.settle()
    years = [str(y) for y in range(2015, 2025)]
    assert set(made["scene_candidates"]) == set(made["glacier_cubes"]) == set(years)
    assert made["cross_validation_folds"] == made["glacier_zones"] == [None]
    assert not {"ensemble_member", "normalization", "band_ratio_baseline"} & set(made)


def test_what_is_made_again_without_a_change_starts_nothing(demo: Clock) -> None:
    for asset, partition in (("inventory_outlines", None), ("glacier_cubes", "2019"), ("normalization", "fold_1")):
        demo.made(asset, partition, unchanged=True)
    assert demo.settle() == {}


def test_a_change_ends_where_the_result_is_the_same(demo: Clock) -> None:
    """Another inventory file, from which the same folds and zones come: only what was read from it is looked at."""
    demo.made("inventory_outlines")
    made = demo.settle(unchanged=True)
    direct = {
        key.to_user_string() for key in demo.graph.get(dg.AssetKey("inventory_outlines")).child_keys
    } - {"normalization", "band_ratio_baseline"}  # fmt: skip
    assert set(made) <= direct and {"glacier_zones", "cross_validation_folds"} <= set(made)


def test_a_requested_training_goes_all_the_way(demo: Clock) -> None:
    demo.made("normalization", "fold_2")
    made = demo.settle()
    assert made["ensemble_member"] == [f"fold_2|member_0{m}" for m in (1, 2, 3)]
    assert made["ensemble"] == made["calibration"] == ["fold_2"]
    assert sorted(map(str, made["glacier_predictions"])) == [f"fold_2|{y}" for y in range(2015, 2025)]
    assert "scene_candidates" not in made and "glacier_cubes" not in made


def test_new_cubes_alone_train_nothing(demo: Clock) -> None:
    demo.made("glacier_cubes", "2015")
    assert "ensemble_member" not in demo.settle()


# --------------------------------------------------------------------------------------------- inputs from outside
@pytest.fixture
def outside(small: Small, tmp_path: Path) -> Workspace:
    """A region with real tables and its own inventory and override files, whose choice of images can be made again."""
    raw = load_region("demo").model_dump(mode="json")
    raw |= {"name": "watched", "simulation": None, "data_root": str(tmp_path / "data")}
    raw["imagery"]["selection"]["overrides"] = "overrides.csv"
    raw["inventory"] |= {"path": "inventory.gpkg", "debris": [{"path": "debris.gpkg"}]}
    region: Region = parse_region(raw)
    storage = Storage(tmp_path / "watched")
    shutil.copytree(str(small.storage.path("tables")), str(storage.path("tables")))
    data = tmp_path / "data"
    data.mkdir()
    glaciers = storage.read_table("glaciers")
    glaciers[["glacier_id", "geometry"]].to_file(data / "inventory.gpkg", layer="glaciers")
    storage.read_table("debris").to_file(data / "debris.gpkg")
    (data / "overrides.csv").write_text("glacier_id,year,date\n")
    ws = Workspace(region, storage, Mapper(1), device="cpu")
    for year in ("2015", "2016", "2017"):
        state = {"input": "x", "output": "candidates", "time": "", "metadata": {}}
        storage.write_state("scene_candidates", year, state)
    for name in ("inventory_outlines", "debris_outlines"):
        storage.write_state(name, "all", {"input": "x", "output": "x", "time": "", "metadata": {}})
    return ws


YEARS = [str(y) for y in range(2015, 2025)]


def _noticed(ws: Workspace, cursor: str | None) -> tuple[list[tuple[str | None, str | None]], str, set[str | None]]:
    requests, cursor = new_inputs(ws, cursor, YEARS)
    return [(r.job_name, r.partition_key) for r in requests], cursor, {r.run_key for r in requests}


def test_new_override_lines_ask_for_their_years(outside: Workspace) -> None:
    _, cursor, _ = _noticed(outside, None)
    assert _noticed(outside, cursor)[0] == []
    glacier = outside.storage.read_table("scenes", year=2017)["glacier_id"].iloc[0]
    file = outside.data_root / "overrides.csv"
    file.write_text(f"glacier_id,year,date\n{glacier},2017,reject\n{glacier},2020,reject\n")
    found, cursor, first = _noticed(outside, cursor)
    assert found == [("choose_images", "2017")], "2020 was never searched: its lines wait for it"
    assert _noticed(outside, cursor)[0] == []
    chosen = selected_scenes(outside, 2017)
    assert chosen.metadata["overrides"] >= 1
    file.write_text("glacier_id,year,date\n")
    found, cursor, second = _noticed(outside, cursor)
    assert found == [("choose_images", "2017")], "a line taken back is a change too"
    file.write_text(f"glacier_id,year,date\n{glacier},2017,reject\n")
    found, cursor, third = _noticed(outside, cursor)
    assert found == [("choose_images", "2017")] and len(first | second | third) == 3, "no run key twice"


def test_a_crash_before_the_cursor_is_kept_asks_for_the_same_run(outside: Workspace) -> None:
    _, cursor, _ = _noticed(outside, None)
    shutil.copy(outside.data_root / "debris.gpkg", outside.data_root / "inventory.gpkg")
    first, _, keys = _noticed(outside, cursor)
    again, _, same = _noticed(outside, cursor)
    assert first == again == [("prepare_region", None)] and keys == same


def test_new_debris_asks_for_the_debris_alone(outside: Workspace) -> None:
    _, cursor, _ = _noticed(outside, None)
    with open(outside.data_root / "debris.gpkg", "ab") as handle:
        handle.write(b"\0")
    requests, _ = new_inputs(outside, cursor, YEARS)
    assert [r.asset_selection for r in requests] == [[dg.AssetKey("debris_outlines")]]


def test_trained_members_ask_for_their_fold_when_the_last_is_there(outside: Workspace) -> None:
    _, cursor, _ = _noticed(outside, None)
    state = {"input": "x", "time": "", "metadata": {}}
    for member in (1, 2):
        outside.storage.write_state("ensemble_member", f"fold_2.member_0{member}", state | {"output": f"sha{member}"})
        assert _noticed(outside, cursor)[0] == []
    outside.storage.write_state("ensemble_member", "fold_2.member_03", state | {"output": "sha3"})
    found, cursor, _ = _noticed(outside, cursor)
    assert found == [("calibrate_ensembles", "fold_2")]
    outside.storage.write_state("ensemble_member", "fold_2.member_03", state | {"output": "better"})
    assert _noticed(outside, cursor)[0] == [("calibrate_ensembles", "fold_2")]


def test_members_that_this_dagster_trained_are_carried_on_by_conditions_alone(outside: Workspace) -> None:
    _, cursor, _ = _noticed(outside, None)
    state = {"input": "x", "time": "", "metadata": {}}
    with dg.DagsterInstance.ephemeral() as instance:
        for member in (1, 2, 3):
            label = f"fold_2.member_0{member}"
            outside.storage.write_state("ensemble_member", label, state | {"output": f"sha{member}"})
            event = dg.AssetMaterialization(
                dg.AssetKey("ensemble_member"), partition=f"fold_2|member_0{member}",
                tags={"dagster/data_version": f"sha{member}"},
            )  # fmt: skip
            assert not trained_here(instance, outside, "fold_2")
            instance.report_runless_asset_event(event)
        carried = lambda fold: trained_here(instance, outside, fold)  # noqa: E731
        assert new_inputs(outside, cursor, YEARS, carried=carried)[0] == []
        outside.storage.write_state("ensemble_member", "fold_2.member_03", state | {"output": "from elsewhere"})
        assert len(new_inputs(outside, cursor, YEARS, carried=carried)[0]) == 1


def test_more_members_than_there_are_ask_for_nothing(outside: Workspace) -> None:
    state = {"input": "x", "time": "", "metadata": {}, "output": "sha"}
    for member in (1, 2, 3):
        outside.storage.write_state("ensemble_member", f"fold_2.member_0{member}", state)
    _, cursor, _ = _noticed(outside, None)
    raw = outside.region.model_dump(mode="json")
    raw["training"]["members"] = 5
    more = Workspace(parse_region(raw), outside.storage, Mapper(1), device="cpu")
    assert _noticed(more, cursor)[0] == [], "two are missing: a calibration could only fail"


def test_a_sensor_that_forgot_may_ask_again(outside: Workspace) -> None:
    first, _, keys = _noticed(outside, None)
    again, _, others = _noticed(outside, None)
    assert first == again != [] and not keys & others, "the first run may have failed"


def test_an_input_that_changed_nothing_asks_for_nothing(outside: Workspace) -> None:
    """It was made by hand meanwhile."""
    from dl4gam_assets.stages.inventory import debris_outlines

    _, cursor, _ = _noticed(outside, None)
    with open(outside.data_root / "debris.gpkg", "ab") as handle:
        handle.write(b"\0")
    assert len(_noticed(outside, cursor)[0]) == 1
    debris_outlines(outside)
    assert _noticed(outside, cursor)[0] == []


def test_the_first_look_asks_for_what_is_out_of_date(outside: Workspace) -> None:
    found, _, _ = _noticed(outside, None)
    assert ("prepare_region", None) in found
    assert not [f for f in found if f[0] == "choose_images"], "no lines yet"


def test_a_missing_or_damaged_input_is_said_and_asks_for_nothing(outside: Workspace) -> None:
    _, cursor, _ = _noticed(outside, None)
    (outside.data_root / "inventory.gpkg").unlink()
    (outside.data_root / "overrides.csv").write_bytes(b"\xff\xfe\x00glacier")
    said: list[str] = []
    requests, kept = new_inputs(outside, cursor, YEARS, said.append)
    assert requests == [] and any("inventory.gpkg does not exist" in text for text in said)
    assert any(text.startswith("overrides:") for text in said)
    before, after = Notice.read(cursor), Notice.read(kept)
    assert before and after and after.known == before.known, "what was known stays known"
    assert Notice.read("no json") is None


def test_a_simulated_region_is_watched_too(tmp_path: Path) -> None:
    ws = Workspace(load_region("demo"), Storage(tmp_path), Mapper(1))
    assert any("does not exist" in problem for problem in look_outside(ws).problems)


# --------------------------------------------------------------------------------------------- failures
class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, json.loads(body)))  # type: ignore[attr-defined]
        status = self.server.answers.pop(0) if self.server.answers else 200  # type: ignore[attr-defined]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook)
    server.got, server.answers = [], []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_failed_run_is_reported_with_partition_error_and_link(
    hook: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["2023"]))
    def broken(context) -> None:  # type: ignore[no-untyped-def]
        raise dg.Failure("1 of 1 partitions failed:\n  2023: scene 7 can not be read")

    secret = f"http://127.0.0.1:{hook.server_port}/secret-token"
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([broken], partition_key="2023", instance=instance, raise_on_error=False)
        context = dg.build_run_status_sensor_context(
            sensor_name="report_failures", dagster_event=result.get_run_failure_event(), dagster_instance=instance,
            dagster_run=result.dagster_run,
        ).for_run_failure()  # fmt: skip
        webhook = WebhookResource(url=secret, host="127.0.0.1", ui="https://dagster.example.org/")
        report_failure(context, webhook)
        ((path, sent),) = hook.got
        assert path == "/secret-token"
        assert "[2023] failed" in sent["text"] and "scene 7 can not be read" in sent["text"]
        assert f"https://dagster.example.org/runs/{result.run_id}" in sent["text"]
        hook.answers[:] = [404]
        report_failure(context, webhook)  # a webhook that refuses does not fail the sensor
        report_failure(context, WebhookResource())  # and none is needed
    assert len(hook.got) == 2
    assert "secret-token" not in caplog.text


def test_failed_checks_are_told_each_once(demo: Clock) -> None:
    assert failed_checks(demo.instance, None)[0] == []
    _, cursor = failed_checks(demo.instance, None)
    demo.made("glacier_cubes", "2019", "selected_image")
    demo.check("glacier_cubes", "selected_image", "2020", passed=True)
    lines, cursor = failed_checks(demo.instance, cursor)
    assert lines == ["selected_image of glacier_cubes [2019] (holds back what comes after it): failed"]
    assert failed_checks(demo.instance, cursor)[0] == []
    assert checks_text(lines * 12).splitlines()[0] == "dl4gam: 12 checks failed"


def test_the_monthly_look_makes_nothing(demo: Clock) -> None:
    job = demo.defs.resolve_job_def("look_at_results")
    assert job.asset_layer.executable_asset_keys == set()
    assert [node.name for node in job.nodes] == ["checks_of_results_database"]
    assert set(LOOKS) <= {(check.asset, check.name) for check in CHECKS}
    assert "monthly_look" in {s.name for s in demo.defs.get_repository_def().schedule_defs}


def test_messages_go_to_the_configured_host_only(hook: Any) -> None:
    url = f"http://127.0.0.1:{hook.server_port}/x"
    for host in ("", "chat.example.org"):
        with pytest.raises(NotifyError, match="nothing was sent"):
            send(url, host, "text")
    with pytest.raises(NotifyError, match="must be https"):
        send("http://chat.example.org/x", "chat.example.org", "text")
    assert hook.got == []
    hook.answers[:] = [302]
    with pytest.raises(NotifyError, match="answered 302"):
        send(url, "127.0.0.1", "text")
    assert len(hook.got) == 1


def test_a_busy_webhook_is_asked_again(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.retry.Retry.get_backoff_time", lambda self: 0.0)
    hook.answers[:] = [503, 429]
    send(f"http://127.0.0.1:{hook.server_port}/x", "127.0.0.1", "text")
    assert len(hook.got) == 3


def test_a_webhook_that_is_down_is_named_without_its_secret() -> None:
    with pytest.raises(NotifyError) as error:
        send("http://127.0.0.1:9/token", "127.0.0.1", "text", attempts=1, timeout_s=0.5)
    assert "127.0.0.1" in str(error.value) and "token" not in str(error.value)


def test_long_failures_are_cut() -> None:
    text = Failure("add_a_year", "abcdef0123", "2026", [f"step {i}: " + "x" * 900 for i in range(30)]).text()
    assert len(text) <= 3000 and text.startswith("dl4gam: add_a_year [2026] failed (run abcdef01)")


def test_the_sensors_are_wired_to_real_jobs() -> None:
    repository = build_defs("demo").get_repository_def()
    sensor = repository.get_sensor_def("notice_new_inputs")
    assert {job.name for job in sensor.jobs} == {"prepare_region", "choose_images", "calibrate_ensembles"}
    assert {s.name for s in repository.sensor_defs} == {
        "carry_changes_downstream", "notice_new_inputs", "report_failures", "report_checks", "find_lost_runs",
    }  # fmt: skip
    assert automation.NOVEMBER in {s.cron_schedule for s in repository.schedule_defs}
