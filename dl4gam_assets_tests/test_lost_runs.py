"""Runs whose process was killed: found, recorded as failed, their places free; living ones are left alone."""

import datetime as dt
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from dagster._core.storage.tags import RUN_FAILURE_REASON_TAG

from dl4gam_assets import orchestrate
from dl4gam_assets.definitions import build_defs
from dl4gam_assets.upkeep import (
    HOST_TAG,
    PROCESS_TAG,
    busy_pools,
    give_up_lost_runs,
    lost_runs,
    own_process,
    remove_run,
    superseded_runs,
    tell_host,
    this_machine,
)

WORK = """
import sys, time, dagster as dg
from pathlib import Path
from dl4gam_assets.upkeep import own_process

@dg.op(pool="gpu")
def endless():
    Path(sys.argv[1]).touch()
    time.sleep(600)

@dg.job
def working():
    endless()

with dg.DagsterInstance.from_config(sys.argv[2]) as instance:
    working.execute_in_process(instance=instance, tags=own_process())
"""


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text(
        "telemetry: {enabled: false}\nconcurrency: {pools: {default_limit: 1, granularity: op}}\n"
    )
    with dg.DagsterInstance.from_config(str(tmp_path)) as opened:
        yield opened


def test_a_killed_run_of_the_command_line_is_found_and_a_living_one_is_not(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", WORK, str(started), str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert lost_runs(instance) == []
        assert list(busy_pools(instance, ["gpu", "memory"])) == ["gpu"]
    finally:
        process.kill()
        process.wait()
    assert list(busy_pools(instance, ["gpu"])) == ["gpu"]  # would be waited for, for ever
    (run_id,) = give_up_lost_runs(instance)
    assert busy_pools(instance, ["gpu"]) == {}
    run = instance.get_run_by_id(run_id)
    assert run is not None and run.status == dg.DagsterRunStatus.FAILURE
    assert run.tags["dagster/max_retries"] == "0"  # nobody else can do a run of the command line
    assert run.tags.get(RUN_FAILURE_REASON_TAG) != "STEP_FAILURE"
    assert any("is gone" in (e.message or "") + e.user_message for e in instance.all_logs(run_id))
    assert give_up_lost_runs(instance) == []


def test_the_place_of_a_run_that_ended_without_giving_it_back_is_freed(instance: dg.DagsterInstance) -> None:
    ended, alive = (
        instance.create_run_for_job(dg.job(name=name)(lambda: None), status=status).run_id
        for name, status in (("ended", dg.DagsterRunStatus.FAILURE), ("alive", dg.DagsterRunStatus.STARTED))
    )
    for pool, run_id in (("network", ended), ("memory", alive)):
        instance.event_log_storage.set_concurrency_slots(pool, 1)
        assert instance.event_log_storage.claim_concurrency_slot(pool, run_id, "step").is_claimed
    assert give_up_lost_runs(instance) == []
    assert busy_pools(instance, ["network", "memory", "unknown"]) == {"memory": [alive]}


def test_a_pool_held_by_another_run_is_waited_for_and_told(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrate, "POOL_WAIT_S", 0.05)
    other = instance.create_run_for_job(dg.job(name="other")(lambda: None), status=dg.DagsterRunStatus.STARTED).run_id
    storage = instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    assert storage.claim_concurrency_slot("gpu", other, "step").is_claimed
    said: list[str] = []
    definitions = build_defs("demo")
    definitions.resolve_asset_graph()  # it takes a while, which the wait is not to be about
    threading.Timer(1.0, storage.free_concurrency_slots_for_run, [other]).start()
    begin = time.monotonic()
    orchestrate._wait_for_pools(instance, definitions, ["glacier_predictions"], said.append)
    assert time.monotonic() - begin > 0.3 and said == [f"  waiting for pool 'gpu', held by run {other[:8]}"]
    orchestrate._wait_for_pools(instance, definitions, ["glacier_areas"], said.append)
    assert len(said) == 1


def test_the_process_that_a_launcher_started_is_known_from_the_log(instance: dg.DagsterInstance) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    mine = next(iter(own_process().values())).rpartition(":")[2]
    runs = {}
    for name, pid in (("gone", str(gone.pid)), ("alive", mine)):
        run = instance.create_run_for_job(dg.job(name=name)(lambda: None), status=dg.DagsterRunStatus.STARTED)
        _started(instance, run, pid)
        tell_host(instance, run)
        runs[name] = run.run_id
    silent = instance.create_run_for_job(dg.job(name="silent")(lambda: None), status=dg.DagsterRunStatus.STARTED)
    assert give_up_lost_runs(instance) == [runs["gone"]]
    for run_id in (runs["alive"], silent.run_id):  # of an unknown process nothing can be said
        run = instance.get_run_by_id(run_id)
        assert run is not None and run.status == dg.DagsterRunStatus.STARTED


def _started(instance: dg.DagsterInstance, run: dg.DagsterRun, pid: str) -> None:
    """The event of a launcher that started a process; it says on no machine."""
    instance.report_engine_event(
        f"Started process for run (pid: {pid}).", run, EngineEventData(metadata={"pid": dg.MetadataValue.text(pid)})
    )


def test_a_run_of_another_machine_is_left_alone_until_nothing_is_heard_of_it(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process id may be free here, or be anything."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    tags = {
        "launched elsewhere": {HOST_TAG: "other@1"}, "nobody knows where": {},
        "command line elsewhere": {PROCESS_TAG: f"other@1:{gone.pid}"},
    }  # fmt: skip
    for name, given in tags.items():
        run = instance.create_run_for_job(
            dg.job(name=name.replace(" ", "_"))(lambda: None), status=dg.DagsterRunStatus.STARTED, tags=given
        )
        _started(instance, run, str(gone.pid))
    assert lost_runs(instance) == []
    monkeypatch.setattr("dl4gam_assets.upkeep.SILENT_S", -1.0)
    assert {run.job_name.replace("_", " ") for run, _ in lost_runs(instance)} == set(tags)
    assert all("another machine" in why for _, why in lost_runs(instance))


def test_a_run_that_is_executed_again_has_a_process_of_its_own(instance: dg.DagsterInstance) -> None:
    """It has the tags of its parent, which the command line did and whose process is gone."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    mine = own_process()
    tags = mine | {PROCESS_TAG: mine[PROCESS_TAG].rpartition(":")[0] + f":{gone.pid}"}
    job = dg.job(name="again")(lambda: None)
    parent = instance.create_run_for_job(job, status=dg.DagsterRunStatus.FAILURE, tags=tags)
    run = instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.STARTED, tags=tags, parent_run_id=parent.run_id, root_run_id=parent.run_id
    )
    assert lost_runs(instance) == []
    _started(instance, run, mine[PROCESS_TAG].rpartition(":")[2])
    tell_host(instance, run)
    assert run.tags[HOST_TAG] == this_machine() and lost_runs(instance) == []
    died = instance.create_run_for_job(
        job, status=dg.DagsterRunStatus.STARTED, tags=tags, parent_run_id=parent.run_id, root_run_id=parent.run_id
    )
    _started(instance, died, str(gone.pid))
    tell_host(instance, died)
    assert give_up_lost_runs(instance) == [died.run_id]


def test_a_run_from_before_a_reboot_is_lost_whatever_has_its_id_now(instance: dg.DagsterInstance) -> None:
    (mine,) = (value for name, value in own_process().items() if name == PROCESS_TAG)
    before = mine.replace(this_machine(), f"{this_machine().partition('@')[0]}@an earlier start")
    run = instance.create_run_for_job(
        dg.job(name="before")(lambda: None), status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: before}
    )
    assert give_up_lost_runs(instance) == [run.run_id]


def test_upkeep_leaves_nothing_of_a_run_and_keeps_the_newest_evaluations(tmp_path: Path) -> None:
    @dg.asset
    def made() -> None:
        print("printed by the run")

    @dg.asset_check(asset=made)
    def looked_at() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=True)

    def run(*, check: bool) -> str:
        job = dg.Definitions([made], asset_checks=[looked_at]).resolve_implicit_global_asset_job_def()
        keys = {looked_at.check_key} if check else set()
        part = job.get_subset(asset_selection=set() if check else {made.key}, asset_check_selection=keys)
        return part.execute_in_process(instance=opened).run_id

    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(tmp_path)) as opened:
        first, looked, second = run(check=False), run(check=True), run(check=False)
        later = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        assert superseded_runs(opened, later) == [first], "the others hold what is newest"
        left = [path for path in tmp_path.rglob("*") if first in str(path)]
        assert any("history" in str(path) for path in left) and any("storage" in str(path) for path in left)
        remove_run(opened, first)
        assert [path for path in tmp_path.rglob("*") if first in str(path)] == []
        assert {looked, second} <= {record.dagster_run.run_id for record in opened.get_run_records()}
        assert opened.all_logs(second)


def test_the_sensor_is_always_on() -> None:
    (sensor,) = (s for s in build_defs("demo").sensors or [] if s.name == "find_lost_runs")
    assert isinstance(sensor, dg.SensorDefinition) and sensor.default_status == dg.DefaultSensorStatus.RUNNING
