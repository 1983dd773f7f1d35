"""Upkeep of a store that runs for years: old runs, lost runs, leftovers of killed runs.

Belongs here: the monthly job that keeps the Dagster instance small without losing anything current; finding runs whose
process is gone.
Does not belong here: results. No table, map or model is ever removed here.

Dagster has no retention of its own for runs and events. Removing a run removes its events, the newest materialization
of a partition among them, so only runs that hold no partition's newest one go. What a run printed, and its own file of
events (SQLite), go with it.
"""

import contextlib
import datetime as dt
import functools
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import dagster as dg
import psutil
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.tags import HIDDEN_TAG_PREFIX
from pydantic import Field

from dl4gam_assets.resources import WorkspaceResource

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


def superseded_runs(instance: dg.DagsterInstance, older_than: dt.datetime) -> list[str]:
    """Ids of finished runs created before ``older_than`` that hold no asset partition's newest materialization, and no
    newest evaluation of a check."""
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
    return any(
        info.latest_planned_run_id == run_id
        for key, partition in _evaluated(instance, run_id)
        for info in instance.event_log_storage.get_asset_check_partition_info(
            [key], partition_keys=None if partition is None else [partition]
        )
        if info.partition_key == partition
    )


def _evaluated(instance: dg.DagsterInstance, run_id: str) -> set[tuple[dg.AssetCheckKey, str | None]]:
    """Checks that a run evaluated, with the partition of each."""
    found = set()
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        evaluation = entry.get_dagster_event().asset_check_evaluation_data
        found.add((evaluation.asset_check_key, evaluation.partition))
    return found


def remove_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Remove a run with its events and what it printed, and the file that held its events, where there is one."""
    instance.delete_run(run_id)
    with contextlib.suppress(NotImplementedError):
        instance.compute_log_manager.delete_logs(prefix=[run_id])
    if isinstance(instance.event_log_storage, SqliteEventLogStorage):
        file = Path(instance.event_log_storage.path_for_shard(run_id))
        for path in (file, *(file.with_name(file.name + end) for end in ("-journal", "-shm", "-wal"))):
            path.unlink(missing_ok=True)


#: Tag of runs that `dl4gam materialize` does in its own process: machine and process id. The UI hides it.
PROCESS_TAG = f"{HIDDEN_TAG_PREFIX}dl4gam/process"

#: Tag of runs that a launcher started: the machine that does them. The log has the process id. The UI hides it.
HOST_TAG = f"{HIDDEN_TAG_PREFIX}dl4gam/host"

#: Seconds without any event after which a run of an unknown or another machine counts as lost. Living ones write lines.
SILENT_S = 86_400.0

_ALIVE = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


@functools.cache
def this_machine() -> str:
    """Name of this machine and of its start: ``name@start``. Process ids mean nothing on another, or after a reboot."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # no Linux
        start = str(round(psutil.boot_time() / 60))
    return f"{platform.node()}@{start}"


def own_process() -> dict[str, str]:
    """Tags of a run that this process does itself: nobody else can start it again."""
    return {PROCESS_TAG: f"{this_machine()}:{os.getpid()}", "dagster/max_retries": "0"}


def _own_tag(run: dg.DagsterRun) -> str | None:
    """PROCESS_TAG of a run that was done so. One that is executed again has its parent's tags, not its process."""
    return run.tags.get(PROCESS_TAG) if run.parent_run_id is None else None


def tell_host(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Tag a run with the machine that does it, once."""
    if _own_tag(run) is None and run.tags.get(HOST_TAG) != this_machine():
        instance.add_run_tags(run.run_id, {HOST_TAG: this_machine()})
        cast(dict[str, str], run.tags)[HOST_TAG] = this_machine()


def lost_runs(instance: dg.DagsterInstance) -> list[tuple[dg.DagsterRun, str]]:
    """Runs that are recorded as going on, but whose process is not there any more, with the reason to say so.

    Dagster's monitoring finds them where a launcher can ask for a run's health (Kubernetes). Runs that are processes
    of this machine (the default launcher) would stay "started" for ever after a kill, a crash or a reboot, and keep
    their places in queue and pools. Of a run of another machine nothing is known but its events: it is lost when none
    came for a day.
    """
    if not isinstance(instance.run_launcher, DefaultRunLauncher):
        return []
    found = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=_ALIVE)):
        run = record.dagster_run
        known = _process_of(instance, run)
        if known is not None and not _is_alive(*known):
            found.append(
                (run, f"Its process ({known[0]}) is gone: killed, out of memory, or the machine was restarted.")
            )
        elif known is None and _silent_s(instance, run) > SILENT_S:
            found.append((run, "Nothing was heard of it for a day, and it is a run of another machine."))
    return found


def _silent_s(instance: dg.DagsterInstance, run: dg.DagsterRun) -> float:
    """Seconds since the last event of a run."""
    newest = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
    return time.time() - newest[0].event_log_entry.timestamp if newest else 0.0


def _process_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int, float] | None:
    """Process id of a run of this machine, and when it was told; None if it is unknown or of another machine.

    Of a run of this machine before its last start the id is given as 0, which is no process.
    """
    told = _own_tag(run)
    host, _, pid = told.rpartition(":") if told is not None else (run.tags.get(HOST_TAG, ""), "", "")
    name, _, start = host.partition("@")
    mine, _, now = this_machine().partition("@")
    if name != mine:
        return None
    record = instance.get_run_record_by_id(run.run_id)
    began = (record.start_time if record is not None else None) or time.time()
    if start and start != now:
        return 0, began
    if told is not None:
        return int(pid), began
    for event in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        data = event.get_dagster_event().engine_event_data
        if "pid" in data.metadata:
            return int(str(data.metadata["pid"].value)), event.timestamp
    return None


def _is_alive(pid: int, told: float) -> bool:
    """Whether a process is there, and not a later one with the same id."""
    if pid <= 0:
        return False
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
    for run, why in lost:
        instance.report_run_failed(run, f"{why} What was made is kept; a new run goes on from there.")
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
        remove_run(context.instance, run_id)
    removed = workspace.region.storage().remove_stale()
    context.log.info(f"removed {len(old)} runs and {removed} temporary files")


@dg.job(description="Remove old runs that hold nothing current, and leftovers of killed ones. No result is touched.")
def tidy_up() -> None:
    remove_old_runs()
