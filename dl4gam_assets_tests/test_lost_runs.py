"""Runs whose process was killed: found, recorded as failed, their places free; living ones are left alone."""

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
from dl4gam_assets.upkeep import busy_pools, give_up_lost_runs, lost_runs, own_process

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
        deadline = time.monotonic() + 60
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
    threading.Timer(0.5, storage.free_concurrency_slots_for_run, [other]).start()
    begin = time.monotonic()
    orchestrate._wait_for_pools(instance, build_defs("demo"), ["glacier_predictions"], said.append)
    assert time.monotonic() - begin > 0.3 and said == [f"  waiting for pool 'gpu', held by run {other[:8]}"]
    orchestrate._wait_for_pools(instance, build_defs("demo"), ["glacier_areas"], said.append)
    assert len(said) == 1


def test_the_process_that_a_launcher_started_is_known_from_the_log(instance: dg.DagsterInstance) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    mine = next(iter(own_process().values())).rpartition(":")[2]
    runs = {}
    for name, pid in (("gone", str(gone.pid)), ("alive", mine)):
        run = instance.create_run_for_job(dg.job(name=name)(lambda: None), status=dg.DagsterRunStatus.STARTED)
        instance.report_engine_event(
            f"Started process for run (pid: {pid}).", run, EngineEventData(metadata={"pid": dg.MetadataValue.text(pid)})
        )
        runs[name] = run.run_id
    silent = instance.create_run_for_job(dg.job(name="silent")(lambda: None), status=dg.DagsterRunStatus.STARTED)
    assert give_up_lost_runs(instance) == [runs["gone"]]
    for run_id in (runs["alive"], silent.run_id):  # of an unknown process nothing can be said
        run = instance.get_run_by_id(run_id)
        assert run is not None and run.status == dg.DagsterRunStatus.STARTED


def test_the_sensor_is_always_on() -> None:
    (sensor,) = (s for s in build_defs("demo").sensors or [] if s.name == "find_lost_runs")
    assert isinstance(sensor, dg.SensorDefinition) and sensor.default_status == dg.DefaultSensorStatus.RUNNING
