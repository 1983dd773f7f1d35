"""Upkeep of a store that runs for years: old runs, lost runs, leftovers of killed runs.

Belongs here: the monthly job that keeps the Dagster instance small without losing anything current; finding runs whose
process is gone.
Does not belong here: results. No table, map or model is ever removed here.

Dagster has no retention of its own for runs and events. Removing a run removes its events, the newest materialization
of a partition among them, so only runs that hold no partition's newest one go.
"""

import datetime as dt
import os
import platform
import time
from collections.abc import Iterable

import dagster as dg
import psutil
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from pydantic import Field

from dl4gam_assets.resources import WorkspaceResource

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def superseded_runs(instance: dg.DagsterInstance, older_than: dt.datetime) -> list[str]:
    """Ids of finished runs created before ``older_than`` that hold no asset partition's newest materialization."""
    filters = dg.RunsFilter(statuses=_FINISHED, created_before=older_than)
    return [
        record.dagster_run.run_id
        for record in instance.get_run_records(filters)
        if not _holds_newest(instance, record.dagster_run.run_id)
    ]


def _holds_newest(instance: dg.DagsterInstance, run_id: str) -> bool:
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    for event in events:
        made = event.asset_materialization
        if made is None:
            continue
        partitions = None if made.partition is None else [made.partition]
        newest = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=made.asset_key, asset_partitions=partitions), limit=1
        ).records
        if newest and newest[0].run_id == run_id:
            return True
    return False


#: Tag of runs that `dl4gam materialize` does in its own process: host and process id.
PROCESS_TAG = "dl4gam/process"
_ALIVE = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def own_process() -> dict[str, str]:
    """Tags of a run that this process does itself: nobody else can start it again."""
    return {PROCESS_TAG: f"{platform.node()}:{os.getpid()}", "dagster/max_retries": "0"}


def lost_runs(instance: dg.DagsterInstance) -> list[tuple[dg.DagsterRun, int]]:
    """Runs that are recorded as going on, but whose process is not there any more, with its id.

    Dagster's monitoring finds them where a launcher can ask for a run's health (Kubernetes). Runs that are processes
    of this machine (the default launcher) would stay "started" for ever after a kill, a crash or a reboot, and keep
    their places in queue and pools.
    """
    if not isinstance(instance.run_launcher, DefaultRunLauncher):
        return []
    found = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=_ALIVE)):
        run = record.dagster_run
        known = _process_of(instance, run)
        if known is not None and not _is_alive(*known):
            found.append((run, known[0]))
    return found


def _process_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int, float] | None:
    """Process id of a run, and when it was told; None if it is unknown or of another machine."""
    told = run.tags.get(PROCESS_TAG)
    if told is not None:
        host, _, pid = told.rpartition(":")
        record = instance.get_run_record_by_id(run.run_id)
        start = record.start_time if record is not None else None
        return (int(pid), start or time.time()) if host == platform.node() else None
    for event in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        data = event.get_dagster_event().engine_event_data
        if "pid" in data.metadata:
            return int(str(data.metadata["pid"].value)), event.timestamp
    return None


def _is_alive(pid: int, told: float) -> bool:
    """Whether a process is there, and not a later one with the same id."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= told + 5
    except psutil.NoSuchProcess:
        return False


def give_up_lost_runs(instance: dg.DagsterInstance) -> list[str]:
    """Record lost runs as failed, so that Dagster starts them again (run_retries) and their places become free.

    Places of runs that ended without giving them back (killed at that very moment) are freed too.
    """
    lost = lost_runs(instance)
    for run, pid in lost:
        instance.report_run_failed(
            run,
            f"Its process ({pid}) is gone: killed, out of memory, or the machine was restarted. What was made is kept; "
            "a new run goes on from there.",
        )
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        holder = instance.get_run_by_id(run_id)
        if holder is None or holder.is_finished:
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return [run.run_id for run, _ in lost]


def busy_pools(instance: dg.DagsterInstance, pools: Iterable[str]) -> dict[str, list[str]]:
    """Pools whose places are all taken, with the ids of the runs that hold them."""
    storage = instance.event_log_storage
    known = {pool.name for pool in storage.get_pool_limits()}
    found = {}
    for pool in sorted(known.intersection(pools)):
        places = storage.get_concurrency_info(pool)
        if places.active_slot_count >= places.slot_count:
            found[pool] = sorted(places.active_run_ids)
    return found


class UpkeepConfig(dg.Config):
    """What the upkeep keeps."""

    keep_days: int = Field(365, ge=1, description="Runs younger than this many days stay, whatever they hold.")
    dry_run: bool = Field(False, description="Only say what would be removed.")


@dg.op
def remove_old_runs(context: dg.OpExecutionContext, config: UpkeepConfig, workspace: WorkspaceResource) -> None:
    """Remove superseded runs with their logs, and temporary files of killed runs."""
    before = dt.datetime.now(dt.UTC) - dt.timedelta(days=config.keep_days)
    old = superseded_runs(context.instance, before)
    context.log.info(f"{len(old)} runs older than {config.keep_days} days hold nothing current")
    if config.dry_run:
        return
    for run_id in old:
        context.instance.delete_run(run_id)
    removed = workspace.region.storage().remove_stale()
    context.log.info(f"removed {len(old)} runs and {removed} temporary files")


@dg.job(description="Remove old runs that hold nothing current, and leftovers of killed ones. No result is touched.")
def tidy_up() -> None:
    remove_old_runs()
